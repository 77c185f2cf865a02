"""Sources against files of other tools (pyarrow, TFDS, array_record), and the recognition of `data.files`.

tests/contracts/test_sources.py has the tests of every source: hosts, resumption, bad records.
"""

import base64
import collections
import io
import json
import logging
import pathlib
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from PIL import Image

from clip_jax import data
from clip_jax.config import DataConfig
from clip_jax.data.recognition import OF_FOLDERS, recognize
from clip_jax.data.sources import table, tfds
from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.typing import BadRecord
from tests import object_store


def _png(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


IMAGES = [_png(number) for number in range(4)]
CAPTIONS = ["a dog, “running”", "0123", "two\nlines", '犬 "x"']


def _open(files, captions=("txt", "caption"), source="", **options):
    config = DataConfig(
        source=source, files=str(files), captions=dict.fromkeys(captions, 1.0), options=options, cache_dir=""
    )
    return data.make_source(config)


def _pairs(source):
    """Return images and captions of all records; the reason of a bad one."""
    found = []
    for index in range(len(source)):
        try:
            record = source.read(index)
            found.append((record.image, [text for texts in record.captions.values() for text in texts]))
        except BadRecord as error:
            found.append(str(error))
    return found


EXPECTED = [(image, [caption]) for image, caption in zip(IMAGES, CAPTIONS, strict=True)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES):
        (tmp_path / f"images/{number}.png").write_bytes(image)
    return tmp_path


# -------------------------------------------------------------------------------------------------------- tables

PATHS = [f"images/{number}.png" for number in range(4)]


def _write_table(path, columns):
    """Write a table by pyarrow or json."""
    rows = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(rows, path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        pa.csv.write_csv(rows, path, pa.csv.WriteOptions(delimiter=delimiter))


@pytest.mark.parametrize("extension", ["parquet", "csv", "tsv", "jsonl"])
@pytest.mark.parametrize("names", [("filepath", "title"), ("image_path", "TEXT"), ("path", "caption")])
def test_tables_of_paths_give_their_pairs(folder, extension, names):
    """open_clip's names are filepath and title; a caption of digits keeps its zeros, one of two lines both."""
    path = folder / f"pairs.{extension}"
    _write_table(path, {"number": [0, 1, 2, 3], names[0]: PATHS, names[1]: CAPTIONS})
    assert _pairs(_open(path)) == EXPECTED


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_parquet_of_bytes_gives_its_pairs_in_memory_and_by_row_groups(tmp_path, memory_bytes):
    _write_table(tmp_path / "pairs.parquet", {"image": IMAGES, "caption": CAPTIONS, "unused": [b"x"] * 4})
    source = _open(tmp_path / "pairs.parquet", memory_bytes=memory_bytes)
    assert _pairs(source) == EXPECTED
    assert isinstance(source, table.ParquetSource) == (memory_bytes == 0)


def test_row_groups_are_read_once_and_without_other_columns(tmp_path, monkeypatch):
    path = tmp_path / "pairs.parquet"
    pq.write_table(
        pa.table({"image": IMAGES * 25, "caption": CAPTIONS * 25, "unused": [b"x"] * 100}), path, row_group_size=10
    )
    source, read = _open(path, memory_bytes=0), collections.Counter()
    original = table.ParquetFile.read
    monkeypatch.setattr(table.ParquetFile, "read", lambda self, group: read.update([group]) or original(self, group))
    ordered = source.order(0, 20)
    examples = []
    for step in range(5):
        source.prefetch(np.concatenate(ordered.blocks(step, slice(0, 20))))
        examples += ordered(np.arange(20 * step, 20 * step + 20))[1].tolist()
        for example in examples[-20:]:
            source.read(example)
    assert sorted(examples) == list(range(100))
    assert {*read, 0} == set(range(10)) and max(read.values()) == 1  # the first group was read for the log
    assert source._rows[0].columns == ["image", "caption"]


def test_parquet_of_an_object_store_is_read_by_ranges(tmp_path):
    _write_table(tmp_path / "pairs.parquet", {"image": IMAGES, "caption": CAPTIONS})
    with object_store.serve({"bucket/pairs.parquet": (tmp_path / "pairs.parquet").read_bytes()}):
        for memory_bytes in (0, 2**30):
            assert _pairs(_open("gs://bucket/pairs.parquet", memory_bytes=memory_bytes)) == EXPECTED


def test_images_of_urls_are_read_and_dead_ones_are_bad_records(tmp_path):
    urls = ["gs://bucket/0.png", "gs://bucket/missing.png"]
    _write_table(tmp_path / "pairs.csv", {"url": urls, "caption": CAPTIONS[:2]})
    with object_store.serve({"bucket/0.png": IMAGES[0]}):
        good, bad = _pairs(_open(tmp_path / "pairs.csv"))
    assert good == EXPECTED[0] and bad.startswith("unreadable image: ")


def test_bad_rows_of_a_table_are_bad_records_with_the_reason(folder):
    paths = ["images/0.png", "images/missing.png", None, ""]
    (folder / "images/empty.png").touch()
    rows = [{"path": path, "caption": "x"} for path in paths] + [{"path": "images/empty.png", "caption": "x"}]
    lines = [json.dumps(row) for row in rows] + ["{damaged", "[1]", "", '{"path": "images/1.png", "caption": null}']
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    found = _pairs(_open(folder / "pairs.jsonl"))
    assert found[0] == (IMAGES[0], ["x"]) and found[-1] == (IMAGES[1], []) and len(found) == 8
    reasons = ["unreadable image", "image 'path' is null", "is no file", "empty image", "damaged JSON", "got list"]
    for reason, expected in zip(found[1:-1], reasons, strict=True):
        assert expected in reason


def test_json_lines_are_checked_in_every_file_and_beyond_a_damaged_first_line(folder):
    good = [{"path": "images/0.png"}, {"path": "images/1.png", "caption": "a dog"}]  # the first has no caption
    (folder / "a.jsonl").write_text("{damaged\n" + "".join(json.dumps(row) + "\n" for row in good))
    assert _pairs(_open(folder / "*.jsonl"))[2] == (IMAGES[1], ["a dog"])
    (folder / "b.jsonl").write_text(json.dumps({"photo": "images/0.png", "caption": "a dog"}))
    with pytest.raises(ValueError, match="b.jsonl: expected a column with the image, got photo, caption"):
        _open(folder / "*.jsonl")


def test_options_name_columns_encoding_and_delimiter(tmp_path):
    encoded = [base64.b64encode(image).decode() for image in IMAGES]
    (tmp_path / "pairs.tsv").write_text("".join(f'7\t{e}\ta "dog\n' for e in encoded))
    options = {"columns": ("id", "photo", "words"), "image": "photo", "image_encoding": "base64", "quotes": False}
    source = _open(tmp_path / "pairs.tsv", ["words"], **options)
    assert _pairs(source) == [(image, ['a "dog']) for image in IMAGES]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"photo": PATHS, "caption": CAPTIONS},
            "expected a column with the image, got photo, caption; set data.options",
        ),
        ({"path": PATHS, "name": CAPTIONS}, r"got path, name; set e.g. data.captions=\{'name': 1.0\}"),
    ],
)
@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_tables_without_the_columns_are_refused_with_the_key_to_set(tmp_path, columns, message, extension):
    path = tmp_path / f"pairs.{extension}"
    _write_table(path, columns)
    with pytest.raises(ValueError, match=message):
        _open(path)


