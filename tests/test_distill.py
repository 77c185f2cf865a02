"""Distillation: the loss against its dense reference in float64, the training step and a run with a teacher."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding

from clip_jax.config import (
    Architecture,
    Config,
    EvalConfig,
    OptimConfig,
    Preprocess,
    TeacherConfig,
    TextTransformer,
    TokenizerConfig,
    TrainConfig,
    ViT,
    WeightsConfig,
    from_config_dict,
    resolve,
)
from clip_jax.devices import sharding
from clip_jax.interop import msgpack, reading
from clip_jax.losses import SoftmaxLoss, distillation_loss, ring, tiles
from clip_jax.losses.distill import dense_distillation
from clip_jax.models import make_model
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training import dry_run, initialization, loop, metrics, optim, step
from clip_jax.typing import Batch
from tests import runs, tiny_models
from tests.tpu import collectives, shapes, v4_mesh

BATCH, WIDTH, TEACHER_WIDTH, SCALE, TEACHER_SCALE = 16, 12, 20, 14.3, 31.0
# Positions of the arguments with a gradient: the student's images, texts and scale.
STUDENT_ARGUMENTS = (0, 1, 4)


def _inputs(rows: int = BATCH, scale: float = SCALE, teacher_scale: float = TEACHER_SCALE) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    sides = [rng.normal(size=(rows, width)) for width in (WIDTH, WIDTH, TEACHER_WIDTH, TEACHER_WIDTH)]
    sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides]
    return (*sides, np.float64(scale), np.float64(teacher_scale))


def _value_and_gradient(loss, inputs):
    return jax.jit(jax.value_and_grad(loss, STUDENT_ARGUMENTS, has_aux=True))(*inputs)


def _assert_dense(inputs, loss=distillation_loss, tolerance=1e-12):
    (value, metrics), gradient = _value_and_gradient(loss, inputs)
    (expected, divergence), expected_gradient = _value_and_gradient(dense_distillation, inputs)
    assert value.dtype == inputs[0].dtype
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    np.testing.assert_allclose(metrics["distill/cross_entropy"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["distill/kl"], divergence, rtol=1e-5)
    for x, y in zip(gradient, expected_gradient, strict=True):
        assert np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(y), 0.1)


def _sharded(mesh: Mesh, axes: tuple[str, ...]):
    rows, replicated = jax.P(axes), jax.P()
    loss = functools.partial(distillation_loss, axis=axes)
    return jax.shard_map(loss, mesh=mesh, in_specs=(*[rows] * 4, replicated, replicated), out_specs=replicated)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------------------- the loss


def test_value_and_gradient_equal_the_dense_reference(float64):
    _assert_dense(_inputs())


def test_value_and_gradient_equal_the_dense_reference_in_float32():
    _assert_dense(tuple(np.float32(x) for x in _inputs()), tolerance=5e-6)


@pytest.mark.parametrize("rows", [1, 7, 12, 13])
def test_tiles_that_do_not_divide_the_batch_give_the_same_result(rows, float64, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_SIZE", 4)
    _assert_dense(_inputs(rows, scale=100.0))


@pytest.mark.parametrize(("devices", "group"), [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 8)])
def test_sharded_value_and_gradient_equal_the_dense_reference(devices, group, float64, monkeypatch):
    """On a ring, in groups and gathered at once; the bytes of a block include the teacher's rows."""
    inputs = _inputs()
    monkeypatch.setattr(ring, "BLOCK_BYTES", group * (inputs[1].nbytes + inputs[3].nbytes) // devices)
    _assert_dense(inputs, _sharded(sharding.make_mesh(jax.devices()[:devices]), sharding.BATCH_AXES))


def test_the_order_of_batch_axes_does_not_matter(float64, monkeypatch):
    inputs = _inputs()
    monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * (inputs[1].nbytes + inputs[3].nbytes) // 8)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    _assert_dense(inputs, _sharded(mesh, ("fsdp", "data")))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(scale, float64):
    image, text, *_ = _inputs()
    (value, metrics), gradient = _value_and_gradient(distillation_loss, (image, text, image, text, scale, scale))
    assert abs(metrics["distill/kl"]) <= 1e-12 and value > 0
    assert max(np.abs(part).max() for part in gradient) <= 1e-14 * scale


def test_the_teacher_gets_no_gradient():
    inputs = tuple(jnp.float32(x) for x in _inputs())
    gradient = jax.grad(lambda *inputs: distillation_loss(*inputs)[0], (2, 3, 5))(*inputs)
    assert not any(np.any(part) for part in gradient)


@pytest.mark.parametrize("sign", [1, -1])
def test_value_and_gradient_are_finite_at_scale_117(sign, monkeypatch):
    """SigLIP's scale, with all pairs equal or all opposite, in tiles with padding rows."""
    monkeypatch.setattr(tiles, "TILE_SIZE", 4)
    image = np.tile(np.eye(1, WIDTH, dtype=np.float32), (7, 1))
    inputs = (image, sign * image, image, sign * image, jnp.float32(117), jnp.float32(117))
    (value, _), gradient = _value_and_gradient(distillation_loss, inputs)
    np.testing.assert_allclose(value, np.log(7), rtol=1e-6)
    assert all(np.isfinite(part).all() for part in gradient)


def test_bfloat16_embeddings_have_float32_logits():
    *sides, _, _ = _inputs()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in sides]
    value, _ = distillation_loss(*rounded, jnp.float32(100), jnp.float32(100))
    expected, _ = dense_distillation(*(x.astype(jnp.float32) for x in rounded), jnp.float32(100), jnp.float32(100))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_unequal_numbers_of_rows_are_refused():
    image, text, teacher_image, teacher_text, *scales = (jnp.float32(x) for x in _inputs())
    with pytest.raises(ValueError, match="expected equal numbers .* got 16, 16, 15, 16 rows"):
        distillation_loss(image, text, teacher_image[1:], teacher_text, *scales)


