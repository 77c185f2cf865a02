"""Hashes of a training source by Apache Beam, which pins older packages than the other tests use."""

import pytest

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
