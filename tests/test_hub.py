"""Repositories of the Hugging Face hub: the files that are downloaded, by a fake of huggingface_hub."""

import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from clip_jax.config import WeightsConfig
from clip_jax.interop import conversion, directory, hub, reading
from tests import tiny_models

MODEL = tiny_models.ARCHITECTURES["vit"]
COPIES = (
    *("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.fp16.safetensors"),
    *("onnx/model.onnx", "onnx/config.json", "rust_model.ot", "README.md", "images/dog.png"),
)
CONFIGS = ("config.json", "preprocessor_config.json", "merges.txt", "vocab.json", "tokenizer.json")
SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("listed", "weights"),
    [
        (COPIES, {"model.safetensors"}),
        ((*COPIES, "open_clip_model.safetensors"), {"open_clip_model.safetensors"}),
        ((*COPIES[1:], INDEX, *SHARDS, "model.fp16-00001-of-00002.safetensors"), {INDEX, *SHARDS}),
        (("flax_model.msgpack", "README.md"), {"flax_model.msgpack"}),
        (("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"),) * 2,
    ],
)
def test_one_copy_of_the_weights_and_its_configs_are_needed(listed, weights):
    assert {*hub.needed_files([*listed, *CONFIGS], "n")} == {*weights, *CONFIGS}


def test_sentence_transformers_layout_needs_the_files_of_its_model():
    listed = ["modules.json", "config.json", "README.md", "0_CLIPModel/vocab.txt"]
    nested = [f"0_CLIPModel/{file}" for file in ("model.safetensors", "pytorch_model.bin", "config.json", "merges.txt")]
    assert hub.needed_files(listed + nested, "n") == [nested[i] for i in (2, 3, 0)]


def test_repository_without_weights_is_refused():
    with pytest.raises(
        ValueError, match="hf-hub:a/b: .*, got adapter_model.safetensors; .*hf download a/b --local-dir"
    ):
        hub.needed_files(["config.json", "adapter_model.safetensors"], "hf-hub:a/b")


class _FakeHub(types.ModuleType):
    """A hub with one repository, `owner/clip` at revision `v2`, whose files are in a folder."""

    def __init__(self, folder, cache):
        super().__init__("huggingface_hub")
        self.folder, self.cache, self.online = folder, cache, True

    def list_repo_files(self, repository, *, revision):
        if not self.online:
            raise ConnectionError("no route to host\nat all")
        if (repository, revision) != ("owner/clip", "v2"):
            raise OSError(f"404: no {repository} at {revision}")
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def snapshot_download(self, repository, *, revision, allow_patterns=(), local_files_only=False):
        if local_files_only and not (self.cache.exists() and repository == "owner/clip"):
            raise FileNotFoundError("not in the cache")
        for name in allow_patterns:
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, self.cache / name)
        return str(self.cache)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    directory.write(folder, tiny_models.params(MODEL), WeightsConfig(MODEL))
    for name in ("tf_model.h5", "pytorch_model.bin"):
        (folder / name).write_bytes(bytes(1000))
    fake = _FakeHub(folder, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_repository_at_a_revision_is_read_and_offline_from_the_cache(fake):
    for online in (True, False):
        fake.online = online
        found = reading.read("hf-hub:owner/clip@v2")
        assert found.config.model == MODEL and found.format == "OpenAI names, safetensors"
        expected = conversion.flat(tiny_models.params(MODEL))
        np.testing.assert_array_equal(conversion.flat(found.params)["text/projection"], expected["text/projection"])
    weights = [path.name for path in fake.cache.rglob("*") if path.suffix not in (".json", ".txt")]
    assert weights == ["open_clip_model.safetensors"]


@pytest.mark.parametrize("name", ["hf-hub:owner/clip", "hf-hub:owner/clip@v1", "hf-hub:nobody/clip@v2"])
def test_missing_repository_or_revision_is_one_sentence(fake, name):
    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    message = rf"{name}: expected a repository on the hub or in its cache, got OSError: 404: no {repository} at"
    with pytest.raises(FileNotFoundError, match=f"{message} {revision or None}; check name and revision") as error:
        reading.read(name)
    assert "\n" not in str(error.value)


def test_sentence_transformers_folder_is_read(fake, tmp_path):
    root = tmp_path / "st"
    root.mkdir()
    fake.folder.rename(root / "0_CLIPModel")
    (root / "modules.json").write_text("[]")
    assert reading.read(root).config.model == MODEL
    assert directory.model_folder(pathlib.Path(root)) == root / "0_CLIPModel"