def test_a_named_caption_is_not_replaced_by_a_usual_one(folder):
    _write_table(folder / "pairs.csv", {"path": PATHS, "caption": CAPTIONS})
    with pytest.raises(ValueError, match=r"expected a column of data.captions \(titel\), got path, caption"):
        _open(folder / "pairs.csv", ["titel"])


# ------------------------------------------------------------------------------------------------------- folders


def test_folder_of_pairs_gives_text_and_json_captions_without_leftovers(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for name in ("a/one.PNG", "a/._one.PNG", "__MACOSX/one.png", "two.jpeg", "three.png"):
        (tmp_path / name).write_bytes(IMAGES[0])
    (tmp_path / "a/one.txt").write_text("a dog")
    (tmp_path / "two.json").write_text('{"caption": ["a cat", "one cat"], "width": 8}')
    source = _open(tmp_path)
    found = {source.key(index): pair for index, pair in enumerate(_pairs(source))}
    assert found == {
        "a/one.PNG": (IMAGES[0], ["a dog"]),
        "two.jpeg": (IMAGES[0], ["a cat", "one cat"]),
        "three.png": "no caption: expected three.txt or .json",
    }


def test_class_folders_give_templates_of_their_names(tmp_path):
    for name in ("golden_retriever", "tabby"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/0.png").write_bytes(IMAGES[0])
    assert _pairs(_open(tmp_path)) == [
        (IMAGES[0], ["a photo of a golden retriever."]),
        (IMAGES[0], ["a photo of a tabby."]),
    ]
    source = _open(tmp_path, templates=("a {}", "the {}"))
    assert source.read(1).captions == {"txt": ("a tabby", "the tabby")}
    with pytest.raises(ValueError, match=r"data.options.templates=.*expected texts with \{\}"):
        _open(tmp_path, templates=("a dog",))


def test_images_without_captions_and_classes_are_refused(folder):
    with pytest.raises(ValueError, match=r"4 images have no captions; expected 0.png with a .txt or .json"):
        _open(folder / "images")


# ---------------------------------------------------------------------------------------- TFDS and ArrayRecord


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
@pytest.mark.parametrize("split", ["train", "train[:50%]", "train[10:20]+train[70:]"])
def test_tfds_gives_the_records_of_its_own_reader(tmp_path, file_format, split):
    import tensorflow_datasets

    config = tfds.write_tfds(tmp_path, file_format)
    builder = tensorflow_datasets.builder_from_directory(config.files)
    read = tensorflow_datasets.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    source = _open(config.files, split=split)
    if file_format == "array_record":
        rows = builder.as_data_source(split)
    else:
        rows = tensorflow_datasets.as_numpy(builder.as_dataset(split=split, read_config=read))
    expected = [(row["image"], row["caption"].decode()) for row in rows]
    assert len(source) == len(expected) > 0
    for index, (image, caption) in enumerate(expected):
        record = source.read(index)
        assert record.captions == {"caption": (caption,)}
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(record.image))), image)


