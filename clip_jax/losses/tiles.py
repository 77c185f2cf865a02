"""All pairs of the global batch at constant memory: what softmax, sigmoid and their variants share.

A loss over B images and B texts needs B·B similarities, and neither value nor gradient ever holds them. Within a device
they are computed tile by tile, twice: once for the statistics of every row and column, once for the gradient, which
needs nothing but the embeddings and those statistics. Across devices the images stay, and the texts come by:

- Groups of neighbouring devices gather their texts, as many as fit `BLOCK_BYTES`.
- Texts go round a ring of groups, each with the statistics of its column; for the gradient again, with theirs.

So one device is one tile loop, a small batch on a large pod is one gather and one scatter (two messages, not hundreds
of hops), and a large batch is a ring whose hops overlap with its tiles: one implementation, and `group_size` decides.

Prior art: SigLIP's chunked ring (Zhai et al. 2023, section 3.3); Inf-CL (Cheng et al. 2024, arXiv:2410.17243), the
same for softmax in CUDA; the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from clip_jax.losses.ring import Axis, Ring, in_mesh_order
from clip_jax.typing import ArrayLike, Metrics

Statistics = dict[str, Array]  # [n] each, of the n rows or the n columns
Ids = tuple[Int32[ArrayLike, "b"], Int32[ArrayLike, " c"]]  # of the images, and of the texts

# The side of a tile: 1,024² float32 similarities are 4 MiB, and 1,024 × 768 products a side keep a matrix unit busy.
TILE = 1024
# Less than any similarity, and finite: differences of it are numbers.
LOWEST = -1e9


@runtime_checkable
class Objective(Protocol):
    """What makes a loss of its own. It is built from (logit_scale, logit_bias) and works on tiles of similarities."""

    def reduce(self, tile: Float[Array, "r c"], chosen: Bool[Array, "r c"], axis: int, positive: bool) -> Statistics:
        """Return the statistics of the chosen pairs of every column (axis 0) or row (axis 1); `top`, the most similar,
        among them."""

    def merge(self, one: Statistics, other: Statistics) -> Statistics:
        """Return the statistics of both sets of pairs."""

    def finish(self, negatives: Statistics, positives: Statistics, axis: int) -> tuple[Array, Statistics]:
        """Return every row's (axis 1) or column's (axis 0) part of the loss, and what `weigh` has to know of it.

        positives: those of `reduce`, `sum` of similarities and `count` too.
        """

    def weigh(self, tile: Array, matches: Array, facts: Statistics, axis: int) -> Float[Array, "r c"]:
        """Return the derivative by every logit of its row's or column's part; facts are [r 1] or [1 c]."""

    def bias_slope(self, negatives: Statistics, positives: Statistics) -> Float[Array, "n"]:
        """Return the derivative of every row's part by the bias."""


class Embeddings(NamedTuple):
    """One side's rows, and what each is about: an image and a text match if their `ids` are equal, and not negative.

    beside: more arrays [n …] that travel with the rows, where a walk needs them.
    """

    rows: Array
    ids: Array
    beside: Any = None


