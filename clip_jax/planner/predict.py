"""Cost of a training step on a topology: compiled ahead of time and counted (`cost.py`), or estimated from datasheets.

Times are roofline bounds (Williams et al. 2009): work divided by the datasheet's rate, for each resource alone. A real
step takes between two of them: full overlap (the slowest resource alone) and no overlap (the sum of all).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from clip_jax.config import Config, MeshConfig, check_name, name_of, resolve
from clip_jax.devices import sharding
from clip_jax.losses import LOSSES
from clip_jax.models import flops, split_batch_stats
from clip_jax.models.clip import attention_implementations, matmul_precision
from clip_jax.planner.cost import Cost, Program
from clip_jax.planner.topology import Topology
from clip_jax.training import optim, step
from clip_jax.typing import Batch, Number

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cost of one training step. All figures are per chip, unless noted."""

    program: str  # e.g. "bfloat16 step"
    topology: Topology
    global_batch: int  # pairs, on all chips
    fits: bool  # whether the compiler found room in HBM
    needed_bytes: Number = 0  # HBM that the compiler needs, if it does not fit
    parameter_bytes: Number = 0  # part of argument_bytes
    optimizer_bytes: Number = 0  # part of argument_bytes: the state without the parameters
    batch_bytes: Number = 0  # part of argument_bytes
    argument_bytes: Number = 0
    activation_bytes: Number = 0  # part of temporary_bytes: residuals of the towers for the backward pass
    temporary_bytes: Number = 0  # sum of the compiler's heap, including fragmentation
    peak_bytes: Number = 0
    flops: Number = 0  # of matmuls, including recomputation
    kernel_flops: Number = 0  # part of flops: the kernels' own estimates
    bf16_equivalent_flops: Number = 0  # flops times passes of the bfloat16 matrix unit
    traced_flops: Number = 0  # counted in JAX's trace, independent of the compiler
    model_flops: Number = 0  # three full-length forward passes, the convention of published MFU
    hbm_bytes: Number = 0  # traffic without tile padding
    hbm_bytes_padded: Number = 0  # traffic with tile padding
    interconnect_bytes: Number = 0  # sent over ICI or NVLink
    network_bytes: Number = 0  # sent over the data center network
    collectives: tuple[dict[str, Any], ...] = ()
    hbm_bytes_by_source: dict[str, Number] = dataclasses.field(default_factory=dict)
    unknown_trip_counts: tuple[str, ...] = ()  # loops that are counted once
    total_steps: int = 0
    config: Config | None = None
    attention: dict[str, str] = dataclasses.field(default_factory=dict)  # implementation by tower
    matmul_precision: str = ""  # of the towers
    compiled_text: str = ""

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each resource alone."""
        chip = self.topology.chip
        return {
            "compute": self.bf16_equivalent_flops / chip.flops_per_second,
            "hbm": self.hbm_bytes_padded / chip.hbm_bytes_per_second,
            "interconnect": self.interconnect_bytes / chip.link_bytes_per_second,
            "network": self.network_bytes / chip.network_bytes_per_second,
        }

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Time of a step with full overlap of the resources, and with no overlap."""
        return max(self.seconds.values()), sum(self.seconds.values())

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilization with full overlap, and with no overlap."""
        ideal = self.model_flops / self.topology.chip.flops_per_second
        return tuple(ideal / t if t else 0.0 for t in self.step_seconds)

    @property
    def images_per_second(self) -> tuple[float, float]:
        """Pairs per second and chip with full overlap, and with no overlap."""
        rows = self.global_batch / self.topology.chips
        return tuple(rows / t if t else 0.0 for t in self.step_seconds)

    @property
    def days(self) -> tuple[float, float]:
        """Duration of all steps with full overlap, and with no overlap; evaluation is not included."""
        return tuple(self.total_steps * t / 86_400 for t in self.step_seconds)

    @property
    def chip_hours(self) -> tuple[float, float]:
        """`days` times the number of chips, in hours."""
        return tuple(24 * self.topology.chips * t for t in self.days)

    def as_json(self) -> dict[str, Any]:
        """Return all figures as one object of JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        topology, config = fields.pop("topology"), fields.pop("config")
        del fields["compiled_text"]
        return {
            "topology": topology.name,
            "chip": topology.chip.name,
            "chips": topology.chips,
            "slices": topology.slices,
            **(_config_fields(config) if config else {}),
            **fields,
            "hbm_capacity_bytes": topology.chip.hbm_bytes,
            "collective_count": sum(group["count"] for group in self.collectives),
            "collective_bytes": self.interconnect_bytes + self.network_bytes,
            "seconds": self.seconds,
            "bound_by": self.bound_by,
            "step_seconds": self.step_seconds,
            "mfu_bound": self.mfu[0],
            "mfu_no_overlap": self.mfu[1],
            "images_per_second_per_chip": self.images_per_second[0],
            "images_per_second_per_chip_no_overlap": self.images_per_second[1],
            "days": self.days,
            "chip_hours": self.chip_hours,
        }


