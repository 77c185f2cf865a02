"""Programs of a run are compiled once, and the log has the seconds of the start."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from clip_jax.training import startup


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep all programs, also those that compile quickly, in a workdir; return their folder."""
    before = {
        name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_raise_persistent_cache_errors")
    }
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    startup.keep_programs(epath.Path(tmp_path))
    yield tmp_path / startup.PROGRAMS
    for name, value in before.items():
        jax.config.update(name, value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


def _start(caplog):
    """Return the result of a first step, and the last line of the log."""
    jax.clear_caches()
    compilation_cache.reset_cache()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with caplog.at_level("INFO"), startup.StartUp(time.monotonic() - 5) as start_up:
        start_up.phase("data")
        result = jax.jit(lambda x: (jnp.sin(x) * 3).sum())(x)
        start_up.finish("first step", result)
        start_up.phase("second step")
        start_up.finish("second step", result)
    return np.asarray(result), caplog.messages[-1]


def test_second_start_reads_the_programs_of_the_first(kept, caplog):
    result, line = _start(caplog)
    assert re.fullmatch(
        r"first step 5\.\d s after the start: imports 5\.\d s, data 0\.\d s, first step \d\.\d s;"
        r" \d\.\d s of it for 1 programs, 0 of them compiled before",
        line,
    )
    again, line = _start(caplog)
    assert line.endswith("for 1 programs, 1 of them compiled before")
    assert again == result


def test_damaged_programs_are_compiled(kept, caplog):
    result, _ = _start(caplog)
    (program,) = kept.glob("*-cache")
    program.write_bytes(program.read_bytes()[:100])
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        again, line = _start(caplog)
    assert line.endswith("0 of them compiled before")
    assert again == result


def test_the_users_folder_for_programs_is_kept(monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/users/choice")
    try:
        startup.keep_programs(epath.Path(tmp_path))
        assert jax.config.jax_compilation_cache_dir == "/users/choice"
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
