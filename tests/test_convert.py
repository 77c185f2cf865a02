"""`python -m clip_jax.convert`, as a user types it."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from clip_jax.interop import conversion, name_tables, reading, torch_file
from tests import runs, tiny_models

ARCHITECTURE = tiny_models.ARCHITECTURES["vit"]


def _convert(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    command = [sys.executable, "-m", "clip_jax.convert", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    params = tiny_models.params(ARCHITECTURE)
    torch_file.write(folder / "theirs.pt", conversion.LazyTensors(ARCHITECTURE, params, name_tables.OPENAI))
    return folder


def test_from_torch_to_each_format_and_on_without_a_flag_lost(folder):
    result = _convert(folder, "theirs.pt", "ours.msgpack", "--activation=quick_gelu")
    assert result.returncode == 0, result.stderr
    for line in (
        "found    theirs.pt: OpenAI's names, torch",
        "parameters",
        "image:         64 px, 2 layers of 128, patches of 16 px",
        "text:          77 tokens of 49,408, 2 layers of 64",
        "activation:    quick_gelu",
        "preprocessing: shortest, bicubic, mean (0.48145466",
        "wrote    ours.msgpack: clip_jax.load('ours.msgpack')",
    ):
        assert line in result.stdout
    assert _convert(folder, "ours.msgpack", "ours.npz", "--to=npz").returncode == 0
    result = _convert(folder, "ours.npz", "dir", "--to=directory")
    assert "transformers:  AutoModel.from_pretrained('dir')" in result.stdout
    for file in ("ours.msgpack", "ours.npz", "dir", "dir/model.safetensors", "dir/open_clip_model.safetensors"):
        found = reading.read(folder / file)
        assert found.config.model == ARCHITECTURE
        jax.tree.map(np.testing.assert_array_equal, found.params, tiny_models.params(ARCHITECTURE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("theirs.pt",), "expected SRC and DST"),
        (("theirs.pt", "x.msgpack"), "does not say which activation"),
        (("nothing.pt", "x.msgpack"), "nothing.pt: there is no such file"),
        (
            ("theirs.pt", "x.msgpack", "--activation=gelu", "--image_size=50"),
            "image_size=50 is not a multiple of 16; use 48",
        ),
    ],
)
def test_wrong_input_ends_with_one_sentence_and_writes_nothing(folder, arguments, message):
    result = _convert(folder, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (folder / "x.msgpack").exists()
