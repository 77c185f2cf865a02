"""Corrupted data: in every source each bad record is counted and named, the others are read, and memory stays flat."""

import collections
import faulthandler
import io
import itertools
import json
import os
import pathlib
import random
import tarfile
import tempfile
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from clip_jax import data
from clip_jax.config import DataConfig, DatasetConfig
from clip_jax.data.sources.array_record import write_array_record
from clip_jax.data.sources.tfrecord import HEADER_BYTES, TFRecordFormat, write_tfrecord
from clip_jax.tokenizers import ClipBPE
from clip_jax.typing import BadRecord

SCRIPTS = (
    "a dog",
    "chó", "köpek", "собака", "σκύλος", "շուն", "כלב", "كلب", "कुत्ता", "কুকুর", "ਕੁੱਤਾ", "કૂતરો", "நாய்", "కుక్క", "ನಾಯಿ", "നായ",
    "สุนัข", "ຫມາ", "ခွေး", "ძაღლი", "ውሻ", "犬", "イヌ", "개", "བྱི་ལ", "👩‍👩‍👧‍👦🏽",
)  # fmt: skip


def _image(number, format="PNG", size=8):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (number, 0, 0)).save(file, format)
    return file.getvalue()


def _flipped(content, at):
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def _text_bomb(mode):
    """Return a PNG of 16 kB with a compressed comment of 16 MB."""
    comment, file = PngImagePlugin.PngInfo(), io.BytesIO()
    comment.add_text("Comment", "0" * 2**24, zip=True)
    Image.new(mode, (8, 8)).save(file, "PNG", pnginfo=comment)
    return file.getvalue()


def _bomb(format):
    """Return an image whose header has 60,000 × 60,000 pixels."""
    content, side = bytearray(_image(1, format)), 60_000
    if format == "JPEG":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = 2 * side.to_bytes(2)
    elif format == "PNG":
        content[16:24] = 2 * side.to_bytes(4)
    elif format == "GIF":
        content[6:10] = 2 * side.to_bytes(2, "little")
    else:  # BMP
        content[18:26] = 2 * side.to_bytes(4, "little")
    return bytes(content)


GOOD = {
    **{f"script {number}": (_image(number), text) for number, text in enumerate(SCRIPTS)},
    **{f"1 x 1 {format}": (_image(0, format, size=1), "one pixel") for format in ("PNG", "JPEG", "GIF", "WEBP")},
    "long caption": (_image(0), "a very long caption " * 5_000),
    "caption without spaces": (_image(0), "x" * 100_000),
    "text bomb that libpng skips": (_text_bomb("RGB"), "a comment of megabytes"),
}
BAD = {
    "flipped bit": (_flipped(_image(0), 45), "undecodable image"),
    "truncated PNG": (_image(0, size=64)[:50], "undecodable image"),
    "truncated JPEG": (_image(0, "JPEG", size=64)[:400], "undecodable image"),
    "no image": (b"<html>404</html>", "not an image; it begins with b'<html>"),
    **{
        f"{format} bomb": (_bomb(format), "60000 × 60000 pixels, more than") for format in ("PNG", "JPEG", "GIF", "BMP")
    },
    "text bomb that Pillow refuses": (_text_bomb("1"), "undecodable image: Decompressed data too large"),
}
PAIRS = {**GOOD, **{name: (image, f"of {name}") for name, (image, _) in BAD.items()}}


def _write_tfrecord(folder, pairs):
    write_tfrecord(folder / "a.tfrecord", [{"png": image, "txt": text} for image, text in pairs])
    return folder / "a.tfrecord"


LINKS = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)


