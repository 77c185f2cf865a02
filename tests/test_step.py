"""The training step: loss, guard against NaN, counters, norms, moving average."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import Architecture, Config, OptimConfig, TextTransformer, ViT
from clip_jax.devices import sharding
from clip_jax.losses import SoftmaxLoss
from clip_jax.models import make_model
from clip_jax.training import optim, step
from clip_jax.typing import Batch

ARCHITECTURE = Architecture(ViT(16, 8, 32, 2, 2), TextTransformer(64, 8, 63, width=32, layers=2, heads=2), 16)
OPTIM = OptimConfig(warmup_steps=2, learning_rate=1e-3, ema_decay=0.9)
MODEL = make_model(ARCHITECTURE)
LOSS = SoftmaxLoss()
STEPS, BATCH = 10, 16


def _batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 63, (BATCH, 8)).astype(np.int32)
    text[:, -1] = 63
    return Batch(rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8), text, np.ones(BATCH, bool))


def _start(devices: int = 1, optim_config: OptimConfig = OPTIM, loss: SoftmaxLoss = LOSS, model=MODEL):
    init, train_step, mesh = _compiled(devices, optim_config, loss, model)
    return init(jax.random.key(0)), train_step, mesh


@functools.cache
def _compiled(devices: int, optim_config: OptimConfig, loss: SoftmaxLoss, model):
    config = Config(model=ARCHITECTURE, optim=optim_config, loss=loss)
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=devices)
    optimizer = optim.make_optimizer(config.optim, STEPS)
    init = jax.jit(
        lambda key: step.init_state(MODEL.init(key), optimizer, config.optim),
        out_shardings=jax.tree.map(lambda x: x.sharding, step.abstract_state(MODEL, optimizer, config, mesh)),
    )
    return init, step.make_train_step(model, optimizer, config, mesh), mesh


@pytest.mark.slow
def test_ten_steps_on_one_batch_lower_the_loss():
    state, train_step, mesh = _start()
    losses = []
    for _ in range(STEPS):
        state, metrics = train_step(state, sharding.to_global(_batch(0), mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1


def _nan_for_black(params, image, key):
    """Encode images; the embeddings are NaN if the first image is black."""
    poison = jnp.where(jnp.all(image[0] == 0), jnp.nan, 1.0)
    embeddings, stats = MODEL.encode_image_train(params, image, key)
    return embeddings * poison, stats


@pytest.mark.slow
def test_a_step_with_nan_changes_only_the_counters():
    state, train_step, mesh = _start(model=MODEL._replace(encode_image_train=_nan_for_black))
    state, _ = train_step(state, sharding.to_global(_batch(0), mesh))
    before = jax.device_get(state)
    bad = _batch(1)
    bad.image[0] = 0
    state, metrics = train_step(state, sharding.to_global(bad, mesh))
    after = jax.device_get(state)
    assert np.isnan(metrics["loss"])
    assert metrics["update_norm/image"] == metrics["update_norm/text"] == 0
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state, s.ema)) for s in (before, after)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.skipped_steps), int(after.consecutive_skipped_steps)) == (2, 1, 1)
    state, metrics = train_step(state, sharding.to_global(_batch(2), mesh))
    assert (int(state.skipped_steps), int(state.consecutive_skipped_steps)) == (1, 0)
    assert any(
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "optim_config"),
    [(1, OPTIM), (4, OPTIM), (1, dataclasses.replace(OPTIM, half_precision_params="^text/", warmup_steps=0))],
)
def test_tower_norms_equal_numpy(devices, optim_config):
    """Also with parameters that are sharded, or stored in bfloat16, where the applied change includes rounding."""
    state, train_step, mesh = _start(devices, optim_config)
    for seed in range(2):
        before = jax.device_get(state.params)
        state, metrics = train_step(state, sharding.to_global(_batch(seed), mesh))
    after = jax.device_get(state.params)

    def norm(tree) -> float:
        return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))

    squared_grad_norms = 0.0
    for tower in ("image", "text"):
        change = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), after[tower], before[tower])
        np.testing.assert_allclose(metrics[f"param_norm/{tower}"], norm(after[tower]), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"update_norm/{tower}"], norm(change), rtol=1e-3)
        squared_grad_norms += float(metrics[f"grad_norm/{tower}"]) ** 2
        assert metrics[f"update_norm/{tower}"] > 0
    # Without the gradient of the logit scale, which is a small part of the global norm.
    assert 0.9 * metrics["grad_norm"] < squared_grad_norms**0.5 <= metrics["grad_norm"] * (1 + 1e-6)


def test_gradient_norms_of_the_towers_equal_numpy():
    config = Config(model=ARCHITECTURE, optim=OPTIM)
    mesh = sharding.make_mesh(jax.devices()[:1])
    state, train_step, _ = _start()
    key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
    batch = sharding.to_global(_batch(0), mesh)
    _, gradient = jax.jit(step.make_gradient(MODEL, config, mesh))(state.params, None, batch, key)
    _, metrics = train_step(state, batch)
    for name, tree in {"grad_norm": gradient, **{f"grad_norm/{t}": gradient[t] for t in ("image", "text")}}.items():
        expected = np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(tree)))
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "maximum", "expected"), [(10.0, 100.0, 100.0), (10.0, 20.0, 20.0), (-3.0, 100.0, 1.0)]
)
def test_the_logit_scale_is_clipped_after_the_update(start, maximum, expected):
    """To at most `logit_scale_max` (paper, section 2.5) and at least 1, as open_clip does."""
    state, train_step, mesh = _start(1, OptimConfig(warmup_steps=0), SoftmaxLoss(logit_scale_max=maximum))
    params = state.params | {"logit_scale": jax.device_put(jnp.float32(start), sharding.replicated(mesh))}
    state = dataclasses.replace(state, params=params, ema=None)
    _, metrics = train_step(state, sharding.to_global(_batch(0), mesh))
    np.testing.assert_allclose(metrics["logit_scale"], expected, rtol=1e-5)


def test_the_moving_average_equals_its_recurrence():
    state, train_step, mesh = _start()
    first = jax.device_get(state.params)
    for seed in range(3):
        state, _ = train_step(state, sharding.to_global(_batch(seed), mesh))
    # A second run provides the parameters after steps 0, 1, 2; the decay before them is min(0.9, (1 + t) / (10 + t)).
    second, train_step, mesh = _start()
    average = first["text"]["projection"]
    for seed in range(3):
        second, _ = train_step(second, sharding.to_global(_batch(seed), mesh))
        decay = min(0.9, (1 + seed) / (10 + seed))
        average = decay * average + (1 - decay) * np.asarray(second.params["text"]["projection"])
    np.testing.assert_allclose(state.ema["text"]["projection"], average, atol=1e-6)
    assert state.eval_params is state.ema


def test_all_steps_run_one_compiled_program():
    state, train_step, mesh = _start()
    for seed in range(3):
        state, _ = train_step(state, sharding.to_global(_batch(seed), mesh))
    assert train_step._cache_size() == 1


@pytest.mark.parametrize("select", [step._select_with_cond, step._select_with_where])
def test_a_selection_applies_the_update_only_if_finite(select):
    """The CPU uses one, TPUs and GPUs the other."""
    new, old = (jnp.float32(2),), (jnp.float32(1),)
    selected = jax.jit(lambda finite: select(finite, lambda: new, old, lambda result: (*result, result[0] - old[0])))
    assert (*map(float, selected(True)), *map(float, selected(False))) == (2, 1, 1, 0)
