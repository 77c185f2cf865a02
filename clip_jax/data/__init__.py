"""Pairs from where they are stored to the host's arrays. TensorFlow lives here and nowhere else.

A source is a class with `read(index)` and a line in SOURCES; whatever is listed faces tests/contracts/test_sources.py.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Hold back what C++ writes to stderr, unless the block fails.

    TensorFlow 2.21 remarks on this machine's processor and missing CUDA libraries before it reads its log level,
    which tells a JAX user nothing.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as remarks:
        os.dup2(remarks.fileno(), 2)
        try:
            yield
        except BaseException:
            remarks.seek(0)
            os.write(stderr, remarks.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


with _without_remarks():
    import tensorflow as tf

# The accelerators are JAX's: TensorFlow would take most of a GPU's memory, or the whole TPU.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

from clip_jax.config import DataConfig  # noqa: E402
from clip_jax.data.pipeline import batches  # noqa: E402
from clip_jax.data.sources import emoji, synthetic, tfrecord  # noqa: E402
from clip_jax.typing import DataSource, EvalDataset  # noqa: E402

SOURCES: dict[str, Callable[[DataConfig], DataSource]] = {
    "tfrecord": tfrecord.source,
    "emoji": emoji.source,
    "synthetic": synthetic.source,
}

EVAL_SETS: dict[str, Callable[[DataConfig, str], EvalDataset]] = {
    "emoji": emoji.eval_set,
    "synthetic": synthetic.eval_set,
}

__all__ = ["EVAL_SETS", "SOURCES", "batches"]
