"""benchmarks/accelerator.py at tiny sizes: the batch search, the sections, and the report after failures."""

import importlib
import json
import pathlib
import subprocess
import sys
import time

import jax
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("accelerator")


@pytest.mark.parametrize("limit", [1, 3, 32, 100, 250, 2047])
def test_largest_batch_is_found_within_an_eighth(accelerator, limit):
    section = {}
    accelerator.largest_batch(
        lambda rows: {"step_seconds": rows} if rows <= limit else None, 32, time.monotonic() + 60, section.update
    )
    rows = section["largest"]["rows_per_device"]
    assert limit * 7 / 8 - 1 <= rows <= limit and section["largest"]["step_seconds"] == rows
    assert [x["rows_per_device"] for x in section["attempts"] if not x["fits"]]
    assert len(section["attempts"]) <= 12


def test_batch_search_keeps_its_results_at_the_deadline(accelerator):
    section = {}
    accelerator.largest_batch(lambda rows: {"step_seconds": rows}, 8, time.monotonic() - 1, section.update)
    assert section["largest"]["rows_per_device"] == 8 and len(section["attempts"]) == 1


def test_attention_section_passes_and_judges_by_the_tolerance(accelerator, monkeypatch):
    section = {}
    accelerator.attention(True, 0.0, section.update)
    assert section["passed"] and set(section["cases"]) == {"image", "packed text"}
    errors = section["cases"]["image"]["errors"]
    assert set(errors) == {"output", "d_query", "d_key", "d_value"} and 0 < max(errors.values()) < 0.02
    monkeypatch.setattr(accelerator, "ATTENTION_TOLERANCE", 1e-4)
    accelerator.attention(True, 0.0, section.update)
    assert not section["passed"]


@pytest.mark.slow
def test_training_section_searches_past_out_of_memory_errors(accelerator, monkeypatch):
    from clip_jax.devices import sharding
    from clip_jax.planner import predict

    lower_step, mesh = predict.lower_step, sharding.make_mesh(jax.devices()[:1])

    def with_little_memory(config, mesh, total_steps):
        if config.train.batch_size > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")
        return lower_step(config, mesh, total_steps)

    monkeypatch.setattr(predict, "lower_step", with_little_memory)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    monkeypatch.setattr(accelerator, "_first_rows", lambda *_: 4)
    section = {}
    accelerator.train("vit_b16", True, time.monotonic() + 300, section.update)
    largest = section["largest"]
    assert largest["rows_per_device"] == 4 and largest["mfu"] > 0 and largest["hardware_flops_utilization"] > 0
    assert largest["peak_bytes"] > 0 and largest["loss"] > 0 and set(section["attention"]) == {"image", "text"}
    assert "out of memory" in accelerator.table(
        {
            "device": None,
            "small": True,
            "speed_relative_to_torch": None,
            "sections": {"vit_b16": section | {"status": "ok", "seconds": 1.0}},
        }
    )


def test_script_records_failures_and_timeouts_and_goes_on(accelerator, monkeypatch, tmp_path, capsys):
    """No accelerator fails the first section; the second does not start in time; torch may be missing."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    failed = accelerator.run_section("truth", 60, small=False)
    assert failed["status"] == "failed" and "JAX finds no GPU or TPU" in failed["error"]
    code = accelerator.main([f"--out={tmp_path}/out.json", "--small", "--seconds=0.2", "--sections=vit_l14,truth"])
    report = json.loads((tmp_path / "out.json").read_text())
    assert code == 1 and {x["status"] for x in report["sections"].values()} == {"timeout"}
    assert "vit_l14: timeout" in capsys.readouterr().out


def test_sections_import_neither_tensorflow_nor_orbax_nor_torch():
    script = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import accelerator, truth;"
    script += " print({name.split('.')[0] for name in sys.modules} & {'tensorflow', 'orbax', 'torch', 'libtpu'})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
