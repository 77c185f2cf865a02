"""WinoGAViL associations: by hand, against scikit-learn's Jaccard index as in datacomp, and broken models."""

import dataclasses
import json

import numpy as np
import pytest

from clip_jax.evals import load, suite
from clip_jax.evals.datasets import registry
from clip_jax.evals.load import load_split
from clip_jax.evals.metrics import Undefined
from clip_jax.evals.zeroshot import chance_jaccard, cue_prompt, zeroshot
from clip_jax.typing import Cue, DatasetSplit, EvalDataset, Unavailable
from tests.evaluations import png_image
from tests.tiny_dataset import Constant, NotANumber, Perfect, make_model, register

EXACT = 1e-12  # means of fractions
IMAGES = [f"{number} 0".encode() for number in range(40)]


class Lookup:
    """Embeds images and texts by looking up the row of their number."""

    def __init__(self, image_nE, text_mE):
        self.image_nE, self.text_mE = (np.asarray(x, np.float32) for x in (image_nE, text_mE))

    def image(self, images):
        return self.image_nE[[int(image.split()[0]) for image in images]]

    def text(self, texts):
        return self.text_mE[[int(text.split()[-1]) for text in texts]]


def cue(text, candidates, associated):
    return Cue(text, np.array(candidates, np.int64), np.isin(candidates, associated))


def evaluate_cues(embedder, cues, prompts):
    return zeroshot(embedder, EvalDataset("tiny", IMAGES, prompts, None, cues=cues))


def test_jaccard_by_hand():
    """Cosines decrease with the number of the image, so the candidates with the lowest numbers are selected."""
    angles = np.linspace(0, 1.5, 40)
    embedder = Lookup(np.stack([np.cos(angles), np.sin(angles)], 1), [[1.0, 0.0]])
    cues = [
        cue("0", range(10), [0, 1, 2]),  # all selected: 1
        cue("0", range(3, 15), [3, 4, 13]),  # 3, 4, 5 are selected: 2 of 4
        cue("0", [30, 20, 10, 5, 0], [0, 30]),  # 0, 5 are selected: 1 of 3; but only 5 candidates
    ]
    found = evaluate_cues(embedder, cues, [("a 0",)] * 3)
    assert found["zeroshot/tiny/jaccard"] == pytest.approx((1 + 1 / 2) / 2, abs=EXACT)
    assert found["zeroshot/tiny/jaccard_all"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=EXACT)
    assert found["zeroshot/tiny/jaccard/candidates"] == 11 and found["zeroshot/tiny/jaccard_all/candidates"] == 9
    assert found["zeroshot/tiny/jaccard/ci_low"] <= 0.75 <= found["zeroshot/tiny/jaccard/ci_high"]
    with pytest.raises(Undefined, match="at least 10 candidates, got none among 1 cues"):
        evaluate_cues(embedder, cues[2:], [("a 0",)])


def random_cues(rng, count):
    cues = []
    for number in range(count):
        candidates = rng.choice(40, rng.choice([5, 6, 10, 12]), replace=False)
        cues.append(cue(str(number), candidates, rng.choice(candidates, rng.integers(1, 4), replace=False)))
    return cues


def test_jaccard_against_datacomp():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    embedder, cues = Lookup(rng.normal(size=(40, 8)), rng.normal(size=(60, 8))), random_cues(rng, 60)
    image_nE, text_mE = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (embedder.image_nE, embedder.text_mE))
    scores, sizes = [], np.array([len(one.candidates) for one in cues])
    for number, one in enumerate(cues):
        selected = np.argsort(image_nE[one.candidates] @ text_mE[number])[-one.associated.sum() :]
        scores.append(metrics.jaccard_score(one.associated, np.isin(np.arange(len(one.associated)), selected)))
    found = evaluate_cues(embedder, cues, [(f"a {number}",) for number in range(60)])
    assert found["zeroshot/tiny/jaccard"] == pytest.approx(np.mean(np.array(scores)[sizes >= 10]), abs=EXACT)
    assert found["zeroshot/tiny/jaccard_all"] == pytest.approx(np.mean(scores), abs=EXACT)


