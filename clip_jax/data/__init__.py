"""Training input: sources of image–text pairs, and the pipeline from their records to the host's arrays.

TensorFlow is imported here and nowhere else. To add a source, write a class in a file of `sources/` that implements
`clip_jax.typing.DataSource` and two classmethods, and add it to SOURCES:

* `from_config(config, **options)` opens the source. `config` is the run's DataConfig, `options` is `data.options`.
* `tiny_config(folder)` returns a DataConfig of about 60 records for tests/contracts/test_sources.py; it may write to
  `folder`.

A source that reads `data.files` has a third, `check_files(config)`, which raises ValueError for files that do not
exist, without reading them; --dry_run calls it. Other sources refuse `data.files`.
"""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # unset, or JAX's own default, which it sets at import
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard the stderr output of C++ code, which TensorFlow 2.21 writes at import, unless the block raises."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException:
            captured.seek(0)
            os.write(stderr, captured.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


with _quiet_stderr():
    import tensorflow as tf

# The accelerators are for JAX: TensorFlow would allocate most of a GPU's memory, or the whole TPU.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

from clip_jax.config import DataConfig, check_known_options, check_name  # noqa: E402
from clip_jax.data import held_out, index, storage  # noqa: E402
from clip_jax.data.activity import Activity  # noqa: E402
from clip_jax.data.pipeline import batches  # noqa: E402
from clip_jax.data.recognition import recognize  # noqa: E402
from clip_jax.data.sources import mixture  # noqa: E402
from clip_jax.data.sources.array_record import ArrayRecordSource  # noqa: E402
from clip_jax.data.sources.emoji import EmojiSource  # noqa: E402
from clip_jax.data.sources.folder import FolderSource  # noqa: E402
from clip_jax.data.sources.huggingface import HuggingFaceSource  # noqa: E402
from clip_jax.data.sources.shards import ShardSource  # noqa: E402
from clip_jax.data.sources.synthetic import SyntheticSource  # noqa: E402
from clip_jax.data.sources.table import TableSource  # noqa: E402
from clip_jax.data.sources.tar import TarSource  # noqa: E402
from clip_jax.data.sources.tfds import TFDSSource  # noqa: E402
from clip_jax.data.sources.tfrecord import TFRecordSource, write_tfrecord  # noqa: E402
from clip_jax.typing import BadRecord, DataSource  # noqa: E402

log = logging.getLogger(__name__)

# Config key `data.source` -> class; '' recognizes the format of `data.files`.
SOURCES: dict[str, type] = {
    "tfrecord": TFRecordSource,
    "tar": TarSource,
    "table": TableSource,
    "folder": FolderSource,
    "tfds": TFDSSource,
    "array_record": ArrayRecordSource,
    "huggingface": HuggingFaceSource,
    "emoji": EmojiSource,
    "synthetic": SyntheticSource,
}


def make_source(config: DataConfig) -> DataSource:
    """Open the training source that `config.source` names, or that reads `config.files`, or the mixture; log its size.

    Without the pairs that `config.validation_fraction` holds out, which are then in `held_out` of the source.

    Raises:
      ValueError: for an unknown source or option, or from the source, e.g. if `data.files` matches no file.

    >>> source = make_source(DataConfig(source="synthetic", options={"examples": 100}))
    >>> len(source), source.read(0).captions["txt"]
    (100, ('a green square on a grey background',))
    """
    if config.mixture:
        return mixture.MixtureSource.from_config(config, make_source)
    config = recognize(config)
    check_options(config)
    source = SOURCES[config.source].from_config(config, **config.options)
    if config.files:
        log.info("%s: %s", config.files, describe(source, config))
    return held_out.split(source, config.validation_fraction) if config.validation_fraction else source


def open_images(config: DataConfig) -> DataSource:
    """Open images to be embedded: all of a folder, or a training source with its captions. Raises as `make_source`.

    Captions of a folder's images are optional.
    """
    config = recognize(config)
    return FolderSource.of_images(config) if config.source == "folder" else make_source(config)


def describe(source: DataSource, config: DataConfig) -> str:
    """Return e.g. '12,423,374 pairs in 1,243 files (tar), captions: txt' of a source of `recognize`'s config."""
    name = config.source
    files = getattr(source, "num_files", 1)
    summary = (
        f"{len(source):,} pairs in {files:,} {'folder' if name == 'folder' else 'file'}{'s' * (files > 1)} ({name})"
    )
    if getattr(source, "in_memory", False):  # of an object store: a record costs a block
        return summary
    for number in range(min(len(source), 10)):
        with contextlib.suppress(BadRecord):
            captions = [name for name, texts in source.read(number).captions.items() if any(texts)]
            return f"{summary}, captions: {', '.join(captions) or 'none'}"
    return f"{summary}; its first records are bad"


def index_files(files: str, source: str = "", beam_options: Sequence[str] | None = None) -> str:
    """Index the shards of `files` in their folder, for all hosts and runs; return a summary.

    Args:
      files: as `data.files`.
      source: 'tfrecord' or 'tar'; '' for that of the files' names.
      beam_options: flags of Apache Beam, whose workers index the shards, such as ['--runner=DataflowRunner'].

    Raises:
      ValueError: if a file does not exist, or the source has no shards.
      OSError: if a shard cannot be read or the index cannot be written.
    """
    config = recognize(DataConfig(source=source, files=files))
    found, source = storage.list_files(config.files), config.source
    indexed = {name: kind for name, kind in SOURCES.items() if issubclass(kind, ShardSource) and name != "emoji"}
    check_name("--source", source, indexed)
    built, path = index.write_index(found, indexed[source].format, beam_options=beam_options)
    lost = sum(bool(shard.problem) or not shard.file.size for shard in built.shards)
    problems = f"; {lost} shards are damaged, truncated or empty" if lost else ""
    return (
        f"{path}: {int(built.records.sum()):,} records in {len(found):,} shards ({source}),"
        f" {len(built.records):,} blocks{problems}"
    )


def check_files(config: DataConfig) -> None:
    """Raise ValueError for an unknown source or option, and for files that do not exist or are not recognized.

    Without `data.files`, a source that reads them is not refused.
    """
    if config.mixture:
        for name, dataset in mixture.dataset_configs(config).items():
            with mixture.named_errors(name):
                check_files(dataset)
    elif config.files:
        config = recognize(config)
        check_options(config)
        SOURCES[config.source].check_files(config)
    elif config.source:
        check_options(config)


def check_options(config: DataConfig) -> None:
    """Raise ValueError for an unknown source, and for an option or `data.files` that the source does not read."""
    check_name("data.source", config.source, SOURCES)
    from_config = SOURCES[config.source].from_config
    check_known_options(f"data.options: data.source={config.source!r}", config.options, from_config, first=1)
    if config.files and not reads_files(config.source):
        readers = ", ".join(repr(name) for name in SOURCES if reads_files(name))
        raise ValueError(
            f"data.files={config.files!r}: data.source={config.source!r} reads no files; set data.source to one of"
            f" {readers}, or data.files=''"
        )


def reads_files(source: str) -> bool:
    """Return whether a source of SOURCES reads `data.files`; '' does."""
    return not source or getattr(SOURCES[source], "check_files", None) is not None
