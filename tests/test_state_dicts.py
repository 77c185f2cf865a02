"""State dicts and incomplete directories: sizes by shapes, heads that no shape shows, parameters of no number."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_jax.config import MODELS, WeightsConfig, with_activation
from clip_jax.interop import (
    conversion,
    directory,
    infer_architecture,
    msgpack,
    name_tables,
    naming,
    npz,
    reading,
    torch_file,
)
from tests import tiny_models

VIT = tiny_models.ARCHITECTURES["vit"]
GIVEN = {"activation": "quick_gelu", "heads": (2, 1), "preprocess": "openai"}


@pytest.mark.parametrize(
    "name",
    ["rn50", "rn50x4", "vit_b32", "vit_l14_336", "vit_h14", "vit_bigg14", "siglip_so400m14", "siglip_so400m14_384"],
)
def test_architecture_is_inferred_from_shapes(name):
    """The tensors are broadcast scalars, so the large models need no memory."""
    model = MODELS[name]
    kind = next(n for n in naming.NAMINGS if n.title == ("open_clip SigLIP" if model.logit_bias else "OpenAI"))
    tensors = {}
    for path, (shape, layers) in conversion.parameter_shapes(model).items():
        source = kind.table[path]
        for layer in range(layers) if layers else (0,):
            empty = np.broadcast_to(np.float32(0), conversion.tensor_shape(path, shape, source))
            tensors[source.name.format(layer + source.first_layer)] = empty
    found = infer_architecture.architecture(tensors, kind, "f", infer_architecture.Heads())
    found = with_activation(found, model.text.activation)
    assert dataclasses.replace(found, text=model.text, image=model.image) == model
    text = dataclasses.replace(found.text, mlp_ratio=model.text.mlp_ratio)
    image = found.image if name.startswith("rn") else dataclasses.replace(found.image, mlp_ratio=model.image.mlp_ratio)
    assert (image, text) == (model.image, model.text)
    assert int(found.text.width * found.text.mlp_ratio) == int(model.text.width * model.text.mlp_ratio)


def test_attention_heads_are_those_of_a_preset_or_given(tmp_path):
    """A wrong number of heads changes features by 0.1, and no shape shows it."""
    model = dataclasses.replace(VIT, image=dataclasses.replace(VIT.image, heads=4))
    torch_file.write(
        tmp_path / "w.pt", dict(conversion.LazyTensors(model, tiny_models.params(model), name_tables.OPENAI))
    )
    with pytest.raises(ValueError, match=r"w\.pt: expected the attention heads of the .* tower .*, got none"):
        reading.read(tmp_path / "w.pt", activation="quick_gelu")
    found = reading.read(tmp_path / "w.pt", activation="quick_gelu", heads=(4, 1), preprocess="openai").config.model
    assert (
        found
        == model
        == reading.read(tmp_path / "w.pt", activation="quick_gelu", like=model, preprocess="openai").config.model
    )
    for heads, message in (
        ((5, 1), "heads of the image tower: expected a divisor of the width 128, got 5"),
        ((4,), r"heads: expected two numbers, of the image and of the text tower, got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            reading.read(tmp_path / "w.pt", activation="quick_gelu", heads=heads)
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    msgpack.write(tmp_path / "w.msgpack", tiny_models.params(VIT), WeightsConfig(VIT))
    for path in ("dir", "w.msgpack"):
        with pytest.raises(ValueError, match=r"heads=\(4, 1\): expected no heads, as .* omit heads"):
            reading.read(tmp_path / path, heads=(4, 1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("file", ["w.pt", "w.msgpack", "w.npz", "dir"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, file, value):
    params = tiny_models.params(VIT)
    params["text"]["projection"][3, 4] = value
    if file == "w.pt":
        torch_file.write(tmp_path / file, conversion.LazyTensors(VIT, params, name_tables.OPENAI))
    else:
        module = {"w.msgpack": msgpack, "w.npz": npz, "dir": directory}[file]
        module.write(tmp_path / file, params, WeightsConfig(VIT))
    with pytest.raises(ValueError, match=f"{file}: parameter text/projection: expected finite numbers, got NaN or inf"):
        reading.read(tmp_path / file, **(GIVEN if file == "w.pt" else {}))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_gelu", ["text/projection"]),
        ("vit_gelu", ["image/projection"]),
        ("resnet", ["image/pool/projection/bias", "image/pool/projection/kernel"]),
        ("siglip", ["text/projection", "text/projection_bias"]),
    ],
)
def test_projection_of_zeros_is_refused_by_name(tmp_path, name, parameters):
    """Its features are 0 / 0."""
    model = tiny_models.ARCHITECTURES[name]
    leaves = conversion.flat(tiny_models.params(model))
    for last, parameter in enumerate(parameters, start=1):
        leaves[parameter] = np.zeros_like(leaves[parameter])
        msgpack.write(tmp_path / "w.msgpack", conversion.nested(leaves), WeightsConfig(model))
        if last < len(parameters):  # kernel or bias is not 0
            reading.read(tmp_path / "w.msgpack")
    message = rf"w\.msgpack: parameter {parameters[0]}: expected a projection, got zeros alone, .*; use weights of a "
    with pytest.raises(ValueError, match=message):
        reading.read(tmp_path / "w.msgpack")


def test_logit_scale_has_to_be_a_logarithm_and_may_have_an_axis(tmp_path):
    tensors = dict(conversion.LazyTensors(VIT, tiny_models.params(VIT), name_tables.OPENAI))
    for stored, expected in ((np.float32([4.5]), 4.5), (np.array([[2.5]], "f4"), 2.5)):
        torch_file.write(tmp_path / "w.pt", tensors | {"logit_scale": stored})
        scale = reading.read(tmp_path / "w.pt", **GIVEN).params["logit_scale"]
        assert scale.shape == () and scale == expected
    torch_file.write(tmp_path / "w.pt", tensors | {"logit_scale": np.array(100.0)})
    message = r"w\.pt: tensor logit_scale: expected the natural logarithm .* got 100; replace it by .*, 4\.60517"
    with pytest.raises(ValueError, match=message):
        reading.read(tmp_path / "w.pt", **GIVEN)
    del tensors["logit_scale"]
    torch_file.write(tmp_path / "w.pt", tensors)
    with pytest.raises(ValueError, match=r"w\.pt: expected a tensor 'logit_scale' for logit_scale, got none"):
        reading.read(tmp_path / "w.pt", **GIVEN)


# ------------------------------------------------------------------------------------------- incomplete directories


def test_adapter_without_its_model_is_refused_with_the_call_that_merges_it(tmp_path):
    save_file({"base_model.model.q_proj.lora_A.weight": np.ones(2, "f4")}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "openai/clip-vit-base-patch32"}')
    with pytest.raises(
        ValueError, match=r"got an adapter of PEFT, .* merge .*PeftModel.from_pretrained\(model, '.*'\)"
    ):
        reading.read(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_variant_of_the_weights_is_read_by_its_name(tmp_path, sharded):
    """`save_pretrained(folder, variant="fp16")` of transformers; the name of an index is that of transformers 5."""
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    (tmp_path / "fp16").mkdir()
    for file in ("config.json", "preprocessor_config.json", "merges.txt", "vocab.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "dir" / file, tmp_path / "fp16")
    name = "model.fp16-00001-of-00002.safetensors" if sharded else "model.fp16.safetensors"
    shutil.copy(tmp_path / "dir/model.safetensors", tmp_path / "fp16" / name)
    if sharded:
        weight_map = dict.fromkeys(conversion.LazyTensors(VIT, tiny_models.params(VIT), name_tables.HUGGINGFACE), name)
        name = "model.safetensors.index.fp16.json"
        (tmp_path / "fp16" / name).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        ValueError, match=rf"expected a directory with one of .*, got {name}; give the file, e\.g\. .*{name}"
    ):
        reading.read(tmp_path / "fp16")
    assert reading.read(tmp_path / "fp16" / name).config.model == VIT


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "spiece.model"])
def test_git_lfs_pointers_are_refused_by_name(tmp_path, file):
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    for other in ("open_clip_model.safetensors", "open_clip_config.json", "vocab.json", "tokenizer_config.json"):
        (tmp_path / "dir" / other).unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "dir" / file).write_text(pointer)
    with pytest.raises(ValueError, match=f"dir/{file}: expected the file, got its Git LFS pointer; .* git lfs pull"):
        reading.read(tmp_path / "dir")
