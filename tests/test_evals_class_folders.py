"""Class folders: their order, their names, and files that are no images."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_jax.evals.datasets.folder import read_folder


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


def _class_folders(tmp_path, names, split="test"):
    for number, name in enumerate(names):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "a.png").write_bytes(_image(number))
    return tmp_path


def test_integer_folders_are_ordered_as_integers(tmp_path):
    """ImageNet-V2's folders are 0 to 999: as strings, 10 would be class 2."""
    found = read_folder(_class_folders(tmp_path, [str(number) for number in range(21)]), "test")
    assert [_value(image) for image in found.images] == list(range(21)) == found.targets.tolist()
    (tmp_path / "test" / "007").mkdir()
    with pytest.raises(ValueError, match="distinct class numbers, got folders (007 and 7|7 and 007)"):
        read_folder(tmp_path, "test")


def test_class_names_are_matched_with_folder_names_or_refused(tmp_path):
    _class_folders(tmp_path, ["cat", "Red_Panda", "dog"])
    _write_text(tmp_path / "classnames.txt", "red panda\ndog\ncat\n")  # not the order of the folders
    found = read_folder(tmp_path, "test")
    assert found.class_keys == ("Red Panda", "cat", "dog") and found.class_names == ("red panda", "cat", "dog")
    _write_text(tmp_path / "classnames.txt", "red panda\ndog\nkitten\n")
    with pytest.raises(
        ValueError, match="class 1 is named 'dog', but stored as 'cat'|but stored as 'dog', which is the"
    ):
        read_folder(tmp_path, "test")
    _write_text(tmp_path / "classnames.txt", "lesser panda\ncat\nhound\n")  # no folder has the name of another class
    assert read_folder(tmp_path, "test").class_names == ("lesser panda", "cat", "hound")


def test_leftovers_of_macos_are_ignored_and_other_files_are_listed(tmp_path, caplog):
    _class_folders(tmp_path, ["cat", "dog", "__MACOSX", ".hidden"])
    for name in ("cat/._a.png", "cat/.DS_Store", "cat/__MACOSX/b.png", "dog/notes.txt"):
        _write_text(tmp_path / "test" / name, "no image")
    (tmp_path / "test/cat/1/2").mkdir(parents=True)
    for form in ("gif", "bmp", "tiff"):
        (tmp_path / f"test/cat/1/2/c.{form}").write_bytes(_image(7, form.upper()))
    found = read_folder(tmp_path, "test")
    assert found.class_keys == ("cat", "dog") and found.targets.tolist() == [0, 0, 0, 0, 1]
    assert sorted(_pixels(image).shape for image in found.images) == [
        (8, 8),
        (8, 8, 3),
        (8, 8, 3),
        (8, 8, 3),
        (8, 8, 3),
    ]
    assert "1 files are no images and ignored, e.g." in caplog.text and "dog/notes.txt" in caplog.text


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    _class_folders(tmp_path, ["a", "b"])
    _write_text(tmp_path / "classnames.txt", "\ufeffcat\ndog\n")
    _write_text(tmp_path / "zeroshot_classification_templates.txt", "\ufeff{c}\n")
    found = read_folder(tmp_path, "test")
    assert found.class_names == ("cat", "dog") and found.templates == ("{}",)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a.jpg").write_bytes(_image(0))
    _write_text(tmp_path / "val/captions.jsonl", '\ufeff{"image": "a.jpg", "captions": ["cat"]}\n')
    assert read_folder(tmp_path, "val").captions == [("cat",)]


def test_images_of_a_folder_are_named_by_their_path(tmp_path):
    found = read_folder(_class_folders(tmp_path, ["a", "b"]), "test")
    assert found.images.name_of(1) == str(tmp_path / "test/b/a.png")
