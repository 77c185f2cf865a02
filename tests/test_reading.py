"""Reading and writing weight formats without the libraries that define them: names, containers, configs, errors."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from clip_jax.config import (
    MODELS,
    SIGLIP_PREPROCESS,
    Preprocess,
    TokenizerConfig,
    WeightsConfig,
    tokenizer_of,
)
from clip_jax.interop import (
    conversion,
    directory,
    formats,
    hub,
    msgpack,
    name_tables,
    npz,
    positions,
    reading,
    tokenizer_files,
    torch_file,
)
from clip_jax.tokenizers import ClipBPE
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
OPENAI = Preprocess(implementation="openai")
GIVEN = {"activation": "quick_gelu", "heads": (2, 1), "preprocess": "openai"}  # of "vit"
PAIRS = [(table, name) for table, (_, models) in TABLES.items() for name in models]
TOKENIZERS = [
    ("siglip", "sentencepiece", tiny_tokenizers.siglip_model),
    ("siglip", "huggingface", tiny_tokenizers.tokenizer_json),
    ("clipa", "huggingface", tiny_tokenizers.tokenizer_json),
]


def _assert_params(found, architecture, tolerance=0.0):
    expected, found = conversion.flat(tiny_models.params(architecture)), conversion.flat(found)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance / 100, err_msg=name)


def _tensors(name, table):
    return dict(conversion.LazyTensors(TINY[name], tiny_models.params(TINY[name]), TABLES[table][0]))


def _from_tensors(name, tensors, table, file="f"):
    return conversion.params_from_tensors(TINY[name], tensors, TABLES[table][0], file)


# ----------------------------------------------------------------------------------------------------- name tables


@pytest.mark.slow
@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_conversion_to_tensors_and_back_is_bit_equal(table, name):
    tensors = _tensors(name, table)
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    _assert_params(_from_tensors(name, tensors, table), TINY[name])


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_missing_and_additional_tensors_are_errors_with_their_names(table, name):
    tensors = _tensors(name, table)
    for missing in list(tensors)[::7]:
        with pytest.raises(ValueError, match=r"file\.pt: expected a tensor .* for .*, got none") as error:
            _from_tensors(name, {k: v for k, v in tensors.items() if k != missing}, table, "file.pt")
        assert repr(missing) in str(error.value)
    with pytest.raises(ValueError, match=r"file\.pt: expected no other tensors, got 1 unused: stranger"):
        _from_tensors(name, tensors | {"stranger": np.ones(2)}, table, "file.pt")


@pytest.mark.parametrize(("table", "name"), PAIRS)
def test_wrong_shapes_and_dtypes_are_errors_with_the_tensor_name(table, name):
    tensors = _tensors(name, table)
    not_scalar = [key for key, tensor in tensors.items() if tensor.ndim and max(tensor.shape) > 1]
    for key in not_scalar[::5]:
        doubled = np.concatenate([tensors[key], tensors[key]])
        with pytest.raises(ValueError, match=r"f: tensor .*: expected shape .* for .*, got ") as error:
            _from_tensors(name, tensors | {key: doubled}, table)
        assert key in str(error.value) and str(doubled.shape) in str(error.value)
        with pytest.raises(ValueError, match="expected floating point for .*, got int8"):
            _from_tensors(name, tensors | {key: tensors[key].astype(np.int8)}, table)


def test_transposed_rectangular_matrix_is_an_error():
    tensors = _tensors("vit", "openai")
    assert all(x.ctypes.data % 64 == 0 for x in jax.tree.leaves(_from_tensors("vit", tensors, "openai")))  # for JAX
    with pytest.raises(ValueError, match=r"text_projection: expected shape \(64, 32\) for .*, got \(32, 64\)"):
        _from_tensors("vit", tensors | {"text_projection": tensors["text_projection"].T}, "openai")


# ------------------------------------------------------------------------------------------------------ containers


def test_safetensors_are_read_in_float32_float16_and_bfloat16(tmp_path):
    for dtype, tolerance in ((np.float32, 0.0), (np.float16, 2**-11), (ml_dtypes.bfloat16, 2**-8)):
        save_file({k: v.astype(dtype) for k, v in _tensors("vit", "openai").items()}, tmp_path / "w.safetensors")
        found = reading.read(tmp_path / "w.safetensors", **GIVEN)
        assert found.config.model == VIT and found.format == "OpenAI names, safetensors"
        _assert_params(found.params, VIT, tolerance)


def test_flax_msgpack_of_hugging_face_is_read(tmp_path):
    tensors = _tensors("vit", "huggingface_flax")
    # Shapes as saved by FlaxCLIPModel of transformers 4.57.1.
    assert tensors["vision_model.embeddings.patch_embedding.kernel"].shape == (16, 16, 3, 128)
    for name in ("q_proj", "out_proj"):
        assert tensors[f"vision_model.encoder.layers.0.self_attn.{name}.kernel"].shape == (128, 128)
    tree = conversion.nested({name.replace(".", "/"): x for name, x in tensors.items()})
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    shutil.copy(tmp_path / "dir/config.json", tmp_path)
    found = reading.read(tmp_path)
    assert (found.config.model, found.format) == (VIT, "Hugging Face Flax names, flax")
    _assert_params(found.params, VIT)
    data = (tmp_path / "flax_model.msgpack").read_bytes()
    (tmp_path / "flax_model.msgpack").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"flax_model\.msgpack: expected Flax msgpack, got a truncated or damaged"):
        reading.read(tmp_path)


def test_decompression_bomb_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", zeros=np.zeros(20_000_000, np.uint8))
    with pytest.raises(ValueError, match=r"bomb\.npz: .* bytes that decompress to 20,000,"):
        reading.read(tmp_path / "bomb.npz")


def test_sharded_weights_are_merged_and_bad_indexes_are_refused(tmp_path):
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    tensors = _tensors("vit", "huggingface")
    halves = {f"model-0000{n + 1}-of-00002.safetensors": list(tensors)[n::2] for n in range(2)}
    (tmp_path / "sharded").mkdir()
    shutil.copy(tmp_path / "dir/config.json", tmp_path / "sharded")
    for file, keys in halves.items():
        save_file({key: np.asarray(tensors[key], order="C") for key in keys}, tmp_path / "sharded" / file)
    index = tmp_path / "sharded/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in halves.items() for key in keys}}))
    found = reading.read(tmp_path / "sharded")
    assert found.config.model == VIT and found.format == "Hugging Face names, shards"
    _assert_params(found.params, VIT)
    with pytest.raises(ValueError, match="got one shard; give its index"):
        reading.read(tmp_path / "sharded/model-00001-of-00002.safetensors")
    (tmp_path / "sharded/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected the shard model-00002-of-00002\.safetensors, got no such file"):
        reading.read(tmp_path / "sharded")
    for outside in ("../../etc/passwd", index.name, 5):
        index.write_text(json.dumps({"weight_map": {"x": outside}}))
        with pytest.raises(ValueError, match="expected weight files of the same directory"):
            reading.read(tmp_path / "sharded")
    index.write_text("[]")
    with pytest.raises(ValueError, match="expected JSON with a weight_map"):
        reading.read(tmp_path / "sharded")


@pytest.mark.parametrize("kept", [0, 5, 9, 100, -10])
def test_truncated_safetensors_are_refused(tmp_path, kept):
    save_file(_tensors("vit_gelu", "openai"), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        reading.read(tmp_path / "w.safetensors", activation="gelu")


@pytest.mark.parametrize(
    "content", [b"GIF89a....................", b"P6 2 2 255 ............", b"<html>not found</html>....", b"{}"]
)
def test_unknown_files_are_refused_with_the_known_formats(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="w: expected one of the formats flax, torch, safetensors.*, got a file that"):
        reading.read(tmp_path / "w")


def test_unsupported_towers_are_refused_with_a_tensor_name(tmp_path):
    save_file({"visual.trunk.stem.0.weight": np.ones((2, 2), "f4")}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"got an unsupported timm tower \(visual\.trunk\.stem\.0\.weight"):
        reading.read(tmp_path / "a.safetensors")
    save_file({"encoder.weight": np.ones((2, 2), "f4")}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"got names such as encoder\.weight"):
        reading.read(tmp_path / "a.safetensors")


# --------------------------------------------------------------------------------------------------- configuration


def test_one_tower_alone_is_refused_by_default(tmp_path):
    tensors = {name: x for name, x in _tensors("vit", "openai").items() if not name.startswith("visual.")}
    save_file(tensors, tmp_path / "text.safetensors")
    given = {"activation": "quick_gelu", "heads": (2, 1)}
    with pytest.raises(ValueError, match="expected weights of both towers, got none of the image tower"):
        reading.read(tmp_path / "text.safetensors", **given)
    found = reading.read(tmp_path / "text.safetensors", one_tower=True, **given)
    jax.tree.map(np.testing.assert_array_equal, found.params["text"], tiny_models.params(VIT)["text"])


@pytest.mark.parametrize("change", [sorted, lambda lines: sorted(lines, reverse=True), lambda lines: lines])
def test_merges_in_another_order_are_not_clip_s(tmp_path, change):
    lines = ClipBPE().as_huggingface()[1]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *change(list(lines)), ""]))
    found, content = tokenizer_files.read(tmp_path, MODELS["vit_b32"])
    assert (found == TokenizerConfig() and not content) == (change(list(lines)) == lines)


def test_unknown_activation_is_an_error_and_not_guessed(tmp_path):
    torch_file.write(tmp_path / "w.pt", _tensors("vit", "openai"))
    with pytest.raises(ValueError, match=r"w\.pt: expected an activation.*'quick_gelu'.*'gelu'.*model='vit_b32'"):
        reading.read(tmp_path / "w.pt", heads=(2, 1))
    for activation in ("quick_gelu", "gelu"):
        found = reading.read(tmp_path / "w.pt", **GIVEN | {"activation": activation}).config.model
        assert found.text.activation == found.image.activation == activation
    with pytest.raises(ValueError, match="activation.*qick_gelu.*did you mean 'quick_gelu'"):
        reading.read(tmp_path / "w.pt", activation="qick_gelu")
    with pytest.raises(ValueError, match="model.*vit_b23.*did you mean 'vit_b32'"):
        reading.read(tmp_path / "w.pt", model="vit_b23")


def test_given_model_with_other_shapes_is_an_error(tmp_path):
    torch_file.write(tmp_path / "w.pt", _tensors("vit", "openai"))
    with pytest.raises(ValueError, match=r"visual\.class_embedding: expected shape \(768,\) for .*, got \(128,\)"):
        reading.read(tmp_path / "w.pt", model="vit_b32")


# --------------------------------------------------------------------------------- formats with a clip_jax config


@pytest.mark.parametrize("name", TINY)
def test_npz_and_msgpack_keep_parameters_and_config(tmp_path, name):
    config = WeightsConfig(TINY[name], TokenizerConfig("sentencepiece", "x.model"), SIGLIP_PREPROCESS, "me", b"\0model")
    params = tiny_models.params(TINY[name])
    for module, file in ((npz, "w.npz"), (msgpack, "w.msgpack")):
        module.write(tmp_path / file, params, config)
        found = reading.read(tmp_path / file)
        assert found.config == config
        jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_stored_config_needs_no_model_and_another_model_is_an_error(tmp_path):
    msgpack.write(tmp_path / "w.msgpack", tiny_models.params(VIT), WeightsConfig(VIT))
    with pytest.raises(ValueError, match="model='vit_b32': expected the architecture in .*, got another; omit model"):
        reading.read(tmp_path / "w.msgpack", model="vit_b32")
    assert reading.read(tmp_path / "w.msgpack", activation="gelu").config.model.text.activation == "gelu"


# ------------------------------------------------------------------------------------------------------- directory


@pytest.mark.parametrize("name", TINY)
def test_directory_round_trip_is_bit_equal(tmp_path, name):
    bpe = TINY[name].text.eos_id > 1
    tokenizer = TokenizerConfig("clip_bpe" if bpe else "sentencepiece")
    report = directory.write(
        tmp_path / "dir", tiny_models.params(TINY[name]), WeightsConfig(TINY[name], tokenizer, OPENAI)
    )
    assert set(report) == {"transformers", "open_clip", "clip.load"}
    found = reading.read(tmp_path / "dir")
    assert found.config.model == TINY[name]
    _assert_params(found.params, TINY[name])


@pytest.mark.parametrize(("model", "kind", "content"), TOKENIZERS)
def test_directory_keeps_the_tokenizer_and_its_settings(tmp_path, model, kind, content):
    expected = dataclasses.replace(tokenizer_of(TINY[model]), name=kind, path="some/where")
    config = WeightsConfig(TINY[model], expected, OPENAI, tokenizer_file=content())
    directory.write(tmp_path / "dir", tiny_models.params(TINY[model]), config)
    found = reading.read(tmp_path / "dir").config
    assert found.tokenizer_file == content()
    assert dataclasses.replace(found.tokenizer, path="some/where") == expected


@pytest.mark.parametrize(("name", "is_local"), [("vit", False), ("vit_gelu", True)])
def test_open_clip_config_names_a_local_tokenizer_for_another_vocabulary(tmp_path, name, is_local):
    directory.write(tmp_path / "dir", tiny_models.params(TINY[name]), WeightsConfig(TINY[name], preprocess=OPENAI))
    content = json.loads((tmp_path / "dir/open_clip_config.json").read_text())
    assert ("hf_tokenizer_name" in content["model_cfg"]["text_cfg"]) == is_local
    assert reading.read(tmp_path / "dir").config.tokenizer.name == "clip_bpe"


def test_open_clip_config_keeps_epsilon_and_activation_of_both_towers(tmp_path):
    towers = [dataclasses.replace(x, norm_epsilon=1e-6, activation="gelu_tanh") for x in (VIT.image, VIT.text)]
    model = dataclasses.replace(VIT, image=towers[0], text=towers[1])
    directory.write(tmp_path / "dir", tiny_models.params(model), WeightsConfig(model, preprocess=OPENAI))
    assert reading.read(tmp_path / "dir/open_clip_model.safetensors").config.model == model


def _report(folder, model, spec=OPENAI):
    return directory.write(folder, tiny_models.params(model), WeightsConfig(model, preprocess=spec))


def test_libraries_without_the_model_are_skipped_with_the_reason(tmp_path):
    report = _report(tmp_path / "rn", TINY["resnet"])
    assert report["transformers"].startswith("skipped: transformers has no such model")
    assert not (tmp_path / "rn/config.json").exists() and (tmp_path / "rn/open_clip_config.json").exists()
    report = _report(tmp_path / "gelu", TINY["vit_gelu"])
    assert report["clip.load"].startswith("skipped: OpenAI's code has QuickGELU")
    report = _report(tmp_path / "half", VIT, dataclasses.replace(SIGLIP_PREPROCESS, implementation="openai"))
    assert report["clip.load"] == "skipped: OpenAI's code has its own preprocessing alone"
    with pytest.raises(ValueError, match="open_clip has no EdgeNet tower"):
        _report(tmp_path / "emoji", MODELS["emoji"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gelu", "half", "rn"]


def test_directory_with_files_is_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="expected a new or empty directory"):
        directory.write(tmp_path, tiny_models.params(VIT), WeightsConfig(VIT))
    assert (tmp_path / "mine").read_text() == "precious"


def test_unsupported_config_keys_are_errors_with_their_names(tmp_path):
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT))
    config = tmp_path / "dir/open_clip_config.json"
    content = json.loads(config.read_text())
    content["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    config.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"vision_cfg\.attentional_pool: expected a key that clip_jax supports, got True"
    ):
        reading.read(tmp_path / "dir")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"open_clip_config\.json: expected JSON"):
        reading.read(tmp_path / "dir")


def test_empty_directory_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a directory with one of open_clip_model\.safetensors.*, got an empty one"
    ):
        reading.read(tmp_path)
    (tmp_path / "weights.bin").touch()
    for read in (reading.read, directory.weight_file):
        with pytest.raises(ValueError, match=r"got weights\.bin; give the file, e\.g\. .*/weights\.bin"):
            read(tmp_path)


def test_preprocessing_of_hugging_face_configs_is_read(tmp_path):
    spec = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    directory.write(tmp_path / "dir", tiny_models.params(VIT), WeightsConfig(VIT, preprocess=spec))
    for file in ("model.safetensors", "open_clip_model.safetensors"):
        assert reading.read(tmp_path / "dir" / file).config.preprocess == spec
    (tmp_path / "dir/clip_jax_config.json").unlink()
    for file, implementation in (("model.safetensors", "huggingface"), ("open_clip_model.safetensors", "openai")):
        found = reading.read(tmp_path / "dir" / file).config.preprocess
        assert found == dataclasses.replace(spec, implementation=implementation)
    processor = tmp_path / "dir/preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"resample": 6}))
    with pytest.raises(ValueError, match="resample: expected one of .*, got 6"):
        reading.read(tmp_path / "dir/model.safetensors")


# ---------------------------------------------------------------------------------------------- position embeddings


def test_position_embeddings_are_resized_as_in_open_clip():
    """Linear ramps stay linear away from the edges; the class token's row and all other parameters are unchanged."""
    params = tiny_models.params(VIT)
    ramp = np.add.outer(np.arange(4.0), 10 * np.arange(4.0)).reshape(16, 1) * np.ones((16, 128))
    old = np.concatenate([params["image"]["positional_embedding"][:1], ramp]).astype(np.float32)
    params = params | {"image": params["image"] | {"positional_embedding": old}}
    model, resized = positions.resize(VIT, params, image_size=128, context_length=33)
    assert (model.image.image_size, model.text.context_length) == (128, 33)
    new = resized["image"]["positional_embedding"]
    np.testing.assert_array_equal(new[0], old[0])
    grid = new[1:].reshape(8, 8, 128)[2:6, 2:6, 0]
    np.testing.assert_allclose(np.diff(grid, axis=1), 5, atol=0.8)
    np.testing.assert_allclose(np.diff(grid, axis=0), 0.5, atol=0.1)
    text = np.asarray(params["text"]["positional_embedding"])
    assert resized["text"]["positional_embedding"].shape == (33, 64)
    # The center of position 16 of 33 is that of position 38 of 77.
    np.testing.assert_allclose(resized["text"]["positional_embedding"][16], text[38], atol=1e-5)
    assert positions.resize(VIT, params) == (VIT, params)
    assert positions.resize(VIT, params, context_length=3)[1]["text"]["positional_embedding"].shape == (3, 64)


