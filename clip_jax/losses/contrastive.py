"""Base class of the contrastive losses: parameters, tiled value and gradient, metrics."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from clip_jax.losses.ring import Axis, Ring, in_mesh_order
from clip_jax.losses.tiles import (
    Embeddings,
    Mask,
    Scalar,
    Statistics,
    Tile,
    max_similarity,
    merge_statistics,
    scale_gradient,
    scan_tiles_gradient,
    scan_tiles_statistics,
    similarity,
    upcast,
    valid_pairs,
)
from clip_jax.typing import ArrayLike, Metrics

Ids = tuple[Int32[ArrayLike, "b"], Int32[ArrayLike, " c"]]  # of the images and of the texts


@dataclasses.dataclass(frozen=True)
class ContrastiveLoss:
    """A loss over all image–text pairs of the global batch, with logits `scale · cosine similarity + bias`.

    The loss is the sum of two means, of `example_loss` over the rows (images) and over the columns (texts). Subclasses
    implement the four methods below, add their own parameters as fields (with checks in `__post_init__`), and are
    registered in `LOSSES`.
    """

    needs_logit_bias: ClassVar[bool] = False  # whether the model must have a logit bias (`model.logit_bias`)

    name: str = ""  # key in clip_jax.losses.LOSSES
    logit_scale_init: float = 1 / 0.07  # initial logit scale, exp(params["logit_scale"])
    logit_scale_max: float = 100.0  # upper bound of the logit scale, enforced after every update
    logit_bias_init: float = -10.0  # initial params["logit_bias"], for models that have one
    # Pairs of an image with another example's caption of equal token ids, e.g. from templates or class names.
    equal_captions: Literal["negatives", "positives"] = "negatives"

    def __call__(
        self,
        image_bE: Float[ArrayLike, "b E"],
        text_bE: Float[ArrayLike, "c E"],
        logit_scale: Scalar,
        logit_bias: Scalar | None = None,
        axis: Axis = None,
        ids: Ids | None = None,
    ) -> tuple[Scalar, Metrics]:
        """Return the loss of the global batch in nats, and metrics. Both are replicated.

        Args:
          image_bE, text_bE: unit rows of this device, float32 or bfloat16; matmuls accumulate in float32 (float64 for
            float64).
          logit_scale: multiplies the cosine similarities (already exponentiated).
          logit_bias: is added to the logits; None is 0.
          axis: mesh axes that the batch is sharded over, in any order; None outside `jax.shard_map`.
          ids: of the images and of the texts; equal ids are positives. None: image i matches text i only.

        Returns:
          The loss, and the metrics `accuracy/image_to_text` and `accuracy/text_to_image`: fraction of examples with a
          positive more similar than all negatives (ties and NaN count as errors); `similarity/positive`: mean cosine
          similarity of positives; `similarity/hardest_negative`: mean of the highest similarity among the negatives of
          an image or a text.

        Raises:
          ValueError: if the numbers of images and texts differ and `ids` is None.
        """
        image_bE, text_bE = jnp.asarray(image_bE), jnp.asarray(text_bE)
        if ids is None and image_bE.shape[0] != text_bE.shape[0]:
            raise ValueError(
                f"expected as many texts as images, got {image_bE.shape[0]} images and {text_bE.shape[0]} texts;"
                " pass ids to state which of them match"
            )
        axis = in_mesh_order(axis)
        first = 0 if axis is None else jax.lax.axis_index(axis) * image_bE.shape[0]
        position_b = first + jnp.arange(image_bE.shape[0], dtype=jnp.int32)
        image_ids, text_ids = (position_b, position_b) if ids is None else ids
        bias = jnp.zeros_like(logit_scale) if logit_bias is None else logit_bias
        return _loss(self, axis, ids is None, image_bE, text_bE, logit_scale, bias, image_ids, text_ids)

    def tile_statistics(
        self, tile: Tile, selected: Mask, maximum: Array, axis: int, positive: bool, scale: Scalar, bias: Scalar
    ) -> Statistics:
        """Return sums over the selected pairs of every row (axis 1) or column (axis 0) of a tile.

        Args:
          tile: cosine similarities.
          selected: pairs to sum over.
          maximum: the highest similarity of the selected pairs in each row or column.
          positive: whether the selected pairs are positives or negatives.

        Returns:
          Sums [n] by name; `tiles.merge_statistics` defines how names are merged. For axis 1, `bias_gradient` is the
          derivative of the row's loss with respect to the logit bias; it is zero if it is absent.
        """
        raise NotImplementedError

    def example_loss(
        self, negatives: Statistics, positives: Statistics, axis: int, scale: Scalar
    ) -> tuple[Float[Array, "n"], Statistics]:
        """Return the loss of every row (axis 1) or column (axis 0), and the residuals that `tile_gradient` needs.

        Args:
          negatives, positives: statistics over all texts or images: those of `tile_statistics`, and `max`; of positives
            also `similarity_sum` and `count`.
        """
        raise NotImplementedError

    def tile_gradient(
        self, tile: Tile, matches: Mask, residuals: Statistics, axis: int, scale: Scalar, bias: Scalar
    ) -> Tile:
        """Return the derivative of the loss of each logit's row (axis 1) or column (axis 0) with respect to the logit.

        Args:
          tile: cosine similarities. matches: True for positives.
          residuals: of the rows [r 1] or of the columns [1 c].
        """
        raise NotImplementedError

    def dense(self, image_BE: Array, text_CE: Array, scale: Scalar, bias: Scalar, matches_BC: Mask) -> Scalar:
        """Return the loss from the full similarity matrix: the reference that the contract tests compare with."""
        raise NotImplementedError


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(loss: ContrastiveLoss, axis: Axis, diagonal: bool, *inputs: Any) -> tuple[Array, Metrics]:
    # diagonal: image i matches text i only, so that positives need no scan.
    return _forward(loss, axis, diagonal, *inputs)[0]


def _forward(
    loss: ContrastiveLoss,
    axis: Axis,
    diagonal: bool,
    image_bE: Array,
    text_bE: Array,
    scale: Array,
    bias: Array,
    image_ids: Array,
    text_ids: Array,
) -> tuple[tuple[Array, Metrics], tuple]:
    ring = Ring.create(axis, text_bE)
    images, texts = Embeddings(image_bE, image_ids), Embeddings(text_bE, text_ids)
    block = ring.gather(texts)
    rows, columns = _statistics(loss, diagonal, images, texts, block, scale, bias, ring)
    if diagonal:
        positive_b1 = jnp.sum(upcast(image_bE) * upcast(text_bE), axis=1, keepdims=True)
        positives = _selected_statistics(loss, positive_b1, jnp.ones_like(positive_b1, bool), 1, True, scale, bias)
        rows, columns = (side | {"positive": positives} for side in (rows, columns))

    row_loss, row_residuals = loss.example_loss(rows["negative"], rows["positive"], 1, scale)
    column_loss, column_residuals = loss.example_loss(columns["negative"], columns["positive"], 0, scale)
    value, metrics = jnp.mean(row_loss) + jnp.mean(column_loss), _metrics(rows, columns)
    bias_gradient = jnp.zeros_like(value)
    if "bias_gradient" in rows["negative"]:
        bias_gradient = jnp.mean(rows["negative"]["bias_gradient"] + rows["positive"]["bias_gradient"])
    if axis is not None:
        value, metrics, bias_gradient = jax.lax.pmean((value, metrics, bias_gradient), axis)
    # The block of a single group is small, and saving it spares a second gather.
    saved_block = block if ring.groups == 1 else None
    residuals = images, texts, saved_block, scale, bias, row_residuals, column_residuals, bias_gradient
    return (value, metrics), residuals


def _backward(loss: ContrastiveLoss, axis: Axis, diagonal: bool, residuals: tuple, cotangents: tuple) -> tuple:
    images, texts, saved_block, scale, bias, row_residuals, column_residuals, bias_gradient = residuals
    ring = Ring.create(axis, texts.rows)
    block = ring.gather(texts) if saved_block is None else saved_block

    def tile_gradient(image: Embeddings, text: Embeddings, rows: Statistics, columns: Statistics) -> tuple[Array, ...]:
        tile, matches = similarity(image.rows, text.rows), image.ids[:, None] == text.ids[None]
        return tuple(loss.tile_gradient(tile, matches, side, n, scale, bias) for side, n in ((rows, 1), (columns, 0)))

    d_image, d_text = scan_tiles_gradient(images, texts, block, row_residuals, column_residuals, ring, tile_gradient)
    d_scale, cotangent = scale_gradient(images, d_image, axis), cotangents[0]
    return (
        (cotangent * scale * d_image).astype(images.rows.dtype),
        (cotangent * scale * d_text).astype(texts.rows.dtype),
        (cotangent * d_scale).astype(scale.dtype),
        (cotangent * bias_gradient).astype(bias.dtype),
        None,
        None,
    )


_loss.defvjp(_forward, _backward)


def _statistics(
    loss: ContrastiveLoss,
    diagonal: bool,
    images: Embeddings,
    texts: Embeddings,
    block: Embeddings,
    scale: Array,
    bias: Array,
    ring: Ring,
) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
    """Return the statistics of this device's rows and columns: of negatives, and of positives if not diagonal."""

    def select(tile: Array, matches: Array, valid: Array, axis: int) -> dict[str, Statistics]:
        result = {"negative": _selected_statistics(loss, tile, ~matches & valid, axis, False, scale, bias)}
        if not diagonal:
            result["positive"] = _selected_statistics(loss, tile, matches & valid, axis, True, scale, bias)
        return result

    def tile_statistics(image: Embeddings, text: Embeddings) -> tuple[dict, dict]:
        tile, matches = similarity(image.rows, text.rows), image.ids[:, None] == text.ids[None]
        valid = valid_pairs(image, text)
        return select(tile, matches, valid, 1), select(tile, matches, valid, 0)

    def merge(one: dict[str, Statistics], other: dict[str, Statistics]) -> dict[str, Statistics]:
        return {kind: merge_statistics(scale, one[kind], other[kind]) for kind in one}

    return scan_tiles_statistics(images, texts, block, ring, tile_statistics, merge)


