"""clip_jax weight files: round trip, damage, atomic writes."""

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


def is_bit_equal(left, right):
    """Compare names, shapes, dtypes and bytes."""
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
    assert is_bit_equal(params, parameters()) and config == CONFIG
    assert params["logit_scale"].shape == () and params["text"]["brain"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_config_of_every_preset_is_stored(name, tmp_path):
    config = WeightsConfig(
        MODELS[name], preprocess=Preprocess(mean=(0.1, 0.2, 0.3), interpolation="bilinear", resize="squash"), source="é"
    )
    msgpack.write(tmp_path / "a", parameters(), config)
    assert msgpack.read(tmp_path / "a")[1] == config


def test_bytes_do_not_depend_on_the_order_of_parameters(file, tmp_path):
    reordered = {key: parameters()[key] for key in reversed(parameters())}
    msgpack.write(tmp_path / "again", reordered, CONFIG)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_tokenizer_file_is_stored(tmp_path):
    (tmp_path / "own.model").write_bytes(b"pieces")
    config = WeightsConfig(MODELS["emoji"], tokenizer=TokenizerConfig("sentencepiece", str(tmp_path / "own.model")))
    msgpack.write(tmp_path / "a", parameters(), config)
    (tmp_path / "own.model").unlink()
    read = msgpack.read(tmp_path / "a")[1]
    assert read.tokenizer_file == b"pieces" and read.tokenizer == config.tokenizer
    msgpack.write(tmp_path / "b", parameters(), read)  # without the original tokenizer file
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_missing_tokenizer_file_is_an_error_and_nothing_is_written(tmp_path):
    config = WeightsConfig(MODELS["emoji"], tokenizer=TokenizerConfig("sentencepiece", "/nowhere.model"))
    with pytest.raises(ValueError, match=r"tokenizer\.path='/nowhere\.model'"):
        msgpack.write(tmp_path / "a", parameters(), config)
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------------- damage


def test_flipped_byte_is_an_error_or_changes_nothing(tmp_path):
    """Every byte of a small file, in two ways. A shape of -3 for 3 changes nothing."""
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
                assert is_bit_equal(params, parameters()) and config == CONFIG, (position, flip)
    assert caught >= 2 * len(data) - 20


def test_flipped_bit_in_weights_is_an_error_with_the_path(tmp_path):
    path = tmp_path / "big.msgpack"
    weights = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    msgpack.write(path, {"w": weights}, CONFIG)
    data = path.read_bytes()
    start = data.index(weights.tobytes())
    for offset in np.linspace(0, weights.nbytes - 1, 50).astype(int):
        damaged = bytearray(data)
        damaged[start + offset] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"big\.msgpack: damaged, the checksum does not match"):
            msgpack.read(path)


def test_every_truncated_file_is_refused(file):
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match="an empty file|a truncated file|damaged|a file that starts with"):
            msgpack.read(file)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"params\.msgpack: .* got a truncated file of {len(data) // 2:,} bytes"):
        msgpack.read(file)


def test_trailing_bytes_are_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="damaged"):
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
def test_file_of_another_format_is_refused_with_its_first_bytes(content, tmp_path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(
        ValueError,
        match="got a file that starts with " + re.escape(repr(content[:12])),
    ):
        msgpack.read(tmp_path / "other")


def test_newer_version_is_refused(file):
    content = serialization.msgpack_restore(file.read_bytes())
    file.write_bytes(serialization.msgpack_serialize({**content, "version": 2, "more": "x"}))
    with pytest.raises(ValueError, match="expected version 1, got 2; install a newer clip_jax"):
        msgpack.read(file)


def test_older_version_is_refused(file):
    content = serialization.msgpack_restore(file.read_bytes())
    content["version"] = 0
    content["sha256"] = msgpack._checksum(content)
    file.write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(ValueError, match="damaged"):
        msgpack.read(file)


def test_unknown_config_key_is_an_error_with_its_name(file):
    """The checksum is recomputed, so only the key is wrong."""
    content = serialization.msgpack_restore(file.read_bytes())
    content["config"] = content["config"].replace('"source"', '"sauce"')
    content["sha256"] = msgpack._checksum(content)
    file.write_bytes(serialization.msgpack_serialize(content))
    with pytest.raises(ValueError, match="no key 'sauce'; did you mean 'source'"):
        msgpack.read(file)


def test_checksum_depends_on_shapes_dtypes_names_config_and_tokenizer():
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


def test_large_arrays_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(msgpack, "_MAX_PIECE", 64)
    params = {"w": np.arange(100, dtype=np.float32).reshape(4, 25)}
    msgpack.write(tmp_path / "w", params, CONFIG)
    np.testing.assert_array_equal(msgpack.read(tmp_path / "w")[0]["w"], params["w"])


def test_failed_write_keeps_the_old_file_and_leaves_no_other(file, monkeypatch):
    before = file.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        msgpack.write(file, {"w": np.ones(9, np.float32)}, CONFIG)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_write_creates_the_folder_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "new" / "folder" / "params.msgpack"
    for value in (1, 2):
        msgpack.write(path, {"w": np.full(9, value, np.float32)}, CONFIG)
    assert msgpack.read(path)[0]["w"][0] == 2 and os.listdir(path.parent) == [path.name]


def test_file_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        msgpack.write(tmp_path / "a", parameters(), CONFIG)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_reading_a_remote_path_is_refused_with_an_alternative():
    with pytest.raises(ValueError, match="gs://bucket/a: expected a local path, got a URL.*storage cp"):
        msgpack.read("gs://bucket/a")


def test_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        msgpack.read(tmp_path / "nothing")
