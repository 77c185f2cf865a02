"""Types that several packages share, and the axis letters of arrays.

The same letters name axes in suffixes (`x_BLD`), einsum strings (`'BLD,DNK->BLNK'`) and annotations
(`Float[Array, "B L D"]`)::

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
Number = int | float  # annotations are executed in tests, where an int is not a float

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
    filtered: Mapping[str, int] = dataclasses.field(default_factory=dict)  # records by filter of `data.filters`


@runtime_checkable
class Tokenizer(Protocol):
    """Function from texts to rows of token ids: start token, tokens, end token, padding."""

    vocab_size: int
    length: int
    pad_id: int
    eos_id: int

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]: ...


@dataclasses.dataclass(frozen=True)
class Cue:
    """A cue of an association dataset (WinoGAViL): a word, its candidate images, and the associated ones."""

    text: str
    candidates: Int64[np.ndarray, "m"]  # indices of images
    associated: Bool[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True)
class DatasetSplit:
    """A split of an evaluation dataset as stored."""

    images: Sequence[bytes]  # encoded (PNG, JPEG, WebP), read on access
    # Class ids, or bool[n Q] for several classes per image; None for captions and cues.
    targets: Int64[np.ndarray, "n"] | Bool[np.ndarray, "n Q"] | None
    captions: Sequence[tuple[str, ...]] = ()  # one or more per image; empty for classes
    class_names: tuple[str, ...] = ()  # by class id; empty if not stored with the data
    class_keys: tuple[str, ...] = ()  # names of the class folders or of TFDS's classes, by class id
    templates: tuple[str, ...] = ()
    metadata: Int64[np.ndarray, "n F"] | None = None  # e.g. region or income group
    cues: Sequence[Cue] = ()  # of association datasets


@dataclasses.dataclass(frozen=True)
class EvalDataset:
    """The input of an evaluator: the test split of an evaluation dataset, with candidate texts."""

    name: str  # in metric keys: `<evaluator>/<name>/<metric>`
    images: Sequence[bytes]  # encoded (PNG, JPEG, WebP), read on access
    # Candidate captions, or the prompts of each class or cue, whose embeddings are averaged.
    texts: Sequence[tuple[str, ...]]
    # Index of the correct text of each image, or bool[n M] for several correct texts; None for cues.
    targets: Int64[np.ndarray, "n"] | Bool[np.ndarray, "n M"] | None
    image_names: Sequence[str] = ()  # captions in reports
    attribution: str = ""  # text that the images' licenses require
    groups: Int64[np.ndarray, "n"] | None = None  # group ids of worst-group metrics; negative: ignored
    metric: str = "top1"  # main metric: a key of `clip_jax.evals.metrics.METRICS`, or 'recall'
    class_names: Sequence[tuple[str, ...]] = ()  # names of each class, without templates
    cues: Sequence[Cue] = ()  # of association datasets; `texts` has the prompts of each
    load_split: Callable[[str], DatasetSplit] | None = None  # loads 'train' or 'validation'
    description: str = ""  # size, classes, metric
    prompts: str = ""  # source of the class names and templates
    missing_texts: str = ""  # reason why `texts` is empty
    classes: int = 0  # number of classes; 0: one per text

    @property
    def num_classes(self) -> int:
        return self.classes or len(self.texts)

    def split(self, name: str) -> DatasetSplit:
        """Load the 'train' or 'validation' split. Raises Unavailable if there is none on this machine."""
        if self.load_split is None:
            raise Unavailable(f"{self.name} has no {name} split")
        return self.load_split(name)

    def positive_pairs(self) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
        """Return the image indices and the text indices of all matching pairs."""
        return np.nonzero(self.targets) if self.targets.ndim == 2 else (np.arange(len(self.targets)), self.targets)

    def positive_texts(self, images: slice | Int64[np.ndarray, "m"]) -> Bool[np.ndarray, "m M"]:
        """Return the mask of the texts that match each image."""
        targets = self.targets[images]
        return targets if targets.ndim == 2 else targets[:, None] == np.arange(len(self.texts))

    def positive_images(self, texts: Int64[np.ndarray, "m"]) -> Bool[np.ndarray, "m n"]:
        """Return the mask of the images that match each text."""
        return self.targets[:, texts].T if self.targets.ndim == 2 else texts[:, None] == self.targets

    def query_texts(self) -> Int64[np.ndarray, "m"]:
        """Return the indices of the texts that match at least one image."""
        return np.flatnonzero(self.targets.any(0)) if self.targets.ndim == 2 else np.unique(self.targets)


class Unavailable(RuntimeError):
    """A dataset, split or prompt set is not on this machine. The message has the reason and how to get it."""


@runtime_checkable
class Embedder(Protocol):
    """Encoders to unit vectors, NaN where the output is not finite. Optional: `features(images) -> float[n D]`."""

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]: ...

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]: ...


class EvalResult(dict[str, float]):
    """Metrics of an evaluator, with a one-line description of the method and data for tables and plots."""

    def __init__(self, metrics: Mapping[str, float], description: str = "", detail: Any = None):
        super().__init__(metrics)
        self.description = description
        self.detail = detail


# (embedder, dataset, **options) -> {'zeroshot/<dataset>/top1': fraction, …}, a dict or an EvalResult
Evaluator = Callable[..., dict[str, float]]
