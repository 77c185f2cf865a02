"""Runs evaluators on datasets, for the command (`evaluate`) and for the training loop (`Suite`)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from clip_jax.config import DataConfig, EvalConfig, check_known_options, did_you_mean
from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals import EVALUATORS
from clip_jax.evals.analysis.baselines import baselines
from clip_jax.evals.datasets.registry import Dataset, published_results
from clip_jax.evals.load import LoadOptions, expand, find, load_dataset
from clip_jax.evals.metrics import Undefined
from clip_jax.evals.report.panels import Panels, panels
from clip_jax.typing import Embedder, EvalDataset, Evaluator, Unavailable

log = logging.getLogger(__name__)


class EvalReport(NamedTuple):
    """Metrics of several evaluators and datasets; the other fields are by `<evaluator>/<dataset>`."""

    metrics: dict[str, float]  # as returned by the evaluators, and `<metric>/published`
    descriptions: dict[str, str]  # images, classes, metric, prompts, preprocessing
    details: dict[str, Any]  # for plots and tables: an `overlap.Overlap`, or `bias.table_rows`
    skipped: dict[str, str]  # reason: not on this machine, or not possible for this dataset
    failed: dict[str, str]  # error: damaged data

    def add_error(self, key: str, error: Exception) -> None:
        """Record the reason for missing metrics. Call it while the exception is handled."""
        if isinstance(error, (Unavailable, Undefined)):
            log.warning("%s is skipped: %s", key, str(error).splitlines()[0])
            self.skipped[key] = str(error)
        else:
            log.exception("%s failed", key)  # with the traceback: it may be an error of the program
            self.failed[key] = distributed.format_error(error)


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    embedder: Embedder
    architecture: str = ""  # key of `config.MODELS`, for published results; other names have none
    preprocessing: str = ""  # for descriptions


def evaluate(
    model: EvaluatedModel,
    names: Sequence[str],
    evaluators: Sequence[str],
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    evaluator_options: Mapping[str, Mapping[str, Any]] = {},  # noqa: B006 (not modified)
    after_each: Callable[[EvalReport], None] = lambda report: None,
) -> EvalReport:
    """Run every evaluator on every dataset that it supports. A collective: call it on all processes.

    Errors in the data of one dataset are recorded in the report; other errors are raised.

    Args:
      names: keys of DATASETS or SUITES, or the user's own data.
      evaluators: keys of EVALUATORS.
      evaluator_options: keyword arguments by evaluator.
      after_each: called with the report so far after each dataset.
    """
    report = EvalReport({}, {}, {}, {}, {})
    options.check()
    for name in expand(names):
        row = find(name)
        supported = [evaluator for evaluator in evaluators if supports(EVALUATORS[evaluator], row)]
        for evaluator in evaluators:
            if evaluator not in supported and row.task in getattr(EVALUATORS[evaluator], "tasks", ()):
                report.skipped[f"{evaluator}/{row.name}"] = "the dataset has no train split"
        if not supported:
            continue
        try:
            with distributed.synchronized_errors(Unavailable, *DATA_ERRORS):
                dataset = load_dataset(name, options)
        except (Unavailable, *DATA_ERRORS) as error:
            for evaluator in supported:
                report.add_error(f"{evaluator}/{row.name}", error)
        else:
            for evaluator in supported:
                _evaluate_one(model, evaluator, dataset, evaluator_options.get(evaluator, {}), report)
        after_each(report)
    return report


def supports(evaluator: Evaluator, row: Dataset) -> bool:
    """Return whether an evaluator supports a dataset, by the evaluator's optional attributes (see `evals`)."""
    return row.task in getattr(evaluator, "tasks", (row.task,)) and (
        bool(row.train) or not getattr(evaluator, "needs_train_split", False)
    )