def test_one_device_needs_a_thirtieth_of_the_memory_of_the_dense_form():
    batch = 16_384
    mesh = Mesh(jax.devices()[:1], ("data",))
    rows, replicated = (NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    sides = [jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows) for width in (256, 256, 512, 512)]
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    gradient = jax.jit(jax.value_and_grad(_sharded(mesh, ("data",)), STUDENT_ARGUMENTS, has_aux=True))
    compiled = gradient.lower(*sides, scalar, scalar).compile()
    # The dense form stores at least the similarities of student and teacher, and a softmax of each: 4 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * batch * batch * 4 / 30


def test_a_pod_sends_texts_once_and_their_gradient_and_stores_no_matrix():
    """As reported by the TPU compiler for 256 chips; statistics add 2 %."""
    chips, batch, width, teacher_width = 256, 32_768, 768, 256
    mesh = v4_mesh({"data": chips})
    rows, replicated = (NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    widths = (width, width, teacher_width, teacher_width)
    sides = [jax.ShapeDtypeStruct((batch, side), jnp.bfloat16, sharding=rows) for side in widths]
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    gradient = jax.jit(jax.value_and_grad(_sharded(mesh, ("data",)), STUDENT_ARGUMENTS, has_aux=True))
    compiled = gradient.lower(*sides, scalar, scalar).compile()
    sent = collectives(compiled)
    assert len(sent) <= 10
    assert sum(size for _, size in sent) <= 1.02 * (2 * width + teacher_width) * batch * 2
    assert not shapes(compiled) & {(batch // chips, batch), (batch, batch // chips), (batch, batch)}


# ---------------------------------------------------------------------------------------------------------- the step

VIT, RESNET = tiny_models.ARCHITECTURES["vit_gelu"], tiny_models.ARCHITECTURES["resnet"]
TEXT = TextTransformer(64, 8, 63, width=32, layers=1, heads=2)
STUDENT = Architecture(ViT(16, 8, 32, 1, 2), TEXT, 16)
TEACHER = Architecture(ViT(16, 4, 48, 1, 2), dataclasses.replace(TEXT, width=48), 24)


def _train_step(devices: int, weight: float = 10.0, **changes):
    """Return a step with a teacher of another size and width, its initial state, a batch and the teacher."""
    config = Config(
        model=STUDENT,
        teacher=TeacherConfig("given", weight=weight),
        optim=OptimConfig(warmup_steps=0, learning_rate=3e-3),
        train=TrainConfig(dtype="float32", remat="none", text_capacity=1.0, **changes),
    )
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=devices)
    model, optimizer = step.model_from_config(config, mesh), optim.make_optimizer(config.optim, 100)
    teacher = step.make_teacher(TEACHER, tiny_models.params(TEACHER, seed=5), config, mesh)
    train_step = step.make_train_step(model, optimizer, config, mesh, teacher)
    shardings = jax.tree.map(lambda x: x.sharding, step.abstract_state(model, optimizer, config, mesh))
    state = jax.device_put(step.init_state(tiny_models.params(STUDENT), optimizer, config.optim), shardings)
    pixels, tokens = tiny_models.inputs(STUDENT, rows=8)
    return train_step, state, sharding.to_global(Batch(pixels, tokens, np.ones(8, bool)), mesh), teacher


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "changes"), [(1, {}), (2, {"micro_batches": 2})])
def test_training_lowers_the_divergence_from_the_teacher(devices, changes):
    train_step, state, batch, teacher = _train_step(devices, **changes)
    before, divergence = jax.device_get(teacher.params), []
    for _ in range(20):
        state, outputs = train_step(state, batch)
        divergence.append(float(outputs["distill/kl"]))
    assert divergence[-1] < 0.5 * divergence[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher.params), before)


