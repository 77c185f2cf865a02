"""Moments and parameters in half precision: bytes, unbiased updates, bit-identical resumption."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax.config import MODELS, Architecture, Config, OptimConfig, TextTransformer, ViT
from clip_jax.devices import sharding
from clip_jax.models import make_model
from clip_jax.training import optim, step
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.typing import Batch

TOTAL = 100
CONFIG = OptimConfig(learning_rate=0.01, warmup_steps=2)
# 65,536 elements with independent rounding errors: the standard error of their mean is 1/256 of one element's.
SHAPE = (256, 256)
ARCHITECTURE = Architecture(ViT(16, 8, 32, 2, 2), TextTransformer(64, 8, 63, width=32, layers=2, heads=2), 16)


def _params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"image": {"kernel": (8, 6), "bias": (6,)}, "text": {"projection": (70, 66)}, "logit_scale": ()}
    return jax.tree.map(
        lambda shape: jnp.float32(rng.standard_normal(shape)), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def _updates(config, gradients, params, seed=0):
    """Return the last updates for constant parameters, and the last state."""
    optimizer = optim.make_optimizer(config, TOTAL, seed=seed)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
    return updates, state


# ------------------------------------------------------------------------------------------- moments in half precision


def _adam(moments, stochastic, gradients, *, b2=0.999, eps=1e-8, seed=0):
    """Return mean and standard deviation over SHAPE of AdamW's updates at learning rate 1, for equal gradients."""
    config = OptimConfig(learning_rate=1.0, warmup_steps=0, b2=b2, eps=eps, weight_decay=0.0, moment_dtype=moments)
    config = dataclasses.replace(config, stochastic_rounding=stochastic)
    optimizer = optim.make_optimizer(config, 10**9, seed=seed)
    params = {"kernel": jnp.zeros(SHAPE)}

    def update(state, gradient):
        updates, state = optimizer.update({"kernel": jnp.full(SHAPE, gradient)}, state, params)
        return state, updates["kernel"]

    def mean(state, gradient):
        state, updates = update(state, gradient)
        return state, (updates.mean(), updates.std())

    return jax.jit(lambda: jax.lax.scan(mean, optimizer.init(params), jnp.asarray(gradients, jnp.float32))[1])()


# The mean of 65,536 elements with a noise of a few percent: 0.1 %. Adam's update is not linear in its moments: a noise
# of 5 % in the second moment moves the mean of 1/√v by 3/8 · 0.05² = 0.1 %, too.
MEAN_TOLERANCE = 5e-3


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("moments", ["bfloat16", "float16"])
def test_second_moment_stalls_with_nearest_and_not_with_stochastic_rounding(moments):
    """Gradients drop to a third: the second moment has to drop to a ninth, by 0.1 % per step."""
    gradients = [1e-3] * 1000 + [3e-4] * 4000
    expected, _ = _adam("float32", True, gradients)
    stochastic_updates, noise = _adam(moments, True, gradients)
    nearest, _ = _adam(moments, False, gradients)
    np.testing.assert_allclose(stochastic_updates[1500::500], expected[1500::500], rtol=MEAN_TOLERANCE)
    assert noise[-1] < 0.1 * abs(expected[-1])
    assert abs(nearest[-1] / expected[-1] - 1) > 0.2


@pytest.mark.parametrize("b2", [0.98, 0.999])
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0])
def test_float16_moments_for_gradients_of_any_size(size, b2):
    """The square of 1e-7 is far below float16's smallest number, 6e-8."""
    gradients = size * np.random.default_rng(0).choice([-1.0, 1.0, 2.0], 300)
    expected, _ = _adam("float32", True, gradients, b2=b2)
    found, noise = _adam("float16", True, gradients, b2=b2)
    np.testing.assert_allclose(found[10:], expected[10:], atol=MEAN_TOLERANCE)
    assert noise.max() < 0.02


def test_bias_of_the_squared_float16_root_is_below_2e_4():
    """Each step adds the variance of the root, at most (2^-10)²/4, over an average of 1,000 steps: 2.4e-4."""
    config = dataclasses.replace(CONFIG, b2=0.999, moment_dtype="float16")
    optimizer, grads = optim.make_optimizer(config, TOTAL), {"kernel": jnp.full(SHAPE, 1e-3)}
    state = optimizer.init(grads)
    state, _ = jax.jit(
        lambda s: jax.lax.scan(lambda s, _: (optimizer.update(grads, s, grads)[1], None), s, length=3000)
    )(state)
    found = (np.asarray(state[1][0].nu["kernel"], np.float64) * 2**-12) ** 2
    assert 1e-5 < found.mean() / (1e-6 * (1 - 0.999**3000)) - 1 < 2.4e-4


