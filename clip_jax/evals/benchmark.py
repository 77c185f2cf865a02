"""The registry's sets asked of one model: zero-shot, retrieval, linear probes, few-shot curves, overlap, groups.

No number goes without what it is of: split, size, measure, prompts and preprocessing are in `Outcome.described`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, UInt64

from clip_jax.config import check_name
from clip_jax.evals import bias, overlap, prompts
from clip_jax.evals.duplicates import MAX_DISTANCE, hash_pictures, nearest_hash
from clip_jax.evals.feature_cache import FeatureCache
from clip_jax.evals.few_shot import SHOTS, few_shot
from clip_jax.evals.linear_probe import Examples, search
from clip_jax.evals.measures import MEASURES, Measure, Scored, Undefined, hits
from clip_jax.evals.registry import DATASETS, SUITES, Dataset, published
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zeroshot import classified, measured
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


class Answer(NamedTuple):
    """What one task found of one set: numbers, what they are of, and what plots and tables need besides."""

    metrics: dict[str, float]
    described: str
    detail: Any = None


class Outcome(NamedTuple):
    """What was measured; all but `metrics` by `<task>/<set>`.

    metrics: as evaluators return them: `<task>/<set>/<measure>` and what stands below.
    described: what the numbers are of.
    details: an `overlap.Overlap`, or `bias.rows` by group.
    left_out: why there is no number.
    """

    metrics: dict[str, float]
    described: dict[str, str]
    details: dict[str, Any]
    left_out: dict[str, str]


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


@dataclasses.dataclass(frozen=True)
class Question:
    """One set asked of one model; asked: how many sets are asked besides, itself included."""

    subject: Subject
    dataset: Dataset
    load: Load
    options: Options
    asked: int = 1

    def test(self) -> Labelled:
        """Return the test split. Raises Unavailable where it is not the whole split that the registry knows."""
        return _whole(self.dataset, self.load(self.dataset, "test"))

    def described(self, split: Labelled, *more: str) -> str:
        """Return what a number is of, in one line."""
        row = self.dataset
        classes = [f"{row.classes} classes"] if row.classes else []
        measure = f"measure {row.measure}"
        pictures = f"{len(split.images):,} pictures of the {row.test} split"
        return "; ".join([pictures, *classes, measure, *filter(None, more), self.subject.preprocessing])


def evaluate(
    subject: Subject,
    names: Sequence[str],
    tasks: Sequence[str],
    load: Load,
    options: Options = Options(),  # noqa: B008 (frozen)
) -> Outcome:
    """Ask every set for which a task is meant.

    Args:
      names: keys of DATASETS or SUITES.
      tasks: keys of TASKS.

    Raises:
      ValueError: for a name that isn't known.
    """
    outcome, names = Outcome({}, {}, {}, {}), expand(names)
    for name in names:
        for task in tasks:
            row, key = DATASETS[name], f"{task}/{name}"
            if not asks(task, row):
                continue
            log.info("%s", key)
            try:
                answer = TASKS[task](Question(subject, row, load, options, len(names)))
            except (Unavailable, Undefined) as error:
                log.warning("%s is left out: %s", key, str(error).splitlines()[0])
                outcome.left_out[key] = str(error)
            else:
                outcome.metrics.update(answer.metrics | _published(key, subject.architecture, row, answer.metrics))
                outcome.described[key] = answer.described
                outcome.details[key] = answer.detail
    return outcome


def load(row: Dataset, part: str, data_dir: str) -> Labelled:
    """Read a part of a set. Raises Unavailable where it is not on this machine."""
    from clip_jax.data import labelled

    if row.builtin:
        return labelled.builtin(row.builtin, part)
    if not data_dir:
        raise Unavailable("the directory that evaluation data lies in isn't given: --data_dir, or eval.data_dir")
    return labelled.find(row.folder, row.split(part), row.tfds, row.split(part, tfds=True), data_dir)


def eval_set(name: str, data_dir: str, options: Options = Options()) -> EvalSet:  # noqa: B008 (frozen)
    """Return a set's test split as evaluators see it, for the training loop: `zeroshot` or `retrieval` by its row.

    Raises:
      ValueError: for a name that isn't in DATASETS.
      Unavailable: where it is not on this machine, or not whole.
    """
    check_name("a set", name, DATASETS)
    row = DATASETS[name]
    split = _whole(row, load(row, "test", data_dir))
    return _captions(row, split, options) if row.task == "retrieval" else _classes(row, split, options)[0]


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
    return row.task == "retrieval" if task == "retrieval" else row.task in ("zeroshot", "association")


# ---------------------------------------------------------------------------------------------------------- tasks


def _zeroshot(question: Question) -> Answer:
    row = question.dataset
    scored, described, _, _ = _classified(question)
    return Answer(measured(f"zeroshot/{row.name}", scored, row.measure), described)


def _retrieval(question: Question) -> Answer:
    row, split = question.dataset, question.test()
    asked = _captions(row, split, question.options)
    templates = ", ".join(map(repr, _caption_templates(row, question.options)))
    said = f"{len(asked.texts):,} captions in {templates}"
    return Answer(retrieval(question.subject.of(split), asked), question.described(split, said))


def _linear_probe(question: Question) -> Answer:
    row, test = question.dataset, question.test()
    train, validation, held_out = _training(question)
    found = search(train, validation, row.classes, _chosen_by(row))
    scores_nQ = found.probe.scores(question.subject.of(test).examples().features_nD)
    scored = Scored(scores_nQ, test.targets, _groups(row, test))
    fitted = f"fitted to {len(train.targets) + len(validation.targets):,}, l2={found.l2:.3g} found on {held_out}"
    return Answer(measured(f"linear_probe/{row.name}", scored, row.measure), question.described(test, fitted))


def _few_shot(question: Question) -> Answer:
    row, test = question.dataset, question.test()
    if row.group >= 0:
        raise Unavailable(f"{row.measure} of few shots is not measured: draws are by class, not by group")
    if np.ndim(question.load(row, "train").targets) == 2:
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
    said = f"{len(SEEDS)} draws and their range, l2 found for each on {held_out}"
    return Answer(metrics, question.described(test, said))


def _overlap(question: Question) -> Answer:
    row, options = question.dataset, question.options
    if not options.hashes:
        raise Unavailable("the hashes of the training source are missing: give --overlap")
    scored, described, split, _ = _classified(question)
    distances_n, _ = nearest_hash(hash_pictures(split.images), options.hashes)
    found = overlap.analyse(hits(scored), distances_n <= options.max_distance, question.asked)
    names = ("share", "accuracy", "accuracy_clean", "accuracy_overlapping", "gain", "p_corrected")
    metrics = {f"overlap/{row.name}/{name}": float(getattr(found, name)) for name in names}
    hashed = sum(map(len, options.hashes))
    said = f"top-1; near-duplicates among {hashed:,} training pictures differ in {options.max_distance} bits at most"
    return Answer(metrics, f"{described}; {said}", found)


def _bias(question: Question) -> Answer:
    row, options = question.dataset, question.options
    if options.groups is None:
        raise Unavailable("the groups of its pictures are missing: give --groups")
    groups_n, names = options.groups
    scored, described, split, asked = _classified(question)
    if len(groups_n) != len(split.images):
        raise Unavailable(f"--groups has {len(groups_n):,} rows, and the split {len(split.images):,} pictures")
    scored = dataclasses.replace(scored, groups=groups_n)
    ids = {name: class_id for class_id, several in enumerate(asked.class_names) for name in several}
    unknown = [name for several in options.categories.values() for name in several if name not in ids]
    if unknown:
        raise Unavailable(
            f"the category's class {unknown[0]!r} is none of its classes: give --class_names that have it"
        )
    categories = {name: tuple(ids[one] for one in several) for name, several in options.categories.items()}
    by_group = bias.by_group(scored, names, categories)
    apart = bias.disparity(scored, names, categories)
    metrics = {f"bias/{row.name}/{name}/accuracy": result.accuracy.value for name, result in by_group.items()}
    for event, found in apart.items():
        metrics |= {f"bias/{row.name}/{event}_{part}": getattr(found, part) for part in ("difference", "p_corrected")}
    return Answer(metrics, described, bias.rows(by_group))


TASKS: dict[str, Callable[[Question], Answer]] = {
    "zeroshot": _zeroshot,
    "retrieval": _retrieval,
    "linear_probe": _linear_probe,
    "few_shot": _few_shot,
    "overlap": _overlap,
    "bias": _bias,
}


# ----------------------------------------------------------------------------------------------------------- parts


def _classified(question: Question) -> tuple[Scored, str, Labelled, prompts.Prompts]:
    """Return what the zero-shot classifier says of the test split, and what it was asked."""
    _check_classes(question.dataset)
    split = question.test()
    asked, names, source = _classes(question.dataset, split, question.options)
    scored = classified(question.subject.of(split), asked)
    wordings = f"{source}, {sum(map(len, asked.texts)):,} wordings, {names.digest}"
    return scored, question.described(split, wordings), split, names


def _whole(row: Dataset, split: Labelled) -> Labelled:
    if row.size and len(split.images) != row.size:
        raise Unavailable(
            f"its {row.test} split has {row.size:,} pictures, and {len(split.images):,} were found: their number would"
            f" not be one of {row.name}"
        )
    return split


def _check_classes(row: Dataset) -> None:
    if row.task == "association":
        raise Unavailable(f"cues with several pictures are not asked yet. {row.note}")


def _caption_templates(row: Dataset, options: Options) -> tuple[str, ...]:
    return prompts.templates(options.templates or row.templates or "name")


def _captions(row: Dataset, split: Labelled, options: Options) -> EvalSet:
    if not split.captions:
        raise Unavailable("what was found has classes, not captions")
    templates = _caption_templates(row, options)
    captions = [caption for several in split.captions for caption in several]
    texts = [tuple(template.replace(prompts.SLOT, caption) for template in templates) for caption in captions]
    picture_M = np.repeat(np.arange(len(split.images)), [len(several) for several in split.captions])
    return EvalSet(row.name, split.images, texts, picture_M == np.arange(len(split.images))[:, None])


def _classes(row: Dataset, split: Labelled, options: Options) -> tuple[EvalSet, prompts.Prompts, str]:
    """Return the set, its prompts and where they come from."""
    _check_classes(row)
    if split.targets is None:
        raise Unavailable("what was found has captions, not classes")
    asked, source = _prompts(row, split, options)
    groups = _groups(row, split)
    found = EvalSet(row.name, split.images, asked.wordings(), split.targets, groups=groups, measure=row.measure)
    return found, asked, source


def _prompts(row: Dataset, split: Labelled, options: Options) -> tuple[prompts.Prompts, str]:
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


def _groups(row: Dataset, split: Labelled) -> Int64[np.ndarray, "n"] | None:
    """Return the groups that the registry's measure looks at."""
    if row.group < 0:
        return None
    if split.metadata is None:
        raise Unavailable(f"{row.measure} needs the groups of its metadata (.npy), and none were found")
    return np.where(np.isin(split.metadata[:, row.group], row.other_groups), -1, split.metadata[:, row.group])


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


def _chosen_by(row: Dataset) -> Measure:
    """Return what probes are chosen by: the set's own measure, or top-1 where that needs groups."""
    return MEASURES["top1" if row.group >= 0 else row.measure]


def _published(key: str, architecture: str, row: Dataset, metrics: dict[str, float]) -> dict[str, float]:
    """Return the published number of OpenAI's weights below the set's own measure: open_clip's, else the paper's."""
    task, name = key.split("/")
    numbers = {number.source: number.value / 100 for number in published(name, architecture)}
    value = numbers.get("open_clip", numbers.get("paper"))
    own = f"{key}/{row.measure}"
    return {f"{own}/published": value} if task == "zeroshot" and value is not None and own in metrics else {}
