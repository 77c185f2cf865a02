"""Tar shards: every archive that Python's tarfile writes, damaged ones, and the fields of a record."""

import base64
import io
import json
import subprocess
import tarfile

import pytest

from clip_jax.config import DataConfig
from clip_jax.data.sources.tar import TarFormat, TarSource
from clip_jax.typing import BadRecord

LONG = "folder/" * 30 + "0" * 120
IMAGE = b"\xff\xd8 bytes of an image"


def _write(path, members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _records(count):
    return [(f"{i:03d}.{field}", content) for i in range(count) for field, content in _fields(i)]


def _fields(number):
    return ("jpg", IMAGE + bytes([number])), ("txt", f"number {number}".encode())


def _open(path, captions=("txt", "caption")):
    return TarSource([str(path)], captions, "")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_records_of_every_tar_format(tmp_path, format):
    source = _open(_write(tmp_path / "a.tar", _records(5), format))
    assert len(source) == 5
    for number in range(5):
        record = source.read(number)
        assert (record.image, record.captions) == (IMAGE + bytes([number]), {"txt": (f"number {number}",)})
        assert record.key == f"{number:03d}"


@pytest.mark.parametrize("long_names", [False, True])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_walk_of_plain_headers_finds_the_records_of_the_scan(tmp_path, format, long_names, monkeypatch):
    records = [(f"a/b.c/{'long/' * 20 * long_names}{name}", content) for name, content in _records(5)]
    archive = _write(tmp_path / "a.tar", records, format).read_bytes()
    scan = TarFormat().scan(lambda start, stop: archive[start:stop], 0, len(archive)).offsets
    if not long_names:
        monkeypatch.setattr(TarFormat, "scan", None)  # not called
    assert TarFormat().offsets(archive[: scan[-1]]).tolist() == scan.tolist()


@pytest.mark.parametrize("at", range(0, 512, 37))
def test_a_changed_byte_of_a_header_is_damage(tmp_path, at):
    archive = bytearray(_write(tmp_path / "a.tar", _records(1)).read_bytes())
    archive[at] ^= 1
    found = TarFormat().scan(lambda start, stop: bytes(archive[start:stop]), 0, len(archive))
    assert found.problem == "has a damaged header"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    members = [(f"{stem}.{field}", content) for stem in (LONG, "写真/犬", "ä.b/c") for field, content in _fields(1)]
    source = _open(_write(tmp_path / "a.tar", members, format))
    assert [source.read(index).key for index in range(len(source))] == [LONG, "写真/犬", "ä.b/c"]


def test_captions_are_members_or_values_of_the_json_member(tmp_path):
    values = json.dumps({"caption": ["one", "two", None], "number": 7, "txt": "unused"}).encode()
    members = [("a.JPG", IMAGE), ("a.txt", b"a dog"), ("a.json", values), ("a.second.txt", b"more")]
    source = _open(_write(tmp_path / "a.tar", members), captions=("txt", "caption", "number", "second.txt", "absent"))
    expected = {"txt": ("a dog",), "caption": ("one", "two"), "number": ("7",), "second.txt": ("more",)}
    assert source.read(0).captions == expected


def test_leftovers_of_macos_and_folders_are_no_records(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [
            ("._a.jpg", b"fork"),
            ("a.jpg", IMAGE),
            ("__MACOSX/._a.txt", b"fork"),
            ("a.txt", b"a dog"),
            (".DS_Store", b"store"),
            ("b.jpg", IMAGE),
            ("b.txt", b"a cat"),
        ]:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = _open(path)
    assert [source.read(index).captions["txt"][0] for index in range(len(source))] == ["a dog", "a cat"]


def test_a_truncated_archive_loses_its_last_record(tmp_path, caplog):
    path = _write(tmp_path / "a.tar", _records(5))
    whole = path.read_bytes()
    begin = whole.index(b"004.jpg")
    for cut in (begin, begin + 100, begin + 512 + 5, begin + 1024 + 200):
        path.write_bytes(whole[:cut])
        caplog.clear()
        assert len(_open(path)) in (3, 4)
        problem = "has no end marker, so later records may be missing; its 4" if cut == begin else "is truncated"
        assert problem in caplog.text


def test_a_damaged_header_ends_its_shard(tmp_path, caplog):
    path = _write(tmp_path / "a.tar", _records(5))
    content = bytearray(path.read_bytes())
    content[content.index(b"003.jpg")] ^= 1
    path.write_bytes(content)
    source = _open(path)
    assert [source.read(index).captions["txt"][0] for index in range(len(source))] == ["number 0", "number 1"]
    assert "has a damaged header" in caplog.text


SPARSE = [("gnu",), *(("posix", f"--sparse-version={version}") for version in ("0.0", "0.1", "1.0"))]


@pytest.mark.parametrize("format", SPARSE)
def test_a_sparse_file_is_a_bad_record_and_the_others_are_read(tmp_path, format):
    """GNU tar stores runs of zeros as a map. Its own format has more than four runs in further blocks."""
    if "GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("only GNU tar writes sparse files")
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(IMAGE + bytes([number]))
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    with (tmp_path / "1.jpg").open("r+b") as file:
        for run in range(1, 40):
            file.seek(run * 2**20)
            file.write(IMAGE)
    names = sorted(path.name for path in tmp_path.iterdir())
    arguments = ["--sparse", f"--format={format[0]}", *format[1:], "-C", str(tmp_path), *names]
    subprocess.run(["tar", "-cf", str(tmp_path / "a.tar"), *arguments], check=True)
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = {member.name: member for member in archive}
        assert list(members) == names and members["1.jpg"].issparse()
    assert (tmp_path / "a.tar").stat().st_size < 2**20
    source = _open(tmp_path / "a.tar")
    assert len(source) == 3
    for number in (0, 2):
        assert source.read(number).image == IMAGE + bytes([number])
    with pytest.raises(BadRecord, match="1.jpg is a sparse file"):
        source.read(1)


def test_links_have_no_data_and_contiguous_files_have(tmp_path):
    """As in Python's tarfile, whatever the size in a link's header."""
    members = [("0.jpg", b"7", IMAGE), ("0.txt", b"0", b"a dog"), ("1/", b"\0", b""), ("link", b"1", b"")]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, 10_000 if kind == b"1" else len(content)
            archive.addfile(member, io.BytesIO(content) if content else None)
        first = archive.offset
    path = _write(tmp_path / "b.tar", [("2.jpg", IMAGE), ("2.txt", b"a cat")])
    path.write_bytes((tmp_path / "a.tar").read_bytes()[:first] + path.read_bytes())
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["0.jpg", "0.txt", "1", "link", "2.jpg", "2.txt"]
    source = _open(path)
    assert [source.read(index).captions["txt"] for index in range(len(source))] == [("a dog",), ("a cat",)]


def test_options_name_the_image_and_encodings(tmp_path):
    members = [("0.jpg", b"thumbnail"), ("0.full.jpg", base64.b64encode(IMAGE)), ("0.txt", "Käse".encode("latin-1"))]
    config = DataConfig(files=str(_write(tmp_path / "a.tar", members)), cache_dir="")
    options = {"image": "full.jpg", "image_encoding": "base64", "text_encoding": "latin-1"}
    record = TarSource.from_config(config, **options).read(0)
    assert (record.image, record.captions) == (IMAGE, {"txt": ("Käse",)})
    with pytest.raises(BadRecord, match="no image; members are"):
        TarSource.from_config(config, image="large.jpg").read(0)


def test_without_usual_captions_the_text_or_title_is_the_caption(tmp_path):
    path = _write(
        tmp_path / "a.tar",
        [("0.jpg", IMAGE), ("0.json", b'{"title": "a dog"}'), ("1.jpg", IMAGE), ("1.text", b"a cat")],
    )
    source = _open(path)
    assert [source.read(index).captions for index in range(2)] == [{"txt": ("a dog",)}, {"txt": ("a cat",)}]
    assert _open(path, captions=("name",)).read(0).captions == {}  # the config names another


BAD = {
    "no image; members are 0.txt": [("0.txt", b"a")],
    "empty image": [("0.jpg", b""), ("0.txt", b"a")],
    "caption 'txt' is not UTF-8": [("0.jpg", IMAGE), ("0.txt", b"\xff\xfe\xfa")],
    "damaged JSON": [("0.jpg", IMAGE), ("0.json", b"{")],
}


@pytest.mark.parametrize("reason", BAD)
def test_unusable_records_raise_with_the_reason(tmp_path, reason):
    with pytest.raises(BadRecord, match=reason):
        _open(_write(tmp_path / "a.tar", BAD[reason])).read(0)


@pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\0" * 2048, b"\x1f\x8b" + b"z" * 2000])
def test_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="hold no records|compressed by gzip; .*|is compressed by gzip"):
        _open(tmp_path / "a.tar")


def test_an_extended_header_cannot_name_a_size_beyond_the_archive(tmp_path):
    path = _write(tmp_path / "a.tar", _records(2), tarfile.PAX_FORMAT)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("x.jpg")
        member.pax_headers = {"size": str(2**60)}
        archive.addfile(member)
    content = path.read_bytes()
    assert len(TarFormat().scan(lambda a, b: content[a:b], 0, len(content)).offsets) == 2
