"""A run's results for people and machines: `report.json`, `report.html`, and the table that the console shows.

The page stands alone: no script, no request, pictures and charts inside; it follows the reader's light or dark.

Keys of metrics are paths. Below a metric `a/b/c` stand `a/b/c/candidates` and `/chance`, where known `/majority_class`
(accuracy of the most frequent class), `/gate` (what the run was asked to reach), `/ci_low` and `/ci_high` (95 %
confidence interval; few-shot: `/min` and `/max` over draws) and
`/published` (what others measured of OpenAI's weights); its floor is any `floor/<name>/b/c`.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from clip_jax.config import flatten
from clip_jax.evals.report.charts import SERIES, Number, Points, line_chart
from clip_jax.evals.report.panels import Panels

ATTRIBUTES = ("candidates", "chance", "majority_class", "gate", "ci_low", "ci_high", "min", "max", "published")
EVALUATED = ("retrieval/", "zeroshot/", "linear_probe/", "few_shot/")
NOTES = {"failed": "failed", "skipped": "is left out"}  # of a run's facts: why sets have no number
# Files that are called so in every directory, which then says more.
PLAIN_NAMES = ("params", "model", "weights", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
SUFFIXES = (".msgpack", ".pt", ".pth", ".bin", ".safetensors", ".npz")
CURVES = {
    "loss": "Loss",
    "accuracy/image_to_text": "Contrastive accuracy in the batch",
    "logit_scale": "Logit scale",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
}
LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "ru": "Russian",
    "tr": "Turkish", "zh": "Chinese",
}  # fmt: skip
LANGUAGE_MEASURES = (
    "image_to_text/recall_at_1",
    "image_to_text/recall_at_5",
    "text_to_image/recall_at_1",
    "text_to_image/recall_at_5",
)


def weights_name(weights: str) -> str:
    """Return what tells weights apart, for people: the name of their file, directory, run or model."""
    path = pathlib.Path(weights).expanduser()
    stem = path.stem if path.suffix in SUFFIXES else path.name
    return path.absolute().parent.name or stem if stem in PLAIN_NAMES else stem or path.resolve().name


def check_same_weights(directory: pathlib.Path, weights: str, fingerprint: str) -> None:
    """Raise ValueError where a directory's report is of other weights, by their path and by their fingerprint.

    Weights that were measured from this path before are not others: they may have been trained on.
    """
    path = directory / "report.json"
    if not path.exists():
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    mine = {"run/weights": weights, "run/fingerprint": fingerprint}
    if not any(there.get(key) == value for key, value in mine.items()):
        raise ValueError(
            f"{path} is the report of other weights, {there.get('run/weights')}: give a directory of its own, e.g."
            f" --out={directory}-2, or --out={directory} to overwrite it"
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """A metric with all that puts it in proportion; None where that is not known."""

    key: str
    value: float
    candidates: float | None = None
    chance: float | None = None
    floor: float | None = None
    floor_name: str = ""
    gate: float | None = None
    low: float | None = None
    high: float | None = None
    published: float | None = None

    @property
    def set_name(self) -> str:
        return self.key.split("/")[1] if self.key.count("/") >= 2 else self.key

    @property
    def measure(self) -> str:
        return self.key.split("/", 2)[2] if self.key.count("/") >= 2 else self.key

    @property
    def is_rank(self) -> bool:
        """Whether it counts places, where less is better, rather than being a fraction."""
        return self.key.endswith("_rank")

    @property
    def passed(self) -> bool | None:
        """Whether the gate was reached; None without one."""
        if self.gate is None:
            return None
        return self.value <= self.gate if self.is_rank else self.value >= self.gate


def results(metrics: Mapping[str, Number | None]) -> list[Result]:
    """Return the metrics in their order, each with what stands below it and its floor; floors of no metric last."""
    gathered: list[Result] = []
    claimed: set[str] = set()
    for key, value in metrics.items():
        parent, _, last = key.rpartition("/")
        if key.startswith("floor/") or (last in ATTRIBUTES and parent in metrics):
            continue
        below = {name: _float_or_none(metrics.get(f"{key}/{name}")) for name in ATTRIBUTES}
        floors = {k: _float_or_none(v) for k, v in metrics.items() if k.startswith("floor/") and _same_measure(k, key)}
        claimed |= set(floors)
        named = {_words(k.split("/")[1]): v for k, v in floors.items() if v is not None}
        if below["majority_class"] is not None:
            named["most frequent class"] = below["majority_class"]
        floor_name = max(named, key=named.__getitem__, default="")
        gathered.append(
            Result(
                key,
                _or_nan(value),
                below["candidates"],
                below["chance"],
                named.get(floor_name),
                floor_name,
                below["gate"],
                *(
                    below[ci] if below[ci] is not None else below[end]
                    for ci, end in (("ci_low", "min"), ("ci_high", "max"))
                ),
                below["published"],
            )
        )
    rest = [k for k in metrics if k.startswith("floor/") and k not in claimed]
    return gathered + [Result(k, _or_nan(metrics[k])) for k in rest]


def table(metrics: Mapping[str, Number | None]) -> str:
    """Return the metrics as aligned text: metric, value, candidates, chance, floor; where any has one, interval,
    published number and gate.

    Of a set in one language among many a single line, image to text at 5; report.json has them all.
    """
    rows = [r for r in results(metrics) if not _language(r.set_name) or r.measure == LANGUAGE_MEASURES[1]]
    columns = {
        "metric": [r.key for r in rows],
        "value": [_cell(r)(r.value) for r in rows],
        "interval": [_interval(r) for r in rows],
        "candidates": [_count(r.candidates) for r in rows],
        "chance": [_cell(r)(r.chance) for r in rows],
        "floor": [_cell(r)(r.floor) for r in rows],
        "published": ["" if r.published is None else _cell(r)(r.published) for r in rows],
        "gate": [
            f"{_cell(r)(r.gate)} {'passed' if r.passed else 'MISSED'}" if r.gate is not None else "" for r in rows
        ],
    }
    for optional in ("interval", "published", "gate"):
        if not any(columns[optional]):
            del columns[optional]
    lines = [tuple(columns), *zip(*columns.values(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([aligned[0], "-" * max(map(len, aligned)), *aligned[1:]])


def write_report(
    workdir: str | os.PathLike[str],
    metrics: Mapping[str, Number | None],
    curves: Sequence[Mapping[str, Number | None]],
    panels: Sequence[Panels],
    run: Mapping[str, Any],
    plots: Mapping[str, str] | None = None,
) -> None:
    """Write `report.json` and `report.html` into `workdir`; each replaces an older one in a single step.

    Args:
      metrics: what evaluators and floors returned, and `<metric>/gate`.
      curves: JSON-lines records of the run. Those with `loss` are training's, with the keys of CURVES; those with keys
        that begin with an evaluator's name are evaluations'. Each has `step`.
      run: facts by name (`name` is the title, `attribution` the foot); a mapping, such as `config` or `versions`,
        becomes a table of its own; `skipped` and `failed`, from sets to reasons, are notes. report.json has all under
        `run/`.
      plots: SVGs by title, with colours for light and dark of their own.
    """
    directory = epath.Path(workdir)
    run = {"name": directory.name, **run}
    flat = {key: _as_json(key, value) for key, value in metrics.items()}
    flat |= {f"run/{key}": _as_json(key, value) for key, value in flatten(run).items()}
    directory.mkdir(parents=True, exist_ok=True)
    replace(directory / "report.json", json.dumps(flat, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    replace(directory / "report.html", page(metrics, curves, panels, run, plots))


def page(
    metrics: Mapping[str, Number | None],
    curves: Sequence[Mapping[str, Number | None]],
    panels: Sequence[Panels],
    run: Mapping[str, Any],
    plots: Mapping[str, str] | None = None,
) -> str:
    """Return the page as HTML; the arguments are those of `write_report`."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "words": _words,
        "fraction": _fraction,
        "count": _count,
        "percent": _percent,
        "interval": _interval,
    }
    template = importlib.resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    rows = results(metrics)
    languages = _languages(metrics)
    return environment.from_string(template).render(
        title=run.get("name", "A run of clip_jax"),
        attribution=run.get("attribution", ""),
        facts={k: v for k, v in run.items() if not isinstance(v, Mapping) and k not in ("name", "attribution")},
        sections={k: flatten(v) for k, v in run.items() if isinstance(v, Mapping) and k not in NOTES},
        notes={words: run.get(name, {}) for name, words in NOTES.items()},
        headlines=[r for r in rows if r.gate is not None] or [r for r in rows if r.floor is not None][:4],
        groups=_by_set(r for r in rows if r.set_name not in {language["set"] for language in languages}),
        languages=languages,
        charts=[(title, names, markupsafe.Markup(svg)) for title, names, svg in _charts(curves)],
        panels=panels,
        plots={title: markupsafe.Markup(svg) for title, svg in (plots or {}).items()},
    )


