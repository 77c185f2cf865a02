"""The registry's sets asked of one model: zero-shot, retrieval, linear probes and few-shot curves.

No number goes without what it is of: split, size, measure, prompts and preprocessing are in `Outcome.described`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.evals import prompts
from clip_jax.evals.feature_cache import FeatureCache
from clip_jax.evals.few_shot import SHOTS, few_shot
from clip_jax.evals.linear_probe import Examples, search
from clip_jax.evals.measures import MEASURES
from clip_jax.evals.registry import DATASETS, SUITES, Dataset, published
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zeroshot import measured, zeroshot
from clip_jax.typing import Embedder, EvalSet, Labelled, Unavailable

log = logging.getLogger(__name__)

HELD_OUT = 0.2  # of the training split, for validation where there is no split for it
SEEDS = range(5)  # of few-shot draws

Load = Callable[[Dataset, str], Labelled]  # (set, 'test', 'train' or 'validation') -> the split


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is measured.

    embedder: unit vectors of pictures and texts.
    features: pictures to float32[n D], before the projection: what probes see.
    architecture: a key of `architectures.MODELS`, by which published numbers are found; others have none.
    preprocessing: what happens to pictures, in words.
    cache: keeps features on disk, or doesn't.
    """

    embedder: Embedder
    features: Callable[[Sequence[bytes]], Float[np.ndarray, "n D"]]
    architecture: str
    preprocessing: str
    cache: FeatureCache

    def of(self, split: Labelled) -> _Split:
        """Return the embedder for the pictures of one split."""
        return _Split(self, split)


@dataclasses.dataclass(frozen=True)
class _Split:
    subject: Subject
    split: Labelled

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        return self._kept("embeddings", self.subject.embedder.image, images)

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]:
        return self.subject.embedder.text(texts)

    def examples(self, rows: np.ndarray | slice = slice(None)) -> Examples:
        features_nD = self._kept("features", self.subject.features, self.split.images)
        return Examples(features_nD[rows], self.split.targets[rows])

    def _kept(self, kind: str, compute: Callable, images: Sequence[bytes]) -> np.ndarray:
        return self.subject.cache.get(f"{kind}-{self.split.fingerprint}", len(images), lambda: compute(images))


class Outcome(NamedTuple):
    """What was measured.

    metrics: as evaluators return them: `<task>/<set>/<measure>` and what stands below.
    described: by `<task>/<set>`, what the number is of.
    left_out: by `<task>/<set>`, why there is no number.
    """

    metrics: dict[str, float]
    described: dict[str, str]
    left_out: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Question:
    """One set asked of one model, and the user's prompts where they win over the registry's."""

    subject: Subject
    dataset: Dataset
    load: Load
    templates: str = ""
    class_names: str = ""

    def test(self) -> Labelled:
        """Return the test split. Raises Unavailable where it is not the whole split that the registry knows."""
        split, row = self.load(self.dataset, "test"), self.dataset
        if row.size and len(split.images) != row.size:
            raise Unavailable(
                f"its {row.test} split has {row.size:,} pictures, and {len(split.images):,} were found: their number"
                f" would not be one of {row.name}"
            )
        return split

    def described(self, split: Labelled, *more: str) -> str:
        """Return what a number is of, in one line."""
        row = self.dataset
        classes = [f"{row.classes} classes"] if row.classes else []
        measure = f"measure {row.measure}"
        pictures = f"{len(split.images):,} pictures of the {row.test} split"
        return "; ".join([pictures, *classes, measure, *filter(None, more), self.subject.preprocessing])


def evaluate(
    subject: Subject, names: Sequence[str], tasks: Sequence[str], load: Load, templates: str = "", class_names: str = ""
) -> Outcome:
    """Ask every set for which a task is meant.

    Args:
      names: keys of DATASETS or SUITES.
      tasks: keys of TASKS.
      templates, class_names: as `prompts` takes them, for all sets; empty for the registry's.

    Raises:
      ValueError: for a name that isn't known.
    """
    outcome = Outcome({}, {}, {})
    for name in expand(names):
        for task in tasks:
            row, key = DATASETS[name], f"{task}/{name}"
            if not asks(task, row):
                continue
            log.info("%s", key)
            try:
                metrics, described = TASKS[task](Question(subject, row, load, templates, class_names))
            except Unavailable as error:
                log.warning("%s is left out: %s", key, str(error).splitlines()[0])
                outcome.left_out[key] = str(error)
            else:
                outcome.metrics.update(metrics | _published(key, subject.architecture, row, metrics))
                outcome.described[key] = described
    return outcome


def expand(names: Sequence[str]) -> list[str]:
    """Return the sets that names of sets and suites stand for, each once. Raises ValueError for an unknown one."""
    unknown = [name for name in names if name not in DATASETS and name not in SUITES]
    if unknown:
        raise ValueError(f"there is no set or suite {unknown[0]!r}: use {', '.join([*SUITES, *DATASETS])}")
    return list(dict.fromkeys(row for name in names for row in SUITES.get(name, (name,))))


def asks(task: str, row: Dataset) -> bool:
    """Tell whether a task is meant for a set: probes for those with a training split."""
    if task in ("linear_probe", "few_shot"):
        return row.task == "zeroshot" and bool(row.train)
    return row.task == task or (task == "zeroshot" and row.task == "association")


# ---------------------------------------------------------------------------------------------------------- tasks


