"""Embeddings of image collections in files, in the layout of clip-retrieval's inference command.

    manifest.json                  weights, data and sizes of the folder
    img_emb/img_emb_0.npy          float16[n E], unit norm
    text_emb/text_emb_0.npy        likewise of the captions, if the data has captions
    metadata/metadata_0.parquet    image_path and caption of each row
    unreadable/unreadable_0.parquet    image_path and reason of each image that has no row

Files of one number are a part of the data. A part is written as a whole, its metadata last: a command that is
interrupted continues with the first part that has none, and hosts share the parts by their number. Source of the
layout: clip_inference/writer.py of https://github.com/rom1504/clip-retrieval (2.44), whose index and page read it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float

from clip_jax.paths import write_atomically
from clip_jax.preprocess import preprocess
from clip_jax.typing import BadRecord, DataSource

if TYPE_CHECKING:
    from clip_jax.inference import Clip

MANIFEST = "manifest.json"
_BATCHES_AHEAD = 2  # that are read and decoded while the devices encode one
_LOOKED_AT = 10  # records that show whether the data has captions


@dataclasses.dataclass(frozen=True)
class Summary:
    """Numbers of images: embedded, unreadable, and embedded by an earlier command."""

    embedded: int = 0
    unreadable: int = 0
    earlier: int = 0

    def __add__(self, other: Summary) -> Summary:
        return Summary(self.embedded + other.embedded, self.unreadable + other.unreadable, self.earlier + other.earlier)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """An image, or the reason why it cannot be decoded."""

    key: str
    caption: str = ""
    pixels: np.ndarray | None = None  # uint8[H W 3]
    problem: str = ""


def embed(
    model: Clip,
    source: DataSource,
    folder: str | os.PathLike[str],
    *,
    part_size: int = 100_000,
    dtype: str = "float16",
    process: int = 0,
    processes: int = 1,
    progress: Callable[[Summary], object] = lambda summary: None,
) -> Summary:
    """Write the embeddings of a source's images, and of their captions, to a folder; continue an earlier command's.

    Args:
      model: from `clip_jax.load`, with `truncate=True` for captions that exceed the context length.
      source: of `clip_jax.data`. Of several captions of an image, the first is embedded.
      folder: a local path or a URL that all processes can reach.
      part_size: images of a part, in the files of one number.
      dtype: of the stored embeddings, 'float16' or 'float32'.
      process: number of this process; it writes every `processes`-th part.
      progress: called after each batch, with the numbers so far.

    Raises:
      ValueError: the folder has embeddings of other weights or data, or an embedding is not finite.
      OSError: the folder is not writable.
    """
    folder, parts = epath.Path(folder), -(-len(source) // part_size)
    with_text = _has_captions(source) and "text" in model.params
    _check_manifest(
        folder,
        {
            "weights": model.fingerprint,
            "model": repr(model),
            "data": source.fingerprint(),
            "records": len(source),
            "part_size": part_size,
            "dtype": dtype,
            "captions": with_text,
        },
    )
    total = Summary()
    for part in range(process, parts, processes):
        examples = range(part * part_size, min((part + 1) * part_size, len(source)))
        paths = _paths(folder, part, parts, with_text)
        if paths["metadata"].exists():
            total += Summary(earlier=len(examples))
            progress(total)
            continue
        columns = collections.defaultdict(list)
        for batch in _prepared(model, source, examples):
            total += _encode(model, batch, columns, with_text)
            progress(total)
        _write_part(paths, columns, model.config.model.embed_dim, dtype)
    return total


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], Float[np.ndarray, "n E"], list[str]]:
    """Return the manifest, the embeddings of all images as float32, and their paths.

    Raises ValueError if the folder has no embeddings, or not all of them.
    """
    folder = epath.Path(folder)
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder}: expected embeddings of clip-jax embed, with {MANIFEST}, got none")
    manifest = json.loads((folder / MANIFEST).read_text())
    parts = -(-manifest["records"] // manifest["part_size"])
    paths = [_paths(folder, part, parts, manifest["captions"]) for part in range(parts)]
    if missing := [part for part in paths if not part["metadata"].exists()]:
        raise ValueError(
            f"{folder}: {len(missing)} of {parts} parts are missing, first {missing[0]['metadata'].name}; run the same"
            " clip-jax embed again, which continues"
        )
    arrays, names = [], []
    for part in paths:
        with part["img_emb"].open("rb") as file:
            arrays.append(np.load(file, allow_pickle=False).astype(np.float32))
        with part["metadata"].open("rb") as file:
            names += pq.read_table(file, columns=["image_path"])["image_path"].to_pylist()
    return manifest, np.concatenate(arrays), names


def _paths(folder: epath.Path, part: int, parts: int, with_text: bool) -> dict[str, epath.Path]:
    """Return the files of a part by the name of their folder."""
    number = f"{part:0{int(math.log10(parts)) + 1}}"
    kinds = {"img_emb": "npy", **({"text_emb": "npy"} if with_text else {}), "unreadable": "parquet"}
    return {
        kind: folder / kind / f"{kind}_{number}.{suffix}" for kind, suffix in (kinds | {"metadata": "parquet"}).items()
    }


def _has_captions(source: DataSource) -> bool:
    for example in range(min(len(source), _LOOKED_AT)):
        try:
            if any(source.read(example).captions.values()):
                return True
        except BadRecord:
            continue
    return False


def _check_manifest(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or compare it with that of an earlier command. Raises ValueError if they differ."""
    path = folder / MANIFEST
    if not path.exists():
        write_atomically(path, json.dumps(manifest, indent=2) + "\n")
        return
    stored = json.loads(path.read_text())
    changed = [key for key in manifest if key != "model" and stored.get(key) != manifest[key]]
    if changed:
        listed = "; ".join(f"{key}: expected {stored.get(key)!r}, got {manifest[key]!r}" for key in changed)
        raise ValueError(f"{folder} has embeddings of another command: {listed}; use another --out")


