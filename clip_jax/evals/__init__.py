"""Evaluators: functions of an embedder and an evaluation dataset that return metrics.

The training loop, `clip_jax.evaluate` and its `--follow` call the same functions by their name in EVALUATORS; every
entry is also tested by tests/contracts/test_evaluators.py.

An evaluator may set two attributes: `tasks`, the values of `Dataset.task` that it supports (default: all), and
`needs_train_split`. The command skips other datasets.
"""

from clip_jax.evals.analysis.bias import bias
from clip_jax.evals.analysis.overlap import overlap
from clip_jax.evals.few_shot import few_shot
from clip_jax.evals.linear_probe import linear_probe
from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zeroshot import zeroshot
from clip_jax.typing import Evaluator

EVALUATORS: dict[str, Evaluator] = {
    "zeroshot": zeroshot,
    "retrieval": retrieval,
    "linear_probe": linear_probe,
    "few_shot": few_shot,
    "overlap": overlap,
    "bias": bias,
}
