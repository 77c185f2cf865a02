"""The planner: cloud names, plans of compiled steps, batch search, and the report. HLO counting is in test_cost.py."""

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
from clip_jax.planner.page import render_page
from clip_jax.planner.search import search, table
from clip_jax.planner.topology import CORES, LARGEST, parse_topology
from clip_jax.training.optim import frozen_towers
from tests.tpu import v4_mesh

# The compiler replaces a few matmuls by other operations: less than 0.5 % of a model's FLOPs.
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
def test_cloud_name_gives_chips_and_devices(name, chips, devices, kind):
    pytest.importorskip("libtpu")
    topology = parse_topology(name)
    found = topology.devices()
    assert (topology.chips, len(found), found[0].device_kind) == (chips, devices, kind)
    assert chip_of(kind) is topology.chip
    assert len({device.process_index for device in found}) == max(1, chips // topology.chip.chips_per_host)


def test_several_slices_have_devices_with_slice_index():
    pytest.importorskip("libtpu")
    topology = parse_topology("v5e-16", slices=2)
    assert (topology.chips, {device.slice_index for device in topology.devices()}) == (32, {0, 1})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v4", "expected a chip and a size, such as v5e-256"),
        ("v4-7", "v4 counts cores, 2 per chip; use v4-6"),
        ("v4-24", "no slice of 12 chips is sold; use v4-16"),
        ("v5e-512", "the largest slice of v5e is v5e-256; for several use --slices=2"),
        ("v5f-8", "'v5f' is none of v.*; did you mean 'v5"),
        ("h100:2x2", "GPUs have no shape; use h100-4"),
        ("h100-0", "expected 1 chip or more, as in h100-8"),
        ("v5p-250", "no slice of 125 chips is sold; use v5p-128"),
        ("v5e:3x5", "a slice of v5e has 2 sides of 1, 2 or a multiple of 4, and at most 256 chips; e.g. v5e:4x8"),
        ("v5e:4x4x4", "has 2 sides"),
        ("v6e:0x4", "has 2 sides"),
        ("v5e:32x32", "at most 256 chips"),
        ("v4:4x4", "a slice of v4 has 3 sides"),
    ],
)
def test_invalid_topology_error_suggests_a_valid_name(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(("kind", "sides"), [("v4", (16, 16, 16)), ("v5p", (16, 16, 24)), ("v7x", (16, 24, 24))])
def test_largest_slice_has_its_shape(kind, sides):
    assert parse_topology(f"{kind}-{LARGEST[kind] * CORES.get(kind, 1)}").shape == sides


def test_slices_of_gpus_are_refused():
    with pytest.raises(ValueError, match="GPUs have no slices; give their total number, as in h100-16"):
        parse_topology("h100-8", slices=2)


def test_every_device_kind_of_jax_has_a_datasheet():
    assert set(KINDS.values()) == set(CHIPS)
    assert chip_of("a chip of next year") is None


def test_mesh_orders_devices_by_slice_and_host():
    pytest.importorskip("libtpu")
    devices = parse_topology("v5e-16", slices=2).devices()
    mesh = sharding.make_mesh(devices[::-1], fsdp=8)
    assert mesh.devices.shape == (2, 2, 8, 1)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
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
def test_forward_pass_has_the_published_flops(name, image, text):
    """GFLOP per image and per text: equal to open_clip's model_profile.csv for ViTs, 0.6 below it for ResNets."""
    found = [round(value / 1e9, 2) for value in flops.forward_flops(MODELS[name])]
    assert found == [image, text]


def small(image: ViT | ResNet, **train: object):
    """Return the config of a small model, with 64 pairs on each of 16 chips."""
    config = default_config("vit_b32")
    config.train.batch_size, config.train.total_steps = 1024, 10_000
    config.train.update(train)
    text = TextTransformer(vocab_size=1024, eos_id=1023, context_length=32, width=256, layers=3, heads=4)
    return dataclasses.replace(from_config_dict(config), model=Architecture(image, text, 256))


VIT = ViT(
    image_size=64, patch_size=16, width=256, layers=3, heads=4
)  # layers - 1 = 2 in the scan: a scan of one would be unrolled


@pytest.fixture(scope="module")
def vit_plan():
    """Return the plan of a training step, as `clip_jax.main` runs it, on 16 chips."""
    pytest.importorskip("libtpu")
    return predict.plan_step(small(VIT), parse_topology("v4-32"))


@pytest.mark.slow
def test_compiled_vit_step_has_the_flops_of_its_trace(vit_plan):
    assert vit_plan.flops == pytest.approx(vit_plan.traced_flops, rel=SAME_FLOPS)
    forward = sum(flops.forward_flops(small(VIT).model))
    assert vit_plan.model_flops == 3 * forward * 64
    assert 0 < vit_plan.kernel_flops < vit_plan.flops


@pytest.mark.slow
def test_flops_of_a_program_without_loops_equal_xla_cost_analysis():
    """Bytes are below XLA's, which counts arrays in VMEM and sliced arrays in full."""
    config = small(VIT, unroll_layers=True, remat="none", text_capacity=1.0)
    lowered, *_ = predict.lower_step(config, v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}), 10_000)
    compiled = lowered.compile()
    cost, xla = Program(compiled.as_text()).cost(), compiled.cost_analysis()
    assert not cost.unknown_trip_counts
    assert cost.flops + cost.other_flops == pytest.approx(xla["flops"], rel=SAME_FLOPS)
    assert 0 < cost.logical_bytes < xla["bytes accessed"]


