"""Losses over all image–text pairs of the global batch at constant memory.

A loss over B images and B texts needs B·B similarities; neither value nor gradient stores them. A device computes them
tile by tile, twice: once for statistics of every row (image) and column (text), and once for the gradient, whose only
inputs are the embeddings and residuals computed from these statistics. Images stay on their device; texts are sent to
all devices (`losses/ring.py`) with the statistics of their columns and, in the second scan, with their gradients.

Prior work: the chunked ring of SigLIP (Zhai et al. 2023, section 3.3); Inf-CL (Cheng et al. 2024, arXiv:2410.17243),
tiled softmax in CUDA; online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clip_jax.losses.ring import Axis, Ring
from clip_jax.typing import ArrayLike, Metrics

# One number per row or column, [n] each. The name decides how two of them are merged (`merge_statistics`).
Statistics = dict[str, Array]
Sides = tuple[Statistics, Statistics]  # of rows and of columns
Groups = dict[str, Statistics]  # statistics of groups of pairs, such as positives and negatives
Scalar = Float[Array, ""]
Scalars = dict[str, Scalar]
Tile = Float[Array, "r c"]  # one number per pair of an image and a text
Mask = Bool[Array, "r c"]
Value = tuple[Scalar, Metrics, Scalars, Sides]  # loss, metrics, derivatives with respect to scalars, residuals

# Rows and columns of a tile: 1024² float32 similarities are 4 MiB, and 1024 × 768 matmuls keep a matrix unit busy.
TILE_SIZE = 1024
# The `max` of no pairs: below every similarity, and finite, so that differences are numbers.
LOWEST = -1e9


class Embeddings(NamedTuple):
    """Embeddings of one modality, with integer ids: an image and a text match if their ids are equal.

    ids: -1 for padding rows of a tile.
    aux: further arrays [n …] that are sent together with the rows.
    """

    rows: Array
    ids: Array
    aux: Any = None


class TiledLoss:
    """A loss as functions of tiles, hashable. `scalars` has the logit scale, "scale", and the loss's own scalars."""

    def statistics(self, image: Embeddings, text: Embeddings, scalars: Scalars) -> tuple[Groups, Groups]:
        """Return groups of statistics of a tile's rows and of its columns.

        A group with the name of a scalar is merged with that scalar as logit scale.
        """

    def value(self, images: Embeddings, texts: Embeddings, rows: Groups, columns: Groups, scalars: Scalars) -> Value:
        """Return the loss of this device's examples, metrics, derivatives by scalars except "scale", and residuals."""

    def gradient(self, image: Embeddings, text: Embeddings, sides: Sides, scalars: Scalars) -> tuple[Tile, Tile]:
        """Return the derivatives of the row's and of the column's loss with respect to the logits of a tile.

        sides: residuals of rows [r 1] and columns [1 c]. Results of padding rows are ignored.
        """


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled_loss(
    loss: TiledLoss, axis: Axis, images: Embeddings, texts: Embeddings, scalars: Scalars
) -> tuple[Scalar, Metrics]:
    """Return a loss over the global batch and its metrics, both replicated.

    Differentiable in `rows` of images and texts, the logit scale, and scalars of which the loss returns a derivative.
    """
    return _forward(loss, axis, images, texts, scalars)[0]


def _forward(loss: TiledLoss, axis: Axis, images: Embeddings, texts: Embeddings, scalars: Scalars) -> tuple:
    ring = Ring.create(axis, (texts.rows, texts.aux))
    block = ring.gather(texts)
    rows, columns = _scan_statistics(loss, images, texts, block, scalars, ring)
    *means, sides = loss.value(images, texts, rows, columns, scalars)
    value, metrics, d_scalars = means if axis is None else jax.lax.pmean(means, axis)
    # The block of a single group is small, and saving it spares a second gather.
    saved_block = block if ring.groups == 1 else None
    return (value, metrics), (images, texts, saved_block, scalars, d_scalars, sides)


