"""One step: its sharding, its guard, its counters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import Architecture, Config, LossConfig, OptimConfig, TextTransformer, ViT
from clip_jax.devices import sharding
from clip_jax.models import make_model
from clip_jax.training import optim, step
from clip_jax.typing import Batch

ARCHITECTURE = Architecture(ViT(16, 8, 32, 2, 2), TextTransformer(64, 8, 63, width=32, layers=2, heads=2), 16)
OPTIM = OptimConfig(warmup_steps=2, learning_rate=1e-3, ema_decay=0.9)
MODEL = make_model(ARCHITECTURE)
LOSS = LossConfig()
STEPS, BATCH = 10, 16
# Sums over the batch in another order. The bias of a key has no gradient but rounding, since a softmax does not feel
# it, and Adam turns the sign of that into steps: hence a tenth of one step of 1e-3.
DEVICES_TOLERANCE = 1e-4


def _batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 63, (BATCH, 8)).astype(np.int32)
    text[:, -1] = 63
    return Batch(rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8), text, np.ones(BATCH, bool))


def _start(
    devices: int = 1,
    optim_config: OptimConfig = OPTIM,
    loss: LossConfig = LOSS,
    model=MODEL,
):
    init, train_step, mesh = _compiled(devices, optim_config, loss, model)
    return init(jax.random.key(0)), train_step, mesh


@functools.cache
def _compiled(devices: int, optim_config: OptimConfig, loss: LossConfig, model):
    config = Config(model=ARCHITECTURE, optim=optim_config, loss=loss)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    optimizer = optim.make_optimizer(config.optim, STEPS)
    init = jax.jit(
        lambda key: step.init_state(MODEL.init(key), optimizer, config.optim),
        out_shardings=jax.tree.map(lambda x: x.sharding, step.abstract_state(MODEL, optimizer, config, mesh)),
    )
    train_step = step.make_train_step(model, optimizer, config, mesh)
    return init, train_step, mesh


def test_ten_steps_on_one_batch_lower_the_loss():
    state, train_step, mesh = _start()
    losses = []
    for _ in range(STEPS):
        state, metrics = train_step(state, sharding.to_global(_batch(0), mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1


def _nan_on_black(params, image, key):
    """The model's encoder, but a first picture that is all black gives NaN."""
    poison = jnp.where(jnp.all(image[0] == 0), jnp.nan, 1.0)
    embeddings, stats = MODEL.encode_image_train(params, image, key)
    return embeddings * poison, stats


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
    state, train_step, mesh = _start(model=MODEL._replace(encode_image_train=_nan_on_black))
    state, _ = train_step(state, sharding.to_global(_batch(0), mesh))
    before = jax.device_get(state)
    bad = _batch(1)
    bad.image[0] = 0
    state, metrics = train_step(state, sharding.to_global(bad, mesh))
    after = jax.device_get(state)
    assert np.isnan(metrics["loss"])
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state, s.ema)) for s in (before, after)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.skipped_steps), int(after.consecutive_skipped_steps)) == (2, 1, 1)
    state, metrics = train_step(state, sharding.to_global(_batch(2), mesh))
    assert (int(state.skipped_steps), int(state.consecutive_skipped_steps)) == (1, 0)
    assert any(
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True)
    )


@pytest.mark.parametrize(("maximum", "expected"), [(100.0, 100.0), (20.0, 20.0)])
def test_the_logit_scale_is_clipped_after_the_update(maximum, expected):
    state, train_step, mesh = _start(1, OptimConfig(warmup_steps=0), LossConfig(logit_scale_max=maximum))
    params = state.params | {"logit_scale": jax.device_put(jnp.float32(10.0), sharding.replicated(mesh))}
    state = dataclasses.replace(state, params=params, ema=None)
    _, metrics = train_step(state, sharding.to_global(_batch(0), mesh))
    np.testing.assert_allclose(metrics["logit_scale"], expected, rtol=1e-5)


def test_the_average_follows_the_parameters_without_the_initialisation():
    state, train_step, mesh = _start()
    first = jax.device_get(state.params)
    for seed in range(3):
        state, _ = train_step(state, sharding.to_global(_batch(seed), mesh))
    name = lambda params: params["text"]["projection"]  # noqa: E731
    # By hand: decay min(0.9, (1 + t) / (10 + t)) before steps 0, 1, 2 replayed from a second run.
    replay, train_step, mesh = _start()
    average = name(first)
    for seed in range(3):
        replay, _ = train_step(replay, sharding.to_global(_batch(seed), mesh))
        decay = min(0.9, (1 + seed) / (10 + seed))
        average = decay * average + (1 - decay) * np.asarray(name(replay.params))
    np.testing.assert_allclose(name(state.ema), average, atol=1e-6)
    assert state.eval_params is state.ema


def test_one_program_serves_all_steps():
    state, train_step, mesh = _start()
    for seed in range(3):
        state, _ = train_step(state, sharding.to_global(_batch(seed), mesh))
    assert train_step._cache_size() == 1


def test_both_guards_change_nothing_but_by_a_finite_step():
    """A CPU runs the one, a TPU the other."""
    for guard in (step._run_if, step._select_if):
        chosen = jax.jit(
            lambda finite, guard=guard: guard(finite, lambda: {"a": jnp.float32(2)}, {"a": jnp.float32(1)})
        )
        assert (float(chosen(True)["a"]), float(chosen(False)["a"])) == (2, 1)
