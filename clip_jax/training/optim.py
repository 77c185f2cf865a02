"""Optimizers with warm-up, cosine decay to zero and decoupled weight decay; state and parameters in half precision.

AdamW is the paper's optimizer (Radford et al. 2021, section 2.5 and table 18); gains, biases and the logit scale have
no weight decay. Adafactor is big_vision's form (`big_vision/optax.py`; Zhai et al. 2022, arXiv:2106.04560): unlike
`optax.adafactor`, its learning rate is absolute, and its weight decay is multiplied by the learning rate, as in AdamW.
Lion: Chen et al. 2023 (arXiv:2302.06675). Locked-image tuning: Zhai et al. 2022 (arXiv:2111.07991). Layer-wise learning
rate decay: Bao et al. 2021 (BEiT).
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from clip_jax.config import Architecture, OptimConfig
from clip_jax.models import make_model, tree_path
from clip_jax.training.rounding import round_nearest, stochastic_round
from clip_jax.typing import ArrayLike, Params

_NEVER_DECAYED = r"(^|[/_])(bias|scale\d?)$"
# Values of `no_weight_decay` by name. open_clip: the parameters that its models list in `no_weight_decay()`, for the
# optimizers of timm. Its own AdamW excludes vectors (`open_clip_train/main.py`), of which only 'class_embedding' is
# neither a gain nor a bias.
NO_WEIGHT_DECAY = {"open_clip": r"^(image|text)/(class|positional)_embedding$"}
_ALWAYS_FLOAT32 = r"^logit_(scale|bias)$"

_HALF = (jnp.bfloat16, jnp.float16)
# Folded into the key of a seed or a step, so that moments and parameters are rounded with independent bits.
_MOMENTS, _PARAMS = 1, 2
# Values that are stored as 1 in float16, whose range is 2^-24 to 2^16: for gradients 1.5e-11 to 16. Smaller ones are
# negligible against AdamW's smallest eps, 1e-8. Of ViT-B/32's gradients (24 pairs, random weights) the largest was
# 0.07, the median 9e-5, and one in a thousand was below 1e-7. `ema` is Adafactor's average of updates, about 1.
_FLOAT16_UNITS = {"mu": 2.0**-12, "nu": 2.0**-12, "ema": 1.0}
# At most the head width 64, so that kernels are factored, and above the 48 layers of the deepest stack, so that the
# axis of stacked layers is not.
_SMALLEST_FACTORED = 64


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear to the peak over `warmup_steps`, then a cosine to 0 at `total_steps`.

    The step counts from 0, and the first has the rate peak / warmup_steps, as in open_clip
    (`open_clip_train/scheduler.py`). The paper does not state it. `optax.warmup_cosine_decay_schedule` and big_vision
    begin at 0: a first step that changes nothing, and each later one a step behind.

    >>> schedule = make_schedule(OptimConfig(learning_rate=1e-3, warmup_steps=10), 100)
    >>> [round(float(schedule(step)), 6) for step in (0, 4, 9, 10, 55, 100)]
    [0.0001, 0.0005, 0.001, 0.001, 0.0005, 0.0]
    """
    decay = optax.cosine_decay_schedule(config.learning_rate, total_steps - config.warmup_steps)

    def schedule(step: ArrayLike | int) -> ArrayLike:
        warmup = config.learning_rate * (step + 1) / max(config.warmup_steps, 1)
        return jnp.where(step < config.warmup_steps, warmup, decay(step - config.warmup_steps))

    return schedule


