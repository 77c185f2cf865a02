"""Every format in and out without the projects that they come from: names, containers, configurations, errors."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from clip_jax.config import MODELS, SIGLIP_PREPROCESS, Preprocess, TokenizerConfig, WeightsConfig, tokenizer_of
from clip_jax.interop import conversion, directory, hub, msgpack, name_tables, npz, positions, reading, torch_file
from tests import tiny_models, tiny_tokenizers

TINY = {name: model for name, model in tiny_models.ARCHITECTURES.items() if name != "siglip_timm"}
VIT = TINY["vit"]
TABLES = {
    "openai": (name_tables.OPENAI, ["vit", "vit_gelu", "layer_scale", "resnet", "clipa"]),
    "open_clip_siglip": (name_tables.OPEN_CLIP_SIGLIP, ["siglip"]),
    "huggingface": (name_tables.HUGGINGFACE, ["vit", "vit_gelu"]),
    "huggingface_siglip": (name_tables.HUGGINGFACE_SIGLIP, ["siglip"]),
    "huggingface_flax": (name_tables.HUGGINGFACE_FLAX, ["vit", "vit_gelu"]),
    "big_vision": (name_tables.BIG_VISION, ["siglip"]),
}
PAIRS = [(table, name) for table, (_, models) in TABLES.items() for name in models]


TOKENIZERS = [
    ("siglip", "sentencepiece", tiny_tokenizers.siglip_model),
    ("siglip", "huggingface", tiny_tokenizers.tokenizer_json),
    ("clipa", "huggingface", tiny_tokenizers.tokenizer_json),
]


def _equal(found, architecture, tolerance=0.0):
    ours, theirs = conversion.flat(tiny_models.params(architecture)), conversion.flat(found)
    assert ours.keys() == theirs.keys()
    for name, expected in ours.items():
        assert theirs[name].dtype == np.float32
        np.testing.assert_allclose(theirs[name], expected, rtol=tolerance, atol=tolerance / 100, err_msg=name)


def _theirs(name, table):
    return dict(conversion.LazyTensors(TINY[name], tiny_models.params(TINY[name]), TABLES[table][0]))


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_names_there_and_back_change_no_bit(table, name):
    tensors = _theirs(name, table)
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    _equal(conversion.params_from_tensors(TINY[name], tensors, TABLES[table][0], "x"), TINY[name])


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_a_missing_tensor_and_one_too_many_are_named(table, name):
    tensors = _theirs(name, table)
    for missing in list(tensors)[::7]:
        with pytest.raises(ValueError, match="file.pt has no tensor") as error:
            conversion.params_from_tensors(
                TINY[name], {k: v for k, v in tensors.items() if k != missing}, TABLES[table][0], "file.pt"
            )
        assert repr(missing) in str(error.value)
    with pytest.raises(ValueError, match="file.pt has 1 tensors that the model has no place for: stranger"):
        conversion.params_from_tensors(TINY[name], tensors | {"stranger": np.ones(2)}, TABLES[table][0], "file.pt")


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_a_wrong_shape_and_a_wrong_dtype_are_named(table, name):
    tensors = _theirs(name, table)
    wide = [key for key, tensor in tensors.items() if tensor.ndim and max(tensor.shape) > 1]
    for key in wide[::5]:
        grown = np.concatenate([tensors[key], tensors[key]])
        with pytest.raises(ValueError, match=r"f: the tensor .* has shape .*, expected .* for ") as error:
            conversion.params_from_tensors(TINY[name], tensors | {key: grown}, TABLES[table][0], "f")
        assert key in str(error.value) and str(grown.shape) in str(error.value)
        with pytest.raises(ValueError, match="is int8, expected floating point"):
            conversion.params_from_tensors(
                TINY[name], tensors | {key: tensors[key].astype(np.int8)}, TABLES[table][0], "f"
            )


def test_a_transposed_matrix_that_is_not_square_is_refused():
    tensors = _theirs("vit", "openai")
    with pytest.raises(ValueError, match=r"text_projection has shape \(32, 64\), expected \(64, 32\)"):
        conversion.params_from_tensors(
            VIT, tensors | {"text_projection": tensors["text_projection"].T}, name_tables.OPENAI, "f"
        )


# ------------------------------------------------------------------------------------------------------ containers


def test_safetensors_and_its_bfloat16_are_read(tmp_path):
    for dtype, tolerance in ((np.float32, 0.0), (np.float16, 2**-11), (ml_dtypes.bfloat16, 2**-8)):
        save_file({k: v.astype(dtype) for k, v in _theirs("vit", "openai").items()}, tmp_path / "w.safetensors")
        found = reading.read(tmp_path / "w.safetensors", activation="quick_gelu")
        assert found.config.model == VIT and found.format == "OpenAI's names, safetensors"
        _equal(found.params, VIT, tolerance)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_fall_away(tmp_path, prefix):
    torch_file.write(tmp_path / "w.pt", {prefix + name: tensor for name, tensor in _theirs("resnet", "openai").items()})
    found = reading.read(tmp_path / "w.pt", activation="quick_gelu")
    assert found.config.model == TINY["resnet"]
    _equal(found.params, TINY["resnet"])


def test_flax_msgpack_of_hugging_face_is_read(tmp_path):
    theirs = _theirs("vit", "huggingface_flax")
    # As FlaxCLIPModel of transformers 4.57.1 saved them: patches by height, width, colour; heads side by side.
    assert theirs["vision_model.embeddings.patch_embedding.kernel"].shape == (16, 16, 3, 128)
    for name in ("q_proj", "out_proj"):
        assert theirs[f"vision_model.encoder.layers.0.self_attn.{name}.kernel"].shape == (128, 128)
    tree = conversion.nested({name.replace(".", "/"): x for name, x in theirs.items()})
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    shutil.copy(tmp_path / "dir/config.json", tmp_path)
    found = reading.read(tmp_path)
    assert (found.config.model, found.format) == (VIT, "Hugging Face's Flax names, flax msgpack")
    _equal(found.params, VIT)
    data = (tmp_path / "flax_model.msgpack").read_bytes()
    (tmp_path / "flax_model.msgpack").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"flax_model\.msgpack is truncated or damaged"):
        reading.read(tmp_path)


def test_an_archive_that_unpacks_to_fill_the_memory_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", zeros=np.zeros(20_000_000, np.uint8))
    with pytest.raises(ValueError, match="bytes that unpack to 20,000,.* are no weights"):
        reading.read(tmp_path / "bomb.npz")


def test_shards_are_put_together_and_a_missing_one_is_named(tmp_path):
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    tensors = _theirs("vit", "huggingface")
    halves = {"model-1.safetensors": list(tensors)[::2], "model-2.safetensors": list(tensors)[1::2]}
    (tmp_path / "sharded").mkdir()
    shutil.copy(tmp_path / "dir/config.json", tmp_path / "sharded")
    for file, keys in halves.items():
        save_file({key: np.asarray(tensors[key], order="C") for key in keys}, tmp_path / "sharded" / file)
    index = tmp_path / "sharded/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in halves.items() for key in keys}}))
    found = reading.read(tmp_path / "sharded")
    assert found.config.model == VIT and found.format == "Hugging Face's names, safetensors in 2 shards"
    _equal(found.params, VIT)
    (tmp_path / "sharded/model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="lists the shard model-2.safetensors, and there is no such file"):
        reading.read(tmp_path / "sharded")
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(ValueError, match="lies in another folder"):
        reading.read(tmp_path / "sharded")
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index of shards"):
        reading.read(tmp_path / "sharded")


@pytest.mark.parametrize("kept", [0, 5, 9, 100, -10])
def test_a_truncated_safetensors_is_refused(tmp_path, kept):
    save_file(_theirs("vit_gelu", "openai"), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        reading.read(tmp_path / "w.safetensors", activation="gelu")


@pytest.mark.parametrize("content", [b"GIF89a....................", b"<html>not found</html>....", b"{}"])
def test_other_files_are_refused_with_what_is_read(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="no weight file that clip_jax knows.*torch's files, safetensors"):
        reading.read(tmp_path / "w")


def test_towers_that_are_not_built_are_refused_by_name(tmp_path):
    save_file({"visual.trunk.stem.0.weight": np.ones((2, 2), "f4")}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"a tower of timm's that clip_jax does not build \(visual.trunk.stem.0.weight"
    ):
        reading.read(tmp_path / "a.safetensors")
    save_file({"encoder.weight": np.ones((2, 2), "f4")}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="names such as encoder.weight"):
        reading.read(tmp_path / "a.safetensors")


# ---------------------------------------------------------------------------------------------------- what it means


def test_nothing_is_guessed_about_the_activation(tmp_path):
    torch_file.write(tmp_path / "w.pt", _theirs("vit", "openai"))
    with pytest.raises(ValueError, match=r"w\.pt does not say which activation.*'quick_gelu'.*'gelu'.*model='vit_b32'"):
        reading.read(tmp_path / "w.pt")
    for activation in ("quick_gelu", "gelu"):
        assert reading.read(tmp_path / "w.pt", activation=activation).config.model.text.activation == activation
    with pytest.raises(ValueError, match="activation='qick_gelu' is none of .*did you mean 'quick_gelu'"):
        reading.read(tmp_path / "w.pt", activation="qick_gelu")
    with pytest.raises(ValueError, match="model='vit_b23' is none of .*did you mean 'vit_b32'"):
        reading.read(tmp_path / "w.pt", model="vit_b23")


def test_a_model_of_another_shape_is_refused(tmp_path):
    torch_file.write(tmp_path / "w.pt", _theirs("vit", "openai"))
    with pytest.raises(ValueError, match=r"the tensor visual.class_embedding has shape \(128,\), expected \(768,\)"):
        reading.read(tmp_path / "w.pt", model="vit_b32")


@pytest.mark.parametrize(
    "name", ["rn50", "rn50x4", "vit_b32", "vit_l14_336", "vit_h14", "vit_bigg14", "siglip_so400m14"]
)
def test_shapes_tell_every_size(name, tmp_path):
    """Shapes alone: the arrays take no memory."""
    from clip_jax.config import with_activation
    from clip_jax.interop import infer_architecture

    model = MODELS[name]
    table = name_tables.OPEN_CLIP_SIGLIP if model.logit_bias else name_tables.OPENAI
    tensors = {}
    for path, (shape, layers) in conversion.parameter_shapes(model).items():
        place = table[path]
        for layer in range(layers) if layers else (0,):
            empty = np.broadcast_to(np.float32(0), conversion.tensor_shape(path, shape, place))
            tensors[place.name.format(layer + place.first)] = empty
    found = infer_architecture.architecture(tensors, table, "f")
    found = with_activation(found, model.text.activation)
    assert dataclasses.replace(found, text=model.text, image=model.image) == model
    text = dataclasses.replace(found.text, mlp_ratio=model.text.mlp_ratio)
    image = found.image if name.startswith("rn") else dataclasses.replace(found.image, mlp_ratio=model.image.mlp_ratio)
    assert (image, text) == (model.image, model.text)
    assert int(found.text.width * found.text.mlp_ratio) == int(model.text.width * model.text.mlp_ratio)


# --------------------------------------------------------------------------------------------------- our own files


@pytest.mark.parametrize("name", TINY)
def test_our_npz_and_msgpack_keep_everything(tmp_path, name):
    config = WeightsConfig(TINY[name], TokenizerConfig("sentencepiece", "x.model"), SIGLIP_PREPROCESS, "me", b"\0model")
    params = tiny_models.params(TINY[name])
    for module, file in ((npz, "w.npz"), (msgpack, "w.msgpack")):
        module.write(tmp_path / file, params, config)
        found = reading.read(tmp_path / file)
        assert found.config == config
        jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_our_files_need_no_model_and_refuse_another(tmp_path):
    msgpack.write(tmp_path / "w.msgpack", tiny_models.params(VIT), WeightsConfig(VIT))
    with pytest.raises(ValueError, match="model='vit_b32' is not what the file says"):
        reading.read(tmp_path / "w.msgpack", model="vit_b32")
    assert reading.read(tmp_path / "w.msgpack", activation="gelu").config.model.text.activation == "gelu"


# ------------------------------------------------------------------------------------------------------- directory


@pytest.mark.parametrize("name", TINY)
def test_a_directory_is_read_back_bit_by_bit(tmp_path, name):
    bpe = TINY[name].text.eos_id > 1
    tokenizer = TokenizerConfig("clip_bpe" if bpe else "sentencepiece")
    said = directory.write(tmp_path / "dir", tiny_models.params(TINY[name]), WeightsConfig(TINY[name], tokenizer))
    assert set(said) == {"transformers", "open_clip", "clip.load"}
    found = reading.read(tmp_path / "dir")
    assert found.config.model == TINY[name]
    _equal(found.params, TINY[name])


@pytest.mark.parametrize(("model", "kind", "content"), TOKENIZERS)
def test_a_directory_has_the_tokenizer_and_how_it_is_used(tmp_path, model, kind, content):
    expected = dataclasses.replace(tokenizer_of(TINY[model]), name=kind, path="some/where")
    config = WeightsConfig(TINY[model], expected, tokenizer_file=content())
    directory.write(tmp_path / "dir", tiny_models.params(TINY[model]), config)
    found = reading.read(tmp_path / "dir").config
    assert found.tokenizer_file == content()
    assert dataclasses.replace(found.tokenizer, path="some/where") == expected


@pytest.mark.parametrize(("name", "told"), [("vit", False), ("vit_gelu", True)])
def test_open_clip_is_told_of_a_vocabulary_that_is_not_its_own(tmp_path, name, told):
    directory.write(tmp_path / "dir", tiny_models.params(TINY[name]), WeightsConfig(TINY[name]))
    content = json.loads((tmp_path / "dir/open_clip_config.json").read_text())
    assert ("hf_tokenizer_name" in content["model_cfg"]["text_cfg"]) == told
    assert reading.read(tmp_path / "dir").config.tokenizer.name == "clip_bpe"


def test_what_a_project_has_no_form_for_is_left_out_with_its_reason(tmp_path):
    said = directory.write(tmp_path / "rn", tiny_models.params(TINY["resnet"]), WeightsConfig(TINY["resnet"]))
    assert said["transformers"].startswith("left out: transformers has no such model")
    assert not (tmp_path / "rn/config.json").exists() and (tmp_path / "rn/open_clip_config.json").exists()
    said = directory.write(tmp_path / "gelu", tiny_models.params(TINY["vit_gelu"]), WeightsConfig(TINY["vit_gelu"]))
    assert said["clip.load"].startswith("left out: OpenAI's code has QuickGELU")
    emoji = MODELS["emoji"]
    with pytest.raises(ValueError, match="open_clip has no tower like clip_jax's EdgeNet"):
        directory.write(tmp_path / "emoji", tiny_models.params(emoji), WeightsConfig(emoji))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gelu", "rn"]


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="exists; give a directory that doesn't"):
        directory.write(tmp_path, tiny_models.params(VIT), WeightsConfig(VIT))
    assert (tmp_path / "mine").read_text() == "precious"


def test_configs_that_ask_for_more_are_refused_by_key(tmp_path):
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    config = tmp_path / "dir/open_clip_config.json"
    content = json.loads(config.read_text())
    content["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="vision_cfg.attentional_pool=True asks for something that clip_jax does not"):
        reading.read(tmp_path / "dir")
    config.write_text("{")
    with pytest.raises(ValueError, match="open_clip_config.json is not JSON"):
        reading.read(tmp_path / "dir")


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of open_clip_model.safetensors"):
        reading.read(tmp_path)


def test_hugging_face_s_numbers_for_preprocessing_are_taken(tmp_path):
    config = WeightsConfig(
        VIT, preprocess=Preprocess(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    )
    directory.write(tmp_path / "dir", tiny_models.params(VIT), config)
    for file, like in (("model.safetensors", "huggingface"), ("open_clip_model.safetensors", "openai")):
        assert reading.read(tmp_path / "dir" / file).config.preprocess == dataclasses.replace(
            config.preprocess, implementation=like
        )
    processor = tmp_path / "dir/preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"resample": 1}))  # Lanczos
    with pytest.raises(ValueError, match=r"not by resample=1"):
        reading.read(tmp_path / "dir/model.safetensors")


# ---------------------------------------------------------------------------------------------- sizes, and published


def test_positions_are_resized_as_open_clip_does():
    """Linear ramps stay linear ramps away from the edges; the class token's row and everything else stay."""
    params = tiny_models.params(VIT)
    ramp = np.add.outer(np.arange(4.0), 10 * np.arange(4.0)).reshape(16, 1) * np.ones((16, 128))
    old = np.concatenate([params["image"]["positional_embedding"][:1], ramp]).astype(np.float32)
    params = params | {"image": params["image"] | {"positional_embedding": old}}
    model, resized = positions.resize(VIT, params, image_size=128, length=33)
    assert (model.image.image_size, model.text.length) == (128, 33)
    new = resized["image"]["positional_embedding"]
    np.testing.assert_array_equal(new[0], old[0])
    grid = new[1:].reshape(8, 8, 128)[2:6, 2:6, 0]
    np.testing.assert_allclose(np.diff(grid, axis=1), 5, atol=0.8)
    np.testing.assert_allclose(np.diff(grid, axis=0), 0.5, atol=0.1)
    text = np.asarray(params["text"]["positional_embedding"])
    assert resized["text"]["positional_embedding"].shape == (33, 64)
    # Position 16 of 33 has its middle where position 38 of 77 has it.
    np.testing.assert_allclose(resized["text"]["positional_embedding"][16], text[38], atol=1e-5)
    assert positions.resize(VIT, params) == (VIT, params)


@pytest.mark.parametrize(
    ("size", "length", "message"),
    [
        (100, 0, "image_size=100 is not a multiple of 16; use 96"),
        (8, 0, "less than a patch"),
        (0, 2, "context_length=2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size, length, message):
    with pytest.raises(ValueError, match=message):
        positions.resize(VIT, tiny_models.params(VIT), image_size=size, length=length)


def test_published_weights_are_found_where_openai_s_code_puts_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"weights of vit_l14_336 are not at .*ViT-L-14-336px\.pt.*clip\.load\('ViT-L/14@336px'"
    ):
        hub.locate("vit_l14_336")
    file = tmp_path / ".cache/clip/RN50.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert hub.locate("rn50") == file
    assert hub.locate("~/x.msgpack") == tmp_path / "x.msgpack"
