"""Evaluation of weights on datasets, with reports on disk: the application behind `python -m clip_jax.evaluate`.

Reports are written after every dataset, each file atomically, so that a killed process keeps its results.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.config import WeightsConfig, check_name, name_of
from clip_jax.devices import distributed, sharding
from clip_jax.evals import EVALUATORS
from clip_jax.evals.analysis import bias, near_duplicates, robustness
from clip_jax.evals.embed import DiskCachedEmbedder, FeatureCache, ModelEmbedder, weights_fingerprint
from clip_jax.evals.load import LoadOptions, expand, find
from clip_jax.evals.report.charts import overlap_chart, robustness_chart
from clip_jax.evals.report.tables import model_card, open_clip_csv, text_table
from clip_jax.evals.report.writing import check_same_weights, weights_name, write_report
from clip_jax.evals.suite import EvalReport, EvaluatedModel, evaluate
from clip_jax.evals.zeroshot import PROTOCOLS
from clip_jax.models import count_parameters, make_model
from clip_jax.models.flops import forward_flops
from clip_jax.paths import check_local, check_output, write_atomically
from clip_jax.preprocess import preprocess_many
from clip_jax.provenance import versions
from clip_jax.tokenizers import make_tokenizer
from clip_jax.typing import Params

FINGERPRINT = 12  # hexadecimal digits in reports
STEPS_FILE = "evaluations.jsonl"  # one line per evaluated step of a run


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an evaluation; the flags of `clip_jax.evaluate` have the same names."""

    weights: str  # path or name of the weights, or workdir of the run, for the report
    datasets: Sequence[str] = ("smoke",)  # keys of DATASETS and SUITES, or the user's own data
    evaluators: Sequence[str] = ("zeroshot", "retrieval")  # keys of EVALUATORS
    data_dir: str = ""  # directory of stored datasets
    out: str = ""  # directory of the reports; '': evaluations/<name of the weights>
    templates: str = ""  # of all datasets; '': the registry's
    class_names: str = ""  # of a single dataset; '': the registry's
    protocol: str = "expected"  # of ties: a value of `zeroshot.PROTOCOLS`
    standard_models: str = ""  # CSV of standard models for effective robustness
    train_hashes: str = ""  # directory of the training images' hashes, for the evaluator overlap
    train_files: str = ""  # TFRecord shards to hash into `train_hashes` first
    beam_options: Sequence[str] = ()  # hash the shards with Apache Beam and these options
    max_distance: int = near_duplicates.MAX_DISTANCE  # bits in which near-duplicates differ at most
    groups: str = ""  # CSV with a header and a row per test image, for bias
    group_columns: Sequence[str] = ()  # its columns whose combinations are the groups; (): all
    categories: str = ""  # JSON: class names that are counted together, by name
    batch_size: int = 256  # images per batch, over all devices
    dtype: str = "float32"  # of the computation
    cache_dir: str = ""  # features by weights and split; '': no cache

    @property
    def directory(self) -> pathlib.Path:
        """Directory of the reports."""
        return pathlib.Path(self.out or f"evaluations/{weights_name(self.weights)}").expanduser()


def prepare(options: Options) -> Evaluation:
    """Check the options, read the files that they name, and initialize the devices. Raises ValueError."""
    for name in ("data_dir", "out", "standard_models", "groups", "categories", "cache_dir"):
        check_local(f"--{name}", getattr(options, name))
    check_output("--out", options.directory, ("a directory",))
    for name in options.evaluators:
        check_name("--evaluators", name, EVALUATORS)
    check_name("--protocol", options.protocol, PROTOCOLS)
    names = expand(options.datasets)
    if not (names and options.evaluators):
        raise ValueError("--datasets and --evaluators: expected at least one of each, e.g. --datasets=smoke")
    evaluator_options = {
        "overlap": {"train_hashes": _hashes(options), "max_distance": options.max_distance, "tests": len(names)},
        "bias": _group_options(options),
        **{evaluator: {"protocol": options.protocol} for evaluator in ("zeroshot", "retrieval", "linear_probe")},
    }
    standard_models = robustness.read_standard_models(options.standard_models) if options.standard_models else {}
    if standard_models:
        robustness.fit(list(standard_models.values()))  # raises ValueError for points without a fit
    distributed.initialize()
    return Evaluation(options, names, evaluator_options, standard_models, sharding.make_mesh(), _read_steps(options))


