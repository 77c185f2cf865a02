"""What a step costs on a slice: compiled for it without it, and read off the program (`hlo.py`).

Times are bounds of a roofline (Williams et al. 2009): work over the datasheet's rates, each resource by itself. Real
steps lie between two of them: all resources busy at once (the slowest alone counts), and one after another (the sum).
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

from clip_jax.config import Config, MeshConfig, name_of, resolve
from clip_jax.devices import sharding
from clip_jax.devices.chips import Number
from clip_jax.losses import LOSSES
from clip_jax.models import flops
from clip_jax.planner.cost import Cost, Program
from clip_jax.planner.topology import Topology
from clip_jax.training import optim, step
from clip_jax.typing import Batch

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one chip of a slice does in one step, and what follows. All figures are a chip's.

    fits: whether the compiler found room. needed_bytes: where it didn't, for what it was looking.
    parameter_bytes, optimizer_bytes, batch_bytes: of `argument_bytes`; the optimizer's are all of the state but the
      parameters. activation_bytes: of `temporary_bytes`, what the backward pass finds in memory. peak_bytes: at once.
    flops: of products, as often as they run; traced_flops: counted in JAX's trace, without the compiler. model_flops:
      three forward passes of full length, the convention of published MFU. kernel_flops: a part of `flops`.
      unit_flops: what the matrix unit does for `flops`: six times as much for products of float32 at full precision.
    hbm_bytes, hbm_bytes_padded: without and with the padding of tiles. link_bytes, network_bytes: what it sends.
    seconds: of each resource alone: flops, hbm, links, network.
    """

    what: str
    topology: Topology
    global_batch: int
    fits: bool
    needed_bytes: Number = 0
    parameter_bytes: Number = 0
    optimizer_bytes: Number = 0
    batch_bytes: Number = 0
    argument_bytes: Number = 0
    activation_bytes: Number = 0
    temporary_bytes: Number = 0
    peak_bytes: Number = 0
    flops: Number = 0
    kernel_flops: Number = 0
    unit_flops: Number = 0
    traced_flops: Number = 0
    model_flops: Number = 0
    hbm_bytes: Number = 0
    hbm_bytes_padded: Number = 0
    link_bytes: Number = 0
    network_bytes: Number = 0
    hops: Number = 0
    collectives: tuple[dict[str, Any], ...] = ()
    hbm_bytes_by_source: dict[str, Number] = dataclasses.field(default_factory=dict)
    endless_loops: tuple[str, ...] = ()
    total_steps: int = 0
    config: Config | None = None
    compiled_text: str = ""

    @property
    def seconds(self) -> dict[str, float]:
        """Return the time that each resource needs by itself."""
        chip = self.topology.chip
        return {
            "flops": self.unit_flops / chip.flops_per_second,
            "hbm": self.hbm_bytes_padded / chip.hbm_bytes_per_second,
            "links": self.link_bytes / chip.link_bytes_per_second,
            "network": self.network_bytes / chip.network_bytes_per_second,
        }

    @property
    def bound_by(self) -> str:
        """Return the resource that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Return the shortest and the longest time of a step: all resources at once, and one after another."""
        return max(self.seconds.values()), sum(self.seconds.values())

    @property
    def mfu(self) -> tuple[float, float]:
        """Return the model's flops over what the chip could do in that time: with perfect overlap, and with none."""
        ideal = self.model_flops / self.topology.chip.flops_per_second
        return tuple(ideal / t if t else 0.0 for t in self.step_seconds)

    @property
    def images_per_second(self) -> tuple[float, float]:
        """Return the pairs that a chip trains on in a second, with perfect overlap, and with none."""
        rows = self.global_batch / self.topology.chips
        return tuple(rows / t if t else 0.0 for t in self.step_seconds)

    @property
    def days(self) -> tuple[float, float]:
        """Return how long the run takes, with perfect overlap, and with none; evaluation and saving come on top."""
        return tuple(self.total_steps * t / 86_400 for t in self.step_seconds)

    @property
    def chip_hours(self) -> tuple[float, float]:
        """Return the days of all chips together, in hours."""
        return tuple(24 * self.topology.chips * t for t in self.days)

    def as_json(self) -> dict[str, Any]:
        """Return one object with everything, ready for `json`."""
        return {
            "what": self.what,
            "topology": self.topology.name,
            "chip": self.topology.chip.name,
            "chips": self.topology.chips,
            "slices": self.topology.slices,
            "global_batch": self.global_batch,
            **(_choices(self.config) if self.config else {}),
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "hbm_capacity_bytes": self.topology.chip.hbm_bytes,
            **{
                name: getattr(self, name)
                for name in (
                    *("argument_bytes", "parameter_bytes", "optimizer_bytes", "batch_bytes"),
                    *("activation_bytes", "temporary_bytes", "peak_bytes"),
                    *("flops", "kernel_flops", "unit_flops", "traced_flops", "model_flops"),
                    *("hbm_bytes", "hbm_bytes_padded"),
                )
            },
            "collective_bytes": self.link_bytes + self.network_bytes,
            "collective_bytes_links": self.link_bytes,
            "collective_bytes_network": self.network_bytes,
            "collectives": list(self.collectives),
            "hops": self.hops,
            "hbm_bytes_by_source": self.hbm_bytes_by_source,
            "seconds": self.seconds,
            "bound_by": self.bound_by,
            "step_seconds": list(self.step_seconds),
            "mfu_bound": self.mfu[0],
            "mfu_no_overlap": self.mfu[1],
            "images_per_second_per_chip": self.images_per_second[0],
            "images_per_second_per_chip_no_overlap": self.images_per_second[1],
            "total_steps": self.total_steps,
            "days": list(self.days),
            "chip_hours": list(self.chip_hours),
            "endless_loops": list(self.endless_loops),
        }


