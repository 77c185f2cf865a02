"""The optimizers, with warm-up, cosine decay to zero and decoupled weight decay; state and weights in half precision.

The paper's is AdamW: Radford et al. 2021, section 2.5 and table 18. Decay leaves gains, biases and the logit scale
alone. Adafactor is big_vision's form (`big_vision/optax.py`; Zhai et al. 2022, arXiv:2106.04560): unlike
`optax.adafactor`'s, its rate is absolute, and its weight decay follows the rate as AdamW's does. Lion: Chen et al. 2023
(arXiv:2302.06675). Locked-image tuning: Zhai et al. 2022 (arXiv:2111.07991). Layer-wise decay of the rate: Bao et al.
2021 (BEiT).
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from clip_jax.config import Architecture, OptimConfig
from clip_jax.models import make_model
from clip_jax.training.rounding import round_nearest, stochastic_round
from clip_jax.typing import ArrayLike, Params

_NEVER_DECAYED = re.compile(r"(^|[/_])(bias|scale\d?)$")
_ALWAYS_FLOAT32 = re.compile(r"^logit_(scale|bias)$")

_HALF = (jnp.bfloat16, jnp.float16)
# Folded into the key of a seed or a step, so that nothing else is drawn from the same.
_MOMENTS, _PARAMS = 1, 2
# What one of each kind of moment is in float16, which has 2^-24 to 2^16. Of gradients so 1.5e-11 to 16: less is nothing
# beside AdamW's smallest eps, 1e-8; of ViT-B/32's gradients (24 pairs, random weights) the largest was 0.07, the median
# 9e-5, one in a thousand below 1e-7. `ema` is Adafactor's, of updates, which are about 1.
_FLOAT16_UNITS = {"mu": 2.0**-12, "nu": 2.0**-12, "ema": 1.0}
# Between the head's 64 and the 48 layers of the deepest stack: kernels are factored, what is stacked is not mixed.
_SMALLEST_FACTORED = 64


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear from 0 over `warmup_steps`, then a cosine to 0 at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, total_steps)


def make_optimizer(
    config: OptimConfig, total_steps: int, *, architecture: Architecture | None = None, seed: int = 0
) -> optax.GradientTransformation:
    """Return the optimizer. Its arithmetic and its updates are float32, whatever parameters and gradients are.

    Its state holds for every parameter that is trained: with AdamW two moments; with Lion one; with Adafactor one,
    and a row and a column for the second, which is whole for vectors. They are `moment_dtype`, but what belongs to
    scalars and Adafactor's second moment are float32.

    Args:
      architecture: the model, whose towers order the layers; `layer_decay` < 1 needs it.
      seed: of stochastic rounding; what is drawn is a function of seed and step.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    descend = optax.chain(
        _SCALES[config.name](config, seed),
        optax.add_decayed_weights(
            config.weight_decay, lambda params: weight_decay_mask(params, config.no_weight_decay)
        ),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )
    optimizer = optax.chain(clip, descend)
    if config.layer_decay < 1:
        optimizer = optax.chain(optimizer, _scale_by_layer(config.layer_decay, architecture))
    if config.freeze:
        parts = {True: optax.set_to_zero(), False: optimizer}
        optimizer = optax.partition(parts, lambda params: frozen_mask(params, config.freeze))
    return _in_float32(optimizer)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: Params, state: PyTree, params: Params) -> tuple[Params, PyTree]:
        return inner.update(upcast(updates), state, upcast(params))

    return optax.GradientTransformation(lambda params: inner.init(upcast(params)), update)


# ----------------------------------------------------------------------------------------------------- the optimizers


def _adamw(config: OptimConfig, seed: int) -> optax.GradientTransformation:
    return _stored(optax.scale_by_adam(config.b1, config.b2, config.eps), config, seed)


def _lion(config: OptimConfig, seed: int) -> optax.GradientTransformation:
    return _stored(optax.scale_by_lion(config.b1, config.b2), config, seed)


