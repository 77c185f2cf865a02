"""Rank pictures by what they show: `python -m clip_jax.search --weights=params.msgpack "a happy dog"`.

Several queries make several tables. Exit codes: 0; 2, wrong flags or input, with one sentence.
"""

from __future__ import annotations

import logging
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from jaxtyping import Float, Int64

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
REFUSED = 2

_WEIGHTS = flags.DEFINE_string("weights", None, "A file that --export wrote, e.g. runs/emoji/params.msgpack.")
_IMAGES = flags.DEFINE_string("images", "", "A folder: PNG, JPEG and WebP at any depth. Empty: the emoji.")
_TOP = flags.DEFINE_integer("top", 10, "How many matches to print for each query.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Print the best matches of every query."""
    logging.getLogger("jax").setLevel(logging.WARNING)  # absl shows its search for a TPU
    try:
        _search(_WEIGHTS.value, argv[1:], _IMAGES.value, _TOP.value)
    except (ValueError, FileNotFoundError) as error:
        print(f"clip_jax.search: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def _search(weights: str | None, queries: Sequence[str], folder: str, top: int) -> None:
    from clip_jax.inference import load

    if not weights or not queries:
        raise ValueError('expected --weights=FILE and a query, e.g. --weights=runs/emoji/params.msgpack "a happy dog"')
    model = load(weights)
    text_nE = model.encode_text(queries)  # first: it is quick, and a query may be too long
    images, names = files_below(folder) if folder else _emoji()
    image_mE = model.encode_image(images)
    for query, text_E in zip(queries, text_nE, strict=True):
        order, similarity = ranking(image_mE, text_E)
        print(f"\n{query!r} among {len(names):,} pictures\n" + table(names, order[:top], similarity[:top]))


def files_below(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Return the pictures in a folder and its subfolders as paths, and as names relative to it.

    Raises:
      ValueError: if there is no such folder, or no picture in it.
    """
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"--images={folder}: there is no such folder")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"--images={folder}: no picture in it or below; looked for {', '.join(sorted(SUFFIXES))}")
    return [str(path) for path in paths], [str(path.relative_to(root)) for path in paths]


def ranking(
    image_nE: Float[np.ndarray, "n E"], text_E: Float[np.ndarray, "E"]
) -> tuple[Int64[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Return the rows of the pictures, the most similar to the text first, and their cosines in that order."""
    similarity = image_nE @ text_E
    order = np.argsort(-similarity, kind="stable")
    return order, similarity[order]


def table(names: Sequence[str], order: Sequence[int] | np.ndarray, similarity: Sequence[float] | np.ndarray) -> str:
    """Return one line for every match: its rank from 1, its cosine, its name."""
    matches = zip(order, similarity, strict=True)
    rows = [f"{rank:>4}  {cosine:>10.3f}  {names[i]}" for rank, (i, cosine) in enumerate(matches, start=1)]
    return "\n".join([f"{'rank':>4}  {'similarity':>10}  picture", *rows])


def _emoji() -> tuple[list[bytes], list[str]]:
    # TensorFlow comes with it, so only where it is wanted.
    from clip_jax.evals.load import load_dataset

    pictures = load_dataset("emoji_search")
    return list(pictures.images), list(pictures.image_names)


if __name__ == "__main__":
    app.run(main)
