"""The input pipeline against open_clip's, alternately, on the same files: `make bench-input`.

Photographs of scikit-learn, cropped at random, as JPEGs of 512 px in tar shards, are read, decoded, cropped at random,
resized to 224 px and batched with their tokens: by `clip_jax.data.batches`, with `data.decode` "fast" and "exact", and
by open_clip's own `open_clip_train.data.get_wds_dataset` with its transform of training images and its tokenizer, one
worker process a core. Images per second of wall time, on one core and on two. open_clip's images are float32 and
normalized, as its model needs them; clip_jax's are uint8 and normalized on the device.

First the difference of "fast" from Pillow's bicubic resize of the same crops. `--quality` prints only that.

The last line is the speed of "fast" relative to open_clip on one core, the median of the pairs.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image

SIZE, SIDE, BATCH = 224, 512, 64  # pixels, pixels, pairs
IMAGES, RECORDS, SHARDS = 300, 2_000, 4  # every image occurs several times, each time with another caption
ROUNDS, SECONDS, SKIPPED = 3, 2.0, 6  # batches that may have been made before a measurement begins
SIDES = (240, 320, 440, 512, 640, 1024)  # of the images whose quality is compared


def main() -> None:
    """Print the quality of "fast", the speeds, and the ratio in the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quality", action="store_true", help="only the difference from Pillow")
    quality()
    if not parser.parse_args().quality:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(folder)
            speed(folder)


def quality() -> None:
    """Print how far the crops of "fast" are from Pillow's, in decibels and levels of 255."""
    from clip_jax.data import scaled_jpeg

    rng = np.random.default_rng(1)
    print(f"crops of 90 to 100 % of the area, resized to {SIZE} px: 'fast' against Pillow's bicubic")
    for side in SIDES:
        found = []
        for photograph in itertools.islice(photographs(side), 24):
            encoded, draws = _jpeg(photograph), rng.random((1, 3), np.float32)
            crops, _ = scaled_jpeg.random_crops([encoded], draws, SIZE, 0.9, 10**8)
            top, left, length, _ = scaled_jpeg.crop_box(side, side, draws[0], 0.9, SIZE)
            crop = Image.open(io.BytesIO(encoded)).crop((left, top, left + length, top + length))
            expected = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC), float)
            difference = np.abs(crops[0] - expected)
            found.append((10 * np.log10(255**2 / np.square(difference).mean()), difference.mean(), difference.max()))
        decibels, mean, largest = zip(*found, strict=True)
        print(
            f"  {side:5} px: PSNR {min(decibels):.1f} dB at least, {statistics.mean(decibels):.1f} on average;"
            f" difference {statistics.mean(mean):.2f} on average, {max(largest):.0f} at most"
        )


