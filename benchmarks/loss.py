"""Memory and time of the tiled losses and their dense references, alternately, on one core: `make bench-loss`.

Value and gradient of 16,384 pairs of 512 float32 numbers. Memory: temporaries as reported by XLA. Time: process time.
The last line is the lowest median ratio of the dense time to the tiled time.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from clip_jax.losses import LOSSES  # noqa: E402

BATCH, WIDTH, ROUNDS = 16_384, 512, 3


def main() -> None:
    """Print memory and time of both forms of each loss, and the lowest ratio in the last line."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((BATCH, WIDTH)).astype(np.float32) for _ in range(2)]
    inputs = (*(x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows), jnp.float32(14.3), jnp.float32(-10))
    print(f"ratio: {min(_compare(name, inputs) for name in LOSSES):.2f}")


def _compare(name: str, inputs: tuple) -> float:
    loss = LOSSES[name]()
    forms = {
        "tiled": lambda *inputs: loss(*inputs)[0],
        "dense": lambda *inputs: loss.dense(*inputs, jnp.eye(BATCH, dtype=bool)),
    }
    gradient = {
        form: jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3))).lower(*inputs).compile()
        for form, function in forms.items()
    }
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    values = {}
    for number in range(ROUNDS):
        for form in list(forms)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            values[form] = jax.block_until_ready(gradient[form](*inputs))
            seconds[form].append(time.process_time() - start)
    np.testing.assert_allclose(values["tiled"][0], values["dense"][0], rtol=1e-5)
    ratio = statistics.median(a / b for a, b in zip(seconds["dense"], seconds["tiled"], strict=True))
    for form in forms:
        megabytes = gradient[form].memory_analysis().temp_size_in_bytes / 1e6
        print(f"{name} {form:<6} {megabytes:6,.0f} MB {statistics.median(seconds[form]):6.2f} s")
    print(f"{name}: {ratio:.2f} times as fast")
    return ratio


if __name__ == "__main__":
    main()