@dataclasses.dataclass
class Evaluation:
    """A prepared evaluation, for any number of weights of the same run."""

    options: Options
    names: Sequence[str]  # keys of DATASETS, or the user's own data
    evaluator_options: Mapping[str, Mapping[str, Any]]
    standard_models: Mapping[str, tuple[float, float]]
    mesh: Mesh
    steps: list[dict[str, float]]  # metrics of the evaluated steps
    failed: int = 0  # results that failed, and reports without any result, over all evaluated weights

    @property
    def evaluated_steps(self) -> set[int]:
        return {int(line["step"]) for line in self.steps}

    def evaluate(self, config: WeightsConfig, params: Params, step: int | None = None) -> EvalReport:
        """Evaluate weights, print the results and write the reports. A collective: call it on all processes.

        Args:
          params: NumPy arrays.
          step: of the training run; its metrics are added to STEPS_FILE.
        """
        options = self.options
        fingerprint = weights_fingerprint(config, params, options.dtype)
        with distributed.synchronized_errors(ValueError):
            if not options.out:
                check_same_weights(options.directory, options.weights, fingerprint[:FINGERPRINT])
        model = _evaluated_model(config, params, self.mesh, options, fingerprint)
        info = {
            "name": weights_name(options.weights),
            "weights": options.weights,
            "fingerprint": fingerprint[:FINGERPRINT],
            "architecture": model.architecture,
            "parameters": count_parameters(params),
            "flops_per_pair": round(sum(forward_flops(config.model))),
            "protocol": options.protocol,
            "versions": versions(),
        }

        def write(report: EvalReport) -> list[str]:
            report.metrics.update(robustness.summary(report.metrics, self.standard_models))
            return self._write(info, config, report) if distributed.is_main_process() else []

        load_options = LoadOptions(options.data_dir, options.templates, options.class_names)
        report = evaluate(model, self.names, options.evaluators, load_options, self.evaluator_options, write)
        self.failed += len(report.failed) or not report.metrics
        if step is not None:
            self.steps.append({"step": step} | {k: v for k, v in report.metrics.items() if math.isfinite(v)})
        if distributed.is_main_process():
            if step is not None:
                lines = "".join(json.dumps(line) + "\n" for line in self.steps)
                write_atomically(options.directory / STEPS_FILE, lines)
            _print(report, options.directory, write(report))
        return report

    def _write(self, info: Mapping[str, Any], config: WeightsConfig, report: EvalReport) -> list[str]:
        """Write all reports and return their file names."""
        directory = self.options.directory
        metrics, details, plots = report.metrics, report.details, {}
        if "robustness/shifts/effective" in metrics:
            points = list(self.standard_models.values())
            model = metrics["zeroshot/imagenet/top1"], metrics["robustness/shifts/average"]
            plots["robustness"] = robustness_chart(robustness.fit(points), points, {info["name"]: model})
        if overlaps := {key.split("/")[1]: found for key, found in details.items() if key.startswith("overlap/")}:
            plots["overlap"] = overlap_chart(overlaps)
        notes = {"descriptions": report.descriptions, "skipped": report.skipped, "failed": report.failed}
        write_report(directory, metrics, self.steps, (), {**info, **notes}, plots)
        columns = (info[key] for key in ("architecture", "weights", "parameters", "flops_per_pair"))
        bias_tables = {key: rows for key, rows in details.items() if key.startswith("bias/")}
        files = {
            "open_clip.csv": open_clip_csv(*columns, metrics, [row for name in self.names if (row := find(name)).read]),
            "MODEL_CARD.md": model_card(info, report, config),
            **{f"{name}.svg": svg for name, svg in plots.items()},
            **{f"{key.replace('/', '_')}.csv": bias.to_csv(rows) for key, rows in bias_tables.items()},
        }
        for file, text in files.items():
            write_atomically(directory / file, text)
        return ["report.html", "report.json", *files]


