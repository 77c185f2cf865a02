"""Whole runs: killed, asked to leave, on one process and two, and always the run that would have been."""

import json
import random
import shutil
import signal
import time

import pytest

import clip_jax
from tests import runs

TOTAL = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of one process with two devices that nothing happened to."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    runs.finish(runs.start(workdir, devices=2))
    return workdir


@pytest.fixture
def random_step():
    """A step to interrupt at, another one in every session; printed if the test fails."""
    step = random.SystemRandom().randrange(3, 30)
    print(f"interrupted at step {step}")
    return step


@pytest.fixture(scope="module")
def killed_as_two(tmp_path_factory):
    """A run of two processes, both killed with SIGKILL."""
    workdir = tmp_path_factory.mktemp("killed_as_two")
    processes = runs.start_two(workdir)
    runs.wait_for_step(processes[0], random.SystemRandom().randrange(8, 30))
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    return workdir


def test_killed_and_started_again_is_the_uninterrupted_run_bit_for_bit(uninterrupted, tmp_path, random_step):
    process = runs.start(tmp_path, devices=2)
    runs.wait_for_step(process, random_step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    runs.finish(runs.start(tmp_path, devices=2))
    assert runs.fingerprint(tmp_path, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_two_processes_killed_go_on_as_two_bit_for_bit(uninterrupted, killed_as_two, tmp_path):
    workdir = shutil.copytree(killed_as_two, tmp_path / "run")
    said = runs.finish(*runs.start_two(workdir))
    assert "going on from the checkpoint of step" in said[0]
    assert runs.fingerprint(workdir, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_two_processes_killed_go_on_as_one_bit_for_bit(uninterrupted, killed_as_two, tmp_path):
    workdir = shutil.copytree(killed_as_two, tmp_path / "run")
    said = runs.finish(runs.start(workdir, devices=2))
    assert "going on from the checkpoint of step" in said[0]
    assert runs.fingerprint(workdir, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_sigterm_to_any_host_saves_the_same_step_on_both_and_leaves_with_0(uninterrupted, tmp_path, random_step):
    asked = random_step % 2
    processes = runs.start_two(tmp_path)
    runs.wait_for_step(processes[0], random_step)
    processes[asked].send_signal(signal.SIGTERM)
    # JAX looks for the signal once a second, in which a fast machine ends the run: the other host holds it up.
    processes[1 - asked].send_signal(signal.SIGSTOP)
    time.sleep(2)
    processes[1 - asked].send_signal(signal.SIGCONT)
    for words in runs.finish(*processes, code=0):
        assert "stopped by SIGTERM, state saved" in words
    runs.finish(runs.start(tmp_path, devices=2))
    assert runs.fingerprint(tmp_path, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_hosts_with_different_configs_stop_at_the_start_and_say_which(tmp_path):
    processes = runs.start_two(tmp_path, second=["--config.train.seed=1"])
    for words in runs.finish(*processes, code=1):
        assert "hosts disagree with process 0 in: config (processes 1)" in words


def test_two_processes_that_hold_half_of_every_parameter_run_alike(uninterrupted, tmp_path):
    """To rounding, since sums are in another order; and what neither holds whole is evaluated and exported."""
    export = tmp_path / "params.msgpack"
    runs.finish(*runs.start_two(tmp_path / "run", "--config.mesh.fsdp=2", f"--export={export}"))
    last, expected = (
        json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        for workdir in (tmp_path / "run", uninterrupted)
    )
    assert last["step"] == expected["step"] == TOTAL
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert clip_jax.load(export).encode_text(["a"]).shape == (1, runs.tiny_model()[1].embed_dim)