def _prepared(model: Clip, source: DataSource, examples: Sequence[int]) -> Iterator[list[_Prepared]]:
    """Yield batches of records, which threads read and decode in advance."""
    size, spec = model.config.model.image.image_size, model.config.preprocess

    def prepare(example: int) -> _Prepared:
        try:
            record = source.read(example)
            pixels = preprocess(record.image, size, spec)
        except (BadRecord, ValueError, OSError) as error:
            return _Prepared(source.key(example), problem=str(error))
        captions = [text for texts in record.captions.values() for text in texts if text]
        return _Prepared(source.key(example), next(iter(captions), ""), pixels)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        started: collections.deque[list[concurrent.futures.Future[_Prepared]]] = collections.deque()
        for start in range(0, len(examples), model.max_batch):
            started.append([pool.submit(prepare, i) for i in examples[start : start + model.max_batch]])
            if len(started) > _BATCHES_AHEAD:
                yield [future.result() for future in started.popleft()]
        while started:
            yield [future.result() for future in started.popleft()]


def _encode(model: Clip, batch: Sequence[_Prepared], columns: dict[str, list[Any]], with_text: bool) -> Summary:
    """Append the rows of a batch to the columns of its part."""
    good = [item for item in batch if item.pixels is not None]
    columns["unreadable"] += [(item.key, item.problem) for item in batch if item.pixels is None]
    columns["metadata"] += [(item.key, item.caption) for item in good]
    if good:
        found = {"img_emb": model.encode_pixels(np.stack([item.pixels for item in good]))}
        if with_text:
            found["text_emb"] = model.encode_text([item.caption for item in good])
        for kind, array in found.items():
            if not np.isfinite(array).all():
                row = int(np.argmin(np.isfinite(array).all(axis=1)))
                raise ValueError(f"{good[row].key}: its {kind} is not finite; the weights are damaged")
            columns[kind].append(array)
    return Summary(len(good), len(batch) - len(good))


def _write_part(paths: Mapping[str, epath.Path], columns: Mapping[str, list[Any]], width: int, dtype: str) -> None:
    names = {"metadata": ("image_path", "caption"), "unreadable": ("image_path", "reason")}
    for kind, path in paths.items():
        if kind in names:
            fields = zip(*columns[kind], strict=True) if columns[kind] else ((), ())
            table = pa.table([pa.array(field, pa.string()) for field in fields], names[kind])
            write_atomically(path, lambda file, table=table: pq.write_table(table, file))
        else:
            array = np.concatenate([np.zeros((0, width), np.float32), *columns[kind]]).astype(dtype)
            write_atomically(path, lambda file, array=array: np.save(file, array))
