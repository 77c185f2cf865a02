"""Fine-tuning: pretrained initialization, frozen parameters, layer-wise learning rate decay."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest

from clip_jax.config import (
    Config,
    InitConfig,
    OptimConfig,
    Preprocess,
    TrainConfig,
    WeightsConfig,
    from_config_dict,
    resolve,
    with_activation,
)
from clip_jax.devices import sharding
from clip_jax.interop import conversion, directory, msgpack, name_tables, reading, torch_file
from clip_jax.models import make_model
from clip_jax.training import initialization, optim, step
from clip_jax.typing import Batch
from tests import runs, tiny_models

VIT, RESNET = tiny_models.ARCHITECTURES["vit_gelu"], tiny_models.ARCHITECTURES["resnet"]


# --------------------------------------------------------------------------------------------------- initialization


def _config(path, model=VIT, **init):
    return Config(model=model, init=InitConfig(str(path), **init))


def test_initial_params_from_any_format(tmp_path):
    params = tiny_models.params(VIT)
    torch_file.write(tmp_path / "w.pt", conversion.LazyTensors(VIT, params, name_tables.OPENAI))
    msgpack.write(tmp_path / "w.msgpack", params, WeightsConfig(VIT))
    directory.write(tmp_path / "dir", params, WeightsConfig(VIT))
    for config in (
        _config(tmp_path / "w.pt", activation="gelu", preprocess="openai"),
        _config(tmp_path / "w.msgpack"),
        _config(tmp_path / "dir"),
    ):
        jax.tree.map(np.testing.assert_array_equal, initialization.initial_params(config), params)


def test_position_embeddings_are_resized(tmp_path):
    msgpack.write(tmp_path / "w.msgpack", tiny_models.params(VIT), WeightsConfig(VIT))
    larger = dataclasses.replace(VIT, image=dataclasses.replace(VIT.image, image_size=96))
    found = initialization.initial_params(_config(tmp_path / "w.msgpack", larger))
    assert found["image"]["positional_embedding"].shape == (37, 128)
    np.testing.assert_array_equal(found["text"]["projection"], tiny_models.params(VIT)["text"]["projection"])


def test_one_tower_is_pretrained_and_the_other_random(tmp_path):
    params = tiny_models.params(RESNET)
    torch_file.write(tmp_path / "w.pt", conversion.LazyTensors(RESNET, params, name_tables.OPENAI))
    found = initialization.initial_params(_config(f"{tmp_path}/w.pt:image", RESNET))
    assert found.keys() == {"image", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, found["image"], params["image"])
    with pytest.raises(
        ValueError, match=r"init\.weights='/nowhere\.pt:image': /nowhere\.pt: expected a file or directory"
    ):
        initialization.initial_params(_config("/nowhere.pt:image"))


def test_weights_of_another_model_or_preprocessing_are_refused(tmp_path):
    msgpack.write(
        tmp_path / "w.msgpack", tiny_models.params(VIT), WeightsConfig(VIT, preprocess=Preprocess((0.5,) * 3))
    )
    with pytest.raises(
        ValueError, match=r"other pixels than this run: preprocess\.mean: expected \(0\.5, 0\.5, 0\.5\), got"
    ):
        initialization.initial_params(_config(tmp_path / "w.msgpack"))
    with pytest.raises(ValueError, match=r"model\.text\.activation: expected 'gelu', got 'quick_gelu'"):
        initialization.initial_params(_config(tmp_path / "w.msgpack", with_activation(VIT, "quick_gelu")))
    with pytest.raises(ValueError, match=r"init\.weights='/nowhere\.pt': /nowhere\.pt: expected a file or directory"):
        initialization.initial_params(_config("/nowhere.pt"))


@pytest.mark.slow
def test_learning_rate_0_exports_the_initial_weights(tmp_path):
    """The whole command, from --config.init.weights to --export."""
    _, architecture = runs.tiny_model()
    params = tiny_models.params(architecture)
    msgpack.write(tmp_path / "w.msgpack", params, WeightsConfig(architecture))
    flags = [
        f"--config.init.weights={tmp_path}/w.msgpack",
        "--config.optim.learning_rate=0.0",
        "--config.optim.ema_decay=0.0",
    ]
    flags += ["--config.train.total_steps=6", f"--export={tmp_path}/out.msgpack"]
    process = runs.start(tmp_path / "run", *flags)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert "initializing from" in messages
    jax.tree.map(np.testing.assert_array_equal, reading.read(tmp_path / "out.msgpack").params, params)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (
            {"activation": "gelu"},
            r"init\.activation='gelu' has no effect without init\.weights: set it, or init\.activation=''",
        ),
        ({"weights": "w.pt", "model": "vit_b23"}, r"init\.model='vit_b23' is none of .* did you mean 'vit_b32'"),
    ],
)
def test_inconsistent_init_configs_are_refused(init, message):
    config = from_config_dict({"init": init, "train": {"batch_size": 8, "total_steps": 10_000}})
    with pytest.raises(ValueError, match=message):
        resolve(config, devices=1)


# ------------------------------------------------------------------------------------------------ frozen parameters


def _step(architecture, optim_config, steps=2, **train):
    config = Config(model=architecture, optim=optim_config, train=TrainConfig(dtype="float32", **train))
    mesh = sharding.make_mesh(jax.devices()[:1])
    optimizer = optim.make_optimizer(optim_config, 10, architecture=architecture)
    train_step = step.make_train_step(step.model_from_config(config, mesh), optimizer, config, mesh)
    params = tiny_models.params(architecture)
    state = jax.device_put(step.init_state(params, optimizer, optim_config), sharding.replicated(mesh))
    pixels, tokens = tiny_models.inputs(architecture, rows=4)
    batch = sharding.to_global(Batch(pixels, tokens, np.ones(4, bool)), mesh)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    for _ in range(steps):
        state, metrics = train_step(state, batch)
    return params, jax.device_get(state), size, metrics


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_frozen_tower_is_unchanged_and_has_no_moments(architecture):
    params, state, size, _ = _step(architecture, OptimConfig(warmup_steps=0, freeze="^image/"))
    jax.tree.map(np.testing.assert_array_equal, state.params["image"], params["image"])
    if "batch_stats" in params:
        jax.tree.map(np.testing.assert_array_equal, state.batch_stats, params["batch_stats"])
    assert np.abs(state.params["text"]["projection"] - params["text"]["projection"]).max() > 1e-5
    trained = sum(leaf.size for leaf in jax.tree.leaves(params["text"])) + 1
    assert 2 * trained <= size <= 2 * trained + 8  # two moments, and counters


@pytest.mark.parametrize(("pattern", "frozen_stages"), [("^image/(stem|stage)", "stage"), ("^image/stage[02]", "02")])
def test_batch_norm_of_frozen_stages_runs_as_in_inference(pattern, frozen_stages):
    """Their running averages are unchanged; if all are frozen, images are embedded as by `encode_image`."""
    params, model = tiny_models.params(RESNET), make_model(RESNET, frozen=pattern)
    pixels, keys = tiny_models.inputs(RESNET, rows=4)[0], jax.random.split(jax.random.key(0), 4)
    embeddings, after = jax.jit(model.encode_image_train)(params, pixels, keys)
    for path, before in jax.tree_util.tree_leaves_with_path(params["batch_stats"]["image"]):
        new = functools.reduce(lambda tree, key: tree[key.key], path, after["image"])
        frozen = frozen_stages == "stage" or path[0].key[5] in frozen_stages
        assert (np.abs(new - before).max() == 0) == frozen, path
    difference = np.abs(embeddings - jax.jit(model.encode_image)(params, pixels)).max()
    assert difference < 1e-6 if frozen_stages == "stage" else difference > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("train", [{"micro_batches": 2, "remat": "names"}, {"unroll_layers": True, "remat": "full"}])
def test_averages_of_frozen_stages_are_unchanged_however_the_step_computes(train):
    params, state, _, _ = _step(RESNET, OptimConfig(warmup_steps=0, freeze="^image/(stem|stage)"), **train)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, params["batch_stats"])


def test_backward_pass_of_a_frozen_tower_is_not_computed():
    def flops(freeze):
        model, mesh = make_model(VIT), sharding.make_mesh(jax.devices()[:1])
        config = OptimConfig(warmup_steps=0, freeze=freeze)
        optimizer = optim.make_optimizer(config, 10)
        train_step = step.make_train_step(model, optimizer, Config(model=VIT, optim=config), mesh)
        state = jax.eval_shape(lambda: step.init_state(tiny_models.params(VIT), optimizer, config))
        pixels, tokens = tiny_models.inputs(VIT, rows=4)
        return train_step.lower(state, Batch(pixels, tokens, np.ones(4, bool))).cost_analysis()["flops"]

    # The backward pass costs twice the forward pass, and the image tower is most of this model.
    assert flops("^image/") < 0.7 * flops("")


@pytest.mark.parametrize(
    ("pattern", "message"), [("^imag/", "matches no parameter; there are e.g. "), ("", None), (".", "matches all")]
)
def test_pattern_that_matches_nothing_or_everything_is_refused(pattern, message):
    if message is None:
        assert not any(jax.tree.leaves(optim.frozen_mask(tiny_models.params(VIT), pattern)))
        return
    with pytest.raises(ValueError, match=re.escape(f"optim.freeze={pattern!r} {message}")):
        optim.frozen_mask(tiny_models.params(VIT), pattern)


def test_invalid_regular_expression_is_refused():
    config = from_config_dict({"optim": {"freeze": "("}, "train": {"batch_size": 8, "total_steps": 10_000}})
    with pytest.raises(ValueError, match=r"optim\.freeze='\(' is no regular expression"):
        resolve(config, devices=1)


# ------------------------------------------------------------------------------------ layer-wise learning rate decay


def test_factors_decay_with_the_distance_from_the_output():
    factors = optim.layer_decay_factors(tiny_models.params(VIT), 0.5, VIT)
    image = factors["image"]
    assert (image["patch_embedding"], image["class_embedding"], image["positional_embedding"]) == (0.125,) * 3
    assert (image["norm_pre"]["scale"], factors["text"]["token_embedding"]["embedding"]) == (0.125, 0.125)
    np.testing.assert_array_equal(image["transformer"]["blocks"]["norm1"]["scale"], [[0.25], [0.5]])
    assert (image["norm_post"]["scale"], image["projection"], factors["logit_scale"]) == (1, 1, 1)
    resnet = optim.layer_decay_factors(tiny_models.params(RESNET), 0.5, RESNET)["image"]
    found = [resnet[f"stage{stage}_first"]["conv1"]["kernel"] for stage in range(4)]
    assert found == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert (resnet["stem_conv1"]["kernel"], resnet["pool"]["query"]["kernel"]) == (0.5**5, 1)


def test_factors_multiply_the_updates():
    params = tiny_models.params(VIT)
    gradients = jax.tree.map(lambda x: np.full_like(x, 0.01), params)
    updates = []
    for decay in (1.0, 0.5):
        config = OptimConfig(warmup_steps=0, layer_decay=decay, weight_decay=0.2)
        optimizer = optim.make_optimizer(config, 10, architecture=VIT)
        updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    factors = optim.layer_decay_factors(params, 0.5, VIT)
    jax.tree.map(lambda a, b, f: np.testing.assert_allclose(b, a * f, rtol=1e-6), *updates, factors)
    assert optax.tree.norm(updates[1]) < optax.tree.norm(updates[0])


def test_freezing_with_layer_decay():
    params, state, _, metrics = _step(VIT, OptimConfig(warmup_steps=0, freeze="^image/|embedding", layer_decay=0.7))
    jax.tree.map(np.testing.assert_array_equal, state.params["image"], params["image"])
    assert (
        np.isfinite(metrics["loss"])
        and np.abs(state.params["text"]["projection"] - params["text"]["projection"]).max() > 0
    )
