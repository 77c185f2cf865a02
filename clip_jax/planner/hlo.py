"""The text of a compiled program as data: computations, their operations, and arrays as they lie in memory.

The grammar is XLA's (`HloModule` text with layouts); what costs read of it stands in `cost.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
HBM = 0  # the memory space that a layout doesn't name

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


class Array(NamedTuple):
    """One array of a program's text: `bf16[128,257,1024]{2,1,0:T(8,128)(2,1)}`."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]  # of dimensions, the fastest first
    tile: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """Return how many elements it has."""
        return math.prod(self.shape)

    @property
    def logical_bytes(self) -> int:
        """Return its bytes without padding."""
        return -(-self.elements * bits(self.dtype) // 8)

    @property
    def padded_bytes(self) -> int:
        """Return the bytes that it takes: the fastest dimensions are whole tiles."""
        sides = [self.shape[d] for d in self.order]  # fastest first
        for axis, side in enumerate(reversed(self.tile)):
            if axis < len(sides):
                sides[axis] = -(-sides[axis] // side) * side
            else:
                sides.append(side)
        return -(-math.prod(sides) * bits(self.dtype) // 8)


def bits(dtype: str) -> int:
    """Return the bits of one element, e.g. of bf16, s32 or f8e4m3fn."""
    if dtype in BITS:
        return BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if not found:
        raise ValueError(f"the program has arrays of {dtype!r}, whose size isn't known; add it to planner.hlo.BITS")
    return int(found[1])


def arrays(text: str) -> list[Array]:
    """Return the arrays of a type, a tuple's in order."""
    return [_array(*found) for found in _ARRAY.findall(text)]


@functools.lru_cache(maxsize=1 << 14)
def _array(dtype: str, sides: str, order: str, layout: str) -> Array:
    shape = tuple(int(side.lstrip("<=")) for side in sides.split(",") if side)
    by_speed = tuple(map(int, order.split(","))) if order else tuple(reversed(range(len(shape))))
    tile = re.search(r"T\(([\d,]+)\)", layout)
    space = re.search(r"S\((\d+)\)", layout)
    return Array(
        dtype, shape, by_speed, tuple(map(int, tile[1].split(","))) if tile else (), int(space[1]) if space else HBM
    )


@dataclasses.dataclass
class Op:
    """One line: its name, results, operation, operands' names, and attributes as text."""

    name: str
    results: list[Array]
    opcode: str
    operands: list[str]
    attributes: str
    root: bool


Computation = dict[str, Op]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
            continue
        found = _LINE.match(line)
        if found:
            op = _operation(found[2], found[3], bool(found[1]))
            current[op.name] = op
    if not entry:
        raise ValueError(
            "no ENTRY computation: expected the text of a compiled program, as Compiled.as_text() gives it"
        )
    return computations, entry


def _operation(name: str, rest: str, root: bool) -> Op:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    result, rest = rest[: end + 1], rest[end + 2 :]
    start = rest.index("(")
    end = _closing(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start + 1 : end])
    opcode = rest[:start]
    attributes = rest[start + 1 : end] + rest[end + 1 :] if opcode in ("constant", "parameter") else rest[end + 1 :]
    return Op(name, arrays(result), opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket in {text[:80]!r}")
