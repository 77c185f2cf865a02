"""From encoded pictures and texts to unit vectors on the host: the model as evaluators see it.

Classes with several wordings follow Radford et al. 2021, section 3.1.4: the mean of the wordings' unit embeddings,
at length 1 again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals.ranking import unit
from clip_jax.typing import Embedder, EvalDataset, Params, Tokenizer


@dataclasses.dataclass(frozen=True)
class ModelEmbedder:
    """Embed in batches of one size, so that each encoder compiles once.

    Build it with the same two functions every time: JAX keeps what it compiled by the function, not by the embedder.
    With several processes every one passes all inputs, prepares its own rows of each batch, and gets all outputs. What
    one of them can't prepare is an error on all.

    encode_image: (params, uint8[B H W 3]) -> float[B E], pure.
    encode_text: (params, int32[B L]) -> float[B E], pure.
    image_features: (params, uint8[B H W 3]) -> float[B D], pure; for `features`.
    preprocess: encoded pictures -> uint8[n H W 3].
    batch_size: rows of a batch in all processes together; a multiple of the devices that `put` spreads it over.
    rows: those of a batch that this process prepares; None: all.
    put: a host array of these rows to a device array of the batch, sharded if there is a mesh.
    out_sharding: of the encoders' outputs; with a mesh the replicated one, so that every process can read all rows.
    on_batch: called between batches; the training loop looks for preemption there. What it raises ends the embedding.
    """

    encode_image: Callable[[Params, jax.Array], jax.Array]
    encode_text: Callable[[Params, jax.Array], jax.Array]
    params: Any
    tokenizer: Tokenizer
    preprocess: Callable[[Sequence[bytes]], np.ndarray]
    batch_size: int = 256
    rows: slice | None = None
    put: Callable[[np.ndarray], jax.Array] = jnp.asarray
    out_sharding: jax.sharding.Sharding | None = None
    on_batch: Callable[[], None] | None = None
    image_features: Callable[[Params, jax.Array], jax.Array] | None = None

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        """Return a unit vector for every encoded picture, NaN where the model gave none."""
        return unit(self._embed(self.encode_image, self.preprocess, images, "picture"))

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]:
        """Return a unit vector for every text, NaN where the model gave none."""
        return unit(self._embed(self.encode_text, self.tokenizer, texts, "text"))

    def features(self, images: Sequence[bytes]) -> Float[np.ndarray, "n D"]:
        """Return what `image_features` gives for every encoded picture, at whatever length it has."""
        return self._embed(self.image_features, self.preprocess, images, "picture")

    def _prepared(self, prepare: Callable[..., np.ndarray], items: Sequence[Any]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield this process's rows of every batch, and how many of the whole batch are no padding."""
        first, stop, _ = (self.rows or slice(None)).indices(self.batch_size)
        for start in range(0, len(items), self.batch_size):
            # Decoding is shared and so is the encoder: who can't decode would leave the others waiting in it.
            with distributed.synchronized_errors(*DATA_ERRORS) if self.rows is not None else contextlib.nullcontext():
                rows = prepare(items[start + first : start + stop] or items[-1:])
            padding = [(0, stop - first - len(rows))] + [(0, 0)] * (rows.ndim - 1)
            yield np.pad(rows, padding, mode="edge"), min(self.batch_size, len(items) - start)

    def _embed(
        self, encode: Callable[..., jax.Array], prepare: Callable[..., np.ndarray], items: Sequence[Any], kind: str
    ) -> Float[np.ndarray, "n E"]:
        if not len(items):
            raise ValueError(f"there is no {kind} to embed; give at least one")
        jitted = jax.jit(encode, out_shardings=self.out_sharding)
        done: list[np.ndarray] = []
        running: tuple[jax.Array, int] | None = None
        for rows, count in self._prepared(prepare, items):
            started = jitted(self.params, self.put(rows)), count
            if running:  # fetched only now: the next batch was decoded while this one was computed
                done.append(_fetch(*running))
            running = started
            if self.on_batch:
                self.on_batch()
        return np.concatenate([*done, _fetch(*running)])


