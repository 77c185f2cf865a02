"""Tar shards of WebDataset (https://github.com/webdataset/webdataset): members of equal key are one record.

The key is the member's path up to the first dot of its name, the rest is the field: `a/0001.jpg`, `a/0001.txt`,
`a/0001.json`. Members of a record follow each other. A caption field is a member of that name, or a value of the JSON
member. img2dataset writes jpg, txt and json.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from clip_jax.config import DataConfig
from clip_jax.data.index import Read, Scan
from clip_jax.data.sources.shards import ShardSource
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.typing import BadRecord, Record

BLOCK = 512
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "image", "gif", "bmp", "tif", "tiff", "avif")
END = bytes(BLOCK)
ADLER_BASE = (
    65_521  # the low half of `zlib.adler32` is 1 plus the sum of the bytes modulo this; `sum` takes 10 times as long
)
# Kinds of members, as in Python's tarfile, which also reads no data of links, devices and directories.
FILES, SPARSE, LINKS, EXTENDED = b"0\x007S", b"S", b"123456", b"LKxg"


class Member(NamedTuple):
    """A regular file of an archive."""

    name: str
    begin: int  # of its headers
    start: int  # of its data
    size: int
    sparse: bool  # its data are those outside of holes, after a map

    @property
    def end(self) -> int:
        return self.start + -(-self.size // BLOCK) * BLOCK

    @property
    def key(self) -> str:
        folder, _, name = self.name.rpartition("/")
        return f"{folder}/{name.partition('.')[0]}"

    @property
    def field(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarFormat:
    """Records of tar archives: consecutive members of one key."""

    name = "tar"

    def scan(self, read: Read, start: int, stop: int) -> Scan:
        """Return the complete records between two offsets; names and sizes stand for the content."""
        offsets, digest, key, end, problem = [start], hashlib.sha256(), None, start, ""
        try:
            for member in _members(read, start, stop):
                if member.key != key:
                    if key is not None:
                        offsets.append(member.begin)
                    key = member.key
                digest.update(f"{member.name} {member.size}\n".encode("utf-8", "surrogateescape"))
                end = min(member.end, stop)
        except tarfile.TarError as error:
            problem = str(error)
        if key is not None:
            offsets.append(end)
        if problem and key is not None:
            offsets.pop()  # the last record may lack members
        if not problem and read(max(start, stop - BLOCK), stop) != END:
            problem = "has no end marker, so later records may be missing"
        return Scan(np.array(offsets, np.int64), digest.hexdigest()[:16], problem)

    def offsets(self, block: bytes) -> Int64[np.ndarray, "n"] | None:
        """As those of `scan`, which takes six times as long, if all headers are plain: files with short names."""
        offsets, key, at = [], None, 0
        while at < len(block):
            path, size = block[at : at + 100].partition(b"\0")[0], block[at + 124 : at + 135]
            folder, _, name = path.rpartition(b"/")
            is_file = block[at + 156 : at + 157] in FILES[:2] and block[at + 345 : at + 346] == b"\0"  # no long name
            if not (is_file and size and not size.strip(b"01234567") and name and not _is_leftover(_decode(path))):
                break
            if (folder, name.partition(b".")[0]) != key:
                offsets.append(at)
                key = folder, name.partition(b".")[0]
            at += BLOCK + -(-int(size, 8) // BLOCK) * BLOCK
        if at != len(block):
            return self.scan(lambda start, stop: block[start:stop], 0, len(block)).offsets
        return np.array([*offsets, at], np.int64)


class TarSource(ShardSource):
    """Records of tar shards."""

    format = TarFormat()
    usual_images = IMAGE_FIELDS

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Write three shards of 20 records and return a config for tests."""
        for shard in range(3):
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
                for number in range(20 * shard, 20 * shard + 20):
                    record = SyntheticSource(60).read(number)
                    for field, content in (("png", record.image), ("txt", record.captions["txt"][0].encode())):
                        member = tarfile.TarInfo(f"{number:08d}.{field}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        return DataConfig(source="tar", files=f"{folder}/*.tar", cache_dir=str(folder))

    def parse(self, data: bytes, index: int) -> Record:
        try:
            members = list(_members(lambda start, stop: data[start:stop], 0, len(data)))
        except tarfile.TarError as error:
            raise BadRecord(str(error)) from error
        if sparse := [member.name for member in members if member.sparse]:
            raise BadRecord(f"{sparse[0]} is a sparse file; write the archive without tar's --sparse")
        files = {member.field: data[member.start : member.start + member.size] for member in members}
        if self.fields.image_field(files) is None:
            raise BadRecord(f"no image; members are {', '.join(member.name for member in members)}")
        has_captions = "json" not in files or set(self.fields.captions) <= set(files)
        row = files if has_captions else _json(files["json"]) | files
        return Record(members[0].key.lstrip("/"), self.fields.image_of(files), self.fields.captions_of(row))


def _members(read: Read, start: int, stop: int) -> Iterator[Member]:
    """Yield the files of an archive, without macOS's leftovers. Raises tarfile.TarError where it is damaged."""
    begin = at = start
    attributes: dict[str, str] = {}  # of extended headers, which precede a member
    while at + BLOCK <= stop:
        header = read(at, at + BLOCK)
        if header == END:
            return
        kind, length = _parse_header(header)
        if kind in LINKS:
            length = 0
        elif kind not in EXTENDED and "size" in attributes:
            length = int(attributes["size"])
        data = at + BLOCK
        more = kind == SPARSE and header[482]  # blocks with the rest of its map
        while more and data + BLOCK <= stop:
            more, data = read(data, data + BLOCK)[504], data + BLOCK
        end = data + -(-length // BLOCK) * BLOCK
        if end > stop and data + length > stop:
            raise tarfile.ReadError("is truncated")
        if kind == b"L":  # GNU: long name
            attributes["path"] = _decode(read(data, data + length).rstrip(b"\0"))
        elif kind == b"x":  # POSIX: extended attributes
            attributes |= _pax(read(data, data + length))
        elif kind not in EXTENDED:
            name = attributes.get("GNU.sparse.name") or attributes.get("path") or _header_name(header)
            if kind in FILES and not _is_leftover(name):
                sparse = kind == SPARSE or any(key.startswith("GNU.sparse.") for key in attributes)
                yield Member(name, begin, data, length, sparse)
            attributes, begin = {}, end
        at = end
    if at != stop:  # beyond it: within the padding of the last member, and others may have followed
        raise tarfile.ReadError("is truncated")


def _parse_header(header: bytes) -> tuple[bytes, int]:
    """Return type and size of a member. Raises tarfile.TarError if the checksum is wrong."""
    try:
        expected = int(header[148:156].strip(b" \0") or b"0", 8)
        octal = header[124:136].rstrip(b" \0")
        size = int(octal, 8) if octal.isdigit() else tarfile.nti(header[124:136])  # GNU's base 256
    except ValueError as error:
        raise tarfile.ReadError("has a damaged header") from error
    total = expected + sum(header[148:156]) - 8 * ord(" ")
    if (1 + total) % ADLER_BASE != zlib.adler32(header) & 0xFFFF or size < 0:
        raise tarfile.ReadError("has a damaged header")
    return header[156:157], size


def _header_name(header: bytes) -> str:
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    return _decode(
        prefix + b"/" + name if prefix and header[257:262] == b"ustar" and header[263:265] == b"00" else name
    )


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Return the attributes of an extended header: '<length> <name>=<value>' and a line feed, repeatedly."""
    attributes, at, stop = {}, 0, len(data.rstrip(b"\0"))
    try:
        while at < stop:
            length = int(data[at : data.index(b" ", at)])
            name, _, value = data[data.index(b" ", at) + 1 : at + length - 1].partition(b"=")
            attributes[_decode(name)] = _decode(value)
            at += max(1, length)
        if int(attributes.get("size", 0)) < 0:
            raise ValueError("negative size")
    except ValueError as error:
        raise tarfile.ReadError("has a damaged header") from error
    return attributes


def _is_leftover(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith("._") or base in ("", ".DS_Store") or "__MACOSX/" in name


def _json(data: bytes) -> dict:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"damaged JSON: {error}") from error
    return found if isinstance(found, dict) else {}
