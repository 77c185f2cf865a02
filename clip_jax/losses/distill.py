"""Distillation: cross-entropy of the student's softmax over the global batch with a teacher's, at constant memory.

Source: contrastive relational distillation of CLIP-KD (Yang et al. 2024, arXiv:2307.12732, section 3.2), the term that
open_clip's `DistillClipLoss` adds to the contrastive loss. Neither B·B matrix is stored: in addition to the student's
online softmax, a row needs the teacher's, and the means of both similarities under the teacher's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.losses import tiles
from clip_jax.losses.contrastive import ContrastiveLoss
from clip_jax.losses.ring import Axis, Ring, in_mesh_order
from clip_jax.losses.tiles import Embeddings, Groups, Mask, Scalar, Scalars, Sides, Statistics, Tile, Value
from clip_jax.typing import ArrayLike, Metrics


def distilled(loss: ContrastiveLoss, weight: float) -> Callable[..., tuple[Scalar, Metrics]]:
    """Return the loss plus `weight` times `distillation_loss`.

    Returns:
      A function of keywords: the arguments of `loss`, the teacher's embeddings of the same images and texts
      (`teacher_image_bG`, `teacher_text_bG`) and its logit scale (`teacher_logit_scale`).
    """

    def distilled_loss(
        *, teacher_image_bG: Array, teacher_text_bG: Array, teacher_logit_scale: Array, **arguments: Any
    ) -> tuple[Scalar, Metrics]:
        value, metrics = loss(**arguments)
        student = {name: arguments.get(name) for name in ("image_bE", "text_bE", "logit_scale", "axis")}
        distillation, more = distillation_loss(
            teacher_image_bG=teacher_image_bG,
            teacher_text_bG=teacher_text_bG,
            teacher_logit_scale=teacher_logit_scale,
            **student,
        )
        return value + weight * distillation, metrics | more

    return distilled_loss


def distillation_loss(
    image_bE: Float[ArrayLike, "b E"],
    text_bE: Float[ArrayLike, "_ E"],
    teacher_image_bG: Float[ArrayLike, "_ G"],
    teacher_text_bG: Float[ArrayLike, "_ G"],
    logit_scale: Scalar,
    teacher_logit_scale: Scalar,
    axis: Axis = None,
) -> tuple[Scalar, Metrics]:
    """Return the mean cross-entropy of the student's softmax with the teacher's, in nats. The result is replicated.

    loss = −1/2B Σᵢⱼ (pᵢⱼ log qᵢⱼ + p'ᵢⱼ log q'ᵢⱼ), with the teacher's p and the student's q: softmax over the texts of
    an image, and p', q' over the images of a text. The teacher and its scale get no gradient.

    Args:
      image_bE, text_bE: unit rows of the student on this device, float32 or bfloat16.
      teacher_image_bG, teacher_text_bG: the teacher's rows for the same images and texts, of any width.
      logit_scale, teacher_logit_scale: multiply the cosine similarities (already exponentiated).
      axis: mesh axes that the batch is sharded over, in any order; None outside `jax.shard_map`.

    Returns:
      The loss, and the metrics `distill/cross_entropy`, the loss itself, and `distill/kl`, the loss minus the teacher's
      entropy: 0 for equal distributions.

    Raises:
      ValueError: if the numbers of rows differ.
    """
    rows = [jnp.asarray(x) for x in (image_bE, text_bE, teacher_image_bG, teacher_text_bG)]
    if len({x.shape[0] for x in rows}) > 1:
        counts = ", ".join(str(x.shape[0]) for x in rows)
        raise ValueError(f"expected equal numbers of images and texts of student and teacher, got {counts} rows")
    image_bE, text_bE, teacher_image_bG, teacher_text_bG = rows
    axis = in_mesh_order(axis)
    # Ids only mark padding rows. As constants they are not sent.
    ids = Ring.create(axis, text_bE).varying(jnp.zeros(image_bE.shape[0], jnp.int32))
    images, texts = Embeddings(image_bE, ids, teacher_image_bG), Embeddings(text_bE, ids, teacher_text_bG)
    scalars = {"scale": logit_scale, "teacher_scale": jnp.asarray(teacher_logit_scale, logit_scale.dtype)}
    return tiles.tiled_loss(_Distillation(), axis, images, texts, scalars)


def dense_distillation(
    image_BE: Array,
    text_BE: Array,
    teacher_image_BG: Array,
    teacher_text_BG: Array,
    scale: ArrayLike,
    teacher_scale: ArrayLike,
) -> tuple[Scalar, Scalar]:
    """Return cross-entropy and KL divergence from the full similarity matrices: the reference of the tests."""
    logits, teacher_logits = scale * image_BE @ text_BE.T, teacher_scale * teacher_image_BG @ teacher_text_BG.T
    cross_entropy = entropy = 0
    for axis in (0, 1):
        teacher = jax.nn.softmax(teacher_logits, axis)
        cross_entropy -= jnp.sum(teacher * jax.nn.log_softmax(logits, axis)) / 2 / len(image_BE)
        entropy -= jnp.sum(teacher * jax.nn.log_softmax(teacher_logits, axis)) / 2 / len(image_BE)
    return cross_entropy, cross_entropy - entropy


class _Distillation(tiles.TiledLoss):
    """Distillation as functions of tiles; `aux` of the embeddings holds the teacher's rows."""

    def statistics(self, image: Embeddings, text: Embeddings, scalars: Scalars) -> tuple[Groups, Groups]:
        tile, teacher_tile = tiles.similarity(image.rows, text.rows), tiles.similarity(image.aux, text.aux)
        means = {"sum_exp_student": tile, "sum_exp_teacher": teacher_tile}
        valid = tiles.valid_pairs(image, text)
        rows, columns = (
            {
                "scale": _sums_of_exponentials(scalars["scale"], tile, valid, axis, {}),
                "teacher_scale": _sums_of_exponentials(scalars["teacher_scale"], teacher_tile, valid, axis, means),
            }
            for axis in (1, 0)
        )
        return rows, columns

    def value(self, images: Embeddings, texts: Embeddings, rows: Groups, columns: Groups, scalars: Scalars) -> Value:
        row, column = (_example_loss(side, **scalars) for side in (rows, columns))
        value, divergence = ((jnp.mean(x) + jnp.mean(y)) / 2 for x, y in zip(row[:2], column[:2], strict=True))
        metrics = {"distill/cross_entropy": value.astype(jnp.float32), "distill/kl": divergence.astype(jnp.float32)}
        return value, metrics, {}, (row[2], column[2])

    def gradient(self, image: Embeddings, text: Embeddings, sides: Sides, scalars: Scalars) -> tuple[Tile, Tile]:
        """Return (softmax of the student − softmax of the teacher) / 2, for rows and for columns."""
        tile, teacher_tile = tiles.similarity(image.rows, text.rows), tiles.similarity(image.aux, text.aux)
        return tuple(
            jnp.exp(scalars["scale"] * (tile - side["max"])) * side["1/sum_exp"] / 2
            - jnp.exp(scalars["teacher_scale"] * (teacher_tile - side["teacher_max"])) * side["teacher_1/sum_exp"] / 2
            for side in sides
        )


