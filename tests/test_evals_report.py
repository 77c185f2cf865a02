"""Report, table and panels: complete, without external resources, and with equal numbers."""

import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from clip_jax.evals import ranking
from clip_jax.evals.analysis import overlap, robustness
from clip_jax.evals.report import panels as panels_module
from clip_jax.evals.report.charts import overlap_chart, robustness_chart
from clip_jax.evals.report.panels import panels
from clip_jax.evals.report.tables import results, text_table
from clip_jax.evals.report.writing import render_page, write_report
from clip_jax.typing import EvalDataset

KEY = "retrieval/emoji_unseen/image_to_text/recall_at_5"
METRICS = {
    KEY: 0.3125,
    f"{KEY}/candidates": 180,
    f"{KEY}/chance": 5 / 180,
    f"{KEY}/threshold": 0.28,
    "retrieval/emoji_unseen/image_to_text/median_rank": 14.0,
    "retrieval/emoji_unseen/image_to_text/median_rank/candidates": 180,
    "retrieval/emoji_unseen/image_to_text/median_rank/chance": 90.5,
    "retrieval/emoji_unseen_de/image_to_text/recall_at_1": 0.0625,
    "retrieval/emoji_unseen_de/image_to_text/recall_at_5": 0.25,
    "retrieval/emoji_unseen_de/image_to_text/recall_at_5/chance": 5 / 180,
    "zeroshot/emoji_categories/top1": math.nan,
    "zeroshot/emoji_categories/top1/candidates": 8,
    "zeroshot/emoji_categories/top1/chance": 0.125,
    "zeroshot/emoji_categories/top1/majority_class": 0.2,
    "baseline/ridge_pixels_hog/emoji_unseen/image_to_text/recall_at_5": 0.361,
    "baseline/nearest_neighbor/emoji_unseen/image_to_text/recall_at_5": 0.1,
    "baseline/ridge_pixels_hog/elsewhere/image_to_text/recall_at_5": 0.5,
}
CURVES = [
    *(
        {"step": s, "loss": 5 / s, "accuracy/image_to_text": s / 100, "logit_scale": 14.3, "learning_rate": 1e-3}
        for s in range(1, 40)
    ),
    {"step": 40, "loss": None, "accuracy/image_to_text": math.nan},
    {"step": 20, KEY: 0.1, "retrieval/emoji_unseen_de/image_to_text/recall_at_5": 0.1},
    {"step": 40, KEY: 0.3125, "retrieval/emoji_unseen_de/image_to_text/recall_at_5": 0.25},
]
RUN = {
    "name": "emoji",
    "parameters": 2_013_441,
    "resumed": True,
    "config": {"model": {"image": {"widths": (8, 16)}}},
    "versions": {"jax": "0.10.2"},
    "skipped": {"emoji_vendor": "npm is missing"},
}


def png(color, size=(20, 20)):
    out = io.BytesIO()
    Image.new("RGBA", size, color).save(out, "PNG")
    return out.getvalue()


class FakeEmbedder:
    """Returns given embeddings of images and texts."""

    def __init__(self, images, texts, image_nE, text_mE):
        self.rows = dict(zip(images, image_nE, strict=True)) | dict(zip(texts, text_mE, strict=True))
        self.image = self.text = lambda items: np.stack([self.rows[i] for i in items]).astype(np.float32)


IMAGES = [png(c) for c in ("red", "green", "blue", "black")]
TEXTS = ["red", "green", "blue", "<script>alert('black')</script>"]
SET = EvalDataset("emoji_colors", IMAGES, [(t,) for t in TEXTS], np.arange(4), ["rouge", "vert", "bleu", "noir & <b>"])


def make_panels(image_nE=None, text_mE=None, **counts):
    eye = np.eye(4)
    embedder = FakeEmbedder(IMAGES, TEXTS, eye if image_nE is None else image_nE, eye if text_mE is None else text_mE)
    return panels(embedder, SET, **counts)


# ------------------------------------------------------------------------------------------------- numbers


def test_results_group_metrics_with_their_references():
    by_key = {r.key: r for r in results(METRICS)}
    recall = by_key[KEY]
    assert (recall.candidates, recall.baseline, recall.baseline_name, recall.threshold) == (
        180,
        0.361,
        "ridge pixels hog",
        0.28,
    )
    assert recall.passed and by_key["zeroshot/emoji_categories/top1"].baseline_name == "most frequent class"
    assert (
        f"{KEY}/chance" not in by_key
        and "baseline/ridge_pixels_hog/emoji_unseen/image_to_text/recall_at_5" not in by_key
    )
    assert (
        by_key["baseline/ridge_pixels_hog/elsewhere/image_to_text/recall_at_5"].value == 0.5
    )  # a baseline without its metric