def loss_over_pairs(
    objective: Callable[[Array, Array], Objective],
    image_bE: Float[ArrayLike, "b E"],
    text_bE: Float[ArrayLike, "c E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None,
    axis: Axis,
    ids: Ids | None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the sum of the rows' and columns' mean parts, in nats, and its metrics; equal on every device.

    Args:
      objective: (logit_scale, logit_bias) -> Objective; hashable.
      image_bE, text_bE: unit rows, this device's part of the batch, float32 or bfloat16; products add up in float32
        (in float64, if that is what they are).
      logit_scale: multiplies the cosine similarities; already exponentiated. logit_bias: None is 0.
      axis: mesh axes that the batch is sharded over, in any order; None outside `shard_map`.
      ids: of the images and of the texts: equal ones match. None: row i of the images matches row i of the texts alone.

    Returns:
      The loss, and of the batch: `accuracy/image_to_text` and back, the fraction whose best match is more similar than
      all that don't match (a tie is a miss, and so is NaN); `similarity/positive`, the mean over matches;
      `similarity/hardest_negative`, the mean over both sides of the most similar that doesn't match.

    Raises:
      ValueError: for as many texts as don't pair up with images, where no ids say which match.
    """
    image_bE, text_bE, single = jnp.asarray(image_bE), jnp.asarray(text_bE), ids is None
    if single and image_bE.shape[0] != text_bE.shape[0]:
        raise ValueError(
            f"{image_bE.shape[0]} images and {text_bE.shape[0]} texts don't pair up: pass ids, or as many of each"
        )
    axis = in_mesh_order(axis)
    first = 0 if axis is None else jax.lax.axis_index(axis) * image_bE.shape[0]
    partner_b = first + jnp.arange(image_bE.shape[0], dtype=jnp.int32)
    image_ids, text_ids = (partner_b, partner_b) if ids is None else ids
    bias = jnp.zeros_like(logit_scale) if logit_bias is None else logit_bias
    return _loss(objective, axis, single, image_bE, text_bE, logit_scale, bias, image_ids, text_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(objective: Callable, axis: Axis, single: bool, *inputs: Any) -> tuple[Array, Metrics]:
    return _forward(objective, axis, single, *inputs)[0]


def _forward(
    objective: Callable,
    axis: Axis,
    single: bool,
    image_bE: Array,
    text_bE: Array,
    scale: Array,
    bias: Array,
    image_ids: Array,
    text_ids: Array,
) -> tuple[tuple[Array, Metrics], tuple]:
    loss, ring = objective(scale, bias), Ring.of(axis, text_bE)
    images, texts = Embeddings(image_bE, image_ids), Embeddings(text_bE, text_ids)
    block = ring.gather(texts)
    rows, columns = _statistics(loss, single, images, texts, block, ring)
    if single:
        right_b1 = jnp.sum(wide(image_bE) * wide(text_bE), axis=1, keepdims=True)
        positives = _positives(loss, right_b1, jnp.ones_like(right_b1, bool), axis=1)
        rows, columns = ({"negative": side["negative"], "positive": positives} for side in (rows, columns))

    row_parts, row_facts = loss.finish(rows["negative"], rows["positive"], 1)
    column_parts, column_facts = loss.finish(columns["negative"], columns["positive"], 0)
    value, metrics = jnp.mean(row_parts) + jnp.mean(column_parts), _metrics(rows, columns)
    bias_slope = jnp.mean(loss.bias_slope(rows["negative"], rows["positive"]))
    if axis is not None:
        value, metrics, bias_slope = jax.lax.pmean((value, metrics, bias_slope), axis)
    # A single group's block is what the gradient walks too: it is small, and the gradient follows at once.
    kept = block if ring.hops == 1 else None
    return (value, metrics), (images, texts, kept, scale, bias, row_facts, column_facts, bias_slope)


def _backward(objective: Callable, axis: Axis, single: bool, residuals: tuple, cotangents: tuple) -> tuple:
    images, texts, kept, scale, bias, row_facts, column_facts, bias_slope = residuals
    loss, ring = objective(scale, bias), Ring.of(axis, texts.rows)
    block = ring.gather(texts) if kept is None else kept
    d_image, d_text = _gradient(loss, images, texts, block, row_facts, column_facts, ring)
    d_scale, slope = scale_slope(images, d_image, axis), cotangents[0]
    return (
        (slope * scale * d_image).astype(images.rows.dtype),
        (slope * scale * d_text).astype(texts.rows.dtype),
        (slope * d_scale).astype(scale.dtype),
        (slope * bias_slope).astype(bias.dtype),
        None,
        None,
    )


_loss.defvjp(_forward, _backward)


def _statistics(
    loss: Objective, single: bool, images: Embeddings, texts: Embeddings, block: Embeddings, ring: Ring
) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
    """Return what every row and every column of this device has to know of all pairs."""

    def merge(one: dict, other: dict) -> dict:
        result = {"negative": loss.merge(one["negative"], other["negative"])}
        if not single:
            result["positive"] = _merge_positives(loss, one["positive"], other["positive"])
        return result

    def of_pairs(axis: int, tile: Array, matches: Array, valid: Array) -> dict:
        result = {"negative": loss.reduce(tile, ~matches & valid, axis, positive=False)}
        if not single:
            result["positive"] = _positives(loss, tile, matches, axis)
        return result

    def of_tile(image: Embeddings, text: Embeddings) -> tuple[dict, dict]:
        tile, matches = similarity(image.rows, text.rows), image.ids[:, None] == text.ids[None]
        valid = valid_pairs(image, text)
        return tuple(of_pairs(axis, tile, matches & valid, valid) for axis in (1, 0))

    def empty(axis: int, count: int) -> dict:
        """Return the statistics of no pairs: those of one that isn't chosen."""
        shape = (count, 1) if axis == 1 else (1, count)
        none = jnp.zeros(shape, bool)
        return of_pairs(axis, jnp.zeros(shape, accumulation_dtype(images.rows.dtype)), none, none)

    return walk_statistics(images, texts, block, ring, of_tile, empty, merge)


def _gradient(
    loss: Objective,
    images: Embeddings,
    texts: Embeddings,
    block: Embeddings,
    rows: Statistics,
    columns: Statistics,
    ring: Ring,
) -> tuple[Float[Array, "b E"], Float[Array, "c E"]]:
    """Return the derivatives by images and texts, but for the logit scale."""

    def weigh(image: Embeddings, text: Embeddings, rows: Statistics, columns: Statistics) -> tuple[Array, Array]:
        tile, matches = similarity(image.rows, text.rows), image.ids[:, None] == text.ids[None]
        return loss.weigh(tile, matches, rows, 1), loss.weigh(tile, matches, columns, 0)

    return walk_gradient(images, texts, block, rows, columns, ring, weigh)


def walk_statistics(
    images: Embeddings,
    texts: Embeddings,
    block: Embeddings,
    ring: Ring,
    of_tile: Callable,
    empty: Callable,
    merge: Callable,
) -> tuple[Any, Any]:
    """Return what every row and every column of this device has to know of all pairs, from tiles of them.

    Args:
      block: the texts of this device's group.
      of_tile: (images, texts) -> (statistics of the rows, of the columns); rows that fill a tile up have ids of -1.
      empty: (axis, count) -> the statistics of no pairs: of rows (axis 1) or columns (axis 0).
      merge: joins the statistics of two sets of pairs.
    """
    image_tiles = _tiled(images, fill=-1)

    def step(block: Embeddings, rows: Any) -> tuple[Any, Any]:
        def column(rows: Any, text: Embeddings) -> tuple[Any, Any]:
            def tile(columns: Any, row: tuple[Embeddings, Any]) -> tuple[Any, Any]:
                image, known = row
                of_rows, of_columns = of_tile(image, text)
                return merge(columns, of_columns), merge(known, of_rows)

            columns, rows = jax.lax.scan(tile, ring.varying(empty(0, text.ids.shape[0])), (image_tiles, rows))
            return rows, columns

        rows, columns = jax.lax.scan(column, rows, _tiled(block, fill=-1))
        return rows, _untiled(columns, block.rows.shape[0])

    def of_lanes(columns: Any) -> Any:
        return _merge_all(merge, jax.tree.map(ring.exchange, columns), ring.group)

    count, side = image_tiles.ids.shape
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), ring.varying(empty(1, side)))
    rows, columns = ring.walk(texts, block, step, start, of_lanes, empty(0, texts.rows.shape[0]), merge)
    return _untiled(rows, images.rows.shape[0]), columns


