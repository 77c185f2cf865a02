"""The pipeline: batches are a function of integers, and bad records neither end the run nor shift rows."""

import collections
import io
import itertools
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_jax import data
from clip_jax.config import AugmentConfig, DataConfig
from clip_jax.data import captions, order, pipeline
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.typing import BadRecord, Record

SIZE, LENGTH = 16, 24
ALL = AugmentConfig(0.5, 15.0, 0.2, 0.1, 0.2, 0.3, 0.5, 30.0, 0.1, 0.5, 0.3)
CONFIG = DataConfig(source="synthetic", augment=ALL, decode_threads=2)


class ByteTokenizer:
    """One token per byte."""

    vocab_size, length, pad_id, eos_id = 258, LENGTH, 0, 1

    def __call__(self, texts):
        rows = np.zeros((len(texts), LENGTH), np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [byte + 2 for byte in text.encode()[: LENGTH - 1]] + [1]
            row[: len(ids)] = ids
        return rows


def untokenize(row):
    return bytes(int(token) - 2 for token in row if token > 1).decode()


class ListSource:
    """A source of given records; an exception in the list is raised when it is read."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def key(self, index):
        return f"listed#{index}"

    def read(self, index):
        if isinstance(self.records[index], Exception):
            raise self.records[index]
        return self.records[index]

    def fingerprint(self):
        return "listed"


def _png(value, side=20):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value % 256, 50, 200)).save(file, "PNG")
    return file.getvalue()


def _record(i, image=None, text=None):
    return Record(f"key {i}", _png(i) if image is None else image, {"txt": (f"text {i}" if text is None else text,)})


def take(source, count, *, config=CONFIG, batch_size=8, start_step=0, rows=None, seed=0, tokenizer=None):
    iterator = data.batches(
        source,
        tokenizer or ByteTokenizer(),
        config,
        image_size=SIZE,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        rows=rows or slice(0, batch_size),
    )
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.example_ids, b.example_ids)
        np.testing.assert_array_equal(a.batch.text, b.batch.text)
        np.testing.assert_array_equal(a.batch.image, b.batch.image)


# 20 examples and 16 rows: the second step has the end of one epoch and the beginning of the next.
@pytest.fixture(scope="module")
def uninterrupted():
    return take(SyntheticSource(20), 4, batch_size=16)


def test_batch_has_the_dtypes_and_shapes_of_the_contract(uninterrupted):
    batch = uninterrupted[0].batch
    assert batch.image.dtype == np.uint8 and batch.image.shape == (16, SIZE, SIZE, 3)
    assert batch.text.dtype == np.int32 and batch.text.shape == (16, LENGTH)
    assert batch.mask.dtype == bool and batch.mask.all()
    assert uninterrupted[0].replaced == ()


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_global_batch_is_the_same_for_any_number_of_hosts(uninterrupted, hosts):
    size = 16 // hosts
    shards = [take(SyntheticSource(20), 2, batch_size=16, rows=slice(h * size, (h + 1) * size)) for h in range(hosts)]
    for step in range(2):
        whole = uninterrupted[step]
        for field in ("image", "text", "mask"):
            found = np.concatenate([getattr(shard[step].batch, field) for shard in shards])
            np.testing.assert_array_equal(found, getattr(whole.batch, field))
        np.testing.assert_array_equal(np.concatenate([s[step].example_ids for s in shards]), whole.example_ids)


@pytest.mark.parametrize("step", [1, 3])
def test_resumed_equals_uninterrupted(uninterrupted, step):
    assert_same(take(SyntheticSource(20), 4 - step, batch_size=16, start_step=step), uninterrupted[step:])


def test_number_of_threads_changes_nothing(uninterrupted):
    config = DataConfig(source="synthetic", augment=ALL, decode_threads=7, prefetch_batches=5)
    assert_same(take(SyntheticSource(20), 4, batch_size=16, config=config), uninterrupted)


def test_another_seed_changes_order_and_augmentation(uninterrupted):
    other = take(SyntheticSource(20), 1, batch_size=16, seed=1)[0]
    assert (other.example_ids != uninterrupted[0].example_ids).any()
    by_id = dict(zip(other.example_ids.tolist(), other.batch.image, strict=True))
    expected = dict(zip(uninterrupted[0].example_ids.tolist(), uninterrupted[0].batch.image, strict=True))
    shared = by_id.keys() & expected.keys()
    assert len(shared) > 4 and all((by_id[i] != expected[i]).any() for i in shared)


def test_every_epoch_has_every_example_once():
    ids = np.concatenate([b.example_ids for b in take(SyntheticSource(20), 5, batch_size=8)])
    first, second = ids.reshape(2, 20)
    assert sorted(first) == sorted(second) == list(range(20))
    assert (first != second).any()


def test_step_ten_million_starts_at_its_position_in_the_order():
    (batch,) = take(SyntheticSource(1000), 1, start_step=10_000_000)
    expected = order.RecordOrder(1000, 0)(np.arange(80_000_000, 80_000_008))[1]
    np.testing.assert_array_equal(batch.example_ids, expected)


def test_image_is_independent_of_the_rest_of_the_batch():
    small, large = take(SyntheticSource(50), 4, batch_size=4), take(SyntheticSource(50), 1, batch_size=16)
    np.testing.assert_array_equal(np.concatenate([b.batch.image for b in small]), large[0].batch.image)
    np.testing.assert_array_equal(np.concatenate([b.batch.text for b in small]), large[0].batch.text)


def test_augmentation_of_an_example_changes_with_the_epoch():
    batches = take(SyntheticSource(8), 2)
    images = [dict(zip(b.example_ids.tolist(), b.batch.image, strict=True)) for b in batches]
    assert all((images[0][i] != images[1][i]).any() for i in range(8))


# ----------------------------------------------------------------------------------------------------- bad records

BAD = {
    "checksum mismatch": BadRecord("checksum mismatch"),
    "not an image": _record(1, image=b"<html>404</html>"),
    "undecodable image": _record(2, image=_png(2)[:-30]),
    "100,000,000": _record(3, image=_png(3)[:16] + (13_000).to_bytes(4, "big") * 2 + _png(3)[24:]),
    "empty caption": _record(4, text=""),
    "blank caption: ' \\n\\t'": _record(5, text=" \n\t"),
    "blank caption: '\\x00\\x00'": _record(6, text="\0\0"),
    "no caption: data.captions has txt, caption; the record has name": Record("7", _png(7), {"name": ("dog",)}),
}
TOLERANT = DataConfig(source="tfrecord", max_bad_fraction=1.0, decode_threads=2)


def _with_bad(good=32):
    records = [_record(i) for i in range(good + len(BAD))]
    for place, record in enumerate(BAD.values()):
        records[1 + 3 * place] = record
    return ListSource(records), {1 + 3 * place: reason for place, reason in enumerate(BAD)}


def test_every_kind_of_bad_record_is_counted_logged_and_replaced(caplog):
    source, reasons = _with_bad()
    expected_ids = order.RecordOrder(40, 0)(np.arange(40))[1]
    with caplog.at_level(logging.WARNING):
        batches = take(source, 5, config=TOLERANT)
    replaced = {r.key: r for b in batches for r in b.replaced}
    assert set(replaced) == {f"listed#{i}" for i in reasons}
    for i, reason in reasons.items():
        assert reason in replaced[f"listed#{i}"].reason
        assert caplog.text.count(f"listed#{i}:") == 1
    rows = zip(
        np.concatenate([b.example_ids for b in batches]),
        np.concatenate([b.batch.text for b in batches]),
        np.concatenate([b.batch.image for b in batches]),
        expected_ids,
        strict=True,
    )
    for example, text, image, ordered in rows:
        assert untokenize(text) == f"text {example}"
        assert image[0, 0, 0] == example and (image[..., 2] == 200).all()
        if ordered in reasons:
            assert replaced[f"listed#{ordered}"].replacement == f"listed#{example}"
            assert example not in reasons
        else:
            assert example == ordered


def test_replacements_are_the_same_for_any_number_of_hosts_and_after_resuming():
    source, _ = _with_bad()
    whole = take(source, 4, config=TOLERANT)
    halves = [take(source, 4, config=TOLERANT, rows=slice(4 * h, 4 * h + 4)) for h in range(2)]
    for step in range(4):
        ids = np.concatenate([half[step].example_ids for half in halves])
        np.testing.assert_array_equal(ids, whole[step].example_ids)
        assert halves[0][step].replaced + halves[1][step].replaced == whole[step].replaced
    assert_same(take(source, 2, config=TOLERANT, start_step=2), whole[2:])


def test_replacement_is_augmented_as_in_its_own_row():
    """Example, epoch and seed are the same, so the image is the one of the example's own row."""
    config = DataConfig(augment=ALL, max_bad_fraction=1.0, decode_threads=2)

    class Shapes(SyntheticSource):
        def read(self, index):
            if index == 3:
                raise BadRecord("gone")
            return super().read(index)

    (batch,) = take(Shapes(8), 1, config=config)
    (row,) = (i for i, ordered in enumerate(order.RecordOrder(8, 0)(np.arange(8))[1]) if ordered == 3)
    twins = np.flatnonzero(batch.example_ids == batch.example_ids[row])
    assert len(twins) == 2
    np.testing.assert_array_equal(batch.batch.image[twins[0]], batch.batch.image[twins[1]])


def test_chunk_of_only_bad_records_is_replaced():
    bad = set(order.RecordOrder(64, 0)(np.arange(8))[1].tolist())
    source = ListSource([BadRecord("gone") if i in bad else _record(i) for i in range(64)])
    (batch,) = take(source, 1, config=TOLERANT)
    assert len(batch.replaced) == 8 and not bad & set(batch.example_ids.tolist())


def test_too_many_bad_records_raise_with_three_of_their_keys():
    source = ListSource([BadRecord("gone") if i % 4 == 0 else _record(i) for i in range(200)])
    config = DataConfig(max_bad_fraction=0.1, decode_threads=2)
    with pytest.raises(ValueError, match=r"data.max_bad_fraction=0.1: (listed#\d+ \(gone\)(, )?){3}\.") as raised:
        take(source, 25, config=config)
    assert "--config.data.max_bad_fraction=" in str(raised.value)


def test_bad_fraction_is_not_checked_before_a_hundred_reads():
    bad = int(order.RecordOrder(200, 0)(np.arange(1))[1][0])
    source = ListSource([BadRecord("gone") if i == bad else _record(i) for i in range(200)])
    batches = take(source, 25, config=DataConfig(max_bad_fraction=0.01, decode_threads=2))
    assert [len(b.replaced) for b in batches] == [1] + [0] * 24


def test_source_of_only_bad_records_raises():
    with pytest.raises(ValueError, match=r"none of 100 records could replace listed#\d"):
        take(ListSource([BadRecord("gone")] * 8), 1, config=TOLERANT)


class Unstable(ListSource):
    """400 records; the one at `position` of the order is bad on the reads with the given numbers, from 0.

    400, because the pipeline reads ahead: the next epoch's read of the record would be counted otherwise.
    """

    def __init__(self, position, bad_reads, message="connection reset"):
        super().__init__([_record(i) for i in range(400)])
        self.index = int(order.RecordOrder(400, 0)(np.array([position]))[1][0])
        self.bad_reads, self.message, self.reads = bad_reads, message, 0

    def read(self, index):
        if index == self.index:
            self.reads += 1
            if self.reads - 1 in self.bad_reads:
                raise BadRecord(self.message)
        return super().read(index)


def test_transient_error_replaces_nothing(caplog):
    source = Unstable(5, {0})
    (batch,) = take(source, 1, config=DataConfig(max_bad_fraction=0.0, decode_threads=2))
    assert source.reads == 3 and batch.replaced == () and not caplog.records
    assert_same([batch], take(ListSource(source.records), 1, config=DataConfig(decode_threads=2)))


@pytest.mark.parametrize(
    ("bad_reads", "message", "reason"),
    [
        ({0, 2, 3}, "connection reset", "connection reset"),  # read, check (good), read, check
        ({0, 2}, "connection reset", pipeline.UNSTABLE),  # good on every check
        ({0, 1}, "", "the source gives no reason"),
    ],
)
def test_replaced_record_has_a_reason_also_if_it_was_good_when_checked(bad_reads, message, reason, caplog):
    source = Unstable(5, bad_reads, message)
    (batch,) = take(source, 1, config=TOLERANT)
    (replaced,) = batch.replaced
    assert (replaced.key, replaced.reason) == (f"listed#{source.index}", reason)
    assert f"bad record listed#{source.index}: {reason};" in caplog.text


def test_record_that_is_good_only_when_checked_counts_as_bad():
    with pytest.raises(ValueError, match=r"1 of 104 records read are bad.*listed#\d+ \(failed twice when it was read"):
        take(Unstable(100, {0, 2}), 20, config=DataConfig(max_bad_fraction=0.0, decode_threads=2))


def test_other_exceptions_propagate_unchanged():
    class Broken(ByteTokenizer):
        def __call__(self, texts):
            raise ZeroDivisionError("a bug in a tokenizer")

    with pytest.raises(ZeroDivisionError, match="a bug in a tokenizer"):
        take(SyntheticSource(20), 1, tokenizer=Broken())


_ABANDONED = """
import time
import numpy as np
from clip_jax import config, data

class Tokenizer:
    length = 4
    def __call__(self, texts):
        time.sleep(0.5)  # a thread of TensorFlow is here when the script ends, and then needs the GIL
        return np.zeros((len(texts), 4), np.int32)

settings = config.DataConfig(source="synthetic", decode_threads=2)
steps = data.batches(data.make_source(settings), Tokenizer(), settings, image_size=16, batch_size=8, seed=0,
                     start_step=0, rows=slice(0, 8))
print(next(steps).batch.image.shape)
"""


def test_script_that_abandons_its_batches_ends():
    command, root = [sys.executable, "-c", _ABANDONED], pathlib.Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (0, "(8, 16, 16, 3)\n"), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("rows", [slice(4, 4), slice(0, 9), slice(0, 8, 2), slice(6, 2)])
def test_rows_outside_the_batch_raise(rows):
    with pytest.raises(ValueError, match="no range within the batch of 8"):
        take(SyntheticSource(20), 1, rows=rows)


def test_captions_without_weight_raise():
    with pytest.raises(ValueError, match="data.captions names no feature"):
        take(SyntheticSource(20), 1, config=DataConfig(captions={"txt": 0.0}))


# -------------------------------------------------------------------------------------------------------- captions


def _caption_grid(texts, weights):
    record = Record("k", b"", texts)
    grid = (np.arange(100) + 0.5) / 100
    return [captions.choose_caption(record, weights, [0.0], [u], [v]) for u in grid for v in grid[::10]]


def test_features_are_selected_by_weight_and_their_values_uniformly():
    found = _caption_grid({"name": ("dog",), "keyword": ("pet", "animal")}, {"name": 3.0, "keyword": 1.0})
    assert {text: found.count(text) for text in found} == {"dog": 750, "pet": 125, "animal": 125}


def test_several_texts_are_joined_without_repetition():
    record = Record("k", b"", {"name": ("dog",), "keyword": ("pet", "animal")})
    weights = {"name": 1.0, "keyword": 1.0}
    grid = np.linspace(0, 0.99, 5)
    drawn = {
        captions.choose_caption(record, weights, [count] * 3, [a, b, c], [d, a, b])
        for count in grid
        for a in grid
        for b in grid
        for c in grid
        for d in grid
    }
    parts = [caption.split(", ") for caption in drawn]
    assert {len(texts) for texts in parts} == {1, 2, 3}
    assert all(len(set(texts)) == len(texts) for texts in parts)
    assert {tuple(sorted(texts)) for texts in parts if len(texts) == 3} == {("animal", "dog", "pet")}


def test_texts_that_differ_only_in_case_are_not_joined():
    record = Record("k", b"", {"name": ("Dog face", "dog FACE"), "keyword": ("dog face", "pet")})
    draws = np.random.default_rng(0).random((200, 2, 3)).tolist()
    drawn = {captions.choose_caption(record, {"name": 1.0, "keyword": 1.0}, [0.9] * 3, *row) for row in draws}
    parts = [caption.casefold().split(", ") for caption in drawn]
    assert {tuple(sorted(texts)) for texts in parts} == {("dog face", "pet")}


def test_all_captions_of_a_record_are_used_equally_often_over_the_epochs():
    texts, epochs = tuple(f"text {i}" for i in range(5)), np.arange(2000)
    record = Record("k", b"", {"txt": texts})
    draws = captions.caption_draws(1, 3, epochs, np.full(2000, 8)).tolist()
    found = collections.Counter(captions.choose_caption(record, {"txt": 1.0}, *row) for row in draws)
    assert set(found) == set(texts) and min(found.values()) > 340  # of 400, three standard deviations


def test_first_of_several_texts_is_the_one_of_a_single_text():
    """More texts for a caption are appended to the first one and do not change it."""
    ids, epochs = np.arange(50), np.zeros(50, np.int64)
    one, three = (captions.caption_draws(texts, 7, epochs, ids) for texts in (1, 3))
    np.testing.assert_array_equal(one[..., 0], three[..., 0])


def test_absent_empty_and_zero_weight_features_are_ignored():
    weights = {"txt": 1.0, "caption": 1.0, "alt": 0.0, "missing": 5.0}
    assert set(_caption_grid({"txt": ("",), "caption": (" a dog\0 ",), "alt": ("never",)}, weights)) == {"a dog"}


@pytest.mark.parametrize("text", ["\ufeffa dog", "\ufeff a dog\n", "a\ufeff dog"])
def test_byte_order_mark_is_no_part_of_a_caption(text):
    """SentencePiece and tokenizer.json made a token of it; a caption of it alone is empty."""
    assert _caption_grid({"txt": (text, "\ufeff")}, {"txt": 1.0}) == ["a dog"] * 1000


def test_caption_of_an_example_changes_with_the_epoch():
    record = Record("k", _png(0), {"txt": tuple("abcdefghijklmnop")})
    ids = take(ListSource([record] * 8), 2, config=TOLERANT)
    assert (ids[0].batch.text != ids[1].batch.text).any()


def test_caption_of_megabytes_is_truncated_before_the_tokenizer():
    lengths = []

    class Measuring(ByteTokenizer):
        def __call__(self, texts):
            lengths.extend(map(len, texts))
            return super().__call__(texts)

    take(ListSource([_record(0, text="x" * 4_000_000)]), 1, config=TOLERANT, batch_size=1, tokenizer=Measuring())
    assert set(lengths) == {captions.MAX_CAPTION_CHARACTERS}
