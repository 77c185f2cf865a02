"""Training data that other libraries write: every pair is read once an epoch on 1, 2, 3 and 8 hosts."""

import functools
import http.server
import io
import threading

import array_record.python.array_record_module
import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
import webdataset
from PIL import Image

from clip_jax import data
from clip_jax.config import DataConfig
from clip_jax.data import order

COUNT, BATCH = 48, 24


def _png(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (5 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


IMAGES, CAPTIONS = [_png(number) for number in range(COUNT)], [f"number {number}" for number in range(COUNT)]
COLUMNS = {"image": IMAGES, "caption": CAPTIONS}


def _webdataset(folder):
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=20, verbose=0) as writer:
        for number, (image, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
            writer.write({"__key__": f"a/{number:06d}", "png": image, "txt": caption, "json": {"width": 8}})


def _save_to_disk(folder):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(COLUMNS, features).save_to_disk(folder, num_shards=3)


def _dataset_dict(folder):
    parts = {"train": datasets.Dataset.from_dict(COLUMNS), "test": datasets.Dataset.from_dict(COLUMNS).take(3)}
    datasets.DatasetDict(parts).save_to_disk(folder)


def _to_parquet(folder):
    datasets.Dataset.from_dict(COLUMNS).to_parquet(folder / "data.parquet", batch_size=7)


def _pyarrow(folder, **options):
    pq.write_table(pa.table(COLUMNS), folder / "data.parquet", row_group_size=7, **options)


def _pandas(folder):
    pandas.DataFrame(COLUMNS).to_parquet(folder / "data.parquet", index=False)


class Pairs(tfds.core.GeneratorBasedBuilder):
    """A dataset as users of TFDS write it."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, (image, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
            yield number, {"image": io.BytesIO(image), "caption": caption}


def _tfds(folder, file_format):
    Pairs(data_dir=str(folder), file_format=file_format).download_and_prepare()


def _examples():
    for image, caption in zip(IMAGES, CAPTIONS, strict=True):
        values = {"image": image, "caption": caption.encode()}
        feature = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])) for name, v in values.items()}
        yield tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def _array_record(folder):
    writer = array_record.python.array_record_module.ArrayRecordWriter(f"{folder}/data.array_record", "group_size:4")
    for example in _examples():
        writer.write(example)
    writer.close()


def _tfrecord(folder):
    with tf.io.TFRecordWriter(f"{folder}/data.tfrecord") as writer:
        for example in _examples():
            writer.write(example)


WRITERS = {
    "webdataset.ShardWriter": _webdataset,
    "datasets.save_to_disk": _save_to_disk,
    "datasets.DatasetDict": _dataset_dict,
    "datasets.to_parquet": _to_parquet,
    "pyarrow": _pyarrow,
    "pyarrow zstd": functools.partial(_pyarrow, compression="zstd", use_dictionary=False, data_page_version="2.0"),
    "pandas": _pandas,
    "tfds tfrecord": functools.partial(_tfds, file_format="tfrecord"),
    "tfds array_record": functools.partial(_tfds, file_format="array_record"),
    "array_record": _array_record,
    "tf.io.TFRecordWriter": _tfrecord,
}


def _numbers(source, rows):
    """Return the numbers of image and caption of a host's rows in the steps of an epoch."""
    ordered = source.order(0, BATCH) if hasattr(source, "order") else order.RecordOrder(len(source), 0)
    for step in range(COUNT // BATCH):
        if isinstance(ordered, order.BlockOrder):
            source.prefetch(np.concatenate(ordered.blocks(step, rows)))
        for example in ordered(step * BATCH + np.arange(rows.start, rows.stop))[1].tolist():
            record = source.read(example)
            red, _, _ = Image.open(io.BytesIO(record.image)).getpixel((0, 0))
            ((caption,),) = (texts for texts in record.captions.values() if any(texts))
            yield red // 5, int(caption.removeprefix("number "))


def _check_every_pair_once(files, **options):
    source = data.make_source(DataConfig(files=str(files), cache_dir="", options=options))
    for hosts in (1, 2, 3, 8):
        size = BATCH // hosts
        found = [pair for host in range(hosts) for pair in _numbers(source, slice(size * host, size * host + size))]
        assert sorted(found) == [(number, number) for number in range(COUNT)], hosts


@pytest.mark.filterwarnings("ignore:label.. is deprecated")  # TFDS with protobuf 6, which apache-beam pins
@pytest.mark.parametrize("writer", WRITERS)
def test_every_pair_is_read_once_on_any_number_of_hosts(tmp_path, writer):
    WRITERS[writer](tmp_path)
    _check_every_pair_once(tmp_path)


def test_parquet_by_row_groups(tmp_path):
    _pyarrow(tmp_path)
    _check_every_pair_once(tmp_path, memory_bytes=0)


def test_images_of_a_web_server(tmp_path):
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES):
        (tmp_path / f"images/{number}.png").write_bytes(image)
    handler = functools.partial(Quiet, directory=str(tmp_path / "images"))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        urls = [f"http://localhost:{server.server_port}/{number}.png" for number in range(COUNT)]
        pandas.DataFrame({"url": urls, "caption": CAPTIONS}).to_csv(tmp_path / "data.csv", index=False)
        _check_every_pair_once(tmp_path / "data.csv")
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Write no log."""