def walk_gradient(
    images: Embeddings,
    texts: Embeddings,
    block: Embeddings,
    rows: Statistics,
    columns: Statistics,
    ring: Ring,
    weigh: Callable,
) -> tuple[Float[Array, "b E"], Float[Array, "c E"]]:
    """Return the derivatives by images and texts, but for the logit scale.

    Args:
      block: the texts of this device's group. columns: the facts of each of its own texts; rows: of each image.
      weigh: (images, texts, rows' facts [r 1], columns' facts [1 c]) -> the derivatives by every logit [r c] of its
        row's part, and of its column's; what it says of rows that fill a tile up is not heard.
    """
    image_tiles, row_tiles = _tiled(images, fill=-1), _tiled(rows)
    dtype = accumulation_dtype(images.rows.dtype)
    devices = ring.group * ring.hops
    image_count, text_count = devices * images.rows.shape[0], devices * texts.rows.shape[0]

    def slope(image: Embeddings, text: Embeddings, rows: Statistics, columns: Statistics) -> Array:
        rows, columns = (
            {name: jnp.expand_dims(x, axis) for name, x in side.items()} for side, axis in ((rows, 1), (columns, 0))
        )
        by_row, by_column = weigh(image, text, rows, columns)
        return by_row / image_count + by_column / text_count

    def step(block_and_facts: tuple[Embeddings, Statistics], d_image: Array) -> tuple[Array, Array]:
        block, columns = block_and_facts

        def column(d_image: Array, text_and_facts: tuple[Embeddings, Statistics]) -> tuple[Array, Array]:
            text, facts = text_and_facts

            def tile(d_text: Array, row: tuple) -> tuple[Array, Array]:
                image, known, d_image = row
                # What fills a tile up has a similarity of 0, which can be far above a row's top: 0 × ∞ would be NaN.
                weights = jnp.where(valid_pairs(image, text), slope(image, text, known, facts), 0)
                weights = weights.astype(images.rows.dtype)
                d_text += _product("rc,rE->cE", weights, image.rows)
                return d_text, d_image + _product("rc,cE->rE", weights, text.rows)

            zeros = ring.varying(jnp.zeros(text.rows.shape, dtype))
            d_text, d_image = jax.lax.scan(tile, zeros, (image_tiles, row_tiles, d_image))
            return d_image, d_text

        d_image, d_text = jax.lax.scan(column, d_image, (_tiled(block, fill=-1), _tiled(columns)))
        return d_image, _untiled(d_text, block.rows.shape[0])

    def of_lanes(d_text: Array) -> Array:
        if ring.group == 1:
            return d_text
        # Rounded to send, as the result will be; added up in float32.
        return jnp.sum(ring.exchange(d_text.astype(images.rows.dtype)).astype(dtype), axis=0)

    start, nothing = ring.varying(jnp.zeros(image_tiles.rows.shape, dtype)), jnp.zeros(texts.rows.shape, dtype)
    own, block_and_facts = (texts, columns), (block, ring.gather(columns))
    d_image, d_text = ring.walk(own, block_and_facts, step, start, of_lanes, nothing, jnp.add)
    return _untiled(d_image, images.rows.shape[0]), d_text