def _sums_of_exponentials(scale: Array, tile: Tile, valid: Mask, axis: int, weighted: dict[str, Tile]) -> Statistics:
    """Return `max`, `sum_exp` = Σ exp(scale · (similarity − max)), and the sums of `weighted` with the same weights."""
    maximum = tiles.max_similarity(tile, valid, axis)
    exponentials = jnp.where(valid, jnp.exp(scale * (tile - jnp.expand_dims(maximum, axis))), 0)
    sums = {name: jnp.sum(exponentials * x, axis) for name, x in weighted.items()}
    return {"max": maximum, "sum_exp": jnp.sum(exponentials, axis)} | sums


def _example_loss(side: Groups, scale: Array, teacher_scale: Array) -> tuple[Array, Array, Statistics]:
    """Return cross-entropy and KL divergence of every row or column, and the residuals of the gradient."""
    student, teacher = side["scale"], side["teacher_scale"]
    # Differences from the maximum, as in `softmax`: exact where both are close.
    cross_entropy = scale * (student["max"] - teacher["sum_exp_student"] / teacher["sum_exp"])
    cross_entropy += jnp.log(student["sum_exp"])
    entropy = teacher_scale * (teacher["max"] - teacher["sum_exp_teacher"] / teacher["sum_exp"])
    entropy += jnp.log(teacher["sum_exp"])
    residuals = {
        "max": student["max"],
        "1/sum_exp": 1 / student["sum_exp"],
        "teacher_max": teacher["max"],
        "teacher_1/sum_exp": 1 / teacher["sum_exp"],
    }
    return cross_entropy, cross_entropy - entropy, residuals
