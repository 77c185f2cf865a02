"""Fingerprints of folders, Arrow and Parquet files: contents that change at equal names."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax import data
from clip_jax.config import DataConfig


def _fingerprint(folder):
    return data.make_source(DataConfig(files=str(folder), cache_dir="")).fingerprint()


def test_changed_contents_of_a_folder_change_its_fingerprint(tmp_path):
    """At equal names and sizes, by modification times; also of captions."""
    for name in ("0", "1"):
        (tmp_path / f"{name}.png").write_bytes(b"image")
        (tmp_path / f"{name}.txt").write_text("a dog")
    first = _fingerprint(tmp_path)
    assert _fingerprint(tmp_path) == first
    for name in ("1.png", "1.txt"):
        os.utime(tmp_path / name, (0, 0))
        second = _fingerprint(tmp_path)
        assert second != first and second.split()[0] == first.split()[0]
        first = second
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    assert _fingerprint(tmp_path).split()[0] != first.split()[0]


@pytest.mark.parametrize(
    ("column", "value"), [("caption", "a cat"), ("image", {"bytes": b"longer", "path": None}), ("written", "another")]
)
def test_changed_contents_of_arrow_files_change_their_fingerprint(tmp_path, column, value):
    rows = {"image": [{"bytes": b"image", "path": None}] * 900, "caption": ["a dog"] * 900, "written": "one"}

    def fingerprint():
        part = pa.table({name: rows[name] for name in ("image", "caption")})
        with pa.ipc.new_stream(str(tmp_path / "0.arrow"), part.schema) as writer:
            writer.write_table(part)
        state = {"_data_files": [{"filename": "0.arrow"}], "_fingerprint": rows["written"]}
        (tmp_path / "state.json").write_text(json.dumps(state))
        (tmp_path / "dataset_info.json").write_text("{}")
        return _fingerprint(tmp_path)

    first = fingerprint()
    assert fingerprint() == first
    rows[column] = value if column == "written" else [*rows[column][:-1], value]
    assert fingerprint().split()[0] == first.split()[0] and fingerprint() != first


def test_changed_values_of_parquet_change_its_fingerprint(tmp_path):
    def fingerprint(caption):
        rows = {"image": [b"image"] * 4, "caption": ["a dog"] * 3 + [caption]}
        pq.write_table(pa.table(rows), tmp_path / "0.parquet", compression="none", use_dictionary=False)
        return _fingerprint(tmp_path)

    assert fingerprint("zebra 1") == fingerprint("zebra 1") != fingerprint("zebra 2")
