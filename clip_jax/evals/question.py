"""One set asked of one model: its split, whole; its pictures and texts; prompts; groups.

Hosts read a split together: where one can't, none goes on, since they share the embedding.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int64, UInt64

from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals import prompts
from clip_jax.evals.analysis.near_duplicates import MAX_DISTANCE
from clip_jax.evals.association import wording
from clip_jax.evals.datasets.registry import Dataset
from clip_jax.evals.feature_cache import FeatureCache
from clip_jax.evals.linear_probe import Examples
from clip_jax.typing import DatasetSplit, Embedder, EvalDataset, Unavailable

Load = Callable[[Dataset, str], DatasetSplit]  # (set, 'test', 'train' or 'validation') -> the split


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is measured.

    embedder: unit vectors of pictures and texts.
    features: pictures to float32[n D], before the projection: what probes see.
    architecture: a key of `config.MODELS`, by which published numbers are found; others have none.
    preprocessing: what happens to pictures, in words.
    cache: keeps features on disk, or doesn't.
    """

    embedder: Embedder
    features: Callable[[Sequence[bytes]], Float[np.ndarray, "n D"]]
    architecture: str
    preprocessing: str
    cache: FeatureCache

    def of(self, split: DatasetSplit) -> _Split:
        """Return the embedder for the pictures of one split."""
        return _Split(self, split)


@dataclasses.dataclass(frozen=True)
class _Split:
    subject: Subject
    split: DatasetSplit

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        return self._kept("embeddings", self.subject.embedder.image, images)

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]:
        return self.subject.embedder.text(texts)

    def examples(self, rows: np.ndarray | slice = slice(None)) -> Examples:
        if self.split.targets is None:
            raise Unavailable("what was found has captions, not classes")
        features_nD = self._kept("features", self.subject.features, self.split.images)
        broken = int((~np.isfinite(features_nD)).any(1).sum())
        if broken:
            raise Unavailable(f"the features of {broken:,} of {len(features_nD):,} pictures are not finite")
        return Examples(features_nD[rows], self.split.targets[rows])

    def _kept(self, kind: str, compute: Callable, images: Sequence[bytes]) -> np.ndarray:
        if not self.split.fingerprint:  # nothing would tell it from another split of as many pictures
            return compute(images)
        return self.subject.cache.get(f"{kind}-{self.split.fingerprint}", len(images), lambda: compute(images))


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may say of all sets that are asked.

    templates, class_names: as `prompts` takes them; empty for the registry's.
    hashes: of the training source's pictures, for 'overlap'; max_distance: bits in which near-duplicates may differ.
    groups: of every picture of the test split its group, and the groups' names, for 'bias'.
    categories: by name the classes that count together in 'bias', such as those that offend.
    """

    templates: str = ""
    class_names: str = ""
    hashes: Sequence[UInt64[np.ndarray, "..."]] = ()
    max_distance: int = MAX_DISTANCE
    groups: tuple[Int64[np.ndarray, "n"], tuple[str, ...]] | None = None
    categories: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for prompts that can't be had, before anything is measured with the wrong ones."""
        for read, name in ((prompts.templates, self.templates), (prompts.class_names, self.class_names)):
            if name:
                with contextlib.suppress(Unavailable):  # which is said of every set
                    read(name)


@dataclasses.dataclass(frozen=True)
class Question:
    """One set asked of one model; asked: how many sets are asked besides, itself included."""

    subject: Subject
    dataset: Dataset
    load: Load
    options: Options
    asked: int = 1

    def part(self, part: str) -> DatasetSplit:
        """Return the split for 'test', 'train' or 'validation', on all hosts or on none."""
        with distributed.synchronized_errors(Unavailable, *DATA_ERRORS):
            return self.load(self.dataset, part)

    def test(self) -> DatasetSplit:
        """Return the test split. Raises Unavailable where it is not the whole split that the registry knows."""
        return whole_split(self.dataset, self.part("test"))

    def described(self, split: DatasetSplit, *more: str) -> str:
        """Return what a number is of, in one line."""
        row = self.dataset
        classes = [f"{row.classes} classes"] if row.classes else []
        metric = f"metric {row.metric}"
        pictures = f"{len(split.images):,} pictures of the {row.test} split"
        return "; ".join([pictures, *classes, metric, *filter(None, more), self.subject.preprocessing])


