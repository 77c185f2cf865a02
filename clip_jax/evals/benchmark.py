"""The registry's sets asked of one model: zero-shot, retrieval, linear probes, few-shot curves, overlap, groups.

No number goes without what it is of: split, size, measure, prompts and preprocessing are in `EvalReport.described`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.config import check_name
from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals import prompts
from clip_jax.evals.analysis import bias, overlap
from clip_jax.evals.analysis.near_duplicates import hash_images, nearest_hash
from clip_jax.evals.association import MANY, association
from clip_jax.evals.datasets.load import load_split
from clip_jax.evals.datasets.registry import DATASETS, SUITES, Dataset, published_results
from clip_jax.evals.few_shot import SHOTS, few_shot
from clip_jax.evals.linear_probe import Examples, search
from clip_jax.evals.metrics import METRICS, Metric, Predictions, Undefined, hits
from clip_jax.evals.question import (
    Load,
    Options,
    Question,
    Subject,
    as_captions,
    as_classes,
    caption_templates,
    check_classes,
    cue_wordings,
    groups_of,
    whole_split,
)
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zeroshot import classified, measured
from clip_jax.typing import DatasetSplit, EvalDataset, Unavailable

__all__ = ["TASKS", "Options", "EvalReport", "Question", "Subject", "asks", "eval_set", "evaluate", "expand"]

log = logging.getLogger(__name__)

HELD_OUT = 0.2  # of the training split, for validation where there is no split for it
SEEDS = range(5)  # of few-shot draws


class Answer(NamedTuple):
    """What one task found of one set: numbers, what they are of, and what plots and tables need besides."""

    metrics: dict[str, float]
    described: str
    detail: Any = None


class EvalReport(NamedTuple):
    """What was measured; all but `metrics` by `<task>/<set>`.

    metrics: as evaluators return them: `<task>/<set>/<measure>` and what stands below.
    described: what the numbers are of.
    details: an `overlap.Overlap`, or `bias.table_rows` by group.
    skipped: why there is no number: the set is not here, or can't be measured so.
    failed: what went wrong where there should be one: what is here is damaged.
    """

    metrics: dict[str, float]
    described: dict[str, str]
    details: dict[str, Any]
    skipped: dict[str, str]
    failed: dict[str, str]


def evaluate(
    subject: Subject,
    names: Sequence[str],
    tasks: Sequence[str],
    load: Load,
    options: Options = Options(),  # noqa: B008 (frozen)
    after_each: Callable[[EvalReport], None] = lambda outcome: None,
) -> EvalReport:
    """Ask every set for which a task is meant. To be called on all hosts.

    What can't be read of one set is recorded, and the others go on; an error of the program's own ends it.

    Args:
      names: keys of DATASETS or SUITES.
      tasks: keys of TASKS.
      after_each: gets what there is after each set that was asked, so that it can be kept.

    Raises:
      ValueError: for a name that isn't known, or prompts of the user's that can't be used.
    """
    outcome, names = EvalReport({}, {}, {}, {}, {}), expand(names)
    options.check()
    for name in names:
        asked = [task for task in tasks if asks(task, DATASETS[name])]
        for task in asked:
            _ask(task, Question(subject, DATASETS[name], load, options, len(names)), outcome)
        if asked:
            after_each(outcome)
    return outcome


def _ask(task: str, question: Question, outcome: EvalReport) -> None:
    """Add to the outcome what a task finds of a set, the same on all hosts."""
    row, key = question.dataset, f"{task}/{question.dataset.name}"
    log.info("%s", key)
    try:
        with distributed.synchronized_errors(Unavailable, Undefined, *DATA_ERRORS):
            answer = TASKS[task](question)
            metrics = answer.metrics | _published(key, question.subject.architecture, row, answer.metrics)
    except (Unavailable, Undefined) as error:
        log.warning("%s is left out: %s", key, str(error).splitlines()[0])
        outcome.skipped[key] = str(error)
    except DATA_ERRORS as error:
        outcome.failed[key] = distributed.format_error(error)
        log.exception("%s failed", key)  # with the traceback: an IndexError may as well be ours
    else:
        outcome.metrics.update(metrics)
        outcome.described[key] = answer.described
        outcome.details[key] = answer.detail


def eval_set(name: str, data_dir: str, options: Options = Options()) -> EvalDataset:  # noqa: B008 (frozen)
    """Return a set's test split as evaluators see it, for the training loop: `zeroshot` or `retrieval` by its row.

    Raises:
      ValueError: for a name that isn't in DATASETS.
      Unavailable: where it is not on this machine, or not whole.
    """
    check_name("a set", name, DATASETS)
    row = DATASETS[name]
    split = whole_split(row, load_split(row, "test", data_dir))
    return as_captions(row, split, options) if row.task == "retrieval" else as_classes(row, split, options)[0]


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
    if row.task == "association":
        split = question.test()
        if not split.cues:
            raise Unavailable("what was found has no cues: they are in its associations.jsonl")
        wordings = cue_wordings(split, question.options)
        said = f"{len(split.cues):,} cues, such as {wordings[0][0]!r}; those with {MANY} candidates or more count"
        found = association(question.subject.of(split), row.name, split.images, split.cues, wordings)
        return Answer(found, question.described(split, said))
    scored, described, _, _ = _classified(question)
    return Answer(measured(f"zeroshot/{row.name}", scored, row.metric), described)


def _retrieval(question: Question) -> Answer:
    row, split = question.dataset, question.test()
    asked = as_captions(row, split, question.options)
    templates = ", ".join(map(repr, caption_templates(row, question.options)))
    said = f"{len(asked.texts):,} captions in {templates}"
    return Answer(retrieval(question.subject.of(split), asked), question.described(split, said))


def _linear_probe(question: Question) -> Answer:
    row, test = question.dataset, question.test()
    train, validation, held_out = _training(question)
    found = search(train, validation, row.classes, _chosen_by(row))
    scores_nQ = found.probe.scores(question.subject.of(test).examples().features_nD)
    scored = Predictions(scores_nQ, test.targets, groups_of(row, test))
    fitted = f"fitted to {len(train.targets) + len(validation.targets):,}, l2={found.l2:.3g} found on {held_out}"
    return Answer(measured(f"linear_probe/{row.name}", scored, row.metric), question.described(test, fitted))


def _few_shot(question: Question) -> Answer:
    row, test = question.dataset, question.test()
    if row.group_column >= 0:
        raise Unavailable(f"{row.metric} of few shots is not measured: draws are by class, not by group")
    if np.ndim(question.part("train").targets) == 2:
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
        metric=METRICS[row.metric],
    )
    metrics = {}
    for count, values in curve.items():
        key = f"few_shot/{row.name}/{count}_shot"
        low, high = values.interval
        metrics |= {key: values.mean, f"{key}/min": low, f"{key}/max": high, f"{key}/candidates": float(row.classes)}
        if row.metric in ("top1", "mean_per_class"):
            metrics[f"{key}/chance"] = 1 / row.classes
    said = f"{len(SEEDS)} draws and their range, l2 found for each on {held_out}"
    return Answer(metrics, question.described(test, said))


def _overlap(question: Question) -> Answer:
    row, options = question.dataset, question.options
    if not options.hashes:
        raise Unavailable("the hashes of the training source are missing: give --overlap")
    scored, described, split, _ = _classified(question)
    distances_n, _ = nearest_hash(hash_images(split.images), options.hashes)
    found = overlap.analyze_overlap(hits(scored), distances_n <= options.max_distance, question.asked)
    names = ("fraction", "accuracy", "accuracy_clean", "accuracy_overlapping", "gain", "p_corrected")
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
    return Answer(metrics, described, bias.table_rows(by_group))


TASKS: dict[str, Callable[[Question], Answer]] = {
    "zeroshot": _zeroshot,
    "retrieval": _retrieval,
    "linear_probe": _linear_probe,
    "few_shot": _few_shot,
    "overlap": _overlap,
    "bias": _bias,
}


# ----------------------------------------------------------------------------------------------------------- parts


def _classified(question: Question) -> tuple[Predictions, str, DatasetSplit, prompts.Prompts]:
    """Return what the zero-shot classifier says of the test split, and what it was asked."""
    check_classes(question.dataset)
    split = question.test()
    asked, names, source = as_classes(question.dataset, split, question.options)
    scored = classified(question.subject.of(split), asked)
    wordings = f"{source}, {sum(map(len, asked.texts)):,} wordings, {names.digest}"
    return scored, question.described(split, wordings), split, names


def _training(question: Question) -> tuple[Examples, Examples, str]:
    """Return what to fit to and what to choose by: the validation split, or a part held out, the same every time."""
    row, train = question.dataset, question.part("train")
    if row.validation or row.tfds_validation:
        try:
            validation = question.part("validation")
        except Unavailable as error:
            log.info("%s: a part of the training split is held out, since %s", row.name, error)
        else:
            return *(question.subject.of(split).examples() for split in (train, validation)), "the validation split"
    order = np.random.default_rng(0).permutation(len(train.images))
    count = max(1, round(HELD_OUT * len(order)))
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    examples = question.subject.of(train).examples
    return examples(kept), examples(held), f"{count:,} pictures held out of {row.train}"


def _chosen_by(row: Dataset) -> Metric:
    """Return what probes are chosen by: the set's own measure, or top-1 where that needs groups."""
    return METRICS["top1" if row.group_column >= 0 else row.metric]


def _published(key: str, architecture: str, row: Dataset, metrics: dict[str, float]) -> dict[str, float]:
    """Return the published number of OpenAI's weights below the set's own measure: open_clip's, else the paper's."""
    task, name = key.split("/")
    numbers = {number.source: number.value / 100 for number in published_results(name, architecture)}
    value = numbers.get("open_clip", numbers.get("paper"))
    own = f"{key}/{row.metric}"
    return {f"{own}/published": value} if task == "zeroshot" and value is not None and own in metrics else {}
