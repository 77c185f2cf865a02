"""Statistics of training data, the contact sheet, and the command `python -m clip_jax.inspect`."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from clip_jax import data
from clip_jax.config import DataConfig, FilterConfig, TextTransformer, TokenizerConfig
from clip_jax.data import inspection, order, pipeline
from clip_jax.data.contact_sheet import MARGIN, SIDE, contact_sheet
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.tokenizers import ClipBPE, make_tokenizer
from tests import commands

GOOD, LENGTH = 40, 8


def encoded(form, width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """40 good records, of which 10 have JPEGs, 4 Russian and 8 equal captions, and 3 bad records."""
    path = tmp_path_factory.mktemp("data") / "0.tfrecord"
    records = [
        {
            "png": encoded("JPEG" if number < 10 else "PNG", 40 + number, 20),
            "txt": f"собака номер {number}" if number < 4 else "a logo" if number < 12 else f"dog {number} " + "x " * 8,
        }
        for number in range(GOOD)
    ]
    records[20]["caption"] = records[20]["txt"]  # counts as one text
    records += [{"png": b"", "txt": "a"}, {"png": b"no image at all", "txt": "b"}, {"png": records[0]["png"]}]
    write_tfrecord(path, records)
    return path


def inspected(path, filters=FilterConfig(), **options):  # noqa: B008 (frozen)
    config = DataConfig(source="tfrecord", files=str(path), cache_dir="", max_bad_fraction=1.0, filters=filters)
    count = make_tokenizer(TokenizerConfig(), TextTransformer(context_length=LENGTH), truncate=False).count
    return inspection.inspect(data.make_source(config), ClipBPE(length=LENGTH), count, config, image_size=16, **options)


def test_statistics_are_those_of_the_records(shard):
    found = inspected(shard).statistics
    assert (found["records"], found["sample"]) == (GOOD + 3, GOOD + 3)
    assert found["bad"]["records"] == 3
    reasons = {one["first"].rpartition("/")[2]: one["reason"] for one in found["bad"]["reasons"]}
    assert reasons["0.tfrecord#40"] == "empty image"
    assert reasons["0.tfrecord#41"].startswith("not an image; it begins with b'no image")
    assert reasons["0.tfrecord#42"].startswith("no caption: data.captions has txt, caption")
    images, captions = found["images"], found["captions"]
    assert images["formats"] == {"PNG": 30 / 41, "JPEG": 11 / 41}  # with the image that has no caption
    assert images["width"]["min"] == 40 and images["width"]["max"] == 79 and images["height"]["median"] == 20
    assert images["aspect"]["max"] == round(79 / 20, 3)
    assert images["bytes"]["max"] == len(encoded("JPEG", 49, 20))
    assert (
        captions["features"] == {"txt": 41, "caption": 1} and captions["texts"] == 41
    )  # with that of the undecodable image
    assert captions["scripts"] == {"LATIN": 37 / 41, "CYRILLIC": 4 / 41}
    assert captions["duplicates"] == 8 / 41 and captions["most_common"] == [{"text": "a logo", "records": 8}]
    assert captions["tokens"]["max"] == 2 + len(ClipBPE().encode("собака номер 3")) > LENGTH
    assert captions["truncated"] == pytest.approx(32 / 41)
    text = inspection.report(found)
    assert "all records" in text and "3 (7.0%): 1 × " in text and "1 × empty image (" in text and "8 × 'a logo'" in text
    assert "78.0% have more than 8 tokens" in text and "CYRILLIC 9.8%" in text


def test_filtered_records_are_counted_by_filter(shard):
    """11 are wide, 8 others 'a logo', 4 Cyrillic; a bad record with a short caption is filtered, as in training."""
    wanted = FilterConfig(max_aspect_ratio=3.4, min_caption_characters=7, caption_scripts=("Latin",))
    found, batch = inspected(shard, wanted)
    first = [one.pop("first") for one in found["filtered"]["filters"]]
    assert found["filtered"] == {
        "records": 24,
        "filters": [
            {"filter": "max_aspect_ratio", "value": 3.4, "records": 11},
            {"filter": "min_caption_characters", "value": 7, "records": 9},
            {"filter": "caption_scripts", "value": ("Latin",), "records": 4},
        ],
    }
    assert int(first[0].rpartition("#")[2]) >= 29 and int(first[2].rpartition("#")[2]) < 4
    assert found["bad"]["records"] == 2 and len(batch.image) == 43 - 24 - 2
    for one, key in zip(found["filtered"]["filters"], first, strict=True):
        one["first"] = key
    text = inspection.report(found)
    assert (
        "filtered        24 (55.8%): 11 × max_aspect_ratio=3.4 (" in text and "4 × caption_scripts=('Latin',) (" in text
    )
    found, batch = inspected(shard, FilterConfig(min_image_size=1000))
    assert batch is None and found["filtered"]["records"] == 41
    assert inspected(shard).statistics["filtered"] == {"records": 0, "filters": []}


def test_the_batch_is_that_of_training(shard):
    """Crop, caption and tokens of each example are those of its first epoch with the same seed."""
    options = {"image_size": 16, "batch_size": 43, "seed": 5, "start_step": 0, "rows": slice(0, 43)}
    config = DataConfig(source="tfrecord", files=str(shard), cache_dir="", max_bad_fraction=1.0)
    source, tokenizer = data.make_source(config), ClipBPE(length=LENGTH)
    training = next(pipeline.batches(source, tokenizer, config, **options))
    rows = {example: row for row, example in enumerate(training.example_ids.tolist())}
    examples = [e for e in inspection.sampled_examples(source, 43, 5).tolist() if e < GOOD][: inspection.BATCH]
    batch = inspected(shard, seed=5).batch
    assert len(batch.image) == inspection.BATCH
    for row, example in enumerate(examples):
        assert (batch.image[row] == training.batch.image[rows[example]]).all()
        assert (batch.text[row] == training.batch.text[rows[example]]).all()


def test_a_sample_has_no_record_twice_and_reads_few_blocks():
    in_blocks = SyntheticSource(100_000)
    in_blocks.order = lambda seed, size: order.BlockOrder(np.full(1000, 100), seed, size, 64, 200)
    for source, most in ((SyntheticSource(100_000), 1000), (in_blocks, 4 * inspection.RUNS)):
        found = inspection.sampled_examples(source, 1000, 0)
        assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 100_000
        assert len(np.unique(found // 100)) <= most
        assert found.tolist() != inspection.sampled_examples(source, 1000, 1).tolist()
        assert found.tolist() == inspection.sampled_examples(source, 1000, 0).tolist()
    assert inspection.sampled_examples(SyntheticSource(50), 100, 0).shape == (50,)


def test_data_without_a_good_record_is_reported(tmp_path):
    write_tfrecord(tmp_path / "0.tfrecord", [{"png": b"", "txt": "a"}] * 3)
    found, batch = inspected(tmp_path / "0.tfrecord", sample=2)
    assert batch is None and found["bad"]["records"] == found["sample"] == 2
    assert "2 of 3 records, seed 0" in inspection.report(found)


def test_a_sheet_has_every_image_above_its_text():
    images = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (10, 90, 170)])
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(images, ["", "a dog", "犬" * 40]))))
    for column, value in enumerate((10, 90, 170)):
        left = MARGIN + column * (SIDE + MARGIN)
        assert (sheet[MARGIN : MARGIN + SIDE, left : left + SIDE] == value).all()
        ink = (sheet[MARGIN + SIDE :, left : left + SIDE] < 128).sum()
        assert bool(ink) == bool(column)


@pytest.mark.slow  # processes that import TensorFlow
def test_command_prints_statistics_and_writes_a_sheet(shard, tmp_path):
    def run(*arguments):
        return commands.run(["-m", "clip_jax.inspect", *map(str, arguments)], timeout=120)

    filters = ("--config=configs/vit_b32.py", "--config.data.filters.min_caption_characters=7")
    done = run(shard, "--sample=20", "--json", f"--sheet={tmp_path}/sheet.png", *filters)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["data"] == "43 pairs in 1 file (tfrecord), captions: txt" and found["sample"] == 20
    assert found["captions"]["context_length"] == 77
    assert [one["filter"] for one in found["filtered"]["filters"]] == ["min_caption_characters"]
    assert Image.open(tmp_path / "sheet.png").width == MARGIN + 6 * (SIDE + MARGIN)
    done = run()
    assert done.returncode == 2 and "clip_jax.inspect: expected DATA, e.g. /data/cc3m" in done.stderr
