"""Loading time and memory of ViT-L/14 and RN50x64 relative to reading the bytes of the file: `make bench-loading`.

Weights are random; the files are torch and safetensors with OpenAI's names. Each measurement runs in its own process
and starts with the file evicted from the page cache; the two kinds alternate. Memory is the process's anonymous memory,
without the mapped file. The last line is the largest of the four median ratios.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

ROUNDS = 5
_CHUNK = 1 << 24  # bytes


def main() -> None:
    """Print seconds, ratio and memory of each file, and the largest ratio in the last line."""
    if len(sys.argv) == 3:
        return _measure(pathlib.Path(sys.argv[1]), sys.argv[2])
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for model in ("vit_l14", "rn50x64"):
            for ending in ("pt", "safetensors"):
                file = pathlib.Path(folder) / f"{model}.{ending}"
                _write(file, model)
                largest = max(largest, _compare(file))
                file.unlink()
    print(f"ratio: {largest:.2f}")


def _compare(file: pathlib.Path) -> float:
    found: dict[str, list[tuple[float, float]]] = {"bytes": [], "load": []}
    for _ in range(ROUNDS):
        for kind, measured in found.items():
            command = [sys.executable, __file__, str(file), kind]
            output = subprocess.run(command, check=True, capture_output=True, text=True)
            measured.append(tuple(map(float, output.stdout.split())))
    seconds = {kind: [row[0] for row in rows] for kind, rows in found.items()}
    ratio = statistics.median(load / read for read, load in zip(seconds["bytes"], seconds["load"], strict=True))
    memory = statistics.median(row[1] for row in found["load"])
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    read, load = (f"{kind} {value:5.2f} s" for kind, value in medians.items())
    print(f"{file.name:<20} {read}   {load}   ratio {ratio:.2f}   memory / weights {memory:.2f}", flush=True)
    return ratio


def _measure(file: pathlib.Path, kind: str) -> None:
    import clip_jax

    load = clip_jax.load  # imported before the clock starts
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    before, peak, done = _anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], _anonymous_memory())

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    if kind == "load":
        load(file, activation="quick_gelu")
    else:
        buffer = bytearray(_CHUNK)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    seconds = time.perf_counter() - start
    done.set()
    print(seconds, max(0, peak[0] - before) / file.stat().st_size)


def _anonymous_memory() -> int:
    """Return the anonymous memory of this process in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _write(file: pathlib.Path, model: str) -> None:
    from clip_jax.config import MODELS
    from clip_jax.interop import conversion, name_tables, safetensors, torch_file

    rng = np.random.default_rng(0)
    shapes = conversion.parameter_shapes(MODELS[model]).items()
    drawn = {path: rng.random((layers, *shape) if layers else shape, np.float32) for path, (shape, layers) in shapes}
    tensors = conversion.LazyTensors(MODELS[model], conversion.nested(drawn), name_tables.OPENAI)
    (torch_file if file.suffix == ".pt" else safetensors).write(file, tensors)


if __name__ == "__main__":
    main()
