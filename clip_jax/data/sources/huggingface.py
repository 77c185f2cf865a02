"""Datasets of Hugging Face: the folder of `save_to_disk`, whose Arrow files are memory-mapped, or Parquet files.

Files of `save_to_disk`: `state.json` lists the Arrow files, `dataset_info.json` has the features; several splits have a
folder each and a `dataset_dict.json` (datasets/arrow_dataset.py and dataset_dict.py of datasets 4).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from clip_jax.config import DataConfig
from clip_jax.data import storage
from clip_jax.data.sources import table
from clip_jax.data.sources.fields import TEMPLATE, Fields
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.data.storage import File
from clip_jax.paths import is_url


class HuggingFaceSource(table.TableSource):
    """Rows of a split."""

    @classmethod
    def from_config(
        cls,
        config: DataConfig,
        split: str = "train",
        image: str = "",
        image_encoding: str = "file",
        templates: Sequence[str] = (TEMPLATE,),
        memory_bytes: int = table.MEMORY_BYTES,
    ) -> table.TableSource:
        """Open the folder `data.files`. For the options: `TableSource.from_config`; split: 'train', or another.

        Raises:
          ValueError: if there is no dataset, no such split, or it has no columns of image and captions.
        """
        fields = table.table_fields(config, image, image_encoding, templates)
        saved = _saved_folder(config.files, split)
        if not saved:
            return table.open_parquet(_parquet_files(config.files, split), fields, memory_bytes)
        info = json.loads(storage.read_file(f"{saved}/dataset_info.json"))
        state = json.loads(storage.read_file(f"{saved}/state.json"))
        fields = table.with_classes(fields, info)
        files = [storage.stat(f"{saved}/{entry['filename']}") for entry in state["_data_files"]]
        if not files:
            raise ValueError(f"data.files: {saved}/state.json lists no Arrow file: the split is empty")
        written = str(state.get("_fingerprint"))  # of datasets: another one for data that are written again
        return table.TableSource(files, [_read_arrow(file, fields, written) for file in files], fields)

    @classmethod
    def check_files(cls, config: DataConfig) -> None:
        """Raise ValueError if `data.files` is not the folder of a dataset with the split."""
        split = str(config.options.get("split", "train"))
        if not _saved_folder(config.files, split):
            _parquet_files(config.files, split)

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Write 60 rows as `save_to_disk` does, and return a config for tests."""
        records = [SyntheticSource(60).read(index) for index in range(60)]
        images = [{"bytes": row.image, "path": None} for row in records]
        rows = pa.table({"image": images, "caption": [row.captions["txt"][0] for row in records]})
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text('{"features": {"image": {"_type": "Image"}}}')
        return DataConfig(source="huggingface", files=str(folder))


def _exists(path: str) -> bool:
    try:
        storage.stat(path)
    except FileNotFoundError:
        return False
    return True


def _saved_folder(folder: str, split: str) -> str:
    """Return the folder that `save_to_disk` has written for a split, '' if there is none."""
    folder = folder.rstrip("/")
    if not _exists(f"{folder}/dataset_dict.json"):
        return folder if _exists(f"{folder}/state.json") else ""
    splits = json.loads(storage.read_file(f"{folder}/dataset_dict.json"))["splits"]
    if split not in splits:
        raise ValueError(f"data.options.split={split!r}: {folder} has the splits {', '.join(splits)}")
    return f"{folder}/{split}"


def _parquet_files(folder: str, split: str) -> list[File]:
    """Return the Parquet files of a split, by the names `train-00000-of-00001.parquet` or `train/0000.parquet`."""
    files = storage.list_files(f"{folder.rstrip('/')}/**/*.parquet")
    by_split: dict[str, list[File]] = {}
    for file in files:
        parent, _, name = file.path.rpartition("/")
        match = re.match(r"(\w+?)(?:-\d+-of-\d+)?\.parquet$", name)
        named = match[1] if match and not match[1].isdigit() else parent.rpartition("/")[2]
        by_split.setdefault(named, []).append(file)
    if split not in by_split:
        raise ValueError(f"data.options.split={split!r}: {folder} has Parquet files of {', '.join(sorted(by_split))}")
    folders = {file.path.rpartition("/")[0] for file in by_split[split]}
    if len(folders) > 1:
        listed = ", ".join(sorted(folders)[:5])
        raise ValueError(f"data.files={folder!r}: the split {split!r} is in several folders; give one of {listed}")
    return sorted(by_split[split], key=lambda file: file.path)


def _read_arrow(file: File, fields: Fields, written: str) -> table.ArrowRows:
    """Return the rows of an Arrow file, memory-mapped if it is local. Their content is hashed without the images."""
    source = pa.BufferReader(storage.read_file(file.path)) if is_url(file.path) else pa.memory_map(file.path)
    with table.named_errors(file.path):
        rows = pa.ipc.open_stream(source).read_all()
    columns = table.check_columns(file.path, rows.column_names, fields)
    with table.named_errors(file.path):
        rows.select(columns).validate(full=True)  # wrong offsets would be read beyond the file
    digest = hashlib.sha256(f"{file.size} {written} {rows.schema}".encode())
    for chunk in (chunk for column in rows.select(columns).columns for chunk in column.chunks):
        _hash(chunk, digest)
    return table.ArrowRows(rows.select(columns), digest.hexdigest()[:16])


def _hash(values: pa.Array, digest: Any) -> None:
    """Add values to a hash; of bytes, such as images, the lengths alone."""
    if pa.types.is_struct(values.type):
        for number in range(values.type.num_fields):
            _hash(values.field(number), digest)
    else:
        binary = pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
        for buffer in values.buffers()[: 2 if binary else None]:  # validity, offsets, and the bytes
            digest.update(buffer or b"")
