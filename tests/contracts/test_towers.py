"""Contract of the towers: every entry of `TOWERS` and every preset in `MODELS` passes these tests.

A new tower is tested by its line in `TOWERS` alone. Presets are tested by shape at full size, and by number as small
copies with the same options.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clip_jax.config import (
    MODELS,
    TOWERS,
    Architecture,
    Config,
    ImageTower,
    OptimConfig,
    TrainConfig,
    ViT,
    WeightsConfig,
    build,
    check,
    from_config_dict,
    name_of,
    to_config_dict,
)
from clip_jax.devices import sharding
from clip_jax.interop import msgpack, reading
from clip_jax.models import count_parameters, make_model
from clip_jax.training import optim, step
from clip_jax.training.checkpoint import Checkpoints

# bfloat16 has 8 significant bits; unit embeddings of two-layer towers drifted by up to 0.01.
BFLOAT16_DRIFT = 0.03
# Float32 sums in another order, relative to the largest element of a gradient.
LOOP_TOLERANCE = 1e-4


def _small(model: Architecture) -> Architecture:
    """Return the architecture with tiny towers and a vocabulary of 64."""
    image = model.image.tiny()
    text = dataclasses.replace(model.text.tiny(), vocab_size=64, context_length=8, eos_id=63)
    embed_dim = image.fixed_embed_dim or text.fixed_embed_dim or 16
    return dataclasses.replace(model, image=image, text=text, embed_dim=embed_dim)


def _with_tower(tower: type) -> Architecture:
    """Return a small architecture with a registered tower and the defaults for the other."""
    if issubclass(tower, ImageTower):
        return _small(Architecture(image=tower()))
    return _small(Architecture(ViT(), tower()))


# Presets that differ only in size have equal small copies.
PRESETS = {small: name for name, small in reversed([(name, _small(model)) for name, model in MODELS.items()])}
BY_KIND = {kind: _with_tower(tower) for kind, tower in TOWERS.items()}
VARIANTS = {**PRESETS, **{model: kind for kind, model in BY_KIND.items() if model not in PRESETS}}
every_model = pytest.mark.parametrize("name", MODELS)
every_kind = pytest.mark.parametrize("kind", TOWERS)
every_variant = pytest.mark.parametrize("architecture", VARIANTS, ids=list(VARIANTS.values()))


@functools.cache
def _initialized(architecture: Architecture):
    # 'rbg' is one instruction; the default generator, compiled per parameter of a ResNet, takes 13 seconds.
    return jax.jit(make_model(architecture).init)(jax.random.key(0, impl="rbg"))


def _trained_params(architecture: Architecture):
    return {name: value for name, value in _initialized(architecture).items() if name != "batch_stats"}


def _inputs(architecture: Architecture, rows: int = 4):
    rng = np.random.default_rng(0)
    size = architecture.image.image_size
    text = rng.integers(0, 63, (rows, architecture.text.context_length)).astype(np.int32)
    text[:, -1] = architecture.text.eos_id
    return rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8), text


def _paths(params):
    """Return {tower: {path relative to the tower: parameter}}."""
    towers = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path({name: params[name] for name in ("image", "text")}):
        tower, *rest = (key.key for key in path)
        towers.setdefault(tower, {})["/".join(rest)] = leaf
    return towers


# -------------------------------------------------------------------------------------------- presets and config


@every_model
def test_preset_is_found_by_its_architecture(name):
    assert name_of(MODELS[name]) == name


@pytest.mark.slow
@every_model
def test_preset_has_embeddings_of_the_same_shape_from_both_towers(name):
    architecture = MODELS[name]
    model = make_model(architecture)
    params = jax.eval_shape(model.init, jax.random.key(0))
    image, text = _inputs(architecture)
    for encode, inputs in ((model.encode_image, image), (model.encode_text, text)):
        embedded = jax.eval_shape(encode, params, inputs)
        assert embedded.shape == (4, architecture.embed_dim) and embedded.dtype == np.float32
    assert count_parameters(params) > 0 and all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@every_kind
def test_config_round_trip(kind):
    config = Config(model=BY_KIND[kind])
    assert from_config_dict(to_config_dict(config)) == config
    assert build(Architecture, dataclasses.asdict(config.model)) == config.model
    check(config.model)


@every_kind
def test_kind_is_the_registered_key(kind):
    assert TOWERS[kind]().kind == kind


@every_kind
def test_tiny_tower_is_smaller_and_keeps_the_options(kind):
    tower = TOWERS[kind]()
    tiny, options = tower.tiny(), [f.name for f in dataclasses.fields(tower) if f.name not in tower.ranges()]
    assert all(getattr(tiny, name) == getattr(tower, name) for name in options)
    assert tiny.width < tower.width and tiny.tiny() == tiny


@pytest.mark.parametrize("kind", [kind for kind, tower in TOWERS.items() if issubclass(tower, ImageTower)])
def test_image_size_that_the_stride_does_not_divide_is_refused_or_declared(kind):
    tower = BY_KIND[kind].image
    tower = dataclasses.replace(tower, image_size=4 * tower.stride + 1)
    if tower.ignores_partial_patch:
        return tower.check("model.image", tower.fixed_embed_dim or 16)
    with pytest.raises(ValueError, match="model.image.image_size"):
        tower.check("model.image", tower.fixed_embed_dim or 16)


# ----------------------------------------------------------------------------------------------------- parameters


@every_variant
def test_parameters_do_not_depend_on_how_the_model_computes(architecture):
    shapes = [
        jax.eval_shape(make_model(architecture, **options).init, jax.random.key(0))
        for options in ({}, {"dtype": "bfloat16", "remat": "full"}, {"unroll": True, "text_capacity": 0.5})
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    sizes = [np.prod(leaf.shape) for name in ("image", "text") for leaf in _paths(shapes[0])[name].values()]
    assert count_parameters(shapes[0]) == sum(sizes) + 1 + architecture.logit_bias


@pytest.mark.slow
@every_variant
def test_sharding_rules_match_every_parameter_once(architecture):
    params, mesh = _trained_params(architecture), sharding.make_mesh(fsdp=2, tensor=2)
    specs = sharding.param_specs(params, mesh, sharding.sharding_rules(architecture))
    sharded = [s for s in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)) if "fsdp" in s]
    assert len(sharded) >= 6


@every_variant
def test_stacked_parameters_are_those_of_repeated_layers(architecture):
    """`stacked` matches the parameters with a leading axis, and a range of layers has its length."""
    for name, tower in (("image", architecture.image), ("text", architecture.text)):
        for path, leaf in _paths(_trained_params(architecture))[name].items():
            layer = tower.layer(path)
            if isinstance(layer, range):
                assert re.fullmatch(tower.stacked, path) and len(layer) == leaf.shape[0], path
            last = layer[-1] if isinstance(layer, range) else layer
            assert 0 <= last <= tower.output_layer, path


def _first_uses(encode, params, data) -> dict[str, int]:
    """Return for each parameter the index of the first operation that combines it with the data."""
    names = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    jaxpr = jax.make_jaxpr(encode)(params, data).jaxpr
    *param_vars, data_var = jaxpr.invars
    # Parameters that each variable is computed from; data dependence is tracked separately.
    sources = dict(zip(param_vars, ({name} for name in names), strict=True))
    from_data, uses = {data_var}, {}
    for index, equation in enumerate(jaxpr.eqns):
        inputs = [var for var in equation.invars if not hasattr(var, "val")]
        found = set().union(*(sources.get(var, ()) for var in inputs))
        if from_data.intersection(inputs):
            uses = dict.fromkeys(found, index) | uses
            from_data.update(equation.outvars)
        else:
            sources |= dict.fromkeys(equation.outvars, found)
    return uses


@every_variant
def test_layer_decay_factors_do_not_decrease_from_input_to_output(architecture):
    """The order is that of the first use in the traced forward pass, which no tower declares."""
    params, model, inputs = _initialized(architecture), make_model(architecture), _inputs(architecture)
    factors = optim.layer_decay_factors(_trained_params(architecture), 0.5, architecture)
    for name, encode, data in zip(("image", "text"), (model.encode_image, model.encode_text), inputs, strict=True):
        uses = {path: index for path, index in _first_uses(encode, params, data).items() if path.startswith(name)}
        by_path = {f"{name}/{path}": np.ravel(factor) for path, factor in _paths(factors)[name].items()}
        assert uses.keys() == by_path.keys() and len(set(uses.values())) > 3
        for path, factor in by_path.items():
            assert (np.diff(factor) > 0).all() and 0 < factor[0] <= factor[-1] <= 1, path
            later = [other for other, index in uses.items() if index > uses[path]]
            wrong = [other for other in later if by_path[other][0] < factor[-1]]
            assert not wrong, f"layer: {path} is used before {wrong}, so its position must not be larger"
        assert min(factor[0] for factor in by_path.values()) < max(factor[-1] for factor in by_path.values()) == 1


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.slow
@every_variant
def test_embedding_is_independent_of_the_rest_of_the_batch(architecture):
    model, params = make_model(architecture), _initialized(architecture)
    image, text = _inputs(architecture)
    # Matmuls of another shape round differently.
    for encode, inputs in ((jax.jit(model.encode_image), image), (jax.jit(model.encode_text), text)):
        np.testing.assert_allclose(encode(params, inputs)[:1], encode(params, inputs[:1]), atol=1e-5)


@pytest.mark.slow
@every_variant
def test_bfloat16_stays_close_to_float32(architecture):
    params = _initialized(architecture)
    image, text = _inputs(architecture)
    half, full = (make_model(architecture, dtype=dtype) for dtype in ("bfloat16", "float32"))

    @jax.jit
    def drifts(params):
        images = half.encode_image(params, image) - full.encode_image(params, image)
        texts = half.encode_text(params, text) - full.encode_text(params, text)
        return jnp.abs(images).max(), jnp.abs(texts).max()

    assert 0 < max(drifts(params)) < BFLOAT16_DRIFT


def _perturbed(architecture: Architecture):
    """Return parameters without exact zeros, because a zero-initialized branch hides the parameters in it."""
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), _initialized(architecture))


@functools.cache
def _gradients(architecture: Architecture, **options):
    model = make_model(architecture, **options)
    image, text = _inputs(architecture)
    weights = np.random.default_rng(1).normal(size=(2, 4, architecture.embed_dim)).astype(np.float32)

    def objective(params):
        images = model.encode_image_train(params, image, jax.random.split(jax.random.key(2), 4))[0]
        return jnp.sum(weights[0] * images) + jnp.sum(weights[1] * model.encode_text(params, text))

    gradients = jax.jit(jax.grad(objective))(_perturbed(architecture))
    return {tower: gradients[tower] for tower in ("image", "text")}


@pytest.mark.slow
@every_variant
def test_every_parameter_has_a_gradient(architecture):
    for path, gradient in jax.tree_util.tree_leaves_with_path(_gradients(architecture)):
        assert np.isfinite(gradient).all()
        assert np.any(gradient), jax.tree_util.keystr(path)


@pytest.mark.slow
@every_kind
def test_unrolled_and_rematerialized_loops_have_the_same_gradients(kind):
    expected, found = _gradients(BY_KIND[kind]), _gradients(BY_KIND[kind], unroll=True, remat="names")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        # The gradient of a key bias is rounding error, because softmax is invariant to it: hence the minimum.
        atol = LOOP_TOLERANCE * max(np.abs(a).max(), 1e-3 * largest)
        np.testing.assert_allclose(b, a, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@every_variant
def test_image_features_are_the_input_of_the_projection(architecture):
    """If the last layer is a linear projection, applying it to the features gives the embedding."""
    model, params = make_model(architecture), _initialized(architecture)
    image, _ = _inputs(architecture)
    features = model.image_features(params, image)
    assert features.dtype == jnp.float32
    projection = [leaf for path, leaf in _paths(params)["image"].items() if re.search(r"projection(/kernel)?$", path)]
    bias = [leaf for path, leaf in _paths(params)["image"].items() if path.endswith("projection/bias")]
    projected = np.asarray(features)
    if projection:
        projected = projected @ np.asarray(projection[0]) + (np.asarray(bias[0]) if bias else 0.0)
    unit = projected / np.linalg.norm(projected, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit, model.encode_image(params, image), atol=1e-6)


# ----------------------------------------------------------------------------------------------- storage and training


@pytest.mark.slow
@every_kind
def test_sharded_state_survives_a_checkpoint_bit_for_bit(kind, tmp_path):
    train = TrainConfig(batch_size=8, dtype="float32")
    config = Config(model=BY_KIND[kind], train=train, optim=OptimConfig(warmup_steps=1, layer_decay=0.5, ema_decay=0.9))
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    model = step.model_from_config(config, mesh)
    optimizer = optim.make_optimizer(config.optim, 10, architecture=config.model)
    shapes = step.abstract_state(model, optimizer, config, mesh)
    state = step.init_state(_initialized(config.model), optimizer, config.optim)
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(shapes)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@every_kind
def test_weights_survive_msgpack_with_their_config(kind, tmp_path):
    config, params = WeightsConfig(BY_KIND[kind]), jax.device_get(_initialized(BY_KIND[kind]))
    msgpack.write(tmp_path / "model.msgpack", params, config)
    found = reading.read(tmp_path / "model.msgpack")
    assert found.config.model == config.model
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
