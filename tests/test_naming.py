"""Detection of a model among the tensors of a checkpoint: prefixes, averages, tensors of other modules."""

import json
import logging
import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_jax.interop import conversion, name_tables, naming, reading, torch_file
from tests import tiny_models

MODEL = tiny_models.ARCHITECTURES["vit_gelu"]
ONE = np.ones(1, np.float32)
NAMES = {
    "OpenAI": ("visual.conv1.weight", "visual.proj", "text_projection", "logit_scale"),
    "open_clip SigLIP": ("visual.trunk.attn_pool.latent", "text.ln_final.bias"),
    "Hugging Face": ("vision_model.embeddings.patch_embedding.weight", "text_projection.weight"),
    "Hugging Face SigLIP": (
        "vision_model.head.probe",
        "vision_model.embeddings.patch_embedding.weight",
        "text_model.head.bias",
    ),
    "Hugging Face Flax": ("vision_model.embeddings.patch_embedding.kernel", "logit_scale"),
    "big_vision": ("img/embedding/kernel", "txt/Embed_0/embedding", "t"),
}
PREFIXES = (
    *("", "module.", "model.", "clip.", "net.", "clip_model.", "base_model.model.", "model.clip.", "student.", "ema."),
    *("model_state_dict.", "state_dict_ema.", "params.", "params/", "weights.", "0.", "state_dict.module.model."),
)


def _tensors(prefix, title):
    return {prefix + name: ONE for name in NAMES[title]}


