"""Measure weights: `python -m clip_jax.evaluate --weights=params.msgpack --suite=smoke --data_dir=/data`.

A suite or a set is any name of `clip_jax.evals.datasets.registry`. Sets that aren't on this machine are listed with
what brings them; sets that are damaged are listed as failed, and the others go on. Reports are written after every
set, each file in one step, so that a command that is killed keeps what it has measured. Several processes share the
work, as `clip_jax.main` does; what one of them can't read has failed on all.

Reports go to `evaluations/<name>`: the name of the file, or of its directory where the file is called as many others
are (params.msgpack). There a report of other weights is not overwritten; in the directory that --out names it is.

Exit codes: 0; 1, an error, with its traceback; 2, wrong flags or input, with one sentence; 3, measured, but some sets
failed: the last line and the reports say which.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from absl import app, flags

from clip_jax.command import parse_flags

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from clip_jax.config import WeightsConfig
    from clip_jax.evals.benchmark import EvalReport, Options, Subject
    from clip_jax.typing import Params

FAILED, REFUSED, INCOMPLETE = 1, 2, 3
FINGERPRINT = 12  # hexadecimal digits, in reports
LINES = "evaluations.jsonl"  # one for every step that --follow has measured
TASKS = ("zeroshot", "retrieval", "linear_probe", "few_shot", "overlap", "bias")

_WEIGHTS = flags.DEFINE_string("weights", None, "Anything that clip_jax.load takes, e.g. runs/emoji/params.msgpack.")
_FOLLOW = flags.DEFINE_string(
    "follow", None, "Instead: a run's --workdir, whose checkpoints are measured as they appear."
)
_EVERY_SECONDS = flags.DEFINE_float("every_seconds", 30, "How often --follow looks for checkpoints.", lower_bound=0)
_SUITE = flags.DEFINE_list(
    "suite", ["smoke"], "Suites and sets: paper, robustness, retrieval, datacomp, smoke, cifar10 …"
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Where evaluation data lies: webdataset folders, class folders, TFDS.")
_TASKS = flags.DEFINE_list("tasks", ["zeroshot", "retrieval"], f"Of {', '.join(TASKS)}.")
_OUT = flags.DEFINE_string("out", "", "Where reports are written; evaluations/<name of the weights> by default.")
_TEMPLATES = flags.DEFINE_string(
    "templates", "", "Templates for all sets: a name or a .json file; else the registry's."
)
_CLASS_NAMES = flags.DEFINE_string("class_names", "", "Class names likewise, for a single set.")
_STANDARD_MODELS = flags.DEFINE_string(
    "standard_models", "", "CSV of standard models, for effective robustness: evals.analysis.robustness."
)
_OVERLAP = flags.DEFINE_string("overlap", "", "Directory of the training pictures' hashes, for the task overlap.")
_TRAIN_FILES = flags.DEFINE_string(
    "train_files", "", "TFRecord shards to hash into --overlap first, if they aren't yet."
)
_BEAM = flags.DEFINE_list(
    "beam_options", [], "Hash the shards by Apache Beam with these, e.g. --runner=DataflowRunner."
)
_MAX_DISTANCE = flags.DEFINE_integer(
    "max_distance", 8, "Bits in which near-duplicates differ at most; 4 for 10⁸ pictures."
)
_GROUPS = flags.DEFINE_string("groups", "", "CSV with a head and a row per test picture, for the task bias.")
_COLUMNS = flags.DEFINE_list("group_columns", [], "Its columns that make the groups; all by default.")
_CATEGORIES = flags.DEFINE_string("categories", "", 'JSON such as {"crime": ["thief", "criminal"]}: named how often?')
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Pictures at a time, on all devices together.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir", "~/.cache/clip_jax/features", "Features by weights and split; '' for none."
)
_MODEL = flags.DEFINE_string("model", "", "A model's name, e.g. vit_b32, where the file can't tell.")
_ACTIVATION = flags.DEFINE_string("activation", "", "quick_gelu, gelu or gelu_tanh, where the file can't tell.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "A SentencePiece .model or tokenizer.json, for weights without theirs."
)


def main(argv: Sequence[str]) -> int:
    """Evaluate, print the table, write the reports. Returns the exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for chatty in ("absl", "jax", "tensorflow"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # Orbax warns of directories that are only read
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags begin with --")
        if bool(_WEIGHTS.value) == bool(_FOLLOW.value):
            raise ValueError(
                "expected either --weights=FILE, e.g. runs/emoji/params.msgpack, or --follow=WORKDIR, e.g. runs/emoji"
            )
        failed = _evaluate()
    except (ValueError, FileNotFoundError) as error:
        _leave(REFUSED, str(error))
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        _leave(FAILED, f"{type(error).__name__}: {error}")
    return INCOMPLETE if failed else 0


def _evaluate() -> int:
    """Return how many answers failed, over all checkpoints that were measured."""
    from etils import epath

    from clip_jax.devices import distributed, sharding
    from clip_jax.evals import benchmark
    from clip_jax.evals.analysis import robustness
    from clip_jax.evals.datasets.load import load_split
    from clip_jax.training.follow import follow

    wrong = [task for task in _TASKS.value if task not in TASKS]
    if wrong:
        raise ValueError(f"--tasks: there is no {wrong[0]!r}; use {', '.join(TASKS)}")
    names, options = benchmark.expand(_SUITE.value), _options()
    if not (names and _TASKS.value):
        raise ValueError("--suite and --tasks: name at least one of each, e.g. --suite=smoke --tasks=zeroshot")
    standard_models = robustness.read_standard_models(_STANDARD_MODELS.value) if _STANDARD_MODELS.value else {}
    if standard_models:
        robustness.fit(list(standard_models.values()))  # no line goes through some
    distributed.initialize()
    mesh = sharding.make_mesh()
    curves, failed = _lines() if _FOLLOW.value else [], 0

    def measure(config: WeightsConfig, params: Params, step: int | None = None) -> None:
        nonlocal failed
        subject = make_subject(config, params, mesh)
        with distributed.synchronized_errors(ValueError):
            _check_directory(subject.cache.model)
        facts = _facts(config, params, subject.cache.model)

        def write(outcome: EvalReport) -> list[str]:
            outcome.metrics.update(robustness.summary(outcome.metrics, standard_models))
            return _write(facts, config, outcome, standard_models, curves) if distributed.is_main_process() else []

        load = functools.partial(load_split, data_dir=_DATA_DIR.value)
        outcome = benchmark.evaluate(subject, names, _TASKS.value, load, options, write)
        failed += len(outcome.failed)
        if not distributed.is_main_process():
            return
        if step is not None:
            curves.append({"step": step} | {k: v for k, v in outcome.metrics.items() if math.isfinite(v)})
            _directory().mkdir(parents=True, exist_ok=True)
            with open(_directory() / LINES, "a", encoding="utf-8") as file:
                file.write(json.dumps(curves[-1]) + "\n")
        _print(outcome, write(outcome))

    if _WEIGHTS.value:
        measure(*_read(_WEIGHTS.value))
    else:
        workdir = epath.Path(_FOLLOW.value).expanduser()
        seen = {line["step"] for line in curves}
        follow(workdir, mesh, lambda at, *model: measure(*model, at), seen, _EVERY_SECONDS.value)
    distributed.barrier("evaluated")
    return failed


def _name() -> str:
    """Return what is measured, for people."""
    from clip_jax.evals.report.writing import weights_name

    return weights_name(_WEIGHTS.value or _FOLLOW.value)


def _directory() -> pathlib.Path:
    """Return where the reports go."""
    return pathlib.Path(_OUT.value or f"evaluations/{_name()}").expanduser()


def _check_directory(fingerprint: str) -> None:
    """Raise ValueError where the reports' directory is the default and holds those of other weights."""
    from clip_jax.evals.report.writing import check_same_weights

    if not _OUT.value:
        check_same_weights(_directory(), _WEIGHTS.value or _FOLLOW.value, fingerprint[:FINGERPRINT])


def _lines() -> list[dict]:
    """Return what was measured of earlier steps; a line that a kill cut short is left out."""
    path, found = _directory() / LINES, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _options() -> Options:
    """Return what the flags say of all sets; the files that they name are read."""
    from clip_jax.evals.benchmark import Options

    categories = json.loads(pathlib.Path(_CATEGORIES.value).read_text()) if _CATEGORIES.value else {}
    return Options(
        _TEMPLATES.value,
        _CLASS_NAMES.value,
        _hashes(),
        _MAX_DISTANCE.value,
        _groups(),
        {name: tuple(several) for name, several in categories.items()},
    )


def _hashes() -> tuple[np.ndarray, ...]:
    if not _OVERLAP.value:
        return ()
    from clip_jax.evals.analysis import hash_shards

    if _TRAIN_FILES.value:
        from clip_jax.data.sources.tfrecord import expand_files

        hash_shards.hash_shards(expand_files(_TRAIN_FILES.value), _OVERLAP.value, _BEAM.value or None)
    return tuple(hash_shards.read_hashes(_OVERLAP.value).values())


def _groups() -> tuple[np.ndarray, tuple[str, ...]] | None:
    if not _GROUPS.value:
        return None
    from clip_jax.evals.analysis.bias import intersect_groups

    with open(_GROUPS.value, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    columns = _COLUMNS.value or list(table[0] if table else ())
    missing = [column for column in columns if not table or column not in table[0]]
    if missing or not columns:
        found = ", ".join(table[0]) if table else "no rows"
        raise ValueError(f"{_GROUPS.value} has no column {missing[0] if missing else ''!r}; it has {found}")
    return intersect_groups(*([row[column] for row in table] for column in columns))


def _read(weights: str) -> tuple[WeightsConfig, Params]:
    from clip_jax.interop import reading

    found = reading.read(weights, model=_MODEL.value, activation=_ACTIVATION.value, tokenizer=_TOKENIZER.value)
    return found.config, found.params


def make_subject(config: WeightsConfig, params: Params, mesh: Mesh) -> Subject:
    """Return the model as `benchmark` sees it, on all devices of a mesh."""
    import jax

    from clip_jax.config import name_of
    from clip_jax.devices import sharding
    from clip_jax.evals.benchmark import Subject
    from clip_jax.evals.embed import ModelEmbedder
    from clip_jax.evals.feature_cache import FeatureCache
    from clip_jax.models import make_model
    from clip_jax.preprocess import preprocess_many
    from clip_jax.tokenizers import make_tokenizer

    placed = sharding.batch_sharding(mesh)
    model = make_model(config.model, config.preprocess, dtype=_DTYPE.value, rows=placed)
    spec, size = config.preprocess, mesh.size
    whole, pixels = sharding.replicated(mesh), config.model.image.image_size
    batch_size = -(-_BATCH_SIZE.value // size) * size
    fingerprint = _fingerprint(config, params)
    embedder = ModelEmbedder(
        model.encode_image,
        model.encode_text,
        jax.tree.map(lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), params),
        make_tokenizer(config.tokenizer, config.model.text, truncate=True, tokenizer_file=config.tokenizer_file),
        functools.partial(preprocess_many, size=pixels, spec=spec),
        batch_size,
        rows=sharding.host_rows(mesh, batch_size),
        put=functools.partial(sharding.to_global, mesh=mesh),
        out_sharding=whole,
        image_features=model.image_features,
    )
    preprocessing = f"{pixels} px, {spec.resize}, {spec.interpolation} like {spec.implementation}, {_DTYPE.value}"
    return Subject(
        embedder,
        embedder.features,
        name_of(config.model),
        preprocessing,
        FeatureCache(_CACHE_DIR.value, fingerprint),
    )


def _fingerprint(config: WeightsConfig, params: Params) -> str:
    """Return a hash of all that features depend on but the pictures."""
    from clip_jax.interop.conversion import flat

    found = hashlib.sha256(repr((config.model, config.preprocess, _DTYPE.value)).encode())
    for name, array in sorted(flat(params).items()):
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).view(np.uint8))
    return found.hexdigest()


