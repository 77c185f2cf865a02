"""Folders of images: `name.jpg` with `name.txt` or `name.json`, or one folder per class; on local disks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from clip_jax.config import DataConfig
from clip_jax.data.sources.fields import TEMPLATE, Fields
from clip_jax.data.sources.synthetic import SyntheticSource
from clip_jax.paths import check_local
from clip_jax.typing import BadRecord, Record

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class FolderSource:
    """Images below a folder, in the order of their paths."""

    num_files = 1

    def __init__(self, folder: str, fields: Fields, *, captions_required: bool = True):
        """List the folder. Raises ValueError if it has no images, or images with neither captions nor class folders."""
        self._folder, self._fields, digest = folder, fields, hashlib.sha256()
        self._captions_required = captions_required
        parts: list[pa.Array] = []
        captions = self._classes = False
        for path, names in _walk(folder):
            stems = {os.path.splitext(name)[0] for name in names if name.endswith((".txt", ".json"))}
            images = sorted(name for name in names if name.lower().endswith(EXTENSIONS))
            captions |= any(os.path.splitext(name)[0] in stems for name in images)
            self._classes |= bool(images) and path != folder
            found = [os.fsencode(os.path.relpath(f"{path}/{name}", folder)) for name in images]  # of any encoding
            parts.append(pa.array(found, pa.large_binary()))
            digest.update(os.fsencode("".join(f"{name} {_size(f'{path}/{name}')}\n" for name in images)))
        self._paths = pa.concat_arrays([pa.array([], pa.large_binary()), *parts])
        self._classes &= captions_required and not captions
        self._fingerprint = digest.hexdigest()[:16]
        if not len(self):
            raise ValueError(f"data.files={folder!r}: expected images ({', '.join(EXTENSIONS)}), got none")
        if captions_required and not captions and not self._classes:
            raise ValueError(
                f"data.files={folder!r}: {len(self)} images have no captions; expected {self.key(0)} with a"
                " .txt or .json of the same name, or a folder for each class"
            )

    @classmethod
    def from_config(cls, config: DataConfig, templates: Sequence[str] = (TEMPLATE,)) -> FolderSource:
        """Open a folder. templates: captions of class folders, with {} for the folder's name."""
        cls.check_files(config)
        fields = Fields(tuple(config.captions), templates=tuple(templates))
        return cls(os.path.expanduser(config.files).rstrip("/"), fields)

    @classmethod
    def of_images(cls, config: DataConfig) -> FolderSource:
        """Open a folder of images that may have captions, as `name.txt` or `name.json`."""
        cls.check_files(config)
        folder = os.path.expanduser(config.files).rstrip("/")
        return cls(folder, Fields(tuple(config.captions)), captions_required=False)

    @classmethod
    def check_files(cls, config: DataConfig) -> None:
        """Raise ValueError if `data.files` is no local folder."""
        check_local("data.files", config.files)
        if not os.path.isdir(os.path.expanduser(config.files)):
            raise ValueError(f"data.files={config.files!r}: expected a folder of images, e.g. '/data/images'")

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        """Write 60 images with their captions and return a config for tests."""
        for index in range(60):
            record = SyntheticSource(60).read(index)
            (folder / f"{index:05d}.png").write_bytes(record.image)
            (folder / f"{index:05d}.txt").write_text(record.captions["txt"][0])
        return DataConfig(source="folder", files=str(folder))

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        """Return the image's path below the folder; bytes that are not UTF-8 are escaped."""
        return _printable(self._name(index))

    def read(self, index: int) -> Record:
        path = f"{self._folder}/{self._name(index)}"
        try:
            image = Path(path).read_bytes()
        except OSError as error:
            raise BadRecord(f"unreadable: {error}") from error
        if not image:
            raise BadRecord("empty image")
        try:
            return Record(self.key(index), image, self._captions(path))
        except BadRecord:
            if self._captions_required:
                raise
            return Record(self.key(index), image, {})

    def fingerprint(self) -> str:
        return self._fingerprint

    def _name(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return os.fsdecode(self._paths[index].as_py())

    def _captions(self, path: str) -> dict[str, tuple[str, ...]]:
        if self._classes:
            name = os.path.basename(os.path.dirname(path)).replace("_", " ")
            texts = tuple(template.replace("{}", name) for template in self._fields.templates)
            return {self._fields.captions[0]: texts}
        row: dict[str, object] = {}
        stem = os.path.splitext(path)[0]
        try:
            if os.path.isfile(f"{stem}.json"):
                found = json.loads(Path(f"{stem}.json").read_bytes())
                row |= found if isinstance(found, dict) else {}
            if os.path.isfile(f"{stem}.txt"):
                row["txt"] = Path(f"{stem}.txt").read_bytes()
        except (OSError, ValueError, RecursionError) as error:
            raise BadRecord(f"unreadable caption: {error}") from error
        if not row:
            raise BadRecord(f"no caption: expected {_printable(os.path.basename(stem))}.txt or .json")
        return self._fields.captions_of(row)


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def _size(path: str) -> int:
    """Return the size in bytes; -1 of a link to no file, which is a bad record."""
    return os.stat(path).st_size if os.path.exists(path) else -1


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield folders in order with their files, without hidden ones and those of macOS; links are followed once."""
    seen = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield path, [name for name in names if not name.startswith(".")]
