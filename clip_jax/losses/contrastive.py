"""Base class of the contrastive losses: parameters, tiled value and gradient, metrics."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from clip_jax.losses import tiles
from clip_jax.losses.ring import Axis, in_mesh_order
from clip_jax.losses.tiles import Embeddings, Groups, Mask, Scalar, Scalars, Sides, Statistics, Tile, Value
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
        scalars = {"scale": logit_scale, "bias": jnp.zeros_like(logit_scale) if logit_bias is None else logit_bias}
        images, texts = Embeddings(image_bE, image_ids), Embeddings(text_bE, text_ids)
        return tiles.tiled_loss(_Contrastive(self, ids is None), axis, images, texts, scalars)

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


@dataclasses.dataclass(frozen=True)
class _Contrastive(tiles.TiledLoss):
    """A contrastive loss as functions of tiles. Statistics are those of negatives and of positives."""

    loss: ContrastiveLoss
    diagonal: bool  # image i matches text i only, so that positives need no scan

    def statistics(self, image: Embeddings, text: Embeddings, scalars: Scalars) -> tuple[Groups, Groups]:
        tile, matches = tiles.similarity(image.rows, text.rows), image.ids[:, None] == text.ids[None]
        valid = tiles.valid_pairs(image, text)
        groups = {"negative": ~matches & valid} | ({} if self.diagonal else {"positive": matches & valid})
        rows, columns = (
            {group: self._selected(tile, pairs, axis, group == "positive", scalars) for group, pairs in groups.items()}
            for axis in (1, 0)
        )
        return rows, columns

    def _selected(self, tile: Tile, selected: Mask, axis: int, positive: bool, scalars: Scalars) -> Statistics:
        """Return `max`, the loss's own statistics and, for positives, number and sum of similarities."""
        maximum = tiles.max_similarity(tile, selected, axis)
        statistics = {"max": maximum} | self.loss.tile_statistics(tile, selected, maximum, axis, positive, **scalars)
        if not positive:
            return statistics
        similarity_sum = jnp.sum(jnp.where(selected, tile, 0), axis)
        return statistics | {"similarity_sum": similarity_sum, "count": jnp.sum(selected, axis, dtype=tile.dtype)}

    def value(self, images: Embeddings, texts: Embeddings, rows: Groups, columns: Groups, scalars: Scalars) -> Value:
        if self.diagonal:
            positive_b1 = jnp.sum(tiles.upcast(images.rows) * tiles.upcast(texts.rows), axis=1, keepdims=True)
            positives = self._selected(positive_b1, jnp.ones_like(positive_b1, bool), 1, True, scalars)
            rows, columns = (side | {"positive": positives} for side in (rows, columns))
        (row_loss, row_residuals), (column_loss, column_residuals) = (
            self.loss.example_loss(side["negative"], side["positive"], axis, scalars["scale"])
            for side, axis in ((rows, 1), (columns, 0))
        )
        value = jnp.mean(row_loss) + jnp.mean(column_loss)
        d_bias = jnp.zeros_like(value)
        if "bias_gradient" in rows["negative"]:
            d_bias = jnp.mean(rows["negative"]["bias_gradient"] + rows["positive"]["bias_gradient"])
        return value, _metrics(rows, columns), {"bias": d_bias}, (row_residuals, column_residuals)

    def gradient(self, image: Embeddings, text: Embeddings, sides: Sides, scalars: Scalars) -> tuple[Tile, Tile]:
        tile, matches = tiles.similarity(image.rows, text.rows), image.ids[:, None] == text.ids[None]
        return tuple(
            self.loss.tile_gradient(tile, matches, side, axis, **scalars)
            for side, axis in zip(sides, (1, 0), strict=True)
        )


def _metrics(rows: Groups, columns: Groups) -> Metrics:
    def accuracy(side: Groups) -> Array:
        return jnp.mean(side["positive"]["max"] > side["negative"]["max"], dtype=jnp.float32)

    hardest = (jnp.mean(rows["negative"]["max"]) + jnp.mean(columns["negative"]["max"])) / 2
    metrics = {
        "accuracy/image_to_text": accuracy(rows),
        "accuracy/text_to_image": accuracy(columns),
        "similarity/positive": jnp.mean(rows["positive"]["similarity_sum"] / rows["positive"]["count"]),
        "similarity/hardest_negative": hardest,
    }
    return {name: value.astype(jnp.float32) for name, value in metrics.items()}
