"""Weights in bfloat16: in memory, on the device and in files, without a float32 copy of the whole."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest

from clip_jax import load
from clip_jax.config import WeightsConfig
from clip_jax.interop import conversion, msgpack, name_tables, reading, torch_file
from clip_jax.interop.convert import convert
from tests import tiny_models

_BLOCKS = dataclasses.replace(
    tiny_models.ARCHITECTURES["vit"].text, vocab_size=4096, eos_id=4095, layers=6, width=256, heads=4
)
HALF = dataclasses.replace(tiny_models.ARCHITECTURES["vit"], text=_BLOCKS)  # 6 M parameters, mostly in blocks


@pytest.fixture(scope="module")
def half_files(tmp_path_factory):
    """Return a state dict in float32 and a clip_jax file with the same parameters."""
    folder, params = tmp_path_factory.mktemp("half"), tiny_models.params(HALF)
    torch_file.write(folder / "w.pt", conversion.LazyTensors(HALF, params, name_tables.OPENAI))
    msgpack.write(folder / "w.msgpack", params, WeightsConfig(HALF))
    return folder / "w.pt", folder / "w.msgpack"


def _given(file):
    return {"activation": "quick_gelu", "heads": (2, 4), "preprocess": "openai"} if file.suffix == ".pt" else {}


@pytest.mark.parametrize("index", [0, 1])
def test_bfloat16_parameters_take_half_the_memory_and_are_never_float32(half_files, index):
    file = half_files[index]
    full = sum(leaf.nbytes for leaf in jax.tree.leaves(reading.read(file, **_given(file)).params))
    tracemalloc.start()
    params = reading.read(file, dtype="bfloat16", **_given(file)).params
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (0.75 if index == 0 else 1.75) * full  # msgpack holds the file's content once
    model = load(file, dtype="bfloat16", **_given(file))
    for found in (params, model.params):
        leaves = conversion.flat(found)
        assert {leaf.dtype.name for leaf in leaves.values() if leaf.ndim} == {"bfloat16"}
        assert leaves["logit_scale"].dtype == np.float32
        assert sum(leaf.nbytes for leaf in leaves.values()) <= full / 2 + 8


def test_bfloat16_embeddings_have_the_direction_of_float32(half_files):
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    file, texts = half_files[1], ["a dog", "two cats"]
    full, half = (load(file, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for expected, found in (
        (full.encode_image(images), half.encode_image(images)),
        (full.encode_text(texts), half.encode_text(texts)),
    ):
        assert found.dtype == np.float32
        cosines = (expected * found).sum(axis=1)
        assert cosines.min() > 0.999 and np.abs(expected - found).max() > 1e-5
    resized = load(file, dtype="bfloat16", image_size=96, context_length=33)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(resized.params) if leaf.ndim} == {"bfloat16"}
    with pytest.raises(ValueError, match="dtype.*expected.*bfloat16|dtype.*'float16'"):
        load(file, dtype="float16")


def test_converted_bfloat16_weights_are_read_as_stored(half_files, tmp_path):
    for to in ("msgpack", "npz"):
        convert(half_files[1], tmp_path / f"half.{to}", to=to, dtype="bfloat16")
        params = reading.read(tmp_path / f"half.{to}").params
        assert {np.asarray(leaf).dtype.name for leaf in jax.tree.leaves(params) if np.ndim(leaf)} == {"bfloat16"}
        assert load(tmp_path / f"half.{to}").params["text"]["projection"].dtype == np.float32
    with pytest.raises(ValueError, match="--dtype=bfloat16: expected --to=msgpack or npz, got directory"):
        convert(half_files[1], tmp_path / "dir", to="directory", dtype="bfloat16")
