"""A training run has the same numbers on all meshes, with micro-batches, remat and unrolled loops.

Ten steps of a ViT and of a ResNet; the reference is one device with the full batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import (
    Architecture,
    Config,
    MeshConfig,
    OptimConfig,
    ResNet,
    TextTransformer,
    TrainConfig,
    ViT,
)
from clip_jax.devices import sharding
from clip_jax.losses import LOSSES, ContrastiveLoss
from clip_jax.models import make_model
from clip_jax.training import optim, step
from clip_jax.typing import Batch

TEXT = TextTransformer(64, 8, 63, width=32, layers=2, heads=2)
TOWERS = {
    "vit": Architecture(ViT(16, 8, 32, 2, 2), TEXT, 16, logit_bias=True),
    "resnet": Architecture(ResNet(32, 8, (2, 1), heads=2), TEXT, 16, logit_bias=True),
}
STEPS, BATCH = 10, 16
# Sums in another order. The gradient of a key bias is rounding error, because softmax is invariant to it, and Adam
# turns its sign into steps: hence a tenth of one step of 1e-3.
TOLERANCE = 1e-4
# Batch norm divides by the standard deviation over few pixels of 16 images, which amplifies rounding.
TOLERANCES = {"vit": TOLERANCE, "resnet": 3e-4}
MESHES = {"8 data": (8, 1, 1), "4 data, 2 fsdp": (8, 2, 1), "2 data, 2 fsdp, 2 tensor": (8, 2, 2)}


def _config(tower: str, fsdp: int = 1, tensor: int = 1, **changes) -> Config:
    train = {key: value for key, value in changes.items() if key in TrainConfig.__dataclass_fields__}
    loss = {key: value for key, value in changes.items() if key in ContrastiveLoss.__dataclass_fields__}
    rest = {key: value for key, value in changes.items() if key not in train | loss}
    return Config(
        model=TOWERS[tower],
        # Small first steps: Adam normalizes even the rounding error that is the gradient of a key bias.
        optim=OptimConfig(warmup_steps=5, learning_rate=1e-3, ema_decay=0.9, **rest),
        loss=LOSSES[loss.get("name", "softmax")](**loss),
        train=TrainConfig(**{"dtype": "float32", "remat": "none", "batch_size": BATCH} | train),
        mesh=MeshConfig(fsdp, tensor),
    )


def _batch(config: Config, seed: int) -> Batch:
    rng, size = np.random.default_rng(seed), config.model.image.image_size
    text = rng.integers(0, 63, (BATCH, 8)).astype(np.int32)
    text[np.arange(BATCH), rng.integers(1, 5, BATCH)] = 63
    return Batch(rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8), text, np.ones(BATCH, bool))


def _build(config: Config, devices: int):
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    model, optimizer = step.model_from_config(config, mesh), optim.make_optimizer(config.optim, STEPS)
    return mesh, model, optimizer, step.make_train_step(model, optimizer, config, mesh)


@functools.cache
def _first_params(tower: str):
    # This generator compiles ten times faster than the default.
    return jax.device_get(jax.jit(make_model(TOWERS[tower]).init)(jax.random.key(0, impl="rbg")))


def _run(tower: str, devices: int = 1, **changes) -> tuple[step.TrainState, list[float]]:
    config = _config(tower, **changes)
    mesh, model, optimizer, train_step = _build(config, devices)
    placed = jax.tree.map(lambda x: x.sharding, step.abstract_state(model, optimizer, config, mesh))
    state, losses = jax.device_put(step.init_state(_first_params(tower), optimizer, config.optim), placed), []
    for seed in range(STEPS):
        state, metrics = train_step(state, sharding.to_global(_batch(config, seed), mesh))
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == placed
    return jax.device_get(state), losses


@pytest.fixture(scope="module", params=TOWERS)
def reference(request):
    return request.param, *_run(request.param, text_capacity=1.0)


def _assert_same(run, reference):
    (state, losses), (tower, expected, expected_losses) = run, reference
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4 if tower == "resnet" else 1e-5)
    for name in ("params", "batch_stats", "ema"):
        pairs = zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, expected)), strict=True)
        for got, wanted in pairs:
            np.testing.assert_allclose(got, wanted, rtol=TOLERANCES[tower], atol=TOLERANCES[tower])
    assert int(state.step) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_ten_steps_agree_across_meshes(reference, mesh):
    """With packed captions, sharded moments and rematerialization, as on a pod."""
    devices, fsdp, tensor = MESHES[mesh]
    changes = {"remat": "names", "shard_moments": True}
    _assert_same(_run(reference[0], devices, fsdp=fsdp, tensor=tensor, **changes), reference)


@pytest.mark.slow
def test_ten_steps_agree_with_unrolled_loops(reference):
    _assert_same(_run(reference[0], unroll_layers=True, remat="full"), reference)


# ------------------------------------------------------------------------------------------------- micro-batches


@pytest.fixture
def float64(monkeypatch):
    """Enable float64, with an attention to match: `jax.nn.dot_product_attention` has a float32 softmax."""

    def attention(query, key, value, mask=None, is_causal=False):
        scores = jnp.einsum("BLNK,BMNK->BNLM", query, key) / np.sqrt(query.shape[-1])
        if is_causal:
            mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        return jnp.einsum("BNLM,BMNK->BLNK", jax.nn.softmax(scores), value)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    with jax.enable_x64(True):
        yield


def _model64(config: Config, mesh):
    train = config.train
    return make_model(
        config.model,
        dtype="float64",
        remat=train.remat,
        patch_dropout=train.patch_dropout,
        text_capacity=train.text_capacity,
        text_groups=sharding.batch_shards(mesh),
    )


def _gradients(tower: str, devices: int, micro_batches: int, teacher: bool = False, **changes):
    """Return loss, metrics, statistics and gradient in float64.

    teacher: add distillation from another model of the same architecture.
    """
    config = _config(tower, micro_batches=micro_batches, **changes)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    model = _model64(config, mesh)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _first_params(tower))
    stats = params.pop("batch_stats", None)
    teacher_params = jax.tree.map(lambda x: x[::-1] if x.ndim > 1 else x, params) if teacher else None
    gradient = step.make_gradient(model, config, mesh, model if teacher else None)
    batch = sharding.to_global(_batch(config, 0), mesh)
    return jax.device_get(jax.jit(gradient)(params, stats, batch, jax.random.key(1), teacher_params))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "devices", "micro_batches", "teacher"),
    [("softmax", 2, 4, False), ("sigmoid", 2, 2, False), ("softmax", 2, 4, True)],
)
def test_micro_batches_give_the_gradient_of_the_full_batch(loss, devices, micro_batches, teacher, float64):
    """Including scale and bias, with patch dropout, packed captions and rematerialization, on two devices."""
    changes = {"name": loss, "patch_dropout": 0.5, "remat": "full", "teacher": teacher}
    (value, (metrics, _)), expected = _gradients("vit", 1, 1, **changes, text_capacity=1.0)
    (got_value, (got_metrics, _)), got = _gradients("vit", devices, micro_batches, **changes)
    np.testing.assert_allclose(got_value, value, rtol=1e-12)
    for name, metric in metrics.items():
        np.testing.assert_allclose(got_metrics[name], metric, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        # The gradient of a key bias is rounding error, hence the minimum norm.
        assert np.linalg.norm(a - b) <= 1e-10 * max(np.linalg.norm(b), 1e-4), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_micro_batches_give_the_same_gradient_with_a_frozen_tower(float64):
    _, expected = _gradients("vit", 1, 1, freeze="^image/")
    _, got = _gradients("vit", 1, 4, freeze="^image/")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(got["image"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), got, expected)


@pytest.mark.slow
def test_batch_norm_uses_the_statistics_of_each_micro_batch(float64):
    """Statistics are per micro-batch, over all devices; running averages are updated once per micro-batch."""
    config = _config("resnet", micro_batches=2)
    mesh = sharding.make_mesh(jax.devices()[:2])
    model = _model64(config, mesh)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _first_params("resnet"))
    stats = params.pop("batch_stats")
    batch = _batch(config, 0)
    # A device's rows are contiguous, and a micro-batch has an equal share of each device's.
    micro_batches, key = [np.r_[0:4, 8:12], np.r_[4:8, 12:16]], jax.random.key(0)

    def reference(params):
        running, images = stats, []
        for rows in micro_batches:
            with_stats = params | {"batch_stats": running}
            embedded, running = model.encode_image_train(with_stats, batch.image[rows], jax.random.split(key, 8))
            images.append(embedded)
        order = np.argsort(np.concatenate(micro_batches))
        image = jnp.concatenate(images)[order]
        text = model.encode_text(params, batch.text)
        return LOSSES["softmax"]()(image, text, jnp.exp(params["logit_scale"]))[0], running

    (value, running), expected = jax.jit(jax.value_and_grad(reference, has_aux=True))(params)
    (got, (_, got_running)), gradient = _gradients("resnet", 2, 2)
    np.testing.assert_allclose(got, value, rtol=1e-12)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)  # noqa: E731
    jax.tree.map(close, got_running, jax.device_get(running))
    jax.tree.map(close, gradient, jax.device_get(expected))


# ------------------------------------------------------------------------------------------------ equal captions


def _numpy_loss_of_equal_captions(image, text, scale, captions):
    """Return −log of the summed probability of all matches, in float64 by loops over pairs, and its gradients."""
    exp, total = np.exp(scale * image @ text.T), 0.0
    d_logits = np.zeros_like(exp)
    for i in range(len(exp)):
        same = [j for j in range(len(exp)) if captions[j].tolist() == captions[i].tolist()]
        for scores, d in ((exp[i], d_logits[i]), (exp[:, i], d_logits[:, i])):  # a row, a column
            total -= np.log(sum(scores[same]) / sum(scores))
            d += scores / sum(scores)
            d[same] -= scores[same] / sum(scores[same])
    d_logits *= scale / 2 / len(exp)
    return total / 2 / len(exp), d_logits @ text, d_logits.T @ image


@pytest.mark.parametrize("devices", [1, 8])
def test_equal_captions_as_positives_equal_the_formula_and_change_the_loss(devices):
    """Sharded and tiled, value and gradient; captions occur once to four times."""
    image, text = np.random.default_rng(0).normal(size=(2, BATCH, 12))
    captions = _batch(_config("vit"), 0).text[np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7])]
    text = text[np.unique(captions, axis=0, return_inverse=True)[1]]  # equal captions have equal embeddings
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    mesh = sharding.make_mesh(jax.devices()[:devices])

    def value_and_gradients(equal_captions):
        loss = step.make_loss(_config("vit", equal_captions=equal_captions), mesh, distill=False)

        def value(image, text):
            return loss(
                {"image_bE": image, "text_bE": text}, {"logit_scale": np.log(9.0)}, jnp.asarray(captions), None
            )[0]

        found, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(image, text)
        return float(found), *gradients

    with jax.enable_x64(True):
        found, plain = value_and_gradients("positives"), value_and_gradients("negatives")
    expected = _numpy_loss_of_equal_captions(image, text, 9.0, captions)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    assert plain[0] - found[0] > 0.3


@pytest.mark.slow
def test_equal_captions_can_be_positives():
    """The gradient function of a run, from images and token ids."""
    config = _config("vit", equal_captions="positives")
    mesh = sharding.make_mesh(jax.devices()[:2])
    batch = dataclasses.replace(_batch(config, 0), text=np.repeat(_batch(config, 0).text[::2], 2, axis=0))
    model = step.model_from_config(config, mesh)
    params = _first_params("vit")
    gradient = jax.jit(step.make_gradient(model, config, mesh))
    (value, _), _ = gradient(params, None, sharding.to_global(batch, mesh), jax.random.key(0))
    image, text = (
        np.float64(x) for x in (model.encode_image(params, batch.image), model.encode_text(params, batch.text))
    )
    expected = _numpy_loss_of_equal_captions(image, text, np.exp(params["logit_scale"]), batch.text)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_caption_ids_are_equal_for_equal_captions_only():
    text = np.random.default_rng(0).integers(0, 49_408, (4096, 77)).astype(np.int32)
    text[1::2] = text[::2]
    text[1::2, 40] += np.arange(2048) % 2  # every second pair differs in one token
    ids = np.asarray(step.caption_ids(jnp.asarray(text)))
    assert ids.min() >= 0
    np.testing.assert_array_equal(ids[::2] == ids[1::2], np.arange(2048) % 2 == 0)
    assert len(np.unique(ids)) == 2048 + 1024