def _facts(config: WeightsConfig, params: Params, fingerprint: str) -> dict[str, Any]:
    from clip_jax.config import name_of
    from clip_jax.models import count_parameters
    from clip_jax.models.flops import forward_flops
    from clip_jax.provenance import versions

    return {
        "name": _name(),
        "weights": _WEIGHTS.value or _FOLLOW.value,
        "fingerprint": fingerprint[:FINGERPRINT],
        "architecture": name_of(config.model),
        "parameters": count_parameters(params),
        "flops_per_pair": sum(forward_flops(config.model)),
        "versions": versions(),
    }


def _write(
    facts: Mapping[str, Any],
    config: WeightsConfig,
    outcome: EvalReport,
    standard_models: Mapping[str, tuple[float, float]],
    curves: Sequence[Mapping],
) -> list[str]:
    """Write the reports of what was measured so far, each in one step, and return their names."""
    from clip_jax.evals.report.tables import model_card, open_clip_csv
    from clip_jax.evals.report.writing import write_atomically, write_report

    directory = _directory()
    plots, tables = _plots(facts["name"], outcome, standard_models), _by_group(outcome)
    run = {**facts, "measured": outcome.described, "skipped": outcome.skipped, "failed": outcome.failed}
    write_report(directory, outcome.metrics, curves, (), run, plots)
    files = {
        "open_clip.csv": open_clip_csv(
            *(facts[key] for key in ("architecture", "weights", "parameters", "flops_per_pair")), outcome.metrics
        ),
        "MODEL_CARD.md": model_card(facts, outcome, config),
        **{f"{name}.svg": svg for name, svg in plots.items()},
        **tables,
    }
    for file, text in files.items():
        write_atomically(directory / file, text)
    return ["report.html", "report.json", *files]


