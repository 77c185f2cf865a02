"""Command line: output, refused flags, exit codes."""

import dataclasses
import re

import pytest
from absl import flags
from etils import epath

from clip_jax import command
from clip_jax.training import dry_run
from tests import runs


def _run(*flags: str, config: str = runs.TINY, workdir: str = "/tmp/never-written", code: int) -> tuple[str, str]:
    process = runs.start(workdir, *flags, config=config)
    output, messages = process.communicate(timeout=120)
    assert process.returncode == code, messages
    return output, messages


def test_dry_run_prints_a_summary():
    output, _ = _run("--dry_run", "--config.train.batch_size=4096", config="configs/vit_b32.py", code=0)
    for line in ("vit_b32", "parameters:          151,277,313", "4,096", "3,125,000", "1.69 GiB"):
        assert line in output


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.batch_sise=512", "no key 'train.batch_sise'; did you mean 'train.batch_size'?"),
        ("--config.optim.lr=1e-3", "no key 'optim.lr'; did you mean 'optim.learning_rate'?"),
        ("--config.batch_size=512", "no key 'batch_size'; did you mean 'train.batch_size'?"),
        ("--config.preprocess.mean=0.5,0.5", "preprocess.mean=(0.5, 0.5): expected 3 numbers"),
        ("--config.preprocess.std=0.5,half", "preprocess.std"),
        ("--config.optim.learning_rate=nan", "optim.learning_rate=nan is not a finite number"),
        ("--config.train.batch_size=0", "train.batch_size=0 is out of range"),
        ("--config.loss.name=sofmax", "did you mean 'softmax'?"),
        ("--config.data.options.exmples=5", "'synthetic' has no option 'exmples'; did you mean 'examples'?"),
        ("--config.data.options.examples=five", "data.source='synthetic': examples='five' is a str, expected int"),
        ("--config.data.captions.txt=often", "data.captions.txt='often' is a str, expected float"),
        ("--config.eval.tasks.shapes.dataste=x", "did you mean 'eval.tasks.shapes.dataset'?"),
        ("--config.init.weights=gs://bucket/w.msgpack", "init.weights=gs://bucket/w.msgpack: expected a local path"),
        (
            "--config.init.weights=/nowhere.pt:img",
            "init.weights='/nowhere.pt:img': expected a file or directory, got none",
        ),
        ("--workdir=/tmp/other", "--workdir is given twice, as --workdir=/tmp/never-written and --workdir=/tmp/other"),
    ],
)
def test_wrong_flag_is_refused_with_one_sentence(flag, message):
    _, messages = _run(flag, "--dry_run", code=2)
    assert message in messages and "Traceback" not in messages


def test_flags_set_values_of_mappings():
    """Of names that the config file does not have, and those that it has."""
    names = ("data.options.examples=77", "data.captions.title=2", "eval.tasks.digits.dataset=digits")
    names += (
        "eval.tasks.digits.options.labels=('a','b')",
        "eval.tasks.shapes.options.batch=0x10",
        "eval.thresholds.a/b=.5",
    )
    command._MAPPING_VALUES.clear()
    rest = command._without_mapping_values(["x", "--config=y", *(f"--config.{name}" for name in names), "--", *names])
    found = command.checked_config(runs.tiny_config_dict())
    command._MAPPING_VALUES.clear()
    assert rest == ["x", "--config=y", "--", *names]
    assert found.data.options == {"examples": 77} and found.data.captions == {"txt": 1.0, "caption": 1.0, "title": 2.0}
    assert {name: task.dataset for name, task in found.eval.tasks.items()} == {
        "shapes": "synthetic",
        "digits": "digits",
    }
    assert found.eval.tasks["digits"].options == {"labels": ("a", "b")}
    assert found.eval.tasks["shapes"].options == {"batch": 16} and found.eval.thresholds == {"a/b": 0.5}


def test_values_of_mappings_need_a_config():
    with pytest.raises(flags.Error, match=r"--config\.data\.options\.image needs --config, whose values it changes"):
        command._without_mapping_values(["x", "--config.data.options.image=photo"])
    command._MAPPING_VALUES.clear()


def test_wrong_workdir_is_refused_with_one_sentence():
    _, messages = _run("--dry_run", workdir="https://host/run", code=2)
    assert "--workdir=https://host/run: expected a local path, gs:// or s3://" in messages


@pytest.mark.parametrize(
    ("given", "repeated"),
    [
        ("--config=a.py --config.train.seed=1 --config.train.seed=2", "config.train.seed"),
        ("--config.optim.shard_moments --noconfig.optim.shard_moments", "config.optim.shard_moments"),
        ("--modules a --modules=b", "modules"),
        ("--config.train.seed=1 --config.train.seeds=1 --nomodule x --nomodule y -- --modules=1 --modules=2", None),
    ],
)
def test_repeated_flags_are_found(given, repeated):
    if repeated is None:
        return command._refuse_repeated(["x", *given.split()])
    with pytest.raises(flags.Error, match=f"--{repeated} is given twice, as .*; give it once"):
        command._refuse_repeated(["x", *given.split()])


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "data",
            {"source": "tfrecord", "files": "/nowhere/*.tfrecord", "options": {}},
            r"'/nowhere/.*' matches no file",
        ),
        ("data", {"files": "/nowhere/*.tfrecord"}, "data.source='synthetic' reads no files"),
        ("data", {"options": {"example": 1}}, "data.source='synthetic' has no option 'example'"),
        (
            "teacher",
            {"weights": "/nowhere.pt"},
            r"teacher\.weights='/nowhere\.pt': expected a file or directory, got none",
        ),
        ("init", {"weights": "vit_b32"}, "expected OpenAI's weights at .*ViT-B-32.pt, got no file"),
        (
            "tokenizer",
            {"path": "/nowhere.txt"},
            r"tokenizer\.path='/nowhere\.txt': expected a file or directory, got none",
        ),
        ("eval", {"data_dir": "/nowhere"}, r"eval\.data_dir='/nowhere': expected a file or directory, got none"),
    ],
)
def test_dry_run_refuses_files_that_do_not_exist(section, values, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _ = runs.tiny_model()
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    with pytest.raises(ValueError, match=message):
        dry_run.describe(config, epath.Path("x"))


def test_missing_config_file_is_refused():
    _, messages = _run("--dry_run", config="configs/vit_b23.py", code=2)
    assert re.search(r"there is no config file configs/vit_b23.py; did you mean 'configs/vit_b\d+.py'\?", messages)
