"""The sets of a config, loaded once, measured as often as the loop asks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

from clip_jax.config import DataConfig, EvalConfig
from clip_jax.evals import EVALUATORS
from clip_jax.evals.analysis.baselines import baselines
from clip_jax.evals.report.panels import Panels, panels
from clip_jax.evals.retrieval import retrieval
from clip_jax.typing import Embedder, EvalDataset, Evaluator, Unavailable

log = logging.getLogger(__name__)

Loader = Callable[[DataConfig, str], EvalDataset]
REGISTRY = "registry"  # the source whose splits are sets of `evals.registry`


@dataclasses.dataclass(frozen=True)
class Suite:
    """Evaluation sets by name, with their evaluators.

    skipped: by name, why a set is not measured on this machine.
    """

    sets: Mapping[str, tuple[Evaluator, EvalDataset]]
    skipped: Mapping[str, str]

    def evaluate(self, embedder: Embedder) -> dict[str, float]:
        """Return the metrics of all sets."""
        return {k: v for evaluator, eval_set in self.sets.values() for k, v in evaluator(embedder, eval_set).items()}

    def baselines(self, fitted_on: EvalDataset) -> dict[str, float]:
        """Return what is reached without learning a representation, on the retrieval sets."""
        return baselines(fitted_on, self._retrieval_sets())

    def thresholds(self, config: EvalConfig) -> dict[str, float]:
        """Return what is asked of metrics as `<metric>/threshold`, but for sets that are left out."""
        return {
            f"{key}/threshold": value
            for key, value in config.thresholds.items()
            if key.split("/")[1] not in self.skipped
        }

    def panels(self, embedder: Embedder) -> list[Panels]:
        """Return the pictures for a report, of the first two retrieval sets."""
        return [panels(embedder, eval_set) for eval_set in self._retrieval_sets()[:2]]

    @property
    def attribution(self) -> str:
        """What the licences of the pictures ask a report to say."""
        return "\n".join(dict.fromkeys(s.attribution for _, s in self.sets.values() if s.attribution))

    def _retrieval_sets(self) -> list[EvalDataset]:
        return [eval_set for evaluator, eval_set in self.sets.values() if evaluator is retrieval]


def load_suite(config: EvalConfig, data: DataConfig, loaders: Mapping[str, Loader]) -> Suite:
    """Load the sets of `config.tasks`; those that can't be had on this machine are logged and listed, not skipped.

    Args:
      loaders: by source, what returns a split of it as an EvalDataset.
    """
    sets, skipped = {}, {}
    for name, task in config.tasks.items():
        try:
            eval_set = loaders[task.source](data, task.split)
        except Unavailable as error:
            log.warning("%s is left out: %s", name, error)
            skipped[name] = str(error)
        else:
            sets[name] = EVALUATORS[task.evaluator], dataclasses.replace(eval_set, name=name)
    return Suite(sets, skipped)
