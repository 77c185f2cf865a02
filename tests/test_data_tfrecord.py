"""TFRecord shards: only damaged records are lost, and they are logged; errors give a working value."""

import base64
import io
import logging
import os
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.data import index as index_module
from clip_jax.data.sources import tfrecord
from clip_jax.data.storage import list_files
from clip_jax.typing import BadRecord
from tests import object_store


def _jpeg(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def _records(count, start=0):
    return [
        {"key": f"{i:05d}", "jpg": _jpeg(i), "txt": f"number {i}", "caption": "", "width": 8}
        for i in range(start, start + count)
    ]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "00000.tfrecord"
    tfrecord.write_tfrecord(path, _records(10))
    return path


def _open(*paths, cache_dir="", captions=("txt", "caption")):
    return tfrecord.TFRecordSource([str(path) for path in paths], captions, cache_dir)


def _offsets(path):
    """Return the offset of each record, from the lengths of TensorFlow's own reader."""
    lengths = [len(data.numpy()) for data in tf.data.TFRecordDataset([str(path)])]
    return np.cumsum([0, *(16 + length for length in lengths)])


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def _texts(source):
    found = []
    for index in range(len(source)):
        try:
            found.append(source.read(index).captions["txt"][0])
        except BadRecord as error:
            found.append(str(error))
    return found


def test_records_equal_those_of_tensorflow_s_reader(shard):
    source = _open(shard)
    assert len(source) == 10
    for index, data in enumerate(tf.data.TFRecordDataset([str(shard)])):
        features = tf.train.Example.FromString(data.numpy()).features.feature
        record = source.read(index)
        assert record.image == features["jpg"].bytes_list.value[0]
        assert record.key == f"{index:05d}"
        assert record.captions == {"txt": (f"number {index}",), "caption": ("",)}


def test_flipped_byte_loses_exactly_one_record(shard):
    _flip(shard, _offsets(shard)[4] + 40)
    texts = _texts(_open(shard))
    assert texts == [f"number {i}" if i != 4 else "checksum mismatch" for i in range(10)]


def test_flipped_checksum_loses_exactly_one_record(shard):
    _flip(shard, _offsets(shard)[5] - 2)
    assert [i for i, text in enumerate(_texts(_open(shard))) if text == "checksum mismatch"] == [4]


def test_truncated_last_record_is_skipped_and_logged(shard, caplog):
    shard.write_bytes(shard.read_bytes()[:-20])
    source = _open(shard)
    assert _texts(source) == [f"number {i}" for i in range(9)]
    assert f"{shard}: record 9" in caplog.text and "is truncated" in caplog.text


@pytest.mark.parametrize("left", [1, 8, 12, 15])
def test_fragment_of_a_header_is_a_truncation(shard, left, caplog):
    shard.write_bytes(shard.read_bytes()[: _offsets(shard)[9] + left])
    assert len(_open(shard)) == 9
    assert "is truncated" in caplog.text


def test_damaged_header_ends_only_its_shard(shard, tmp_path, caplog):
    other = tmp_path / "00001.tfrecord"
    tfrecord.write_tfrecord(other, _records(3, start=10))
    _flip(shard, _offsets(shard)[6] + 2)
    assert _texts(_open(shard, other)) == [f"number {i}" for i in (*range(6), 10, 11, 12)]
    assert f"{shard}: record 6" in caplog.text and "has a damaged header" in caplog.text


def test_length_beyond_the_end_of_the_file_allocates_nothing(shard):
    """A header with a correct checksum and a wrong length."""
    header = struct.pack("<Q", 2**60)
    shard.write_bytes(shard.read_bytes() + header + tfrecord._masked_crc(header) + b"x" * 50)
    assert len(_open(shard)) == 10


def test_empty_shard_is_logged_and_the_others_are_read(shard, tmp_path, caplog):
    empty = tmp_path / "00001.tfrecord"
    empty.touch()
    assert len(_open(shard, empty)) == 10
    assert f"{empty} is empty" in caplog.text


def test_complete_shard_logs_nothing(shard, caplog):
    with caplog.at_level(logging.WARNING):
        _open(shard)
    assert not caplog.records


def test_shards_without_records_raise_with_examples(tmp_path):
    empty = tmp_path / "a.tfrecord"
    empty.touch()
    with pytest.raises(ValueError, match=r"hold no records.*00000\.\.00331"):
        _open(empty)


BAD_RECORDS = {
    "no image feature; features are key, txt": {"key": "a", "txt": "b"},
    "no image feature; features are jpg": {"jpg": 7},
    "empty image": {"jpg": b"", "txt": "b"},
    "caption 'txt' is not UTF-8": {"jpg": _jpeg(0), "txt": b"caf\xe9"},
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_unusable_records_raise_with_the_reason(tmp_path, reason):
    tfrecord.write_tfrecord(tmp_path / "a.tfrecord", [BAD_RECORDS[reason]])
    with pytest.raises(BadRecord) as raised:
        _open(tmp_path / "a.tfrecord").read(0)
    assert str(raised.value) == reason


def test_bytes_that_are_no_example_raise(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "a.tfrecord")) as writer:
        writer.write(b"\xff\xff no protocol buffer")
    with pytest.raises(BadRecord, match="tf.train.Example"):
        _open(tmp_path / "a.tfrecord").read(0)


def test_deleted_file_gives_bad_records(shard):
    source = _open(shard)
    shard.unlink()
    with pytest.raises(BadRecord, match="unreadable"):
        source.read(0)


@pytest.mark.parametrize("name", ["png", "webp", "image"])
def test_image_feature_may_have_other_names(tmp_path, name):
    tfrecord.write_tfrecord(tmp_path / "a.tfrecord", [{name: b"bytes", "txt": "t"}])
    assert _open(tmp_path / "a.tfrecord").read(0).image == b"bytes"


def test_feature_may_have_several_captions(tmp_path):
    tfrecord.write_tfrecord(tmp_path / "a.tfrecord", [{"jpg": b"x", "keyword": ("dog", "犬"), "score": 0.5}])
    record = _open(tmp_path / "a.tfrecord", captions=("keyword", "absent")).read(0)
    assert record.captions == {"keyword": ("dog", "犬")}


def test_key_is_file_and_number_also_for_damaged_records(shard):
    _flip(shard, 40)
    assert _open(shard).key(0) == f"{shard}#0"


@pytest.mark.parametrize("index", [-1, 10])
def test_index_out_of_range_raises(shard, index):
    with pytest.raises(IndexError):
        _open(shard).read(index)


# ------------------------------------------------------------------------------------------------------ file names


def test_globs_braces_and_lists_give_the_same_shards(tmp_path):
    for i in range(3):
        tfrecord.write_tfrecord(tmp_path / f"{i:05d}.tfrecord", _records(2, 2 * i))
    paths = [f"{tmp_path}/{i:05d}.tfrecord" for i in range(3)]
    for files in (f"{tmp_path}/*.tfrecord", f"{tmp_path}/{{00000..00002}}.tfrecord", ", ".join(paths)):
        assert [file.path for file in list_files(files)] == paths


def test_leftovers_of_macos_are_no_shards(shard):
    for name in (f"._{shard.name}", "__MACOSX"):
        (shard.parent / name).write_bytes(b"resource fork")
    assert [file.path for file in list_files(f"{shard.parent}/*.tfrecord")] == [str(shard)]
    hidden = f"{shard.parent}/._*.tfrecord"
    assert [file.path for file in list_files(hidden)] == [f"{shard.parent}/._{shard.name}"]


ERRORS = {
    "": "data.files is empty; give files such as '/data/cc3m/",
    "/nowhere/*.tfrecord": "'/nowhere/\\*.tfrecord' matches no file.*a.tfrecord,b.tfrecord",
    "/nowhere/a.tfrecord": "'/nowhere/a.tfrecord' does not exist.*\\*.tfrecord",
    "/nowhere/{00..01}.tfrecord": "'/nowhere/00.tfrecord' does not exist",
    "/nowhere/{02..01}.tfrecord": "counts down; write {01..02}",
    "/nowhere/{a}.tfrecord": "no range such as {00000..00331}",
}


@pytest.mark.parametrize("files", ERRORS)
def test_wrong_files_raise_with_a_working_value(files):
    with pytest.raises(ValueError, match=ERRORS[files]):
        tfrecord.TFRecordSource.from_config(DataConfig(files=files))


def test_url_reads_the_same_records(shard):
    local = _open(shard)
    with object_store.serve({f"bucket/{shard.name}": shard.read_bytes()}):
        remote = _open(f"gs://bucket/{shard.name}")
        assert _texts(remote) == _texts(local)
    assert remote.fingerprint() == local.fingerprint()


# ---------------------------------------------------------------------------------------------- index, fingerprint


def test_index_is_cached_until_the_shard_changes(shard, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = _texts(_open(shard, cache_dir=cache))
    scans = []
    scan = index_module._scan
    monkeypatch.setattr(
        index_module, "_scan", lambda *arguments, **options: scans.append(1) or scan(*arguments, **options)
    )
    assert _texts(_open(shard, cache_dir=cache)) == first
    assert not scans
    os.utime(shard, ns=(1, 1))
    assert _texts(_open(shard, cache_dir=cache)) == first
    assert len(scans) == 1


def test_cache_dir_may_start_with_a_tilde(shard, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _open(shard, cache_dir="~/cache")
    assert len(list((tmp_path / "cache/index").glob("*.arrow"))) == 1


def test_truncation_is_logged_again_with_a_cached_index(shard, tmp_path, caplog):
    shard.write_bytes(shard.read_bytes()[:-1])
    for _ in range(2):
        caplog.clear()
        _open(shard, cache_dir=str(tmp_path / "cache"))
        assert "is truncated" in caplog.text


def test_a_folder_in_place_of_an_index_is_done_without(shard, tmp_path, caplog):
    cache = tmp_path / "cache"
    expected = _open(shard, cache_dir=str(cache)).fingerprint()
    (cached,) = (cache / "index").iterdir()
    cached.unlink()
    cached.mkdir()
    assert _open(shard, cache_dir=str(cache)).fingerprint() == expected and "index not cached" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"other bytes", b"ARROW1\0\0 damaged"])
def test_a_damaged_index_is_computed_again(shard, tmp_path, caplog, damage):
    cache = tmp_path / "cache"
    expected = tfrecord.TFRecordSource([str(shard)], ["txt"], str(cache)).fingerprint()
    (cached,) = (cache / "index").iterdir()
    intact = cached.read_bytes()
    cached.write_bytes(damage)
    assert tfrecord.TFRecordSource([str(shard)], ["txt"], str(cache)).fingerprint() == expected
    assert cached.read_bytes() == intact and f"{cached}: damaged, indexed again" in caplog.text


def test_an_unwritable_index_cache_is_done_without(shard, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    source = tfrecord.TFRecordSource([str(shard)], ["txt"], str(tmp_path / "file"))
    assert len(source) > 0 and "index not cached" in caplog.text


def test_fingerprint_depends_on_records_not_on_the_folder(shard, tmp_path):
    moved = tmp_path / "elsewhere" / shard.name
    moved.parent.mkdir()
    moved.write_bytes(shard.read_bytes())
    other = tmp_path / "00001.tfrecord"
    tfrecord.write_tfrecord(other, _records(2))
    alone = _open(shard).fingerprint()
    assert _open(moved).fingerprint() == alone
    assert _open(shard, other).fingerprint() == _open(other, shard).fingerprint() != alone
    shard.write_bytes(shard.read_bytes()[:-1])
    assert _open(shard).fingerprint() != alone


# ------------------------------------------------------------------------------------------------ another schema


def _record(tmp_path, features, captions=("txt", "caption"), **options):
    tfrecord.write_tfrecord(tmp_path / "a.tfrecord", [features])
    config = DataConfig(files=f"{tmp_path}/a.tfrecord", captions=dict.fromkeys(captions, 1.0), cache_dir="")
    return tfrecord.TFRecordSource.from_config(config, **options).read(0)


def test_options_name_the_features_of_another_schema(tmp_path):
    features = {"photo": base64.b64encode(b"bytes"), "jpg": b"thumbnail", "beschreibung": "Käse".encode("latin-1")}
    options = {"image": "photo", "image_encoding": "base64", "text_encoding": "latin-1"}
    record = _record(tmp_path, features, ["beschreibung"], **options)
    assert (record.image, record.captions) == (b"bytes", {"beschreibung": ("Käse",)})
    with pytest.raises(BadRecord, match="image 'jpg' is not base64"):
        _record(tmp_path, features | {"jpg": b"\xff\xd8"}, image="jpg", image_encoding="base64")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_encoding": "png"}, "data.options.image_encoding='png' is none of 'file', 'base64'"),
        ({"text_encoding": "latin-9000"}, "data.options.text_encoding: unknown encoding: latin-9000; give e.g."),
    ],
)
def test_unknown_encodings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _record(tmp_path, {"jpg": b"x"}, **options)


def test_numeric_captions_and_captions_under_text_are_read(tmp_path):
    assert _record(tmp_path, {"jpg": b"x", "txt": 2024}).captions == {"txt": ("2024",)}
    assert _record(tmp_path, {"jpg": b"x", "text": "a dog"}).captions == {"txt": ("a dog",)}
    assert _record(tmp_path, {"jpg": b"x", "text": "a dog"}, ["name"]).captions == {}  # the config names another