@pytest.mark.parametrize("value, passed", [(0.28, True), (0.2799, False), (math.nan, False), (None, False)])
def test_a_threshold_is_passed_at_its_value_and_never_by_nan(value, passed):
    assert results({KEY: value, f"{KEY}/threshold": 0.28})[0].passed is passed


def test_ranks_pass_a_threshold_from_below():
    key = "retrieval/s/image_to_text/median_rank"
    assert [results({key: rank, f"{key}/threshold": 10})[0].passed for rank in (9, 11)] == [True, False]


def test_the_table_is_aligned_and_complete():
    lines = text_table(METRICS).splitlines()
    header, rule, *rows = lines
    assert header.split() == ["metric", "value", "candidates", "chance", "baseline", "threshold"]
    assert set(rule) == {"-"}
    recall = next(line for line in rows if line.startswith(KEY + " "))
    assert recall.split()[1:] == ["0.312", "180", "0.028", "0.361", "0.280", "passed"]
    for name, cell in (("value", "0.312"), ("candidates", "180"), ("chance", "0.028"), ("baseline", "0.361")):
        assert recall.index(cell) + len(cell) == header.index(name) + len(name)
    assert any("emoji_unseen_de/image_to_text/recall_at_5" in line for line in rows)
    assert not any("emoji_unseen_de/image_to_text/recall_at_1 " in line for line in rows)


def test_the_table_has_no_threshold_column_without_thresholds():
    assert "threshold" not in text_table({k: v for k, v in METRICS.items() if not k.endswith("/threshold")})


@pytest.mark.parametrize(
    ("protocol", "rule"),
    [
        ("expected", "Ties have their expected value."),
        ("published", "Ties are ordered by index, as in CLIP_benchmark."),
    ],
)
def test_ties_and_their_rule_are_in_the_table_and_on_the_page(protocol, rule):
    metrics = METRICS | {f"{KEY}/ties": 1234, f"{KEY}/by_index": 0.4375}
    header, _, *rows = text_table(metrics).splitlines()
    row = next(line for line in rows if line.startswith(KEY + " "))
    assert "ties  by index" in header and "1,234     0.438" in row
    assert "ties" not in text_table(METRICS)
    words = " ".join(Outline(render_page(metrics, [], [], RUN | {"protocol": protocol})).words)
    assert "1,234 ties, 0.438 by index" in words and rule in words


