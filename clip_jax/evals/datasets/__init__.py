"""Evaluation datasets: the registry and its readers."""

from collections.abc import Callable

from clip_jax.config import DataConfig
from clip_jax.typing import EvalDataset


def _emoji(config: DataConfig, split: str) -> EvalDataset:
    from clip_jax.evals.datasets import emoji  # imports TensorFlow

    return emoji.load(config, split)


def _synthetic(config: DataConfig, split: str) -> EvalDataset:
    from clip_jax.evals.datasets import synthetic  # imports TensorFlow

    return synthetic.load(config, split)


# Config key `eval.tasks.<name>.source` -> function of the data config and the split
LOADERS: dict[str, Callable[[DataConfig, str], EvalDataset]] = {
    "emoji": _emoji,
    "synthetic": _synthetic,
}