def _same_measure(floor: str, metric: str) -> bool:
    return floor.split("/", 2)[2:] == metric.split("/", 1)[1:]


def _by_set(rows: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(row.set_name, []).append(row)
    return groups


def _language(set_name: str) -> str:
    """Return the language that a set's name ends in, `German` for `emoji_de`; '' without one."""
    code = re.search(r"_([a-z]{2})$", set_name)
    return LANGUAGES.get(code[1], "") if code else ""


def _languages(metrics: Mapping[str, Number | None]) -> list[dict[str, Any]]:
    """Return a row for every retrieval set whose name ends in a language's code, the best first."""
    rows = []
    for name in dict.fromkeys(key.split("/")[1] for key in metrics if key.startswith("retrieval/")):
        if language := _language(name):
            values = [_float_or_none(metrics.get(f"retrieval/{name}/{measure}")) for measure in LANGUAGE_MEASURES]
            chance = _float_or_none(metrics.get(f"retrieval/{name}/image_to_text/recall_at_5/chance"))
            rows.append({"set": name, "language": language, "values": values, "chance": chance})
    return sorted(rows, key=lambda row: -(row["values"][1] or 0))


def _charts(curves: Sequence[Mapping[str, Number | None]]) -> list[tuple[str, list[str], str]]:
    """Return (title, names of the lines if there are several, SVG) for all that was recorded."""
    charts = []
    for key, title in CURVES.items():
        points: Points = [(r["step"], _or_nan(r[key])) for r in curves if key in r and "loss" in r]
        charts.append((title, [], line_chart({title: points}, title)))
    evaluations = [r for r in curves if any(k.startswith(EVALUATED) for k in r)]
    for measure in ("image_to_text/recall_at_5", "top1"):
        found = dict.fromkeys(
            k for r in evaluations for k in r if k.startswith(EVALUATED) and k.endswith(f"/{measure}")
        )
        keys = [k for k in found if not _language(k.split("/")[1])]
        series = {_words(k.split("/")[1]): [(r["step"], _or_nan(r[k])) for r in evaluations if k in r] for k in keys}
        title = f"{_words(measure)}, held out"
        charts.append(
            (
                title[0].upper() + title[1:],
                list(series)[:SERIES],
                line_chart(dict(list(series.items())[:SERIES]), title),
            )
        )
    return [chart for chart in charts if chart[2]]


def _words(key: str) -> str:
    """Return a part of a key as a reader would say it."""
    key = key.replace("image_to_text", "image → text").replace("text_to_image", "text → image").replace("/", " ")
    return key.replace("recall_at_", "recall@").replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")


def _fraction(value: Number | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _interval(result: Result) -> str:
    return "" if result.low is None else f"{_fraction(result.low)} – {_fraction(result.high)}"


def _count(value: Number | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _percent(value: Number | None) -> str:
    """Return a fraction as a CSS length along a bar."""
    return f"{100 * min(max(value, 0), 1):.1f}%" if value is not None and math.isfinite(value) else "0%"


def _cell(result: Result):
    return _count if result.is_rank else _fraction


def _or_nan(value: Number | None) -> float:
    return math.nan if value is None else float(value)


def _float_or_none(value: Number | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _as_json(key: str, value: Any) -> Number | str | None:
    """Return a JSON number or string: null for NaN, which JSON doesn't have, and candidates as the count they are."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            return None
        return int(value) if key.endswith("/candidates") else value
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def replace(path: os.PathLike[str], text: str) -> None:
    """Write in one step, so that a reader never finds half a file."""
    path = epath.Path(path)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)
