"""Embed a collection of images: a folder, or training data with captions, in the layout of clip-retrieval.

    clip-jax embed --weights=runs/emoji/params.msgpack --images=/my/images --out=embeddings
    clip-jax embed --weights=runs/emoji/params.msgpack --images='/data/cc3m/*.tfrecord' --out=cc3m
    clip-jax embed --weights=runs/emoji/params.msgpack --images=/my/images --out=exact --stored_dtype=float32

--images is a folder, of which every image is embedded, or any value of `data.files`: tar, TFRecord, Parquet …, whose
captions are embedded too. The same command continues after an interruption. Several processes share the work, as in
training. Images that cannot be decoded are listed in OUT/unreadable. `clip-jax search --embeddings=OUT` reads OUT.
Exit codes: 0; 2 for wrong flags or input, with a one-line error.
"""

from __future__ import annotations

import logging
import os
import time

from absl import flags

from clip_jax import command

log = logging.getLogger(__name__)

_WEIGHTS = flags.DEFINE_string("weights", None, "Path or name, as in clip_jax.load, e.g. runs/emoji/params.msgpack.")
_IMAGES = flags.DEFINE_string("images", "", "A folder of images, or training data, as data.files.")
_SOURCE = flags.DEFINE_string("source", "", "Format of training data, as data.source; '' recognizes it.")
_OUT = flags.DEFINE_string("out", "", "Folder or URL of the embeddings.")
_PART_SIZE = flags.DEFINE_integer("part_size", 100_000, "Images per file; an interruption loses less.", lower_bound=1)
_STORED = flags.DEFINE_enum("stored_dtype", "float16", ["float16", "float32"], "Of the embeddings in the files.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the parameters and the computation.")
_weights_options = command.define_weights_flags()

SECONDS = 10  # between two lines of progress


def main(_: list[str]) -> int:
    """Embed, and print the numbers of images. Returns the exit code."""
    if not (_WEIGHTS.value and _IMAGES.value and _OUT.value):
        raise ValueError("expected --weights=FILE, --images=FOLDER and --out=FOLDER; --help has examples")
    import jax

    from clip_jax.config import DataConfig
    from clip_jax.data import open_images
    from clip_jax.devices import distributed
    from clip_jax.embedding import Summary, embed
    from clip_jax.inference import load

    distributed.initialize()
    source = open_images(DataConfig(source=_SOURCE.value, files=_IMAGES.value))
    model = load(_WEIGHTS.value, dtype=_DTYPE.value, truncate=True, **_weights_options())
    began = shown = time.monotonic()

    def progress(summary: Summary) -> None:
        nonlocal shown
        if time.monotonic() - shown > SECONDS:
            shown = time.monotonic()
            done = summary.embedded + summary.unreadable
            log.info("%d images embedded, %.0f/s, %d unreadable", done, done / (shown - began), summary.unreadable)

    summary = embed(
        model.on_devices(jax.local_devices()),
        source,
        _OUT.value,
        part_size=_PART_SIZE.value,
        dtype=_STORED.value,
        process=jax.process_index(),
        processes=jax.process_count(),
        progress=progress,
    )
    earlier = f", {summary.earlier:,} embedded before" if summary.earlier else ""
    listed = f" (in {_OUT.value}/unreadable)" if summary.unreadable else ""
    print(f"{_OUT.value}: {summary.embedded:,} images embedded{earlier}, {summary.unreadable:,} unreadable{listed}")
    return command.FINISHED


if __name__ == "__main__":
    command.run(main, leave=os._exit)
