"""Optimizers: against NumPy references, and properties of all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax.config import MODELS, Architecture, OptimConfig, ViT, from_config_dict, resolve
from clip_jax.models import make_model, tree_path
from clip_jax.training import optim
from tests import tiny_models

NAMES = ["adamw", "adafactor", "lion"]
TOTAL = 100
# Every step has another learning rate; weight decay and first moments have a visible effect.
CONFIG = OptimConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.2)
ROUNDING = 1e-5  # relative, of float32 after a few operations


ARCHITECTURE = Architecture(ViT(layers=3))  # of the parameters below


def _params(seed=0):
    """Return float32 parameters of every kind: stacked layers, factored matrices, vectors, scalars."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    blocks = {"mlp": {"kernel": draw(3, 72, 80), "bias": draw(3, 80)}, "norm1": {"scale": 1 + draw(3, 72)}}
    return {
        "image": {"patch_embedding": draw(64, 72), "transformer": {"blocks": blocks}, "projection": draw(80, 65)},
        "text": {"token_embedding": {"embedding": draw(70, 66)}, "projection": draw(66, 65)},
        "logit_scale": jnp.float32(2.5),
    }


def _gradients(params, seed, scale=1.0):
    """Return normally distributed gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), params)


def _updates(config, gradients, params, seed=0):
    """Return the updates of every step for constant parameters, and the last state."""
    optimizer = optim.make_optimizer(config, TOTAL, architecture=ARCHITECTURE, seed=seed)
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        found.append(updates)
    return found, state


# ---------------------------------------------------------------------------------------------------- NumPy references


def test_adamw_against_numpy():
    config = OptimConfig(learning_rate=0.2, warmup_steps=2, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
    optimizer = optim.make_optimizer(config, 100)
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0), "logit_scale": jnp.float32(2.0)}
    state = optimizer.init(params)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)
    # Warm-up: the learning rate of the first update is 0.1.
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    step_size = 0.5 / (0.5 + 1e-6)
    np.testing.assert_allclose(params["kernel"], 2.0 - 0.1 * (step_size + 0.2 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(params["bias"], 2.0 - 0.1 * step_size, rtol=1e-5)
    np.testing.assert_allclose(params["logit_scale"], 2.0 - 0.1 * step_size, rtol=1e-5)


def test_adafactor_against_numpy_form_of_big_vision():
    config = dataclasses.replace(CONFIG, name="adafactor", warmup_steps=0, weight_decay=0.0)
    rng = np.random.default_rng(0)
    gradients = [rng.standard_normal((64, 70)) for _ in range(3)]
    found, _ = _updates(
        config, [{"kernel": jnp.float32(g)} for g in gradients], {"kernel": jnp.zeros((64, 70), jnp.float32)}
    )
    row, column, first, schedule = 0.0, 0.0, 0.0, optim.make_schedule(config, TOTAL)
    for at, (g, updates) in enumerate(zip(gradients, found, strict=True)):
        decay = min(config.b2, 1 - (at + 1) ** -0.8)
        row = decay * row + (1 - decay) * (g**2).mean(axis=1, keepdims=True)
        column = decay * column + (1 - decay) * (g**2).mean(axis=0, keepdims=True)
        first = config.b1 * first + (1 - config.b1) * g / np.sqrt(row * column / row.mean())
        np.testing.assert_allclose(updates["kernel"], -float(schedule(at)) * first, rtol=1e-4, atol=1e-7)


def test_lion_against_numpy():
    config = dataclasses.replace(CONFIG, name="lion", warmup_steps=0, weight_decay=0.0)
    gradients = [np.random.default_rng(at).standard_normal((5, 7)) for at in range(3)]
    found, _ = _updates(config, [{"kernel": jnp.float32(g)} for g in gradients], {"kernel": jnp.zeros((5, 7))})
    first, schedule = 0.0, optim.make_schedule(config, TOTAL)
    for at, (g, updates) in enumerate(zip(gradients, found, strict=True)):
        sign = np.sign(config.b1 * first + (1 - config.b1) * g)
        np.testing.assert_allclose(updates["kernel"], -float(schedule(at)) * sign, rtol=ROUNDING)
        first = config.b2 * first + (1 - config.b2) * g


def test_gains_biases_and_logit_scale_have_no_weight_decay():
    shapes = jax.eval_shape(make_model(tiny_models.ARCHITECTURES["vit"]).init, jax.random.key(0))
    mask = optim.weight_decay_mask(shapes)
    spared = {"/".join(k.key for k in path) for path, decays in jax.tree_util.tree_leaves_with_path(mask) if not decays}
    assert "logit_scale" in spared and "image/norm_pre/scale" in spared
    assert "text/transformer/blocks/attention/query/bias" in spared
    assert all(name.rsplit("/")[-1] in ("bias", "scale", "logit_scale") for name in spared)
    assert not optim.weight_decay_mask({"a": {"kernel": 1}, "b": {"kernel": 2}}, "^a/")["a"]["kernel"]


def test_no_weight_decay_of_open_clip_excludes_class_and_position_embeddings():
    for name, excluded in (("vit", {"class_embedding", "positional_embedding"}), ("resnet", {"positional_embedding"})):
        params = jax.eval_shape(make_model(tiny_models.ARCHITECTURES[name]).init, jax.random.key(0))
        paper, open_clip = optim.weight_decay_mask(params), optim.weight_decay_mask(params, "open_clip")
        changed = jax.tree.map(lambda a, b: a != b, paper, open_clip)
        found = {tree_path(path) for path, x in jax.tree_util.tree_leaves_with_path(changed) if x}
        image = {f"image/{x}" for x in excluded} if name == "vit" else set()
        assert found == image | {"text/positional_embedding"}


def test_no_weight_decay_that_matches_nothing_is_refused():
    config = OptimConfig(no_weight_decay="class_embeding")
    with pytest.raises(
        ValueError, match=r"optim\.no_weight_decay='class_embeding' matches no parameter; there are e\.g"
    ):
        optim.make_optimizer(config, 5000).init(tiny_models.params(tiny_models.ARCHITECTURES["vit_gelu"]))


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule_is_that_of_open_clip_and_never_zero_in_a_step(warmup):
    """`cosine_lr` of open_clip_train/scheduler.py, for every step, which counts from 0."""
    config = OptimConfig(learning_rate=4e-4, warmup_steps=warmup)
    schedule, total = optim.make_schedule(config, 110), 110

    def cosine_lr(step):
        if step < warmup:
            return 4e-4 * (step + 1) / warmup
        return 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) * 4e-4

    rates = [float(schedule(jnp.int32(step))) for step in range(total)]
    np.testing.assert_allclose(rates, [cosine_lr(step) for step in range(total)], rtol=1e-5, atol=1e-10)
    assert min(rates) > 0 and float(schedule(total)) == pytest.approx(0, abs=1e-10)


# ---------------------------------------------------------------------------------------- properties of all optimizers


@pytest.mark.parametrize("name", NAMES)
def test_update_is_proportional_to_learning_rate(name):
    """For a constant gradient the update is the learning rate, without a factor of the width or its square."""
    params = _params()
    grads = jax.tree.map(jnp.ones_like, params)
    found, _ = _updates(dataclasses.replace(CONFIG, name=name, weight_decay=0.0), [grads] * 5, params)
    schedule = optim.make_schedule(CONFIG, TOTAL)
    for at, updates in enumerate(found):
        # Adafactor's first moment has no bias correction, as in big_vision.
        expected = float(schedule(at)) * (1 - CONFIG.b1 ** (at + 1) if name == "adafactor" else 1)
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_allclose(leaf, -expected, rtol=2e-5, atol=1e-9)  # eps=1e-6, and rounding


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_proportional_to_learning_rate(name):
    params = _params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = dataclasses.replace(CONFIG, name=name, no_weight_decay="patch_embedding")
    found, _ = _updates(config, [zeros] * 4, params)
    rates = [float(optim.make_schedule(CONFIG, TOTAL)(at)) for at in range(4)]
    mask = optim.weight_decay_mask(params, "patch_embedding")
    assert {True, False} == set(jax.tree.leaves(mask))
    for rate, updates in zip(rates, found, strict=True):
        jax.tree.map(
            lambda u, x, decays: np.testing.assert_allclose(u, -rate * 0.2 * x * decays, rtol=ROUNDING),  # noqa: B023
            updates,
            params,
            mask,
        )


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_have_no_update_and_no_state(name):
    params = _params()
    config = dataclasses.replace(CONFIG, name=name)
    gradients = [_gradients(params, seed) for seed in range(3)]
    unfrozen, full_state = _updates(config, gradients, params)
    found, state = _updates(dataclasses.replace(config, freeze="^image/"), gradients, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found[-1]["image"]))
    jax.tree.map(np.testing.assert_array_equal, found[-1]["text"], unfrozen[-1]["text"])
    size, full_size = (sum(leaf.size for leaf in jax.tree.leaves(s)) for s in (state, full_state))
    assert size < 0.5 * full_size


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_scales_updates(name):
    params = _params()
    config = dataclasses.replace(CONFIG, name=name)
    gradients = [_gradients(params, seed) for seed in range(3)]
    whole, _ = _updates(config, gradients, params)
    scaled, _ = _updates(dataclasses.replace(config, layer_decay=0.5), gradients, params)
    factors = optim.layer_decay_factors(params, 0.5, ARCHITECTURE)
    assert factors["image"]["patch_embedding"] == 0.5**4
    jax.tree.map(lambda a, b, f: np.testing.assert_allclose(a, b * f, rtol=ROUNDING), scaled[-1], whole[-1], factors)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_independent_of_the_norm_of_a_clipped_gradient(name):
    params = _params()
    config = dataclasses.replace(CONFIG, name=name)

    def second(scale, max_grad_norm):
        first, then = _gradients(params, 1, scale), _gradients(params, 2, 1e-3)
        clipped = dataclasses.replace(config, max_grad_norm=max_grad_norm)
        found, _ = _updates(clipped, [first, then, then], params)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found[-1])])

    # Lion's update is a sign, which rounding flips where the average is close to zero.
    same = lambda a, b: np.isclose(a, b, rtol=1e-4, atol=1e-9).mean() > 0.999  # noqa: E731
    assert same(second(0.01, 1.0), second(1.0, 1.0))
    assert not same(second(0.01, 0.0), second(1.0, 0.0))


def test_adafactor_state_is_at_most_3_percent_larger_than_the_parameters():
    params = jax.eval_shape(make_model(MODELS["vit_b32"]).init, jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = jax.eval_shape(optim.make_optimizer(dataclasses.replace(CONFIG, name="adafactor"), TOTAL).init, params)
    # Rows, columns, vectors, and the second moment of the patch embedding, which is not factored (32 px).
    assert total < sum(leaf.size for leaf in jax.tree.leaves(state)) < 1.03 * total


def test_moments_in_float16_have_the_documented_units():
    """The gradient 1 has moments of (1 - b1) and (1 - b2); the second is stored as its root."""
    params = {"x": jnp.ones((2, 2))}
    config = {
        "warmup_steps": 0,
        "moment_dtype": "float16",
        "stochastic_rounding": False,
        "max_grad_norm": 0.0,
        "b1": 0.75,
        "b2": 0.9375,
    }
    for name, expected in (("adamw", {"mu": 0.25 * 2**12, "nu": 0.25 * 2**12}), ("adafactor", {"ema": 0.25})):
        _, state = _updates(OptimConfig(name, **config), [params], params)
        found = {
            path[-2].name: x.astype(np.float32)
            for path, x in jax.tree.leaves_with_path(state)
            if x.dtype == jnp.float16
        }
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=2**-10)


HALVES = [("float32", ""), ("bfloat16", "^text/"), ("float16", "^text/")]


@pytest.mark.slow
@pytest.mark.parametrize(("moments", "half"), HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_decreases_in_any_precision(name, moments, half):
    config = OptimConfig(name, 3e-3, 1, weight_decay=1e-3, moment_dtype=moments, half_precision_params=half)
    optimizer = optim.make_optimizer(config, TOTAL)
    target = _params(1)

    def loss(params):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    @jax.jit
    def train(params, state, at):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optim.apply_updates(params, updates, jax.random.fold_in(jax.random.key(0), at)), state, value

    params = optim.cast_params(_params(), half)
    state, losses = optimizer.init(params), []
    for at in range(TOTAL):
        params, state, value = train(params, state, at)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


# ---------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "adam"}, r"optim\.name='adam' is none of 'adamw', 'adafactor', 'lion'; did you mean 'adamw'"),
        ({"half_precision_params": "("}, r"optim\.half_precision_params='\(' is no regular expression"),
        (
            {"name": "adafactor", "b1": 0.0, "moment_dtype": "bfloat16"},
            r"optim\.moment_dtype='bfloat16', but adafactor with optim\.b1=0 has no moments",
        ),
    ],
)
def test_inconsistent_optimizer_config_is_refused(optimizer, message):
    with pytest.raises(ValueError, match=message):
        resolve(from_config_dict({"optim": optimizer, "train": {"batch_size": 8, "total_steps": 10_000}}), devices=1)