@pytest.mark.parametrize(
    ("size", "length", "message"),
    [
        (100, 0, "image_size: expected a multiple of 16, got 100; use 96"),
        (8, 0, "image_size: expected a multiple of 16, got 8; use 128"),
        (0, 2, "context_length: expected at least 3, got 2"),
    ],
)
def test_invalid_sizes_are_refused(size, length, message):
    with pytest.raises(ValueError, match=message):
        positions.resize(VIT, tiny_models.params(VIT), image_size=size, context_length=length)


# --------------------------------------------------------------------------------------------------- published names


def test_openai_model_names_are_found_in_the_cache_of_openai_code(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    message = r"vit_l14_336: expected OpenAI's weights at .*ViT-L-14-336px\.pt.*clip\.load\('ViT-L/14@336px'"
    with pytest.raises(FileNotFoundError, match=message):
        hub.locate("vit_l14_336")
    file = tmp_path / ".cache/clip/RN50.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert hub.locate("rn50") == file
    assert hub.locate("~/x.msgpack") == tmp_path / "x.msgpack"


def test_formats_of_clip_jax_alone_are_written_to_urls():
    assert {name for name, entry in formats.FORMATS.items() if entry.writes_urls} == {"npz", "msgpack"}


def test_url_is_refused():
    with pytest.raises(ValueError, match=r"gs://bucket/w\.msgpack: expected a local path, got a URL"):
        reading.read("gs://bucket/w.msgpack")
