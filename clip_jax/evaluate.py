"""Evaluate weights: zero-shot classification, retrieval, linear probes and more, with a report.

    clip-jax evaluate --weights=runs/emoji/params.msgpack --datasets=smoke --evaluators=zeroshot,linear_probe
    clip-jax evaluate --weights=vit_l14 --datasets=paper,retrieval --data_dir=/data/evaluation
    clip-jax evaluate --weights=runs/emoji/params.msgpack --datasets=folder:/my/test

Datasets and suites: `clip_jax.evals.datasets.registry`; own data, e.g. --datasets=folder:/my/test:
`clip_jax.evals.datasets.own`. Evaluators: `clip_jax.evals.EVALUATORS`. Datasets that are not on this machine are listed
with instructions; damaged datasets are listed as failed; the others are evaluated. Reports are written after every
dataset. Several processes share the work, as in training; a dataset that one of them can't read has failed on all.

Reports go to `evaluations/<name>`: the name of the file, or of its directory if the file has a generic name
(params.msgpack). The report of other weights is not overwritten there, unless --out names the directory.

Exit codes: 0; 1: error, with a traceback; 2: invalid flags or input, with one sentence; 3: some datasets failed, the
last line and the reports name them, or none was evaluated.
"""

from __future__ import annotations

import logging
import os

from absl import flags

from clip_jax import command

INCOMPLETE = 3

_WEIGHTS = flags.DEFINE_string("weights", None, "Path or name, as in clip_jax.load, e.g. runs/emoji/params.msgpack.")
_FOLLOW = flags.DEFINE_string("follow", None, "Instead of --weights: a --workdir; new checkpoints are evaluated.")
_EVERY_SECONDS = flags.DEFINE_float("every_seconds", 30, "Interval of --follow in seconds.", lower_bound=0)
# The names of these flags are fields of `evals.run.Options`.
flags.DEFINE_list("datasets", ["smoke"], "Datasets and suites: paper, datacomp, cifar10, folder:/my/test …")
flags.DEFINE_list(
    "evaluators", ["zeroshot", "retrieval"], "zeroshot, retrieval, linear_probe, few_shot, overlap, bias …"
)
flags.DEFINE_string("data_dir", "", "Directory of evaluation data: webdataset or class folders, TFDS.")
flags.DEFINE_string("out", "", "Directory of the reports; default: evaluations/<name of the weights>.")
flags.DEFINE_string("templates", "", "Templates of all datasets: a name or a .json file.")
flags.DEFINE_string("class_names", "", "Class names of a single dataset: a name or a .json file.")
flags.DEFINE_enum(
    "protocol",
    "expected",
    ["expected", "published"],
    "Of ties: the expected value over their orders, or by index as CLIP_benchmark; its mAP also counts absent classes.",
)
flags.DEFINE_string("standard_models", "", "CSV of standard models, for effective robustness.")
flags.DEFINE_string("train_hashes", "", "Directory of the training images' hashes, for the evaluator overlap.")
flags.DEFINE_string("train_files", "", "TFRecord shards to hash into --train_hashes first.")
flags.DEFINE_list("beam_options", [], "Hash with Apache Beam, e.g. --runner=DataflowRunner.")
flags.DEFINE_integer("max_distance", 8, "Bits in which near-duplicates may differ; use 4 for 10⁸ training images.")
flags.DEFINE_string("groups", "", "CSV with a header and a row per test image, for the evaluator bias.")
flags.DEFINE_list("group_columns", [], "Columns of --groups to combine; default: all.")
flags.DEFINE_string("categories", "", 'JSON file: {"crime": ["thief", "criminal"]}, for bias.')
flags.DEFINE_integer("batch_size", 256, "Images per batch, over all devices.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and computation.")
flags.DEFINE_string("cache_dir", "~/.cache/clip_jax/features", "Feature cache; '' for none.")
_weights_options = command.define_weights_flags()


def main(_: list[str]) -> int:
    """Evaluate, print the table, write the reports. Returns the exit code."""
    from etils import epath

    from clip_jax.devices import distributed
    from clip_jax.evals.run import Options, prepare
    from clip_jax.interop import reading
    from clip_jax.interop.conversion import cast
    from clip_jax.training.follow import follow  # its imports register the format of runs

    if bool(_WEIGHTS.value) == bool(_FOLLOW.value):
        raise ValueError(
            "expected either --weights=FILE, e.g. runs/emoji/params.msgpack, or --follow=WORKDIR, e.g. runs/emoji"
        )
    values = {name: flags.FLAGS[name].value for name in Options.__dataclass_fields__ if name != "weights"}
    evaluation = prepare(Options(_WEIGHTS.value or _FOLLOW.value, **values))
    if _WEIGHTS.value:
        weights = reading.read(_WEIGHTS.value, dtype=values["dtype"], **_weights_options())
        evaluation.evaluate(weights.config, weights.params)
    else:
        follow(
            epath.Path(_FOLLOW.value).expanduser(),
            evaluation.mesh,
            lambda step, config, params: evaluation.evaluate(config, cast(params, values["dtype"]), step),
            evaluation.evaluated_steps,
            _EVERY_SECONDS.value,
        )
    distributed.barrier("evaluated")
    return INCOMPLETE if evaluation.failed else command.FINISHED


if __name__ == "__main__":
    # Level ERROR: no warnings of Orbax about directories that are read-only.
    command.run(main, level=logging.ERROR, leave=os._exit)
