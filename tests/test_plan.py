"""The command `python -m clip_jax.plan` in a subprocess."""

import json
import subprocess
import sys

import pytest

from clip_jax.planner.cost import Program
from tests import commands
from tests.test_planner import SAME_FLOPS


def run(*arguments):
    done = commands.run(["-m", "clip_jax.plan", *arguments])
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_command_prints_json_and_writes_the_hlo(tmp_path):
    pytest.importorskip("libtpu")
    code, out, err = run(
        *("--loss_only", "--loss=softmax", "--global_batch=131072", "--embed_dim=768", "--dtype=float32"),
        *("--topology=v4-32", "--json", f"--dump_hlo={tmp_path}/loss.hlo"),
    )
    assert code == 0 and "compiling for 16 chips of v4" in err
    found = json.loads(out)
    keys = "fits chips argument_bytes temporary_bytes peak_bytes flops model_flops hbm_bytes hbm_bytes_padded"
    keys += " collective_bytes collectives mfu_bound mfu_no_overlap images_per_second_per_chip"
    assert set(keys.split()) <= set(found)
    assert found["fits"] and found["chips"] == 16
    assert found["temporary_bytes"] <= 0.30 * 2**30
    assert found["flops"] == pytest.approx(found["traced_flops"], rel=SAME_FLOPS)
    assert Program((tmp_path / "loss.hlo").read_text()).cost().flops == found["flops"]


def test_command_exits_with_3_if_the_program_does_not_fit():
    pytest.importorskip("libtpu")
    code, out, _ = run("--loss_only", "--global_batch=33554432", "--embed_dim=4096", "--topology=v5e-4")
    assert code == 3 and "DOES NOT FIT" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_only"], "give --topology, e.g. --topology=v5e-256"),
        (["--topology=v5e-8"], "give --config, e.g. --config=configs/vit_l14.py"),
        (["--topology=v5e-8", "--loss_only", "--loss=hinge"], "--loss='hinge' is none of"),
        (["--topology=v5e-8", "--loss_only", "--global_batch=100"], "does not divide over 8 devices; use 96"),
        (["--topology=h100-8", "--loss_only"], "only TPUs can be compiled for without the device"),
        (["--topology=v5e-7", "--loss_only"], "no slice of 7 chips is sold; use v5e-4"),
        (["--topology=v5e-8", "--config=configs/vit_b32.py", "--config.train.batch_size=100"], "does not divide over"),
        (["--topology=h100-8", "--config=configs/vit_b32.py", "--config.teacher.weights=a.pt"], "without it"),
        (["--topology=v5e-8", "--loss_only", "--search"], "--search compiles steps: it needs --config"),
        (["--topology=v5e-8", "--nosuch"], "Unknown command line flag 'nosuch'"),
        (["--topology=v5e-8", "--config=configs/nope.py"], "there is no config file configs/nope.py"),
        (["--topology=v5e-8", "--config=configs/vit_b32.py", "--config.train.nosuch=1"], "no key 'train.nosuch'"),
        (["--topology=v5e-8", "--config=configs/vit_b32.py", "--config.loss.name=hinge"], "none of softmax, sigmoid"),
        (["--topology=v5e-8", "--config=configs/vit_b32.py", "--global_batch=8"], "use --config.train.batch_size=…"),
        (["--topology=v5e-8", "--config=configs/vit_b32.py", "--loss_only"], "--loss_only has no --config"),
        (
            ["--topology=h100-8", "--config=configs/vit_b32.py", "--dump_hlo=x"],
            "expected one compiled program, of a TPU",
        ),
        (["--topology=v5e-8", "--loss_only", "--dump_hlo=/no/such/x"], "there is no such folder"),
        (["--topology=v5e-8", "--loss_only", "--dump_hlo=/tmp"], "--dump_hlo=/tmp: expected a file, got a directory"),
    ],
)
def test_command_reports_invalid_arguments_in_one_line(arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and message in err and not out and "Traceback" not in err


def test_missing_libtpu_error_names_the_package_to_install():
    script = "import sys; sys.modules['libtpu'] = None; from clip_jax.planner.topology import parse_topology;"
    script += " parse_topology('v5e-8').devices()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'jax[tpu]'" in done.stderr
