"""Ahead-of-time compilation by the TPU compiler without a TPU: meshes, and the collectives and shapes of a program.

Its output is deterministic, so tests compare it exactly. libtpu comes with the `test` extra on Linux x86-64.
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
    """Return a mesh of v4 chips with the given axis sizes."""
    pytest.importorskip("libtpu")
    devices = parse_topology(f"v4-{2 * math.prod(sizes.values())}").devices()
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes))


def compile_step(config: Config, mesh: Mesh) -> tuple[jax.stages.Compiled, int]:
    """Return a training step, compiled for the devices of a mesh, and the number of parameters."""
    lowered, state, _ = lower_step(config, mesh, config.optim.warmup_steps + 1)
    return lowered.compile(), sum(leaf.size for leaf in jax.tree.leaves(state.params))


def collectives(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Return opcode and result bytes of every collective in the text of a program."""
    found = re.findall(rf"= (\S+|\(.*?\)) ({COLLECTIVES})(-start)?\(", compiled.as_text())
    sizes = []
    for result, name, start in found:
        shapes = [(dtype, re.findall(r"\d+", sides)) for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", result)]
        total = sum(ITEM_BYTES[dtype] * math.prod(map(int, sides)) for dtype, sides in shapes)
        sizes.append((name, total // 2 if start else total))  # a start op returns its operands, too
    return sizes


def shapes(compiled: jax.stages.Compiled) -> set[tuple[int, ...]]:
    """Return the shapes of all arrays in the text of a program."""
    return {tuple(map(int, sides.split(","))) for sides in re.findall(r"\w\[([\d,]+)\]", compiled.as_text())}
