"""Results as text: console table, row of open_clip's results table, draft of a model card."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clip_jax.evals.datasets.registry import DATASETS, SUITES, Dataset
from clip_jax.evals.report.results import format_count, language, results
from clip_jax.typing import Number

if TYPE_CHECKING:
    from clip_jax.config import WeightsConfig
    from clip_jax.evals.suite import EvalReport

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


def text_table(metrics: Mapping[str, Number | None]) -> str:
    """Return the metrics as an aligned table: metric, value, candidates, chance, baseline.

    The columns interval, published and threshold exist where a metric has them. A dataset whose name ends in a language
    code gets a single row, image-to-text recall@5; report.json has all of its metrics.
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
        "threshold": [
            "" if r.threshold is None else f"{r.format(r.threshold)} {'passed' if r.passed else 'MISSED'}" for r in rows
        ],
    }
    for optional in ("interval", "published", "threshold"):
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


def open_clip_csv(name: str, pretrained: str, parameters: int, flops: float, metrics: Mapping[str, float]) -> str:
    """Return a header and a row with the columns of open_clip's table, then one column per other evaluated dataset.

    Args:
      flops: of one image and one text.

    Returns:
      CSV text. Cells without a value are empty; so is the average, unless all of its 38 datasets have a value.
    """
    others = [key for key in DATASETS if key not in _ORDER and headline(DATASETS[key], metrics) is not None]
    values = {DATASETS[key].title: headline(DATASETS[key], metrics) for key in (*_ORDER, *others)}
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
    spec, image, text = config.preprocess, config.model.image, config.model.text
    lines = [
        "---",
        "library_name: clip_jax",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, jax, flax]",
        "license: # fill in",
        "---",
        "",
        f"# {run['name']}",
        "",
        f"A CLIP model (Radford et al. 2021): `{run['architecture']}`, {run['parameters']:,} parameters, images of"
        f" {image.image_size} px, texts of {text.context_length} tokens. Preprocessing: {spec.resize},"
        f" {spec.interpolation}, mean {spec.mean}, standard deviation {spec.std}."
        f" Source: {config.source or 'fill in'}.",
        "",
        "## Intended use, data, limitations",
        "",
        "Fill in: training data and its licenses, intended and out-of-scope uses, groups of people and languages that"
        " the data does not represent (`clip_jax.evals.analysis.bias` evaluates by group).",
        "",
        "## Evaluation",
        "",
        "Fractions with 95 % confidence intervals; few-shot: range over draws. Ties count as errors.",
        "",
        "| metric | value | interval | published |",
        "|---|--:|--:|--:|",
    ]
    for result in results(report.metrics):
        interval = f"{result.low:.3f} to {result.high:.3f}" if result.low is not None else ""
        published = "" if result.published is None else f"{result.published:.3f}"
        lines.append(f"| {result.key} | {result.value:.3f} | {interval} | {published} |")
    lines += ["", "Evaluation setup:", "", *(f"- {key}: {setup}." for key, setup in report.descriptions.items())]
    missing = report.skipped | {key: f"failed: {reason}" for key, reason in report.failed.items()}
    if missing:
        lines += ["", "Not evaluated:", "", *(f"- {key}: {reason}" for key, reason in missing.items())]
    return "\n".join(lines) + "\n"
