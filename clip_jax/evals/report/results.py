"""Metrics with their reference values, and their formats in reports.

Metric keys are paths. Below a metric `a/b/c` are its reference values: `a/b/c/candidates`, `/chance`, `/majority_class`
(accuracy of a classifier that always predicts the most frequent class), `/threshold` (required value), `/ci_low` and
`/ci_high` (confidence interval; few-shot: `/min` and `/max` over draws) and `/published` (value reported for OpenAI's
weights). Its baseline is the best of all `baseline/<name>/b/c`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from clip_jax.typing import Number

REFERENCES = ("candidates", "chance", "majority_class", "threshold", "ci_low", "ci_high", "min", "max", "published")
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "ru": "Russian",
    "tr": "Turkish", "zh": "Chinese",
}  # fmt: skip


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

    @property
    def dataset(self) -> str:
        return self.key.split("/")[1] if self.key.count("/") >= 2 else self.key

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
        references = {name: below[name] for name in ("candidates", "chance", "threshold", "published")}
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
