"""Tables: Parquet, CSV, TSV and JSON lines, with the image as path, URL or bytes, and columns of captions.

A relative path is relative to the folder of the table. Only the columns of image and captions are read. Tables of up to
`memory_bytes` are held in memory, as Arrow arrays, in record order; of larger Parquet files, blocks of the order are
row groups, each read once an epoch. CSV is always held in memory; JSON lines are read by their offsets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import mmap
import os
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Int64

from clip_jax.config import DataConfig
from clip_jax.data import order, storage
from clip_jax.data.sources.blocks import BlockCache, place
from clip_jax.data.sources.fields import IMAGE_FIELDS, REFERENCE_FIELDS, TEMPLATE, Fields
from clip_jax.data.sources.shards import check_compression
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.data.storage import File
from clip_jax.paths import is_url
from clip_jax.typing import BadRecord, Record

MEMORY_BYTES = 2**30  # Parquet data of image and captions that is held in memory as a whole
BLOCK_BYTES = 2**32  # memory of the row groups that lanes hold
LANES = 64  # at most, in block order
FETCH_THREADS = 4  # row groups that are read at the same time
NAMED_ROWS = 100  # of JSON lines, whose keys are its columns
WEB_SECONDS = 20  # for an image of a web server, after which its record is bad

Row = Mapping[str, Any]


@runtime_checkable
class Rows(Protocol):
    """A file's rows. Those in memory or memory-mapped have `row(number)`, those of Parquet `read(group)`."""

    content: str  # hash

    def __len__(self) -> int: ...


class ArrowRows:
    """Rows of an Arrow table."""

    def __init__(self, table: pa.Table, content: str):
        self._columns = dict(zip(table.column_names, table.columns, strict=True))
        self._rows, self.content = table.num_rows, content

    def __len__(self) -> int:
        return self._rows

    def row(self, number: int) -> Row:
        try:
            return {name: column[number].as_py() for name, column in self._columns.items()}
        except UnicodeDecodeError as error:
            raise BadRecord(f"a text is not UTF-8: {error}") from error


class JsonRows:
    """Lines of JSON objects, parsed when they are read."""

    def __init__(self, file: File):
        if is_url(file.path):
            self._data: bytes | mmap.mmap = storage.read_file(file.path)
        else:
            with open(file.path, "rb") as opened:
                self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if file.size else b""
        content, starts = np.frombuffer(self._data, np.uint8), [np.zeros(1, np.int64)]
        for at in range(0, len(content), 2**26):
            starts.append(np.flatnonzero(content[at : at + 2**26] == ord("\n")) + at + 1)
        starts = np.unique(np.append(np.concatenate(starts), len(content)))
        self._starts, self._ends = starts[:-1], starts[1:]
        short = np.flatnonzero(self._ends - self._starts <= 2).tolist()
        blank = [number for number in short if not self._line(number).strip()]
        self._starts, self._ends = np.delete(self._starts, blank), np.delete(self._ends, blank)
        self.content = hashlib.sha256(content).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._starts)

    def names(self) -> list[str]:
        """Return the keys of the first readable rows, each of which may lack some."""
        names: dict[str, None] = {}
        for number in range(min(len(self), NAMED_ROWS)):
            with contextlib.suppress(BadRecord):
                names |= dict.fromkeys(self.row(number))
        return list(names)

    def _line(self, number: int) -> bytes:
        return self._data[self._starts[number] : self._ends[number]]

    def row(self, number: int) -> Row:
        try:
            found = json.loads(self._line(number))
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"damaged JSON: {error}") from error
        if not isinstance(found, dict):
            raise BadRecord(f"expected a JSON object, got {type(found).__name__}")
        return found


