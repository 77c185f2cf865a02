"""What the planner reads off a step's program, against what the step does on this machine: `make bench-truth`.

The step is compiled for the devices that are here. Flops are counted three times: in JAX's trace, in the program's text
(planner/cost.py), and by XLA itself, which counts a loop once. Memory is what the compiler announces, and what the
process (CPU) or the device (GPU) then holds. Time is the median of some steps, set against the bounds of a roofline, as
`python -m clip_jax.plan` gives them: with the rates of the datasheet, or, of a device that
clip_jax/devices/chips.py doesn't know, as a CPU, with those of one large product and one large copy, timed here.

  python benchmarks/truth.py [model] [pairs on a device]
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import MODELS, Config, OptimConfig, TrainConfig
from clip_jax.devices import sharding
from clip_jax.devices.chips import chip_of
from clip_jax.models import flops
from clip_jax.planner import predict
from clip_jax.planner.cost import Program
from clip_jax.training import optim, step
from clip_jax.typing import Batch

STEPS = 5


def main(name: str = "vit_b32", rows: int = 16) -> None:
    """Print predictions beside measurements."""
    on_cpu = jax.default_backend() == "cpu"
    mesh = sharding.make_mesh()
    train = TrainConfig(batch_size=rows * mesh.size, total_steps=100, dtype="float32" if on_cpu else "bfloat16")
    config = Config(model=MODELS[name], train=train, optim=OptimConfig(warmup_steps=0))
    lowered, state_like, _ = predict.lower_step(config, mesh, 100)
    program = lowered.compile()
    cost, memory = Program(program.as_text()).cost(), program.memory_analysis()
    traced, model_flops = (
        predict.traced_flops(config, mesh) / mesh.size,
        3 * sum(flops.forward_flops(config.model)) * rows,
    )
    kind = jax.devices()[0].device_kind
    print(f"{name}, {rows} pairs on each of {mesh.size} x {kind}, {train.dtype}, remat {train.remat}")
    print(f"flops    trace {traced / 1e12:.4f} T, program {cost.flops / 1e12:.4f} T, XLA {_xla(program) / 1e12:.4f} T")

    model = step.model_from_config(config, mesh)
    optimizer = optim.make_optimizer(config.optim, 100)
    before = _held()
    state = jax.jit(
        lambda key: step.init_state(model.init(key), optimizer, config.optim),
        out_shardings=jax.tree.map(lambda x: x.sharding, state_like),
    )(jax.random.key(0))
    jax.block_until_ready(state)
    batch = sharding.to_global(_batch(config), mesh)
    seconds = []
    for _ in range(STEPS + 1):
        began = time.monotonic()
        state, metrics = program(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - began)
    announced = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"memory   announced {announced / 1e9:.3f} GB, held at the peak {(_held() - before) / 1e9:.3f} GB")
    measured = statistics.median(seconds[1:])
    speed = f"{rows / measured:.1f} pairs a second, {cost.flops / measured / 1e12:.3f} TFLOP/s"
    print(f"time     {measured:.4f} s a step, {speed}")
    if chip := chip_of(kind):
        work, (peak, bandwidth) = cost.unit_flops, (chip.flops_per_second, chip.hbm_bytes_per_second)
        source = "the datasheet"
    else:
        work, (peak, bandwidth) = cost.flops, _rates()
        source = f"{peak / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.1f} GB/s, timed here"
    bounds = work / peak, cost.padded_bytes / bandwidth
    print(f"         by {source}: {max(bounds):.4f} s at once, {sum(bounds):.4f} s in turn")
    print(f"         MFU {model_flops / measured / peak:.3f}; of what is computed {work / measured / peak:.3f}")


def _batch(config: Config) -> Batch:
    """Return pictures of noise and captions of 5 to 32 tokens, those of this process."""
    random, side = np.random.default_rng(0), config.model.image.image_size
    count, tower = config.train.batch_size // jax.process_count(), config.model.text
    text = random.integers(1, tower.eos_id, (count, tower.length), np.int32)
    ends = random.integers(4, min(32, tower.length), count)
    text[np.arange(tower.length)[None] >= ends[:, None]] = 0
    text[np.arange(count), ends] = tower.eos_id
    return Batch(random.integers(0, 256, (count, side, side, 3), np.uint8), text, np.ones(count, bool))


def _held() -> int:
    """Return the most bytes that the first device has held so far; of a CPU, the process."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _rates() -> tuple[float, float]:
    """Return the flops a second of a large float32 product, and the bytes a second of a large copy, on one device."""
    side = 4096
    square, long = jnp.ones((side, side)), jnp.ones(2**27)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    return 2 * side**3 / _fastest(product, square, square), 2 * long.nbytes / _fastest(copy, long)


def _fastest(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(STEPS):
        began = time.monotonic()
        jax.block_until_ready(function(*args))
        seconds.append(time.monotonic() - began)
    return min(seconds)


def _xla(program: jax.stages.Compiled) -> float:
    found = program.cost_analysis()
    return float((found or {}).get("flops", 0.0))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
