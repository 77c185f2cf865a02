"""The real TPU compiler without a TPU: meshes of slices that aren't there, and what a compiled program says of itself.

Everything it says is deterministic, so it is compared exactly. libtpu comes with the `test` extra on Linux x86-64.
"""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax.config import Config
from clip_jax.planner.predict import lower_step
from clip_jax.planner.topology import parse_topology

COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def v4_mesh(sizes: dict[str, int]) -> Mesh:
    """Return a mesh with these axes over as many v4 chips."""
    pytest.importorskip("libtpu")
    devices = parse_topology(f"v4-{2 * math.prod(sizes.values())}").devices()
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes))


def compile_step(config: Config, mesh: Mesh) -> tuple[jax.stages.Compiled, int]:
    """Return a run's training step, compiled for the devices of a mesh, and how many parameters there are."""
    lowered, state, _ = lower_step(config, mesh, config.optim.warmup_steps + 1)
    return lowered.compile(), sum(leaf.size for leaf in jax.tree.leaves(state.params))


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