def test_random_embeddings_reach_chance():
    assert chance_jaccard(10, 1) == pytest.approx(1 / 10, abs=EXACT)
    assert chance_jaccard(4, 2) == pytest.approx(
        (1 + 4 / 3) / 6, abs=EXACT
    )  # of 6 selections one has both, four have one
    assert chance_jaccard(3, 2) == pytest.approx((1 + 2 / 3) / 3, abs=EXACT)
    rng = np.random.default_rng(1)
    embedder, cues = Lookup(rng.normal(size=(40, 64)), rng.normal(size=(2000, 64))), random_cues(rng, 2000)
    found = evaluate_cues(embedder, cues, [(f"a {number}",) for number in range(2000)])
    # 2,000 values with a standard deviation of some 0.25: a standard error of 0.006.
    assert found["zeroshot/tiny/jaccard_all"] == pytest.approx(found["zeroshot/tiny/jaccard_all/chance"], abs=0.025)


@pytest.mark.parametrize("broken", [Constant, NotANumber])
def test_broken_models_are_at_chance(broken):
    cues = random_cues(np.random.default_rng(2), 30)
    found = evaluate_cues(broken(), cues, [("a 0",)] * 30)
    for metric in ("jaccard", "jaccard_all"):
        assert found[f"zeroshot/tiny/{metric}"] == pytest.approx(found[f"zeroshot/tiny/{metric}/chance"])
        assert found[f"zeroshot/tiny/{metric}/ties"] > 0


def test_the_prompt_is_datacomps():
    assert [cue_prompt(text) for text in ("Wing", "egg", "Umbrella")] == ["A wing", "An egg", "An umbrella"]


ROW = dataclasses.replace(registry.DATASETS["winogavil"], name="tiny", size=2)


def evaluate(monkeypatch, split, evaluators=("zeroshot",), **options):
    register(monkeypatch, ROW)
    monkeypatch.setattr(load, "load_split", lambda *_: split)
    return suite.evaluate(make_model(Perfect()), ["tiny"], evaluators, load.LoadOptions(**options))


def test_winogavil_is_evaluated_by_zeroshot_only_and_described(monkeypatch):
    # Perfect embeds an image and a text of the same number as the same vector.
    split = DatasetSplit(IMAGES[:20], None, cues=(cue("thing 3", range(10), [3]), cue("thing 14", range(10, 20), [14])))
    report = evaluate(monkeypatch, split, ("zeroshot", "overlap", "bias"))
    assert report.metrics["zeroshot/tiny/jaccard"] == 1 and report.failed == {}
    description = report.descriptions["zeroshot/tiny"]
    for part in ("20 images", "2 cues, such as 'A thing 3'", "metric jaccard"):
        assert part in description
    assert set(report.descriptions) == {"zeroshot/tiny"} and report.skipped == {}
    assert "'a photo of a thing 3.'" in evaluate(monkeypatch, split, templates="photo").descriptions["zeroshot/tiny"]
    fewer = dataclasses.replace(split, cues=split.cues[:1])
    assert "expected 2 cues in the test split, found 1" in evaluate(monkeypatch, fewer).skipped["zeroshot/tiny"]


def test_winogavil_is_loaded_from_its_folder_and_its_absence_explained(tmp_path):
    row = registry.DATASETS["winogavil"]
    with pytest.raises(Unavailable, match=r"winogavil/test is not a folder(.|\n)*lines of associations\.jsonl"):
        load_split(row, "test", str(tmp_path))
    folder = tmp_path / "winogavil" / "test"
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / f"{name}.png").write_bytes(png_image(ord(name)))
    line = {"cue": "wing", "candidates": ["a.png", "b.png"], "associations": ["b.png"]}
    (folder / "associations.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = load_split(row, "test", str(tmp_path)).cues
    assert found.text == "wing" and found.associated.tolist() == [False, True]
