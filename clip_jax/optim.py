"""The paper's optimizer: Adam with decoupled weight decay, warm-up and cosine decay to zero.

Source: Radford et al. 2021, section 2.5 and table 18. Decay leaves gains, biases and the logit scale alone.
"""

from __future__ import annotations

import re

import jax
import optax
from jaxtyping import PyTree

from clip_jax.config import OptimConfig
from clip_jax.typing import Params

_NEVER_DECAYED = re.compile(r"(^|[/_])(bias|scale\d?)$")


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear from 0 over `warmup_steps`, then a cosine to 0 at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, total_steps)


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Return the optimizer; its state mirrors the parameters, twice, in float32."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(config, total_steps),
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(params, config.no_weight_decay),
    )
    return optax.chain(clip, adamw)


def decay_mask(params: Params, no_weight_decay: str = "") -> PyTree[bool]:
    """Return a tree of bools: True where weight decay applies.

    Names decide, not the number of axes: in stacked layers a bias has two or three.

    Args:
      no_weight_decay: a regular expression; a parameter whose path it finds, e.g. 'text/token_embedding', is spared.
    """

    def decays(path: tuple, _: object) -> bool:
        name = "/".join(key.key for key in path)
        return not _NEVER_DECAYED.search(name) and not (no_weight_decay and re.search(no_weight_decay, name))

    return jax.tree_util.tree_map_with_path(decays, params)