@pytest.mark.slow
def test_the_loss_is_the_contrastive_loss_plus_the_weighted_distillation():
    train_step, state, batch, teacher = _train_step(1, 3.0)
    _, outputs = train_step(state, batch)

    @jax.jit
    def expected_terms(params, teacher_params, image, text):
        encoders = ((make_model(STUDENT), params), (make_model(TEACHER), teacher_params))
        student, target = ((m.encode_image(p, image), m.encode_text(p, text)) for m, p in encoders)
        scale, teacher_scale = (jnp.exp(p["logit_scale"]) for _, p in encoders)
        contrastive = SoftmaxLoss()(*student, scale)[0]
        return contrastive, *dense_distillation(*student, *target, scale, teacher_scale)

    terms = expected_terms(tiny_models.params(STUDENT), teacher.params, batch.image, batch.text)
    contrastive, cross_entropy, divergence = terms
    np.testing.assert_allclose(outputs["loss"], contrastive + 3 * cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(outputs["distill/cross_entropy"], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(outputs["distill/kl"], divergence, rtol=1e-4)


def test_parameters_and_statistics_of_a_teacher_with_batch_norm_are_sharded():
    params, mesh = tiny_models.params(RESNET), sharding.make_mesh(jax.devices()[:2], fsdp=2)
    teacher = step.make_teacher(RESNET, params, Config(), mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher.params), params)
    assert teacher.params["image"]["pool"]["query"]["kernel"].sharding.spec == jax.P("fsdp")
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(teacher.params["batch_stats"]))


def test_teacher_parameters_are_inputs_of_the_program_not_constants():
    train_step, state, batch, teacher = _train_step(1)
    lowered = train_step.func.lower(*train_step.args, state, batch)
    assert len(jax.tree.leaves(lowered.args_info)) == len(jax.tree.leaves((teacher.params, state, batch)))
    constants = re.findall(r"constant dense<\"0x([0-9A-F]*)", lowered.as_text())
    assert sum(map(len, constants)) / 2 < max(leaf.nbytes for leaf in jax.tree.leaves(teacher.params))


# ----------------------------------------------------------------------------------------------------------- the run


def _run(tmp_path, architecture=RESNET, weights=None, **teacher):
    """Write a teacher's weights; return the model that `teacher_params` reads from them, and the parameters."""
    params = tiny_models.params(architecture)
    msgpack.write(tmp_path / "t.msgpack", params, weights or WeightsConfig(architecture))
    config = Config(model=VIT, teacher=TeacherConfig(str(tmp_path / "t.msgpack"), **teacher))
    return initialization.teacher_params(config, make_tokenizer(config.tokenizer, VIT.text)), params