def whole_split(row: Dataset, split: DatasetSplit) -> DatasetSplit:
    """Return the split. Raises Unavailable where it has another size than the registry says."""
    found, kind = (len(split.cues), "cues") if row.task == "association" else (len(split.images), "pictures")
    if row.size and found != row.size:
        raise Unavailable(
            f"its {row.test} split has {row.size:,} {kind}, and {found:,} were found: their number would not be one of"
            f" {row.name}"
        )
    return split


def check_classes(row: Dataset) -> None:
    """Raise Unavailable for a set that is asked otherwise than by classes."""
    if row.task == "association":
        raise Unavailable("cues with several pictures are asked by the task zeroshot alone, and have no classes")


def caption_templates(row: Dataset, options: Options) -> tuple[str, ...]:
    """Return the sentences that captions stand in."""
    return prompts.templates(options.templates or row.templates or "name")


def cue_wordings(split: DatasetSplit, options: Options) -> list[tuple[str, ...]]:
    """Return for each cue the user's templates with it, or datacomp's sentence."""
    templates = prompts.templates(options.templates) if options.templates else ()
    texts = [cue.text for cue in split.cues]
    return [tuple(one.replace(prompts.SLOT, text) for one in templates) or (wording(text),) for text in texts]


def as_captions(row: Dataset, split: DatasetSplit, options: Options) -> EvalDataset:
    """Return pictures with all their captions. Raises Unavailable where it has none."""
    if not split.captions:
        raise Unavailable("what was found has classes, not captions")
    templates = caption_templates(row, options)
    captions = [caption for several in split.captions for caption in several]
    texts = [tuple(template.replace(prompts.SLOT, caption) for template in templates) for caption in captions]
    picture_M = np.repeat(np.arange(len(split.images)), [len(several) for several in split.captions])
    return EvalDataset(row.name, split.images, texts, picture_M == np.arange(len(split.images))[:, None])


def as_classes(row: Dataset, split: DatasetSplit, options: Options) -> tuple[EvalDataset, prompts.Prompts, str]:
    """Return the set, its prompts and where they come from."""
    check_classes(row)
    if split.targets is None:
        raise Unavailable("what was found has captions, not classes")
    asked, source = _prompts(row, split, options)
    groups = groups_of(row, split)
    found = EvalDataset(row.name, split.images, asked.wordings(), split.targets, groups=groups, metric=row.metric)
    return found, asked, source


def _prompts(row: Dataset, split: DatasetSplit, options: Options) -> tuple[prompts.Prompts, str]:
    """Return the prompts and where they come from: the user's, else the registry's, else what the data brings."""
    stored = tuple((name,) for name in split.class_names)
    names, names_from = _found(prompts.class_names, options.class_names, row.class_names, stored)
    templates, templates_from = _found(prompts.templates, options.templates, row.templates, split.templates)
    if not templates:
        templates, templates_from = prompts.templates("photo"), "photo"
    if not names:
        raise Unavailable("its classes have no names: neither the data brings any, nor is a package known that does")
    if len(names) != row.classes:
        raise Unavailable(f"{len(names)} class names ({names_from}) for {row.classes} classes: give --class_names")
    return prompts.Prompts(names, templates), f"class names {names_from}, templates {templates_from}"


def _found(read: Callable[[str], tuple], users: str, registered: str, stored: tuple) -> tuple[tuple, str]:
    if users:
        return read(users), users
    if registered:
        try:
            return read(registered), registered
        except Unavailable:
            if not stored:
                raise
    return stored, "the data's"


def groups_of(row: Dataset, split: DatasetSplit) -> Int64[np.ndarray, "n"] | None:
    """Return the groups that the registry's measure looks at, −1 for those that it leaves out; None for none."""
    if row.group_column < 0:
        return None
    if split.metadata is None:
        raise Unavailable(f"{row.metric} needs the groups of its metadata (.npy), and none were found")
    return np.where(
        np.isin(split.metadata[:, row.group_column], row.excluded_groups), -1, split.metadata[:, row.group_column]
    )
