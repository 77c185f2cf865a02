"""Costs counted from HLO text: tiled arrays, loops, slices, and every notation of collectives."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.losses import LOSSES
from clip_jax.models import flops
from clip_jax.planner import predict
from clip_jax.planner.cost import Program
from clip_jax.planner.hlo import parse, parse_arrays
from clip_jax.planner.page import render_page
from clip_jax.planner.topology import parse_topology


def test_array_sizes_include_tile_padding():
    """Attention scores of ViT-L/14: 257 columns are padded to 384, 257 rows to 264."""
    (scores,) = parse_arrays("f32[2,257,257]{2,1,0:T(8,128)}")
    assert (scores.logical_bytes, scores.padded_bytes) == (2 * 257 * 257 * 4, 2 * 264 * 384 * 4)
    in_vmem, parameter, flag = parse_arrays("(bf16[8,257,64]{0,2,1:T(8,128)(2,1)S(1)}, f32[24]{0}, pred[])")
    assert (in_vmem.memory_space, in_vmem.padded_bytes, parameter.padded_bytes, flag.logical_bytes) == (
        1,
        257 * 64 * 128 * 2,
        96,
        1,
    )


PROGRAM = """HloModule step

%body (p: (s32[], f32[8,128], f32[3,128,128])) -> (s32[], f32[8,128], f32[3,128,128]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}, f32[3,128,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = f32[3,128,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %y = f32[8,128]{1,0:T(8,128)} fusion(%x, %w, %i), kind=kOutput, calls=%matmul
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)}, f32[3,128,128]{2,1,0:T(8,128)}) tuple(%next, %y, %w)
}

%matmul (a: f32[8,128], b: f32[3,128,128], c: s32[]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[3,128,128]{2,1,0:T(8,128)} parameter(1)
  %c = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,128,128]{2,1,0:T(8,128)} dynamic-slice(%b, %c, %zero, %zero), dynamic_slice_sizes={1,128,128}
  %k = f32[128,128]{1,0:T(8,128)} bitcast(%slice)
  ROOT %d = f32[8,128]{1,0:T(8,128)} convolution(%a, %k), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%condition (p.1: (s32[], f32[8,128], f32[3,128,128])) -> pred[] {
  %p.1 = (s32[], f32[8,128]{1,0:T(8,128)}, f32[3,128,128]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: f32[8,128], w.1: f32[3,128,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w.1 = f32[3,128,128]{2,1,0:T(8,128)} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[8,128]{1,0:T(8,128)}, f32[3,128,128]{2,1,0:T(8,128)}) tuple(%start, %x.1, %w.1)
  %loop = (s32[], f32[8,128]{1,0:T(8,128)}, f32[3,128,128]{2,1,0}) while(%init), condition=%condition, body=%body
  %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%out), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%body
}
"""


def test_loop_body_counts_per_iteration_and_slice_counts_its_own_bytes():
    cost = Program(PROGRAM).cost()
    assert cost.flops == 3 * 2 * 8 * 128 * 128
    assert cost.bf16_equivalent_flops == 6 * cost.flops  # float32, precision highest: six bfloat16 passes
    x, w = 8 * 128 * 4, 128 * 128 * 4
    counters = 3 * 3 * 4 + 3 * 4  # operands and result of the add, and the slice's index
    assert cost.logical_bytes == 3 * (2 * x + w) + 2 * x + counters
    assert not cost.unknown_trip_counts
    (sent,) = cost.collectives.values()
    assert (sent.kind, sent.group, sent.slices, sent.count) == ("all-reduce", 4, 1, 1)
    assert (sent.interconnect_bytes, sent.network_bytes) == (2 * 3 / 4 * x, 0)


@pytest.mark.parametrize(
    ("groups", "group", "slices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, 2),
        ("[2,4]<=[8]", 4, 2),
        ("[4,2]<=[8]", 2, 1),
        ("[4,2]<=[2,4]T(1,0)", 2, 2),
        ("mesh['a'=4,'b'=2] {'b'}", 2, 1),
        ("mesh['a'=4,'b'=2] {'a'}", 4, 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8, 4),
    ],
)
def test_replica_groups_of_every_notation_give_group_size_and_spanned_slices(groups, group, slices):
    text = PROGRAM.replace("{{0,1,2,3},{4,5,6,7}}", groups)
    (sent,) = Program(text, slices=4, devices_per_slice=2).cost().collectives.values()
    assert (sent.group, sent.slices) == (group, slices)


def test_all_reduce_between_slices_sends_a_shard_per_device():
    (sent,) = Program(PROGRAM, slices=4, devices_per_slice=2).cost().collectives.values()
    x = 8 * 128 * 4
    assert (sent.interconnect_bytes, sent.network_bytes) == (2 * 1 / 2 * x, 2 * 1 / 2 * x / 2)


def test_loop_of_unknown_trip_count_is_reported_and_counted_once():
    cost = Program(PROGRAM.replace("%n = s32[] constant(3)", "%n = s32[] get-tuple-element(%p.1), index=0")).cost()
    assert cost.unknown_trip_counts == ["loop"] and cost.flops == 2 * 8 * 128 * 128


@pytest.mark.parametrize("name", LOSSES)
def test_loss_sends_texts_and_their_gradients_once_between_slices(name):
    """The network carries a device's texts, and the reduction of their gradient in both directions."""
    pytest.importorskip("libtpu")
    plan = predict.plan_loss(name, 4096, 256, "float32", parse_topology("v5e-8", slices=2))
    assert {sent["slices"] for sent in plan.collectives if sent["network_bytes"]} == {2}
    texts = 4096 // 16 * 256 * 4
    assert 3 * texts <= plan.network_bytes <= 1.05 * 3 * texts
    assert "between 2 slices" in render_page(plan)


