"""`--config=FILE:runlocal` of every config trains, evaluates and finishes.

Here with a few steps of small batches; tests/test_docs_commands.py runs the documented one as it is.
"""

import pytest

from tests import commands, runs
from tests.test_config import CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_runlocal_trains_and_evaluates(name, tmp_path):
    command = ["-m", "clip_jax.main", f"--config=configs/{name}.py:runlocal", f"--workdir={tmp_path}"]
    command += ["--config.train.batch_size=16", "--config.train.total_steps=6"]
    env = runs.QUICK | {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    result = commands.run(command, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "retrieval/shapes/image_to_text/recall_at_1" in result.stdout
    assert result.stderr.endswith("finished\n")
    assert "Traceback" not in result.stderr