def _fetch(output: jax.Array, count: int) -> np.ndarray:
    return np.asarray(output)[:count].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class CachedEmbedder:
    """Embed every picture and text once, however many evaluators, sets and panels ask for it."""

    embedder: Embedder
    _images: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)
    _texts: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)

    def image(self, images: Sequence[bytes]) -> Float[np.ndarray, "n E"]:
        """Return the embedder's vectors for pictures, asking it only for those not seen before."""
        return _remembered(self.embedder.image, self._images, images)

    def text(self, texts: Sequence[str]) -> Float[np.ndarray, "m E"]:
        """Return the embedder's vectors for texts, asking it only for those not seen before."""
        return _remembered(self.embedder.text, self._texts, texts)


def _remembered(
    embed: Callable[[Sequence[Any]], np.ndarray], seen: dict[bytes, np.ndarray], items: Sequence[Any]
) -> np.ndarray:
    keys = [_digest(item) for item in items]
    new = {key: index for index, key in reversed([*enumerate(keys)]) if key not in seen}
    if new:
        order = sorted(new, key=new.__getitem__)
        seen.update(zip(order, embed(_Chosen(items, [new[key] for key in order])), strict=True))
    return np.stack([seen[key] for key in keys])


def _digest(item: bytes | str) -> bytes:
    """Return what stands for a picture or text, so that a large set's pictures are not held."""
    return hashlib.blake2b(item if isinstance(item, bytes) else item.encode(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class _Chosen(Sequence):
    """Some of a sequence, read when they are asked for."""

    items: Sequence[Any]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.items[i] for i in self.indices[index]]
        return self.items[self.indices[index]]


def embed_set(embedder: Embedder, eval_set: EvalDataset) -> tuple[Float[np.ndarray, "n E"], Float[np.ndarray, "M E"]]:
    """Return the embeddings of a set's pictures and of its texts, the wordings of one text averaged.

    Raises:
      ValueError: for a set without pictures or texts, a text without wordings, targets that don't fit, or an embedder
        that returns another number of rows.
    """
    check_set(eval_set)
    image_nE = embedder.image(eval_set.images)
    wordings_TE = embedder.text([wording for wordings in eval_set.texts for wording in wordings])
    counts_M = np.array([len(wordings) for wordings in eval_set.texts])
    for kind, got, expected in (
        ("pictures", len(image_nE), len(eval_set.images)),
        ("wordings", len(wordings_TE), counts_M.sum()),
    ):
        if got != expected:
            raise ValueError(f"the embedder returned {got} rows for the {expected} {kind} of {eval_set.name}")
    return image_nE, mean_of_wordings(wordings_TE, counts_M)


def mean_of_wordings(
    wordings_TE: Float[np.ndarray, "T E"], counts_M: Integer[np.ndarray, "M"]
) -> Float[np.ndarray, "M E"]:
    """Return for each text the mean of its wordings' unit vectors, at length 1 again.

    counts_M: how many rows each text has, one after another; 1 or more.
    """
    starts_M = np.concatenate([[0], np.cumsum(counts_M)[:-1]])
    return unit(np.add.reduceat(unit(wordings_TE), starts_M, axis=0))


def check_set(eval_set: EvalDataset) -> None:
    """Raise ValueError unless every picture of the set has a text that has a wording."""
    name, images, texts, targets = eval_set.name, eval_set.images, eval_set.texts, eval_set.targets
    if not len(images) or not len(texts):
        raise ValueError(
            f"evaluation set {name} has {len(images)} pictures and {len(texts)} texts; it needs some of both"
        )
    if len(targets) != len(images):
        raise ValueError(
            f"evaluation set {name} has {len(targets)} targets for {len(images)} pictures; give one for each"
        )
    if targets.ndim == 2 and targets.shape[1] != len(texts):
        raise ValueError(
            f"evaluation set {name} says of {targets.shape[1]} texts whether they are right, and has {len(texts)}"
        )
    if targets.ndim == 1 and (targets.min() < 0 or targets.max() >= len(texts)):
        raise ValueError(
            f"evaluation set {name} has targets from {targets.min()} to {targets.max()};"
            f" its {len(texts)} texts have indices 0 to {len(texts) - 1}"
        )
    empty = [index for index, wordings in enumerate(texts) if not wordings]
    if empty:
        raise ValueError(f"text {empty[0]} of evaluation set {name} has no wording, as have {len(empty)} in all")
