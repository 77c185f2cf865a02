"""`python -m clip_jax.evaluate`, as a user types it."""

import contextlib
import csv
import json
import os
import socket
import subprocess
import sys

import pytest

from clip_jax.architectures import MODELS, WeightsConfig
from clip_jax.evals.registry import DATASETS
from clip_jax.interop import msgpack
from tests import runs, tiny_models

ALONE = ("--suite=digits", "--tasks=zeroshot,linear_probe", "--cache_dir=")  # nothing is shared between runs


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.msgpack"
    msgpack.write(path, tiny_models.params(MODELS["emoji"]), WeightsConfig(MODELS["emoji"]))
    return path


def start(*arguments, process=0, processes=1, port=0):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(runs.ROOT),
        "CLIP_JAX_HEARTBEAT_SECONDS": "20",
        "CLIP_JAX_SHUTDOWN_SECONDS": "10",
        "JAX_COMPILATION_CACHE_DIR": str(runs.CACHE),  # for time alone: the programs of other batch sizes are others
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
    command = [sys.executable, "-m", "clip_jax.evaluate", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=runs.ROOT, env=environment, **pipes)


def run(*arguments, processes=1, code=0):
    """Return what each process printed, and said to stderr."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        started = [start(*arguments, process=i, processes=processes, port=port) for i in range(processes)]
        for process in started:
            stack.callback(process.kill)
        said = [process.communicate(timeout=240) for process in started]
    for process, words in zip(started, said, strict=True):
        assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{words[0]}{words[1]}"
    return said


def report(directory):
    return json.loads((directory / "report.json").read_text())


def numbers(directory):
    """Return the metrics, and of each set what they are of: with it l2, so that probes are the same."""
    return {
        key: value
        for key, value in report(directory).items()
        if key.startswith(("zeroshot/", "linear_probe/", "run/measured"))
    }


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory):
    """What one process wrote with the default batch, and printed."""
    out = tmp_path_factory.mktemp("alone")
    ((printed, _),) = run(f"--weights={weights}", f"--out={out}", *ALONE)
    return out, printed


def test_a_set_is_measured_and_written_down(alone, weights):
    out, printed = alone
    found = report(out)
    # Edges of random sizes see digits, and words mean nothing.
    assert found["linear_probe/digits/top1"] > 0.9 and 0 < found["zeroshot/digits/top1"] < 0.3
    assert found["run/architecture"] == "emoji" and found["run/weights"] == str(weights)
    assert found["run/name"] == "small" and found["run/parameters"] == 3_497_567
    for task in ("zeroshot", "linear_probe"):
        said = found[f"run/measured.{task}/digits"]
        assert "450 pictures of the test split" in said and "48 px" in said and f"{task}/digits: {said}" in printed
        value = f"{found[f'{task}/digits/top1']:.3f}"
        card = (out / "MODEL_CARD.md").read_text()
        assert f"| {task}/digits/top1 | {value} |" in card and f"- {task}/digits: {said}." in card
        assert value in next(line for line in printed.splitlines() if line.startswith(f"{task}/digits/top1 "))
    (row,) = csv.DictReader((out / "open_clip.csv").open())
    assert row[DATASETS["digits"].title] == f"{found['zeroshot/digits/top1']:.4f}"
    assert "<html" in (out / "report.html").read_text()


@pytest.mark.parametrize("processes", [2, 3])
def test_numbers_do_not_depend_on_the_number_of_processes(alone, weights, tmp_path, processes):
    expected = numbers(alone[0])
    assert len(expected) > 20
    said = run(f"--weights={weights}", f"--out={tmp_path}", *ALONE, processes=processes)
    assert numbers(tmp_path) == expected
    assert all("digits" not in printed for printed, _ in said[1:])  # one process prints results


def test_numbers_do_not_depend_on_batches_nor_on_features_on_disk(alone, weights, tmp_path):
    features = tmp_path / "features"
    flags = (f"--weights={weights}", *ALONE[:2], f"--cache_dir={features}")
    run(*flags, f"--out={tmp_path / 'first'}", "--batch_size=7")
    written = {path: path.stat().st_mtime_ns for path in features.iterdir()}
    assert len(written) == 3  # embeddings of the test split, features of both
    run(*flags, f"--out={tmp_path / 'second'}")
    assert {path: path.stat().st_mtime_ns for path in features.iterdir()} == written
    assert numbers(tmp_path / "first") == numbers(tmp_path / "second") == numbers(alone[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either --weights=FILE"),
        (("--weights=/nowhere.msgpack",), "/nowhere.msgpack: there is no such file"),
        (("--weights=WEIGHTS", "--suite=cifar11"), "there is no set or suite 'cifar11': use paper, robustness"),
        (("--weights=WEIGHTS", "--tasks=zeroshots"), "--tasks: there is no 'zeroshots'; use zeroshot, retrieval"),
        (("--weights=WEIGHTS", "digits"), "unexpected argument 'digits'; flags begin with --"),
        (("--weights=WEIGHTS", "--dtype=float16"), "float16"),
        (("--weights=WEIGHTS", "--wieghts=x"), "wieghts"),
        (("--weights=WEIGHTS", "--suite="), "--suite"),
    ],
)
def test_wrong_input_ends_with_2_and_one_sentence(weights, tmp_path, arguments, message):
    arguments = [argument.replace("WEIGHTS", str(weights)) for argument in arguments]
    ((printed, said),) = run(*arguments, "--cache_dir=", f"--out={tmp_path / 'out'}", code=2)
    assert printed == "" and message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sets_that_are_not_here_are_listed_with_what_brings_them(weights, tmp_path):
    sets = "--suite=birdsnap,flickr30k,winogavil", "--tasks=zeroshot,retrieval,linear_probe"
    out, data = tmp_path / "out", tmp_path / "data"
    ((printed, _),) = run(f"--weights={weights}", f"--out={out}", f"--data_dir={data}", "--cache_dir=", *sets)
    left_out = {key: value for key, value in report(out).items() if key.startswith("run/left_out")}
    reasons = {
        "zeroshot/birdsnap": f"{data}/wds_birdsnap_test/test is no folder",
        "linear_probe/birdsnap": f"{data}/wds_birdsnap_test/test is no folder",
        "retrieval/flickr30k": f"{data}/wds_flickr30k/test is no folder",
        "zeroshot/winogavil": "cues with several pictures",
    }
    assert set(left_out) == {f"run/left_out.{key}" for key in reasons}
    assert not [key for key in report(out) if not key.startswith("run/")]
    card = (out / "MODEL_CARD.md").read_text()
    for key, reason in reasons.items():
        assert reason in left_out[f"run/left_out.{key}"]
        assert f"{key} is left out: " in printed and f"- {key}: " in card