def _adafactor(config: OptimConfig, seed: int) -> optax.GradientTransformation:
    def decay(step: ArrayLike, exponent: float) -> ArrayLike:
        # Its own schedule goes on towards 1, where the second moment stands still.
        return jnp.minimum(config.b2, 1 - (step + 1.0) ** -exponent)

    scale = optax.scale_by_factored_rms(min_dim_size_to_factor=_SMALLEST_FACTORED, decay_rate_fn=decay)
    return optax.chain(scale, _stored(optax.ema(config.b1, debias=False), config, seed)) if config.b1 else scale


_SCALES = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion}


def _stored(inner: optax.GradientTransformation, config: OptimConfig, seed: int) -> optax.GradientTransformation:
    """Return `inner`, its moments held in `moment_dtype` between steps and rounded when they are put away."""
    if config.moment_dtype == "float32":
        return inner

    def update(updates: Params, state: PyTree, params: Params | None = None) -> tuple[Params, PyTree]:
        updates, state = inner.update(updates, _unpack(state), params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _MOMENTS), state.count)
        return updates, _pack(state, config.moment_dtype, key if config.stochastic_rounding else None)

    return optax.GradientTransformation(lambda params: _pack(inner.init(params), config.moment_dtype, None), update)


def _pack(state: PyTree, dtype: str, key: jax.Array | None) -> PyTree:
    """Return the state with its moments as `dtype`, rounded to the nearest if there is no key.

    float16 holds moments in `_FLOAT16_UNITS`, and of AdamW's second moment the square root: gradients of 1e-4 have
    squares that are less than its smallest number. The root is unbiased, so the square is too large by the root's
    variance: at b2=0.999 by 1e-4 of it.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    keys = [None] * len(leaves) if key is None else jax.random.split(key, len(leaves))
    packed = []
    for (path, x), key in zip(leaves, keys, strict=True):
        if x.ndim and x.dtype == jnp.float32:
            if dtype == "float16":
                x = (jnp.sqrt(x) if path[0].name == "nu" else x) / _FLOAT16_UNITS[path[0].name]
            x = round_nearest(x, dtype) if key is None else stochastic_round(x, dtype, key)
        packed.append(x)
    return structure.unflatten(packed)


def _unpack(state: PyTree) -> PyTree:
    def unpack(path: tuple, x: Array) -> Array:
        if x.dtype != jnp.float16:
            return upcast(x)
        x = upcast(x) * _FLOAT16_UNITS[path[0].name]
        return x * x if path[0].name == "nu" else x

    return jax.tree_util.tree_map_with_path(unpack, state)


# --------------------------------------------------------------------------------------- parameters in half precision


def cast_params(params: Params, pattern: str) -> Params:
    """Return the parameters, those whose path `pattern` finds in bfloat16. The logit scale and bias never are.

    Raises:
      ValueError: if the pattern finds none.
    """
    found = _found(params, pattern)
    found = jax.tree_util.tree_map_with_path(lambda path, x: x and not _ALWAYS_FLOAT32.search(_name(path)), found)
    if pattern and not any(jax.tree.leaves(found)):
        raise ValueError(_finds("half_precision_params", pattern, "no parameter", params))
    return jax.tree.map(lambda x, half: round_nearest(x, "bfloat16") if half else x, params, found)


def upcast(tree: PyTree) -> PyTree:
    """Return the tree with what is in half precision as float32, without loss; all else is the same object."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in _HALF else x, tree)