def _config_fields(config: Config) -> dict[str, Any]:
    """Return the config values that a plan depends on most."""
    train, mesh = config.train, config.mesh
    fields = {"model": name_of(config.model), "remat": train.remat, "micro_batches": train.micro_batches}
    fields |= {"text_capacity": train.text_capacity, "dtype": train.dtype, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    return fields | {"shard_moments": config.optim.shard_moments, "freeze": config.optim.freeze}


def plan_step(config: Config, topology: Topology) -> Plan:
    """Compile the training step of a config for a topology and return its cost.

    Raises:
      ValueError: if the config does not fit the number of devices, or has a teacher.
      ModuleNotFoundError: without libtpu.
    """
    _check_no_teacher(config)
    devices = topology.devices()
    processes = max(1, topology.chips // topology.chip.chips_per_host)
    resolved = resolve(config, devices=len(devices), processes=processes)
    mesh = sharding.make_mesh(devices, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    per_chip, batch_size = topology.chip.devices, config.train.batch_size
    lowered, state, batch = lower_step(config, mesh, resolved.total_steps)
    parameters = sharding.shard_bytes(state.params)
    plan = Plan(
        program=f"{config.train.dtype} step",
        topology=topology,
        global_batch=batch_size,
        fits=True,
        parameter_bytes=per_chip * parameters,
        optimizer_bytes=per_chip * (sharding.shard_bytes(state) - parameters),
        batch_bytes=per_chip * sharding.shard_bytes(batch),
        activation_bytes=per_chip * saved_bytes(config, mesh),
        model_flops=_flops_per_pair(config) * batch_size / topology.chips,
        traced_flops=traced_flops(config, mesh) / topology.chips,
        total_steps=resolved.total_steps,
        config=config,
        **_numerics(config, mesh),
    )
    return _with_compiled_cost(plan, lowered)


def plan_loss(name: str, global_batch: int, embed_dim: int, dtype: str, topology: Topology) -> Plan:
    """Compile value and gradient of a loss alone, over a batch of embeddings, and return its cost.

    Raises:
      ValueError: for an unknown loss or dtype, or a batch that the devices do not divide.
      ModuleNotFoundError: without libtpu.
    """
    check_name("--loss", name, LOSSES)
    devices = topology.devices()
    if global_batch % len(devices):
        raise ValueError(
            f"--global_batch={global_batch} does not divide over {len(devices)} devices;"
            f" use {max(1, global_batch // len(devices)) * len(devices)}"
        )
    mesh = sharding.make_mesh(devices)
    loss = jax.shard_map(
        functools.partial(LOSSES[name](), axis=sharding.BATCH_AXES),
        mesh=mesh,
        in_specs=(sharding.BATCH, sharding.BATCH, sharding.REPLICATED, sharding.REPLICATED),
        out_specs=sharding.REPLICATED,
    )
    rows = jax.ShapeDtypeStruct((global_batch, embed_dim), jnp.dtype(dtype), sharding=sharding.batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    plan = Plan(
        program=f"{name} loss of {global_batch:,} pairs of {embed_dim} {dtype}",
        topology=topology,
        global_batch=global_batch,
        fits=True,
        batch_bytes=2 * topology.chip.devices * sharding.shard_bytes(rows),
        # Logits once forward, and their two gradients: three matmuls over all pairs.
        model_flops=3 * 2 * global_batch**2 * embed_dim / topology.chips,
        traced_flops=flops.count(gradient, rows, rows, scalar, scalar) / topology.chips,
    )
    return _with_compiled_cost(plan, jax.jit(gradient).lower(rows, rows, scalar, scalar))


def _with_compiled_cost(plan: Plan, lowered: jax.stages.Lowered) -> Plan:
    """Compile, and return the plan with the memory and the cost of the program."""
    topology, per_chip = plan.topology, plan.topology.chip.devices
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available", str(error))
        needed = float(found[1]) * _UNITS[found[2]] if found else 0.0
        return dataclasses.replace(plan, fits=False, needed_bytes=needed * per_chip)
    memory, text = program.memory_analysis(), program.as_text()
    cost: Cost = Program(text, slices=topology.slices, devices_per_slice=topology.devices_per_slice).cost()
    collectives = tuple(
        dataclasses.asdict(c)
        | {"interconnect_bytes": per_chip * c.interconnect_bytes, "network_bytes": per_chip * c.network_bytes}
        for c in cost.collectives.values()
    )
    return dataclasses.replace(
        plan,
        argument_bytes=per_chip * memory.argument_size_in_bytes,
        temporary_bytes=per_chip * memory.temp_size_in_bytes,
        peak_bytes=per_chip * memory.peak_memory_in_bytes,
        flops=per_chip * cost.flops,
        kernel_flops=per_chip * cost.kernel_flops,
        bf16_equivalent_flops=per_chip * cost.bf16_equivalent_flops,
        hbm_bytes=per_chip * cost.logical_bytes,
        hbm_bytes_padded=per_chip * cost.padded_bytes,
        interconnect_bytes=sum(c["interconnect_bytes"] for c in collectives),
        network_bytes=sum(c["network_bytes"] for c in collectives),
        collectives=collectives,
        hbm_bytes_by_source={name: per_chip * size for name, size in cost.bytes_by_source.items()},
        unknown_trip_counts=tuple(cost.unknown_trip_counts),
        compiled_text=text,
    )


def _numerics(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the implementation of attention by tower, and the precision of matmuls, as fields of a plan."""
    dtype = config.train.dtype
    found = attention_implementations(config.model, mesh, dtype=dtype, text_capacity=config.train.text_capacity)
    return {"attention": found, "matmul_precision": matmul_precision(dtype) or dtype}


def _check_no_teacher(config: Config) -> None:
    if config.teacher.weights:
        raise ValueError(
            f"teacher.weights={config.teacher.weights!r}: the planner has no cost model for a teacher;"
            " --config.teacher.weights='' plans the run without it"
        )


def lower_step(config: Config, mesh: Mesh, total_steps: int) -> tuple[jax.stages.Lowered, Any, Batch]:
    """Return the lowered training step for the devices of a mesh, and its abstract state and batch."""
    model = step.model_from_config(config, mesh)
    optimizer = optim.make_optimizer(config.optim, total_steps, architecture=config.model)
    state, batch = step.abstract_state(model, optimizer, config, mesh), abstract_batch(config, mesh)
    train_step = step.make_train_step(model, optimizer, config, mesh)
    return train_step.lower(state, batch), state, batch


def abstract_batch(config: Config, mesh: Mesh, rows: int = 0) -> Batch:
    """Return the shapes of a batch; rows: instead of the config's batch size."""
    count, side = rows or config.train.batch_size, config.model.image.image_size
    rows_sharding = sharding.batch_sharding(mesh)
    return Batch(
        jax.ShapeDtypeStruct((count, side, side, 3), np.uint8, sharding=rows_sharding),
        jax.ShapeDtypeStruct((count, config.model.text.context_length), np.int32, sharding=rows_sharding),
        jax.ShapeDtypeStruct((count,), bool, sharding=rows_sharding),
    )


def traced_flops(config: Config, mesh: Mesh) -> float:
    """Return the matmul FLOPs of a step on all devices, counted in the trace, including recomputation."""
    model = step.model_from_config(config, mesh)
    gradient = step.make_gradient(model, config, mesh)

    def batch_gradient(params: Any, batch: Batch) -> Any:
        return gradient(*split_batch_stats(params), batch, jax.random.key(0))

    params = jax.eval_shape(model.init, jax.random.key(0))
    return flops.count(batch_gradient, params, abstract_batch(config, mesh), padding=False)


def saved_bytes(config: Config, mesh: Mesh) -> float:
    """Return the bytes per device that the towers save for the backward pass: residuals that grow with the batch."""
    model = step.model_from_config(config, mesh)
    params, stats = split_batch_stats(jax.eval_shape(model.init, jax.random.key(0)))
    embed = step.make_embed(model, config.optim.freeze)

    def residuals(count: int) -> list[Any]:
        batch = abstract_batch(config, mesh, count)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))

        def pullback(params: Any, stats: Any, rows: step.Examples) -> Callable:
            return jax.vjp(lambda params: embed(params, stats, rows)[0], params)[1]

        return jax.tree.leaves(jax.eval_shape(pullback, params, stats, step.Examples(batch.image, batch.text, keys)))

    rows = config.train.batch_size // config.train.micro_batches
    pairs = zip(residuals(rows), residuals(2 * rows), strict=True)
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x, doubled in pairs if x.shape != doubled.shape)
    return total / sharding.batch_shards(mesh)


def plan_by_datasheet(config: Config, topology: Topology) -> Plan:
    """Return lower bounds of a step's cost without compiling it, for GPUs.

    Memory: state, batch and saved activations, without other temporaries. FLOPs: without those of the loss for texts
    of other devices. HBM traffic: state and activations, read and written once. Collectives: one ring over the
    gradients of trained parameters, and with `mesh.fsdp` two gathers of the parameters.

    Raises:
      ValueError: if the config does not fit the number of devices, has a teacher, or `mesh.tensor` above 1.
    """
    _check_no_teacher(config)
    if config.mesh.tensor > 1:
        raise ValueError(
            f"mesh.tensor={config.mesh.tensor}: plans by datasheet have no cost model for tensor parallelism;"
            " use --config.mesh.tensor=1, with mesh.fsdp for a smaller state"
        )
    chip, chips = topology.chip, topology.chips
    resolved = resolve(config, devices=chips, processes=max(1, chips // chip.chips_per_host))
    rows = resolved.batch_per_device
    local = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows), mesh=MeshConfig())
    local_mesh, fsdp = sharding.make_mesh(jax.devices("cpu")[:1]), config.mesh.fsdp
    global_mesh = AbstractMesh((1, chips // fsdp, fsdp, 1), sharding.AXES)
    optimizer = optim.make_optimizer(config.optim, resolved.total_steps, architecture=config.model)
    state = step.abstract_state(step.model_from_config(local, local_mesh), optimizer, config, global_mesh)
    parameters, state_bytes = sharding.shard_bytes(state.params), sharding.shard_bytes(state)
    batch, activations = sharding.shard_bytes(abstract_batch(local, local_mesh)), saved_bytes(local, local_mesh)
    peak = state_bytes + batch + activations
    sent = _gradient_and_gather_bytes(config, state.params) * (chips - 1) / chips
    traced = traced_flops(local, local_mesh)
    rate = chip.float32_flops_per_second if config.train.dtype == "float32" else chip.flops_per_second
    hosts = -(-chips // chip.chips_per_host)
    return Plan(
        program=f"{config.train.dtype} step, by datasheet",
        topology=topology,
        global_batch=config.train.batch_size,
        fits=peak <= chip.hbm_bytes,
        needed_bytes=peak,
        parameter_bytes=parameters,
        optimizer_bytes=state_bytes - parameters,
        batch_bytes=batch,
        argument_bytes=state_bytes + batch,
        activation_bytes=activations,
        temporary_bytes=activations,
        peak_bytes=peak,
        flops=traced,
        traced_flops=traced,
        bf16_equivalent_flops=traced * (chip.flops_per_second / rate),
        model_flops=_flops_per_pair(config) * rows,
        hbm_bytes=2 * (state_bytes + activations),
        hbm_bytes_padded=2 * (state_bytes + activations),
        interconnect_bytes=sent if chips > 1 else 0,
        # The chips of a host reduce over NVLink first, and share the bytes that leave the host.
        network_bytes=sent / chip.chips_per_host if hosts > 1 else 0,
        total_steps=resolved.total_steps,
        config=config,
        **_numerics(config, Mesh(np.full((1, 1, 1, 1), _GPU(), object), sharding.AXES)),
    )


@dataclasses.dataclass(frozen=True)
class _GPU:
    """Stand-in for a JAX device; all GPUs of `CHIPS` are of this compute capability or higher."""

    platform: str = "gpu"
    compute_capability: str = "8.0"


def _gradient_and_gather_bytes(config: Config, params: Any) -> int:
    """Return the bytes of all gradients, and of all parameters as often as they are gathered."""
    itemsize = 2 if config.train.dtype == "bfloat16" else 4
    frozen = jax.tree.leaves(optim.frozen_mask(params, config.optim.freeze))
    sizes = [(itemsize * x.size, still) for x, still in zip(jax.tree.leaves(params), frozen, strict=True)]
    gradients = sum(size for size, still in sizes if not still)
    if config.mesh.fsdp == 1:
        return 2 * gradients  # the second half of an all-reduce gathers
    return gradients + 2 * sum(size for size, _ in sizes)  # gathered before the forward and the backward pass


def _flops_per_pair(config: Config) -> float:
    """Return the model FLOPs of a training step per image-text pair."""
    return flops.training_flops(config.model, optim.frozen_towers(config.model, config.optim.freeze))
