"""Associations by hand, by scikit-learn's Jaccard as datacomp calls it, and by models that are broken."""

import dataclasses
import json

import numpy as np
import pytest

from clip_jax.evals import benchmark
from clip_jax.evals.association import association, chance, wording
from clip_jax.evals.datasets import registry
from clip_jax.evals.datasets.load import load_split
from clip_jax.evals.metrics import Undefined
from clip_jax.typing import Cue, DatasetSplit, Unavailable
from tests.evaluations import picture
from tests.tiny_benchmark import Constant, NotANumber, Perfect, subject

EXACT = 1e-12  # means of fractions
IMAGES = [f"{number} 0".encode() for number in range(40)]


class Given:
    """Vectors of pictures and texts by their number."""

    def __init__(self, image_nE, text_mE):
        self.image_nE, self.text_mE = (np.asarray(x, np.float32) for x in (image_nE, text_mE))

    def image(self, images):
        return self.image_nE[[int(image.split()[0]) for image in images]]

    def text(self, texts):
        return self.text_mE[[int(text.split()[-1]) for text in texts]]


def cue(text, candidates, right):
    return Cue(text, np.array(candidates, np.int64), np.isin(candidates, right))


def test_numbers_by_hand():
    """Cosines fall with the picture's number, so the first candidates are chosen."""
    angles = np.linspace(0, 1.5, 40)
    embedder = Given(np.stack([np.cos(angles), np.sin(angles)], 1), [[1.0, 0.0]])
    cues = [
        cue("0", range(10), [0, 1, 2]),  # all found: 1
        cue("0", range(3, 15), [3, 4, 13]),  # 3, 4, 5 are chosen: 2 of 4
        cue("0", [30, 20, 10, 5, 0], [0, 30]),  # 0, 5 are chosen: 1 of 3; but 5 candidates
    ]
    found = association(embedder, "tiny", IMAGES, cues, [("a 0",)] * 3)
    assert found["zeroshot/tiny/jaccard"] == pytest.approx((1 + 1 / 2) / 2, abs=EXACT)
    assert found["zeroshot/tiny/jaccard_all"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=EXACT)
    assert found["zeroshot/tiny/jaccard/candidates"] == 11 and found["zeroshot/tiny/jaccard_all/candidates"] == 9
    assert found["zeroshot/tiny/jaccard/ci_low"] <= 0.75 <= found["zeroshot/tiny/jaccard/ci_high"]
    with pytest.raises(Undefined, match="none of the 1 cues has 10 candidates"):
        association(embedder, "tiny", IMAGES, cues[2:], [("a 0",)])


def random_cues(rng, count):
    cues = []
    for number in range(count):
        candidates = rng.choice(40, rng.choice([5, 6, 10, 12]), replace=False)
        cues.append(cue(str(number), candidates, rng.choice(candidates, rng.integers(1, 4), replace=False)))
    return cues


def test_it_agrees_with_what_datacomp_computes():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    embedder, cues = Given(rng.normal(size=(40, 8)), rng.normal(size=(60, 8))), random_cues(rng, 60)
    image_nE, text_mE = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (embedder.image_nE, embedder.text_mE))
    scores, sizes = [], np.array([len(one.candidates) for one in cues])
    for number, one in enumerate(cues):
        chosen = np.argsort(image_nE[one.candidates] @ text_mE[number])[-one.right.sum() :]
        scores.append(metrics.jaccard_score(one.right, np.isin(np.arange(len(one.right)), chosen)))
    found = association(embedder, "tiny", IMAGES, cues, [(f"a {number}",) for number in range(60)])
    assert found["zeroshot/tiny/jaccard"] == pytest.approx(np.mean(np.array(scores)[sizes >= 10]), abs=EXACT)
    assert found["zeroshot/tiny/jaccard_all"] == pytest.approx(np.mean(scores), abs=EXACT)


def test_chance_is_what_random_vectors_reach():
    assert chance(10, 1) == pytest.approx(1 / 10, abs=EXACT)
    assert chance(4, 2) == pytest.approx((1 + 4 / 3) / 6, abs=EXACT)  # of 6 pairs one is right, four are right by half
    assert chance(3, 2) == pytest.approx((1 + 2 / 3) / 3, abs=EXACT)
    rng = np.random.default_rng(1)
    embedder, cues = Given(rng.normal(size=(40, 64)), rng.normal(size=(2000, 64))), random_cues(rng, 2000)
    found = association(embedder, "tiny", IMAGES, cues, [(f"a {number}",) for number in range(2000)])
    # 2,000 values with a standard deviation of some 0.25: a standard error of 0.006.
    assert found["zeroshot/tiny/jaccard_all"] == pytest.approx(found["zeroshot/tiny/jaccard_all/chance"], abs=0.025)


@pytest.mark.parametrize("broken", [Constant, NotANumber])
def test_broken_models_are_no_better_than_chance(broken):
    cues = random_cues(np.random.default_rng(2), 30)
    found = association(broken(), "tiny", IMAGES, cues, [("a 0",)] * 30)
    for measure in ("jaccard", "jaccard_all"):
        assert 0 <= found[f"zeroshot/tiny/{measure}"] <= found[f"zeroshot/tiny/{measure}/chance"]


def test_the_cue_s_sentence_is_datacomp_s():
    assert [wording(text) for text in ("Wing", "egg", "Umbrella")] == ["A wing", "An egg", "An umbrella"]


ROW = dataclasses.replace(registry.DATASETS["winogavil"], name="tiny", size=2)


def asked(monkeypatch, split, tasks=("zeroshot",), **options):
    monkeypatch.setattr(benchmark, "DATASETS", {"tiny": ROW})
    return benchmark.evaluate(subject(Perfect()), ["tiny"], tasks, lambda *_: split, benchmark.Options(**options))


def test_it_is_asked_as_the_registry_s_set_and_says_what_it_is_of(monkeypatch):
    # Perfect gives a picture and a text of the same number the same vector.
    split = DatasetSplit(IMAGES[:20], None, cues=(cue("thing 3", range(10), [3]), cue("thing 14", range(10, 20), [14])))
    outcome = asked(monkeypatch, split, ("zeroshot", "overlap", "bias"))
    assert outcome.metrics["zeroshot/tiny/jaccard"] == 1 and outcome.failed == {}
    said = outcome.described["zeroshot/tiny"]
    assert "20 pictures" in said and "2 cues, such as 'A thing 3'" in said and "metric jaccard" in said
    assert set(outcome.skipped) == {"overlap/tiny", "bias/tiny"}
    assert "'a photo of a thing 3.'" in asked(monkeypatch, split, templates="photo").described["zeroshot/tiny"]
    fewer = dataclasses.replace(split, cues=split.cues[:1])
    assert "has 2 cues, and 1 were found" in asked(monkeypatch, fewer).skipped["zeroshot/tiny"]


def test_it_is_found_in_its_folder_and_missed_with_what_brings_it(tmp_path):
    row = registry.DATASETS["winogavil"]
    with pytest.raises(Unavailable, match=r"winogavil/test is not a folder(.|\n)*lines of associations\.jsonl"):
        load_split(row, "test", str(tmp_path))
    folder = tmp_path / "winogavil" / "test"
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / f"{name}.png").write_bytes(picture(ord(name)))
    line = {"cue": "wing", "candidates": ["a.png", "b.png"], "associations": ["b.png"]}
    (folder / "associations.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = load_split(row, "test", str(tmp_path)).cues
    assert found.text == "wing" and found.right.tolist() == [False, True]