def _write_tar(folder, pairs, names=(), format=tarfile.PAX_FORMAT, links=False):
    with tarfile.open(folder / "a.tar", "w", format=format) as archive:
        for number, kind in enumerate(LINKS if links else ()):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for number, (image, text) in enumerate(pairs):
            for field, content in (("png", image), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{names[number] if names else number}.{field}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "a.tar"


def _write_folder(folder, pairs):
    (folder / "images").mkdir(exist_ok=True)
    for number, (image, text) in enumerate(pairs):
        (folder / f"images/{number:05d}.png").write_bytes(image)
        (folder / f"images/{number:05d}.txt").write_text(text)
    return folder / "images"


def _paths(folder, pairs):
    _write_folder(folder, pairs)
    return pa.table(
        {"path": [f"images/{n:05d}.png" for n in range(len(pairs))], "caption": [text for _, text in pairs]}
    )


def _write_csv(folder, pairs):
    pa.csv.write_csv(_paths(folder, pairs), folder / "a.csv")
    return folder / "a.csv"


def _write_jsonl(folder, pairs):
    lines = [json.dumps(row) + "\n" for row in _paths(folder, pairs).to_pylist()]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder / "a.jsonl"


def _write_parquet(folder, pairs):
    columns = {"image": [image for image, _ in pairs], "caption": [text for _, text in pairs]}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=5)
    return folder / "a.parquet"


def _write_array_record(folder, pairs):
    write_array_record(folder / "a.array_record", pairs)
    return folder / "a.array_record"


def _write_huggingface(folder, pairs):
    (folder / "data").mkdir(exist_ok=True)
    columns = {"image": [image for image, _ in pairs], "caption": [text for _, text in pairs]}
    rows, name = pa.table(columns), "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / "data" / name), rows.schema) as writer:
        writer.write_table(rows, 5)
    (folder / "data/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (folder / "data/dataset_info.json").write_text("{}")
    return folder / "data"


WRITERS = {
    "tfrecord": _write_tfrecord,
    "tar": _write_tar,
    "folder": _write_folder,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
    "array_record": _write_array_record,
    "huggingface": _write_huggingface,
}


def _open(path, **options):
    return data.make_source(DataConfig(files=str(path), cache_dir="", max_bad_fraction=1.0, options=options))


def _batches(source, count, batch_size):
    config = DataConfig(captions={"txt": 1.0, "caption": 1.0}, max_bad_fraction=1.0)
    sizes = {"image_size": 8, "batch_size": batch_size, "rows": slice(0, batch_size)}
    return itertools.islice(data.batches(source, ClipBPE(length=16), config, seed=0, start_step=0, **sizes), count)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_bad_record_of_an_epoch_is_named_and_every_other_one_is_read(tmp_path, kind):
    source = _open(WRITERS[kind](tmp_path, list(PAIRS.values())))
    assert len(source) == len(PAIRS) == 42
    batches = list(_batches(source, 3, 14))
    assert all(batch.batch.mask.all() for batch in batches)
    replaced = {row.key: row.reason for batch in batches for row in batch.replaced}
    good, names = range(len(GOOD)), list(PAIRS)
    assert set(replaced) == {source.key(index) for index in range(len(PAIRS)) if index not in good}
    for index in range(len(GOOD), len(PAIRS)):
        assert BAD[names[index]][1] in replaced[source.key(index)], names[index]
    counts = collections.Counter(np.concatenate([batch.example_ids for batch in batches]).tolist())
    assert set(counts) == set(good) and sum(counts.values()) == 42  # a replacement repeats a good one


# ------------------------------------------------------------------------------------------------ damaged containers


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "folder"])
def test_damaged_files_lose_records_with_a_reason_and_nothing_else(tmp_path, kind, caplog):
    """Files with flipped bits, cuts and random bytes are refused by name, or each lost record is logged or bad."""
    pairs = [(_image(number), f"caption {number}") for number in range(20)]
    path, random_bytes = WRITERS[kind](tmp_path, pairs), random.Random(0)
    damaged = next(path.glob("*.arrow")) if kind == "huggingface" else path
    intact = damaged.read_bytes()
    for _ in range(30):
        content, at = bytearray(intact), random_bytes.randrange(len(intact))
        damage = random_bytes.randrange(3)
        if damage == 0:
            content[at] ^= 1 << random_bytes.randrange(8)
        elif damage == 1:
            del content[at:]
        else:
            content[at : at + 100] = random_bytes.randbytes(random_bytes.randrange(200))
        damaged.write_bytes(content)
        caplog.clear()
        try:
            source = _open(path)
        except ValueError as error:
            assert path.name in str(error) or "data.files" in str(error)
            continue
        bad = sum(_is_bad(source, index) for index in range(len(source)))
        if kind in ("tar", "tfrecord"):  # of the others, a footer has the number of records
            assert len(source) - bad == 20 or bad or path.name in caplog.text


