"""Tar shards: order, access on demand, and errors that name the file and the sample."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_jax.evals.datasets.files import FileRanges
from clip_jax.evals.datasets.webdataset import read_webdataset


def _image(value, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, form)
    return file.getvalue()


def _npy(values, **options):
    file = io.BytesIO()
    np.save(file, np.array(values, **options))
    return file.getvalue()


def _value(image):
    return Image.open(io.BytesIO(image)).getpixel((0, 0))[0]


def _write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write(directory, shards, split="test", **texts):
    """Write shards of (name, bytes), nshards.txt, and text files by name."""
    for number, members in enumerate(shards):
        _write_shard(directory / split / f"{number}.tar", members)
    _write_text(directory / split / "nshards.txt", f"{len(shards)}\n")
    for name, text in texts.items():
        _write_text(directory / f"{name}.txt", text)
    return directory


def _classified(first, targets):
    """Return members as CLIP benchmark writes them: s0000000.png, s0000000.cls, …"""
    return [
        member
        for i, target in enumerate(targets, start=first)
        for member in ((f"s{i:07d}.png", _image(i)), (f"s{i:07d}.cls", str(target).encode()))
    ]


@pytest.fixture
def stored(tmp_path):
    return _write(
        tmp_path / "wds_pets",
        [_classified(0, [2, 0, 1]), _classified(3, [1, 1])],
        classnames="cat\ndog\nred panda\n",
        zeroshot_classification_templates="a photo of a {c}.\na blurry {c}.\n",
    )


def test_shards_are_read_in_order(stored):
    found = read_webdataset(stored, "test")
    assert [_value(image) for image in found.images] == [0, 1, 2, 3, 4]
    assert found.targets.dtype == np.int64 and found.targets.tolist() == [2, 0, 1, 1, 1]
    assert found.class_names == ("cat", "dog", "red panda")
    assert found.templates == ("a photo of a {}.", "a blurry {}.")
    assert found.metadata is None and len(found.captions) == 0


def test_shards_are_sorted_by_number(tmp_path):
    _write(tmp_path, [_classified(i, [0]) for i in range(11)])
    assert [_value(image) for image in read_webdataset(tmp_path, "test").images] == list(range(11))


def test_images_support_list_indexing(stored):
    images = read_webdataset(stored, "test").images
    everything = list(images)
    assert images[1:4] == everything[1:4] and images[::-2] == everything[::-2] and images[7:] == []
    assert images[-1] == everything[-1] == images[np.int64(4)]
    assert pickle.loads(pickle.dumps(images))[:] == everything
    with pytest.raises(IndexError):
        images[5]


def test_images_are_read_on_access(stored):
    images = read_webdataset(stored, "test").images
    (stored / "test" / "1.tar").unlink()
    assert _value(images[2]) == 2
    with pytest.raises(FileNotFoundError, match=r"1\.tar"):
        images[3]


def test_the_index_takes_at_most_25_bytes_per_image():
    images = FileRanges(["0.tar"], [0] * 50_000, range(50_000), [1] * 50_000)
    assert len(images) == 50_000
    assert len(pickle.dumps(images)) < 50_000 * 25


def test_truncation_after_indexing_is_reported(stored):
    images = read_webdataset(stored, "test").images
    (stored / "test" / "1.tar").write_bytes(b"short")
    with pytest.raises(
        ValueError, match=r"1\.tar: image 3: expected \d+ bytes from byte 512, got 0.*open the split again"
    ):
        images[3]


def test_keys_follow_webdataset(tmp_path):
    """A key is the path up to the first dot of the base name. Suffixes ignore case; unknown ones are skipped."""
    members = [
        ("./a.b/x.JPG", _image(1, "JPEG")),
        ("./a.b/x.seg.png", b"a mask"),
        ("./a.b/x.json", b"{}"),
        ("./a.b/x.cls", b"3\n"),
        ("./a.b/._x.cls", b"of a Mac"),
        ("./c/x.cls", b"4"),
        ("./c/x.webp", _image(2, "WEBP")),
        ("./c/x.jpg", _image(9, "JPEG")),
    ]
    found = read_webdataset(_write(tmp_path, [members]), "test")
    assert found.targets.tolist() == [3, 4]
    assert list(found.images) == [members[0][1], members[6][1]]
    assert found.class_names == () == found.templates


def test_multilabel_targets(tmp_path):
    rows = [[1, 0, 1], [0, 0, 0]]
    members = [m for i, row in enumerate(rows) for m in ((f"{i}.jpg", _image(i, "JPEG")), (f"{i}.npy", _npy(row)))]
    found = read_webdataset(_write(tmp_path, [members], dataset_type="multilabel\n", classnames="a\nb\nc"), "test")
    assert found.targets.dtype == bool and found.targets.tolist() == rows
    assert found.metadata is None


def test_captions_are_the_lines_of_text_members(tmp_path):
    members = [("0.webp", _image(0, "WEBP")), ("0.txt", "ein Bär\n\n a bear \r\n".encode())]
    members += [("1.webp", _image(1, "WEBP")), ("1.txt", b"a cat"), ("1.npy", b"not read")]
    found = read_webdataset(_write(tmp_path, [members], dataset_type="Retrieval"), "test")
    assert list(found.captions) == [("ein Bär", "a bear"), ("a cat",)]
    assert found.targets is None and found.class_names == ()


def test_npy_members_are_metadata(tmp_path):
    arrays = [_npy([4, 2016, 7]), _npy([5.0, 2017.0, 8.0])]
    members = [m for i, array in enumerate(arrays) for m in (*_classified(i, [i]), (f"s{i:07d}.npy", array))]
    found = read_webdataset(_write(tmp_path, [members]), "test")
    assert found.targets.tolist() == [0, 1]
    assert found.metadata.dtype == np.int64 and found.metadata.tolist() == [[4, 2016, 7], [5, 2017, 8]]


def test_scalar_metadata_is_one_column(tmp_path):
    found = read_webdataset(_write(tmp_path, [[*_classified(0, [0]), ("s0000000.npy", _npy(3))]]), "test")
    assert found.metadata.tolist() == [[3]]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16", "RGB with transparency"])
def test_images_are_decoded_to_rgb_as_clip_benchmark_does(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode.split()[0])
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": (1, 2, 3)} if "with" in mode else {}))
    members = [("s0.png", file.getvalue()), ("s0.cls", b"0")]
    (found,) = read_webdataset(_write(tmp_path, [members]), "test").images
    opened = Image.open(io.BytesIO(found))
    assert opened.mode in ("RGB", "L") and "transparency" not in opened.info
    np.testing.assert_array_equal(opened.convert("RGB"), Image.open(file).convert("RGB"))
    assert (found == file.getvalue()) == (mode in ("RGB", "L"))


SAMPLE = _classified(0, [0])


@pytest.mark.parametrize(
    ("members", "texts", "message"),
    [
        ([], {}, r"test: no samples such as s0\.webp with s0\.cls in 1 shards"),
        ([SAMPLE[0]], {}, r"0\.tar: sample 's0000000' has no target: expected \.cls next to the image, got \.png"),
        ([SAMPLE[1]], {}, r"0\.tar: sample 's0000000' has no image: expected \.webp or \.png.*got \.cls"),
        ([("s.gif", b"")], {}, r"sample 's' has no image: expected .*got neither"),
        ([*SAMPLE, ("t.png", b""), *SAMPLE[1:]], {}, r"sample 't' has no target"),
        ([*SAMPLE, SAMPLE[0]], {}, r"sample 's0000000' has \.png twice"),
        ([*SAMPLE, SAMPLE[1]], {}, r"sample 's0000000' has \.cls twice"),
        ([SAMPLE[0], ("s0000000.cls", b"dog")], {}, r"\.cls: expected a class id such as 7, got b'dog'"),
        ([SAMPLE[0], ("s0000000.cls", b"-1")], {}, r"\.cls: .* got b'-1'"),
        (_classified(0, [0, 2]), {"classnames": "a\nb"}, r"'s0000001': \.cls: expected 0 to 1 .*, got class id 2"),
        (SAMPLE, {"classnames": "a\n\nb"}, r"classnames\.txt, line 2 is empty"),
        (
            SAMPLE,
            {"zeroshot_classification_templates": "{c}\nphoto"},
            r"templates\.txt, line 2: expected \{c\} .* got 'photo'",
        ),
        (SAMPLE, {"dataset_type": "captioning"}, r"dataset_type\.txt: expected classification, mult.*got 'captioning'"),
        (SAMPLE, {"dataset_type": "multilabel"}, r"has no target: expected \.npy .*got \.png"),
        (SAMPLE, {"dataset_type": "retrieval"}, r"has no target: expected \.txt .*got \.png"),
        ([SAMPLE[0], ("s0000000.txt", b" \n")], {"dataset_type": "retrieval"}, r"\.txt is empty"),
        ([SAMPLE[0], ("s0000000.txt", b"\xff")], {"dataset_type": "retrieval"}, r"\.txt is not UTF-8"),
        ([*SAMPLE, ("s0000000.npy", _npy([0.5]))], {}, r"expected integers as metadata, got float64\[1\]"),
        ([*SAMPLE, ("s0000000.npy", _npy([np.nan]))], {}, r"expected integers as metadata, got float64\[1\]"),
        ([*SAMPLE, ("s0000000.npy", _npy(["Africa"]))], {}, r"expected integers as metadata, got <U6\[1\]"),
        (
            [*SAMPLE, ("s0000000.npy", _npy([{}], dtype=object))],
            {},
            r"expected an array that np\.load reads without pickle",
        ),
        ([*SAMPLE, ("s0000000.npy", b"")], {}, r"expected an array that np\.load reads"),
        ([*SAMPLE, ("s0000000.npy", _npy([1])), *_classified(1, [0])], {}, r"'s0000001' has no \.npy, but 1 of 2"),
        (
            [*SAMPLE, ("s0000000.npy", _npy([1])), *_classified(1, [0]), ("s0000001.npy", _npy([1, 2]))],
            {},
            r"'s0000001': \.npy: expected 1 numbers as in .*'s0000000', got 2",
        ),
        ([SAMPLE[0], ("s0000000.npy", _npy([2]))], {"dataset_type": "multilabel"}, r"expected 0 or 1 for .*int64\[1\]"),
        ([SAMPLE[0], ("s0000000.npy", _npy(1))], {"dataset_type": "multilabel"}, r"expected 0 or 1 for .*int64\[\]"),
        (
            [SAMPLE[0], ("s0000000.npy", _npy([1]))],
            {"dataset_type": "multilabel", "classnames": "a\nb"},
            r"\.npy: expected 2 classes as in classnames\.txt, got 1",
        ),
    ],
)
def test_invalid_samples_are_reported(tmp_path, members, texts, message):
    with pytest.raises(ValueError, match=message):
        read_webdataset(_write(tmp_path, [members], **texts), "test")


@pytest.mark.parametrize(
    ("present", "expected", "message"),
    [
        (["0", "2"], "4", r"test: 1\.tar, 3\.tar missing; expected 4 shards as in nshards\.txt, got 0\.tar, 2\.tar"),
        (["0", "2"], None, r"test: 1\.tar missing; expected numbers from 0 without gaps"),
        ([], None, r"test: 0\.tar missing; .* got no tar"),
        (["00000"], None, r"test: 0\.tar missing; .* got 00000\.tar"),
        (["0", "1"], "1", r"test: 1\.tar unexpected; expected 1 shards"),
        (["0", "old"], None, r"test: old\.tar unexpected"),
        (["0"], "one", r"nshards\.txt: expected the number of shards, .*got 'one'"),
        (["0"], "0", r"nshards\.txt: .*got '0'"),
    ],
)
def test_missing_and_unexpected_shards_are_reported(tmp_path, present, expected, message):
    (tmp_path / "test").mkdir()
    for name in present:
        _write_shard(tmp_path / "test" / f"{name}.tar", SAMPLE)
    if expected:
        _write_text(tmp_path / "test" / "nshards.txt", expected)
    with pytest.raises(ValueError, match=message):
        read_webdataset(tmp_path, "test")


def test_the_number_of_shards_is_optional(stored):
    (stored / "test" / "nshards.txt").unlink()
    assert len(read_webdataset(stored, "test").images) == 5


def test_a_missing_split_is_reported_with_the_existing_ones(stored):
    with pytest.raises(ValueError, match=r"wds_pets/train is not a folder; splits of .*wds_pets: test"):
        read_webdataset(stored, "train")
    with pytest.raises(ValueError, match=r"none"):
        read_webdataset(stored / "nowhere", "train")


def _truncated_in_an_image(data):
    return data[:600]


def _truncated_between_members(data):
    return data[:4096]  # after two samples; each member is a header and one block


def _truncated_in_a_header(data):
    return data[: 4096 + 100]


def _byte_changed_in_the_second_header(data):
    return data[: 1024 + 150] + b"\xff" + data[1024 + 151 :]


def _git_lfs_pointer(data):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def _gzip(data):
    return b"\x1f\x8b" + data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated_in_an_image, "unexpected end of data"),
        (_truncated_between_members, "at byte 4096, after 2 samples"),
        (_truncated_in_a_header, "at byte 4096, after 2 samples"),
        (_byte_changed_in_the_second_header, "at byte 1024, after 1 samples"),
        (lambda data: b"", "empty"),
        (lambda data: b"no tar" * 200, "header"),
        (_git_lfs_pointer, "git lfs pull"),
        (_gzip, r"compressed.*gunzip -S \.tar 1\.tar"),
    ],
)
def test_damaged_shards_are_reported(tmp_path, damage, message):
    _write(tmp_path, [_classified(0, [0]), _classified(1, [0, 1, 1])])
    path = tmp_path / "test" / "1.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"1\.tar is not a complete tar archive: .*{message}"):
        read_webdataset(tmp_path, "test")
