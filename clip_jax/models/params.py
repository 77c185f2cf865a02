"""Parameter trees: the path of a leaf, batch statistics apart from trained parameters, the count."""

from __future__ import annotations

import math

import jax

from clip_jax.typing import Params


def tree_path(path: tuple) -> str:
    """Return a key path of `jax.tree_util` as a string, e.g. 'text/projection'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split_batch_stats(params: Params) -> tuple[Params, Params | None]:
    """Return the trained parameters, and the running averages of batch norm, None for a model without them."""
    trained = dict(params)
    stats = trained.pop("batch_stats", None)
    return trained, stats


def count_parameters(params: Params) -> int:
    """Return the number of trained parameters of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(split_batch_stats(params)[0]))
