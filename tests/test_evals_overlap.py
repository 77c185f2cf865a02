"""Near-duplicates by embedding and by hash, hashes of shards, and the overlap analysis of the paper."""

import builtins
import io
import logging
import math

import numpy as np
import pytest
import scipy.stats  # JAX depends on it
from PIL import Image

from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.evals.analysis import near_duplicates
from clip_jax.evals.analysis.near_duplicates import (
    MAX_DISTANCE,
    hash_images,
    nearest_hash,
    nearest_similarity,
    perceptual_hash,
)
from clip_jax.evals.analysis.overlap import analyze_overlap, binomial_p_value
from clip_jax.evals.metrics import Undefined

COSINE_TOLERANCE = 1e-6  # float32 dot products of unit vectors, another order of summation


def embeddings(n, seed, width=16):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def photo(seed, mirrored=False):
    """Return smooth blobs of color with noise, 320 × 240."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        (320, 240), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(blobs).astype(int) + rng.integers(-20, 21, (240, 320, 3))
    if mirrored:
        pixels = (pixels + pixels[:, ::-1]) // 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def copies(image):
    yield encoded(image, "JPEG", quality=20)
    yield encoded(image.resize((97, 73), Image.Resampling.LANCZOS), "JPEG", quality=60)
    yield encoded(image.resize((500, 500), Image.Resampling.BICUBIC), "WEBP", quality=50)
    yield encoded(image.point(lambda level: int(0.8 * level + 20)))
    yield encoded(image.convert("L"))


def bits(a, b):
    return int(np.bitwise_count(a ^ b))


# ------------------------------------------------------------------------------------------------- by embedding


@pytest.mark.parametrize("block", [1, 7, 50, 120])
def test_streamed_similarity_equals_dense(block, monkeypatch):
    monkeypatch.setattr(near_duplicates, "BLOCK_SCORES", 3 * block)  # several blocks of the evaluation images too
    queries, train = embeddings(20, 0), embeddings(120, 1)
    train[77] = 3 * queries[4]
    similarity, row = nearest_similarity(queries, (train[i : i + block] for i in range(0, 120, block)))
    dense = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        train / np.linalg.norm(train, axis=1, keepdims=True)
    ).T
    np.testing.assert_array_equal(row, dense.argmax(1))
    np.testing.assert_allclose(similarity, dense.max(1), atol=COSINE_TOLERANCE)
    assert row[4] == 77 and similarity[4] == pytest.approx(1, abs=COSINE_TOLERANCE)


def test_invalid_embeddings_are_logged_and_never_duplicates(caplog):
    queries, train = embeddings(5, 0), embeddings(6, 1)
    queries[1], queries[2, 3], train[0], train[4, 0] = np.nan, np.inf, np.nan, np.nan
    queries[3] = 0
    with caplog.at_level(logging.WARNING):
        similarity, row = nearest_similarity(queries, [train[:1], train[1:]])  # a block without valid embeddings
    assert np.isnan(similarity[1:4]).all() and (row[1:4] == -1).all()
    assert not (similarity[1:4] >= -1).any()
    usable = np.array([1, 2, 3, 5])
    alone = nearest_similarity(queries[[0, 4]], [train[usable]])[1]
    np.testing.assert_array_equal(row[[0, 4]], usable[alone])
    assert "3 evaluation images and 2 of 6 training images have an embedding" in caplog.text
    similarity, row = nearest_similarity(queries, [train[:1]])
    assert np.isnan(similarity).all() and (row == -1).all()


@pytest.mark.parametrize(
    "search, queries", [(nearest_similarity, embeddings(2, 0)), (nearest_hash, np.ones(2, np.uint64))]
)
def test_a_source_without_rows_is_rejected(search, queries):
    for blocks in ([], [queries[:0]]):
        with pytest.raises(ValueError, match="the training source has no rows: expected blocks"):
            search(queries, blocks)


# ------------------------------------------------------------------------------------------------------ by hash


@pytest.mark.parametrize("mirrored, furthest", [(False, MAX_DISTANCE), (True, 4)])
def test_hash_separates_copies_from_other_images(mirrored, furthest):
    """Half of the bits of a mirror-symmetric image are not informative; they must not be noise."""
    hashes = []
    for seed in range(12):
        original = photo(seed, mirrored)
        hashes.append(perceptual_hash(encoded(original)))
        assert max(bits(hashes[-1], perceptual_hash(copy)) for copy in copies(original)) <= furthest
    others = [bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(others) > furthest
    assert np.mean(others) > (12 if mirrored else 28)


def test_hash_equals_scipy_s_cosine_transform():
    image = photo(0).resize((32, 32))
    gray = np.asarray(image) @ [0.299, 0.587, 0.114]
    low = scipy.fft.dctn(gray, norm="ortho")[:8, :8].ravel()
    above = low > np.median(low[1:]) + 4
    assert int(perceptual_hash(encoded(image))) == int("".join(map(str, above.astype(int))), 2)


def test_hash_does_not_find_mirrored_or_cropped_copies():
    original = photo(3)
    mirrored, cropped = original.transpose(Image.Transpose.FLIP_LEFT_RIGHT), original.crop((80, 60, 320, 240))
    for copy in (mirrored, cropped):
        assert bits(perceptual_hash(encoded(original)), perceptual_hash(encoded(copy))) > MAX_DISTANCE


def test_images_without_a_hash_are_logged_and_never_duplicates(caplog):
    black, gray = Image.new("RGB", (64, 48)), Image.new("L", (50, 50), 128)
    gradient = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))
    without_hash = [encoded(black), encoded(gray, "JPEG"), encoded(gradient), b"not an image"]
    hashes = hash_images([*without_hash, encoded(photo(0))])
    assert (hashes[:4] == 0).all() and hashes[4] != 0
    with caplog.at_level(logging.WARNING):
        distance, row = nearest_hash(hashes, [hashes])
    assert distance.tolist() == [65] * 4 + [0] and row.tolist() == [-1] * 4 + [4]
    assert "4 evaluation images and 4 of 5 training images have no hash" in caplog.text
    with pytest.raises(ValueError, match="expected an image, got"):
        perceptual_hash(b"not an image")


@pytest.mark.parametrize("block, part", [(1, 512), (64, 10), (300, 512), (300, 37)])
def test_streamed_hashes_equal_dense(block, part, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BLOCK", part)
    rng = np.random.default_rng(0)
    queries, train = (rng.integers(1, 2**64, size, dtype=np.uint64) for size in (45, 300))
    train[[40, 250]] = queries[7] ^ np.uint64(1 << 63)  # equally near: the first one is returned
    train[100] = 0
    distance, row = nearest_hash(queries, (train[i : i + block] for i in range(0, 300, block)))
    dense = np.array([[bin(int(q) ^ int(t)).count("1") if t else 65 for t in train] for q in queries])
    np.testing.assert_array_equal(distance, dense.min(1))
    np.testing.assert_array_equal(row, dense.argmin(1))
    assert distance[7] == 1 and row[7] == 40


# ------------------------------------------------------------------------------------------------- the analysis


@pytest.mark.parametrize(
    "correct, n, probability, p_value",
    [  # scipy 1.17.1: binomtest(correct, n, probability, alternative="greater").pvalue
        (9, 10, 0.5, 0.0107421875),
        (1, 3, 0.0, 0.0),
        (0, 3, 0.0, 1.0),
        (2, 3, 1.0, 1.0),
        (0, 7, 0.3, 1.0),
        (7, 7, 0.3, 0.3**7),
    ],
)
def test_p_values_equal_scipy_s(correct, n, probability, p_value):
    assert binomial_p_value(correct, n, probability) == pytest.approx(p_value, rel=1e-10)


def test_p_value_and_interval_of_an_analysis_equal_scipy_s():
    rng = np.random.default_rng(0)
    for n in (1, 12, 300, 20_000):
        correct, clean_correct = int(rng.binomial(n, 0.62)), int(rng.binomial(500, 0.6))
        hits = np.arange(n) < correct
        hits = np.concatenate([hits, np.arange(500) < clean_correct])
        result = analyze_overlap(hits, np.arange(n + 500) < n)
        peer = scipy.stats.binomtest(correct, n, clean_correct / 500, alternative="greater")
        assert result.p_value == pytest.approx(peer.pvalue, rel=1e-8)
        ends = scipy.stats.binomtest(correct, n).proportion_ci(0.995, "exact")
        assert result.interval == pytest.approx(
            (ends.low - clean_correct / 500, ends.high - clean_correct / 500), abs=1e-8
        )


def test_analysis_by_hand():
    hits = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 0], bool)
    result = analyze_overlap(hits, np.arange(10) < 4, tests=3)
    assert (result.n, result.overlapping, result.fraction) == (10, 4, 0.4)
    assert (result.accuracy, result.accuracy_clean, result.accuracy_overlapping) == (0.5, 2 / 6, 0.75)
    assert result.gain == pytest.approx(0.5 - 1 / 3) and result.difference == pytest.approx(0.75 - 1 / 3)
    assert result.p_value == pytest.approx(4 * (1 / 3) ** 3 * (2 / 3) + (1 / 3) ** 4)
    assert result.p_corrected == pytest.approx(3 * result.p_value)
    assert analyze_overlap(hits, np.arange(10) < 4, tests=100).p_corrected == 1


def test_only_inflated_accuracy_is_significant():
    rng = np.random.default_rng(0)
    overlapping = rng.random(5000) < 0.1
    draws = rng.random(5000)
    inflated = analyze_overlap(draws < np.where(overlapping, 0.75, 0.6), overlapping, tests=35)
    equal = analyze_overlap(draws < 0.6, overlapping, tests=35)
    deflated = analyze_overlap(draws < np.where(overlapping, 0.3, 0.6), overlapping)
    assert inflated.significant and inflated.p_corrected < 1e-6 and inflated.gain > 0 and inflated.interval.low > 0
    assert not equal.significant and equal.interval.low < 0 < equal.interval.high
    assert deflated.p_value > 0.999 and deflated.gain < 0 and deflated.interval.high < 0


def test_from_images_to_p_value():
    """The model is correct on 30 copies of training images, and on half of 60 other images."""
    train = [photo(seed) for seed in range(30)]
    others = [encoded(photo(seed)) for seed in range(100, 160)]
    changed = [encoded(image.resize((120, 90)), "JPEG", quality=50) for image in train]
    distance, row = nearest_hash(hash_images([*changed, *others]), [hash_images(map(encoded, train))])
    overlapping = distance <= MAX_DISTANCE
    np.testing.assert_array_equal(overlapping, np.arange(90) < 30)
    np.testing.assert_array_equal(row[:30], np.arange(30))
    assert analyze_overlap((np.arange(90) < 30) | (np.arange(90) % 2 == 0), overlapping).p_value == pytest.approx(
        0.5**30
    )


def test_without_overlap_gain_is_zero_and_p_is_one():
    result = analyze_overlap(np.array([True, False]), np.zeros(2, bool), tests=35)
    assert (result.fraction, result.gain, result.p_value, result.p_corrected) == (0, 0, 1, 1)
    assert math.isnan(result.accuracy_overlapping) and math.isnan(result.difference) and math.isnan(result.interval.low)
    assert not result.significant


def test_invalid_inputs_are_rejected():
    with pytest.raises(Undefined, match="all 3 examples overlap: no clean example"):
        analyze_overlap(np.ones(3, bool), np.ones(3, bool))
    with pytest.raises(ValueError, match=r"expected bool\[n\] twice.*got bool\[0\] and bool\[0\]"):
        analyze_overlap(np.ones(0, bool), np.ones(0, bool))
    with pytest.raises(ValueError, match="tests=0: expected the number of evaluation datasets"):
        analyze_overlap(np.ones(3, bool), np.zeros(3, bool), tests=0)
    with pytest.raises(ValueError, match="expected 0 ≤ correct ≤ n .*got 4, 3 and 0.5"):
        binomial_p_value(4, 3, 0.5)


# ------------------------------------------------------------------------------------------------------- shards


def shards(folder):
    """Write two shards, the first with an image that can't be decoded, and an empty one."""
    paths = [str(folder / f"{number:05d}.tfrecord") for number in range(3)]
    broken = {"key": "x", "jpg": b"broken", "txt": "x"}
    images = [{"key": str(seed), "png": encoded(photo(seed)), "txt": "x"} for seed in range(5)]
    write_tfrecord(paths[0], [*images[:2], broken])
    write_tfrecord(paths[1], [])
    write_tfrecord(paths[2], images[2:])
    return paths