def _selected_statistics(
    loss: ContrastiveLoss, tile: Array, selected: Array, axis: int, positive: bool, scale: Array, bias: Array
) -> Statistics:
    """Return `max`, the loss's own statistics and, for positives, number and sum of similarities."""
    maximum = max_similarity(tile, selected, axis)
    statistics = {"max": maximum} | loss.tile_statistics(tile, selected, maximum, axis, positive, scale, bias)
    if not positive:
        return statistics
    similarity_sum = jnp.sum(jnp.where(selected, tile, 0), axis)
    return statistics | {"similarity_sum": similarity_sum, "count": jnp.sum(selected, axis, dtype=tile.dtype)}


def _metrics(rows: dict[str, Statistics], columns: dict[str, Statistics]) -> Metrics:
    def accuracy(side: dict[str, Statistics]) -> Array:
        return jnp.mean(side["positive"]["max"] > side["negative"]["max"], dtype=jnp.float32)

    hardest = (jnp.mean(rows["negative"]["max"]) + jnp.mean(columns["negative"]["max"])) / 2
    metrics = {
        "accuracy/image_to_text": accuracy(rows),
        "accuracy/text_to_image": accuracy(columns),
        "similarity/positive": jnp.mean(rows["positive"]["similarity_sum"] / rows["positive"]["count"]),
        "similarity/hardest_negative": hardest,
    }
    return {name: value.astype(jnp.float32) for name, value in metrics.items()}