def _backward(loss: TiledLoss, axis: Axis, residuals: tuple, cotangents: tuple) -> tuple:
    images, texts, saved_block, scalars, d_scalars, (rows, columns) = residuals
    ring, cotangent = Ring.create(axis, (texts.rows, texts.aux)), cotangents[0]
    block = ring.gather(texts) if saved_block is None else saved_block
    d_image, d_text = _scan_gradient(loss, (images, rows), (texts, columns), block, scalars, ring)
    d_scale = jnp.sum(upcast(images.rows) * d_image)  # Σ logit gradient × similarity
    d_scalars = d_scalars | {"scale": d_scale if axis is None else jax.lax.psum(d_scale, axis)}
    d_images, d_texts = (
        Embeddings((cotangent * scalars["scale"] * d_rows).astype(side.rows.dtype), None)
        for side, d_rows in ((images, d_image), (texts, d_text))
    )
    constant = dict.fromkeys(scalars)
    return d_images, d_texts, constant | {x: (cotangent * d).astype(scalars[x].dtype) for x, d in d_scalars.items()}


tiled_loss.defvjp(_forward, _backward)


def _scan_statistics(
    loss: TiledLoss, images: Embeddings, texts: Embeddings, block: Embeddings, scalars: Scalars, ring: Ring
) -> tuple[Groups, Groups]:
    """Return the statistics of all pairs, for every row and for every column of this device."""

    def add_tile(image: Embeddings, text: Embeddings, rows: Groups, columns: Groups) -> tuple[Groups, Groups]:
        tile_rows, tile_columns = loss.statistics(image, text, scalars)
        return merge(rows, tile_rows), merge(columns, tile_columns)

    def merge(one: Groups, other: Groups) -> Groups:
        return {x: merge_statistics(scalars.get(x, scalars["scale"]), one[x], other[x]) for x in one}

    def empty(side: int, embeddings: Embeddings) -> Groups:
        shapes = jax.eval_shape(loss.statistics, embeddings, embeddings, scalars)[side]
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.full(x.shape, LOWEST if path[-1].key == "max" else 0, x.dtype), shapes
        )

    def reduce(columns: Groups) -> Groups:
        return _merge_ranks(merge, jax.tree.map(ring.exchange, columns), ring.group)

    return _scan_tiles(images, texts, block, ring, add_tile, empty, reduce, merge)


def _scan_gradient(
    loss: TiledLoss, images: tuple, texts: tuple, block: Embeddings, scalars: Scalars, ring: Ring
) -> tuple[Float[Array, "b E"], Float[Array, "c E"]]:
    """Return the gradients with respect to images and texts, before multiplication by the logit scale.

    images, texts: embeddings and residuals.
    """
    (image_rows, text_rows), devices = (images[0].rows, texts[0].rows), ring.group * ring.groups
    image_count, text_count = devices * len(image_rows), devices * len(text_rows)
    dtype = accumulation_dtype(image_rows.dtype)

    def add_tile(images: tuple, texts: tuple, d_image: Array, d_text: Array) -> tuple[Array, Array]:
        (image, rows), (text, columns) = images, texts
        sides = jax.tree.map(lambda x: x[:, None], rows), jax.tree.map(lambda x: x[None], columns)
        row_gradient, column_gradient = loss.gradient(image, text, sides, scalars)
        gradient = row_gradient / image_count + column_gradient / text_count
        # Padding rows have similarity 0, which can be far above a row's maximum: 0 × ∞ would be NaN.
        gradient = jnp.where(valid_pairs(image, text), gradient, 0).astype(image_rows.dtype)
        d_image += _matmul("rc,cE->rE", gradient, text.rows)
        return d_image, d_text + _matmul("rc,rE->cE", gradient, image.rows)

    def empty(_: int, side: tuple) -> Array:
        return jnp.zeros(side[0].rows.shape, dtype)

    def reduce(d_text: Array) -> Array:
        if ring.group == 1:
            return d_text
        # Sent in the dtype of the embeddings, like the final gradient; summed in the accumulation dtype.
        return jnp.sum(ring.exchange(d_text.astype(image_rows.dtype)).astype(dtype), axis=0)

    return _scan_tiles(images, texts, (block, ring.gather(texts[1])), ring, add_tile, empty, reduce, jnp.add)