def test_rows_of_shard_hashes_map_to_records(tmp_path):
    paths, output = shards(tmp_path), tmp_path / "hashes"
    output.mkdir()
    for path in paths:
        near_duplicates.hash_shard(path, str(output))
    hashes = near_duplicates.read_hashes(str(output))
    assert [len(shard) for shard in hashes.values()] == [3, 0, 3] and hashes["00000.tfrecord"][2] == 0
    queries = hash_images([encoded(photo(seed), "JPEG") for seed in (1, 2, 4)] + [b"broken"])
    distance, row = nearest_hash(queries, hashes.values())
    assert (distance[:3] <= MAX_DISTANCE).all()
    assert [near_duplicates.record_name(hashes, int(r)) for r in row] == [
        *("00000.tfrecord#1", "00002.tfrecord#0", "00002.tfrecord#2", None)
    ]
    with pytest.raises(IndexError, match="row 6 of 6"):
        near_duplicates.record_name(hashes, 6)
    with pytest.raises(ValueError, match=r"has no file \*.hashes.npy: write them by hash_shards"):
        near_duplicates.read_hashes(str(tmp_path))


def test_without_beam_the_error_has_the_install_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_beam(name, *args, **options):
        if name.startswith("apache_beam"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_beam)
    with pytest.raises(ImportError, match="pip install apache-beam"):
        near_duplicates.hash_shards(["a.tfrecord"], str(tmp_path))