def apply_updates(params: Params, updates: Params, key: jax.Array) -> Params:
    """Return `params + updates` in the dtypes of `params`; sums in half precision are rounded stochastically.

    Args:
      key: of this step.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, _PARAMS), len(leaves))

    def add(x: ArrayLike, update: ArrayLike, key: jax.Array) -> ArrayLike:
        total = upcast(x) + update
        return stochastic_round(total, x.dtype.name, key) if x.dtype in _HALF else total

    return structure.unflatten(map(add, leaves, structure.flatten_up_to(updates), keys))


# ------------------------------------------------------------------------------------------ what is trained, how fast


def frozen_mask(params: Params, pattern: str) -> PyTree[bool]:
    """Return a tree of bools: True for parameters that are not trained.

    Raises:
      ValueError: if the pattern finds none, or all.
    """
    found = _found(params, pattern)
    leaves = jax.tree.leaves(found)
    if pattern and sum(leaves) in (0, len(leaves)):
        raise ValueError(_finds("freeze", pattern, "all parameters" if all(leaves) else "no parameter", params))
    return found


def tower_is_frozen(params: Params, pattern: str, tower: str) -> bool:
    """Tell whether no parameter of a tower, 'image' or 'text', is trained."""
    return bool(pattern) and all(jax.tree.leaves(frozen_mask(params, pattern)[tower]))


def frozen_towers(architecture: Architecture, pattern: str) -> tuple[str, ...]:
    """Return those of 'image' and 'text' whose parameters are all frozen by `pattern` (`optim.freeze`)."""
    params = jax.eval_shape(make_model(architecture).init, jax.random.key(0))
    return tuple(tower for tower in ("image", "text") if tower_is_frozen(params, pattern, tower))


def _found(params: Params, pattern: str) -> PyTree[bool]:
    regex = re.compile(pattern)
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(pattern and regex.search(_name(path))), params)


def _finds(key: str, pattern: str, what: str, params: Params) -> str:
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    some = ", ".join(names[:: max(1, len(names) // 4)])
    return f"optim.{key}={pattern!r} finds {what}; there are e.g. {some}"


def stop_frozen_gradients(params: Params, pattern: str) -> Params:
    """Return the parameters, the frozen ones constant to the gradient: nothing is computed for them on the way back."""
    if not pattern:
        return params
    return jax.tree.map(lambda x, stop: jax.lax.stop_gradient(x) if stop else x, params, frozen_mask(params, pattern))


def _scale_by_layer(decay: float, architecture: Architecture | None) -> optax.GradientTransformation:
    if architecture is None:
        raise ValueError(f"optim.layer_decay={decay} needs the order of layers: give make_optimizer the architecture")

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        factors = layer_decay_factors(updates, decay, architecture)
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_decay_factors(params: Params, decay: float, architecture: Architecture) -> PyTree:
    """Return `decay ** d` for every parameter, where d is its distance in layers from its tower's output.

    Towers define the order of their layers (`Tower.layer`). Parameters stacked over layers have an array of factors
    with axes to broadcast over the others; parameters outside the towers have factor 1.
    """
    towers = {"image": architecture.image, "text": architecture.text}

    def factor(path: tuple, leaf: ArrayLike) -> ArrayLike | float:
        tower = towers.get(path[0].key)
        if tower is None:
            return 1.0
        layer = tower.layer(_name(path[1:]))
        if isinstance(layer, range):
            powers = decay ** (tower.output_layer - np.asarray(layer, np.float32))
            return powers.reshape(-1, *[1] * (leaf.ndim - 1))
        return decay ** (tower.output_layer - layer)

    return jax.tree_util.tree_map_with_path(factor, params)


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)


def weight_decay_mask(params: Params, no_weight_decay: str = "") -> PyTree[bool]:
    """Return a tree of bools: True where weight decay applies.

    Names decide, not the number of axes: in stacked layers a bias has two or three.

    Args:
      no_weight_decay: a regular expression; a parameter whose path it finds, e.g. 'text/token_embedding', is spared.
    """

    def decays(path: tuple, _: object) -> bool:
        name = _name(path)
        return not _NEVER_DECAYED.search(name) and not (no_weight_decay and re.search(no_weight_decay, name))

    return jax.tree_util.tree_map_with_path(decays, params)