def test_arrays_in_vmem_add_no_hbm_bytes():
    on_chip = PROGRAM.replace("f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}")
    assert Program(PROGRAM).cost().logical_bytes - Program(on_chip).cost().logical_bytes == (3 * 2 + 2) * 8 * 128 * 4


def test_conditional_counts_the_branch_of_a_true_predicate():
    def function(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x @ x, x)

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert Program(jax.jit(function).lower(x).compile().as_text()).cost().flops == 2 * 64**3
    assert flops.count(function, x) == 2 * 64**3


def test_parse_refuses_text_that_is_not_a_compiled_program():
    with pytest.raises(ValueError, match=r"expected the result of Compiled.as_text\(\), got text without an ENTRY"):
        parse("HloModule empty")


# An all-gather that overlaps a matmul, as v5e's compiler writes it: [8, 128] of four devices, into HBM.
OVERLAPPING = """HloModule step

%start (a: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %gather = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %begun = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (a.1: bf16[8,128], g: bf16[32,128], s: u32[], w: bf16[128,128]) -> (bf16[8,128], bf16[8,128], bf16[32,128], bf16[32,128], u32[]) {
  %a.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %s = u32[]{:S(2)} parameter(2)
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(3)
  %gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%a.1), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %d = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%w, %w), dim_labels=bf_io->bf
  ROOT %t = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) tuple(%d, %a.1, %g, %gather.1, %s)
}

%end (a.2: bf16[8,128], g.1: bf16[32,128], s.1: u32[]) -> bf16[32,128] {
  %a.2 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %s.1 = u32[]{:S(2)} parameter(2)
  %gather.2 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%a.2), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %done = bf16[32,128]{1,0:T(8,128)(2,1)} custom-call(%a.2, %g.1, %gather.2, %s.1), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[8,128], k: bf16[128,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %f = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %f.0 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%f), index=0
  %f.1 = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%f), index=1
  %f.2 = u32[]{:S(2)} get-tuple-element(%f), index=2
  %m = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%f.0, %f.1, %f.2, %k), kind=kOutput, calls=%async_collective_fusion.1
  %m.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%m), index=1
  %m.3 = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%m), index=3
  %m.4 = u32[]{:S(2)} get-tuple-element(%m), index=4
  ROOT %r = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%m.1, %m.3, %m.4), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_overlapped_collective_is_counted_once():
    cost = Program(OVERLAPPING).cost()
    (sent,) = cost.collectives.values()
    assert (sent.kind, sent.group, sent.count, sent.interconnect_bytes) == ("all-gather", 4, 1, 3 * 8 * 128 * 2)
    x, w = 8 * 128 * 2, 128 * 128 * 2
    assert cost.logical_bytes == (x + 4 * x) + (w + x)  # all-gather, and matmul


# v7x: an all-reduce on the sparse cores, and a slice of an array that a nested fusion retiles.
SPARSE_CORE = """HloModule step

%called (a: bf16[16,128]) -> bf16[16,128] {
  %a = bf16[16,128]{1,0:T(16,128)(2,1)} parameter(0)
  ROOT %sum = bf16[16,128]{1,0:T(16,128)(2,1)} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
}

%tiles (p: bf16[3,16,128]) -> bf16[3,16,128] {
  %p = bf16[3,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %c = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} copy(%p)
}

%taken (p.1: bf16[3,16,128], i: s32[]) -> bf16[1,16,128] {
  %p.1 = bf16[3,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %f = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} fusion(%p.1), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiles
  ROOT %s = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%f, %i, %i, %i), dynamic_slice_sizes={1,16,128}
}

ENTRY %main (x: bf16[16,128], y: bf16[3,16,128], i.1: s32[]) -> bf16[1,16,128] {
  %x = bf16[16,128]{1,0:T(16,128)(2,1)} parameter(0)
  %y = bf16[3,16,128]{2,1,0:T(16,128)(2,1)} parameter(1)
  %i.1 = s32[]{:S(6)} parameter(2)
  %begun = ((bf16[16,128]{1,0:T(16,128)(2,1)}), bf16[16,128]{1,0:T(16,128)(2,1)}, u32[]) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  %done = bf16[16,128]{1,0:T(16,128)(2,1)} call-done(%begun)
  ROOT %r = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} fusion(%y, %i.1), kind=kLoop, calls=%taken
}
"""  # noqa: E501


def test_sparse_core_collective_is_counted_and_retiling_reads_only_the_slice():
    cost = Program(SPARSE_CORE).cost()
    (sent,) = cost.collectives.values()
    x = 16 * 128 * 2
    assert (sent.kind, sent.count, sent.interconnect_bytes) == ("all-reduce", 1, x)
    assert cost.logical_bytes == 2 * x + 2 * x


def test_fused_all_reduce_scatter_counts_as_reduce_scatter():
    text = PROGRAM.replace("%matmul (", "%all-reduce-scatter.1 (").replace("%matmul\n", "%all-reduce-scatter.1\n")
    text = text.replace(
        "ROOT %d = ", "%r = f32[8,128]{1,0:T(8,128)} all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}\n  ROOT %d = "
    )
    sent = Program(text).cost().collectives["reduce-scatter", 4, 1]
    assert (sent.count, sent.interconnect_bytes) == (3, 3 * 3 / 4 * 8 * 128 * 4)