def make_optimizer(
    config: OptimConfig, total_steps: int, *, architecture: Architecture | None = None, seed: int = 0
) -> optax.GradientTransformation:
    """Return the optimizer of a config. It computes in float32 and returns float32 updates for inputs of any dtype.

    The state per trained parameter: AdamW two moments; Lion one moment; Adafactor one moment, and the second moment
    factored into a row and a column (not factored for vectors). Moments are stored as `moment_dtype`, except those of
    scalars and Adafactor's second moment, which are float32.

    Args:
      architecture: the model, whose towers order their layers; required for `layer_decay` < 1.
      seed: seed of stochastic rounding; the random bits are a function of seed and step.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    decayed = functools.partial(weight_decay_mask, no_weight_decay=config.no_weight_decay)
    descend = optax.chain(
        _scale(config, seed),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )
    optimizer = optax.chain(clip, descend)
    if config.layer_decay < 1:
        optimizer = optax.chain(optimizer, _scale_by_layer(config.layer_decay, architecture))
    if config.freeze:
        transforms = {True: optax.set_to_zero(), False: optimizer}
        optimizer = optax.partition(transforms, lambda params: frozen_mask(params, config.freeze))

    def update(updates: Params, state: PyTree, params: Params) -> tuple[Params, PyTree]:
        return optimizer.update(upcast(updates), state, upcast(params))

    return optax.GradientTransformation(lambda params: optimizer.init(upcast(params)), update)


def _scale(config: OptimConfig, seed: int) -> optax.GradientTransformation:
    """Return the optimizer without weight decay and learning rate."""
    if config.name == "adamw":
        return _store_moments(optax.scale_by_adam(config.b1, config.b2, config.eps), config, seed)
    if config.name == "lion":
        return _store_moments(optax.scale_by_lion(config.b1, config.b2), config, seed)

    def decay(step: ArrayLike, exponent: float) -> ArrayLike:
        # Without the limit the decay rate approaches 1, and the second moment stops changing.
        return jnp.minimum(config.b2, 1 - (step + 1.0) ** -exponent)

    scale = optax.scale_by_factored_rms(min_dim_size_to_factor=_SMALLEST_FACTORED, decay_rate_fn=decay)
    return optax.chain(scale, _store_moments(optax.ema(config.b1, debias=False), config, seed)) if config.b1 else scale


def _store_moments(inner: optax.GradientTransformation, config: OptimConfig, seed: int) -> optax.GradientTransformation:
    """Return `inner` with its moments stored as `moment_dtype` between steps."""
    if config.moment_dtype == "float32":
        return inner

    def update(updates: Params, state: PyTree, params: Params | None = None) -> tuple[Params, PyTree]:
        updates, state = inner.update(updates, _unpack(state), params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _MOMENTS), state.count)
        return updates, _pack(state, config.moment_dtype, key if config.stochastic_rounding else None)

    return optax.GradientTransformation(lambda params: _pack(inner.init(params), config.moment_dtype, None), update)


def _pack(state: PyTree, dtype: str, key: jax.Array | None) -> PyTree:
    """Return the state with its moments as `dtype`, rounded stochastically with a key, else to the nearest.

    float16 stores moments in units of `_FLOAT16_UNITS`, and the square root of AdamW's second moment: gradients of 1e-4
    have squares below its smallest number. The rounded root is unbiased, so its square is too large by the variance of
    the root: by a relative 1e-4 at b2=0.999.
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


def cast_params(params: Params, pattern: str) -> Params:
    """Return the parameters with those whose path matches `pattern` as bfloat16; never the logit scale and bias."""
    matches, excluded = _match_paths(params, pattern), _match_paths(params, _ALWAYS_FLOAT32)
    cast = jax.tree.map(lambda match, exclude: match and not exclude, matches, excluded)
    if pattern and not any(jax.tree.leaves(cast)):
        raise ValueError(_match_error("half_precision_params", pattern, "no parameter", params))
    return jax.tree.map(lambda x, half: round_nearest(x, "bfloat16") if half else x, params, cast)


def upcast(tree: PyTree) -> PyTree:
    """Return the tree with half-precision leaves as float32; other leaves are the same objects."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in _HALF else x, tree)


def apply_updates(params: Params, updates: Params, key: jax.Array) -> Params:
    """Return `params + updates` in the dtypes of `params`; sums in half precision are rounded stochastically."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, _PARAMS), len(leaves))

    def add(x: ArrayLike, update: ArrayLike, key: jax.Array) -> ArrayLike:
        total = upcast(x) + update
        return stochastic_round(total, x.dtype.name, key) if x.dtype in _HALF else total

    return structure.unflatten(map(add, leaves, structure.flatten_up_to(updates), keys))


