"""FLOPs, HBM bytes and collectives of a compiled program, counted from its HLO text.

XLA's `cost_analysis` counts a loop body once, ignores tile padding and counts no collective. Here every computation is
counted as often as it runs, and of a conditional the branch of a true predicate, where the training step has the common
case (packed captions, finite gradients).

HBM bytes: each instruction outside a fusion reads its operands once and writes its results once, including tile
padding. A slice counts the sliced elements, an in-place update the updated ones, and on-chip memory (VMEM, v4's CMEM)
nothing. FLOPs: two per multiply-add of matmuls and convolutions, without a convolution's padding; a kernel's own
estimate; one per element of other arithmetic, as in XLA.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from clip_jax.models.flops import valid_positions
from clip_jax.planner.hlo import HBM, Array, Computation, Op, element_bits, parse

_CALLS = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")

_TARGET = re.compile(r'custom_call_target="([^"]*)"')

# A fusion inside another fusion whose result is its operand in another tiling (v7x).
_RETILING = "output_to_operand_aliasing={{}: (0, {})}"

# Instructions that move no bytes and compute nothing.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain", "opt-barrier"),
    *("partition-id", "replica-id", "add-dependency", "async-update"),
)
_FREE_CUSTOM = (
    *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"),
    *("PrepareAsyncCallStart", "PrepareAsyncCallDone"),
)
_ARITHMETIC = (  # one FLOP per element, as in XLA, which counts exponentials and the like separately
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "remainder", "abs", "negate", "sign"),
    *("floor", "ceil", "round-nearest-even", "round-nearest-afz", "compare", "select", "clamp", "convert"),
    *("and", "or", "xor", "not", "shift-left", "shift-right-logical", "shift-right-arithmetic", "is-finite"),
    "reduce-precision",
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

Bytes = np.ndarray  # [2]: without and with tile padding


@dataclasses.dataclass
class Collective:
    """All collectives of one kind over groups of one size: their number, and the bytes that a device sends."""

    kind: str
    group: int  # devices per replica group
    slices: int  # slices that a group spans
    count: float = 0.0
    interconnect_bytes: float = 0.0  # to devices of the same slice
    network_bytes: float = 0.0  # to devices of other slices


@dataclasses.dataclass
class Cost:
    """Work of one device in one run of a program."""

    flops: float = 0.0  # of matmuls, convolutions and kernels
    bf16_equivalent_flops: float = 0.0  # flops times passes of a bfloat16 matrix unit: float32 `highest` 6, `high` 3
    other_flops: float = 0.0  # of the remaining arithmetic
    kernel_flops: float = 0.0  # the part of `flops` that kernels estimate themselves
    logical_bytes: float = 0.0  # HBM traffic without tile padding
    padded_bytes: float = 0.0  # HBM traffic with tile padding
    collectives: dict[tuple, Collective] = dataclasses.field(default_factory=dict)
    bytes_by_source: dict[str, float] = dataclasses.field(default_factory=dict)  # padded bytes by module of the model
    unknown_trip_counts: list[str] = dataclasses.field(default_factory=list)  # loops that are counted once


class Program:
    """Cost model of a compiled program.

    Args:
      text: of `Compiled.as_text()`.
      slices: number of TPU slices that the program runs on.
      devices_per_slice: JAX devices of a slice, if there are several slices.
    """

    def __init__(self, text: str, *, slices: int = 1, devices_per_slice: int = 0) -> None:
        self.computations, self.entry = parse(text)
        self._slices, self._devices_per_slice = slices, devices_per_slice if slices > 1 else 0

    def cost(self) -> Cost:
        """Return the cost of one run on one device."""
        cost = Cost()
        self._add_computation(cost, self.entry, 1.0)
        return cost

    def _add_computation(self, cost: Cost, name: str, times: float) -> None:
        computation = self.computations[name]
        for op in computation.values():
            if op.opcode == "while":
                body, condition = (op.find(rf"{key}=%?([\w.\-]+)") for key in ("body", "condition"))
                trips = self._trip_count(op, condition)
                if trips is None:
                    cost.unknown_trip_counts.append(op.name)
                self._add_computation(cost, body, times * (1 if trips is None else trips))
            elif op.opcode == "conditional":
                self._add_computation(cost, _true_branch(op), times)
            elif op.opcode in ("call", "async-start", "call-start") and (called := op.find(_CALLS)):
                self._add_computation(cost, called, times)
            else:
                self._add_op(cost, computation, op, times)

    def _trip_count(self, op: Op, condition: str) -> int | None:
        """Return a loop's trip count: the compiler's annotation, or its condition's constant (counters go 0, 1, …)."""
        if annotated := op.find(r'known_trip_count":?\{"?n"?:"?(\d+)'):
            return int(annotated)
        constants = [
            int(found[1])
            for name in self._reachable(condition)
            for inner in self.computations[name].values()
            if inner.opcode == "constant" and (found := re.match(r"(\d+)\b", inner.attributes))
        ]
        return constants[0] if len(constants) == 1 else None

    def _reachable(self, name: str) -> Iterator[str]:
        yield name
        for op in self.computations[name].values():
            for called in _CALLS.findall(op.attributes):
                if called in self.computations:
                    yield from self._reachable(called)

    def _add_op(self, cost: Cost, computation: Computation, op: Op, times: float) -> None:
        free = op.opcode in _FREE or op.opcode.endswith("-done")
        if free or (op.opcode == "custom-call" and op.find(_TARGET) in _FREE_CUSTOM):
            return
        flops, bf16_flops, other = self._flops(computation, op)
        cost.flops += times * flops
        cost.bf16_equivalent_flops += times * bf16_flops
        cost.other_flops += times * other
        if op.opcode == "custom-call":
            cost.kernel_flops += times * flops
        logical, padded = map(float, self._hbm_bytes(computation, op))
        cost.logical_bytes += times * logical
        cost.padded_bytes += times * padded
        source = _source_module(op)
        cost.bytes_by_source[source] = cost.bytes_by_source.get(source, 0) + times * padded
        if op.opcode == "fusion" and (found := self._started_collective(op.find(_CALLS))):
            inner, kind, sent = found
            self._add_collective(cost, kind, *self._replica_group(sent), inner, sent, times)
        kind = op.opcode.removesuffix("-start")
        transfer = op.find(r'_xla_megascale_transfer_type="(\w+)"') if kind == "send" else ""
        if kind in COLLECTIVES:
            self._add_collective(cost, kind, *self._replica_group(op), computation, op, times)
        elif transfer:  # between slices, after the compiler's own collectives within slices
            kind = "collective-permute" if transfer == "ONE_TO_ONE" else transfer.lower().replace("_", "-")
            self._add_collective(cost, kind, self._slices, self._slices, computation, op, times)

    def _flops(self, computation: Computation, op: Op) -> tuple[float, float, float]:
        """Return `flops`, `bf16_equivalent_flops` and `other_flops` of an instruction, including its fused ones."""
        if op.opcode in ("fusion", "map"):
            inner = self.computations[op.find(_CALLS)]
            return tuple(map(sum, zip(*(self._flops(inner, x) for x in inner.values()), strict=True)))
        if op.opcode == "custom-call":
            estimate = op.find(r'"cost_estimate":(\{[^}]*\})')
            flops = float(json.loads(estimate or "{}").get("flops", 0))
            return flops, flops, 0.0
        sources = [computation[name].results[0] for name in op.operands if name in computation]
        if op.opcode in ("convolution", "dot"):
            flops = _convolution_flops(sources, op) if op.opcode == "convolution" else _dot_flops(sources, op)
            return flops, flops * _mxu_passes(sources, op), 0.0
        if op.opcode in ("reduce", "reduce-window"):
            reduced = sum(x.elements for x in sources[: len(op.results)]) - sum(x.elements for x in op.results)
            return 0.0, 0.0, float(reduced)
        return 0.0, 0.0, float(op.results[0].elements) if op.opcode in _ARITHMETIC else 0.0

    def _hbm_bytes(self, computation: Computation, op: Op) -> Bytes:
        sources = [computation[name].results for name in op.operands if name in computation]
        if op.opcode in ("copy-start", "slice-start"):
            moved = op.results[1] if op.opcode == "slice-start" else op.results[0]
            ends = [op.results[0].memory_space, op.results[1].memory_space].count(HBM)
            return ends * _bytes([moved], everywhere=True)
        if op.opcode == "fusion":
            return self._fusion_hbm_bytes(computation, op)
        if op.opcode in ("send", "recv"):
            return _bytes(op.results[:1])
        if op.opcode == "dynamic-update-slice":
            return 2 * _bytes(sources[1]) if op.results[0].memory_space == HBM else np.zeros(2)
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            return _bytes(op.results) * (2 if sources[0][0].memory_space == HBM else 1)
        results = op.results[len(op.results) // 2 :] if op.opcode.endswith("-start") else op.results
        return _bytes([*itertools.chain.from_iterable(sources), *results])

    def _fusion_hbm_bytes(self, computation: Computation, op: Op) -> Bytes:
        name = op.find(_CALLS)
        inner, total = self.computations[name], np.zeros(2)
        root = next(x for x in inner.values() if x.is_root)
        if _is_custom(root, "AsyncCollectiveDone"):
            return total
        if _is_custom(root, "AsyncCollectiveStart"):  # its first result is its operand
            return _bytes([*computation[op.operands[0]].results, *op.results[1:]])
        results = root.operands if root.opcode == "tuple" else [root.name]
        for position, operand in enumerate(op.operands):
            source = computation[operand].results[0]
            passed_on = _spans_collective(name) and self._parameter(name, position) in results
            if source.memory_space == HBM and not passed_on:
                read = self._read_bytes(name, self._parameter(name, position))
                total += _bytes([source]) if read is None else read
        written = [self._update_bytes(name, x) for x in results]
        for result, update in zip(op.results, written, strict=False):
            if result.memory_space == HBM:
                total += _bytes([result]) if update is None else update
        return total

    def _update_bytes(self, name: str, result: str) -> Bytes | None:
        """Return the bytes of an in-place update; None for a result that is written completely."""
        inner = self.computations[name]
        op = inner[result]
        if _spans_collective(name) and op.opcode in ("parameter", *COLLECTIVES):
            return np.zeros(2)
        if op.opcode == "bitcast":
            return self._update_bytes(name, op.operands[0])
        if op.opcode == "fusion":
            called = op.find(_CALLS)
            return self._update_bytes(called, next(x.name for x in self.computations[called].values() if x.is_root))
        if op.opcode == "dynamic-update-slice":
            return _bytes(inner[op.operands[1]].results, everywhere=True)
        return None

    def _parameter(self, name: str, position: int) -> str:
        return next(
            op.name
            for op in self.computations[name].values()
            if op.opcode == "parameter" and int(re.match(r"\d+", op.attributes)[0]) == position
        )

    def _read_bytes(self, name: str, source: str) -> Bytes | None:
        """Return the bytes of slices that a fused computation reads of an array; None if it reads all of it."""
        total = np.zeros(2)
        for user in self.computations[name].values():
            for place in [i for i, operand in enumerate(user.operands) if operand == source]:
                if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    read = _bytes(user.results, everywhere=True)
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    read = np.zeros(2)
                elif user.opcode == "bitcast" or _RETILING in user.attributes:
                    read = self._read_bytes(name, user.name)
                elif user.opcode == "fusion":
                    called = user.find(_CALLS)
                    read = self._read_bytes(called, self._parameter(called, place))
                else:
                    return None
                if read is None:
                    return None
                total += read
        return total

    def _started_collective(self, name: str) -> tuple[Computation, str, Op] | None:
        """Return the collective that a fusion starts, and its kind.

        An overlapped collective starts in one fusion, is repeated in the fusions that overlap it, and ends in another.
        A reduce-scatter is a fusion, too.
        """
        inner = self.computations[name]
        if _spans_collective(name) or any(_is_custom(op, "AsyncCollectiveDone") for op in inner.values()):
            return None
        for op in inner.values():
            if op.opcode in COLLECTIVES:
                return inner, "reduce-scatter" if name.startswith("all-reduce-scatter") else op.opcode, op
        return None

    def _add_collective(
        self, cost: Cost, kind: str, group: int, slices: int, computation: Computation, op: Op, times: float
    ) -> None:
        sources = [x for name in op.operands if name in computation for x in computation[name].results]
        entry = cost.collectives.setdefault((kind, group, slices), Collective(kind, group, slices))
        size = float(sum(x.logical_bytes for x in sources))
        interconnect, network = _sent_bytes(kind, size, group // slices, slices)
        entry.count += times
        entry.interconnect_bytes += times * interconnect
        entry.network_bytes += times * network

    def _replica_group(self, op: Op) -> tuple[int, int]:
        """Return the devices of a replica group, and the slices that they span."""
        text = op.attributes
        if op.opcode.startswith("collective-permute"):
            pairs = re.findall(r"\{(\d+),(\d+)\}", op.find(r"source_target_pairs=(\{.*?\}\})"))
            return 2, max(self._slice_count(pair) for pair in pairs)
        if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
            sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
            stride, strides = 1, {}
            for axis in reversed(sizes):  # the last axis has stride 1
                strides[axis], stride = stride, stride * sizes[axis]
            members = [0]
            for axis in re.findall(r"'(\w+)'", found[2]):
                members = [m + strides[axis] * k for m in members for k in range(sizes[axis])]
            return len(members), self._slice_count(members)
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
            devices = np.arange(int(found[1]) * int(found[2])).reshape([int(x) for x in found[3].split(",")])
            if found[4]:
                devices = devices.transpose([int(x) for x in found[4].split(",")])
            return int(found[2]), self._slice_count(devices.reshape(-1, int(found[2]))[0])
        members = op.find(r"replica_groups=\{\{([\d,]+)\}").split(",")
        return len(members), self._slice_count(members) if members != [""] else 1

    def _slice_count(self, members: Iterable[Any]) -> int:
        return len({int(x) // self._devices_per_slice for x in members}) if self._devices_per_slice else 1


def _sent_bytes(kind: str, size: float, inner: int, slices: int) -> tuple[float, float]:
    """Return the bytes that a device sends within its slice and to other slices.

    Each collective is assumed to use the algorithm that sends the fewest bytes: rings within a slice (no torus
    algorithm sends fewer), and across slices only a device's own shard of its slice's result.

    Args:
      size: bytes of a device's operands.
      inner: devices of the group within one slice.
      slices: slices that the group spans.
    """
    around, across = (inner - 1) / inner, (slices - 1) / slices
    return {
        "all-reduce": (2 * around * size, 2 * across * size / inner),
        "all-gather": (slices * (inner - 1) * size, (slices - 1) * size),
        "reduce-scatter": (around * size, across * size / inner),
        "all-to-all": (size / slices * around, across * size),
        "collective-permute": (size, 0.0) if slices == 1 else (0.0, size),
    }[kind]


def _bytes(arrays: Iterable[Array], everywhere: bool = False) -> Bytes:
    """Return the bytes of the arrays in HBM, or in all memories."""
    counted = [(x.logical_bytes, x.padded_bytes) for x in arrays if everywhere or x.memory_space == HBM]
    return np.sum(counted, axis=0, dtype=float) if counted else np.zeros(2)


def _spans_collective(name: str) -> bool:
    """Return whether a fusion overlaps a collective in flight, whose operands and results it passes on."""
    return name.startswith("async_collective_fusion")


def _is_custom(op: Op, target: str) -> bool:
    return op.opcode == "custom-call" and op.find(_TARGET) == target


def _true_branch(op: Op) -> str:
    branches = op.find(r"true_computation=%?([\w.\-]+)") or op.find(r"branch_computations=\{(.*?)\}")
    return re.findall(r"%?([\w.\-]+)", branches)[-1]


def _source_module(op: Op) -> str:
    """Return the tower and submodule of an instruction, by the scope names of JAX."""
    path = op.find(r'op_name="([^"]*)"')
    tower = next((x for x in ("image", "text") if f"/{x}/" in path or f"encode_{x}" in path), "")
    if not tower:
        return "loss" if "shard_map" in path else "optimizer and other"
    return f"{tower}: " + next((x for x in ("attention", "mlp", "norm1", "norm2") if f"/{x}/" in path), "other")


def _mxu_passes(sources: list[Array], op: Op) -> int:
    """Return the passes of a bfloat16 matrix unit over a matmul's operands."""
    passes = {"highest": 6, "high": 3}.get(op.find(r"operand_precision=\{(\w+)"), 1)
    return passes if any(element_bits(x.dtype) > 16 for x in sources) else 1


def _dot_flops(sources: list[Array], op: Op) -> float:
    contracted = op.find(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2.0 * op.results[0].elements * math.prod(sources[0].shape[int(d)] for d in contracted.split(",") if d)


def _convolution_flops(sources: list[Array], op: Op) -> float:
    """Return two FLOPs per multiply-add without padding; XLA also expresses batch dimensions as padded windows."""
    lhs, rhs = sources
    lhs_dims, rhs_dims, out_dims = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
    fields = dict(re.findall(r"(\w+)=(\S+)", op.find(r"window=\{([^}]*)\}")))
    spatial = sorted(d for d in out_dims if d.isdigit())

    def field(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * len(spatial)

    total = 2.0 * op.results[0].shape[out_dims.index("b")] * op.results[0].shape[out_dims.index("f")]
    total *= rhs.shape[rhs_dims.index("i")]
    total /= int(op.find(r"batch_group_count=(\d+)") or 1)  # the output features are divided among the groups
    options = zip(
        *(field("size", "1"), field("stride", "1"), field("pad", "0_0")),
        *(field("lhs_dilate", "1"), field("rhs_dilate", "1")),
        strict=True,
    )
    for d, (size, stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, options, strict=True):
        side, out = lhs.shape[lhs_dims.index(d)], op.results[0].shape[out_dims.index(d)]
        low = int(pad.split("_")[0])
        total *= valid_positions(side, int(size), out, int(stride), low, int(lhs_dilate), int(rhs_dilate))
    return total
