"""Evaluators: functions of an Embedder and an EvalDataset that return a flat dict of fractions.

A line in EVALUATORS is also the registration with tests/contracts/test_evaluators.py.
"""

from clip_jax.evals.retrieval import retrieval
from clip_jax.evals.zeroshot import zeroshot
from clip_jax.typing import Evaluator

EVALUATORS: dict[str, Evaluator] = {
    "retrieval": retrieval,
    "zeroshot": zeroshot,
}