def _evaluated_model(
    config: WeightsConfig, params: Params, mesh: Mesh, options: Options, fingerprint: str
) -> EvaluatedModel:
    """Return the model with its parameters replicated over a mesh. The fingerprint is the key of cached features."""
    spec, pixels = config.preprocess, config.model.image.image_size
    replicated = sharding.replicated(mesh)
    model = make_model(config.model, spec, dtype=options.dtype, batch_sharding=sharding.batch_sharding(mesh))
    batch_size = -(-options.batch_size // mesh.size) * mesh.size
    embedder = ModelEmbedder(
        model.encode_image,
        model.encode_text,
        jax.tree.map(lambda x: jax.make_array_from_process_local_data(replicated, np.asarray(x)), params),
        make_tokenizer(config.tokenizer, config.model.text, truncate=True, tokenizer_file=config.tokenizer_file),
        functools.partial(preprocess_many, size=pixels, spec=spec),
        batch_size,
        rows=sharding.host_rows(mesh, batch_size),
        put=functools.partial(sharding.to_global, mesh=mesh),
        out_sharding=replicated,
        image_features=model.image_features,
    )
    return EvaluatedModel(
        DiskCachedEmbedder(embedder, FeatureCache(options.cache_dir, fingerprint)),
        name_of(config.model),
        f"{pixels} px, {spec.description} of {spec.implementation}, {options.dtype}",
    )


def _read_steps(options: Options) -> list[dict[str, float]]:
    """Return the evaluated steps of STEPS_FILE; a damaged line is skipped, and its step evaluated again."""
    path, steps = options.directory / STEPS_FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            steps.append(json.loads(line))
    return steps


def _hashes(options: Options) -> tuple[np.ndarray, ...]:
    if not options.train_hashes:
        return ()
    if options.train_files:
        from clip_jax.data.storage import list_files  # imports TensorFlow

        files = [file.path for file in list_files(options.train_files)]
        near_duplicates.hash_shards(files, options.train_hashes, options.beam_options or None)
    return tuple(near_duplicates.read_hashes(options.train_hashes).values())


def _group_options(options: Options) -> dict[str, Any]:
    categories = json.loads(pathlib.Path(options.categories).read_text()) if options.categories else {}
    if not options.groups:
        return {"categories": categories}
    with open(options.groups, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    columns = options.group_columns or list(table[0] if table else ())
    missing = [column for column in columns if not table or column not in table[0]]
    if missing or not columns:
        found = ", ".join(table[0]) if table else "no rows"
        raise ValueError(f"{options.groups}: expected column {missing[0] if missing else ''!r}, found {found}")
    groups, names = bias.intersect_groups(*([row[column] for row in table] for column in columns))
    return {"groups": groups, "group_names": names, "categories": categories}


def _print(report: EvalReport, directory: pathlib.Path, files: Sequence[str]) -> None:
    if report.metrics:
        print(text_table(report.metrics))
    for notes, state in ((report.descriptions, ""), (report.skipped, " is skipped"), (report.failed, " failed")):
        for key, note in notes.items():
            print(f"{key}{state}: {note}")
    print(f"written to {directory}: {', '.join(files)}")
    if report.failed or not report.metrics:
        problem = (
            f"failed, without metrics: {', '.join(report.failed)}" if report.failed else "no dataset was evaluated"
        )
        sys.stdout.flush()
        print(f"clip_jax.evaluate: {problem}", file=sys.stderr)
