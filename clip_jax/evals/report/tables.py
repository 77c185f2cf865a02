"""Results with their reference values, and as text: console table, row of open_clip's table, model card.

Metric keys are paths. Below a metric `a/b/c` are its reference values: `a/b/c/candidates`, `/chance`, `/majority_class`
(accuracy of a classifier that always predicts the most frequent class), `/threshold` (required value), `/ci_low` and
`/ci_high` (confidence interval; few-shot: `/min` and `/max` over draws) and `/published` (value reported for OpenAI's
weights); with ties `/ties` (number of tied examples) and `/by_index` (the value with ties ordered by index, as
CLIP_benchmark's). Its baseline is the best of all `baseline/<name>/b/c`.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.resources
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clip_jax.evals.datasets.registry import DATASETS, SUITES, Dataset
from clip_jax.typing import Number

if TYPE_CHECKING:
    from clip_jax.config import WeightsConfig
    from clip_jax.evals.suite import EvalReport

REFERENCES = (
    "candidates", "chance", "majority_class", "threshold", "ci_low", "ci_high", "min", "max", "published", "ties",
    "by_index",
)  # fmt: skip
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "ru": "Russian",
    "tr": "Turkish", "zh": "Chinese",
}  # fmt: skip
# The columns of open_clip's docs/openclip_results.csv as of 89fb801, in its order: datacomp's, with ImageNet first.
# fmt: off
_ORDER = (
    "imagenet", "caltech101", "cifar10", "cifar100", "clevr_counts_vtab", "clevr_distance", "country211", "dtd",
    "eurosat_vtab", "fgvc_aircraft", "food101", "gtsrb", "imagenet_sketch", "imagenet_v2", "imagenet_a", "imagenet_o",
    "imagenet_r", "kitti", "mnist", "objectnet", "flowers102", "pets", "voc2007_crops", "pcam", "rendered_sst2",
    "resisc45_vtab", "stanford_cars", "stl10", "sun397_all", "svhn", "flickr30k", "mscoco", "winogavil", "iwildcam",
    "camelyon17", "fmow", "dollar_street", "geode",
)
# fmt: on
_AVERAGE = "Average perf. on 38 datasets"


@dataclasses.dataclass(frozen=True)
class Result:
    """A metric and its reference values; None where a reference is not available."""

    key: str
    value: float
    candidates: float | None = None
    chance: float | None = None
    baseline: float | None = None
    baseline_name: str = ""
    threshold: float | None = None
    low: float | None = None  # of the confidence interval, or of the range over few-shot draws
    high: float | None = None
    published: float | None = None
    ties: float | None = None
    by_index: float | None = None

    @property
    def dataset(self) -> str:
        return self.key.split("/")[1] if self.key.count("/") >= 2 else self.key

    @property
    def evaluator(self) -> str:
        return self.key.split("/")[0] if self.key.count("/") >= 2 else ""

    @property
    def metric(self) -> str:
        return self.key.split("/", 2)[2] if self.key.count("/") >= 2 else self.key

    @property
    def is_rank(self) -> bool:
        """Whether the value is a rank (lower is better) and not a fraction."""
        return self.key.endswith("_rank")

    @property
    def passed(self) -> bool | None:
        """Whether the value reaches the threshold; None without one."""
        if self.threshold is None:
            return None
        return self.value <= self.threshold if self.is_rank else self.value >= self.threshold

    @property
    def interval(self) -> str:
        """The confidence interval as text, '' without one."""
        return "" if self.low is None else f"{format_fraction(self.low)} – {format_fraction(self.high)}"

    def format(self, value: Number | None) -> str:
        """Return a value of this metric's kind as text: a count for ranks, else a fraction."""
        return format_count(value) if self.is_rank else format_fraction(value)


def results(metrics: Mapping[str, Number | None]) -> list[Result]:
    """Return the metrics in their order, each with its references; baselines that match no metric come last."""
    found: list[Result] = []
    matched: set[str] = set()
    for key, value in metrics.items():
        parent, _, last = key.rpartition("/")
        if key.startswith("baseline/") or (last in REFERENCES and parent in metrics):
            continue
        below = {name: finite_or_none(metrics.get(f"{key}/{name}")) for name in REFERENCES}
        same_metric = [k for k in metrics if k.startswith("baseline/") and k.split("/", 2)[2:] == key.split("/", 1)[1:]]
        matched |= set(same_metric)
        values = {format_key(k.split("/")[1]): finite_or_none(metrics[k]) for k in same_metric}
        values["most frequent class"] = below["majority_class"]
        baselines = {name: value for name, value in values.items() if value is not None}
        best = max(baselines, key=baselines.__getitem__, default="")
        low, high = ("min", "max") if below["ci_low"] is None else ("ci_low", "ci_high")
        references = {
            name: below[name] for name in ("candidates", "chance", "threshold", "published", "ties", "by_index")
        }
        references |= {"low": below[low], "high": below[high]}
        found.append(Result(key, or_nan(value), baseline=baselines.get(best), baseline_name=best, **references))
    rest = [k for k in metrics if k.startswith("baseline/") and k not in matched]
    return found + [Result(k, or_nan(metrics[k])) for k in rest]


