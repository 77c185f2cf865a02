"""The planner: names of slices, a step compiled for one, and what follows; what a program's text says: test_cost.py."""

import dataclasses

import pytest

from clip_jax.config import (
    MODELS,
    Architecture,
    MeshConfig,
    ResNet,
    TextTransformer,
    ViT,
    default_config,
    from_config_dict,
)
from clip_jax.devices import sharding
from clip_jax.devices.chips import CHIPS, KINDS, chip_of
from clip_jax.models import flops
from clip_jax.planner import predict
from clip_jax.planner.cost import Program
from clip_jax.planner.page import page
from clip_jax.planner.search import search, table
from clip_jax.planner.topology import CORES, LARGEST, parse_topology
from clip_jax.training.optim import frozen_towers
from tests.tpu import v4_mesh

# What the compiler turns into something else than a product: less than half a percent of a model's flops.
SAME_FLOPS = 0.005

# ------------------------------------------------------------------------------------------------------- topologies


@pytest.mark.parametrize(
    ("name", "chips", "devices", "kind"),
    [
        ("v4-512", 256, 256, "TPU v4"),  # cores
        ("v4:2x2x4", 16, 16, "TPU v4"),
        ("v5p-128", 64, 64, "TPU v5"),
        ("v5e-256", 256, 256, "TPU v5 lite"),
        ("v5litepod-16", 16, 16, "TPU v5 lite"),
        ("v6e-8", 8, 8, "TPU v6 lite"),
        ("v7x-128", 128, 256, "TPU7x"),
        ("v3-8", 4, 8, "TPU v3"),
        ("v5p-1536", 768, 768, "TPU v5"),  # 8x8x12
    ],
)
def test_a_slice_has_the_chips_that_clouds_sell_under_its_name(name, chips, devices, kind):
    pytest.importorskip("libtpu")
    where = parse_topology(name)
    found = where.devices()
    assert (where.chips, len(found), found[0].device_kind) == (chips, devices, kind)
    assert chip_of(kind) is where.chip
    assert len({device.process_index for device in found}) == max(1, chips // where.chip.chips_per_host)


def test_several_slices_are_joined():
    pytest.importorskip("libtpu")
    where = parse_topology("v5e-16", slices=2)
    assert (where.chips, {device.slice_index for device in where.devices()}) == (32, {0, 1})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v4", "expected a chip and a size, such as v5e-256"),
        ("v4-7", "v4 counts cores, 2 a chip"),
        ("v4-24", "no slice of 12 chips is sold; use v4-16"),
        ("v5e-512", "the largest slice of v5e is v5e-256; several: --slices=2"),
        ("v5f-8", "no chip 'v5f'; did you mean v5"),
        ("h100:2x2", "GPUs have no shape; say h100-4"),
        ("h100-0", "expected 1 chip or more, as in h100-8"),
        ("v5p-250", "no slice of 125 chips is sold; use v5p-128"),
        ("v5e:3x5", "a slice of v5e has 2 sides of 1, 2 or a multiple of 4, and at most 256 chips; e.g. v5e:4x8"),
        ("v5e:4x4x4", "has 2 sides"),
        ("v6e:0x4", "has 2 sides"),
        ("v5e:32x32", "at most 256 chips"),
        ("v4:4x4", "a slice of v4 has 3 sides"),
    ],
)
def test_a_wrong_name_is_answered_with_one_that_works(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(("kind", "sides"), [("v4", (16, 16, 16)), ("v5p", (16, 16, 24)), ("v7x", (16, 24, 24))])
def test_the_largest_slice_has_its_shape(kind, sides):
    assert parse_topology(f"{kind}-{LARGEST[kind] * CORES.get(kind, 1)}").shape == sides


def test_gpus_have_no_slices():
    with pytest.raises(ValueError, match="give all GPUs in one number, as in h100-16"):
        parse_topology("h100-8", slices=2)


def test_every_kind_that_jax_names_has_its_figures():
    assert set(KINDS.values()) == set(CHIPS)
    assert chip_of("a chip of next year") is None


def test_a_mesh_keeps_slices_apart_and_a_host_s_rows_together():
    pytest.importorskip("libtpu")
    devices = parse_topology("v5e-16", slices=2).devices()
    mesh = sharding.make_mesh(devices[::-1], fsdp=8)
    assert mesh.devices.shape == (2, 2, 8, 1)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    hosts = [device.process_index for device in mesh.devices.flat]
    assert hosts == sorted(hosts)
    with pytest.raises(ValueError, match="mesh.fsdp=32 times .* does not divide 16 devices of each of 2 slices"):
        sharding.make_mesh(devices, fsdp=32)


# ----------------------------------------------------------------------------------------------------------- flops


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("vit_b32", 8.82, 5.96),
        ("vit_b16", 35.13, 5.96),
        ("vit_l14", 162.03, 13.30),
        ("vit_l14_336", 381.92, 13.30),
        ("rn50", 11.59, 5.96),
        ("rn101", 19.01, 5.96),
        ("rn50x4", 41.16, 9.27),
        ("rn50x16", 145.74, 13.30),
        ("rn50x64", 520.25, 23.55),
    ],
)
def test_a_forward_pass_has_the_published_flops(name, image, text):
    """GFLOP of a picture and of a text: open_clip's model_profile.csv has the ViTs', its ResNets' are 0.6 more."""
    found = [round(value / 1e9, 2) for value in flops.forward_flops(MODELS[name])]
    assert found == [image, text]


