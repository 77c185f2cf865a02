"""What every loss in LOSSES must keep, whatever its formula."""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices import sharding
from clip_jax.losses import LOSSES, ring, tiles

BATCH, WIDTH, SCALE, BIAS = 16, 12, 14.3, -4.0
# float32 rounding of a sum of 16 exponentials, against float64.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6

pytestmark = pytest.mark.parametrize("name", LOSSES)


def _embeddings(seed: int = 0, rows: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(2, rows, WIDTH))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return tuple(x.astype(np.float32))


def _loss(name: str, axis=None):
    def value(image, text, scale, bias=BIAS):
        return LOSSES[name](image, text, scale, jnp.asarray(bias), axis)[0]

    return value


def _reference(name: str, image: np.ndarray, text: np.ndarray, scale: float, bias: float = BIAS) -> float:
    """Return the loss in float64 by loops over pairs, from the paper's pseudocode."""
    logits = scale * image.astype(np.float64) @ text.astype(np.float64).T + bias
    if name == "softmax":
        rows = [np.log(np.exp(row - row[i]).sum()) for i, row in enumerate(logits)]
        columns = [np.log(np.exp(column - column[i]).sum()) for i, column in enumerate(logits.T)]
        return (np.mean(rows) + np.mean(columns)) / 2
    if name == "sigmoid":
        pairs = [(1 if i == j else -1) * logits[i, j] for i in range(len(logits)) for j in range(len(logits))]
        return sum(np.log1p(np.exp(-pair)) for pair in pairs) / len(logits)
    raise AssertionError(f"write the reference of {name}: a loss without one is not tested")


def _dense(name: str, image_ids: np.ndarray | None = None, text_ids: np.ndarray | None = None):
    """Return the loss as anyone would write it, with all similarities in one matrix."""

    def value(image, text, scale, bias=BIAS):
        logits = scale * (image @ text.T) + bias
        matches = jnp.eye(len(image), dtype=bool) if image_ids is None else image_ids[:, None] == text_ids[None]
        if name == "sigmoid":
            return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(jnp.where(matches, logits, -logits)), axis=1))
        sides = [-jnp.mean(jnp.mean(jax.nn.log_softmax(logits, axis), axis, where=matches)) for axis in (0, 1)]
        return sum(sides) / 2

    return value


def _sharded(name: str, mesh: jax.sharding.Mesh | int):
    mesh = sharding.make_mesh(jax.devices()[:mesh]) if isinstance(mesh, int) else mesh
    specs = (sharding.BATCH, sharding.BATCH, sharding.REPLICATED, sharding.REPLICATED)
    return jax.shard_map(_loss(name, sharding.BATCH_AXES), mesh=mesh, in_specs=specs, out_specs=sharding.REPLICATED)


def test_the_value_is_that_of_the_reference_in_float64(name):
    image, text = _embeddings()
    value = _loss(name)(image, text, jnp.float32(SCALE))
    np.testing.assert_allclose(value, _reference(name, image, text, SCALE), rtol=VALUE_TOLERANCE)


def test_the_gradient_is_the_slope_of_the_reference(name):
    image, text = _embeddings()
    gradients = jax.grad(_loss(name), argnums=(0, 1, 2, 3))(image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=image.shape), rng.normal(size=text.shape), np.float64(1), np.float64(1)]
    for position, direction in enumerate(directions):
        # Central difference in float64: its error is the third derivative times step², about 1e-8 here.
        step = 1e-4
        inputs = [image.astype(np.float64), text.astype(np.float64), np.float64(SCALE), np.float64(BIAS)]
        up, down = list(inputs), list(inputs)
        up[position] = inputs[position] + step * direction
        down[position] = inputs[position] - step * direction
        slope = (_reference(name, *up) - _reference(name, *down)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradients[position] * direction), slope, rtol=1e-4, atol=1e-6)


def _value_and_gradient(loss, inputs):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*inputs)