def _print(outcome: EvalReport, files: Sequence[str]) -> None:
    from clip_jax.evals.report.tables import text_table

    if outcome.metrics:
        print(text_table(outcome.metrics))
    for key, described in outcome.described.items():
        print(f"{key}: {described}")
    for key, reason in outcome.skipped.items():
        print(f"{key} is left out: {reason}")
    for key, reason in outcome.failed.items():
        print(f"{key} failed: {reason}")
    print(f"written to {_directory()}: {', '.join(files)}")
    if outcome.failed:
        sys.stdout.flush()
        print(f"clip_jax.evaluate: failed, and not measured: {', '.join(outcome.failed)}", file=sys.stderr)


def _plots(name: str, outcome: EvalReport, standard_models: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """Return by name what can be drawn: effective robustness, overlap."""
    from clip_jax.evals.analysis import robustness
    from clip_jax.evals.report.charts import overlap_chart, robustness_chart

    plots = {}
    if "robustness/shifts/effective" in outcome.metrics:
        points = list(standard_models.values())
        own = (outcome.metrics["zeroshot/imagenet/top1"], outcome.metrics["robustness/shifts/average"])
        plots["robustness"] = robustness_chart(robustness.fit(points), points, {name: own})
    overlaps = {key.split("/")[1]: found for key, found in outcome.details.items() if key.startswith("overlap/")}
    if overlaps:
        plots["overlap"] = overlap_chart(overlaps)
    return plots


def _by_group(outcome: EvalReport) -> dict[str, str]:
    """Return by file name the tables of groups."""
    from clip_jax.evals.analysis import bias

    details = outcome.details.items()
    return {f"{key.replace('/', '_')}.csv": bias.to_csv(rows) for key, rows in details if key.startswith("bias/")}


def _leave(code: int, message: str) -> NoReturn:
    """End at once: an ordinary exit would wait for hosts that wait for us."""
    print(f"clip_jax.evaluate: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: parse_flags(argv, lambda message: _leave(REFUSED, message)))