def test_report_json_is_one_flat_sorted_object_with_null_for_nan(tmp_path):
    write_report(tmp_path / "new" / "run", METRICS, CURVES, [], RUN)
    text = (tmp_path / "new/run/report.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert list(found) == sorted(found)
    assert all(value is None or isinstance(value, (int, float, str)) for value in found.values())
    assert not any(isinstance(value, bool) for value in found.values())
    assert (
        found[KEY] == 0.3125 and found[f"{KEY}/candidates"] == 180 and found["zeroshot/emoji_categories/top1"] is None
    )
    assert found["run/versions.jax"] == "0.10.2" and found["run/config.model.image.widths"] == "[8, 16]"
    assert {p.name for p in (tmp_path / "new/run").iterdir()} == {"report.json", "report.html"}


def test_a_report_read_from_json_has_the_same_table(tmp_path):
    write_report(tmp_path, METRICS, CURVES, [], RUN)
    found = json.loads((tmp_path / "report.json").read_text())
    metrics = {k: v for k, v in found.items() if not k.startswith("run/")}
    assert sorted(text_table(metrics).splitlines()) == sorted(text_table(METRICS).splitlines())


# ---------------------------------------------------------------------------------------------------- the page


class Outline(html.parser.HTMLParser):
    """Tags with their attributes; asserts that they are balanced."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def outline():
    return Outline(render_page(METRICS, CURVES, [make_panels()], RUN))


def test_the_page_has_no_external_resources_and_no_scripts(outline):
    for tag, attributes in outline.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in "".join(outline.words) and "@import" not in "".join(outline.words)


def test_texts_are_escaped(outline):
    assert any("<script>alert('black')</script>" in text for text in outline.words)  # as text, after decoding
    assert any("noir & <b>" in text for text in outline.words)


def test_the_page_has_numbers_baselines_thresholds_languages_config_and_skipped_datasets(outline):
    text = " ".join(" ".join(outline.words).split())
    for expected in (
        "0.312",
        "threshold 0.280 · baseline 0.361 · chance 0.028",
        "✓ threshold passed",
        "ridge pixels hog",
        "German",
    ):
        assert expected in text
    for expected in ("model.image.widths", "0.10.2", "emoji vendor skipped: npm is missing", "2,013,441"):
        assert expected in text
    assert "nan" not in text.lower().split()


def test_curves_have_charts_without_languages(outline):
    titles = [attributes["aria-label"] for tag, attributes in outline.tags if tag == "svg"]
    assert titles[:4] == ["Loss", "Contrastive accuracy in the batch", "Logit scale", "Learning rate"]
    assert titles[4:] == ["image → text recall@5, held out"]
    captions = render_page(METRICS, CURVES, [], RUN).split("<figcaption>")
    assert "emoji unseen</span>" in captions[-1] and "emoji unseen de" not in captions[-1]


def test_a_run_without_curves_panels_and_results_has_a_page():
    Outline(render_page({}, [], [], {}))


# ------------------------------------------------------------------------------------------------------ panels


def test_matches_are_sorted_and_correct_ones_are_marked():
    texts = np.array([[0.9, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    row = make_panels(text_mE=texts).text_to_image[0]
    assert row.query.text == "red"
    assert [m.text for m in row.matches][:2] == ["rouge", "vert"]
    assert [m.correct for m in row.matches] == [True, False, False, False]
    assert row.matches[0].score == pytest.approx(0.9 / math.hypot(0.9, 0.4), rel=1e-5)


def test_mistakes_are_sorted_by_lead_over_the_correct_text():
    images = np.eye(4)
    images[1] = [0.75, 0.66, 0, 0]  # predicts red, with a small lead over green
    images[2] = [0.6, 0.55, -0.58, 0]  # predicts red with a lower score and a large lead over blue
    found = make_panels(image_nE=images).mistakes
    assert [row.query.text for row in found] == ["bleu", "vert"]
    assert [(m.text, m.correct) for m in found[0].matches] == [("red", False), ("blue", True)]
    assert found[0].matches[0].score > found[0].matches[1].score
    assert make_panels().mistakes == ()


def test_mistakes_do_not_depend_on_the_block_size(monkeypatch):
    images = np.eye(4)[[0, 1, 0, 2]] + 0.1
    whole = make_panels(image_nE=images, mistakes=1)
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 1)
    # Compared by repr: scores of queries are NaN.
    assert repr(make_panels(image_nE=images, mistakes=1).mistakes) == repr(whole.mistakes) != repr(())


def test_queries_are_evenly_spaced():
    assert [row.query.text for row in make_panels(texts=2, images=3).text_to_image] == ["red", TEXTS[3]]
    assert len(make_panels(images=3).image_to_text) == 3 and len(make_panels(matches=2).image_to_text[0].matches) == 2


def test_the_page_of_a_nan_model_has_no_scores():
    broken = make_panels(image_nE=np.full((4, 4), np.nan))
    assert all(row.matches == () for row in broken.image_to_text) and broken.mistakes == ()
    assert "no finite score" in render_page(METRICS, [], [broken], RUN)


def test_thumbnails_are_small_and_keep_transparency():
    uri = panels_module.thumbnail(png((255, 0, 0, 0), (400, 100)))
    kind, data = uri.split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/webp;base64" and image.size == (96, 24) and image.mode == "RGBA"


@pytest.mark.parametrize("kind", ["robustness", "overlap"])
def test_plots_use_the_colors_of_the_page_in_light_and_dark_mode(tmp_path, kind):
    svg = {
        "robustness": lambda: robustness_chart(
            robustness.LinearFit(1.0, -0.5, 2), [(0.6, 0.5)], {"<mine>": (0.7, 0.6)}
        ),
        "overlap": lambda: overlap_chart({"<mine>": overlap.analyze_overlap(np.arange(9) % 2 == 0, np.arange(9) < 3)}),
    }[kind]()
    write_report(tmp_path, METRICS, CURVES, [], RUN, {kind: svg})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert svg in text and f"<h2>{kind.capitalize()}</h2>" in text and kind not in render_page(METRICS, CURVES, [], RUN)
    style = text.partition("<style>")[2].partition("</style>")[0]
    # Page: the first `:root` is light, the second dark. Plot: light colors precede @media, dark ones are inside.
    light, dark = (set(re.findall(r"--\w[\w-]*: (#\w+)", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S))
    before, inside = (
        set(re.findall(r"#[0-9a-f]{6}", p)) for p in re.split(r"@media ?\(prefers-color-scheme: ?dark\)", svg)
    )
    assert before and before <= light and inside and inside <= dark and len(before) == len(inside)