def small(image: ViT | ResNet, **train: object):
    """Return a run of a model with few flops, 64 pairs on each of 16 chips."""
    config = default_config("vit_b32")
    config.train.batch_size, config.train.total_steps = 1024, 10_000
    config.train.update(train)
    text = TextTransformer(vocab_size=1024, eos_id=1023, length=32, width=256, layers=3, heads=4)
    return dataclasses.replace(from_config_dict(config), model=Architecture(image, text, 256))


VIT = ViT(image_size=64, patch_size=16, width=256, layers=3, heads=4)  # a loop of one would be none


@pytest.fixture(scope="module")
def vit_plan():
    """A whole step for 16 chips, as `clip_jax.main` would run it."""
    pytest.importorskip("libtpu")
    return predict.plan_step(small(VIT), parse_topology("v4-32"))


def test_the_compiled_step_has_the_flops_of_its_trace(vit_plan):
    assert vit_plan.flops == pytest.approx(vit_plan.traced_flops, rel=SAME_FLOPS)
    forward = sum(flops.forward_flops(small(VIT).model))
    assert vit_plan.model_flops == 3 * forward * 64
    assert 0 < vit_plan.kernel_flops < vit_plan.flops


def test_without_loops_the_flops_are_xla_s_own():
    """And bytes are no more than its own, which knows neither what stays on the chip nor what is sliced in place."""
    config = small(VIT, unroll_layers=True, remat="none", text_capacity=1.0)
    lowered, *_ = predict.lower_step(config, v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}), 10_000)
    compiled = lowered.compile()
    cost, xla = Program(compiled.as_text()).cost(), compiled.cost_analysis()
    assert not cost.endless
    assert cost.flops + cost.other_flops == pytest.approx(xla["flops"], rel=SAME_FLOPS)
    assert 0 < cost.logical_bytes < xla["bytes accessed"]


def test_a_resnet_s_step_has_the_flops_of_its_trace():
    config = small(ResNet(64, 32, (1, 1, 1, 1), 8))
    plan = predict.plan_step(config, parse_topology("v4-32"))
    assert plan.flops == pytest.approx(plan.traced_flops, rel=SAME_FLOPS)


# ------------------------------------------------------------------------------------------------------------ plans


def test_what_is_held_adds_up(vit_plan):
    assert vit_plan.fits and not vit_plan.endless_loops
    held = vit_plan.parameter_bytes + vit_plan.optimizer_bytes + vit_plan.batch_bytes
    assert held <= vit_plan.argument_bytes <= 1.3 * held  # arguments are padded to tiles
    assert vit_plan.activation_bytes > 0
    assert vit_plan.argument_bytes <= vit_plan.peak_bytes <= vit_plan.topology.chip.hbm_bytes


def test_saved_activations_are_those_of_the_policy():
    """names: in every layer what enters it and attention's result; full: what enters. bfloat16, 64 pairs on a chip."""
    mesh = v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1})
    saved = {
        policy: predict.saved_bytes(small(VIT, remat=policy, text_capacity=1.0), mesh)
        for policy in ("none", "dots", "names", "full")
    }
    results = 64 * 256 * 2 * (2 * (17 + 32) + 2)  # of two layers at all positions, of the last at one
    assert saved["names"] - saved["full"] == pytest.approx(results, rel=0.01)
    assert saved["full"] < saved["names"] < saved["dots"] < saved["none"]


def test_a_locked_tower_saves_nothing_and_counts_once():
    mesh, config = v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}), small(VIT, text_capacity=1.0)
    locked = dataclasses.replace(config, optim=dataclasses.replace(config.optim, freeze="^image/"))
    image, text = flops.forward_flops(config.model)
    assert flops.training_flops(config.model, ("image",)) == image + 3 * text
    assert flops.training_flops(config.model, ("text",)) == 3 * image + text
    assert flops.training_flops(config.model) == 3 * (image + text)
    assert [frozen_towers(config.model, f) for f in ("^image/", "^image/class_embedding")] == [("image",), ()]
    # Of pictures what names keeps in every layer (the stream and attention's result; of the last at one position), and
    # patches and pooled rows besides.
    less = predict.saved_bytes(config, mesh) - predict.saved_bytes(locked, mesh)
    assert less >= 64 * 256 * 2 * (3 * 17 + 2 * 17 + 1)
    assert predict.saved_bytes(locked, mesh) >= 64 * 256 * 2 * (3 * 32 + 2 * 32 + 1)
    assert predict.traced_flops(locked, mesh) < 0.8 * predict.traced_flops(config, mesh)


