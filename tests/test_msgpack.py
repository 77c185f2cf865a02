"""Weight files: what is read is what was written, or an error says why not."""

import hashlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from clip_jax.config import MODELS, Preprocess, TokenizerConfig, WeightsConfig
from clip_jax.interop import msgpack

CONFIG = WeightsConfig(MODELS["emoji"], source="a test")


def parameters():
    return {
        "image": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.zeros((0, 3), np.float32)},
        "text": {
            "half": np.float16([1.5, -2.0]),
            "brain": jnp.asarray([1.0, 3.0], jnp.bfloat16),
            "ids": np.int32([[7]]),
        },
        "logit_scale": np.float32(2.6593),
    }


def same(left, right):
    """Equal to the bit, names, shapes and dtypes included."""
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(map(np.asarray, jax.tree.leaves(left)), map(np.asarray, jax.tree.leaves(right)), strict=True)
    return all((a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()) for a, b in pairs)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "params.msgpack"
    msgpack.write(path, parameters(), CONFIG)
    return path


def test_round_trip_is_bit_identical(file):
    params, config = msgpack.read(file)
    assert same(params, parameters()) and config == CONFIG
    assert params["logit_scale"].shape == () and params["text"]["brain"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_every_models_config_travels(name, tmp_path):
    config = WeightsConfig(
        MODELS[name], preprocess=Preprocess(mean=(0.1, 0.2, 0.3), interpolation="bilinear", resize="squash"), source="é"
    )
    msgpack.write(tmp_path / "a", parameters(), config)
    assert msgpack.read(tmp_path / "a")[1] == config


def test_the_same_parameters_make_the_same_bytes(file, tmp_path):
    reordered = {key: parameters()[key] for key in reversed(parameters())}
    msgpack.write(tmp_path / "again", reordered, CONFIG)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_a_tokenizers_file_travels_inside(tmp_path):
    (tmp_path / "own.model").write_bytes(b"pieces")
    config = WeightsConfig(MODELS["emoji"], tokenizer=TokenizerConfig("sentencepiece", str(tmp_path / "own.model")))
    msgpack.write(tmp_path / "a", parameters(), config)
    (tmp_path / "own.model").unlink()
    read = msgpack.read(tmp_path / "a")[1]
    assert read.tokenizer_file == b"pieces" and read.tokenizer == config.tokenizer
    msgpack.write(tmp_path / "b", parameters(), read)  # the path leads nowhere now, and isn't needed
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_missing_tokenizers_file_is_refused_before_anything_is_written(tmp_path):
    config = WeightsConfig(MODELS["emoji"], tokenizer=TokenizerConfig("sentencepiece", "/nowhere.model"))
    with pytest.raises(ValueError, match=r"tokenizer\.path='/nowhere\.model'"):
        msgpack.write(tmp_path / "a", parameters(), config)
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------------- damage


def test_no_flipped_byte_changes_what_is_read(tmp_path):
    """Every byte of a small file, two ways: an error, or (a shape of -3 for 3) the very same parameters."""
    path = tmp_path / "params.msgpack"
    msgpack.write(path, parameters(), CONFIG)
    data = path.read_bytes()
    caught = 0
    for position in range(len(data)):
        for flip in (0x01, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                params, config = msgpack.read(path)
            except ValueError:
                caught += 1
            else:
                assert same(params, parameters()) and config == CONFIG, (position, flip)
    assert caught >= 2 * len(data) - 20


def test_flipped_bits_of_weights_are_damage_by_name(tmp_path):
    path = tmp_path / "big.msgpack"
    weights = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    msgpack.write(path, {"w": weights}, CONFIG)
    data = path.read_bytes()
    start = data.index(weights.tobytes())
    for offset in np.linspace(0, weights.nbytes - 1, 50).astype(int):
        damaged = bytearray(data)
        damaged[start + offset] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"big\.msgpack is damaged: its checksum does not fit"):
            msgpack.read(path)


def test_every_truncation_is_refused(file):
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match="is empty|is truncated|is damaged|is not a weight file"):
            msgpack.read(file)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"params\.msgpack is truncated: its {len(data) // 2:,} bytes end before"):
        msgpack.read(file)


def test_trailing_bytes_are_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is damaged"):
        msgpack.read(file)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip file, as torch writes them",
        b"{'format': 'clip_jax'}",
        serialization.msgpack_serialize({"vision_model": {"kernel": np.zeros(3)}}),
        serialization.msgpack_serialize([1, 2]),
    ],
)
def test_a_foreign_file_is_refused_by_how_it_begins(content, tmp_path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="is not a weight file.* begins with " + re.escape(repr(content[:12]))):
        msgpack.read(tmp_path / "other")


def test_a_newer_version_is_refused(file):
    content = serialization.msgpack_restore(file.read_bytes())
    file.write_bytes(serialization.msgpack_serialize({**content, "version": 2, "more": "x"}))
    with pytest.raises(ValueError, match="is of version 2, this clip_jax reads up to 1"):
        msgpack.read(file)


def test_a_config_key_that_is_unknown_is_named(file):
    """A hand-made file with a fitting checksum."""
    content = serialization.msgpack_restore(file.read_bytes())
    content["config"] = content["config"].replace('"source"', '"sauce"')
    content["sha256"] = msgpack._checksum(content)
    file.write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(ValueError, match="no key 'sauce'; did you mean 'source'"):
        msgpack.read(file)


def test_the_checksum_tells_shapes_dtypes_names_and_tokenizers_apart():
    base = {"config": "{}", "tokenizer": b"", "params": {"a": np.zeros(4, np.float32)}}
    variants = [
        base,
        base | {"config": "{ }"},
        base | {"tokenizer": b"x"},
        base | {"params": {"a": np.zeros((2, 2), np.float32)}},
        base | {"params": {"a": np.zeros(4, np.int32)}},
        base | {"params": {"b": np.zeros(4, np.float32)}},
        base | {"params": {"a": {"a": np.zeros(4, np.float32)}}},
    ]
    assert len({msgpack._checksum(variant) for variant in variants}) == len(variants)
    assert len(msgpack._checksum(base)) == hashlib.sha256().digest_size * 2


# ------------------------------------------------------------------------------------------------------- writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        msgpack.write(file, {"w": np.ones(9, np.float32)}, CONFIG)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_a_write_replaces_the_old_file_in_a_folder_that_it_makes(tmp_path):
    path = tmp_path / "new" / "folder" / "params.msgpack"
    for value in (1, 2):
        msgpack.write(path, {"w": np.full(9, value, np.float32)}, CONFIG)
    assert msgpack.read(path)[0]["w"][0] == 2 and os.listdir(path.parent) == [path.name]


def test_files_can_be_read_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        msgpack.write(tmp_path / "a", parameters(), CONFIG)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_remote_paths_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="gs://bucket/a is not a local path.*storage cp"):
        msgpack.write("gs://bucket/a", parameters(), CONFIG)


def test_a_missing_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        msgpack.read(tmp_path / "nothing")