def _scan_tiles(
    images: Any,
    texts: Any,
    block: Any,
    ring: Ring,
    add_tile: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    empty: Callable[[int, Any], Any],
    reduce: Callable[[Any], Any],
    merge: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """Accumulate over all pairs, for every row and for every column of this device.

    Args:
      images, texts: pytrees of this device's rows. block: gathered texts of its group.
      add_tile: (images, texts, rows, columns) of a tile -> updated rows and columns.
      empty: initial value for as many rows (0) or columns (1) as the second argument has.
      reduce, merge: as for `Ring.scan`, for columns.
    """
    image_tiles = _split_tiles(images)

    def step(block: Any, rows: Any) -> tuple[Any, Any]:
        def scan_text_tile(rows: Any, text: Any) -> tuple[Any, Any]:
            def scan_image_tile(columns: Any, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
                rows, columns = add_tile(inputs[0], text, inputs[1], columns)
                return columns, rows

            columns, rows = jax.lax.scan(scan_image_tile, ring.varying(empty(1, text)), (image_tiles, rows))
            return rows, columns

        rows, columns = jax.lax.scan(scan_text_tile, rows, _split_tiles(block))
        return rows, _join_tiles(columns, block)

    first = jax.tree.map(operator.itemgetter(0), image_tiles)
    count = len(jax.tree.leaves(image_tiles)[0])
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), ring.varying(empty(0, first)))
    rows, columns = ring.scan(texts, block, step, start, reduce, empty(1, texts), merge)
    return _join_tiles(rows, images), columns


def merge_statistics(scale: Array, one: Statistics, other: Statistics) -> Statistics:
    """Return the statistics of the union of two disjoint sets of pairs; names are those of `one`.

    `max` is merged by the maximum, `sum_exp…` as sums of exp(scale · (similarity − max)): with m = max(m₁, m₂),
    exp(scale · (m₁ − m)) · sum₁ + exp(scale · (m₂ − m)) · sum₂. Others are added.
    """
    merged = {name: x + other[name] for name, x in one.items() if name != "max"}
    merged["max"] = jnp.maximum(one["max"], other["max"])
    factors = [jnp.exp(scale * (x["max"] - merged["max"])) for x in (one, other)]
    for name in one:
        if name.startswith("sum_exp"):
            merged[name] = one[name] * factors[0] + other[name] * factors[1]
    return merged


def max_similarity(tile: Tile, selected: Mask, axis: int) -> Float[Array, "n"]:
    """Return the maximum over the selected pairs of every column (axis 0) or row (axis 1); `LOWEST` without any."""
    return jnp.max(jnp.where(selected, tile, -jnp.inf), axis, initial=LOWEST)


def _merge_ranks(merge: Callable, parts: Any, count: int) -> Any:
    """Merge `count` statistics along axis 0 pairwise, in log2(count) rounds."""
    while count > 1:
        half = count // 2
        slices = slice(0, half), slice(half, 2 * half), slice(2 * half, None)
        one, other, rest = (jax.tree.map(operator.itemgetter(part), parts) for part in slices)
        parts = jax.tree.map(lambda *halves: jnp.concatenate(halves), merge(one, other), rest)
        count -= half
    return jax.tree.map(lambda x: x[0], parts)


def _split_tiles(tree: Any) -> Any:
    """Split axis 0 into tiles, [tiles rows …]. The last is padded with zeros, and ids with -1."""

    def split(x: Array) -> Array:
        count, side = tile_shape(x.shape[0])
        padding = [(0, count * side - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        if padding[0][1]:
            x = jnp.pad(x, padding, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)
        return x.reshape(count, side, *x.shape[1:])

    return jax.tree.map(split, tree)


def _join_tiles(tree: Any, like: Any) -> Any:
    """Join tiles, with as many rows as the leaves of `like`."""
    rows = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tree)


def tile_shape(rows: int) -> tuple[int, int]:
    """Return number and size of the tiles of `rows` rows, without padding if at most twice the fewest tiles suffice."""
    fewest = math.ceil(rows / TILE_SIZE)
    for count in range(fewest, 2 * fewest + 1):
        if rows % count == 0:
            return count, rows // count
    return fewest, math.ceil(rows / fewest)


def valid_pairs(image: Embeddings, text: Embeddings) -> Mask:
    """Return True for pairs without a padding row."""
    return (image.ids >= 0)[:, None] & (text.ids >= 0)[None]


def similarity(image_rE: Array, text_cE: Array) -> Tile:
    """Return the matmul of all rows in `accumulation_dtype`: cosine similarities of unit rows."""
    return _matmul("rE,cE->rc", image_rE, text_cE)


def _matmul(equation: str, left: Array, right: Array) -> Array:
    # float32 needs HIGHEST, because a TPU's default precision rounds it to bfloat16. bfloat16 multiplies exactly in
    # float32.
    return jnp.einsum(
        equation,
        left,
        right,
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=accumulation_dtype(left.dtype),
    )


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which matmuls accumulate: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def upcast(x: ArrayLike) -> Array:
    """Return an array in its accumulation dtype."""
    return jnp.asarray(x, accumulation_dtype(x.dtype))
