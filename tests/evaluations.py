"""Runs `python -m clip_jax.evaluate` in processes, and writes small datasets in CLIP_benchmark's layout."""

import contextlib
import io
import json
import os
import socket
import tarfile

import numpy as np
from PIL import Image

from clip_jax.evals.datasets.registry import DATASETS
from tests import runs
from tests.commands import Command


def start(*arguments, process=0, processes=1, port=0, tiny=False):
    """Start one process. tiny: datasets may have any size, see `tests.tiny_evaluate`."""
    environment = (
        os.environ
        | runs.CACHED
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "PYTHONPATH": str(runs.ROOT),
            "CLIP_JAX_HEARTBEAT_SECONDS": "20",
            "CLIP_JAX_SHUTDOWN_SECONDS": "10",
        }
    )
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
    program = [str(runs.ROOT / "tests/tiny_evaluate.py")] if tiny else ["-m", "clip_jax.evaluate"]
    return Command([*program, *map(str, arguments)], env=environment)


def run(*arguments, processes=1, code=0, tiny=False, second=(), seconds=240):
    """Return stdout and stderr of each process. second: flags that the other processes have instead or in addition."""
    names = tuple(flag.partition("=")[0] + "=" for flag in second)
    others = [flag for flag in map(str, arguments) if not flag.startswith(names)] if second else arguments
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        started = [
            start(*flags, process=i, processes=processes, port=port, tiny=tiny)
            for i, flags in enumerate([arguments, *[[*others, *second]] * (processes - 1)])
        ]
        for process in started:
            stack.callback(process.kill)
        output = [process.communicate(timeout=seconds) for process in started]
    for process, texts in zip(started, output, strict=True):
        assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{texts[0]}{texts[1]}"
    return output


def report(directory):
    """Return report.json."""
    return json.loads((directory / "report.json").read_text())


def flat_image(value, form="PNG"):
    """Return an encoded image whose red channel has one value, see `value_of`."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, form)
    return file.getvalue()


def pixels_of(image):
    return np.asarray(Image.open(io.BytesIO(image)))


def value_of(image):
    return pixels_of(image)[0, 0, 0]


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def png_image(seed, pixels=24):
    """Return a PNG of random colored squares."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colors.repeat(pixels // 4, axis=0).repeat(pixels // 4, axis=1)).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, samples, *, class_names=(), kind="classification", shards=2):
    """Write a test split as tar shards. samples: for each image its members by suffix, in bytes."""
    (folder / "test").mkdir(parents=True)
    if class_names:
        (folder / "classnames.txt").write_text("\n".join(class_names) + "\n")
    (folder / "dataset_type.txt").write_text(kind)
    (folder / "test" / "nshards.txt").write_text(str(shards))
    for shard in range(shards):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for row in range(shard * len(samples) // shards, (shard + 1) * len(samples) // shards):
                for suffix, content in samples[row].items():
                    member = tarfile.TarInfo(f"s{row:07d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def damage(data, name):
    """Make the second image of a dataset undecodable without changing its size."""
    shard = data / DATASETS[name].folder / "test" / "0.tar"
    parts = shard.read_bytes().split(b"IHDR")
    shard.write_bytes(b"IHDR".join(parts[:2]) + b"\0\0\0\0" + b"IHDR".join(parts[2:]))


def write_classes(folder, images, class_ids, class_names):
    """Write a test split of images with one class each."""
    samples = [{"png": data, "cls": str(i).encode()} for data, i in zip(images, class_ids, strict=True)]
    write_shards(folder, samples, class_names=class_names)
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
