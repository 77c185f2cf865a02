"""The command line: what it prints, what it refuses, and with which code it leaves."""

import pytest

from tests import runs

DRY = ("--dry_run",)


def _run(*flags: str, config: str = runs.TINY, workdir: str = "/tmp/never-written", code: int) -> tuple[str, str]:
    process = runs.start(workdir, *flags, config=config)
    out, words = process.communicate(timeout=120)
    assert process.returncode == code, words
    return out, words


def test_a_dry_run_prints_what_would_happen():
    out, _ = _run("--dry_run", "--config.train.batch_size=4096", config="configs/vit_b32.py", code=0)
    for line in ("vit_b32", "parameters:          151,277,313", "4,096", "3,125,000", "1.69 GiB"):
        assert line in out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.batch_sise=512", 'Did you mean "batch_size"'),
        ("--config.optim.learning_rate=nan", "optim.learning_rate=nan is not a finite number"),
        ("--config.train.batch_size=0", "train.batch_size=0 is out of range"),
        ("--config.loss.name=sofmax", "did you mean 'softmax'?"),
    ],
)
def test_a_wrong_flag_is_answered_with_one_sentence(flag, message):
    _, words = _run(flag, "--dry_run", code=2)
    assert message in words and "Traceback" not in words


def test_a_missing_config_file_is_named():
    _, words = _run("--dry_run", config="configs/vit_b23.py", code=2)
    assert "there is no config file configs/vit_b23.py" in words
