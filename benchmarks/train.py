"""Time a training step of ViT-B/32 against open_clip on torch, alternating, on one core: `make bench-train`.

Forward, backward and AdamW in float32, 16 pairs per step, CPU seconds. Both train on the same images and captions,
with the lengths of web captions: 20 of 77 tokens on average. open_clip encodes all 77 positions, and so does the row
"padded"; "packed" packs captions, the default (`train.text_capacity`). Memory is reused from step to step as in the
trainer (`clip_jax.devices.allocator`); torch uses its default allocator.

The last line is the speed of "packed" relative to open_clip, the median of the pairs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["OMP_NUM_THREADS"] = "1"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from clip_jax.config import (  # noqa: E402
    MODELS,  # noqa: E402
    Config,
    OptimConfig,
    TrainConfig,
)
from clip_jax.devices import allocator, sharding  # noqa: E402
from clip_jax.training import optim, step  # noqa: E402
from clip_jax.typing import Batch  # noqa: E402

BATCH, ROUNDS = 16, 7
OPTIM = OptimConfig(warmup_steps=0)


def main() -> None:
    """Print the CPU seconds of each, and the ratio in the last line."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    batch = _batch()
    lengths = (batch.text != 0).sum(axis=1)
    print(f"{BATCH} captions of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.1f} on average", flush=True)
    workers = {name: _start_worker(name) for name in STEPS}
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for number in range(ROUNDS):
        for name in list(STEPS)[:: 1 if number % 2 else -1]:
            workers[name].send("go")
            seconds[name].append(workers[name].recv())
    for name, values in seconds.items():
        workers[name].send(None)
        ratio = statistics.median(a / b for a, b in zip(seconds["open_clip"], values, strict=True))
        print(f"{name:<10} {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})   {ratio:.2f}")
    print(f"ratio: {ratio:.2f}")


def _start_worker(name: str) -> Connection:
    """Start a process for one library, so that their threads and allocators do not interact; return its connection."""
    parent, child = get_context("spawn").Pipe()
    get_context("spawn").Process(target=_serve_steps, args=(name, child), daemon=True).start()
    print(f"{name:<10} initial loss {parent.recv():.4f}", flush=True)
    return parent


def _serve_steps(name: str, connection: Connection) -> None:
    train_step = STEPS[name](_batch())
    connection.send([train_step(), train_step()][0])  # two steps: compile, and allocate
    while connection.recv():
        start = time.process_time()
        train_step()
        connection.send(time.process_time() - start)


def _batch() -> Batch:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(17), 0.5, BATCH).astype(int), 3, 77)
    text = np.zeros((BATCH, 77), np.int32)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = [49_406, *rng.integers(1, 49_406, length - 2), 49_407]
    return Batch(rng.integers(0, 256, (BATCH, 224, 224, 3), dtype=np.uint8), text, np.ones(BATCH, bool))


def _clip_jax_step(batch: Batch, text_capacity: float) -> Callable[[], float]:
    allocator.keep_freed_memory()
    train = TrainConfig(batch_size=BATCH, dtype="float32", remat="dots", text_capacity=text_capacity)
    config = Config(model=MODELS["vit_b32"], optim=OPTIM, train=train)
    mesh, optimizer = sharding.make_mesh(), optim.make_optimizer(OPTIM, 1000)
    model = step.model_from_config(config, mesh)
    compiled = step.make_train_step(model, optimizer, config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, step.abstract_state(model, optimizer, config, mesh))
    init = jax.jit(lambda key: step.init_state(model.init(key), optimizer, OPTIM), out_shardings=shardings)
    state = init(jax.random.key(0, impl="rbg"))
    on_device = sharding.to_global(batch, mesh)

    def train_step() -> float:
        nonlocal state
        state, metrics = compiled(state, on_device)
        assert not metrics.get("text/padded", 0)
        return float(metrics["loss"])

    return train_step


def _open_clip_step(batch: Batch) -> Callable[[], float]:
    import torch

    for operator in ("nms", "qnms"):  # torchvision without compiled operators, see tests/peers/conftest.py
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip

    torch.set_num_threads(1)
    model = open_clip.create_model("ViT-B-32-quickgelu")
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    not_decayed = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": not_decayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": OPTIM.weight_decay}]
    optimizer = torch.optim.AdamW(groups, OPTIM.learning_rate, (OPTIM.b1, OPTIM.b2), OPTIM.eps)
    loss = open_clip.ClipLoss()
    mean, std = (
        torch.tensor(x).view(1, 3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    images = (torch.from_numpy(batch.image).permute(0, 3, 1, 2).float() / 255 - mean) / std
    texts = torch.from_numpy(batch.text).long()

    def train_step() -> float:
        optimizer.zero_grad()
        value = loss(*model(images, texts))
        value.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return value.item()

    return train_step


STEPS: dict[str, Callable[[Batch], Callable[[], float]]] = {
    "open_clip": _open_clip_step,
    "padded": lambda batch: _clip_jax_step(batch, 1.0),
    "packed": lambda batch: _clip_jax_step(batch, TrainConfig().text_capacity),
}

if __name__ == "__main__":
    main()
