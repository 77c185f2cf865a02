"""`python -m clip_jax.evaluate` on suites with a few images per dataset, against independent computations."""

import csv

import numpy as np
import pytest

import clip_jax
from clip_jax.config import WeightsConfig
from clip_jax.evals.analysis.robustness import SHIFTS
from clip_jax.evals.datasets.registry import DATASETS, SUITES
from clip_jax.interop import msgpack
from tests import tiny_models
from tests.evaluations import png_image, report, run, write_classes, write_shards

EXACT = 1e-12  # fractions of a few images
ROUNDED = 5e-5  # in the CSV


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    architecture = tiny_models.ARCHITECTURES["vit"]
    path = tmp_path_factory.mktemp("weights") / "tiny.msgpack"
    msgpack.write(path, tiny_models.params(architecture), WeightsConfig(architecture))
    return path


@pytest.fixture(scope="module")
def model(weights):
    return clip_jax.load(weights)


def evaluated(weights, data, out, *flags):
    """Return report.json, the row of the CSV, and the page."""
    ((printed, _),) = run(
        f"--weights={weights}", f"--data_dir={data}", f"--out={out}", "--cache_dir=", *flags, tiny=True
    )
    assert "failed" not in printed and "skipped" not in printed
    (row,) = csv.DictReader((out / "open_clip.csv").open())
    return report(out), row, (out / "report.html").read_text()


def test_retrieval_of_tiny_flickr_and_coco(weights, model, tmp_path):
    expected = {}
    for first, (name, captions_each) in enumerate({"flickr30k": 2, "mscoco": 3}.items()):
        images = [png_image(1000 * first + row) for row in range(8)]
        captions = [[f"thing {row} from side {side} of {name}" for side in range(captions_each)] for row in range(8)]
        samples = [
            {"png": data, "txt": "\n".join(texts).encode()} for data, texts in zip(images, captions, strict=True)
        ]
        write_shards(tmp_path / "data" / DATASETS[name].folder, samples, kind="retrieval")
        cosines_nM = model.encode_image(images) @ model.encode_text([c for texts in captions for c in texts]).T
        image_M = np.repeat(np.arange(8), captions_each)
        expected[name] = (
            float(np.mean(image_M[cosines_nM.argmax(1)] == np.arange(8))),
            float(np.mean(cosines_nM.argmax(0) == image_M)),
        )
    found, row, page = evaluated(weights, tmp_path / "data", tmp_path / "out", "--datasets=retrieval")
    for name, (to_text, to_image) in expected.items():
        assert found[f"retrieval/{name}/image_to_text/recall_at_1"] == pytest.approx(to_text, abs=EXACT)
        assert found[f"retrieval/{name}/text_to_image/recall_at_1"] == pytest.approx(to_image, abs=EXACT)
        assert float(row[DATASETS[name].title]) == pytest.approx((to_text + to_image) / 2, abs=ROUNDED)
        assert f"{to_image:.3f}</td>" in page
    assert len({*expected["flickr30k"], *expected["mscoco"]}) > 1  # otherwise the test would be weak
    assert row["params (M)"] == f"{found['run/parameters'] / 1e6:.2f}" != "0.00"


def test_robustness_of_tiny_imagenets(weights, model, tmp_path):
    accuracies, correct = {}, {"imagenet": 6, "imagenet_v2": 5, "imagenet_a": 1, "imagenet_r": 4, "objectnet": 2}
    for first, name in enumerate(SUITES["robustness"]):
        names = [f"{name} thing {class_id}" for class_id in range(DATASETS[name].classes)]
        images = [png_image(1000 * first + row) for row in range(8)]
        cosines_nQ = model.encode_image(images) @ model.encode_text([f"a photo of a {one}." for one in names]).T
        predicted_n = cosines_nQ.argmax(1)
        # The first images get the predicted class, the others the next one.
        class_ids = np.where(np.arange(8) < correct.get(name, 3), predicted_n, (predicted_n + 1) % len(names))
        write_classes(tmp_path / "data" / DATASETS[name].folder, images, class_ids.tolist(), names)
        accuracies[name] = correct.get(name, 3) / 8
    columns = ("imagenet", *SHIFTS)
    baselines = tmp_path / "models.csv"
    standard = [("small", 0.5, 0.2), ("middle", 0.6, 0.3), ("large", 0.8, 0.5)]
    lines = [",".join(["model", *columns]), *(",".join(map(str, [n, x, *[y] * 5])) for n, x, y in standard)]
    baselines.write_text("\n".join(lines) + "\n")
    flags = ("--datasets=robustness", f"--standard_models={baselines}")
    found, row, page = evaluated(weights, tmp_path / "data", tmp_path / "out", *flags)
    for name, accuracy in accuracies.items():
        assert found[f"zeroshot/{name}/top1"] == accuracy
        assert row[DATASETS[name].title] == f"{accuracy:.4f}"
    average = sum(accuracies[name] for name in SHIFTS) / len(SHIFTS)
    assert found["robustness/shifts/average"] == pytest.approx(average, abs=EXACT)
    assert found["robustness/shifts/gap"] == pytest.approx(accuracies["imagenet"] - average, abs=EXACT)
    logit = lambda p: np.log(np.asarray(p) / (1 - np.asarray(p)))  # noqa: E731
    line = np.polyfit(logit([x for _, x, _ in standard]), logit([y for *_, y in standard]), 1)
    expected = 1 / (1 + np.exp(-np.polyval(line, logit(accuracies["imagenet"]))))
    assert found["robustness/shifts/effective"] == pytest.approx(average - expected, abs=1e-9)
    assert (tmp_path / "out/robustness.svg").read_text() in page and "<h2>Robustness</h2>" in page
    assert row["Average perf. on 38 datasets"] == ""
