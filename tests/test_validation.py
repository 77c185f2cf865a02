"""Held-out training pairs (`data.validation_fraction`) and the validation loss."""

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import data
from clip_jax.config import Config, DataConfig, DatasetConfig, EvalConfig, FilterConfig, from_config_dict, resolve
from clip_jax.data import held_out, order
from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.evals.embed import ModelEmbedder
from clip_jax.evals.validation import load_validation
from clip_jax.losses import SigmoidLoss, SoftmaxLoss
from clip_jax.models.architecture import Preprocess
from clip_jax.preprocess import preprocess_many
from clip_jax.typing import BadRecord, Record
from tests.test_data_pipeline import ByteTokenizer, _png, take, untokenize

BATCH = 8


class Listed:
    """Records by key, 'cats/1.jpg' or '<file>#<number>'; files with `blocks` records a block are read by blocks."""

    def __init__(self, *keys, blocks=0):
        self.keys, self.blocks, self.prefetched = keys, blocks, []

    def __len__(self):
        return len(self.keys)

    def key(self, index):
        return self.keys[index]

    def read(self, index):
        return Record(self.keys[index], _png(index), {"txt": (f"text {index}",)})

    def fingerprint(self):
        return "listed"

    def order(self, seed, batch_size):
        if not self.blocks:
            return order.RecordOrder(len(self), seed)
        return order.BlockOrder(np.full(len(self) // self.blocks, self.blocks), seed, batch_size, 4, 2 * self.blocks)

    def prefetch(self, blocks):
        self.prefetched.append(blocks)


def files(count, records=30, folder="/data"):
    return [f"{folder}/{file:05d}.tar#{number}" for file in range(count) for number in range(records)]


def held(source, fraction):
    (part,) = held_out.split(source, fraction).held_out.values()
    return [source.key(index) for index in part]


# --------------------------------------------------------------------------------------------------- which pairs


@pytest.mark.parametrize("blocks", [0, 10])
def test_the_same_pairs_are_held_out_in_another_folder_with_more_files_and_by_a_larger_fraction(blocks):
    listed = functools.partial(Listed, blocks=blocks)
    found = held(listed(*files(60)), 0.2)
    assert 0.1 < len(found) / 1800 < 0.3
    elsewhere = held(listed(*files(60, folder="gs://bucket/other")), 0.2)
    assert [key.rpartition("/")[2] for key in elsewhere] == [key.rpartition("/")[2] for key in found]
    more = held(listed(*files(90)), 0.2)
    assert [key for key in more if key in set(files(60))] == found and len(more) > len(found)
    assert held(listed(*files(60)), 0.4)[: len(found)] == found
    if blocks:  # whole files
        assert len(found) == 30 * len({key.partition("#")[0] for key in found})


def test_keys_without_numbers_are_hashed_each_and_order_does_not_matter():
    keys = [f"{name}/{number}.jpg" for name in ("cats", "dogs") for number in range(500)]
    found = held(Listed(*keys), 0.1)
    assert 60 < len(found) < 140 and held(Listed(*reversed(keys)), 0.1) == found
    cats = {key for key in found if key.startswith("cats")}
    assert 20 < len(cats) < 80 and {key.replace("cats", "dogs") for key in cats} != set(found) - cats


def test_few_keys_are_made_for_many_records():
    class Large(Listed):
        made = 0

        def __len__(self):
            return 400 * 10_000

        def key(self, index):
            self.made += 1
            return f"{index // 10_000}.tar#{index % 10_000}"

    source = Large()
    (part,) = held_out.split(source, 0.001).held_out.values()
    assert source.made < 400 * 60 and 3500 < len(part) < 4500
    hashes = np.array([held_out.key_hash(source.key(index))[0] for index in list(part)[:50]])
    assert (np.diff(hashes.astype(float)) > 0).all() and (order.fraction(hashes) < 0.001).all()


@pytest.mark.parametrize("blocks", [0, 10])
def test_every_other_record_comes_once_an_epoch_on_any_number_of_hosts(blocks):
    source = Listed(*files(12), blocks=blocks)
    part = held_out.split(source, 0.3)
    expected = set(source.keys) - set(held(source, 0.3))
    ordered = part.order(3, BATCH)
    epochs, examples = ordered(np.arange(2 * len(part)))
    for epoch in range(2):
        found = [part.key(index) for index in examples[epochs == epoch].tolist()]
        assert len(found) == len(part) == len(expected) and set(found) == expected
    replacements = ordered.replacement(np.arange(len(part)), 1)
    assert {part.key(index) for index in replacements.tolist()} <= expected
    for index in (-1, len(part)):
        with pytest.raises(IndexError):
            part.key(index)
    if blocks:  # all blocks of the rows of a host are read in advance, and none of the others
        for step in range(len(part) // BATCH):
            part.prefetch(np.concatenate(ordered.blocks(step, slice(2, 4))))
            _, rows = ordered(np.arange(step * BATCH + 2, step * BATCH + 4))
            wanted = {files(12).index(part.key(index)) // blocks for index in rows.tolist()}
            assert wanted <= set(source.prefetched[-1].tolist())
        read = {
            key.partition("#")[0]
            for block in np.concatenate(source.prefetched).tolist()
            for key in source.keys[block * blocks : block * blocks + blocks]
        }
        assert read <= {key.partition("#")[0] for key in expected}


@pytest.mark.parametrize("order", ["records", "blocks"])
def test_batches_have_no_held_out_pair(tmp_path, order):
    for shard in range(8):
        write_tfrecord(tmp_path / f"{shard}.tfrecord", [{"png": _png(i), "txt": f"{shard}#{i}"} for i in range(10)])
    config = DataConfig(files=f"{tmp_path}/*.tfrecord", options={"order": order}, cache_dir="", decode_threads=1)
    config = dataclasses.replace(config, validation_fraction=0.3)
    source = data.make_source(config)
    (part,) = source.held_out.values()
    apart = {part.source.read(index).captions["txt"][0] for index in part}
    halves = [
        take(source, len(source) // 4, config=config, batch_size=4, rows=slice(2 * h, 2 * h + 2)) for h in range(2)
    ]
    texts = [untokenize(row) for half in halves for batch in half for row in batch.batch.text]
    assert len(set(texts)) >= len(source) - 3 and not set(texts) & apart and len(apart) + len(source) == 80
    whole = data.make_source(dataclasses.replace(config, validation_fraction=0.0))
    assert source.fingerprint() != whole.fingerprint() == part.source.fingerprint()


def test_datasets_of_a_mixture_have_held_out_parts_of_their_own():
    dataset = {"source": "synthetic", "options": {"examples": 200}}
    mixed = DataConfig(mixture={name: DatasetConfig(**dataset) for name in ("one", "two")}, validation_fraction=0.2)
    source, alone = data.make_source(mixed), data.make_source(DataConfig(**dataset, validation_fraction=0.2))
    assert list(source.held_out) == ["one", "two"] and len(source) == 2 * len(alone)
    for part in source.held_out.values():
        assert list(part) == list(alone.held_out[""])
    with pytest.raises(ValueError, match="data.mixture.one: data.validation_fraction=1e-07 holds out 0 of 200 pairs"):
        data.make_source(dataclasses.replace(mixed, validation_fraction=1e-7))


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="=0.001 holds out 0 of 60 pairs; give a larger fraction"):
        held_out.split(Listed(*files(2)), 0.001)
    with pytest.raises(ValueError, match="=0.5 holds out 0 of 30 pairs in 1 files, which are held out whole; give a"):
        held_out.split(Listed(*files(1), blocks=10), 0.5)
    with pytest.raises(ValueError, match="=0.99 holds out 5 of 5 pairs; give a smaller fraction"):
        held_out.split(Listed(*files(1, 5)), 0.99)
    with pytest.raises(ValueError, match="record 0 of the source has no key"):
        held_out.split(Listed("", "b#1"), 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.validation_fraction": 1.0}, r"data.validation_fraction=1.0 is out of range"),
        ({"data.validation_fraction": -0.1}, r"data.validation_fraction=-0.1 is out of range"),
        ({"eval.validation_examples": 64}, r"validation_examples=64 has no effect without data.validation_fraction"),
        ({"data.validation_fraction": 0.1, "eval.batch_size": 1}, r"eval.batch_size=1 and .* batches of 2 pairs"),
        (
            {"data.validation_fraction": 0.1, "eval.validation_examples": 9},
            r"eval.validation_examples=9: the validation",
        ),
    ],
)
def test_values_without_a_validation_loss_are_refused(changes, message):
    tree = {"train": {"batch_size": 8, "total_examples": 800_000}}
    for key, value in changes.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    with pytest.raises(ValueError, match=message):
        resolve(from_config_dict(tree), devices=1)


# ----------------------------------------------------------------------------------------------------- the loss

PARAMS = {
    "image": np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32),
    "text": np.random.default_rng(1).normal(size=(256, 8)).astype(np.float32),
    "logit_scale": np.float32(1.5),
    "logit_bias": np.float32(-2.0),
}


def encode_image(params, image):
    return jnp.tanh(image.mean((1, 2)) / 64 @ params["image"])


def encode_text(params, text):
    return params["text"][text].mean(1)


def embedder(**changes):
    pixels = functools.partial(preprocess_many, size=4, spec=Preprocess())
    given = {"tokenizer": ByteTokenizer(), "preprocess": pixels, "params": PARAMS, "batch_size": BATCH}
    return ModelEmbedder(**{"encode_image": encode_image, "encode_text": encode_text} | given | changes)


def validation(source, fraction=0.5, loss=SoftmaxLoss(), examples=4096, **changes):  # noqa: B008 (frozen)
    config = Config(
        data=DataConfig(validation_fraction=fraction, **changes),
        eval=EvalConfig(batch_size=BATCH, validation_examples=examples),
        loss=loss,
    )
    return load_validation(held_out.split(source, fraction), config)


def reference(pairs, loss, ids=False):
    """Return the mean of the dense loss over the batches of 8 pairs."""
    found = embedder()
    losses = []
    for start in range(0, len(pairs.captions), BATCH):
        captions = pairs.captions[start : start + BATCH]
        image, text = found.image(pairs.images[start : start + BATCH]), found.text(captions)
        matches = np.array(captions)[:, None] == np.array(captions) if ids else np.eye(BATCH, dtype=bool)
        losses.append(loss.dense(*map(jnp.asarray, (image, text, np.float32(np.exp(1.5)), np.float32(-2.0), matches))))
    return float(np.mean(losses))


@pytest.mark.parametrize("loss", [SoftmaxLoss(), SoftmaxLoss(equal_captions="positives"), SigmoidLoss()])
def test_validation_loss_is_the_mean_over_whole_batches(loss, caplog):
    class Repeating(Listed):
        def read(self, index):
            return Record(self.keys[index], _png(7 * index), {"txt": (f"text {index % 5}",)})

    with caplog.at_level("INFO"):
        found = validation(Repeating(*files(2, 26)), loss=loss)
    (pairs,) = found.pairs.values()
    assert (
        len(pairs.captions) == 24 and "validation loss: 24 of 28 held-out pairs, in batches of 8; 0 bad" in caplog.text
    )
    ((key, value),) = found(embedder()).items()
    assert key == "validation/loss"
    assert value == pytest.approx(reference(pairs, loss, loss.equal_captions == "positives"), rel=1e-5)
    assert validation(Repeating(*files(2, 26)), loss=loss, examples=15)(embedder())[key] != value  # one batch


def test_validation_loss_is_the_same_on_two_hosts():
    source = Listed(*files(2, 26))
    alone = validation(source)(embedder())
    barrier, parts, reads = threading.Barrier(2), [None, None], [set(), set()]

    def on_host(host):
        def put(rows):
            parts[host] = rows
            barrier.wait()
            whole = np.concatenate(parts)
            barrier.wait()
            return jnp.asarray(whole)

        class Recording(Listed):
            def read(self, index):
                reads[host].add(index)
                return super().read(index)

        loaded = validation(Recording(*source.keys))
        reads[host].clear()
        return loaded(embedder(rows=slice(4 * host, 4 * host + 4), put=put))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(on_host, range(2))) == [alone, alone]
    assert len(reads[0] | reads[1]) == 24  # a host reads its own images, and those that the type checks sample
    assert all(12 <= len(found) <= 16 for found in reads)


def test_bad_and_filtered_pairs_are_skipped_and_captions_fixed():
    class Mixed(Listed):
        def read(self, index):
            if index % 4 == 0:
                raise BadRecord("gone")
            if index % 4 == 1:
                return Record(self.keys[index], b"no image", {"txt": ("a long text",)})
            texts = ("short",) if index % 4 == 2 else (f"first text {index}", f"other text {index}", "short")
            return Record(self.keys[index], _png(index), {"txt": texts})

    source, filters = Mixed(*files(2, 100)), FilterConfig(min_caption_characters=8)
    found = validation(source, filters=filters)
    (pairs,) = found.pairs.values()
    assert len(pairs.captions) % 8 == 0 and len(pairs.captions) >= 16
    numbers = [int(caption.split()[-1]) for caption in pairs.captions]
    assert all(number % 4 == 3 for number in numbers) and len(set(numbers)) == len(numbers)
    assert 3 < sum(caption.startswith("first") for caption in pairs.captions) < len(numbers) - 3
    more = validation(Mixed(*files(3, 100)), filters=filters).pairs[""]  # with another file
    texts = dict(zip(numbers, pairs.captions, strict=True))
    assert [texts.get(int(text.split()[-1]), text) for text in more.captions] == list(more.captions)
    with pytest.raises(
        ValueError, match=r"=0.5 holds out \d+ pairs, 0 of them good and not filtered; expected a batch"
    ):
        validation(source, filters=FilterConfig(min_caption_characters=100))


def test_a_batch_of_held_out_pairs_is_needed():
    with pytest.raises(
        ValueError, match="=0.1 holds out 3 pairs, 3 of them good .* a batch of eval.batch_size=8. Give"
    ):
        validation(Listed(*files(1, 52)), 0.1)


def test_no_pair_is_held_out_by_default():
    source = data.make_source(DataConfig(source="synthetic", options={"examples": 50}))
    assert len(source) == 50 and load_validation(source, Config())(embedder()) == {}