def language(dataset: str) -> str:
    """Return the language of a dataset's name, `German` for `emoji_de`; '' without a language code."""
    code = re.search(r"_([a-z]{2})$", dataset)
    return LANGUAGES.get(code[1], "") if code else ""


def format_key(key: str) -> str:
    """Return a part of a metric key as words: `image → text recall@5`."""
    key = key.replace("image_to_text", "image → text").replace("text_to_image", "text → image").replace("/", " ")
    return key.replace("recall_at_", "recall@").replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")


def format_fraction(value: Number | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def format_count(value: Number | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def or_nan(value: Number | None) -> float:
    return math.nan if value is None else float(value)


def finite_or_none(value: Number | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def text_table(metrics: Mapping[str, Number | None]) -> str:
    """Return the metrics as an aligned table: metric, value, candidates, chance, baseline.

    The columns interval, published, ties, by index and threshold exist where a metric has them. A dataset whose name
    ends in a language code gets a single row, image-to-text recall@5; report.json has all of its metrics.
    """
    rows = [r for r in results(metrics) if not language(r.dataset) or r.metric == "image_to_text/recall_at_5"]
    columns = {
        "metric": [r.key for r in rows],
        "value": [r.format(r.value) for r in rows],
        "interval": [r.interval for r in rows],
        "candidates": [format_count(r.candidates) for r in rows],
        "chance": [r.format(r.chance) for r in rows],
        "baseline": [r.format(r.baseline) for r in rows],
        "published": ["" if r.published is None else r.format(r.published) for r in rows],
        "ties": ["" if r.ties is None else format_count(r.ties) for r in rows],
        "by index": ["" if r.by_index is None else r.format(r.by_index) for r in rows],
        "threshold": [
            "" if r.threshold is None else f"{r.format(r.threshold)} {'passed' if r.passed else 'MISSED'}" for r in rows
        ],
    }
    for optional in ("interval", "published", "ties", "by index", "threshold"):
        if not any(columns[optional]):
            del columns[optional]
    lines = [tuple(columns), *zip(*columns.values(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([aligned[0], "-" * max(map(len, aligned)), *aligned[1:]])


def headline(row: Dataset, metrics: Mapping[str, float]) -> float | None:
    """Return a dataset's main metric as datacomp defines it, or None if it is missing or not finite."""
    if row.task == "retrieval":
        keys = [f"retrieval/{row.name}/{way}/recall_at_1" for way in ("image_to_text", "text_to_image")]
    else:
        keys = [f"zeroshot/{row.name}/{row.metric}"]
    value = sum(metrics.get(key, math.nan) for key in keys) / len(keys)
    return value if math.isfinite(value) else None


def open_clip_csv(
    name: str, pretrained: str, parameters: int, flops: float, metrics: Mapping[str, float], own: Sequence[Dataset] = ()
) -> str:
    """Return a CSV row with the columns of open_clip's table, then one column per other evaluated dataset.

    Cells without a value are empty; so is the average, unless all of its 38 datasets have a value. flops: of one image
    and one text. own: the user's own datasets.
    """
    others = [row for key, row in DATASETS.items() if key not in _ORDER]
    others = [row for row in (*others, *own) if headline(row, metrics) is not None]
    values = {row.title: headline(row, metrics) for row in (*(DATASETS[key] for key in _ORDER), *others)}
    known = [headline(DATASETS[key], metrics) for key in SUITES["datacomp"]]
    average = "" if None in known else f"{sum(known) / len(known):.4f}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "pretrained", "params (M)", "FLOPs (B)", _AVERAGE, *values])
    cells = ("" if value is None else f"{value:.4f}" for value in values.values())
    writer.writerow([name, pretrained, f"{parameters / 1e6:.2f}", f"{flops / 1e9:.2f}", average, *cells])
    return text.getvalue()


def model_card(run: Mapping[str, Any], report: EvalReport, config: WeightsConfig) -> str:
    """Return a draft of a Hugging Face model card in Markdown: measured values, and placeholders for the rest."""
    values = {"run": run, "report": report, "config": config, "results": results(report.metrics)}
    return render("model_card.md.jinja", autoescape=False, **values)


def render(template: str, *, autoescape: bool = True, **values: Any) -> str:
    """Return a template of this package with its values."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"words": format_key, "fraction": format_fraction, "count": format_count}
    text = importlib.resources.files(__package__).joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)