@pytest.mark.slow
def test_compiled_resnet_step_has_the_flops_of_its_trace():
    config = small(ResNet(64, 32, (1, 1, 1, 1), 8), batch_size=256)  # compiles in two thirds of the time of 1,024
    plan = predict.plan_step(config, parse_topology("v4-32"))
    assert plan.flops == pytest.approx(plan.traced_flops, rel=SAME_FLOPS)


# ------------------------------------------------------------------------------------------------------------ plans


@pytest.mark.slow
def test_memory_parts_add_up_to_the_arguments(vit_plan):
    assert vit_plan.fits and not vit_plan.unknown_trip_counts
    total = vit_plan.parameter_bytes + vit_plan.optimizer_bytes + vit_plan.batch_bytes
    assert total <= vit_plan.argument_bytes <= 1.3 * total  # arguments are padded to tiles
    assert vit_plan.activation_bytes > 0
    assert vit_plan.argument_bytes <= vit_plan.peak_bytes <= vit_plan.topology.chip.hbm_bytes


def test_saved_activations_follow_the_remat_policy():
    """names saves the input and the attention output of every layer, full the input; bfloat16, 64 pairs per chip."""
    mesh = v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1})
    saved = {
        policy: predict.saved_bytes(small(VIT, remat=policy, text_capacity=1.0), mesh)
        for policy in ("none", "dots", "names", "full")
    }
    outputs = 64 * 256 * 2 * (2 * (17 + 32) + 2)  # of two layers at all positions, of the last at one
    assert saved["names"] - saved["full"] == pytest.approx(outputs, rel=0.01)
    assert saved["full"] < saved["names"] < saved["dots"] < saved["none"]


@pytest.mark.slow
def test_locked_tower_saves_no_activations_and_counts_one_forward_pass():
    mesh, config = v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}), small(VIT, text_capacity=1.0)
    locked = dataclasses.replace(config, optim=dataclasses.replace(config.optim, freeze="^image/"))
    image, text = flops.forward_flops(config.model)
    assert flops.training_flops(config.model, ("image",)) == image + 3 * text
    assert flops.training_flops(config.model, ("text",)) == 3 * image + text
    assert flops.training_flops(config.model) == 3 * (image + text)
    assert [frozen_towers(config.model, f) for f in ("^image/", "^image/class_embedding")] == [("image",), ()]
    # For images, names saves the residual stream and the attention output of every layer (of the last layer at one
    # position), the patches and the pooled rows.
    less = predict.saved_bytes(config, mesh) - predict.saved_bytes(locked, mesh)
    assert less >= 64 * 256 * 2 * (3 * 17 + 2 * 17 + 1)
    assert predict.saved_bytes(locked, mesh) >= 64 * 256 * 2 * (3 * 32 + 2 * 32 + 1)
    assert predict.traced_flops(locked, mesh) < 0.8 * predict.traced_flops(config, mesh)


def test_batch_above_the_memory_does_not_fit():
    pytest.importorskip("libtpu")
    plan = predict.plan_loss("softmax", 2**25, 4096, "float32", parse_topology("v5e-4"))
    assert not plan.fits and plan.needed_bytes > plan.topology.chip.hbm_bytes and plan.as_json()["fits"] is False
    assert "DOES NOT FIT" in render_page(plan)


@pytest.mark.slow
def test_times_are_work_divided_by_datasheet_rates(vit_plan):
    chip = CHIPS["v4"]
    assert vit_plan.seconds["hbm"] == vit_plan.hbm_bytes_padded / chip.hbm_bytes_per_second
    fast, slow = vit_plan.step_seconds
    assert fast == max(vit_plan.seconds.values()) and slow == sum(vit_plan.seconds.values())
    assert vit_plan.mfu[0] == pytest.approx(vit_plan.model_flops / chip.flops_per_second / fast)
    assert vit_plan.images_per_second == pytest.approx((64 / fast, 64 / slow))
    assert vit_plan.days[0] == pytest.approx(10_000 * fast / 86_400)