def _zeroshot(question: Question) -> tuple[dict[str, float], str]:
    row = question.dataset
    if row.task == "association":
        raise Unavailable(f"cues with several pictures are not asked yet. {row.note}")
    split = question.test()
    asked, source = _prompts(question, split)
    eval_set = _eval_set(row, split, asked.wordings())
    wordings = f"{source}, {sum(map(len, eval_set.texts)):,} wordings, {asked.digest}"
    return zeroshot(question.subject.of(split), eval_set), question.described(split, wordings)


def _retrieval(question: Question) -> tuple[dict[str, float], str]:
    row, split = question.dataset, question.test()
    if not split.captions:
        raise Unavailable("what was found has classes, not captions")
    templates = prompts.templates(question.templates or row.templates or "name")
    captions = [caption for several in split.captions for caption in several]
    texts = [tuple(template.replace(prompts.SLOT, caption) for template in templates) for caption in captions]
    picture_M = np.repeat(np.arange(len(split.images)), [len(several) for several in split.captions])
    right_nM = picture_M == np.arange(len(split.images))[:, None]
    eval_set = EvalSet(row.name, split.images, texts, right_nM)
    metrics = retrieval(question.subject.of(split), eval_set)
    return metrics, question.described(split, f"{len(captions):,} captions", f"as {', '.join(map(repr, templates))}")


def _linear_probe(question: Question) -> tuple[dict[str, float], str]:
    row, test = question.dataset, question.test()
    train, validation, held_out = _training(question)
    found = search(train, validation, row.classes, MEASURES[row.measure])
    scores_nQ = found.probe.scores(question.subject.of(test).examples().features_nD)
    eval_set = _eval_set(row, test, [("",)] * row.classes)
    fitted = f"fitted to {len(train.targets) + len(validation.targets):,}, l2={found.l2:.3g} found on {held_out}"
    return measured(f"linear_probe/{row.name}", scores_nQ, eval_set), question.described(test, fitted)


def _few_shot(question: Question) -> tuple[dict[str, float], str]:
    row, test = question.dataset, question.test()
    if question.load(row, "train").targets.ndim != 1:
        raise Unavailable("of several classes per picture there are no shots per class")
    train, validation, held_out = _training(question)
    fewest = int(np.bincount(train.targets, minlength=row.classes).min())
    shots = [count for count in SHOTS if count <= fewest]
    if not shots:
        raise Unavailable("a class has no picture to train on")
    curve = few_shot(
        train,
        question.subject.of(test).examples(),
        row.classes,
        validation=validation,
        shots=shots,
        seeds=SEEDS,
        measure=MEASURES[row.measure],
    )
    metrics = {}
    for count, values in curve.items():
        key = f"few_shot/{row.name}/{count}_shot"
        low, high = values.interval
        metrics |= {key: values.mean, f"{key}/low": low, f"{key}/high": high, f"{key}/candidates": float(row.classes)}
        if row.measure in ("top1", "mean_per_class"):
            metrics[f"{key}/chance"] = 1 / row.classes
    return metrics, question.described(test, f"{len(SEEDS)} draws and their range, l2 found for each on {held_out}")


TASKS: dict[str, Callable[[Question], tuple[dict[str, float], str]]] = {
    "zeroshot": _zeroshot,
    "retrieval": _retrieval,
    "linear_probe": _linear_probe,
    "few_shot": _few_shot,
}


# ----------------------------------------------------------------------------------------------------------- parts


def _prompts(question: Question, split: Labelled) -> tuple[prompts.Prompts, str]:
    """Return the prompts and where they come from: the user's, else the registry's, else what the data brings."""
    row = question.dataset
    names, names_from = _found(
        prompts.class_names, question.class_names, row.class_names, tuple((name,) for name in split.class_names)
    )
    templates, templates_from = _found(prompts.templates, question.templates, row.templates, split.templates)
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


def _eval_set(row: Dataset, split: Labelled, texts: Sequence[tuple[str, ...]]) -> EvalSet:
    """Return the set as evaluators see it, its groups those of the registry."""
    if split.targets is None:
        raise Unavailable("what was found has captions, not classes")
    groups = None
    if row.group >= 0:
        if split.metadata is None:
            raise Unavailable(f"{row.measure} needs the groups of its metadata (.npy), and none were found")
        groups = np.where(np.isin(split.metadata[:, row.group], row.other_groups), -1, split.metadata[:, row.group])
    return EvalSet(row.name, split.images, texts, split.targets, groups=groups, measure=row.measure)


def _training(question: Question) -> tuple[Examples, Examples, str]:
    """Return what to fit to and what to choose by: the validation split, or a part held out, the same every time."""
    row, train = question.dataset, question.load(question.dataset, "train")
    if row.validation or row.tfds_validation:
        try:
            validation = question.load(row, "validation")
        except Unavailable as error:
            log.info("%s: a part of the training split is held out, since %s", row.name, error)
        else:
            return *(question.subject.of(split).examples() for split in (train, validation)), "the validation split"
    order = np.random.default_rng(0).permutation(len(train.images))
    count = max(1, round(HELD_OUT * len(order)))
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    examples = question.subject.of(train).examples
    return examples(kept), examples(held), f"{count:,} pictures held out of {row.train}"


def _published(key: str, architecture: str, row: Dataset, metrics: dict[str, float]) -> dict[str, float]:
    """Return the published number of OpenAI's weights below the set's own measure: open_clip's, else the paper's."""
    task, name = key.split("/")
    numbers = {number.source: number.value / 100 for number in published(name, architecture)}
    value = numbers.get("open_clip", numbers.get("paper"))
    own = f"{key}/{row.measure}"
    return {f"{own}/published": value} if task == "zeroshot" and value is not None and own in metrics else {}
