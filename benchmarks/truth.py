"""Compare the planner's figures of a training step with measurements on this machine: `make bench-truth`.

The step is compiled for the local devices. FLOPs are counted in JAX's trace, in the program's text (planner/cost.py),
and by XLA, which counts a loop body once. Memory: the compiler's figure, and the peak of the process (CPU) or device.
Time: the median of some steps, and the roofline bounds of `python -m clip_jax.plan`, by the datasheet, or for devices
without an entry in clip_jax/devices/chips.py (CPUs) by the timed rates of one large matmul and one large copy.

  python benchmarks/truth.py [model] [pairs per device]
"""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import MODELS, Architecture, Config, OptimConfig, TrainConfig
from clip_jax.devices import sharding
from clip_jax.devices.chips import chip_of
from clip_jax.models import flops
from clip_jax.planner import predict
from clip_jax.planner.cost import Program
from clip_jax.training import optim, step
from clip_jax.typing import Batch

STEPS = 5


def main(name: str = "vit_b32", rows: int = 16) -> None:
    """Print predictions and measurements."""
    print(report(name, compare(MODELS[name], rows)))


def compare(architecture: Architecture, rows: int, *, rates_side: int = 4096) -> dict[str, Any]:
    """Return predicted and measured FLOPs, bytes and seconds of one training step, per device.

    Args:
      rows: pairs per device.
      rates_side: side of the matmul that is timed on a device without a datasheet.
    """
    mesh = sharding.make_mesh()
    config = make_config(architecture, rows * mesh.size)
    lowered, abstract_state, _ = predict.lower_step(config, mesh, 100)
    program = lowered.compile()
    cost, memory = Program(program.as_text()).cost(), program.memory_analysis()
    before = peak_bytes()
    state, batch = init_state(config, mesh, abstract_state), sharding.to_global(noise_batch(config), mesh)
    seconds = []
    for _ in range(STEPS + 1):
        start = time.monotonic()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - start)
    measured, kind = statistics.median(seconds[1:]), jax.devices()[0].device_kind
    flops_rate, hbm_rate, source = device_rates(rates_side)
    # A GPU program calls libraries, whose FLOPs its text does not show.
    traced, on_gpu = traced_flops(config, mesh), jax.default_backend() == "gpu"
    work = traced if on_gpu else cost.bf16_equivalent_flops if chip_of(kind) else cost.flops
    bounds = work / flops_rate, cost.padded_bytes / hbm_rate
    return {
        "rows_per_device": rows,
        "devices": mesh.size,
        "device_kind": kind,
        "dtype": config.train.dtype,
        "remat": config.train.remat,
        "traced_flops": traced,
        "program_flops": cost.flops,
        "xla_flops": float((program.cost_analysis() or {}).get("flops", 0.0)),
        "predicted_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "measured_bytes": peak_bytes() - before,
        "step_seconds": measured,
        "flops_per_second": flops_rate,
        "hbm_bytes_per_second": hbm_rate,
        "rates_from": source,
        "bound_seconds": [max(bounds), sum(bounds)],
        "mfu": 3 * sum(flops.forward_flops(architecture)) * rows / measured / flops_rate,
        "hardware_flops_utilization": work / measured / flops_rate,
    }


def report(name: str, found: dict[str, Any]) -> str:
    """Return the text of a comparison."""
    seconds, tera = found["step_seconds"], {key: value / 1e12 for key, value in found.items() if key.endswith("_flops")}
    predicted, measured = found["predicted_bytes"] / 1e9, found["measured_bytes"] / 1e9
    rates = f"{found['flops_per_second'] / 1e9:.0f} GFLOP/s and {found['hbm_bytes_per_second'] / 1e9:.1f} GB/s"
    bounds = "{:.4f} s with full overlap, {:.4f} s with none".format(*found["bound_seconds"])
    return "\n".join(
        (
            f"{name}, {found['rows_per_device']} pairs on each of {found['devices']} x {found['device_kind']},"
            f" {found['dtype']}, remat {found['remat']}",
            "FLOPs    trace {traced_flops:.4f} T, program {program_flops:.4f} T, XLA {xla_flops:.4f} T".format(**tera),
            f"memory   predicted {predicted:.3f} GB, measured {measured:.3f} GB",
            f"time     {seconds:.4f} s per step, {found['rows_per_device'] / seconds:.1f} images/s,"
            f" {tera['program_flops'] / seconds:.3f} TFLOP/s",
            f"bounds   {bounds}, at {rates} ({found['rates_from']})",
            f"MFU      {found['mfu']:.3f}; by computed FLOPs {found['hardware_flops_utilization']:.3f}",
        )
    )


def traced_flops(config: Config, mesh: jax.sharding.Mesh) -> float:
    """Return the matmul FLOPs of a step per device; on GPUs with XLA's attention, as cuDNN's is opaque to the trace."""
    if jax.default_backend() == "gpu":
        rows = config.train.batch_size // mesh.size
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
        mesh = sharding.make_mesh(jax.devices("cpu")[:1])
    return predict.traced_flops(config, mesh) / mesh.size


def make_config(architecture: Architecture, batch_size: int) -> Config:
    """Return the default training config at a batch size; float32 on CPUs."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    train = TrainConfig(batch_size=batch_size, total_steps=100, dtype=dtype)
    return Config(model=architecture, train=train, optim=OptimConfig(warmup_steps=0))


def init_state(config: Config, mesh: jax.sharding.Mesh, abstract_state: Any) -> step.TrainState:
    """Return an initialized train state on the mesh."""
    model, optimizer = step.model_from_config(config, mesh), optim.make_optimizer(config.optim, 100)
    init = jax.jit(
        lambda key: step.init_state(model.init(key), optimizer, config.optim),
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract_state),
    )
    return jax.block_until_ready(init(jax.random.key(0)))


def noise_batch(config: Config) -> Batch:
    """Return this process's images of noise and captions of 5 to 32 tokens."""
    random, side = np.random.default_rng(0), config.model.image.image_size
    count, tower = config.train.batch_size // jax.process_count(), config.model.text
    text = random.integers(1, tower.eos_id, (count, tower.context_length), np.int32)
    ends = random.integers(4, min(32, tower.context_length), count)
    text[np.arange(tower.context_length)[None] >= ends[:, None]] = 0
    text[np.arange(count), ends] = tower.eos_id
    return Batch(random.integers(0, 256, (count, side, side, 3), np.uint8), text, np.ones(count, bool))


def peak_bytes() -> int:
    """Return the peak memory of the first device so far; on a CPU that of the process."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_rates(side: int = 4096) -> tuple[float, float, str]:
    """Return FLOP/s, HBM bytes/s and their source for one device: its datasheet, or timed float32 matmul and copy."""
    chip = chip_of(jax.devices()[0].device_kind)
    if chip:
        return chip.flops_per_second / chip.devices, chip.hbm_bytes_per_second / chip.devices, "datasheet"
    square, vector = jnp.ones((side, side)), jnp.ones(8 * side**2)
    matmul, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    return 2 * side**3 / _fastest(matmul, square, square), 2 * vector.nbytes / _fastest(copy, vector), "timed here"


def _fastest(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(STEPS):
        start = time.monotonic()
        jax.block_until_ready(function(*args))
        seconds.append(time.monotonic() - start)
    return min(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