def scale_slope(images: Embeddings, d_image: Float[Array, "b E"], axis: Axis) -> Float[Array, ""]:
    """Return the derivative by the logit scale, Σ derivative × similarity, summed by rows; equal on every device."""
    total = jnp.sum(wide(images.rows) * d_image)
    return total if axis is None else jax.lax.psum(total, axis)


def _positives(loss: Objective, tile: Array, matches: Array, axis: int) -> Statistics:
    chosen = jnp.where(matches, tile, 0)
    sums = {"sum": jnp.sum(chosen, axis), "count": jnp.sum(matches, axis, dtype=tile.dtype)}
    return loss.reduce(tile, matches, axis, positive=True) | sums


def _merge_positives(loss: Objective, one: Statistics, other: Statistics) -> Statistics:
    return loss.merge(one, other) | {name: one[name] + other[name] for name in ("sum", "count")}


def _merge_all(merge: Callable, lanes: Any, count: int) -> Any:
    """Merge along axis 0, in pairs: as many rounds as the count has bits."""
    while count > 1:
        half = count // 2
        parts = slice(0, half), slice(half, 2 * half), slice(2 * half, None)
        one, other, rest = (jax.tree.map(operator.itemgetter(part), lanes) for part in parts)
        lanes = jax.tree.map(lambda *parts: jnp.concatenate(parts), merge(one, other), rest)
        count -= half
    return jax.tree.map(lambda x: x[0], lanes)


def _metrics(rows: dict[str, Statistics], columns: dict[str, Statistics]) -> Metrics:
    def accuracy(side: dict[str, Statistics]) -> Array:
        return jnp.mean(side["positive"]["top"] > side["negative"]["top"], dtype=jnp.float32)

    hardest = (jnp.mean(rows["negative"]["top"]) + jnp.mean(columns["negative"]["top"])) / 2
    metrics = {
        "accuracy/image_to_text": accuracy(rows),
        "accuracy/text_to_image": accuracy(columns),
        "similarity/positive": jnp.mean(rows["positive"]["sum"] / rows["positive"]["count"]),
        "similarity/hardest_negative": hardest,
    }
    return {name: value.astype(jnp.float32) for name, value in metrics.items()}


def _tiled(tree: Any, fill: int = 0) -> Any:
    """Cut axis 0 into tiles, [tiles rows …]; what is missing in the last is zeros, or `fill` for integers."""

    def cut(x: Array) -> Array:
        count, side = tile_shape(x.shape[0])
        padding = [(0, count * side - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        if padding[0][1]:
            x = jnp.pad(x, padding, constant_values=fill if jnp.issubdtype(x.dtype, jnp.integer) else 0)
        return x.reshape(count, side, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _untiled(tree: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tree)


def tile_shape(rows: int) -> tuple[int, int]:
    """Return how many tiles of how many rows hold them: equal ones if the rows have a divisor that is not too small."""
    fewest = math.ceil(rows / TILE)
    for count in range(fewest, 2 * fewest + 1):
        if rows % count == 0:
            return count, rows // count
    return fewest, math.ceil(rows / fewest)


def valid_pairs(image: Embeddings, text: Embeddings) -> Bool[Array, "r c"]:
    """Tell pairs of two rows from those with a row that only fills a tile up."""
    return (image.ids >= 0)[:, None] & (text.ids >= 0)[None]


def similarity(image_rE: Array, text_cE: Array) -> Float[Array, "r c"]:
    """Return the products of all rows, added up in `accumulation_dtype` of their dtype."""
    return _product("rE,cE->rc", image_rE, text_cE)


def _product(equation: str, left: Array, right: Array) -> Array:
    # bfloat16 products are exact in float32. float32 ones are asked for as such: a TPU would round them to bfloat16.
    return jnp.einsum(
        equation,
        left,
        right,
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=accumulation_dtype(left.dtype),
    )


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return what products of a dtype add up in: float32, or float64 if that is what they are."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: ArrayLike) -> Array:
    """Return an array as its products add up."""
    return jnp.asarray(x, accumulation_dtype(x.dtype))
