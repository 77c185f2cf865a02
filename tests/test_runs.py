"""Whole runs on one and two processes, killed and preempted: the result equals that of an uninterrupted run."""

import json
import random
import shutil
import signal
import time

import pytest

import clip_jax
from tests import runs

pytestmark = pytest.mark.slow

TOTAL = 40


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the workdir of an uninterrupted run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    runs.finish(runs.start(workdir, devices=2))
    return workdir


@pytest.fixture
def random_step():
    """Return the step of the interruption, random in every session; printed if the test fails."""
    step = random.SystemRandom().randrange(3, 30)
    print(f"interrupted at step {step}")
    return step


@pytest.fixture(scope="module")
def killed_as_two(tmp_path_factory):
    """Return the workdir of a run of two processes, both killed with SIGKILL."""
    workdir = tmp_path_factory.mktemp("killed_as_two")
    processes = runs.start_two(workdir)
    runs.wait_for_step(processes[0], random.SystemRandom().randrange(8, 30))
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    return workdir


def test_killed_and_resumed_run_equals_uninterrupted_run(uninterrupted, tmp_path, random_step):
    process = runs.start(tmp_path, devices=2)
    runs.wait_for_step(process, random_step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    runs.finish(runs.start(tmp_path, devices=2))
    assert runs.fingerprint(tmp_path, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_two_killed_processes_resume_as_two(uninterrupted, killed_as_two, tmp_path):
    workdir = shutil.copytree(killed_as_two, tmp_path / "run")
    messages = runs.finish(*runs.start_two(workdir))
    assert "restored the checkpoint of step" in messages[0]
    assert runs.fingerprint(workdir, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_two_killed_processes_resume_as_one(uninterrupted, killed_as_two, tmp_path):
    workdir = shutil.copytree(killed_as_two, tmp_path / "run")
    messages = runs.finish(runs.start(workdir, devices=2))
    assert "restored the checkpoint of step" in messages[0]
    assert runs.fingerprint(workdir, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_sigterm_to_one_host_saves_the_same_step_on_both_and_exits_with_0(uninterrupted, tmp_path, random_step):
    terminated = random_step % 2
    processes = runs.start_two(tmp_path)
    runs.wait_for_step(processes[0], random_step)
    processes[terminated].send_signal(signal.SIGTERM)
    # JAX polls for the signal once per second, in which a fast machine finishes the run: stop the other host.
    processes[1 - terminated].send_signal(signal.SIGSTOP)
    time.sleep(2)
    processes[1 - terminated].send_signal(signal.SIGCONT)
    for messages in runs.finish(*processes, code=0):
        assert "stopped by SIGTERM, state saved" in messages
    runs.finish(runs.start(tmp_path, devices=2))
    assert runs.fingerprint(tmp_path, TOTAL) == runs.fingerprint(uninterrupted, TOTAL)


def test_hosts_with_different_configs_stop_at_the_start(tmp_path):
    processes = runs.start_two(tmp_path, second=["--config.train.seed=1"])
    for messages in runs.finish(*processes, code=1):
        assert "hosts disagree with process 0 in: config (processes 1)" in messages


def test_two_processes_with_fsdp_equal_one_process(uninterrupted, tmp_path):
    """Equal to rounding, as sums have another order. Parameters that no host holds in full are exported."""
    export = tmp_path / "params.msgpack"
    runs.finish(*runs.start_two(tmp_path / "run", "--config.mesh.fsdp=2", f"--export={export}"))
    last, expected = (
        json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        for workdir in (tmp_path / "run", uninterrupted)
    )
    assert last["step"] == expected["step"] == TOTAL
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert clip_jax.load(export).encode_text(["a"]).shape == (1, runs.tiny_model()[1].embed_dim)
