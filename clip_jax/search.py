"""Rank images by similarity to texts.

    clip-jax search --weights=runs/emoji/params.msgpack "a happy dog"
    clip-jax search --weights=runs/emoji/params.msgpack --images=/my/images "a red car"
    clip-jax search --weights=runs/emoji/params.msgpack --images=/my/images --top=3 "a red car" "a cat"

Prints one table per query. Exit codes: 0; 2 for wrong flags or input, with a one-line error.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from jaxtyping import Float, Int64

from clip_jax import command
from clip_jax.paths import error_sentence
from clip_jax.preprocess import preprocess

if TYPE_CHECKING:
    from clip_jax.inference import Clip

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

_WEIGHTS = flags.DEFINE_string("weights", None, "Weights, e.g. runs/emoji/params.msgpack.")
_IMAGES = flags.DEFINE_string("images", "", "Folder, searched recursively for images. Empty: the emoji.")
_EMBEDDINGS = flags.DEFINE_string("embeddings", "", "Instead of --images: OUT of clip-jax embed, by the same weights.")
_TOP = flags.DEFINE_integer("top", 10, "Number of matches per query.", lower_bound=1)
_weights_options = command.define_weights_flags()
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the parameters and the computation.")


def main(queries: list[str]) -> int:
    """Print the best matches of each query. Returns the exit code."""
    from clip_jax.inference import load

    if not _WEIGHTS.value or not queries:
        raise ValueError('expected --weights=FILE and a query, e.g. --weights=runs/emoji/params.msgpack "a happy dog"')
    model, top = load(_WEIGHTS.value, dtype=_DTYPE.value, **_weights_options()), _TOP.value
    text_nE = model.encode_text(queries)  # first, because it is fast and a query may be too long
    image_mE, names = _embeddings(model)
    for query, text_E in zip(queries, text_nE, strict=True):
        order, similarity = ranking(image_mE, text_E)
        print(f"\n{query!r} among {len(names):,} images\n" + table(names, order[:top], similarity[:top]))
    return command.FINISHED


def _embeddings(model: Clip) -> tuple[Float[np.ndarray, "m E"], list[str]]:
    """Return the embeddings and names of the images that the flags choose."""
    if not _EMBEDDINGS.value:
        return _encode_readable(model, *(images_in(_IMAGES.value) if _IMAGES.value else _emoji()))
    if _IMAGES.value:
        raise ValueError("expected either --images or --embeddings, got both")
    from clip_jax.embedding import read

    manifest, image_mE, names = read(_EMBEDDINGS.value)
    if manifest["weights"] != model.fingerprint:
        raise ValueError(
            f"--embeddings={_EMBEDDINGS.value} are of {manifest['model']}, got other weights or another --dtype:"
            f" {model!r}; use the --weights and --dtype of clip-jax embed"
        )
    return image_mE, names


def images_in(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Return the paths of all images in a folder and its subfolders, and their names relative to it.

    A subfolder that may not be read is named on stderr. Raises PermissionError for such a folder.
    """
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"--images: expected a folder, got {folder}")
    unreadable: list[OSError] = []
    found = os.walk(root, onerror=unreadable.append)
    paths = sorted(pathlib.Path(below, name) for below, _, names in found for name in names)
    paths = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    paths = [path for path in paths if not path.name.startswith("._")]  # of macOS's archives
    for error in unreadable:
        if not paths:
            raise error
        print(f"clip_jax.search: a folder is skipped: {error_sentence(error)}", file=sys.stderr)
    if not paths:
        raise ValueError(f"--images: expected files with {', '.join(sorted(SUFFIXES))} in {folder}, got none")
    return [str(path) for path in paths], [str(path.relative_to(root)) for path in paths]


def _encode_readable(
    model: Clip, images: Sequence[str | bytes], names: Sequence[str]
) -> tuple[Float[np.ndarray, "n E"], list[str]]:
    """Return the embeddings and names of the images that can be decoded; the others are listed on stderr.

    Raises ValueError if there are none.
    """
    try:
        return model.encode_image(images), list(names)
    except (ValueError, OSError):
        pass  # find the unreadable images

    def problem(image: str | bytes) -> str:
        try:
            preprocess(image, model.config.model.image.image_size, model.config.preprocess)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, images))
    for number, text in enumerate(problems):
        if text:
            print(f"clip_jax.search: image {number} is skipped: {text}", file=sys.stderr)
    kept = [number for number, text in enumerate(problems) if not text]
    if not kept:
        raise ValueError(f"--images: expected images, got {len(problems)} files of which none can be decoded")
    return model.encode_image([images[number] for number in kept]), [names[number] for number in kept]


def ranking(
    image_nE: Float[np.ndarray, "n E"], text_E: Float[np.ndarray, "E"]
) -> tuple[Int64[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Return image indices by descending cosine with the text, and the cosines in that order."""
    similarity = image_nE @ text_E
    order = np.argsort(-similarity, kind="stable")
    return order, similarity[order]


def table(names: Sequence[str], order: Sequence[int] | np.ndarray, similarity: Sequence[float] | np.ndarray) -> str:
    """Return a table with rank (from 1), cosine and name of each match."""
    matches = zip(order, similarity, strict=True)
    rows = [f"{rank:>4}  {cosine:>10.3f}  {names[i]}" for rank, (i, cosine) in enumerate(matches, start=1)]
    return "\n".join([f"{'rank':>4}  {'similarity':>10}  image", *rows])


def _emoji() -> tuple[list[bytes], list[str]]:
    # Imports TensorFlow.
    from clip_jax.evals.load import load_dataset

    dataset = load_dataset("emoji_search")
    return list(dataset.images), list(dataset.image_names)


if __name__ == "__main__":
    command.run(main, positional=True)