def _evaluate_one(
    model: EvaluatedModel, evaluator: str, dataset: EvalDataset, options: Mapping[str, Any], report: EvalReport
) -> None:
    """Add the metrics of one evaluator on one dataset to the report, or the error; the same on all processes."""
    key = f"{evaluator}/{dataset.name}"
    log.info("%s", key)
    try:
        with distributed.synchronized_errors(Unavailable, Undefined, *DATA_ERRORS):
            result = EVALUATORS[evaluator](model.embedder, dataset, **options)
    except (Unavailable, Undefined, *DATA_ERRORS) as error:
        report.add_error(key, error)
        return
    parts = (dataset.description, getattr(result, "description", ""), model.preprocessing)
    report.metrics.update(result)
    report.descriptions[key] = "; ".join(filter(None, parts))
    report.details[key] = getattr(result, "detail", None)
    main = f"{key}/{dataset.metric}"
    published = {row.source: row.value / 100 for row in published_results(dataset.name, model.architecture)}
    if evaluator == "zeroshot" and published and main in result:
        report.metrics[f"{main}/published"] = published.get("open_clip", published.get("paper"))


class LoadedTask(NamedTuple):
    evaluator: str
    dataset: EvalDataset
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Suite:
    """The evaluation tasks of a config, loaded once and evaluated repeatedly during training."""

    tasks: Mapping[str, LoadedTask]
    skipped: dict[str, str]  # reason, by task

    def evaluate(self, embedder: Embedder) -> dict[str, float]:
        """Return the metrics of all tasks. Tasks that are not possible for the model or dataset are skipped."""
        metrics: dict[str, float] = {}
        for name, task in self.tasks.items():
            try:
                metrics |= EVALUATORS[task.evaluator](embedder, task.dataset, **task.options)
            except (Unavailable, Undefined) as error:
                _skip(self.skipped, name, error)
        return metrics

    def baselines(self, train: EvalDataset) -> dict[str, float]:
        """Return the metrics, on the retrieval datasets, of baselines that are fitted to `train`."""
        return baselines(train, self._retrieval_datasets())

    def thresholds(self, config: EvalConfig, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return `<metric>/threshold` of `eval.thresholds`, without the skipped tasks.

        Logs a threshold without a metric in `metrics`, the results: it is neither passed nor missed.
        """
        kept = {key: value for key, value in config.thresholds.items() if key.split("/")[1] not in self.skipped}
        for key in kept.keys() - metrics.keys():
            log.warning("eval.thresholds: the run has no metric %r%s", key, did_you_mean(key, metrics))
        return {f"{key}/threshold": value for key, value in kept.items() if key in metrics}

    def panels(self, embedder: Embedder) -> list[Panels]:
        """Return the report's example images, of the first two retrieval datasets."""
        return [panels(embedder, dataset) for dataset in self._retrieval_datasets()[:2]]

    @property
    def attribution(self) -> str:
        """The attributions that the licenses of the images require, one per line."""
        found = (task.dataset.attribution for task in self.tasks.values())
        return "\n".join(dict.fromkeys(filter(None, found)))

    def _retrieval_datasets(self) -> list[EvalDataset]:
        return [task.dataset for task in self.tasks.values() if task.evaluator == "retrieval"]


def load_suite(config: EvalConfig, data: DataConfig) -> Suite:
    """Load the datasets of `eval.tasks`. A dataset that is not on this machine is logged, and recorded in `skipped`.

    Raises ValueError for an option that the evaluator of a task does not have.
    """
    tasks: dict[str, LoadedTask] = {}
    skipped: dict[str, str] = {}
    for name, task in config.tasks.items():
        owner = f"eval.tasks.{name}.options: evaluator {task.evaluator!r}"
        check_known_options(owner, task.options, EVALUATORS[task.evaluator], first=2)
        try:
            dataset = load_dataset(task.dataset, LoadOptions(config.data_dir, data=data))
        except Unavailable as error:
            _skip(skipped, name, error)
        else:
            tasks[name] = LoadedTask(task.evaluator, dataclasses.replace(dataset, name=name), task.options)
    return Suite(tasks, skipped)


def _skip(skipped: dict[str, str], name: str, error: Exception) -> None:
    if name not in skipped:
        log.warning("%s is skipped: %s", name, error)
        skipped[name] = str(error)