def _is_bad(source, index):
    try:
        source.read(index)
    except BadRecord as error:
        assert str(error)
        return True
    return False


NAMES = ("../../up", "/absolute", "nul\0byte", "latin-1\udcff", "a/../b", "C:\\windows", "-rf", "ｗｉｄｅ", "x" * 300)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_hostile_names_of_tar_members_are_only_keys(tmp_path, format):
    pairs = [(_image(number), f"caption {number}") for number in range(len(NAMES))]
    source = _open(_write_tar(tmp_path, pairs, NAMES, format))
    found = [source.read(index) for index in range(len(source))]
    assert [(record.image, *record.captions["txt"]) for record in found] == pairs
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"] and not (tmp_path.parent / "up.png").exists()


def test_devices_and_links_of_tar_are_no_records(tmp_path):
    source = _open(_write_tar(tmp_path, [(_image(9), "a dog")], links=True))
    assert len(source) == 1 and source.read(0).captions == {"txt": ("a dog",)}


@pytest.mark.parametrize("kind", ["tar", "jsonl", "folder"])
def test_json_with_half_an_emoji_is_a_caption_and_of_depth_100000_a_bad_record(tmp_path, kind):
    texts = ['{"caption": "half \\ud83d"}', "[" * 100_000]
    if kind == "folder":
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.png").write_bytes(_image(number))
            (tmp_path / f"{number}.json").write_text(text)
    elif kind == "jsonl":
        (tmp_path / "0.png").write_bytes(_image(0))
        (tmp_path / "a.jsonl").write_text(texts[0].replace("{", '{"path": "0.png", ') + "\n" + texts[1])
    else:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for number, text in enumerate(texts):
                for field, content in (("png", _image(number)), ("json", text.encode())):
                    member = tarfile.TarInfo(f"{number}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    source = _open(tmp_path / "a.jsonl" if kind == "jsonl" else tmp_path)
    (batch,) = _batches(source, 1, 2)
    assert [row.key for row in batch.replaced] == [source.key(1)]


def test_names_of_any_encoding_and_links_to_no_file_in_folders(tmp_path):
    for name in (b"\xff.png", b"a.png"):
        pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(_image(0))
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.png").symlink_to("missing.png")
    source = _open(tmp_path)
    (batch,) = _batches(source, 1, 3)
    assert {row.key: row.reason[:10] for row in batch.replaced} == {"\\udcff.png": "no caption", "b.png": "unreadable"}


@pytest.mark.parametrize("size", ["-1024", "x", "9" * 5000])
def test_a_size_that_is_no_number_of_bytes_ends_its_shard(tmp_path, size, caplog):
    path = _write_tar(tmp_path, [(_image(number), "a dog") for number in range(3)])
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("1.png")
        member.pax_headers = {"size": size}
        archive.addfile(member)
    assert len(_open(path)) == 2 and "has a damaged header" in caplog.text


@pytest.mark.parametrize("kind", ["tar", "tfrecord", "csv", "tsv", "jsonl"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_files_are_refused_by_name_and_not_decompressed(tmp_path, kind, compression):
    """64 MB of zeros are a file of 2 to 65 kB."""
    (tmp_path / f"a.{kind}").write_bytes(pa.compress(bytes(2**26), codec=compression, asbytes=True))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"a.{kind} is compressed by {compression}: .*; decompress it"):
        _open(tmp_path / f"a.{kind}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


# ---------------------------------------------------------------------------------------------------------- campaign


def _write_damaged(kind, folder):
    """Write the pairs and a last one that is cut; damage three frames of TFRecord, and name tar's members hostilely."""
    folder.mkdir()
    pairs = list(PAIRS.values())
    if kind not in ("tar", "tfrecord"):
        return WRITERS[kind](folder, pairs)
    pairs.append((_image(0), "cut"))
    if kind == "tar":
        path = _write_tar(
            folder, pairs, [*NAMES, *(f"{number:03d}" for number in range(len(NAMES), len(pairs)))], links=True
        )
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: content.index(f"{len(pairs) - 1:03d}.txt".encode()) + 100])
    else:
        path = _write_tfrecord(folder, pairs)
        whole = path.read_bytes()
        starts = TFRecordFormat().scan(lambda start, stop: whole[start:stop], 0, len(whole)).offsets
        content = bytearray(whole)
        for number in FLIPPED:
            content[starts[number] + HEADER_BYTES + 5] ^= 1
        path.write_bytes(content[:-10])
    return path


FLIPPED = (3, 17, len(GOOD) - 1)  # of the records of TFRecord


def _reason(kind, number):
    """Return the reason for which a record of a dataset of the campaign is bad, or None."""
    if kind == "tfrecord" and number in FLIPPED:
        return "checksum mismatch"
    name = list(PAIRS)[number]
    return BAD[name][1] if name in BAD else None


def campaign(folder, steps, every_steps):
    """Read batches of all kinds of damage in all formats, counting losses; yield step, bytes in memory and losses.

    One row of each format in a batch. At the end the losses are exactly the bad records that the order has.
    """
    files = {kind: DatasetConfig(files=str(_write_damaged(kind, pathlib.Path(folder) / kind))) for kind in WRITERS}
    source = data.make_source(DataConfig(mixture=files, cache_dir="", max_bad_fraction=1.0))
    assert len(source) == len(files) * len(PAIRS)
    places = [(kind, number) for kind in sorted(files) for number in range(len(PAIRS))]
    reasons = {source.key(at): reason for at, place in enumerate(places) if (reason := _reason(*place))}
    lost = collections.Counter()
    for step, batch in enumerate(_batches(source, steps, len(files)), 1):
        assert batch.batch.mask.all() and len(batch.batch.mask) == len(files)
        assert all(reasons[row.key] in row.reason for row in batch.replaced)
        lost.update(row.key for row in batch.replaced)
        if step % every_steps == 0:
            yield step, _resident_bytes(), lost.total()
    read = source.order(0, len(files))(np.arange(steps * len(files)))[1]
    assert lost == collections.Counter(key for key in map(source.key, read.tolist()) if key in reasons)


def _resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow  # 10 s
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_is_flat_and_every_loss_is_counted_over_many_batches(tmp_path):
    (_, begin, _), *_, (_, end, lost) = campaign(tmp_path, 126, every_steps=21)
    assert end - begin < 20 * 2**20
    assert lost == 3 * (len(BAD) * len(WRITERS) + len(FLIPPED))  # 126 steps are three epochs


def main():
    """Run the campaign over 5,000 batches: `make bench-corruption`."""
    faulthandler.dump_traceback_later(1800, exit=True)  # a batch that never comes
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for step, resident, lost in campaign(folder, 5000, every_steps=500):
            rows.append(resident / 2**20)
            print(
                f"{step:,} batches: {rows[-1]:,.0f} MiB in memory, {lost:,} records lost and named,"
                f" {time.monotonic() - start:.0f} s",
                flush=True,
            )
    print(f"result: {rows[-1] - rows[1]:.1f} MiB more in memory in the last 4,000 of 5,000 batches, every loss counted")


if __name__ == "__main__":
    main()