class TableSource:
    """Rows of tables, in the order of the files' names."""

    def __init__(self, files: Sequence[File], rows: Sequence[Rows], fields: Fields):
        self._files, self._rows, self._fields, self.num_files = files, rows, fields, len(files)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in rows], dtype=np.int64)])
        if not len(self):
            raise ValueError(f"data.files: the {len(files)} files have no rows; the first is {files[0].path}")

    @classmethod
    def from_config(
        cls,
        config: DataConfig,
        image: str = "",
        image_encoding: str = "file",
        columns: Sequence[str] = (),
        delimiter: str = "",
        quotes: bool = True,
        templates: Sequence[str] = (TEMPLATE,),
        memory_bytes: int = MEMORY_BYTES,
    ) -> TableSource:
        """Open the tables of `data.files`.

        Args:
          image: column with the image's path, URL or bytes; '' for the first usual name.
          image_encoding: 'base64' for images as text, as in TSV files.
          columns: names of the columns of CSV files without a header line.
          delimiter: of CSV; '' for the tab in `.tsv` and in files whose first line has one, else the comma.
          quotes: whether CSV values may be quoted.
          templates: for columns with class ids of Hugging Face.
          memory_bytes: Parquet data that is held in memory.

        Raises:
          ValueError: for files that can't be read, without rows, or without the columns.
        """
        files = cls._list(config)
        fields = table_fields(config, image, image_encoding, templates)
        kinds = {_kind(file.path) for file in files}
        if kinds == {"parquet"}:
            return open_parquet(files, fields, memory_bytes)
        if "parquet" in kinds:
            raise ValueError(f"data.files={config.files!r} has Parquet and {', '.join(sorted(kinds - {'parquet'}))}")
        for file in files:
            check_compression(file)
        rows = [
            JsonRows(file) if _kind(file.path) == "jsonl" else _read_csv(file, fields, columns, delimiter, quotes)
            for file in files
        ]
        for file, part in zip(files, rows, strict=True):
            if isinstance(part, JsonRows) and len(part):
                check_columns(file.path, part.names(), fields)
        return TableSource(files, rows, fields)

    @classmethod
    def check_files(cls, config: DataConfig) -> None:
        """Raise ValueError if a file does not exist or is no table; reads none."""
        cls._list(config)

    @classmethod
    def _list(cls, config: DataConfig) -> list[File]:
        files = sorted(storage.list_files(config.files), key=File.name_and_path)
        if other := [file.path for file in files if _kind(file.path) not in READERS]:
            expected = ", ".join(f".{name}" for name in READERS)
            raise ValueError(f"data.files: {other[0]}: expected a table, {expected}, not compressed")
        return files

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Write Parquet of six row groups, to be read by blocks."""
        records = [SyntheticSource(60).read(index) for index in range(60)]
        table = {"image": [row.image for row in records], "caption": [row.captions["txt"][0] for row in records]}
        pq.write_table(pa.table(table), folder / "pairs.parquet", row_group_size=10)
        return DataConfig(source="table", files=f"{folder}/pairs.parquet", options={"memory_bytes": 0})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, index: int) -> str:
        """Return '<path>#<number of the row>'."""
        part, number = place(self._starts, index)
        return f"{self._files[part].path}#{number}"

    def read(self, index: int) -> Record:
        part, number = place(self._starts, index)
        row, path = self._row(index), self._files[part].path
        image = self._fields.image_of(row, lambda reference: load(reference, path))
        return Record(f"{path}#{number}", image, self._fields.captions_of(row))

    def fingerprint(self) -> str:
        parts = (
            f"{os.path.basename(file.path)} {len(rows)} {rows.content}"
            for file, rows in zip(self._files, self._rows, strict=True)
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _row(self, index: int) -> Row:
        part, number = place(self._starts, index)
        return self._rows[part].row(number)


class ParquetSource(TableSource):
    """Rows of Parquet files that are read by row groups, the blocks of their order."""

    def __init__(self, files: Sequence[File], parts: Sequence[ParquetFile], fields: Fields):
        super().__init__(files, parts, fields)
        self._groups = [(part, group) for part in parts for group in range(len(part.group_rows))]
        self._records = np.array([part.group_rows[group] for part, group in self._groups], np.int64)
        self._block_starts = np.concatenate([[0], np.cumsum(self._records)])
        self._blocks = BlockCache(self._read_group, FETCH_THREADS)

    def order(self, seed: int, batch_size: int) -> order.BlockOrder:
        """Return the order of the examples; as many lanes as their row groups fit into BLOCK_BYTES."""
        size = sum(part.bytes for part in self._rows) / len(self._groups)
        # A lane holds the row group that it reads, the next one, and one that it has finished.
        lanes = min(LANES, max(1, int(BLOCK_BYTES / (3 * size + 1))), len(self._groups))
        mean = max(1, round(float(self._records.mean())))
        return order.BlockOrder(self._records, seed, batch_size, 2 ** int(math.log2(lanes)), mean)

    def prefetch(self, blocks: Int64[np.ndarray, "n"]) -> None:
        """Begin to read these row groups, and free the others, except those of the call before."""
        self._blocks.prefetch(blocks)

    def _read_group(self, block: int) -> ArrowRows:
        part, group = self._groups[block]
        return part.read(group)

    def _row(self, index: int) -> Row:
        block, number = place(self._block_starts, index)
        try:
            rows = self._blocks(block)
        except storage.StorageError:
            raise
        except (pa.ArrowException, EOFError, OSError) as error:
            raise BadRecord(f"damaged row group: {error}") from error
        return rows.row(number)


class ParquetFile:
    """The footer of a Parquet file, and its columns of image and captions."""

    def __init__(self, file: File, fields: Fields):
        self.path = file.path
        opened = self._open()
        metadata, schema = opened.metadata, opened.schema_arrow
        self.features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        self.columns = check_columns(file.path, schema.names, with_classes(fields, self.features))
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.group_rows = [group.num_rows for group in groups]
        self.bytes = sum(
            group.column(number).total_uncompressed_size
            for group in groups
            for number in range(group.num_columns)
            if group.column(number).path_in_schema.split(".")[0] in self.columns
        )
        footer = "".join(f"{group.num_rows} {group.total_byte_size} " for group in groups)
        self.content = hashlib.sha256(f"{file.size} {footer}{schema}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(self.group_rows)

    def read(self, group: int) -> ArrowRows:
        """Return the rows of a row group. Readers are not thread-safe, so each call opens the file."""
        return ArrowRows(self._open().read_row_group(group, self.columns), self.content)

    def read_all(self) -> ArrowRows:
        with named_errors(self.path):
            return ArrowRows(self._open().read(self.columns), self.content)

    def _open(self) -> pq.ParquetFile:
        with named_errors(self.path):
            return pq.ParquetFile(RangeFile(self.path) if is_url(self.path) else self.path, pre_buffer=True)


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Raise ValueError with the file's name for Arrow's error about a damaged one."""
    try:
        yield
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data.files: {path}: {error}; write it again") from error