def _choices(config: Config) -> dict[str, Any]:
    """Return what of a run's config a plan depends on most."""
    train, mesh = config.train, config.mesh
    chosen = {"model": name_of(config.model), "remat": train.remat, "micro_batches": train.micro_batches}
    chosen |= {"text_capacity": train.text_capacity, "dtype": train.dtype, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    return chosen | {"shard_moments": config.optim.shard_moments, "freeze": config.optim.freeze}


def plan_step(config: Config, where: Topology) -> Plan:
    """Compile the step of a run for a slice, and say what it costs.

    Raises:
      ValueError: if the config doesn't fit the slice's number of devices, or has a teacher.
      ModuleNotFoundError: without libtpu.
    """
    _refuse_teacher(config)
    devices = where.devices()
    resolved = resolve(config, devices=len(devices), processes=max(1, where.chips // where.chip.chips_per_host))
    mesh = sharding.make_mesh(devices, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    per_chip = where.chip.devices
    lowered, state, batch = lower_step(config, mesh, resolved.total_steps)
    sizes = {
        "parameter_bytes": per_chip * sharding.shard_bytes(state.params),
        "optimizer_bytes": per_chip * (sharding.shard_bytes(state) - sharding.shard_bytes(state.params)),
        "batch_bytes": per_chip * sharding.shard_bytes(batch),
        "activation_bytes": per_chip * saved_bytes(config, mesh),
    }
    plan = Plan(
        what=f"{config.train.dtype} step",
        topology=where,
        global_batch=config.train.batch_size,
        fits=True,
        model_flops=_pair_flops(config) * config.train.batch_size / where.chips,
        traced_flops=traced_flops(config, mesh) / where.chips,
        total_steps=resolved.total_steps,
        config=config,
        **sizes,
    )
    return compiled(plan, lowered)


def plan_loss(name: str, global_batch: int, embed_dim: int, dtype: str, where: Topology) -> Plan:
    """Compile value and gradient of a loss alone, over a batch of embeddings.

    Raises:
      ValueError: for an unknown loss or dtype, or a batch that the devices don't divide.
      ModuleNotFoundError: without libtpu.
    """
    if name not in LOSSES:
        raise ValueError(f"--loss={name!r} is none of {', '.join(LOSSES)}")
    devices = where.devices()
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
        what=f"{name} loss of {global_batch:,} pairs of {embed_dim} {dtype}",
        topology=where,
        global_batch=global_batch,
        fits=True,
        batch_bytes=2 * where.chip.devices * sharding.shard_bytes(rows),
        # Similarities once forward, and their two gradients: three products of all pairs.
        model_flops=3 * 2 * global_batch**2 * embed_dim / where.chips,
        traced_flops=flops.count(gradient, rows, rows, scalar, scalar) / where.chips,
    )
    return compiled(plan, jax.jit(gradient).lower(rows, rows, scalar, scalar))


def compiled(plan: Plan, lowered: jax.stages.Lowered) -> Plan:
    """Return a plan with what the compiler says of its program."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(plan, fits=False, needed_bytes=_needed(str(error)) * plan.topology.chip.devices)
    memory, per_chip = program.memory_analysis(), plan.topology.chip.devices
    text = program.as_text()
    where = plan.topology
    cost: Cost = Program(text, slices=where.slices, devices_per_slice=where.devices_per_slice).cost()
    return dataclasses.replace(
        plan,
        argument_bytes=per_chip * memory.argument_size_in_bytes,
        temporary_bytes=per_chip * memory.temp_size_in_bytes,
        peak_bytes=per_chip * memory.peak_memory_in_bytes,
        flops=per_chip * cost.flops,
        kernel_flops=per_chip * cost.kernel_flops,
        unit_flops=per_chip * cost.unit_flops,
        hbm_bytes=per_chip * cost.logical_bytes,
        hbm_bytes_padded=per_chip * cost.padded_bytes,
        link_bytes=per_chip * sum(c.link_bytes for c in cost.collectives.values()),
        network_bytes=per_chip * sum(c.network_bytes for c in cost.collectives.values()),
        hops=cost.hops,
        collectives=tuple(
            dataclasses.asdict(c) | {"link_bytes": per_chip * c.link_bytes, "network_bytes": per_chip * c.network_bytes}
            for c in cost.collectives.values()
        ),
        hbm_bytes_by_source={name: per_chip * size for name, size in cost.by_source.items()},
        endless_loops=tuple(cost.endless),
        compiled_text=text,
    )


def _refuse_teacher(config: Config) -> None:
    if config.teacher.weights:
        raise ValueError(
            f"teacher.weights={config.teacher.weights!r}: a teacher's part of the step isn't planned;"
            " --config.teacher.weights='' plans the run without it"
        )


def lower_step(config: Config, mesh: Mesh, total_steps: int) -> tuple[jax.stages.Lowered, Any, Batch]:
    """Return the step of a run, lowered for the devices of a mesh, and the shapes of its state and batch."""
    model = step.model_from_config(config, mesh)
    optimizer = optim.make_optimizer(config.optim, total_steps)
    state, batch = step.abstract_state(model, optimizer, config, mesh), batch_like(config, mesh)
    train_step = step.make_train_step(model, optimizer, config, mesh)
    return train_step.lower(state, batch), state, batch


def batch_like(config: Config, mesh: Mesh, rows: int = 0) -> Batch:
    """Return the shapes of a run's batch, or of one with other rows."""
    count, side = rows or config.train.batch_size, config.model.image.image_size
    placed = sharding.batch_sharding(mesh)
    return Batch(
        jax.ShapeDtypeStruct((count, side, side, 3), np.uint8, sharding=placed),
        jax.ShapeDtypeStruct((count, config.model.text.length), np.int32, sharding=placed),
        jax.ShapeDtypeStruct((count,), bool, sharding=placed),
    )


def _gradient(config: Config, mesh: Mesh) -> tuple[Callable, Any]:
    """Return the loss's gradient over a batch, as the step takes it, and the shapes of the parameters."""
    model = step.model_from_config(config, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradient = step.make_gradient(model, config, mesh)

    def of(params: Any, batch: Batch) -> Any:
        trained = {name: value for name, value in params.items() if name != "batch_stats"}
        return gradient(trained, params.get("batch_stats"), batch, jax.random.key(0))

    return of, params


def traced_flops(config: Config, mesh: Mesh) -> float:
    """Return the flops of a step's products on all devices together, from the trace, recomputation included."""
    gradient, params = _gradient(config, mesh)
    return flops.count(gradient, params, batch_like(config, mesh), padding=False)


def saved_bytes(config: Config, mesh: Mesh) -> float:
    """Return the bytes that a device's towers save for the backward pass: those that grow with the batch."""
    model = step.model_from_config(config, mesh)
    params, embed = jax.eval_shape(model.init, jax.random.key(0)), step.make_embed(model, config.optim.freeze)
    stats = params.pop("batch_stats", None)

    def residuals(count: int) -> list[Any]:
        like = batch_like(config, mesh, count)
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))

        def pullback(params: Any, stats: Any, rows: step.Examples) -> Any:
            return jax.vjp(lambda params: embed(params, stats, rows)[0], params)[1]

        return jax.tree.leaves(jax.eval_shape(pullback, params, stats, step.Examples(like.image, like.text, key)))

    rows = config.train.batch_size // config.train.micro_batches
    shards = sharding.batch_shards(mesh)
    grown = zip(residuals(rows), residuals(2 * rows), strict=True)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x, twice in grown if x.shape != twice.shape) / shards


def _needed(message: str) -> float:
    """Return the bytes that the compiler's error says were needed."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available", message)
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


# ------------------------------------------------------------------------------------------------- by the datasheet


def plan_by_datasheet(config: Config, where: Topology) -> Plan:
    """Say what can be said without the device's compiler: what must be held, computed, moved and sent at least.

    Held: the state, the batch and saved activations; `fits` leaves other temporaries out. Moved: the state in and out,
    activations out and in. Sent: gradients of what is trained once around, and with `mesh.fsdp` parameters twice.
    Products of float32 run as TF32, JAX's default there, at half of bfloat16's rate.

    Raises:
      ValueError: if the config doesn't fit the number of devices, has a teacher, or cuts layers.
    """
    _refuse_teacher(config)
    if config.mesh.tensor > 1:
        raise ValueError(
            f"mesh.tensor={config.mesh.tensor}: what the parts of a layer send one another isn't planned by datasheets;"
            " use --config.mesh.tensor=1, with mesh.fsdp for a smaller state"
        )
    resolved = resolve(config, devices=where.chips, processes=max(1, where.chips // where.chip.chips_per_host))
    part = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=resolved.batch_per_device),
        mesh=MeshConfig(),
    )
    alone = sharding.make_mesh(jax.devices("cpu")[:1])
    fsdp, bytes_each = config.mesh.fsdp, 2 if config.train.dtype == "bfloat16" else 4
    together = AbstractMesh((1, where.chips // fsdp, fsdp, 1), sharding.AXES)
    optimizer = optim.make_optimizer(config.optim, resolved.total_steps)
    state = step.abstract_state(step.model_from_config(part, alone), optimizer, config, together)
    parameters, held = sharding.shard_bytes(state.params), sharding.shard_bytes(state)
    batch, activations = sharding.shard_bytes(batch_like(part, alone)), saved_bytes(part, alone)
    frozen = jax.tree.leaves(optim.frozen_mask(state.params, config.optim.freeze))
    sizes = [(bytes_each * x.size, still) for x, still in zip(jax.tree.leaves(state.params), frozen, strict=True)]
    gathers = 1 if fsdp == 1 else 2  # of updated parameters; or, cut, before each pass
    around = sum(size for size, still in sizes if not still) + gathers * sum(
        size for size, still in sizes if fsdp > 1 or not still
    )
    sent = around * (where.chips - 1) / where.chips
    traced = traced_flops(part, alone)
    # A host's chips have links among them; beyond it, their share of the network carries what one host's sum is.
    hosts = -(-where.chips // where.chip.chips_per_host)
    return Plan(
        what=f"{config.train.dtype} step, by the datasheet alone",
        topology=where,
        global_batch=config.train.batch_size,
        fits=held + batch + activations <= where.chip.hbm_bytes,
        needed_bytes=held + batch + activations,
        parameter_bytes=parameters,
        optimizer_bytes=held - parameters,
        batch_bytes=batch,
        argument_bytes=held + batch,
        activation_bytes=activations,
        temporary_bytes=activations,
        peak_bytes=held + batch + activations,
        flops=traced,
        traced_flops=traced,
        unit_flops=traced if config.train.dtype == "bfloat16" else 2 * traced,
        model_flops=_pair_flops(config) * resolved.batch_per_device,
        hbm_bytes=2 * (held + activations),
        hbm_bytes_padded=2 * (held + activations),
        link_bytes=sent if where.chips > 1 else 0,
        network_bytes=sent / where.chip.chips_per_host if hosts > 1 else 0,
        total_steps=resolved.total_steps,
        config=config,
    )


def _pair_flops(config: Config) -> float:
    """Return the model FLOPs of a training step per image-text pair."""
    return flops.training_flops(config.model, optim.frozen_towers(config.model, config.optim.freeze))
