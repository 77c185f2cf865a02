"""Parser for the text of a compiled program (`HloModule` with layouts): computations, instructions, arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
HBM = 0  # memory space of a layout without S(n)

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


class Array(NamedTuple):
    """Shape and layout of one array, e.g. `bf16[128,257,1024]{2,1,0:T(8,128)(2,1)}`."""

    dtype: str
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]  # dimensions, the one with stride 1 first
    tile: tuple[int, ...]  # sides of the layout's tile, the minor dimension last
    memory_space: int  # HBM, or the n of S(n): VMEM, CMEM, SMEM …

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def logical_bytes(self) -> int:
        """Size in bytes without padding."""
        return -(-self.elements * element_bits(self.dtype) // 8)

    @property
    def padded_bytes(self) -> int:
        """Size in bytes with the minor dimensions rounded up to whole tiles."""
        sides = [self.shape[d] for d in self.minor_to_major]
        for axis, side in enumerate(reversed(self.tile)):
            if axis < len(sides):
                sides[axis] = -(-sides[axis] // side) * side
            else:
                sides.append(side)
        return -(-math.prod(sides) * element_bits(self.dtype) // 8)


def element_bits(dtype: str) -> int:
    """Return the bits of one element, e.g. 16 for bf16, 32 for s32, 8 for f8e4m3fn."""
    if dtype in BITS:
        return BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if not found:
        raise ValueError(f"HLO dtype {dtype!r}: unknown element size; add it to clip_jax.planner.hlo.BITS")
    return int(found[1])


def parse_arrays(text: str) -> list[Array]:
    """Return the arrays of an HLO type; those of a tuple in order."""
    return [_parse_array(*found) for found in _ARRAY.findall(text)]


@functools.lru_cache(maxsize=1 << 14)
def _parse_array(dtype: str, sides: str, order: str, layout: str) -> Array:
    shape = tuple(int(side.lstrip("<=")) for side in sides.split(",") if side)
    minor_to_major = tuple(map(int, order.split(","))) if order else tuple(reversed(range(len(shape))))
    tile = re.search(r"T\(([\d,]+)\)", layout)
    tile_sides = tuple(map(int, tile[1].split(","))) if tile else ()
    space = re.search(r"S\((\d+)\)", layout)
    return Array(dtype, shape, minor_to_major, tile_sides, int(space[1]) if space else HBM)


@dataclasses.dataclass
class Op:
    """One HLO instruction."""

    name: str
    results: list[Array]
    opcode: str
    operands: list[str]  # names of instructions
    attributes: str  # unparsed
    is_root: bool

    def find(self, pattern: str | re.Pattern[str]) -> str:
        """Return the first group of a regular expression in the attributes, or an empty string."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Op]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations by name, and the name of the entry computation."""
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
            current[found[2]] = _parse_op(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("HLO text: expected the result of Compiled.as_text(), got text without an ENTRY computation")
    return computations, entry


def _parse_op(name: str, rest: str, is_root: bool) -> Op:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing_bracket(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    result, rest = rest[: end + 1], rest[end + 2 :]
    start = rest.index("(")
    end = _closing_bracket(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start + 1 : end])
    opcode = rest[:start]
    attributes = rest[start + 1 : end] + rest[end + 1 :] if opcode in ("constant", "parameter") else rest[end + 1 :]
    return Op(name, parse_arrays(result), opcode, operands, attributes, is_root)


def _closing_bracket(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"HLO text: no closing bracket in {text[:80]!r}")
