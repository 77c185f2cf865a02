"""Features on disk: their keys, damaged files, concurrent and killed writers."""

import dataclasses
import io
import os
import time

import numpy as np
import pytest

from clip_jax.evals import embed
from clip_jax.evals.embed import DiskCachedEmbedder, FeatureCache
from tests.tiny_dataset import CLASSES, SPLITS, Perfect, evaluate, split


def test_features_are_computed_once_per_model_and_split(monkeypatch, tmp_path):
    def calls(directory=tmp_path, evaluators=("zeroshot", "linear_probe"), **options):
        embedder = Perfect()
        report = evaluate(monkeypatch, embedder, evaluators=evaluators, directory=directory, **options)
        results.append(report.metrics)
        return embedder.image_calls

    results = []
    # Embeddings of the test split, features of the training and test splits.
    assert calls() == 3
    assert calls() == 0
    assert calls(evaluators=("few_shot", "linear_probe", "zeroshot")) == 0
    assert calls(model="another") == 3
    assert calls(splits=SPLITS | {"test": split(first=700)}) == 2  # as many images, but others
    assert calls() == 0
    assert calls(directory="") > 0
    assert calls(directory="") > 0
    assert results[0] == results[1] == results[3] == results[5] == results[6]


def test_replaced_images_are_not_those_of_the_cache(monkeypatch, tmp_path):
    correct = split(np.arange(20) % CLASSES)
    wrong = dataclasses.replace(split(), targets=correct.targets)  # images of other classes, and equal sizes
    values = [
        evaluate(monkeypatch, Perfect(), splits={"test": part}, directory=tmp_path).metrics["zeroshot/tiny/top1"]
        for part in (correct, wrong, correct)
    ]
    assert values[0] == values[2] == 1 and values[1] < 1


def test_equal_images_have_the_same_embedding(monkeypatch, tmp_path):
    class Counting(Perfect):
        def vectors(self, numbers):  # the embedding depends on the row
            return super().vectors(numbers) + 1e-4 * np.arange(len(numbers))[:, None]

    embedder = DiskCachedEmbedder(Counting(), FeatureCache(str(tmp_path), "model"))
    images = [b"1 0", b"2 0", b"1 0", b"3 0", b"2 0"]
    for _ in range(2):  # computed, read
        found = embedder.image(images)
        np.testing.assert_array_equal(found[[0, 1]], found[[2, 4]])
        assert len(np.unique(found, axis=0)) == 3
    assert [len(batch) for batch in embedder.embedder.images] == [3]


def test_a_damaged_file_is_logged(tmp_path, caplog):
    cache = FeatureCache(str(tmp_path), "model")
    cache.get("key", 3, Computed())
    assert not caplog.records
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"")
    cache.get("key", 3, Computed())
    assert f"{path}: damaged, computed again" in caplog.text


ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


class Computed:
    """A function that returns an array and counts its calls."""

    def __init__(self, array=ROWS):
        self.array, self.calls = array, 0

    def __call__(self):
        self.calls += 1
        return self.array


def _damage(name, path):
    content = path.read_bytes()
    if name == "empty":
        return b""
    if name == "truncated header":
        return content[:20]
    if name == "truncated data":
        return content[:-1]
    if name == "other bytes":
        return bytes(range(256))
    if name == "unclosed bracket in the header":
        return content.replace(b"(3, 4), }", b"(3, 4, ( ")
    file = io.BytesIO()
    if name == "a scalar":
        np.save(file, np.float32(1))
    if name == "one number a row":
        np.save(file, ROWS[:, 0])
    if name == "fewer rows":
        np.save(file, ROWS[:2])
    if name == "more rows":
        np.save(file, np.concatenate([ROWS, ROWS]))
    if name == "objects":
        np.save(file, np.array([{}, [], ()], object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "truncated header",
        "truncated data",
        "other bytes",
        "unclosed bracket in the header",
        "a scalar",
        "one number a row",
        "fewer rows",
        "more rows",
        "objects",
    ],
)
def test_a_damaged_file_is_recomputed_and_overwritten(tmp_path, damage):
    cache, compute = FeatureCache(str(tmp_path), "model"), Computed()
    cache.get("key", 3, compute)
    (path,) = tmp_path.iterdir()
    intact = path.read_bytes()
    damaged = _damage(damage, path)
    assert damaged != intact
    path.write_bytes(damaged)
    np.testing.assert_array_equal(cache.get("key", 3, compute), ROWS)
    assert compute.calls == 2 and path.read_bytes() == intact
    np.testing.assert_array_equal(cache.get("key", 3, compute), ROWS)
    assert compute.calls == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_not_stored(tmp_path, bad):
    array = ROWS.copy()
    array[1, 2] = bad
    cache, compute = FeatureCache(str(tmp_path), "model"), Computed(array)
    for calls in (1, 2):
        np.testing.assert_array_equal(cache.get("key", 3, compute), array)
        assert compute.calls == calls and list(tmp_path.iterdir()) == []


def test_without_a_directory_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache, compute = FeatureCache("", "model"), Computed()
    for calls in (1, 2):
        cache.get("key", 3, compute)
        assert compute.calls == calls
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_key_leave_one_complete_file(tmp_path, monkeypatch):
    cache, others, save, files = FeatureCache(str(tmp_path), "model"), ROWS + 1, np.save, []

    def interrupted(file, array):
        files.append(file.name)
        if len(files) == 1:
            np.testing.assert_array_equal(cache.get("key", 3, Computed(others)), others)
        save(file, array)

    monkeypatch.setattr(embed.np, "save", interrupted)
    np.testing.assert_array_equal(cache.get("key", 3, Computed()), ROWS)
    assert len(set(files)) == 2 and len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(cache.get("key", 3, Computed(others)), ROWS)


def test_the_file_of_a_killed_writer_is_not_read_and_later_removed(tmp_path, monkeypatch):
    cache, save = FeatureCache(str(tmp_path), "model"), np.save

    def killed(file, array):
        save(file, array[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(embed.np, "save", killed)
        patched.setattr("clip_jax.paths.os.unlink", lambda path: None)  # SIGKILL runs no `except`
        cache.get("key", 3, Computed())
    (left,) = tmp_path.iterdir()
    unrelated = tmp_path / "notes.new"
    unrelated.write_text("a file of the user")
    np.testing.assert_array_equal(cache.get("key", 3, again := Computed()), ROWS)
    assert again.calls == 1 and left.exists()  # the writer may still be running
    for path in (left, unrelated):
        os.utime(path, (time.time() - embed.ABANDONED_SECONDS - 60,) * 2)
    cache.get("another", 3, Computed())
    assert not left.exists() and unrelated.exists() and len(list(tmp_path.glob("*.npy"))) == 2


def test_a_read_only_directory_disables_the_cache_only(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    cache = FeatureCache(str(tmp_path / "file" / "features"), "model")
    np.testing.assert_array_equal(cache.get("key", 3, Computed()), ROWS)


def test_a_folder_in_place_of_a_file_is_done_without(tmp_path, caplog):
    cache = FeatureCache(str(tmp_path), "model")
    cache.get("key", 3, Computed())
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    np.testing.assert_array_equal(cache.get("key", 3, Computed()), ROWS)
    assert "features not cached" in caplog.text