@pytest.mark.slow
def test_gpu_plan_by_datasheet_follows_fsdp():
    plan = predict.plan_by_datasheet(small(VIT), parse_topology("h100-16"))
    assert plan.fits and plan.flops == pytest.approx(plan.model_flops, rel=0.5)
    two = predict.plan_by_datasheet(
        dataclasses.replace(small(VIT), mesh=dataclasses.replace(small(VIT).mesh, fsdp=2)), parse_topology("h100-16")
    )
    assert two.parameter_bytes == pytest.approx(plan.parameter_bytes / 2, rel=0.02)  # biases are replicated
    assert two.interconnect_bytes == pytest.approx(1.5 * plan.interconnect_bytes)
    assert "Not compiled" in render_page(
        plan
    ) and "image attention: cuDNN flash attention\ntext attention: XLA: " in render_page(plan)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["float32", "shard_moments", "freeze"])
def test_gpu_plan_by_datasheet_follows_dtype_moments_and_freeze(change):
    topology, config = parse_topology("h100-16"), small(VIT)
    train = dataclasses.replace(config.train, dtype="float32")
    optim = {"shard_moments": {"shard_moments": True}, "freeze": {"freeze": "^image/"}}.get(change, {})
    changed = dataclasses.replace(
        config, train=train if change == "float32" else config.train, optim=dataclasses.replace(config.optim, **optim)
    )
    before, after = predict.plan_by_datasheet(config, topology), predict.plan_by_datasheet(changed, topology)
    if change == "float32":
        assert after.seconds["compute"] == pytest.approx(989 / 67 * before.seconds["compute"])
        assert "14.76 times the time of bfloat16" in render_page(after) and "matmul precision: float32" in render_page(
            after
        )
    elif change == "shard_moments":
        assert (
            after.optimizer_bytes < 0.1 * before.optimizer_bytes
            and after.interconnect_bytes == before.interconnect_bytes
        )
    else:
        assert (
            after.activation_bytes < 0.7 * before.activation_bytes
            and after.interconnect_bytes < before.interconnect_bytes
        )
        assert after.mfu[0] <= 1.5 and after.as_json()["freeze"] == "^image/"


def test_gpu_plan_refuses_tensor_parallelism():
    config = dataclasses.replace(small(VIT), mesh=MeshConfig(tensor=2))
    with pytest.raises(ValueError, match="mesh.tensor=2: .* use --config.mesh.tensor=1"):
        predict.plan_by_datasheet(config, parse_topology("h100-16"))


def make_plan(config, topology, *, peak, fits):
    rows = config.train.batch_size / topology.chips
    return predict.Plan(
        *("step", topology, config.train.batch_size, fits),
        needed_bytes=peak,
        peak_bytes=peak,
        flops=rows * 1e9,
        bf16_equivalent_flops=rows * 1e9,
        model_flops=rows * 1e9,
        hbm_bytes=1e6,
        hbm_bytes_padded=1e6,
        config=config,
    )


def test_search_finds_the_largest_batch_that_fits():
    """With a compiler whose programs need 3 GB plus a size per row that depends on the policy."""
    bytes_per_row = {"none": 400e6, "dots": 200e6, "names": 100e6, "full": 50e6}
    compiled = []

    def plan(config, topology):
        compiled.append((config.train.remat, config.mesh.fsdp, config.train.batch_size))
        peak = 3e9 + bytes_per_row[config.train.remat] * config.train.batch_size / topology.chips
        return make_plan(config, topology, peak=peak, fits=peak <= topology.chip.hbm_bytes)

    topology = parse_topology("v5e-16")
    length = {
        "total_steps": 0,
        "total_examples": 10_000 * 1024,
    }  # a length in examples would end larger batches in warm-up
    found = list(search(small(VIT, **length), topology, plan))
    assert len(found) == 8 and len(compiled) == len(set(compiled)) <= 8 * 6
    for best in found:
        rows = best.global_batch / 16
        most = (topology.chip.hbm_bytes - 3e9) / bytes_per_row[best.config.train.remat]
        assert 0.75 * most <= rows <= most
    assert {plan.config.train.total_steps for plan in found} == {10_000}
    row = found[0].as_json()
    assert (row["model"], row["remat"], row["fsdp"], row["micro_batches"]) == ("custom", "none", 1, 1)
    starred = [line for line in table(found).splitlines() if line.startswith("*")]
    assert starred and all("full" in line for line in starred)  # all are equally fast, and these are the largest


