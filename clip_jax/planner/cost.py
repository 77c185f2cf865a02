"""What a compiled program does, read off its text: flops, bytes through memory, and what chips send one another.

XLA's own `cost_analysis` counts the body of a loop once, bytes without the padding of their tiles, and no collective.
Here every computation is counted as often as it runs. Of a conditional the branch of a true predicate is counted: the
step is written so that it is the usual one (`encode_text_train`, `make_train_step`).

Bytes: every operation outside a fusion reads its operands once and writes its results once, in tiles as they lie in
memory; what is sliced out of an array counts as the slice, what is written into one in place as the update, and what
the compiler keeps on the chip (VMEM, v4's CMEM) as nothing. A kernel counts its operands, results and own estimate.
Flops: two for every multiply-add of products and convolutions, only where a window meets data; one for every element
of other arithmetic, as XLA counts them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from clip_jax.models.flops import valid_positions
from clip_jax.planner.hlo import HBM, Array, Computation, Op, bits, parse

_CALLS = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")

# Of a fusion inside another: its result is its operand, in other tiles (v7x).
_RELABELS = "output_to_operand_aliasing={{}: (0, {})}"

# Their results are names for what is there already, or cost nothing.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain", "opt-barrier"),
        *("partition-id", "replica-id", "add-dependency", "copy-done", "slice-done", "async-done", "async-update"),
        *("send-done", "recv-done", "all-reduce-done", "all-gather-done", "collective-permute-done", "call-done"),
    )
)
_FREE_CUSTOM = frozenset(
    (
        *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"),
        *("PrepareAsyncCallStart", "PrepareAsyncCallDone"),
    )
)
_ARITHMETIC = frozenset(  # one flop an element, as XLA has it; exponentials and the like are counted apart there
    (
        *("add", "subtract", "multiply", "divide", "maximum", "minimum", "remainder", "abs", "negate", "sign"),
        *("floor", "ceil", "round-nearest-even", "round-nearest-afz", "compare", "select", "clamp", "convert"),
        *("and", "or", "xor", "not", "shift-left", "shift-right-logical", "shift-right-arithmetic", "is-finite"),
        "reduce-precision",
    )
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass
class Collective:
    """One kind of message: how often, and how many bytes a device sends for it, all told.

    group: devices that take part in one. slices: over which they are spread. link_bytes: to others of its slice;
    network_bytes: to other slices.
    """

    kind: str
    group: int
    slices: int
    count: float = 0.0
    link_bytes: float = 0.0
    network_bytes: float = 0.0


@dataclasses.dataclass
class Cost:
    """What one device does in one run of a program.

    flops: multiply-adds of products and convolutions, twice. unit_flops: the same as often as a matrix unit of bfloat16
    passes over them: six times for operands at full precision, three at high. other_flops: of the remaining arithmetic.
    kernel_flops: a part of `flops`, by kernels' own estimates. logical_bytes, padded_bytes: through HBM, without and
    with the padding of tiles. hops: collectives, one after another. endless: loops whose count the text doesn't tell,
    counted once.
    """

    flops: float = 0.0
    unit_flops: float = 0.0
    other_flops: float = 0.0
    kernel_flops: float = 0.0
    logical_bytes: float = 0.0
    padded_bytes: float = 0.0
    hops: float = 0.0
    collectives: dict[tuple, Collective] = dataclasses.field(default_factory=dict)
    by_source: dict[str, float] = dataclasses.field(default_factory=dict)  # padded bytes by the model's part
    endless: list[str] = dataclasses.field(default_factory=list)


class Program:
    """The text of a compiled program, and what it costs."""

    def __init__(self, text: str, *, slices: int = 1, devices_per_slice: int = 0) -> None:
        """Read `text`. slices: that it runs on; devices_per_slice: where there are several."""
        self.computations, self.entry = parse(text)
        self._all_slices, self._per_slice = slices, devices_per_slice if slices > 1 else 0
        self._read: dict[tuple[str, int], tuple[float, float] | None] = {}

    def cost(self) -> Cost:
        """Return the cost of one run."""
        cost = Cost()
        self._add(cost, self.entry, 1.0)
        return cost

    # ------------------------------------------------------------------------------------------------- control flow

    def _add(self, cost: Cost, name: str, times: float) -> None:
        computation = self.computations[name]
        for op in computation.values():
            if op.opcode == "while":
                body, condition = (re.search(rf"{key}=%?([\w.\-]+)", op.attributes)[1] for key in ("body", "condition"))
                trips = self._trips(op, condition)
                if trips is None:
                    cost.endless.append(op.name)
                self._add(cost, body, times * (1 if trips is None else trips))
            elif op.opcode == "conditional":
                self._add(cost, _usual_branch(op), times)
            elif op.opcode in ("call", "async-start", "call-start") and (called := _CALLS.search(op.attributes)):
                self._add(cost, called[1], times)
            else:
                self._count(cost, computation, op, times)

    def _trips(self, op: Op, condition: str) -> int | None:
        """Return how often a loop runs: said by the compiler, or what its counter, from 0 by 1, is compared with."""
        known = re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', op.attributes)
        if known:
            return int(known[1])
        constants = [
            int(found[1])
            for name in self._with_called(condition)
            for inner in self.computations[name].values()
            if inner.opcode == "constant" and (found := re.match(r"(\d+)\b", inner.attributes))
        ]
        return constants[0] if len(constants) == 1 else None

    def _with_called(self, name: str) -> Iterator[str]:
        yield name
        for op in self.computations[name].values():
            for called in _CALLS.findall(op.attributes):
                if called in self.computations:
                    yield from self._with_called(called)

    # ---------------------------------------------------------------------------------------------------- one operation

    def _count(self, cost: Cost, computation: Computation, op: Op, times: float) -> None:
        if op.opcode in _FREE or (op.opcode == "custom-call" and _target(op) in _FREE_CUSTOM):
            return
        flops, unit, other = self._flops(computation, op)
        cost.flops += times * flops
        cost.unit_flops += times * unit
        cost.other_flops += times * other
        if op.opcode == "custom-call":
            cost.kernel_flops += times * flops
        logical, padded = self._traffic(computation, op)
        cost.logical_bytes += times * logical
        cost.padded_bytes += times * padded
        source = _source(op)
        cost.by_source[source] = cost.by_source.get(source, 0) + times * padded
        if op.opcode == "fusion" and (found := self._started(_CALLS.search(op.attributes)[1])):
            inner, kind, sent = found
            self._send(cost, kind, *self._group(sent), inner, sent, times)
        kind = op.opcode.removesuffix("-start")
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes) if kind == "send" else None
        if kind in COLLECTIVES:
            self._send(cost, kind, *self._group(op), computation, op, times)
        elif between:  # what the compiler has left for the network, after its own collectives within slices
            kind = {"ONE_TO_ONE": "collective-permute"}.get(between[1], between[1].lower().replace("_", "-"))
            self._send(cost, kind, self._all_slices, self._all_slices, computation, op, times)

    def _flops(self, computation: Computation, op: Op) -> tuple[float, float, float]:
        """Return flops, unit_flops and other_flops of an operation and all that is fused into it."""
        if op.opcode in ("fusion", "map"):
            inner = self.computations[_CALLS.search(op.attributes)[1]]
            return tuple(map(sum, zip(*(self._flops(inner, x) for x in inner.values()), strict=True)))
        if op.opcode == "custom-call":
            found = re.search(r'"cost_estimate":(\{[^}]*\})', op.attributes)
            flops = float(json.loads(found[1]).get("flops", 0)) if found else 0.0
            return flops, flops, 0.0
        sources = [computation[name].results[0] for name in op.operands if name in computation]
        if op.opcode in ("convolution", "dot"):
            flops = _convolution_flops(sources, op) if op.opcode == "convolution" else _dot_flops(sources, op)
            return flops, flops * _passes(sources, op), 0.0
        if op.opcode in ("reduce", "reduce-window"):
            return (
                0.0,
                0.0,
                float(sum(x.elements for x in sources[: len(op.results)]) - sum(x.elements for x in op.results)),
            )
        return 0.0, 0.0, float(op.results[0].elements) if op.opcode in _ARITHMETIC else 0.0

    # ---------------------------------------------------------------------------------------------------------- bytes

    def _traffic(self, computation: Computation, op: Op) -> tuple[float, float]:
        """Return the bytes that an operation moves through HBM, without and with padding."""
        sources = [computation[name].results for name in op.operands if name in computation]
        if op.opcode in ("copy-start", "slice-start"):
            moved = op.results[1] if op.opcode == "slice-start" else op.results[0]
            ends = [op.results[0].space, op.results[1].space].count(HBM)
            return float(ends * moved.logical_bytes), float(ends * moved.padded_bytes)
        if op.opcode == "fusion":
            return self._fusion_traffic(computation, op)
        if op.opcode in ("send", "recv"):
            return _bytes(op.results[:1])
        if op.opcode == "dynamic-update-slice":
            return _bytes([*sources[1], *sources[1]], op.results[0].space)
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            read = _bytes(op.results) if sources[0][0].space == HBM else (0.0, 0.0)
            return _plus(read, _bytes(op.results))
        results = op.results[len(op.results) // 2 :] if op.opcode.endswith("-start") else op.results
        return _plus(_bytes([x for source in sources for x in source]), _bytes(results))

    def _fusion_traffic(self, computation: Computation, op: Op) -> tuple[float, float]:
        name = _CALLS.search(op.attributes)[1]
        inner, total = self.computations[name], (0.0, 0.0)
        root = next(x for x in inner.values() if x.root)
        if _is_custom(root, "AsyncCollectiveDone"):
            return total
        if _is_custom(root, "AsyncCollectiveStart"):  # its first result is its operand
            return _bytes([*computation[op.operands[0]].results, *op.results[1:]])
        results = root.operands if root.opcode == "tuple" else [root.name]
        for position, operand in enumerate(op.operands):
            source = computation[operand].results[0]
            if source.space == HBM and not (_goes_on(name) and self._parameter(name, position) in results):
                read = self._reads(name, position)
                total = _plus(total, _bytes([source]) if read is None else read)
        written = [self._written(name, x) for x in results]
        for result, part in zip(op.results, written, strict=False):
            if result.space == HBM:
                total = _plus(total, _bytes([result]) if part is None else part)
        return total

    def _written(self, name: str, at: str) -> tuple[float, float] | None:
        """Return the bytes that a result updates in place; None: it is written whole."""
        inner = self.computations[name]
        op = inner[at]
        if _goes_on(name) and op.opcode in ("parameter", *COLLECTIVES):
            return (0.0, 0.0)
        if op.opcode == "bitcast":
            return self._written(name, op.operands[0])
        if op.opcode == "fusion":
            called = _CALLS.search(op.attributes)[1]
            return self._written(called, next(x.name for x in self.computations[called].values() if x.root))
        if op.opcode == "dynamic-update-slice":
            return _bytes([inner[op.operands[1]].results[0]], None)
        return None

    def _reads(self, name: str, position: int) -> tuple[float, float] | None:
        """Return the bytes that a fused computation reads of its parameter; None: all of it."""
        key = (name, position)
        if key not in self._read:
            self._read[key] = self._reads_of(name, self._parameter(name, position))
        return self._read[key]

    def _parameter(self, name: str, position: int) -> str:
        return next(
            op.name
            for op in self.computations[name].values()
            if op.opcode == "parameter" and int(re.match(r"\d+", op.attributes)[0]) == position
        )

    def _reads_of(self, name: str, at: str) -> tuple[float, float] | None:
        total = (0.0, 0.0)
        for user in self.computations[name].values():
            for place in [i for i, operand in enumerate(user.operands) if operand == at]:
                if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    read = _bytes(user.results, None)
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    read = (0.0, 0.0)
                elif user.opcode == "bitcast" or _RELABELS in user.attributes:
                    read = self._reads_of(name, user.name)
                elif user.opcode == "fusion":
                    read = self._reads(_CALLS.search(user.attributes)[1], place)
                else:
                    return None
                if read is None:
                    return None
                total = _plus(total, read)
        return total

    # ------------------------------------------------------------------------------------------------------ collectives

    def _started(self, name: str) -> tuple[Computation, str, Op] | None:
        """Return the collective that a fusion starts, and its kind.

        One that overlaps with arithmetic starts in a fusion, is repeated in those during which it goes on, and ends in
        another. A sum of which every device keeps a part is a fusion too.
        """
        inner = self.computations[name]
        if _goes_on(name) or any(_is_custom(op, "AsyncCollectiveDone") for op in inner.values()):
            return None
        for op in inner.values():
            if op.opcode in COLLECTIVES:
                return inner, "reduce-scatter" if name.startswith("all-reduce-scatter") else op.opcode, op
        return None

    def _send(
        self, cost: Cost, kind: str, group: int, slices: int, computation: Computation, op: Op, times: float
    ) -> None:
        sources = [x for name in op.operands if name in computation for x in computation[name].results]
        known = cost.collectives.setdefault((kind, group, slices), Collective(kind, group, slices))
        size = float(sum(x.logical_bytes for x in sources))
        links, network = _sent(kind, size, group // slices, slices)
        known.count += times
        known.link_bytes += times * links
        known.network_bytes += times * network
        cost.hops += times

    def _group(self, op: Op) -> tuple[int, int]:
        """Return how many devices exchange with one another, and over how many slices they are spread."""
        text = op.attributes
        if op.opcode.startswith("collective-permute"):
            pairs = re.findall(r"\{(\d+),(\d+)\}", re.search(r"source_target_pairs=\{.*?\}\}", text)[0])
            return 2, max(self._slices(pair) for pair in pairs)
        if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
            sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
            apart, strides = 1, {}
            for axis in reversed(sizes):  # neighbours differ in the last axis
                strides[axis], apart = apart, apart * sizes[axis]
            members = [0]
            for axis in re.findall(r"'(\w+)'", found[2]):
                members = [m + strides[axis] * k for m in members for k in range(sizes[axis])]
            return len(members), self._slices(members)
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
            devices = np.arange(int(found[1]) * int(found[2])).reshape([int(x) for x in found[3].split(",")])
            if found[4]:
                devices = devices.transpose([int(x) for x in found[4].split(",")])
            return int(found[2]), self._slices(devices.reshape(-1, int(found[2]))[0])
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
            members = found[1].split(",")
            return len(members), self._slices(members)
        return 1, 1

    def _slices(self, members: Iterable[Any]) -> int:
        return len({int(x) // self._per_slice for x in members}) if self._per_slice else 1


def _sent(kind: str, size: float, inner: int, slices: int) -> tuple[float, float]:
    """Return the bytes that a device sends within its slice and to others, for operands of `size` bytes.

    Each by the algorithm that sends least: rings within a slice (no torus beats them in bytes), and across slices every
    device only its part of what its slice has to say.
    """
    around, across = (inner - 1) / inner, (slices - 1) / slices
    return {
        "all-reduce": (2 * around * size, 2 * across * size / inner),
        "all-gather": (slices * (inner - 1) * size, (slices - 1) * size),
        "reduce-scatter": (around * size, across * size / inner),
        "all-to-all": (size / slices * around, across * size),
        "collective-permute": (size, 0.0) if slices == 1 else (0.0, size),
    }[kind]


def _bytes(found: list[Array], space: int | None = HBM) -> tuple[float, float]:
    """Return the bytes, without and with padding, of what lies in HBM; with space=None of all."""
    counted = [x for x in found if space is None or x.space == HBM]
    if space not in (None, HBM):
        return 0.0, 0.0
    return float(sum(x.logical_bytes for x in counted)), float(sum(x.padded_bytes for x in counted))


def _plus(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def _goes_on(name: str) -> bool:
    """Tell fusions during which a collective goes on, and that hand on what it needs."""
    return name.startswith("async_collective_fusion")


def _is_custom(op: Op, target: str) -> bool:
    return op.opcode == "custom-call" and _target(op) == target


def _usual_branch(op: Op) -> str:
    true = re.search(r"true_computation=%?([\w.\-]+)", op.attributes)
    if true:
        return true[1]
    return re.findall(r"%?([\w.\-]+)", re.search(r"branch_computations=\{(.*?)\}", op.attributes)[1])[-1]


def _target(op: Op) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', op.attributes)
    return found[1] if found else ""


def _source(op: Op) -> str:
    """Return which part of the step an operation comes from, by the names that JAX hands down."""
    found = re.search(r'op_name="([^"]*)"', op.attributes)
    path = found[1] if found else ""
    part = next((x for x in ("image", "text") if f"/{x}/" in path or f"encode_{x}" in path), "")
    if not part:
        return "loss" if "shard_map" in path else "update and rest"
    return f"{part}: " + next((x for x in ("attention", "mlp", "norm1", "norm2") if f"/{x}/" in path), "rest")


def _passes(sources: list[Array], op: Op) -> int:
    """Return how often a matrix unit of bfloat16 passes over a product of these operands."""
    found = re.search(r"operand_precision=\{(\w+)", op.attributes)
    wide = any(bits(x.dtype) > 16 for x in sources)
    return {"highest": 6, "high": 3}.get(found[1], 1) if found and wide else 1


def _dot_flops(sources: list[Array], op: Op) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)[1]
    return 2.0 * op.results[0].elements * math.prod(sources[0].shape[int(d)] for d in contracted.split(",") if d)


def _convolution_flops(sources: list[Array], op: Op) -> float:
    """Return two flops for every product of two numbers that are data, not padding, which XLA uses for batches."""
    lhs, rhs = sources
    kinds = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    lhs_dims, rhs_dims, out_dims = kinds[1], kinds[2], kinds[3]
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(d for d in out_dims if d.isdigit())

    def each(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * len(spatial)

    total = 2.0 * op.results[0].shape[out_dims.index("b")] * op.results[0].shape[out_dims.index("f")]
    total *= rhs.shape[rhs_dims.index("i")]
    if batch_groups := re.search(r"batch_group_count=(\d+)", op.attributes):
        total /= int(batch_groups[1])  # the results' features are cut among them
    options = zip(
        *(each("size", "1"), each("stride", "1"), each("pad", "0_0"), each("lhs_dilate", "1"), each("rhs_dilate", "1")),
        strict=True,
    )
    for d, (size, stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, options, strict=True):
        side, out = lhs.shape[lhs_dims.index(d)], op.results[0].shape[out_dims.index(d)]
        low = int(pad.split("_")[0])
        total *= valid_positions(side, int(size), out, int(stride), low, int(lhs_dilate), int(rhs_dilate))
    return total