def test_too_large_a_batch_is_said_not_to_fit():
    pytest.importorskip("libtpu")
    plan = predict.plan_loss("softmax", 2**25, 4096, "float32", parse_topology("v5e-4"))
    assert not plan.fits and plan.needed_bytes > plan.topology.chip.hbm_bytes and plan.as_json()["fits"] is False
    assert "DOES NOT FIT" in page(plan)


def test_times_are_work_over_rates(vit_plan):
    chip = CHIPS["v4"]
    assert vit_plan.seconds["hbm"] == vit_plan.hbm_bytes_padded / chip.hbm_bytes_per_second
    fast, slow = vit_plan.step_seconds
    assert fast == max(vit_plan.seconds.values()) and slow == sum(vit_plan.seconds.values())
    assert vit_plan.mfu[0] == pytest.approx(vit_plan.model_flops / chip.flops_per_second / fast)
    assert vit_plan.images_per_second == pytest.approx((64 / fast, 64 / slow))
    assert vit_plan.days[0] == pytest.approx(10_000 * fast / 86_400)


def test_a_gpu_is_planned_by_its_datasheet():
    plan = predict.plan_by_datasheet(small(VIT), parse_topology("h100-16"))
    assert plan.fits and plan.flops == pytest.approx(plan.model_flops, rel=0.5)
    two = predict.plan_by_datasheet(
        dataclasses.replace(small(VIT), mesh=dataclasses.replace(small(VIT).mesh, fsdp=2)), parse_topology("h100-16")
    )
    assert two.parameter_bytes == pytest.approx(plan.parameter_bytes / 2, rel=0.02)  # biases and the like are whole
    assert two.link_bytes == pytest.approx(1.5 * plan.link_bytes)
    assert "Not compiled" in page(plan)


@pytest.mark.parametrize("change", ["float32", "shard_moments", "freeze"])
def test_a_gpu_s_plan_follows_the_config(change):
    where, config = parse_topology("h100-16"), small(VIT)
    train = dataclasses.replace(config.train, dtype="float32")
    optim = {"shard_moments": {"shard_moments": True}, "freeze": {"freeze": "^image/"}}.get(change, {})
    changed = dataclasses.replace(
        config, train=train if change == "float32" else config.train, optim=dataclasses.replace(config.optim, **optim)
    )
    before, after = predict.plan_by_datasheet(config, where), predict.plan_by_datasheet(changed, where)
    if change == "float32":
        assert after.seconds["flops"] == pytest.approx(2 * before.seconds["flops"])
        assert "2.00 times as long as in bfloat16" in page(after)
    elif change == "shard_moments":
        assert after.optimizer_bytes < 0.1 * before.optimizer_bytes and after.link_bytes == before.link_bytes
    else:
        assert after.activation_bytes < 0.7 * before.activation_bytes and after.link_bytes < before.link_bytes
        assert after.mfu[0] <= 1.5 and after.as_json()["freeze"] == "^image/"


def test_a_gpu_s_plan_refuses_what_it_does_not_know():
    config = dataclasses.replace(small(VIT), mesh=MeshConfig(tensor=2))
    with pytest.raises(ValueError, match="mesh.tensor=2: .* use --config.mesh.tensor=1"):
        predict.plan_by_datasheet(config, parse_topology("h100-16"))


def made(config, where, *, peak, fits):
    rows = config.train.batch_size / where.chips
    return predict.Plan(
        *("step", where, config.train.batch_size, fits),
        needed_bytes=peak,
        peak_bytes=peak,
        flops=rows * 1e9,
        unit_flops=rows * 1e9,
        model_flops=rows * 1e9,
        hbm_bytes=1e6,
        hbm_bytes_padded=1e6,
        config=config,
    )


