"""Command line: output, refused flags, exit codes."""

import re

import pytest

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
        ("--config.train.batch_sise=512", 'Did you mean "batch_size"'),
        ("--config.optim.learning_rate=nan", "optim.learning_rate=nan is not a finite number"),
        ("--config.train.batch_size=0", "train.batch_size=0 is out of range"),
        ("--config.loss.name=sofmax", "did you mean 'softmax'?"),
        ("--config.init.weights=gs://bucket/w.msgpack", "init.weights=gs://bucket/w.msgpack: expected a local path"),
        ("--workdir=https://host/run", "--workdir=https://host/run: expected a local path, gs:// or s3://"),
    ],
)
def test_wrong_flag_is_refused_with_one_sentence(flag, message):
    _, messages = _run(flag, "--dry_run", code=2)
    assert message in messages and "Traceback" not in messages


def test_missing_config_file_is_refused():
    _, messages = _run("--dry_run", config="configs/vit_b23.py", code=2)
    assert re.search(r"there is no config file configs/vit_b23.py; did you mean 'configs/vit_b\d+.py'\?", messages)
