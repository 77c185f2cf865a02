"""FLOPs of a function, counted from its jaxpr: two per multiply-add of matmuls and convolutions.

The convention of published figures and of MFU: Radford et al. 2021 figure 2, open_clip `docs/model_profile.csv`,
Chowdhery et al. 2022 appendix B (a training step is three forward passes; of a frozen tower, one).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.models.architecture import Architecture
from clip_jax.models.clip import make_model


def count(function: Callable, *args: Any, padding: bool = True) -> float:
    """Return the FLOPs of a function by tracing it; nothing is executed.

    The body of a `scan` counts once per iteration and the body of a `while` once. A `cond` counts as its last branch
    (predicate true), a Pallas kernel as its own cost estimate, and a `shard_map` body once per device.

    Args:
      *args: arrays or `jax.ShapeDtypeStruct`.
      padding: whether multiplications with a convolution's padding count. Published figures count them, XLA does not.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr, padding)


def _jaxpr_flops(jaxpr: Any, padding: bool) -> float:
    return sum((_equation_flops(equation, padding) for equation in jaxpr.eqns), start=0.0)


def _equation_flops(equation: Any, padding: bool) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * math.prod(out.shape) * math.prod(lhs.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation, padding)
    if name == "pallas_call":
        return float(params["cost_estimate"].flops)
    if name == "cond":
        return _jaxpr_flops(params["branches"][-1].jaxpr, padding)
    if name in ("scan", "shard_map"):
        times = params["length"] if name == "scan" else params["mesh"].size
        return times * _jaxpr_flops(getattr(params["jaxpr"], "jaxpr", params["jaxpr"]), padding)
    return sum((_jaxpr_flops(inner, padding) for value in params.values() for inner in _jaxprs(value)), start=0.0)


def _jaxprs(value: Any) -> list[Any]:
    """Return the jaxprs in a parameter of an equation such as `jit`, `checkpoint` or `custom_vjp`."""
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    return []


def _convolution_flops(equation: Any, padding: bool) -> float:
    params, (lhs, rhs), out = equation.params, (x.aval for x in equation.invars), equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    total = 2.0 * out.shape[numbers.out_spec[0]] * out.shape[numbers.out_spec[1]] * rhs.shape[numbers.rhs_spec[1]]
    total /= params["batch_group_count"]
    for i, (lhs_axis, rhs_axis, out_axis) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        sizes = lhs.shape[lhs_axis], rhs.shape[rhs_axis], out.shape[out_axis]
        window = (params["window_strides"][i], params["padding"][i][0], params["lhs_dilation"][i])
        total *= sizes[1] * sizes[2] if padding else valid_positions(*sizes, *window, params["rhs_dilation"][i])
    return total


@functools.lru_cache(maxsize=1 << 12)
def valid_positions(
    input_size: int, kernel_size: int, output_size: int, stride: int, low: int, lhs_dilation: int, rhs_dilation: int
) -> int:
    """Return the number of (kernel element, output element) pairs of one dimension that read input and not padding.

    low: padding before the first element.
    """
    positions = (o * stride + k * rhs_dilation - low for k in range(kernel_size) for o in range(output_size))
    return sum(at % lhs_dilation == 0 and 0 <= at // lhs_dilation < input_size for at in positions)


def forward_flops(architecture: Architecture) -> tuple[float, float]:
    """Return the forward FLOPs of the image tower per image and of the text tower per text of full length.

    Published figures count the last block at every position, so this does too; `models.layers` computes its MLP only at
    the pooled position.

    >>> from clip_jax.config import MODELS
    >>> [round(flops / 1e9, 1) for flops in forward_flops(MODELS["vit_b32"])]
    [8.8, 6.0]
    """
    model = make_model(architecture)
    params = jax.eval_shape(model.init, jax.random.key(0))
    size, length = architecture.image.image_size, architecture.text.context_length
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    text = jax.ShapeDtypeStruct((1, length), jnp.int32)
    image_flops, text_flops = count(model.encode_image, params, image), count(model.encode_text, params, text)
    return image_flops + architecture.image.uncounted_flops, text_flops + architecture.text.uncounted_flops


def training_flops(architecture: Architecture, frozen_towers: Collection[str] = ()) -> float:
    """Return the FLOPs of a training step per image-text pair: one forward pass and a backward pass of twice its cost.

    Args:
      frozen_towers: of 'image' and 'text', the towers without a trained parameter, which have no backward pass.
    """
    times = (1 if tower in frozen_towers else 3 for tower in ("image", "text"))
    return sum(n * forward for n, forward in zip(times, forward_flops(architecture), strict=True))
