"""The real TPU compiler without a TPU: meshes of slices that aren't there, and what a compiled program says of itself.

Everything it says is deterministic, so it is compared exactly. libtpu comes with the `test` extra on Linux x86-64.
"""

import math
import os
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax import optim, sharding, step
from clip_jax.config import Config
from clip_jax.losses import LOSSES
from clip_jax.typing import Batch

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several test processes at once
}

V4_TOPOLOGY = {8: "v4:2x2x2", 16: "v4:2x2x4", 256: "v4:4x8x8"}
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def v4_mesh(sizes: dict[str, int]) -> Mesh:
    """Return a mesh with these axes over as many v4 chips."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies  # it looks for libtpu when imported

    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=V4_TOPOLOGY[math.prod(sizes.values())],
        chip_config_name="megacore",  # one device a chip, as JAX shows a real v4
        chips_per_host_bounds=(2, 2, 1),
    )
    return Mesh(np.array(topology.devices).reshape(*sizes.values()), tuple(sizes))


def compile_step(config: Config, mesh: Mesh) -> tuple[jax.stages.Compiled, int]:
    """Return a run's training step, compiled for the devices of a mesh, and how many parameters there are."""
    model = step.make_model_of(config, mesh)
    optimizer = optim.make_optimizer(config.optim, config.optim.warmup_steps + 1)
    state = step.state_like(model, optimizer, config, mesh)
    rows, count, side = sharding.batch_sharding(mesh), config.train.batch_size, config.model.image.image_size
    batch = Batch(
        jax.ShapeDtypeStruct((count, side, side, 3), np.uint8, sharding=rows),
        jax.ShapeDtypeStruct((count, config.model.text.length), np.int32, sharding=rows),
        jax.ShapeDtypeStruct((count,), bool, sharding=rows),
    )
    train_step = step.make_train_step(model, LOSSES[config.loss.name], optimizer, config, mesh)
    return train_step.lower(state, batch).compile(), sum(leaf.size for leaf in jax.tree.leaves(state.params))


def collectives(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Return every collective in the text of a program, with the bytes that it leaves on a chip."""
    found = re.findall(rf"= (\S+|\(.*?\)) ({COLLECTIVES})(-start)?\(", compiled.as_text())
    sizes = []
    for result, name, start in found:
        shapes = [(dtype, re.findall(r"\d+", sides)) for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", result)]
        total = sum(ITEM_BYTES[dtype] * math.prod(map(int, sides)) for dtype, sides in shapes)
        sizes.append((name, total // 2 if start else total))  # what starts returns its operands too
    return sizes


def shapes(compiled: jax.stages.Compiled) -> set[tuple[int, ...]]:
    """Return the shapes of all arrays in the text of a program."""
    return {tuple(map(int, sides.split(","))) for sides in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())}
