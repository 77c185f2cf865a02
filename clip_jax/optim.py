"""The paper's optimizer: Adam with decoupled weight decay, warm-up and cosine decay to zero; and fine-tuning's tools.

Source: Radford et al. 2021, section 2.5 and table 18. Decay leaves gains, biases and the logit scale alone.
Locked-image tuning: Zhai et al. 2022 (arXiv:2111.07991). Layer-wise decay of the rate: Bao et al. 2021 (BEiT).
"""

from __future__ import annotations

import re

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from clip_jax.config import OptimConfig
from clip_jax.typing import ArrayLike, Params

_NEVER_DECAYED = re.compile(r"(^|[/_])(bias|scale\d?)$")
_STAGE = re.compile(r"^image/stage(\d+)_")
_BEFORE_BLOCKS = re.compile(r"^(image|text)/(patch_|class_|positional_|token_|norm_pre|stem_)")


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear from 0 over `warmup_steps`, then a cosine to 0 at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, total_steps)


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Return the optimizer; its state mirrors the parameters that are trained, twice, in float32."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, total_steps),
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(params, config.no_weight_decay),
    )
    optimizer = optax.chain(clip, adamw)
    if config.layer_decay < 1:
        optimizer = optax.chain(optimizer, _scale_by_layer(config.layer_decay))
    if config.freeze:
        parts = {True: optax.set_to_zero(), False: optimizer}
        optimizer = optax.partition(parts, lambda params: frozen(params, config.freeze))
    return optimizer


def frozen(params: Params, pattern: str) -> PyTree[bool]:
    """Return a tree of bools: True for parameters that are not trained.

    Raises:
      ValueError: if the pattern finds none, or all.
    """
    found = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(pattern) and bool(re.search(pattern, _name(path))), params
    )
    leaves = jax.tree_util.tree_leaves_with_path(found)
    matched = sum(leaf for _, leaf in leaves)
    if pattern and matched in (0, len(leaves)):
        some = ", ".join(_name(path) for path, _ in leaves[:: max(1, len(leaves) // 4)])
        found_what = "all parameters" if matched else "no parameter"
        raise ValueError(f"optim.freeze={pattern!r} finds {found_what}; there are e.g. {some}")
    return found


def stop_frozen(params: Params, pattern: str) -> Params:
    """Return the parameters, the frozen ones constant to the gradient: nothing is computed for them on the way back."""
    if not pattern:
        return params
    return jax.tree.map(lambda x, stop: jax.lax.stop_gradient(x) if stop else x, params, frozen(params, pattern))


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        factors = layer_factors(updates, decay)
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_factors(params: Params, decay: float) -> PyTree:
    """Return for every parameter `decay` to the power of its distance from its tower's end, shaped to multiply it.

    What comes before the first block is furthest away, what comes after the last has factor 1, and stacked blocks have
    one each. A ResNet's stages count as blocks.
    """
    depth: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        tower, name = path[0].key, _name(path)
        stage = _STAGE.search(name)
        layers = leaf.shape[0] if "/blocks/" in name else int(stage[1]) + 1 if stage else 0
        depth[tower] = max(depth.get(tower, 0), layers)

    def factor(path: tuple, leaf: ArrayLike) -> ArrayLike | float:
        tower, name = path[0].key, _name(path)
        stage = _STAGE.search(name)
        if "/blocks/" in name:
            powers = decay ** np.arange(leaf.shape[0], 0, -1, dtype=np.float32)
            return powers.reshape(-1, *[1] * (leaf.ndim - 1))
        if stage:
            return decay ** (depth[tower] - int(stage[1]))
        first = _BEFORE_BLOCKS.search(name) is not None
        return decay ** (depth[tower] + 1) if first else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)


def decay_mask(params: Params, no_weight_decay: str = "") -> PyTree[bool]:
    """Return a tree of bools: True where weight decay applies.

    Names decide, not the number of axes: in stacked layers a bias has two or three.

    Args:
      no_weight_decay: a regular expression; a parameter whose path it finds, e.g. 'text/token_embedding', is spared.
    """

    def decays(path: tuple, _: object) -> bool:
        name = _name(path)
        return not _NEVER_DECAYED.search(name) and not (no_weight_decay and re.search(no_weight_decay, name))

    return jax.tree_util.tree_map_with_path(decays, params)
