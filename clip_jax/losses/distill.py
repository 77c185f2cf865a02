"""A teacher's softmax as the target of the student's: both cross-entropies over the global batch, at constant memory.

Source: CLIP-KD's contrastive relational distillation (Yang et al. 2024, arXiv:2307.12732, section 3.2), which is what
open_clip's `DistillClipLoss` adds to the contrastive loss. Neither of the two B·B matrices is held: every row needs
three numbers more than a softmax alone, the teacher's online softmax and two means by its weights, which are rescaled
along with its running maximum. How all pairs are walked: `losses/pairs.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clip_jax.losses.ring import Axis, Ring, in_mesh_order
from clip_jax.losses.tiles import (
    LOWEST,
    Embeddings,
    Statistics,
    accumulation_dtype,
    scale_slope,
    similarity,
    valid_pairs,
    walk_gradient,
    walk_statistics,
)
from clip_jax.typing import ArrayLike, Metrics


def distillation(
    image_bE: Float[ArrayLike, "b E"],
    text_bE: Float[ArrayLike, "_ E"],
    teacher_image_bG: Float[ArrayLike, "_ G"],
    teacher_text_bG: Float[ArrayLike, "_ G"],
    logit_scale: Float[Array, ""],
    teacher_scale: Float[Array, ""],
    axis: Axis = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the mean cross-entropy of the student's softmax against the teacher's; equal on every device.

    It is -Σ p_teacher log p_student for every image over all texts and for every text over all images, in nats: the
    mean over rows, and over both directions. The teacher and its scale get no gradient.

    Args:
      image_bE, text_bE: the student's unit rows, this device's part of the batch, float32 or bfloat16.
      teacher_image_bG, teacher_text_bG: the teacher's, of the same pictures and texts; their width is their own.
      logit_scale, teacher_scale: multiply each one's cosine similarities; already exponentiated.
      axis: mesh axes that the batch is sharded over, in any order; None outside `shard_map`.

    Returns:
      The loss, and of the batch `distill/cross_entropy`, the loss itself, and `distill/kl`, what remains of it without
      the teacher's own entropy: 0 for a student that has learnt all.

    Raises:
      ValueError: if these are not as many rows on all four sides.
    """
    rows = [jnp.asarray(x) for x in (image_bE, text_bE, teacher_image_bG, teacher_text_bG)]
    if len({x.shape[0] for x in rows}) > 1:
        counts = ", ".join(str(x.shape[0]) for x in rows)
        raise ValueError(f"the student's images and texts and the teacher's don't pair up: {counts} rows")
    return _loss(in_mesh_order(axis), *rows, logit_scale, jnp.asarray(teacher_scale, logit_scale.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(axis: Axis, *inputs: Array) -> tuple[Array, Metrics]:
    return _forward(axis, *inputs)[0]


def _forward(
    axis: Axis,
    image_bE: Array,
    text_bE: Array,
    teacher_image_bG: Array,
    teacher_text_bG: Array,
    scale: Array,
    teacher_scale: Array,
) -> tuple[tuple[Array, Metrics], tuple]:
    ring = Ring.of(axis, (text_bE, teacher_text_bG))
    images, texts = _embeddings(image_bE, teacher_image_bG, ring), _embeddings(text_bE, teacher_text_bG, ring)
    block = ring.gather(texts)
    sides = _statistics(images, texts, block, scale, teacher_scale, ring)
    row, column = (_finish(side, scale, teacher_scale) for side in sides)
    value, divergence = ((jnp.mean(one) + jnp.mean(other)) / 2 for one, other in zip(row[:2], column[:2], strict=True))
    if axis is not None:
        value, divergence = jax.lax.pmean((value, divergence), axis)
    metrics = {"distill/cross_entropy": value.astype(jnp.float32), "distill/kl": divergence.astype(jnp.float32)}
    # As in `tiles`: a single group's block is what the gradient walks too.
    kept = block if ring.hops == 1 else None
    return (value, metrics), (images, texts, kept, scale, teacher_scale, row[2], column[2])


def _backward(axis: Axis, residuals: tuple, cotangents: tuple) -> tuple:
    images, texts, kept, scale, teacher_scale, row_facts, column_facts = residuals
    ring = Ring.of(axis, (texts.rows, texts.beside))
    block = ring.gather(texts) if kept is None else kept
    d_image, d_text = _gradient(images, texts, block, row_facts, column_facts, scale, teacher_scale, ring)
    d_scale, slope = scale_slope(images, d_image, axis), cotangents[0]
    return (
        (slope * scale * d_image).astype(images.rows.dtype),
        (slope * scale * d_text).astype(texts.rows.dtype),
        None,
        None,
        (slope * d_scale).astype(scale.dtype),
        None,
    )


_loss.defvjp(_forward, _backward)


def _embeddings(rows: Array, teacher_rows: Array, ring: Ring) -> Embeddings:
    """Return a side's rows with the teacher's beside; the ids only tell them from rows that fill a tile up."""
    return Embeddings(rows, ring.varying(jnp.zeros(rows.shape[0], jnp.int32)), teacher_rows)


def _statistics(
    images: Embeddings, texts: Embeddings, block: Embeddings, scale: Array, teacher_scale: Array, ring: Ring
) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
    """Return the online softmax of student and teacher for every row and column of this device."""

    def of_pairs(axis: int, tile: Array, teacher_tile: Array, valid: Array) -> dict[str, Statistics]:
        means = {"student": tile, "teacher": teacher_tile}
        return {
            "student": _reduce(scale, tile, valid, axis, {}),
            "teacher": _reduce(teacher_scale, teacher_tile, valid, axis, means),
        }

    def of_tile(image: Embeddings, text: Embeddings) -> tuple[dict, dict]:
        tile, teacher_tile = similarity(image.rows, text.rows), similarity(image.beside, text.beside)
        return tuple(of_pairs(axis, tile, teacher_tile, valid_pairs(image, text)) for axis in (1, 0))

    def empty(axis: int, count: int) -> dict[str, Statistics]:
        shape = (count, 1) if axis == 1 else (1, count)
        tiles = (jnp.zeros(shape, accumulation_dtype(x.dtype)) for x in (images.rows, images.beside))
        return of_pairs(axis, *tiles, jnp.zeros(shape, bool))

    def merge(one: dict, other: dict) -> dict[str, Statistics]:
        return {
            "student": _merge(scale, one["student"], other["student"]),
            "teacher": _merge(teacher_scale, one["teacher"], other["teacher"]),
        }

    return walk_statistics(images, texts, block, ring, of_tile, empty, merge)


def _reduce(
    scale: Array, tile: Float[Array, "r c"], valid: Bool[Array, "r c"], axis: int, weighted: dict[str, Array]
) -> Statistics:
    """`total`: the sum of exponentials, relative to that of `top`; `weighted`: sums of these tiles by them."""
    top = jnp.max(jnp.where(valid, tile, -jnp.inf), axis, initial=LOWEST)
    powers = jnp.where(valid, jnp.exp(scale * (tile - jnp.expand_dims(top, axis))), 0)
    sums = {"total": jnp.sum(powers, axis)} | {name: jnp.sum(powers * x, axis) for name, x in weighted.items()}
    return {"top": top} | sums


def _merge(scale: Array, one: Statistics, other: Statistics) -> Statistics:
    top = jnp.maximum(one["top"], other["top"])
    shares = [jnp.exp(scale * (x["top"] - top)) for x in (one, other)]
    sums = {name: one[name] * shares[0] + other[name] * shares[1] for name in one if name != "top"}
    return {"top": top} | sums


def _finish(side: dict[str, Statistics], scale: Array, teacher_scale: Array) -> tuple[Array, Array, Statistics]:
    """Return every row's cross-entropy, its divergence from the teacher, and what the gradient has to know of it."""
    student, teacher = side["student"], side["teacher"]
    # Not log-sum-exp minus logit, as in `softmax`: the distance from the top is exact where they are close.
    crossed = scale * (student["top"] - teacher["student"] / teacher["total"]) + jnp.log(student["total"])
    entropy = teacher_scale * (teacher["top"] - teacher["teacher"] / teacher["total"]) + jnp.log(teacher["total"])
    facts = {
        "top": student["top"],
        "share": 1 / student["total"],
        "teacher_top": teacher["top"],
        "teacher_share": 1 / teacher["total"],
    }
    return crossed, crossed - entropy, facts


def _gradient(
    images: Embeddings,
    texts: Embeddings,
    block: Embeddings,
    rows: Statistics,
    columns: Statistics,
    scale: Array,
    teacher_scale: Array,
    ring: Ring,
) -> tuple[Float[Array, "b E"], Float[Array, "b E"]]:
    """Return the derivatives by the student's images and texts, but for the logit scale."""

    def probability(scale: Array, tile: Array, top: Array, share: Array) -> Array:
        return jnp.exp(scale * (tile - top)) * share

    def weigh(image: Embeddings, text: Embeddings, *facts: Statistics) -> tuple[Any, ...]:
        tile, teacher_tile = similarity(image.rows, text.rows), similarity(image.beside, text.beside)
        return tuple(
            probability(scale, tile, side["top"], side["share"]) / 2
            - probability(teacher_scale, teacher_tile, side["teacher_top"], side["teacher_share"]) / 2
            for side in facts
        )

    return walk_gradient(images, texts, block, rows, columns, ring, weigh)
