"""The source that reads `data.files`, by the files' names or first bytes, and the layout of folders."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable

from clip_jax.config import DataConfig
from clip_jax.data import index, storage
from clip_jax.data.sources.folder import EXTENSIONS
from clip_jax.paths import is_url

# Extension -> source
EXTENSION_SOURCES = {
    "tfrecord": "tfrecord",
    "tfrecords": "tfrecord",
    "tar": "tar",
    "array_record": "array_record",
    "arrayrecord": "array_record",
    **dict.fromkeys(("parquet", "parq", "csv", "tsv", "jsonl", "ndjson"), "table"),
    **dict.fromkeys((extension[1:] for extension in EXTENSIONS), "folder"),
}
SHARDS = ("tfrecord", "tar", "array_record")
OF_FOLDERS = ("folder", "tfds", "huggingface")  # sources whose `data.files` is a folder
MAX_NAMES = 10_000  # of a folder's subfolders that are looked at


def recognize(config: DataConfig) -> DataConfig:
    """Return the config with `source`, if it has none, and with the files of a folder as `files`.

    Raises:
      ValueError: if the files do not exist, are of several formats, or of none.
    """
    files = config.files
    if not files or config.source in OF_FOLDERS:
        if config.source:
            return config
        raise ValueError(f"data.files is empty; give a folder, or files such as {storage.EXAMPLES}, or data.source")
    folder = _as_folder(files)
    if folder:
        found = _recognize_folder(folder, config.source)
        return dataclasses.replace(config, source=found[0], files=found[1])
    if config.source:
        return config
    paths = [file.path for file in storage.list_files(files)]
    kinds = Counter(_source_of(path) or _sniffed(path) for path in paths)
    (source, _), *others = kinds.most_common()
    if others or not source:
        raise ValueError(_unclear(files, paths))
    if source == "folder":
        raise ValueError(f"data.files={files!r} are images; give their folder, e.g. {os.path.dirname(paths[0])!r}")
    if _extension(paths[0]) == "arrow":
        source, files = "huggingface", os.path.dirname(paths[0])
    return dataclasses.replace(config, source=source, files=files)


def _as_folder(files: str) -> str:
    """Return the folder that `data.files` is, or '': an existing local one, or a URL that ends with a slash."""
    local = os.path.expanduser(files)
    if is_url(files):
        return files.rstrip("/") if files.endswith("/") else ""
    return (local.rstrip("/") or "/") if os.path.isdir(local) else ""


def _recognize_folder(folder: str, wanted: str) -> tuple[str, str]:
    """Return source and files of a folder. wanted: the source, if it is given."""
    names = _names(folder)
    if not wanted:
        if {"dataset_info.json", "features.json"} <= set(names):
            return "tfds", folder
        if {"state.json", "dataset_dict.json"} & set(names):
            return "huggingface", folder
    stems = {name.partition(".")[0] for name in names if _source_of(name) in SHARDS}
    if not is_url(folder):
        stems |= {name for name in names if os.path.isdir(f"{folder}/{name}")}
    # img2dataset writes tables of the metadata of its shards and folders.
    data = [name for name in names if not (_source_of(name) == "table" and name.partition(".")[0] in stems)]
    by_source: dict[str, set[str]] = {}
    for name in data:
        if source := _source_of(name):
            by_source.setdefault(source, set()).add(_extension(name))
    if "table" in by_source and (
        listed := [name for name in data if re.match(r"metadata\.(csv|jsonl|parquet)$", name)]
    ):
        by_source = {"table": {_extension(listed[0])}}  # Hugging Face: a table of the folder's images
    if wanted:
        by_source = {wanted: by_source[wanted]} if wanted in by_source else {}
    if not by_source and not wanted:
        return _recognize_subfolders(folder, names)
    if len(by_source) != 1 or (len(next(iter(by_source.values()))) > 1 and "folder" not in by_source):
        raise ValueError(_unclear(folder, names, wanted))
    ((source, (extension, *_)),) = by_source.items()
    if source == "folder":
        return source, folder
    begin = folder if is_url(folder) else glob.escape(folder)
    end = "" if all(name.endswith(extension) for name in data if _source_of(name) == source) else "*"
    return source, f"{begin}/*.{extension}{end}"


def _recognize_subfolders(folder: str, names: list[str]) -> tuple[str, str]:
    """Return source and files of a folder without data of its own."""
    if is_url(folder):
        if any(file.path for file in storage.list_files(f"{folder}/**/*.parquet")):
            return "huggingface", folder
        raise ValueError(_unclear(folder, names))
    below = [
        os.path.join(path, name)
        for path, _, files in itertools.islice(os.walk(folder, followlinks=True), MAX_NAMES)
        for name in files
        if not name.startswith(".")
    ]
    prepared = sorted(os.path.dirname(path) for path in below if os.path.basename(path) == "features.json")
    if len(prepared) == 1:
        return "tfds", prepared[0]
    if prepared:
        raise ValueError(f"data.files={folder!r} has several datasets of TFDS; give one of {', '.join(prepared[:5])}")
    sources = {_source_of(path) for path in below}
    if "folder" in sources:
        return "folder", folder
    if any(_extension(path) == "parquet" for path in below):
        return "huggingface", folder
    raise ValueError(_unclear(folder, [os.path.relpath(path, folder) for path in below]))


def _names(folder: str) -> list[str]:
    if is_url(folder):
        names = [os.path.basename(file.path) for file in storage.list_files(f"{folder}/*")]
    else:
        names = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "__MACOSX")
    return [name for name in names if name != index.NAME]


def _extension(name: str) -> str:
    """Return the extension without compression, and of TFDS's names such as `a-train.tfrecord-00000-of-00002`."""
    name = re.sub(r"\.(gz|zst|bz2)$|-\d+-of-\d+$", "", os.path.basename(name).lower())
    return name.rpartition(".")[2] if "." in name else ""


def _source_of(name: str) -> str:
    return "huggingface" if _extension(name) == "arrow" else EXTENSION_SOURCES.get(_extension(name), "")


def _sniffed(path: str) -> str:
    """Return the source of a file without a known extension, by its first bytes; '' for none."""
    from clip_jax.data.sources.tfrecord import HEADER_BYTES, is_header

    head = storage.read_range(path, 0, 512)
    if head[257:262] == b"ustar":
        return "tar"
    return "tfrecord" if is_header(head[:HEADER_BYTES]) else ""


def _unclear(files: str, paths: Iterable[str], wanted: str = "") -> str:
    counts = Counter(f".{_extension(path)}" if _extension(path) else "without extension" for path in paths)
    seen = ", ".join(f"{count:,} {extension}" for extension, count in counts.most_common(8)) or "nothing"
    expected = f"files for data.source={wanted!r}" if wanted else "files of one format"
    sources = ", ".join(dict.fromkeys((*EXTENSION_SOURCES.values(), "tfds", "huggingface")))
    return (
        f"data.files={files!r}: expected {expected}, got {seen}; give the files of one format, or data.source, one of"
        f" {sources}"
    )