@pytest.mark.parametrize("title", NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_prefix_is_found_for_every_naming(title, prefix):
    found, tensors, found_prefix = naming.detect_naming(_tensors(prefix, title) | {"rng_state": ONE}, "f")
    assert (found.title, found_prefix) == (title, prefix)
    kept = {name.removeprefix(found.text_prefix) for name in NAMES[title]}
    assert tensors.keys() == kept | ({"rng_state"} if not prefix else set())


@pytest.mark.parametrize("module", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_modules_that_torch_inserts_are_removed_at_any_depth(module):
    names = [f"model.{module}.visual.{module}.conv1.weight", f"model.{module}.logit_scale", f"model.{module}x.y"]
    _, tensors, prefix = naming.detect_naming(dict.fromkeys(names, ONE), "f")
    assert prefix == "model." and tensors.keys() == {"visual.conv1.weight", "logit_scale", f"{module}x.y"}
    with pytest.raises(ValueError, match=r"f: tensor visual\.conv1\.weight: expected it once"):
        naming.detect_naming({"visual.conv1.weight": ONE, f"{module}.visual.conv1.weight": ONE}, "f")


@pytest.mark.parametrize("average", ["ema.", "state_dict_ema.", "model_ema.module.", "swa.", "ema/"])
@pytest.mark.parametrize("weights", ["", "state_dict.", "model."])
def test_weights_are_read_before_their_average_and_prefix_chooses(weights, average, caplog):
    both = _tensors(weights, "OpenAI") | {average + name: 2 * ONE for name in NAMES["OpenAI"]}
    _, tensors, prefix = naming.detect_naming(both, "w.pt")
    assert prefix == weights and all(tensors[name] == 1 for name in NAMES["OpenAI"])
    assert f"w.pt: reading the weights (prefix {weights!r}), not their average; give prefix={average!r}" in caplog.text
    for given in (average, average.rstrip("./")):
        _, tensors, prefix = naming.detect_naming(both, "w.pt", given)
        assert tensors.keys() == {*NAMES["OpenAI"]} and all(tensors[name] == 2 for name in tensors)
    listed = ", ".join(map(repr, naming._prefixes(both)))
    message = f"w.pt: prefix='nothing': expected a prefix of tensors, got none; the file has {listed}"
    with pytest.raises(ValueError, match=re.escape(message)):
        naming.detect_naming(both, "w.pt", "nothing")
    assert repr(weights) in listed and repr(average) in listed


def test_several_models_are_refused_and_prefix_chooses():
    both = _tensors("student.", "OpenAI") | _tensors("teacher.model.", "Hugging Face")
    message = r"w\.pt: expected one model, got 2: 'student\.', 'teacher\.model\.'; give one of them, e\.g\. prefix="
    with pytest.raises(ValueError, match=message):
        naming.detect_naming(both, "w.pt")
    found, _, prefix = naming.detect_naming(both, "w.pt", "teacher")
    assert (found.title, prefix) == ("Hugging Face", "teacher.model.")


def test_moments_of_an_optimizer_are_not_a_model(caplog):
    moments = {f"optimizer.exp_avg.{name}": ONE for name in NAMES["OpenAI"]} | {"best": ONE}
    with caplog.at_level(logging.INFO):
        _, tensors, prefix = naming.detect_naming(_tensors("model.", "OpenAI") | moments, "w.pt")
    assert prefix == "model." and tensors.keys() == {*NAMES["OpenAI"]}
    assert "w.pt: reading the tensors below 'model.'; ignoring 5 others: optimizer (4), best (1)" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer.resblocks.0.attn.out_proj.lora_A.weight", r"adapters that are not merged \(LoRA\); merge them"),
        ("transformer.resblocks.0.attn.out_proj.base_layer.weight", r"adapters that are not merged \(LoRA\)"),
        ("positional_embedding_res", "Long-CLIP's second position embedding"),
        ("transformer.resblocks.0.mlp.c_fc.weight_scale", "quantized weights"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_weights_that_need_another_computation_are_refused_by_name(prefix, name, message):
    with pytest.raises(ValueError, match=f"f: tensor {name}: expected the plain weights of a model, got {message}"):
        naming.detect_naming(_tensors(prefix, "OpenAI") | {prefix + name: ONE}, "f")


def test_adapter_alone_is_refused_by_name():
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match=f"f: tensor {name}: expected the plain weights of a model, got adapters"):
        naming.detect_naming({name: ONE}, "f")


def _shapes():
    """Return name and shape of every tensor of a small model in every naming."""
    models = {"OpenAI": ("vit", "resnet"), "Hugging Face": ("vit",), "Hugging Face Flax": ("vit",)}
    return {
        f"{known.title} {name}": conversion.LazyTensors(tiny_models.ARCHITECTURES[name], {}, known.table).shapes
        for known in naming.NAMINGS
        for name in models.get(known.title, ("siglip",))
    }


def test_names_and_shapes_of_tensors_are_those_that_the_libraries_read():
    """Recorded from `_shapes` when tests/peers/test_files.py passed, which loads them with the libraries."""
    recorded = json.loads((pathlib.Path(__file__).parent / "golden/tensor_shapes.json").read_text())
    found = {title: {name: list(shape) for name, shape in shapes.items()} for title, shapes in _shapes().items()}
    assert found.keys() == recorded.keys()
    for title, shapes in found.items():
        assert shapes == recorded[title], title


@pytest.mark.parametrize("prefix", ["state_dict.module.", "ema.", "model.clip."])
def test_wrapped_weights_are_read_from_files(tmp_path, prefix):
    expected = tiny_models.params(MODEL)
    tensors = dict(conversion.LazyTensors(MODEL, expected, name_tables.OPENAI))
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()} | {"rng_state": np.zeros(8, np.uint8)}
    torch_file.write(tmp_path / "w.pt", wrapped)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in wrapped.items()}, tmp_path / "w.safetensors")
    for file, kind in (("w.pt", "torch"), ("w.safetensors", "safetensors")):
        found = reading.read(tmp_path / file, activation="gelu", prefix=prefix, heads=(2, 1), preprocess="openai")
        assert found.format == f"OpenAI names, {kind}, below {prefix!r}" and found.config.model == MODEL
        for name, array in conversion.flat(expected).items():
            np.testing.assert_array_equal(conversion.flat(found.params)[name], array)


def test_prefix_of_a_clip_jax_file_is_an_error(tmp_path):
    from clip_jax.config import WeightsConfig
    from clip_jax.interop import npz

    npz.write(tmp_path / "w.npz", tiny_models.params(MODEL), WeightsConfig(MODEL))
    with pytest.raises(ValueError, match=r"prefix='ema': expected no prefix, as .*w\.npz contains one model"):
        reading.read(tmp_path / "w.npz", prefix="ema")
