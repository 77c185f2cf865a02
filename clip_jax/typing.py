"""The shared vocabulary: one alphabet for shapes, and the types that cross module borders.

Letters name array axes everywhere: as suffixes (`x_BLD`), in einsum strings (`'BLD,DNK->BLNK'`) and in
annotations (`Float[Array, "B L D"]`):

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

Params = PyTree  # nested dicts of arrays, or of what stands for them: shapes, shardings
# A leaf of a dataclass that is a pytree: an array, or whatever `jax.tree.map` puts there (shapes, shardings, None),
# which is why no annotation can check it.
Leaf = Any
Metrics = dict[str, Array]
ArrayLike = Array | np.ndarray

SLICE = "slice"  # the mesh's axis between whose parts messages are dear: the data centre's network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Image–text pairs, as they cross from host to device.

    image: uint8[B H W 3], RGB, 0 to 255, not normalised: a quarter of float32's bytes on the wire.
    text: int32[B L], token ids, from the start token to padding.
    mask: bool[B], False for rows that only fill a batch up. Every consumer sees it, so none can forget it.
    """

    image: Leaf
    text: Leaf
    mask: Leaf


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as a source stores it: an encoded picture and what is said of it.

    captions: texts by feature name, e.g. `{'name': ('dog face',), 'keyword': ('pet', 'animal')}`.
    """

    key: str
    image: bytes
    captions: Mapping[str, tuple[str, ...]]


class BadRecord(ValueError):
    """A record that can't be used. The message is its reason, in a few words."""


@runtime_checkable
class DataSource(Protocol):
    """A finite set of records with random access, so that any order is a function of integers."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """Return record `index`; thread-safe. Raises BadRecord with the reason if it is damaged."""

    def key(self, index: int) -> str:
        """Name record `index` for a person: file and place. Works for damaged records too."""

    def fingerprint(self) -> str:
        """Return a short hash that changes when the records or their order change."""


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A record that could not be used, and the one that stands in its place."""

    key: str
    reason: str
    replacement: str


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """What the pipeline yields on one host: its rows of a global batch, and where they came from.

    example_ids: the source's index of every row, after replacement.
    """

    batch: Batch
    example_ids: Int64[np.ndarray, "b"]
    replaced: tuple[Replaced, ...]


@runtime_checkable
class Tokenizer(Protocol):
    """Texts to rows of token ids: start, tokens, end, padding."""

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