def _assert_close(got, expected, value_tolerance=VALUE_TOLERANCE, gradient_tolerance=GRADIENT_TOLERANCE):
    np.testing.assert_allclose(got[0], expected[0], rtol=value_tolerance)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert np.linalg.norm(ours - theirs) <= gradient_tolerance * max(np.linalg.norm(theirs), 0.1)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_the_sharded_loss_and_gradient_are_the_dense_ones(name, devices, group, monkeypatch):
    """On a ring, in groups, and gathered at once; in float32 and, where rounding hides nothing, in float64."""
    image, text = _embeddings()
    monkeypatch.setattr(ring, "BLOCK_BYTES", group * image.nbytes // devices)
    inputs = (image, text, np.float32(SCALE), np.float32(BIAS))
    _assert_close(_value_and_gradient(_sharded(name, devices), inputs), _value_and_gradient(_dense(name), inputs))
    with jax.enable_x64(True):
        monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * group * image.nbytes // devices)
        inputs = tuple(np.float64(x) for x in inputs)
        exact = _value_and_gradient(_sharded(name, devices), inputs), _value_and_gradient(_dense(name), inputs)
        assert exact[0][0].dtype == np.float64
        _assert_close(*exact, 1e-12, 1e-12)


@pytest.mark.parametrize("rows", [7, 12, 13])
def test_tiles_that_do_not_divide_the_batch_change_nothing(name, rows, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4)
    image, text = _embeddings(rows=rows)
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    _assert_close(_value_and_gradient(_loss(name), inputs), _value_and_gradient(_dense(name), inputs))


def test_what_fills_a_tile_up_is_not_felt_at_scale_100(name, monkeypatch):
    """Where all pairs are opposites, a filling's similarity of 0 is e^100 times as likely as any."""
    monkeypatch.setattr(tiles, "TILE", 4)
    image, _ = _embeddings(rows=5)
    image = np.tile(image[:1], (5, 1))
    inputs = (image, -image, jnp.float32(100), jnp.float32(BIAS))
    ours, dense = _value_and_gradient(_loss(name), inputs), _value_and_gradient(_dense(name), inputs)
    # A similarity's last bit, a hundredfold; the gradient is 0, so it is measured against a tenth.
    _assert_close(ours, dense, value_tolerance=1e-5, gradient_tolerance=1e-3)


@pytest.mark.parametrize("axes", [("data", "fsdp"), ("fsdp", "data")])
def test_any_order_of_batch_axes_gives_the_same(name, axes, monkeypatch):
    image, text = _embeddings()
    monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * image.nbytes // 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    batch, whole = jax.P(axes), jax.P()
    specs = (batch, batch, whole, whole)
    sharded = jax.shard_map(_loss(name, axes), mesh=mesh, in_specs=specs, out_specs=whole)
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    _assert_close(_value_and_gradient(sharded, inputs), _value_and_gradient(_dense(name), inputs))


@pytest.mark.parametrize("slices", [2, 4, 8])
def test_over_several_slices_the_loss_is_the_same(name, slices):
    """Texts would fit gathered, but groups stay within a slice."""
    image, text = _embeddings()
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(slices, -1, 1, 1), sharding.AXES)
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    sharded = _sharded(name, mesh)
    _assert_close(_value_and_gradient(sharded, inputs), _value_and_gradient(_dense(name), inputs))
    gathered = re.search(r"all_gather\[.*?axis_index_groups=\((\(.*?\))", str(jax.make_jaxpr(sharded)(*inputs)), re.S)
    assert (gathered is None) == (slices == 8)
    assert slices == 8 or len(ast.literal_eval(gathered[1])) == 8 // slices


@pytest.mark.parametrize("devices", [1, 8])
def test_equal_ids_match(name, devices, monkeypatch):
    """Two captions of every image, and two images of one motif: more texts than images, several matches for each."""
    monkeypatch.setattr(tiles, "TILE", 3)
    image, _ = _embeddings()
    text = np.concatenate(_embeddings(1))
    image_ids = np.arange(BATCH, dtype=np.int32) // 2
    text_ids = np.repeat(image_ids, 2)
    monkeypatch.setattr(ring, "BLOCK_BYTES", 2 * text.nbytes // devices)

    def ours(image, text, scale, bias, ids, axis=None):
        return LOSSES[name](image, text, scale, bias, axis, ids)[0]

    mesh = sharding.make_mesh(jax.devices()[:devices])
    batch, whole = sharding.BATCH, sharding.REPLICATED
    sharded = jax.shard_map(
        functools.partial(ours, axis=sharding.BATCH_AXES),
        mesh=mesh,
        in_specs=(batch, batch, whole, whole, (batch, batch)),
        out_specs=whole,
    )
    inputs = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    got = _value_and_gradient(lambda *inputs: sharded(*inputs, (image_ids, text_ids)), inputs)
    _assert_close(got, _value_and_gradient(_dense(name, image_ids, text_ids), inputs))


def test_one_image_with_one_text_and_texts_without_ids(name):
    image, text = _embeddings(rows=1)
    assert np.isfinite(_loss(name)(image, text, jnp.float32(SCALE)))
    with pytest.raises(ValueError, match="1 images and 2 texts don't pair up"):
        _loss(name)(image, np.concatenate([text, text]), jnp.float32(SCALE))


def test_swapping_the_towers_swaps_the_gradients(name):
    image, text = _embeddings()
    gradient = jax.grad(_loss(name), argnums=(0, 1))
    ours, swapped = gradient(image, text, jnp.float32(SCALE)), gradient(text, image, jnp.float32(SCALE))
    np.testing.assert_allclose(ours[0], swapped[1], rtol=GRADIENT_TOLERANCE, atol=1e-7)
    np.testing.assert_allclose(ours[1], swapped[0], rtol=GRADIENT_TOLERANCE, atol=1e-7)


def test_the_order_of_the_pairs_does_not_matter(name):
    image, text = _embeddings()
    order = np.random.default_rng(2).permutation(BATCH)
    value = _loss(name)(image, text, jnp.float32(SCALE))
    permuted = _loss(name)(image[order], text[order], jnp.float32(SCALE))
    np.testing.assert_allclose(value, permuted, rtol=VALUE_TOLERANCE)


def test_it_is_traced_once_for_one_shape(name):
    traces = 0

    def counted(*inputs):
        nonlocal traces
        traces += 1
        return _loss(name)(*inputs)

    jitted = jax.jit(counted)
    for seed in range(3):
        jitted(*_embeddings(seed), jnp.float32(SCALE + seed))
    assert traces == 1


@pytest.mark.parametrize("opposite", [False, True])
def test_it_is_finite_at_the_largest_scale(name, opposite):
    image, _ = _embeddings()
    text = -image if opposite else image
    value, gradient = jax.value_and_grad(lambda image: _loss(name)(image, text, jnp.float32(100)))(image)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_embeddings_give_float32_logits(name):
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in _embeddings())
    value = _loss(name)(image, text, jnp.float32(100))
    exact = _reference(name, np.asarray(image, np.float32), np.asarray(text, np.float32), 100)
    # The inputs are rounded, nothing after them: bfloat16 logits would be off by 4e-3.
    np.testing.assert_allclose(value, exact, rtol=1e-5)