def test_a_teacher_may_be_of_another_family_and_is_resized_to_the_run(tmp_path):
    (found, params), stored = _run(tmp_path)
    assert found == RESNET
    jax.tree.map(np.testing.assert_array_equal, params, stored)
    smaller = dataclasses.replace(VIT, image=dataclasses.replace(VIT.image, image_size=32))  # 4 patches
    (found, params), _ = _run(tmp_path, smaller)
    assert found == VIT and params["image"]["positional_embedding"].shape == (17, 128)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            WeightsConfig(RESNET, preprocess=Preprocess((0.5,) * 3)),
            r"preprocess\.mean: expected \(0\.5, 0\.5, 0\.5\), got",
        ),
        (
            WeightsConfig(dataclasses.replace(RESNET, text=dataclasses.replace(RESNET.text, vocab_size=700))),
            r"other pixels or token ids than this run: model\.text\.vocab_size: expected 700, got 600",
        ),
        (
            WeightsConfig(RESNET, TokenizerConfig("sentencepiece", clean="lower")),
            r"tokenizer\.name: expected 'sentencepiece', got 'clip_bpe'; tokenizer\.clean: expected 'lower'",
        ),
    ],
)
def test_a_teacher_with_other_pixels_or_token_ids_is_refused_by_key(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        _run(tmp_path, weights.model, weights)


def test_a_teacher_with_another_merge_table_is_refused_with_an_example(tmp_path):
    merges = [f"{a} {b}" for a in "abcdefghij" for b in "klmnopqrs"][: VIT.text.vocab_size - 514]
    content = "\n".join(["#version: 0.2", *merges, ""]).encode()
    weights = WeightsConfig(RESNET, TokenizerConfig(path="merges.txt"), tokenizer_file=content)
    with pytest.raises(
        ValueError, match=r"other token ids than this run: 'a photo of a dog': expected \[598, .*, got \["
    ):
        _run(tmp_path, weights=weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("/nowhere.pt", r"teacher\.weights='/nowhere\.pt': /nowhere\.pt: expected a file or directory"),
        ("lit.npz:img", r"teacher\.weights='lit\.npz:img' is one tower, and a teacher needs both"),
    ],
)
def test_missing_or_single_tower_teacher_weights_are_refused(weights, message):
    config = Config(model=VIT, teacher=TeacherConfig(weights))
    with pytest.raises(ValueError, match=message):
        initialization.teacher_params(config, make_tokenizer(config.tokenizer, VIT.text))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"weight": 2.0}, "teacher.weight=2.0 has no effect without teacher.weights: set it, or teacher.weight=1.0"),
        ({"weights": "t.pt", "model": "vit_b23"}, "teacher.model='vit_b23' is none of .* did you mean 'vit_b32'"),
    ],
)
def test_inconsistent_teacher_configs_are_refused(teacher, message):
    config = from_config_dict({"teacher": teacher, "train": {"batch_size": 8, "total_steps": 10_000}})
    with pytest.raises(ValueError, match=message):
        resolve(config, devices=1)


@pytest.mark.slow
def test_a_run_with_a_teacher_exports_only_the_student(tmp_path):
    config, architecture = runs.tiny_model()
    teacher = dataclasses.replace(architecture, embed_dim=24)
    msgpack.write(tmp_path / "t.msgpack", tiny_models.params(teacher), WeightsConfig(teacher))
    config = dataclasses.replace(
        config,
        teacher=TeacherConfig(str(tmp_path / "t.msgpack"), weight=0.5),
        train=dataclasses.replace(config.train, total_steps=6, text_capacity=1.0),
        eval=EvalConfig(),
    )
    assert loop.train(config, str(tmp_path / "run"), str(tmp_path / "out.msgpack"))
    lines = [line for line in metrics.read_lines(epath.Path(tmp_path / "run")) if "loss" in line]
    assert len(lines) == 6 and all(line["distill/kl"] > 0 for line in lines)
    assert reading.read(tmp_path / "out.msgpack").config.model == architecture
    assert f"teacher:             {config.teacher.weights}, weight 0.5\n" in dry_run.describe(config, epath.Path("x"))