def frozen_mask(params: Params, pattern: str) -> PyTree[bool]:
    """Return True for frozen parameters, whose path matches. Raises ValueError if none matches, or all."""
    matches = _match_paths(params, pattern)
    leaves = jax.tree.leaves(matches)
    if pattern and sum(leaves) in (0, len(leaves)):
        raise ValueError(_match_error("freeze", pattern, "all parameters" if all(leaves) else "no parameter", params))
    return matches


def tower_is_frozen(params: Params, pattern: str, tower: str) -> bool:
    """Return whether no parameter of a tower, 'image' or 'text', is trained."""
    return bool(pattern) and all(jax.tree.leaves(frozen_mask(params, pattern)[tower]))


def frozen_towers(architecture: Architecture, pattern: str) -> tuple[str, ...]:
    """Return the towers, of 'image' and 'text', without a trained parameter."""
    params = jax.eval_shape(make_model(architecture).init, jax.random.key(0))
    return tuple(tower for tower in ("image", "text") if tower_is_frozen(params, pattern, tower))


def stop_frozen_gradients(params: Params, pattern: str) -> Params:
    """Return the parameters with `stop_gradient` on the frozen ones, whose backward pass is then not computed."""
    mask = frozen_mask(params, pattern)
    return jax.tree.map(lambda x, stop: jax.lax.stop_gradient(x) if stop else x, params, mask)


def _match_paths(params: Params, pattern: str) -> PyTree[bool]:
    regex = re.compile(pattern)
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(pattern and regex.search(tree_path(path))), params)


def _match_error(key: str, pattern: str, matched: str, params: Params) -> str:
    names = [tree_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    examples = ", ".join(names[:: max(1, len(names) // 4)])
    return f"optim.{key}={pattern!r} matches {matched}; there are e.g. {examples}"


def _scale_by_layer(decay: float, architecture: Architecture | None) -> optax.GradientTransformation:
    if architecture is None:
        raise ValueError(f"optim.layer_decay={decay} needs the order of layers: give make_optimizer the architecture")

    def scale(updates: Params, params: Params | None = None) -> Params:
        return jax.tree.map(jnp.multiply, updates, layer_decay_factors(updates, decay, architecture))

    return optax.stateless(scale)


def layer_decay_factors(params: Params, decay: float, architecture: Architecture) -> PyTree:
    """Return `decay ** d` for every parameter, where d is its distance in layers from its tower's output.

    Parameters after the last layer and outside the towers have factor 1; those stacked over layers have an array.
    """
    towers = {"image": architecture.image, "text": architecture.text}

    def factor(path: tuple, leaf: ArrayLike) -> ArrayLike | float:
        tower = towers.get(path[0].key)
        if tower is None:
            return 1.0
        layer = tower.layer(tree_path(path[1:]))
        if isinstance(layer, range):
            powers = decay ** (tower.output_layer - np.asarray(layer, np.float32))
            return powers.reshape(-1, *[1] * (leaf.ndim - 1))
        return decay ** (tower.output_layer - layer)

    return jax.tree_util.tree_map_with_path(factor, params)


def weight_decay_mask(params: Params, no_weight_decay: str = "") -> PyTree[bool]:
    """Return True for parameters with weight decay: no gains and biases, and none that `no_weight_decay` matches.

    Gains and biases are recognized by name: parameters stacked over layers have another number of axes.

    Args:
      no_weight_decay: regular expression of parameter paths, or a key of NO_WEIGHT_DECAY.

    Raises:
      ValueError: if `no_weight_decay` matches no parameter.
    """
    pattern = NO_WEIGHT_DECAY.get(no_weight_decay, no_weight_decay)
    never, excluded = _match_paths(params, _NEVER_DECAYED), _match_paths(params, pattern)
    if pattern and not any(jax.tree.leaves(excluded)):
        raise ValueError(_match_error("no_weight_decay", no_weight_decay, "no parameter", params))
    return jax.tree.map(lambda *no_decay: not any(no_decay), never, excluded)