def test_search_finds_the_largest_batch_that_fits():
    """Of a compiler that takes 3 GB, and a row's megabytes by policy."""
    a_row = {"none": 400e6, "dots": 200e6, "names": 100e6, "full": 50e6}
    asked = []

    def plan(config, where):
        asked.append((config.train.remat, config.mesh.fsdp, config.train.batch_size))
        peak = 3e9 + a_row[config.train.remat] * config.train.batch_size / where.chips
        return made(config, where, peak=peak, fits=peak <= where.chip.hbm_bytes)

    where = parse_topology("v5e-16")
    length = {"total_steps": 0, "total_examples": 10_000 * 1024}  # in examples, larger batches would end in warm-up
    found = list(search(small(VIT, **length), where, plan))
    assert len(found) == 8 and len(asked) == len(set(asked)) <= 8 * 6
    for best in found:
        rows, most = best.global_batch / 16, (where.chip.hbm_bytes - 3e9) / a_row[best.config.train.remat]
        assert 0.75 * most <= rows <= most
    assert {plan.config.train.total_steps for plan in found} == {10_000}
    told = found[0].as_json()
    assert (told["model"], told["remat"], told["fsdp"], told["micro_batches"]) == ("custom", "none", 1, 1)
    starred = [line for line in table(found).splitlines() if line.startswith("*")]
    assert starred and all("full" in line for line in starred)  # as fast as any here, and the largest


@pytest.mark.parametrize(
    ("fixed", "a_row", "a_pair", "held", "scarce"),
    [
        (0.1e9, 7e4, 0, 1e9, 1),  # small batches lie in VMEM: the peak stands still, then grows
        (0.1e9, 7e4, 0.5, 0, 1),  # a loss whose scores grow with the square
        (15e9, 30e6, 0, 0, 1),  # little room beside the parameters
        (3e9, 1e9, 0, 0, 1),  # the config's own batch is many times too large
        (3e9, 25_000, 0, 0, 0.75),  # where nine tenths are taken, the compiler finds a way to take less
    ],
)
def test_search_finds_it_wherever_the_peak_bends(fixed, a_row, a_pair, held, scarce):
    where = parse_topology("v5e-4")
    room = where.chip.hbm_bytes

    def peak(rows):
        at_ease = fixed + max(0, a_row * rows + a_pair * rows * rows - held)
        return at_ease if at_ease < 0.9 * room else scarce * at_ease

    def plan(config, where):
        rows = config.train.batch_size // where.chips
        return made(config, where, peak=peak(rows), fits=peak(rows) <= room)

    best = next(search(small(VIT), where, plan)).global_batch // where.chips
    assert peak(best) <= room < peak(1.25 * best + 8)


# ---------------------------------------------------------------------------------------------------------- the page


def test_what_makes_a_program_smaller_can_be_had(vit_plan):
    cut = dataclasses.replace(vit_plan.config, mesh=MeshConfig(tensor=2))
    text = page(dataclasses.replace(vit_plan, config=cut, fits=False, needed_bytes=1e12))
    assert "--config.mesh.fsdp=8:" in text and "optimizer, averages" in text


def test_fewer_parts_are_advised_where_cut_parameters_leave_room(vit_plan):
    """As of RN50x64 on v5e: 32 parts of 4 pictures take 8% more flops, and longer, than 8 of 16 with fsdp."""
    config = dataclasses.replace(vit_plan.config, train=dataclasses.replace(vit_plan.config.train, micro_batches=4))
    tight = dataclasses.replace(
        vit_plan,
        config=config,
        peak_bytes=vit_plan.topology.chip.hbm_bytes - 1e9,
        activation_bytes=3e9,
        parameter_bytes=2e9,
        optimizer_bytes=4e9,
    )
    assert "Try --config.mesh.fsdp=16 --config.train.micro_batches=2: parameters, cut" in page(tight)
    assert "micro_batches=2" not in page(dataclasses.replace(tight, parameter_bytes=1e8, optimizer_bytes=2e8))
    cut = dataclasses.replace(config, mesh=MeshConfig(fsdp=16))
    assert "micro_batches=2" not in page(dataclasses.replace(tight, config=cut))


def test_the_page_has_what_decides(vit_plan):
    text = page(vit_plan)
    for expected in (
        "v4-32: 16 chips of v4 (2x2x4)",
        "FITS",
        "optimizer",
        "all-reduce",
        "Bound by",
        "MFU counts",
        "days",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fits": False, "needed_bytes": 1e12}, "Try --config.mesh.fsdp=16"),
        ({"unit_flops": 1e15}, "Try --config.train.remat=dots"),
        ({"hbm_bytes_padded": 1e12, "optimizer_bytes": 1e11}, "Try --config.optim.shard_moments=True"),
        ({"network_bytes": 1e12}, "Try a larger batch: gradients cross between slices"),
        ({"traced_flops": 1.0}, "Beware: JAX's trace has 1 FLOP"),
        ({"traced_flops": 1e15}, "The compiler saves products: JAX's trace has 1 PFLOP"),
        ({"unit_flops": 1e15, "peak_bytes": 20e9, "temporary_bytes": 19e9}, "Nothing to change first: bound by"),
        ({"endless_loops": ("while.1",)}, "Beware: counted once, for want of a constant number of rounds: while.1"),
    ],
)
def test_the_page_says_what_to_change_first(vit_plan, change, expected):
    assert expected in page(dataclasses.replace(vit_plan, **change))