def test_tfds_classes_and_nested_captions(tmp_path):
    import tensorflow_datasets as library

    features = {"image": library.features.Image(), "label": library.features.ClassLabel(names=["dog", "great_dane"])}
    nested = {
        "image": library.features.Image(),
        "captions": library.features.Sequence({"text": library.features.Text()}),
    }
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    rows = {
        "classes": (features, {"image": pixels, "label": [0, 1]}),
        "nested": (nested, {"image": pixels, "captions": {"text": [["a", "b"], ["c", "d"]]}}),
    }
    for name, (kinds, values) in rows.items():
        library.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            data_dir=str(tmp_path),
            split_datasets={"train": tf.data.Dataset.from_tensor_slices(values)},
            features=library.features.FeaturesDict(kinds),
            disable_shuffling=True,
        )
    assert [texts for _, texts in _pairs(_open(tmp_path / "classes"))] == [
        ["a photo of a dog."],
        ["a photo of a great dane."],
    ]
    assert [texts for _, texts in _pairs(_open(tmp_path / "nested/1.0.0"))] == [["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match="data.options.split='validation': classes has the splits train"):
        _open(tmp_path / "classes", split="validation")
    with pytest.raises(ValueError, match="has several datasets of TFDS; give one of .*classes/1.0.0"):
        _open(tmp_path)


def test_damaged_array_record_is_refused(tmp_path):
    (tmp_path / "a.array_record").write_bytes(b"x" * 200_000)
    with pytest.raises(ValueError, match="a.array_record: expected an ArrayRecord file"):
        _open(tmp_path / "a.array_record")


# --------------------------------------------------------------------------------------------------- Hugging Face


def test_parquet_repository_gives_one_split(tmp_path):
    (tmp_path / "data").mkdir()
    for split, rows in (("train", slice(0, 3)), ("test", slice(3, 4))):
        images = [{"bytes": image, "path": None} for image in IMAGES[rows]]
        info = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
        rows = pa.table({"image": images, "label": [1] * len(images)})
        rows = rows.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(rows, tmp_path / f"data/{split}-00000-of-00001.parquet")
    assert _pairs(_open(tmp_path)) == [(image, ["a photo of a cat."]) for image in IMAGES[:3]]
    assert len(_open(tmp_path, split="test")) == 1
    with pytest.raises(ValueError, match="data.options.split='dev': .* has Parquet files of test, train"):
        _open(tmp_path, split="dev")


# ----------------------------------------------------------------------------------------------------- recognition


def _write(path, number=0):
    """Write an empty-handed file of one pair in the format of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".tfrecord" in path.name or not path.suffix:
        write_tfrecord(path, [{"png": IMAGES[number], "txt": "a dog"}])
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for name, content in (("0.png", IMAGES[number]), ("0.txt", b"a dog")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    elif path.suffix == ".png":
        path.write_bytes(IMAGES[number])
    elif path.suffix in (".txt", ".json"):
        path.write_text('{"caption": "a dog"}' if path.suffix == ".json" else "a dog")
    else:
        _write_table(path, {"path": [str(path.parent / "x.png")], "caption": ["a dog"]})


RECOGNIZED = {
    "shards/*": (["shards/00000.tfrecord", "shards/00001.tfrecord"], "2 pairs in 2 files (tfrecord), captions: txt"),
    "shards": (["shards/00000.tar", "shards/00001.tar", "shards/._0.tar"], "2 pairs in 2 files (tar), captions: txt"),
    "img2dataset": (
        ["img2dataset/0.tfrecord", "img2dataset/0.parquet", "img2dataset/0_stats.json"],
        "1 pairs in 1 file (tfrecord), captions: txt",
    ),
    "files": (["files/00000/0.png", "files/00000/0.txt", "files/00000.parquet"], "1 pairs in 1 folder (folder)"),
    "of_tfds": (["of_tfds/a-train.tfrecord-00000-of-00002", "of_tfds/a-train.tfrecord-00001-of-00002"], "(tfrecord)"),
    "no_extension": (["no_extension"], "1 pairs in 1 file (tfrecord), captions: txt"),
    "tables": (["tables/a.csv", "tables/b.csv", "tables/x.png"], "expected files of one format"),
    "only_tables": (["only_tables/a.csv", "only_tables/b.csv"], "2 pairs in 2 files (table)"),
    "metadata": (["metadata/metadata.jsonl", "metadata/x.png"], "1 pairs in 1 file (table), captions: caption"),
    "mixed/*": (["mixed/a.tar", "mixed/b.tfrecord"], "expected files of one format, got 1 .tar, 1 .tfrecord; give"),
    "mixed": (["mixed/a.tar", "mixed/b.tfrecord"], "expected files of one format, got 1 .tar, 1 .tfrecord; give"),
    "nothing": (
        ["nothing/readme.json"],
        "got 1 .json; .* data.source, one of tfrecord, tar, array_record, table, folder",
    ),
    "images/*.png": (["images/0.png"], "are images; give their folder"),
    "a,[b]/{c}/x[1],y.tar": (["a,[b]/{c}/x[1],y.tar"], "1 pairs in 1 file (tar), captions: txt"),
    "[x]/": (["[x]/0.tar"], "1 pairs in 1 file (tar), captions: txt"),
    "none/*.tar": ([], "'.*none/\\*.tar' matches no file"),
}


@pytest.mark.parametrize("files", RECOGNIZED)
def test_format_of_files_is_recognized_or_refused_with_what_is_there(files, tmp_path, caplog):
    names, expected = RECOGNIZED[files]
    for name in names:
        _write(tmp_path / name)
    with caplog.at_level(logging.INFO):
        try:
            _open(tmp_path / files)
        except ValueError as error:
            caplog.clear()
            assert re.search(expected, str(error)), error
            return
    assert expected in caplog.text


def test_folder_is_read_by_the_given_source(tmp_path):
    for name in ("a.tar", "b.tfrecord"):
        _write(tmp_path / name)
    assert recognize(DataConfig(source="tar", files=str(tmp_path))).files.endswith("/*.tar")
    assert _open(tmp_path, source="tfrecord").key(0) == f"{tmp_path}/b.tfrecord#0"
    with pytest.raises(ValueError, match="expected files for data.source='table', got 1 .tar, 1 .tfrecord"):
        _open(tmp_path, source="table")


def test_folder_of_an_object_store_is_recognized(tmp_path):
    _write(tmp_path / "0.tar")
    with object_store.serve({"bucket/pairs/0.tar": (tmp_path / "0.tar").read_bytes()}):
        assert len(_open("gs://bucket/pairs/")) == 1


def test_compressed_shards_are_refused_by_name(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match="is compressed by gzip"):
        _open(tmp_path / "0.tar.gz")


def _documented():
    text = (pathlib.Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    return dict(re.findall(r"`--config.data.files='?([^`']+)'?` \| `(\w+)`", text))


def test_documented_files_are_recognized_as_documented(tmp_path):
    documented = _documented()
    assert set(documented.values()) == {name for name in data.SOURCES if data.reads_files(name)}
    for files, source in documented.items():
        folder = tmp_path / source
        folder.mkdir()
        written = data.SOURCES[source].tiny_config(folder)
        if source not in OF_FOLDERS:  # a file, or several
            suffix = pathlib.PurePath(files).suffix
            assert recognize(DataConfig(files=f"{folder}/*{suffix}")).source == source
        else:
            assert recognize(DataConfig(files=written.files)).source == source
            assert not pathlib.PurePath(files).suffix or source == "tfds"
        assert len(_open(written.files)) >= 60


@pytest.mark.parametrize("files", ["", "/nowhere/*.tar", "/nowhere/x.csv", "/nowhere"])
def test_missing_files_are_refused_without_a_source(files):
    with pytest.raises(ValueError, match="data.files"):
        _open(files)
