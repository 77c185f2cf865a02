"""Distillation from a teacher: the loss against its dense form in float64, and a run that learns by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from clip_jax import sharding
from clip_jax.losses import distillation, pairs, ring

BATCH, WIDTH, TEACHER_WIDTH, SCALE, TEACHER_SCALE = 16, 12, 20, 14.3, 31.0
# Student's images and texts, teacher's images and texts, both scales: of which the student's get a gradient.
STUDENTS = (0, 1, 4)


def _inputs(rows: int = BATCH, scale: float = SCALE, teacher_scale: float = TEACHER_SCALE) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    sides = [rng.normal(size=(rows, width)) for width in (WIDTH, WIDTH, TEACHER_WIDTH, TEACHER_WIDTH)]
    sides = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides]
    return (*sides, np.float64(scale), np.float64(teacher_scale))


def _dense(image, text, teacher_image, teacher_text, scale, teacher_scale):
    """Return loss and divergence as anyone would write them, with all similarities in two matrices."""
    logits, wanted = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    sides = [
        (jax.nn.softmax(wanted, axis), jax.nn.log_softmax(logits, axis), jax.nn.log_softmax(wanted, axis))
        for axis in (0, 1)
    ]
    crossed = sum(-jnp.sum(p * log) for p, log, _ in sides) / 2 / len(image)
    return crossed, crossed + sum(jnp.sum(p * own) for p, _, own in sides) / 2 / len(image)


def _value_and_gradient(loss, inputs):
    return jax.jit(jax.value_and_grad(loss, STUDENTS, has_aux=True))(*inputs)


def _assert_dense(inputs, loss=distillation, tolerance=1e-12):
    (value, metrics), gradient = _value_and_gradient(loss, inputs)
    (expected, divergence), expected_gradient = _value_and_gradient(_dense, inputs)
    assert value.dtype == inputs[0].dtype
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    np.testing.assert_allclose(metrics["distill/cross_entropy"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["distill/kl"], divergence, rtol=1e-5)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        assert np.linalg.norm(ours - theirs) <= tolerance * max(np.linalg.norm(theirs), 0.1)


def _sharded(mesh: Mesh, axes: tuple[str, ...]):
    rows, whole = jax.P(axes), jax.P()
    loss = functools.partial(distillation, axis=axes)
    return jax.shard_map(loss, mesh=mesh, in_specs=(*[rows] * 4, whole, whole), out_specs=whole)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------------------- the loss


def test_value_and_gradient_are_the_dense_ones(float64):
    _assert_dense(_inputs())


def test_in_float32_too():
    _assert_dense(tuple(np.float32(x) for x in _inputs()), tolerance=5e-6)


@pytest.mark.parametrize("rows", [1, 7, 12, 13])
def test_tiles_that_do_not_divide_the_batch_change_nothing(rows, float64, monkeypatch):
    monkeypatch.setattr(pairs, "TILE", 4)
    _assert_dense(_inputs(rows, scale=100.0))


@pytest.mark.parametrize(("devices", "group"), [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 8)])
def test_the_sharded_loss_and_gradient_are_the_dense_ones(devices, group, float64, monkeypatch):
    """On a ring, in groups, and gathered at once; the teacher's rows count in what is gathered."""
    inputs = _inputs()
    monkeypatch.setattr(ring, "BLOCK_BYTES", group * (inputs[1].nbytes + inputs[3].nbytes) // devices)
    _assert_dense(inputs, _sharded(sharding.make_mesh(jax.devices()[:devices]), sharding.BATCH_AXES))


def test_any_order_of_batch_axes_gives_the_same(float64, monkeypatch):
    inputs = _inputs()
    monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * (inputs[1].nbytes + inputs[3].nbytes) // 8)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    _assert_dense(inputs, _sharded(mesh, ("fsdp", "data")))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(scale, float64):
    image, text, *_ = _inputs()
    (value, metrics), gradient = _value_and_gradient(distillation, (image, text, image, text, scale, scale))
    assert abs(metrics["distill/kl"]) <= 1e-12 and value > 0
    assert max(np.abs(part).max() for part in gradient) <= 1e-14 * scale


def test_the_teacher_gets_no_gradient():
    inputs = tuple(jnp.float32(x) for x in _inputs())
    gradient = jax.grad(lambda *inputs: distillation(*inputs)[0], (2, 3, 5))(*inputs)
    assert not any(np.any(part) for part in gradient)


@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_finite_at_the_largest_scales(sign, monkeypatch):
    """All alike or all opposite, at SigLIP's scale, in tiles that have to be filled up."""
    monkeypatch.setattr(pairs, "TILE", 4)
    image = np.tile(np.eye(1, WIDTH, dtype=np.float32), (7, 1))
    inputs = (image, sign * image, image, sign * image, jnp.float32(117), jnp.float32(117))
    (value, _), gradient = _value_and_gradient(distillation, inputs)
    np.testing.assert_allclose(value, np.log(7), rtol=1e-6)
    assert all(np.isfinite(part).all() for part in gradient)


def test_bfloat16_embeddings_give_float32_logits():
    *sides, _, _ = _inputs()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in sides]
    value, _ = distillation(*rounded, jnp.float32(100), jnp.float32(100))
    expected, _ = _dense(*(x.astype(jnp.float32) for x in rounded), jnp.float32(100), jnp.float32(100))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_rows_that_do_not_pair_up_are_refused():
    image, text, teacher_image, teacher_text, *scales = (jnp.float32(x) for x in _inputs())
    with pytest.raises(ValueError, match="don't pair up: 16, 16, 15, 16 rows"):
        distillation(image, text, teacher_image[1:], teacher_text, *scales)


def test_one_device_holds_a_thirtieth_of_the_similarities():
    batch = 16_384
    mesh = Mesh(jax.devices()[:1], ("data",))
    rows, whole = (NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    sides = [jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows) for width in (256, 256, 512, 512)]
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    gradient = jax.jit(jax.value_and_grad(_sharded(mesh, ("data",)), STUDENTS, has_aux=True))
    compiled = gradient.lower(*sides, scalar, scalar).compile()
    # The form with all similarities takes at least student's and teacher's and a softmax of each: 4 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * batch * batch * 4 / 30
