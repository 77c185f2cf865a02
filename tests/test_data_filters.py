"""Filters: records that are skipped, and those in their places."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from clip_jax.config import DataConfig, FilterConfig
from clip_jax.data import filters, order
from clip_jax.typing import BadRecord, Record
from tests.test_data_pipeline import ListSource, _png, _record, assert_same, take, untokenize


def _filtered_source(count=60):
    """Records of five kinds: small, long, with a short caption, with a Cyrillic one, and good."""
    kinds = [
        lambda i: _record(i, image=_png(i, side=10)),
        lambda i: _record(i, image=_strip(i)),
        lambda i: _record(i, text="abc"),
        lambda i: _record(i, text=f"собака {i} dog"),
        lambda i: Record(f"key {i}", _png(i), {"txt": (f"текст {i}", f"text {i}")}),
    ]
    return ListSource([kinds[i % 5](i) for i in range(count)])


def _strip(value):
    file = io.BytesIO()
    Image.new("RGB", (80, 20), (value, 50, 200)).save(file, "JPEG")
    return file.getvalue()


WANTED = FilterConfig(
    min_image_size=16,
    max_aspect_ratio=2.0,
    min_caption_characters=4,
    max_caption_characters=30,
    caption_scripts=("Latin",),
)
FILTERED = DataConfig(filters=WANTED, max_bad_fraction=0.0, decode_threads=2)
OF_KIND = ("min_image_size", "max_aspect_ratio", "min_caption_characters", "caption_scripts")


def test_filtered_records_are_replaced_counted_and_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        batches = take(_filtered_source(), 15, config=FILTERED)
    ids = np.concatenate([batch.example_ids for batch in batches])
    ordered = np.concatenate([order.RecordOrder(60, 0)(np.arange(120))[1]])
    assert (ids % 5 == 4).all() and (ids == ordered)[ordered % 5 == 4].all()
    texts = [untokenize(row) for batch in batches for row in batch.batch.text]
    assert texts == [f"text {i}" for i in ids]  # the Cyrillic caption of the record is dropped
    counts = {name: sum(batch.filtered.get(name, 0) for batch in batches) for name in filters.FILTERS}
    drawn = len(ids) + sum(counts.values())  # a fifth of those read pass
    assert 400 < drawn < 800 and all(0.15 < counts[name] / drawn < 0.25 for name in OF_KIND)
    assert not counts["max_caption_characters"] and all(batch.replaced == () for batch in batches)
    assert all(caplog.text.count(f"data.filters.{name}=") == 1 for name in OF_KIND)


@pytest.mark.parametrize("name", OF_KIND)
def test_each_filter_alone_filters_its_kind(name):
    config = DataConfig(filters=FilterConfig(**{name: getattr(WANTED, name)}), decode_threads=2)
    batches = take(_filtered_source(), 8, config=config)
    assert set(np.concatenate([b.example_ids for b in batches]) % 5) == set(range(5)) - {OF_KIND.index(name)}
    assert {key for batch in batches for key in batch.filtered} == {name}


def test_longest_caption_that_passes():
    source = ListSource([_record(i, text="x" * (9 + i % 3)) for i in range(30)])
    (batch,) = take(source, 1, config=DataConfig(filters=FilterConfig(max_caption_characters=10)))
    assert set(batch.example_ids % 3) == {0, 1} and list(batch.filtered) == ["max_caption_characters"]


def test_filtered_batches_are_the_same_for_any_number_of_hosts_and_after_resuming():
    source = _filtered_source()
    whole = take(source, 4, config=FILTERED)
    halves = [take(source, 4, config=FILTERED, rows=slice(4 * h, 4 * h + 4)) for h in range(2)]
    for step in range(4):
        ids = np.concatenate([half[step].example_ids for half in halves])
        np.testing.assert_array_equal(ids, whole[step].example_ids)
        counts = [sum(half[step].filtered.get(name, 0) for half in halves) for name in filters.FILTERS]
        assert counts == [whole[step].filtered.get(name, 0) for name in filters.FILTERS]
    assert_same(take(source, 2, config=FILTERED, start_step=2), whole[2:])


def test_record_in_place_of_a_filtered_one_changes_with_the_epoch():
    """Otherwise some good records would come several times in every epoch."""
    found = np.concatenate([batch.example_ids for batch in take(_filtered_source(20), 40, config=FILTERED)])
    counts = np.bincount(found)[4::5]  # 16 epochs of 20 rows, by 4 good records
    assert counts.sum() == 320 and counts.min() > 50


def test_bad_record_among_filtered_ones_is_replaced_by_one_that_passes():
    source = _filtered_source()
    source.records[4::10] = [BadRecord("gone")] * 6
    batches = take(source, 8, config=DataConfig(filters=WANTED, max_bad_fraction=1.0, decode_threads=2))
    assert (np.concatenate([batch.example_ids for batch in batches]) % 10 == 9).all()
    replaced = [one for batch in batches for one in batch.replaced]
    assert replaced and {one.reason for one in replaced} == {"gone"}


def test_filters_that_no_record_passes_raise():
    config = DataConfig(filters=FilterConfig(min_image_size=4000), decode_threads=2)
    with pytest.raises(ValueError, match=r"no record passes; of 1,0\d\d filtered, by min_image_size=4000: 1,0\d\d"):
        take(_filtered_source(), 1, config=config)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"caption_scripts": ("English",)}, "caption_scripts: 'English' is no Unicode script; give e.g. 'Latin'"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio=0.5: expected 1 or more"),
        ({"min_caption_characters": 9, "max_caption_characters": 8}, "max_caption_characters=8 is less than"),
    ],
)
def test_impossible_filters_are_refused(filters, message):
    with pytest.raises(ValueError, match=f"data.filters.{message}"):
        FilterConfig(**filters)