def test_rounding_depends_on_seed_and_step_only():
    params = _params()
    config = dataclasses.replace(CONFIG, moment_dtype="bfloat16")
    gradients = [_params(seed) for seed in range(3)]
    states = [_updates(config, gradients, params, seed)[1] for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
    kernels = [np.asarray(state[1][0].mu["text"]["projection"], np.float32) for state in states]
    assert (kernels[0] != kernels[2]).any()


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_halves_the_state_bytes(name, moments, dtype):
    params = jax.eval_shape(make_model(MODELS["vit_b32"]).init, jax.random.key(0))

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    config = dataclasses.replace(CONFIG, name=name, moment_dtype=dtype)
    state = jax.eval_shape(optim.make_optimizer(config, TOTAL).init, params)
    assert size(state) <= moments * size(params) / 2 + 16  # moments of the logit scale, two counters
    halved = jax.eval_shape(functools.partial(optim.cast_params, pattern="^text/"), params)
    assert size(halved) == size(params) - size(params["text"]) / 2


# ----------------------------------------------------------------------------------------- parameters in half precision


def test_matching_parameters_are_cast_and_the_logit_scale_is_not():
    params = _params()
    for pattern, expected in (("", set()), ("^text/", {"text"}), (".", {"text", "image"})):
        found = optim.cast_params(params, pattern)
        assert {
            path[0].key for path, x in jax.tree_util.tree_leaves_with_path(found) if x.dtype == jnp.bfloat16
        } == expected
        assert found["logit_scale"] is params["logit_scale"]
    for pattern in ("^txt/", "^logit_scale"):
        with pytest.raises(
            ValueError, match=r"optim\.half_precision_params='\^\w+/?' matches no parameter; there are e\.g"
        ):
            optim.cast_params(params, pattern)


def test_half_precision_updates_are_unbiased():
    """Updates of 1 % of the last place: rounding to the nearest would never change a parameter."""
    params = optim.cast_params({"text": jnp.full(SHAPE, 0.7)}, "text")
    start, last_place = float(params["text"][0, 0]), 2.0**-8
    updates = {"text": jnp.full(SHAPE, 0.01 * last_place)}
    apply = jax.jit(optim.apply_updates)
    for at in range(100):
        params = apply(params, updates, jax.random.key(at))
    moved = np.asarray(params["text"], np.float64) - start
    # 100 draws of variance 0.0099 each: a standard deviation of 0.995 places, its mean over 65,536 elements 0.004.
    np.testing.assert_allclose(moved.mean() / last_place, 1.0, atol=0.02)
    np.testing.assert_allclose(moved.std() / last_place, 0.995, atol=0.02)


def test_float32_parameters_are_updated_as_by_optax():
    params, updates = _params(), _params(1)
    found = optim.apply_updates(params, updates, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found, optax.apply_updates(params, updates))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_updates_equal_those_of_upcast_parameters(name):
    params = optim.cast_params(_params(), "^text/")
    config = dataclasses.replace(CONFIG, name=name)
    grads = _params(1)
    found, _ = _updates(config, [grads] * 2, params)
    expected, _ = _updates(config, [grads] * 2, optim.upcast(params))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ------------------------------------------------------------------------------------------------------- in the step

HALF = OptimConfig(
    learning_rate=1e-3, warmup_steps=1, ema_decay=0.9, moment_dtype="bfloat16", half_precision_params="^text/|patch"
)


def _batch(seed, rows=16):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 63, (rows, 8)).astype(np.int32)
    text[:, -1] = 63
    return Batch(rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8), text, np.ones(rows, bool))


@functools.cache
def _compiled(config):
    mesh = sharding.make_mesh()
    model = make_model(ARCHITECTURE)
    optimizer = optim.make_optimizer(config, TOTAL, seed=3)
    start = functools.partial(step.init_state, optimizer=optimizer, config=config)
    init = jax.jit(lambda key: start(model.init(key)), out_shardings=sharding.replicated(mesh))
    run = Config(model=ARCHITECTURE, optim=config)
    return init, step.make_train_step(model, optimizer, run, mesh), mesh


def _dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.slow
def test_loss_decreases_and_dtypes_are_constant():
    init, train_step, mesh = _compiled(HALF)
    state = init(jax.random.key(0))
    first, losses = _dtypes(state), []
    for _ in range(10):
        state, metrics = train_step(state, sharding.to_global(_batch(0), mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert _dtypes(state) == first
    assert {x.dtype for x in jax.tree.leaves(state.params["text"])} == {jnp.dtype("bfloat16")}
    for kept in (state.ema, state.eval_params, dataclasses.replace(state, ema=None).eval_params):
        assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    assert train_step._cache_size() == 1


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(tmp_path):
    init, train_step, mesh = _compiled(HALF)
    uninterrupted = init(jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for at in range(4):
        uninterrupted, _ = train_step(uninterrupted, sharding.to_global(_batch(at), mesh))
        if at == 1:
            checkpoints.save(at, uninterrupted, {})
            checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), uninterrupted)
    resumed, _ = checkpoints.restore(abstract)
    checkpoints.close()
    for at in range(2, 4):
        resumed, _ = train_step(resumed, sharding.to_global(_batch(at), mesh))
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


@pytest.mark.slow
def test_replicas_stay_equal():
    init, train_step, mesh = _compiled(HALF)
    state = init(jax.random.key(0))
    for at in range(3):
        state, _ = train_step(state, sharding.to_global(_batch(at), mesh))
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert all((first == other).all() for other in others)