def photographs(side: int) -> Iterator[Image.Image]:
    """Yield random square crops of two photographs, also mirrored, resized to `side`, infinitely many."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    images = [Image.fromarray(image) for image in load_sample_images().images]  # 427 × 640
    while True:
        for image in images:
            length = int(rng.integers(360, min(image.size) + 1))
            left, top = (int(rng.integers(room - length + 1)) for room in image.size)
            box = (left, top, left + length, top + length)
            crop = image.resize((side, side), Image.Resampling.LANCZOS, box)
            yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def write_shards(folder: str) -> None:
    """Write tar shards as img2dataset does: jpg and txt."""
    from clip_jax.tokenizers import ClipBPE

    rng = np.random.default_rng(0)
    vocabulary = [token[:-4] for token in ClipBPE().as_huggingface()[0] if token.endswith("</w>")]
    words = [word for word in vocabulary if word.isascii() and word.isalpha()]  # the most frequent first
    images = [_jpeg(photograph) for photograph in itertools.islice(photographs(SIDE), IMAGES)]
    for shard in range(SHARDS):
        with tarfile.open(f"{folder}/{shard:05d}.tar", "w") as archive:
            for number in range(shard * RECORDS // SHARDS, (shard + 1) * RECORDS // SHARDS):
                ranks = len(words) ** rng.random(rng.integers(5, 25)) - 1  # Zipf's law
                caption = " ".join(words[int(rank)] for rank in ranks)
                for field, content in (("jpg", images[number % IMAGES]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    kilobytes = np.mean([len(image) for image in images]) / 1e3
    print(f"{RECORDS:,} pairs of {SIDE} px, {kilobytes:.0f} kB a JPEG on average, in {SHARDS} tar shards", flush=True)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def speed(folder: str) -> None:
    """Print the images per second of each loader on one core and on two."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    rates: dict[tuple[str, int], list[float]] = {}
    print(f"images/s, medians of {ROUNDS} rounds of {SECONDS} s (lowest to highest)")
    for count in range(1, len(cores) + 1):
        workers = {name: _start_worker(name, folder, cores[:count]) for name in LOADERS}
        for number in range(ROUNDS):
            for name in list(LOADERS)[:: 1 if number % 2 else -1]:
                workers[name].send("go")
                rates.setdefault((name, count), []).append(workers[name].recv())
        for name, worker in workers.items():
            worker.send(None)
            found = rates[name, count]
            print(
                f"  {name:<16} {count} core{'s' * (count > 1)}: {statistics.median(found):6,.0f}"
                f" ({min(found):,.0f} to {max(found):,.0f}),"
                f" {_ratio(found, rates['open_clip', count]):.2f} times open_clip"
                + f", {_ratio(found, rates[name, 1]):.2f} times one core"
                * (count > 1),
                flush=True,
            )
    print(f"ratio: {_ratio(rates['clip_jax fast', 1], rates['open_clip', 1]):.2f}")


def _ratio(rates: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))


def _start_worker(name: str, folder: str, cores: list[int]) -> Connection:
    """Start a process for one loader on some cores; return its connection when it has made a batch."""
    parent, child = get_context("spawn").Pipe()
    get_context("spawn").Process(target=_serve_rates, args=(name, folder, cores, child)).start()
    child.close()  # the end of the process becomes an error here
    parent.recv()
    return parent


def _serve_rates(name: str, folder: str, cores: list[int], connection: Connection) -> None:
    os.sched_setaffinity(0, cores)
    loader = LOADERS[name](folder, len(cores))
    connection.send(next(loader))
    while connection.recv():
        for _ in range(SKIPPED):
            next(loader)
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < SECONDS:
            count += next(loader)
        connection.send(count / seconds)
    os._exit(0)  # the loaders' threads and processes are not waited for


def _clip_jax(folder: str, decode: str) -> Iterator[int]:
    from clip_jax import data
    from clip_jax.config import DataConfig
    from clip_jax.tokenizers import ClipBPE

    config = DataConfig(files=f"{folder}/*.tar", cache_dir=folder, decode=decode)
    steps = data.batches(
        data.make_source(config),
        ClipBPE(length=77),
        config,
        image_size=SIZE,
        batch_size=BATCH,
        seed=0,
        start_step=0,
        rows=slice(0, BATCH),
    )
    for step in steps:
        assert step.batch.image.shape == (BATCH, SIZE, SIZE, 3) and not step.replaced
        yield len(step.batch.text)


def _open_clip(folder: str, cores: int) -> Iterator[int]:
    import torch

    for operator in ("nms", "qnms"):  # torchvision without compiled operators, see tests/peers/conftest.py
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    from open_clip_train import data

    # The installed webdataset yields a marker at the end of a shard; open_clip expects webdataset <= 0.2.86.
    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    set_start_method("fork", force=True)  # the loader's functions cannot be pickled
    torch.set_num_threads(1)
    shards = f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"
    arguments = argparse.Namespace(
        train_data=shards,
        train_num_samples=10**7,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=cores,
        world_size=1,
    )
    transform = open_clip.image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for images, texts in data.get_wds_dataset(arguments, transform, True, tokenizer=tokenizer).dataloader:
        assert images.shape == (BATCH, 3, SIZE, SIZE)
        yield len(texts)


LOADERS: dict[str, Callable[[str, int], Iterator[int]]] = {
    "open_clip": _open_clip,
    "clip_jax exact": lambda folder, cores: _clip_jax(folder, "exact"),
    "clip_jax fast": lambda folder, cores: _clip_jax(folder, "fast"),
}

if __name__ == "__main__":
    main()