@pytest.mark.parametrize(
    ("fixed", "per_row", "per_pair", "in_vmem", "saving"),
    [
        (0.1e9, 7e4, 0, 1e9, 1),  # small batches are in VMEM: the peak is constant, then grows
        (0.1e9, 7e4, 0.5, 0, 1),  # a loss whose logits grow with the square
        (15e9, 30e6, 0, 0, 1),  # the parameters leave little memory
        (3e9, 1e9, 0, 0, 1),  # the config's own batch is many times too large
        (3e9, 25_000, 0, 0, 0.75),  # above 90 % of the memory the compiler saves memory
    ],
)
def test_search_finds_the_largest_batch_for_nonlinear_peaks(fixed, per_row, per_pair, in_vmem, saving):
    topology = parse_topology("v5e-4")
    capacity = topology.chip.hbm_bytes

    def peak(rows):
        size = fixed + max(0, per_row * rows + per_pair * rows * rows - in_vmem)
        return size if size < 0.9 * capacity else saving * size

    def plan(config, topology):
        rows = config.train.batch_size // topology.chips
        return make_plan(config, topology, peak=peak(rows), fits=peak(rows) <= capacity)

    best = next(search(small(VIT), topology, plan)).global_batch // topology.chips
    assert peak(best) <= capacity < peak(1.25 * best + 8)


# ------------------------------------------------------------------------------------------------------- the report


@pytest.mark.slow
def test_suggested_fsdp_divides_a_mesh_with_tensor_parallelism(vit_plan):
    tensor = dataclasses.replace(vit_plan.config, mesh=MeshConfig(tensor=2))
    text = render_page(dataclasses.replace(vit_plan, config=tensor, fits=False, needed_bytes=1e12))
    assert "--config.mesh.fsdp=8:" in text and "optimizer state, EMA" in text


@pytest.mark.slow
def test_report_suggests_fewer_micro_batches_where_sharded_parameters_leave_room(vit_plan):
    """RN50x64 on v5e: 32 micro-batches of 4 images take 8 % more FLOPs and more time than 8 of 16 with fsdp."""
    config = dataclasses.replace(vit_plan.config, train=dataclasses.replace(vit_plan.config.train, micro_batches=4))
    tight = dataclasses.replace(
        vit_plan,
        config=config,
        peak_bytes=vit_plan.topology.chip.hbm_bytes - 1e9,
        activation_bytes=3e9,
        parameter_bytes=2e9,
        optimizer_bytes=4e9,
    )
    assert "Try --config.mesh.fsdp=16 --config.train.micro_batches=2: sharded parameters" in render_page(tight)
    assert "micro_batches=2" not in render_page(dataclasses.replace(tight, parameter_bytes=1e8, optimizer_bytes=2e8))
    sharded = dataclasses.replace(config, mesh=MeshConfig(fsdp=16))
    assert "micro_batches=2" not in render_page(dataclasses.replace(tight, config=sharded))


@pytest.mark.slow
def test_report_has_memory_work_speed_and_duration(vit_plan):
    text = render_page(vit_plan)
    for expected in (
        "v4-32: 16 chips of v4 (2x2x4)",
        "FITS",
        "optimizer",
        "all-reduce",
        "Bound by",
        "image attention: Pallas kernel\ntext attention: Pallas kernel",
        "matmul precision: bfloat16",
        "MFU counts",
        "10,000 steps  ",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fits": False, "needed_bytes": 1e12}, "Try --config.mesh.fsdp=16"),
        ({"bf16_equivalent_flops": 1e15}, "Try --config.train.remat=dots"),
        ({"hbm_bytes_padded": 1e12, "optimizer_bytes": 1e11}, "Try --config.optim.shard_moments=True"),
        ({"network_bytes": 1e12}, "Try a larger batch: gradients cross between slices"),
        ({"traced_flops": 1.0}, "Warning: JAX's trace has 1 FLOP"),
        ({"traced_flops": 1e15}, "The compiler saves matmuls: JAX's trace has 1 PFLOP"),
        (
            {"bf16_equivalent_flops": 1e15, "peak_bytes": 20e9, "temporary_bytes": 19e9},
            "No change to suggest: bound by",
        ),
        ({"unknown_trip_counts": ("while.1",)}, "Warning: loops of unknown trip count are counted once: while.1"),
    ],
)
def test_report_suggests_the_change_that_relieves_the_bottleneck(vit_plan, change, expected):
    assert expected in render_page(dataclasses.replace(vit_plan, **change))