class RangeFile(io.RawIOBase):
    """A file of an object store, for readers that seek."""

    def __init__(self, path: str):
        self._path, self._size, self._at = path, storage.stat(path).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        data = storage.read_range(self._path, self._at, stop)
        self._at += len(data)
        return data


def table_fields(config: DataConfig, image: str, image_encoding: str, templates: Sequence[str]) -> Fields:
    """Return the fields of a table, whose image may be a path or URL."""
    usual = (*IMAGE_FIELDS, *REFERENCE_FIELDS)
    return Fields(tuple(config.captions), image, usual, image_encoding, templates=tuple(templates))


def open_parquet(files: Sequence[File], fields: Fields, memory_bytes: int) -> TableSource:
    """Return Parquet files' rows, in memory if they fit. Raises ValueError without the columns."""
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        parts = list(pool.map(lambda file: ParquetFile(file, fields), files))
        fields = with_classes(fields, parts[0].features)
        if sum(part.bytes for part in parts) > memory_bytes:
            return ParquetSource(files, parts, fields)
        return TableSource(files, list(pool.map(ParquetFile.read_all, parts)), fields)


def with_classes(fields: Fields, info: Mapping[str, Any]) -> Fields:
    """Return the fields with the class names of Hugging Face's `dataset_info.json`."""
    features = info.get("features") or {}
    names = {name: tuple(kind["names"]) for name, kind in features.items() if "names" in kind}
    return dataclasses.replace(fields, class_names=names)


def check_columns(path: str, names: Iterable[str], fields: Fields) -> list[str]:
    """Return the columns of image and captions. Raises ValueError if there are none."""
    names = list(names)
    image, captions = fields.image_field(names), fields.caption_fields(names)
    if image is None:
        raise ValueError(
            f"data.files: {path}: expected a column with the image, got {', '.join(names)}; set data.options.image to"
            " its name, or data.options.columns for a CSV file without header"
        )
    if not captions:
        raise ValueError(
            f"data.files: {path}: expected a column of data.captions ({', '.join(fields.captions)}), got"
            f" {', '.join(names)}; set e.g. data.captions={{{names[-1]!r}: 1.0}}"
        )
    return list(dict.fromkeys([image, *captions.values()]))


def load(reference: str, table: str) -> bytes:
    """Return the file of a path, relative to the table's folder, or of a URL. Raises BadRecord if it is unreadable."""
    if not is_url(reference):
        reference = f"{table.rpartition('/')[0]}/{reference}" if is_url(table) else _absolute(reference, table)
    try:
        if reference.startswith(("http://", "https://")):
            request = urllib.request.Request(reference, headers={"User-Agent": "clip_jax"})
            with urllib.request.urlopen(request, timeout=WEB_SECONDS) as response:
                return response.read()
        return storage.read_file(reference)
    except storage.StorageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: of the address
        raise BadRecord(f"unreadable image: {error}") from error


def _absolute(path: str, table: str) -> str:
    return os.path.join(os.path.dirname(table), os.path.expanduser(path))


def _kind(path: str) -> str:
    extension = path.lower().rpartition(".")[2]
    return {"parq": "parquet", "ndjson": "jsonl"}.get(extension, extension)


def _read_csv(file: File, fields: Fields, columns: Sequence[str], delimiter: str, quotes: bool) -> ArrowRows:
    data = storage.read_file(file.path)
    header = data[: data.find(b"\n") + 1 or None].decode("utf-8-sig", "replace").rstrip("\r\n")
    delimiter = delimiter or ("\t" if _kind(file.path) == "tsv" or "\t" in header else ",")
    read = pa.csv.ReadOptions(column_names=list(columns) or None)
    parse = pa.csv.ParseOptions(delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes)
    try:
        with pa.csv.open_csv(io.BytesIO(data), read, parse) as reader:
            names = reader.schema.names
        selected = check_columns(file.path, names, fields)
        convert = pa.csv.ConvertOptions(
            include_columns=selected,
            column_types=dict.fromkeys(selected, pa.large_string()),  # a caption such as 0123 is a text
            null_values=[""],
            strings_can_be_null=True,
        )
        table = pa.csv.read_csv(io.BytesIO(data), read, parse, convert)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"data.files: {file.path}: {error}") from error
    return ArrowRows(table, hashlib.sha256(data).hexdigest()[:16])


READERS = ("parquet", "csv", "tsv", "jsonl")
