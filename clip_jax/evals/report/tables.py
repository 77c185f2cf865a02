"""Numbers for elsewhere: a row of open_clip's table of results, and the draft of a model card."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clip_jax.evals.datasets.registry import DATASETS, SUITES, Dataset
from clip_jax.evals.report.files import results

if TYPE_CHECKING:
    from clip_jax.config import WeightsConfig
    from clip_jax.evals.benchmark import EvalReport

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


def headline(row: Dataset, metrics: Mapping[str, float]) -> float | None:
    """Return the one number of a set, as datacomp takes it, or None if it was not measured or is not finite."""
    if row.task == "retrieval":
        keys = [f"retrieval/{row.name}/{way}/recall_at_1" for way in ("image_to_text", "text_to_image")]
    else:
        keys = [f"zeroshot/{row.name}/{row.metric}"]
    value = sum(metrics.get(key, math.nan) for key in keys) / len(keys)
    return value if math.isfinite(value) else None


def open_clip_csv(name: str, pretrained: str, parameters: int, flops: float, metrics: Mapping[str, float]) -> str:
    """Return head and row in open_clip's columns, then those of our other sets; empty where there is no number.

    The average is there where all of its 38 sets have one. flops: of one picture and one text.
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


def model_card(facts: Mapping[str, Any], outcome: EvalReport, config: WeightsConfig) -> str:
    """Return a draft in Markdown, with the hub's head: what was measured is filled in, the rest is asked for."""
    spec, image, text = config.preprocess, config.model.image, config.model.text
    lines = [
        "---",
        "library_name: clip_jax",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [clip, jax, flax]",
        "license: # fill in",
        "---",
        "",
        f"# {facts['name']}",
        "",
        f"A CLIP (Radford et al. 2021): `{facts['architecture']}`, {facts['parameters']:,} parameters, pictures of"
        f" {image.image_size} px, texts of {text.length} tokens. Pixels: {spec.resize}, {spec.interpolation}, mean"
        f" {spec.mean}, standard deviation {spec.std}. Source: {config.source or 'fill in'}.",
        "",
        "## Intended use, data, limits",
        "",
        "Fill in: what it was trained on and under which licences, what it is for and what it is not for, which groups"
        " of people and languages the data leaves out (`clip_jax.evals.analysis.bias` measures by group).",
        "",
        "## Evaluation",
        "",
        "Fractions with intervals at 95 %; for few-shot the range of the draws. Ties count against the model.",
        "",
        "| set and measure | value | interval | published |",
        "|---|--:|--:|--:|",
    ]
    for result in results(outcome.metrics):
        interval = f"{result.low:.3f} to {result.high:.3f}" if result.low is not None else ""
        number = "" if result.published is None else f"{result.published:.3f}"
        lines.append(f"| {result.key} | {result.value:.3f} | {interval} | {number} |")
    lines += ["", "What they are of:", "", *(f"- {key}: {said}." for key, said in outcome.described.items())]
    missing = outcome.skipped | {key: f"failed: {reason}" for key, reason in outcome.failed.items()}
    if missing:
        lines += ["", "Not measured:", "", *(f"- {key}: {reason}" for key, reason in missing.items())]
    return "\n".join(lines) + "\n"
