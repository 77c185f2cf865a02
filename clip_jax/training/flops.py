"""Floating-point operations of a function, from its trace: two for every multiply-add of products and convolutions.

So FLOPs are counted where utilisation is published: Radford et al. 2021 figure 2, open_clip `docs/model_profile.csv`,
Chowdhery et al. 2022 appendix B (a training step is three forward passes; of a tower that is frozen, one).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.config import Architecture
from clip_jax.models import make_model
from clip_jax.training import optim
from clip_jax.typing import Params


def count(function: Callable, *args: Any, padding: bool = True) -> float:
    """Return the operations of `function` on arrays, or shapes; nothing is computed.

    Loops count as often as they run, `while` once; of a conditional the last branch, that of a true predicate. A kernel
    counts as it estimates itself, a sharded part on all devices.

    Args:
      padding: whether products with a convolution's padding count, as in published figures; XLA leaves them out.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, padding)


def _count(jaxpr: Any, padding: bool) -> float:
    return sum((_equation(equation, padding) for equation in jaxpr.eqns), start=0.0)


def _equation(equation: Any, padding: bool) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * math.prod(out.shape) * math.prod(lhs.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        return _convolution(equation, padding)
    if name == "pallas_call":
        return float(params["cost_estimate"].flops)
    if name == "cond":
        return _count(params["branches"][-1].jaxpr, padding)
    if name in ("scan", "shard_map"):
        times = params["length"] if name == "scan" else params["mesh"].size
        return times * _count(getattr(params["jaxpr"], "jaxpr", params["jaxpr"]), padding)
    return sum((_count(inner, padding) for value in params.values() for inner in _jaxprs(value)), start=0.0)


def _jaxprs(value: Any) -> list[Any]:
    """Return the traces in a parameter of an equation, such as those of `jit`, `checkpoint` and `custom_vjp`."""
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return []


def _convolution(equation: Any, padding: bool) -> float:
    params, (lhs, rhs), out = equation.params, (x.aval for x in equation.invars), equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    total = 2.0 * out.shape[numbers.out_spec[0]] * out.shape[numbers.out_spec[1]] * rhs.shape[numbers.rhs_spec[1]]
    total /= params["batch_group_count"]
    for i, (at, kernel_at, out_at) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        size, side = rhs.shape[kernel_at], out.shape[out_at]
        window = (params["window_strides"][i], params["padding"][i][0], params["lhs_dilation"][i])
        total *= size * side if padding else meetings(lhs.shape[at], size, side, *window, params["rhs_dilation"][i])
    return total


@functools.lru_cache(maxsize=1 << 12)
def meetings(side: int, size: int, out: int, stride: int, low: int, lhs_dilation: int, rhs_dilation: int) -> int:
    """Return how many pairs of a window's element and a real element of the input meet, along one dimension.

    Args:
      side, size, out: elements of the input, the window and the result.
      low: padding before the first element.
    """
    found = 0
    for k in range(size):
        for o in range(out):
            at = o * stride + k * rhs_dilation - low
            found += at % lhs_dilation == 0 and 0 <= at // lhs_dilation < side
    return found


def forward_flops(architecture: Architecture) -> tuple[float, float]:
    """Return the operations that one picture, and one text of full length, cost the towers, as published figures count.

    They count a last block at every position; `models.layers` computes it at the one that the tower gives.
    """
    model, params = make_model(architecture), _params_like(architecture)
    side, length = architecture.image.image_size, architecture.text.length
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    text = jax.ShapeDtypeStruct((1, length), jnp.int32)
    image_flops, text_flops = count(model.encode_image, params, image), count(model.encode_text, params, text)
    return image_flops + architecture.image.uncounted_flops, text_flops + architecture.text.uncounted_flops


def training_flops(architecture: Architecture, freeze: str = "") -> float:
    """Return what a pair costs a training step: forward, and twice as much backward.

    freeze: a tower of which it leaves nothing to train has no backward pass.
    """
    params = _params_like(architecture)
    times = (1 if optim.locked(params, freeze, tower) else 3 for tower in ("image", "text"))
    return sum(n * forward for n, forward in zip(times, forward_flops(architecture), strict=True))


def _params_like(architecture: Architecture) -> Params:
    return jax.eval_shape(make_model(architecture).init, jax.random.key(0))
