"""The command `python -m clip_jax.convert`."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest

from clip_jax.config import Preprocess, WeightsConfig
from clip_jax.inference import load
from clip_jax.interop import conversion, msgpack, name_tables, pixel_differences, reading, torch_file
from clip_jax.interop.convert import convert
from tests import commands, runs, tiny_models

GIVEN = ("--activation=quick_gelu", "--heads=2,1", "--preprocess=openai")  # of "vit"
ARCHITECTURE = tiny_models.ARCHITECTURES["vit"]


def _convert(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    return commands.run(["-m", "clip_jax.convert", *arguments], cwd=folder, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    params = tiny_models.params(ARCHITECTURE)
    torch_file.write(folder / "openai.pt", conversion.LazyTensors(ARCHITECTURE, params, name_tables.OPENAI))
    return folder


def test_torch_to_msgpack_to_npz_to_directory_keeps_all_weights(folder):
    result = _convert(folder, "openai.pt", "w.msgpack", *GIVEN)
    assert result.returncode == 0, result.stderr
    for line in (
        "found    openai.pt: OpenAI names, torch",
        "parameters",
        "image:         64 px, 2 layers of 128, patches of 16 px",
        "text:          77 tokens of 49,408, 2 layers of 64",
        "activation:    quick_gelu",
        "preprocessing: shortest, bicubic, mean (0.48145466",
        "wrote    w.msgpack: clip_jax.load('w.msgpack')",
    ):
        assert line in result.stdout
    assert _convert(folder, "w.msgpack", "w.npz", "--to=npz").returncode == 0
    result = _convert(folder, "w.npz", "dir", "--to=directory")
    assert "transformers:  AutoModel.from_pretrained('dir')" in result.stdout
    assert "pixels" not in result.stdout  # OpenAI's preprocessing, which all libraries have
    for file in ("w.msgpack", "w.npz", "dir", "dir/model.safetensors", "dir/open_clip_model.safetensors"):
        found = reading.read(folder / file)
        assert found.config.model == ARCHITECTURE
        jax.tree.map(np.testing.assert_array_equal, found.params, tiny_models.params(ARCHITECTURE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("openai.pt",), "expected SRC and DST"),
        (("openai.pt", "x.msgpack"), "expected the attention heads of the text tower (width 64, no preset)"),
        (("openai.pt", "x.msgpack", "--heads=2,1"), "expected an activation, got none"),
        (
            ("openai.pt", "x.msgpack", *GIVEN[:2]),
            "expected the preprocessing, of an image tower without preset, got none",
        ),
        (("openai.pt", "x.msgpack", "--heads=2"), "--heads: expected two numbers such as 12,8, got 2"),
        (("openai.pt", "/dev/full"), "target=/dev/full: expected a file or a directory or a new path, got a device"),
        (("openai.pt", "x.msgpack", "--to=torch"), "--to: expected one of directory, npz, msgpack, got 'torch'"),
        (("nothing.pt", "x.msgpack"), "nothing.pt: expected a file or directory"),
        (
            ("openai.pt", "x.msgpack", *GIVEN, "--image_size=50"),
            "multiple of 16, got 50; use 48",
        ),
    ],
)
def test_wrong_input_exits_with_one_line_and_writes_nothing(folder, arguments, message):
    result = _convert(folder, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (folder / "x.msgpack").exists()


def test_differences_of_pixels_of_a_model_trained_here_are_reported_and_restored(tmp_path):
    spec = Preprocess()
    msgpack.write(
        tmp_path / "w.msgpack", tiny_models.params(ARCHITECTURE), WeightsConfig(ARCHITECTURE, preprocess=spec)
    )
    summary = convert(tmp_path / "w.msgpack", tmp_path / "dir", to="directory")
    for text in (summary, (tmp_path / "dir/README.md").read_text()):
        assert "composites transparent images on white" in text and "transformers rounds crop offsets down" in text
    assert spec.implementation == "clip_jax"
    images = pixel_differences.synthetic_images(64, spec)
    own_nE, found = load(tmp_path / "dir").encode_image(images), {}
    for implementation in ("huggingface", "openai"):
        other = load(tmp_path / "dir", preprocess=dataclasses.replace(spec, implementation=implementation))
        cosines = (own_nE * other.encode_image(images)).sum(axis=1)
        found[implementation] = " and ".join(f"{half.min():.4f}" for half in (cosines[:2], cosines[2:]))
    printed = "transformers {huggingface}, open_clip {openai}, clip.load {openai}".format(**found)
    assert printed in summary and printed in (tmp_path / "dir/README.md").read_text()
    assert found["openai"].startswith("1.0000 and 0.") and re.match(r"0\..* and 0\.", found["huggingface"])
    for file in ("dir", "dir/model.safetensors", "dir/open_clip_model.safetensors"):
        assert reading.read(tmp_path / file).config.preprocess == spec
    (tmp_path / "dir/clip_jax_config.json").write_text('{"preprocess": {"implementation": "mine"}}')
    with pytest.raises(
        ValueError, match=r"clip_jax_config\.json: expected preprocess\.implementation 'clip_jax' alone"
    ):
        reading.read(tmp_path / "dir")
