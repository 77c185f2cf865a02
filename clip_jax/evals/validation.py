"""The validation loss: the contrastive loss of training pairs that are held out (`data.validation_fraction`)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import Config, DataConfig
from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals.datasets.files import LazySequence
from clip_jax.evals.embed import ModelEmbedder
from clip_jax.evals.ranking import unique_rows
from clip_jax.losses import ContrastiveLoss
from clip_jax.preprocess import open_image
from clip_jax.typing import BadRecord, DataSource

if TYPE_CHECKING:
    from clip_jax.data.held_out import HeldOut

log = logging.getLogger(__name__)

READ_THREADS = 16
CHUNK = 256  # records that are read before it is checked whether they are enough


class Pairs(NamedTuple):
    """Held-out pairs of a dataset, in a fixed order."""

    images: Sequence[bytes]  # encoded, read on access
    captions: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Validation:
    """The validation loss of a run. It is computed from embeddings, so it does not depend on hosts and devices."""

    pairs: Mapping[str, Pairs]  # by dataset of `data.mixture`; '' without a mixture
    loss: ContrastiveLoss
    batch_size: int  # pairs that are each other's negatives

    def __call__(self, embedder: ModelEmbedder) -> dict[str, float]:
        """Return `validation/loss`, of a mixture `validation/<dataset>/loss`: the mean over the batches, in nats."""
        found = {}
        for name, pairs in self.pairs.items():
            image_nE, text_nE = embedder.image(pairs.images), embedder.text(pairs.captions)
            _, caption_n = unique_rows(embedder.tokenizer(pairs.captions))
            params = {key: np.asarray(embedder.params[key]) for key in SCALARS if key in embedder.params}
            equal = self.loss.equal_captions == "positives"
            losses = [
                _batch_loss(self.loss, params, image_nE[rows], text_nE[rows], caption_n[rows] if equal else None)
                for start in range(0, len(pairs.captions), self.batch_size)
                for rows in [slice(start, start + self.batch_size)]
            ]
            found["/".join(filter(None, ("validation", name, "loss")))] = float(np.mean(losses))
        return found


SCALARS = ("logit_scale", "logit_bias")


def _batch_loss(loss, params, image_bE, text_bE, caption_b) -> float:
    ids = None if caption_b is None else (caption_b.astype(np.int32),) * 2
    value, _ = jax.jit(loss)(image_bE, text_bE, jnp.exp(params["logit_scale"]), params.get("logit_bias"), ids=ids)
    return float(value)


def load_validation(source: DataSource, config: Config) -> Validation:
    """Read the captions of the held-out pairs of a training source. Call it on all processes.

    Raises:
      ValueError: if a dataset has less than a batch of good pairs that pass `data.filters`.
    """
    pairs = {}
    with distributed.synchronized_errors(*DATA_ERRORS):
        for name, held_out in getattr(source, "held_out", {}).items():
            pairs[name] = _read(held_out, name, config)
    captions = hashlib.sha256(repr([pairs[name].captions for name in pairs]).encode()).hexdigest()
    distributed.check_equal_on_all_processes({"held-out pairs": captions}, ValueError)
    return Validation(pairs, config.loss, config.eval.batch_size)


def _read(held_out: HeldOut, name: str, config: Config) -> Pairs:
    """Return whole batches of the first pairs, at most `eval.validation_examples`."""
    batch_size, source = config.eval.batch_size, held_out.source
    wanted = config.eval.validation_examples // batch_size * batch_size
    examples, captions, skipped, remaining = [], [], 0, iter(held_out)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        while len(examples) < wanted and (chunk := list(itertools.islice(remaining, CHUNK))):
            for example, caption in zip(chunk, pool.map(_caption_reader(source, config.data), chunk), strict=True):
                if caption is None:
                    skipped += 1
                elif len(examples) < wanted:
                    examples.append(example)
                    captions.append(caption)
    count, of = len(examples) // batch_size * batch_size, f" of data.mixture.{name}" if name else ""
    if not count:
        raise ValueError(
            f"data.validation_fraction={config.data.validation_fraction:g} holds out {len(held_out):,} pairs{of},"
            f" {len(examples):,} of them good and not filtered; expected a batch of eval.batch_size={batch_size:,}."
            " Give a larger fraction, or a smaller eval.batch_size"
        )
    log.info(
        "validation loss: %d of %d held-out pairs%s, in batches of %d; %d bad or filtered ones are skipped",
        *(count, len(held_out), of, batch_size, skipped),
    )
    images = LazySequence(count, lambda row: source.read(examples[row]).image, lambda row: source.key(examples[row]))
    return Pairs(images, captions[:count])


def _caption_reader(source: DataSource, config: DataConfig):
    """Return a function from records to their captions, None for a bad or filtered record.

    Of several captions one is drawn as in training, always the same.
    """
    from clip_jax.data.captions import caption_draws, choose_caption  # imports TensorFlow
    from clip_jax.data.filters import Criteria
    from clip_jax.data.held_out import key_hash

    criteria = Criteria(config)

    def read(example: int) -> str | None:
        try:
            record, failed = criteria(source.read(example))
            open_image(record.image)
        except (BadRecord, ValueError):  # as in evaluation, which ends at an image that can't be decoded
            return None
        (draws,) = caption_draws(config.texts_per_caption, 0, np.zeros(1, np.int64), key_hash(source.key(example)))
        return None if failed else choose_caption(record, config.captions, *draws.tolist())

    return read
