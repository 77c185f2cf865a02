"""Hashes and indices of a training source by Apache Beam, which pins older packages than the other tests use."""

import numpy as np
import pytest

from clip_jax import data
from clip_jax.config import DataConfig
from clip_jax.data import index
from clip_jax.evals.analysis import near_duplicates
from tests.test_evals_overlap import shards


def test_beam_skips_hashed_shards(tmp_path):
    paths, output = shards(tmp_path), str(tmp_path / "hashes")
    near_duplicates.hash_shards(paths[:1], output)
    first = tmp_path / "hashes/00000.tfrecord.hashes.npy"
    kept = first.stat().st_mtime_ns
    near_duplicates.hash_shards(paths, output)
    assert first.stat().st_mtime_ns == kept
    assert list(near_duplicates.read_hashes(output)) == ["00000.tfrecord", "00001.tfrecord", "00002.tfrecord"]
    with pytest.raises(ValueError, match="several shards are named '00000.tfrecord'"):
        near_duplicates.hash_shards([paths[0], "/elsewhere/00000.tfrecord"], output)


def test_beam_indexes_new_and_changed_shards(tmp_path, monkeypatch):
    expected, changed = tmp_path / "expected", tmp_path / "beam"
    for folder in (expected, changed):
        folder.mkdir()
        shards(folder)
    pattern = "{}/*.tfrecord".format
    data.index_files(pattern(changed), beam_options=["--runner=DirectRunner"])
    (changed / "00001.tfrecord").write_bytes((changed / "00000.tfrecord").read_bytes())
    (expected / "00001.tfrecord").write_bytes((expected / "00000.tfrecord").read_bytes())
    data.index_files(pattern(changed), beam_options=["--runner=DirectRunner"])
    data.index_files(pattern(expected))
    monkeypatch.setattr(index, "_scan", lambda *_, **__: pytest.fail("a shard is not in the index"))
    found, right = (data.make_source(DataConfig(files=pattern(folder), cache_dir="")) for folder in (changed, expected))
    assert found.fingerprint() == right.fingerprint()
    assert np.array_equal(found._index.start, right._index.start)
