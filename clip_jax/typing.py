"""Types that several packages share, and the axis letters of arrays.

The same letters name axes in suffixes (`x_BLD`), einsum strings (`'BLD,DNK->BLNK'`) and annotations
(`Float[Array, "B L D"]`):

    B  global batch        L  tokens or patches    V  vocabulary
    b  per-device batch    D  width                E  embedding
    H W C  image           N  heads                Q  classes
                           K  head dimension       T  templates
                           F  mlp width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Int64, PyTree

Params = PyTree  # nested dicts of arrays, `jax.ShapeDtypeStruct`s or shardings
# A leaf of a pytree dataclass: an array, or any result of `jax.tree.map` (shape, sharding, None).
Leaf = Any
Metrics = dict[str, Array]
ArrayLike = Array | np.ndarray

SLICE = "slice"  # mesh axis over TPU slices, which the data center network connects


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Image-text pairs, as transferred from host to device."""

    image: Leaf  # uint8[B H W 3], RGB, not normalized: a quarter of the bytes of float32
    text: Leaf  # int32[B L], token ids: start token, tokens, end token, padding
    mask: Leaf  # bool[B], False for padding rows


@dataclasses.dataclass(frozen=True)
class Record:
    """One example of a training source."""

    key: str
    image: bytes  # encoded
    captions: Mapping[str, tuple[str, ...]]  # by feature, e.g. `{'name': ('dog face',), 'keyword': ('pet', 'animal')}`


class BadRecord(ValueError):
    """A record that cannot be decoded or has no caption. The message is the reason in a few words."""


@runtime_checkable
class DataSource(Protocol):
    """A finite set of records with random access by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Return a record; thread-safe. Raises BadRecord with the reason if it is damaged."""

    def key(self, index: int) -> str:
        """Return a record's file and position, for messages; also for damaged records."""

    def fingerprint(self) -> str:
        """Return a hash of the records and their order."""


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A damaged record and its replacement, by `DataSource.key`."""

    key: str
    reason: str
    replacement: str


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One host's rows of a global batch."""

    batch: Batch
    example_ids: Int64[np.ndarray, "b"]  # indices of the records, after replacement
    replaced: tuple[Replaced, ...]


@runtime_checkable
class Tokenizer(Protocol):
    """Function from texts to rows of token ids: start token, tokens, end token, padding."""

    vocab_size: int
    length: int
    pad_id: int
    eos_id: int

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]: ...


@dataclasses.dataclass(frozen=True)
class EvalDataset:
    """Pictures with the texts or classes that are right for them.

    images: encoded pictures (PNG, JPEG, WebP).
    texts: the candidates, captions or classes; several wordings of one are averaged as embeddings.
    targets: for every image the index in `texts` that is right, or for several at once whether each is.
    image_names: what a report writes under a picture.
    attribution: what the licences of the pictures ask to be said where they are shown.
    groups: which part of the set an image is of, for the worst of them; negative for none.
    metric: the main metric, a name in `clip_jax.evals.metrics.METRICS`; retrieval has recall.
    """

    name: str
    images: Sequence[bytes]
    texts: Sequence[tuple[str, ...]]
    targets: Int64[np.ndarray, "n"] | Bool[np.ndarray, "n M"]
    image_names: Sequence[str] = ()
    attribution: str = ""
    groups: Int64[np.ndarray, "n"] | None = None
    metric: str = "top1"

    def right_pairs(self) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
        """Return the images and the texts of all pairs that belong together."""
        return np.nonzero(self.targets) if self.targets.ndim == 2 else (np.arange(len(self.targets)), self.targets)

    def right_texts(self, images: slice | Int64[np.ndarray, "m"]) -> Bool[np.ndarray, "m M"]:
        """Tell of these images which texts are right."""
        targets = self.targets[images]
        return targets if targets.ndim == 2 else targets[:, None] == np.arange(len(self.texts))

    def asked_texts(self) -> Int64[np.ndarray, "m"]:
        """Return the texts that an image belongs to."""
        return np.flatnonzero(self.targets.any(0)) if self.targets.ndim == 2 else np.unique(self.targets)

    def right_images(self, texts: Int64[np.ndarray, "m"]) -> Bool[np.ndarray, "m n"]:
        """Tell of these texts for which images they are right."""
        return self.targets[:, texts].T if self.targets.ndim == 2 else texts[:, None] == self.targets


@dataclasses.dataclass(frozen=True)
class Cue:
    """A cue (WinoGAViL): a word, its candidate images (indices into `DatasetSplit.images`), the correct ones."""

    text: str
    candidates: Int64[np.ndarray, "m"]
    right: Bool[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True)
class DatasetSplit:
    """A split of an evaluation dataset as it is stored: pictures, and what is right of each.

    images: encoded pictures (PNG, JPEG, WebP), read when they are asked for.
    targets: of each picture its class, or for several classes at once whether each is right; None for captions.
    captions: of each picture its captions, one or more; empty where classes are asked for.
    cues: of associations, which share their pictures; empty elsewhere.
    class_names, templates: as the data brings them, in the order of class ids; empty where it doesn't.
    metadata: whole numbers that each picture comes with, such as a region or an income group.
    fingerprint: a short hash that changes when what is stored changes.
    """

    images: Sequence[bytes]
    targets: Int64[np.ndarray, "n"] | Bool[np.ndarray, "n Q"] | None
    captions: Sequence[tuple[str, ...]] = ()
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    metadata: Int64[np.ndarray, "n F"] | None = None
    fingerprint: str = ""
    cues: Sequence[Cue] = ()


class Unavailable(RuntimeError):
    """An evaluation set that can't be had on this machine. The message says why and how to get it."""


@runtime_checkable
class Embedder(Protocol):
    """The only view of a model that evaluators have, so a fake one can test them.

    Rows are unit vectors, or NaN where the model gave NaN; the number of rows is the number of inputs.
    """

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]: ...

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]: ...


# (embedder, eval set) -> {'retrieval/<set>/image_to_text/recall_at_1': fraction, …}
Evaluator = Callable[[Embedder, EvalDataset], dict[str, float]]
