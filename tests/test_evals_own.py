"""The user's own data as evaluation datasets: `folder:/my/test`, `wds:…`, `tfrecord:…`, `table:…`."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from clip_jax import main
from clip_jax.config import Config, DataConfig, EvalConfig, EvalTask
from clip_jax.data import SOURCES, reads_files
from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.evals import load, suite
from clip_jax.evals.datasets import own
from clip_jax.evals.datasets.webdataset import read_webdataset
from clip_jax.evals.report.tables import open_clip_csv
from tests import object_store
from tests.evaluations import flat_image, value_of, write_classes, write_shards, write_text
from tests.tiny_dataset import make_model


class ByValue:
    """Embeds an image of `flat_image` and a text by their number: matching pairs have equal embeddings."""

    def image(self, images):
        return np.eye(300, dtype=np.float32)[[value_of(image) for image in images]]

    def text(self, texts):
        return np.eye(300, dtype=np.float32)[[int("".join(filter(str.isdigit, text))) for text in texts]]


def write_pairs(folder, count=6):
    for number in range(count):
        write_text(folder / f"{number}.txt", f"thing {number}\n")
        (folder / f"{number}.png").write_bytes(flat_image(number))
    return folder


def write_class_folders(folder):
    for number, name in enumerate(("10", "11", "12")):
        (folder / name).mkdir(parents=True)
        for row in range(2):
            (folder / name / f"{row}.png").write_bytes(flat_image(10 + number))
    return folder


def evaluated(*names, **options):
    return suite.evaluate(make_model(ByValue()), names, ("zeroshot", "retrieval"), load.LoadOptions(**options))


def test_class_folders_are_classified_and_pairs_retrieved(tmp_path):
    classes, pairs = write_class_folders(tmp_path / "classes"), write_pairs(tmp_path / "pairs")
    write_tfrecord(tmp_path / "0.tfrecord", [{"png": flat_image(n), "txt": f"thing {n}"} for n in range(6)])
    write_text(tmp_path / "table.csv", "image,caption\n" + "".join(f"pairs/{n}.png,thing {n}\n" for n in range(6)))
    files = {"tfrecord": tmp_path / "*.tfrecord", "table": tmp_path / "table.csv", "folder": pairs}
    names = [f"folder:{classes}", *(f"{format}:{path}" for format, path in files.items())]
    assert [load.find(name).task for name in names] == ["zeroshot", *["retrieval"] * 3]
    report = evaluated(*names, templates="name")
    assert not report.failed and not report.skipped
    name = load.find(names[0]).name
    assert name.endswith("test_class_folders_are_classif0_classes")  # the path, without separators of metric keys
    assert report.metrics[f"zeroshot/{name}/top1"] == 1 and report.metrics[f"zeroshot/{name}/top1/candidates"] == 3
    for other in names[1:]:
        name = load.find(other).name
        assert report.metrics[f"retrieval/{name}/image_to_text/recall_at_1"] == 1
        assert report.metrics[f"retrieval/{name}/image_to_text/recall_at_1/candidates"] == 6
    header, row = open_clip_csv("x", "y", 1, 1.0, report.metrics, [load.find(name) for name in names]).splitlines()
    assert header.endswith(",".join(names)) and row.endswith("1.0000,1.0000,1.0000,1.0000")


def test_shards_are_read_as_those_of_the_registry(tmp_path):
    """Class ids, names, templates and pixels equal those of `--data_dir`; alpha is dropped."""
    transparent = io.BytesIO()
    Image.new("RGBA", (8, 8), (250, 0, 0, 30)).save(transparent, "PNG")
    images = [*(flat_image(10 + row % 3) for row in range(5)), transparent.getvalue()]
    write_classes(tmp_path / "wds", images, [row % 3 for row in range(6)], ["10", "11", "12"])
    expected = read_webdataset(tmp_path / "wds", "test")
    for files in ("wds/test/{0..1}.tar", "wds/test", "wds/test/*.tar"):
        row = load.find(f"wds:{tmp_path}/{files}")
        assert (row.task, row.metric) == ("zeroshot", "top1")
        found = row.read(DataConfig())
        assert found.targets.tolist() == expected.targets.tolist()
        assert (found.class_names, found.templates) == (expected.class_names, expected.templates)
        assert list(found.images) == list(expected.images) and value_of(found.images[5]) == 250
    report = evaluated(f"wds:{tmp_path}/wds/test", class_names="")
    (metric,) = (value for key, value in report.metrics.items() if key.endswith("/top1"))
    assert metric == pytest.approx((5 + 1 / 3) / 6)  # the last image is none of the classes


@pytest.mark.parametrize("folder", ["test", ""])
def test_class_names_and_templates_of_remote_shards_are_read(tmp_path, folder):
    write_classes(tmp_path / "wds", [flat_image(10), flat_image(11)], [0, 1], ["10", "11"])
    files = {path.name: path for path in (tmp_path / "wds").rglob("*.t*") if path.is_file()}
    objects = {f"bucket/test/{name}": path.read_bytes() for name, path in files.items() if name.endswith(".tar")}
    names = {name: path.read_bytes() for name, path in files.items() if name.endswith(".txt")}
    objects |= {f"bucket/{folder}/{name}".replace("//", "/"): content for name, content in names.items()}
    expected = read_webdataset(tmp_path / "wds", "test")
    with object_store.serve(objects) as served:
        for root in ("gs://bucket", "s3://bucket", f"{served.url}/bucket"):
            found = load.find(f"wds:{root}/test/0.tar").read(DataConfig(cache_dir=""))
            assert (found.class_names, found.templates) == (expected.class_names, expected.templates)
            assert found.class_names == ("10", "11")


def test_captions_of_a_shard_are_lines_of_text_or_values_of_json(tmp_path):
    samples = [{"png": flat_image(n), "txt": f"thing {n}\n\n{n} things\n".encode()} for n in range(4)]
    samples += [{"png": flat_image(4), "json": b'{"caption": "thing 4", "url": "x"}'}]
    write_shards(tmp_path / "wds", samples, kind="retrieval")
    found = load.find(f"wds:{tmp_path}/wds/test").read(DataConfig())
    assert found.captions == [*((f"thing {n}", f"{n} things") for n in range(4)), ("thing 4",)]
    assert found.targets is None


def test_tasks_of_training_have_the_captions_of_the_config_and_their_own_names(tmp_path):
    write_tfrecord(tmp_path / "0.tfrecord", [{"png": flat_image(n), "alt": f"thing {n}"} for n in range(6)])
    write_class_folders(tmp_path / "classes")
    tasks = {
        "pairs": EvalTask("retrieval", f"tfrecord:{tmp_path}/0.tfrecord"),
        "birds": EvalTask("zeroshot", f"folder:{tmp_path}/classes"),
    }
    loaded = suite.load_suite(EvalConfig(tasks=tasks), DataConfig(captions={"alt": 1.0}))
    metrics = loaded.evaluate(ByValue())
    assert metrics["retrieval/pairs/text_to_image/recall_at_1"] == 1 and metrics["zeroshot/birds/top1"] == 1
    with pytest.raises(ValueError, match="sample '.*0.tfrecord#0': expected a caption in name, got none"):
        suite.load_suite(EvalConfig(tasks=tasks), DataConfig(captions={"name": 1.0}))


def test_every_format_is_a_source_of_files():
    assert all(reads_files(source) and source in SOURCES for source in own.FORMATS.values())


def test_own_data_that_does_not_exist_is_refused_by_its_key(tmp_path):
    for name, message in {
        "folders:/my/test": r"expected <format>:<files>, one of folder:/my/test, wds:",
        "folder:": r"expected <format>:<files>",
        f"folder:{tmp_path}/none": r"expected a local folder of images, got none",
        f"wds:{tmp_path}/{{0..3}}.tar": r"'.*/0.tar' does not exist",
        f"tfrecord:{tmp_path}/*.tfrecord": r"matches no file",
    }.items():
        with pytest.raises(ValueError, match=f"dataset '{name.partition(':')[0]}:.*{message}"):
            load.expand(["digits", name])
        with pytest.raises(ValueError, match=message):
            main._check_names(Config(eval=EvalConfig(tasks={"mine": EvalTask("retrieval", name)})))
    write_pairs(tmp_path / "a-b")
    write_pairs(tmp_path / "a_b")
    with pytest.raises(ValueError, match=r"'folder:.*/a-b' and 'folder:.*/a_b': both are '.*a_b' in metrics"):
        load.expand([f"folder:{tmp_path}/a-b", f"folder:{tmp_path}/a_b"])


def test_unusable_samples_are_named(tmp_path):
    def split(samples, names=(), kind="retrieval"):
        at = tmp_path / str(len(list(tmp_path.iterdir())))
        write_shards(at, samples, class_names=names, kind=kind)
        return load.find(f"wds:{at}/test").read(DataConfig())

    good = {"png": flat_image(1), "cls": b"1"}
    with pytest.raises(ValueError, match=r"sample 's0000001': .cls: expected a class id such as 7, got 'one'"):
        split([good, {"png": flat_image(1), "cls": b"one"}])
    with pytest.raises(ValueError, match=r"sample 's0000001': .cls: expected a class id such as 7, got ''"):
        split([good, {"png": flat_image(1), "txt": b"one"}])
    with pytest.raises(ValueError, match=r"classnames.txt: expected 2 classes or more, got 1"):
        split([good, good], ["10"])
    with pytest.raises(ValueError, match=r"sample 's0000001': expected a caption in txt, caption, got none"):
        split([{"png": flat_image(1), "txt": b"one"}, {"png": flat_image(1), "txt": b" \n"}])
    with pytest.raises(ValueError, match=r"1.tar#0: no image; members are s0000001.txt"):
        split([{"png": flat_image(1), "txt": b"one"}, {"txt": b"two"}])
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(flat_image(1))
            tar.addfile(member, io.BytesIO(flat_image(1)))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:4200])
    with pytest.raises(ValueError, match=r"of the data is lost in 1 of 1 shards"):
        load.find(f"wds:{tmp_path}/cut.tar")
