"""Benchmark a GPU or TPU in ten minutes: attention numerics, training speed, torch's speed, the planner's predictions.

  python benchmarks/accelerator.py --out=accelerator.json
  python benchmarks/accelerator.py --small  # the same at tiny sizes on the CPU, in about a minute

It needs JAX for the device and clip_jax without extras; torch and open_clip are used if they are installed. Every
section runs in a process of its own with a time budget, so a crash, a timeout or running out of memory is recorded in
the JSON file, and the other sections still run. One host only.

  attention  bfloat16 attention (cuDNN, Pallas kernel), output and gradients, against float32 XLA on the CPU
  vit_b16    training steps at the largest batch that fits: images/s, MFU, memory
  vit_l14    the same
  torch      open_clip's ViT-B/16 step (torch.nn modules if open_clip is missing) in bfloat16 on the same card
  truth      benchmarks/truth.py: FLOPs, memory and time as planned and as measured

Exit code 1 if a section failed or an attention error exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

Record = Callable[[dict[str, Any]], None]  # adds entries to the section's part of the report
Attempt = Callable[[int], dict[str, Any] | None]  # rows per device -> figures of a step; None if out of memory

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 600
SHARES = {"attention": 70, "vit_b16": 150, "vit_l14": 190, "torch": 90, "truth": 90}  # of SECONDS
STEPS = 5  # that are timed per batch size
# Relative to the largest element: three roundings to bfloat16 (2**-8 each) of probabilities, operands and results.
ATTENTION_TOLERANCE = 0.02
SMALL_MAX_ROWS = 12  # in place of the device's memory


def main(arguments: list[str]) -> int:
    """Run all sections, print the table, write the JSON file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="accelerator.json", help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time budget of all sections")
    parser.add_argument("--sections", default=",".join(SHARES), help="comma-separated sections to run")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # of a child process
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        _run_child(options.section, options.small, options.seconds, pathlib.Path(options.result))
        return 0
    names = options.sections.split(",")
    if unknown := sorted(set(names) - set(SHARES)):
        parser.error(f"--sections: expected some of {', '.join(SHARES)}, got {', '.join(unknown)}")
    report: dict[str, Any] = {"small": options.small, "seconds": 0.0, "sections": {}}
    start = time.monotonic()
    for name in names:
        left = options.seconds - (time.monotonic() - start)
        budget = left * SHARES[name] / sum(SHARES[x] for x in names[names.index(name) :])
        print(f"{name}: at most {budget:.0f} s", file=sys.stderr, flush=True)
        section = run_section(name, budget, small=options.small)
        report["device"] = report.get("device") or section.pop("device", None)
        report["sections"][name] = section
        report["seconds"] = time.monotonic() - start
        report["speed_relative_to_torch"] = _torch_ratio(report["sections"])
        pathlib.Path(options.out).write_text(json.dumps(report, indent=2), encoding="utf-8")
        print(f"{name}: {section['status']} after {section['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(report))
    bad = [x for x in report["sections"].values() if x["status"] in ("failed", "timeout") or x.get("passed") is False]
    return 1 if bad else 0


def run_section(name: str, budget: float, *, small: bool) -> dict[str, Any]:
    """Run a section in a child process and return its part of the report, partial after a failure or timeout."""
    start = time.monotonic()
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    platforms = "cpu" if small else environment.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        platforms += ",cpu"  # the reference and FLOPs counting use the CPU backend
    environment["JAX_PLATFORMS"] = platforms
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    with tempfile.TemporaryDirectory() as folder:
        result, log = pathlib.Path(folder) / "result.json", pathlib.Path(folder) / "log"
        command = [sys.executable, __file__, f"--section={name}", f"--result={result}", f"--seconds={budget}"]
        with log.open("wb") as output:
            try:
                process = subprocess.run(
                    [*command, *(["--small"] if small else [])],
                    **{"stdout": output, "stderr": subprocess.STDOUT, "timeout": budget, "env": environment},
                    check=False,
                )
                status = "ok" if process.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
        section = json.loads(result.read_text()) if result.exists() else {}
        if section.get("skipped"):
            status = "skipped"
        if status == "failed":
            section.setdefault("error", log.read_text(errors="replace")[-2000:])
        return {"status": status, "seconds": time.monotonic() - start, "budget_seconds": budget} | section


def _run_child(name: str, small: bool, seconds: float, result: pathlib.Path) -> None:
    """Run a section in this process; its deadline leaves a tenth of the budget for the last batch size."""
    section: dict[str, Any] = {}

    def record(entries: dict[str, Any]) -> None:
        section.update(entries)
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps(section), encoding="utf-8")
        partial.replace(result)

    try:
        RUN[name](small, time.monotonic() + 0.9 * seconds, record)
    except BaseException as error:
        record({"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-4000:]})
        raise


def largest_batch(attempt: Attempt, start: int, deadline: float, record: Record) -> None:
    """Find the largest number of rows per device that fits: doubling or halving, then bisection to an eighth.

    After every attempt, `record` gets all `attempts` and the `largest` that fits. The search ends early if the time for
    another attempt as long as the last is not left before `deadline`.
    """
    fits, fails, attempts, rows = {}, set(), [], start
    while True:
        began = time.monotonic()
        found = attempt(rows)
        if found is None:
            fails.add(rows)
        else:
            fits[rows] = found
        took = time.monotonic() - began
        attempts.append({"rows_per_device": rows, "fits": found is not None, "attempt_seconds": took} | (found or {}))
        low, high = max(fits, default=0), min(fails, default=0)
        record({"attempts": attempts} | ({"largest": {"rows_per_device": low} | fits[low]} if fits else {}))
        rows = low * 2 if not high else high // 2 if not low else _round_down((low + high) // 2)
        finished = rows < 1 or rows in fits or rows in fails or (low and high and high - low <= low // 8)
        if finished or time.monotonic() + took > deadline:
            return


def _round_down(rows: int) -> int:
    """Round down to four significant bits."""
    unit = 1 << max(0, rows.bit_length() - 4)
    return rows // unit * unit


# ------------------------------------------------------------------------------------------------------ JAX sections


def device_info(*, small: bool) -> dict[str, Any]:
    """Return the device and the versions; refuse a CPU without `small`."""
    import jax

    import clip_jax

    device = jax.devices()[0]
    if device.platform == "cpu" and not small:
        raise RuntimeError("JAX finds no GPU or TPU; install jax[cuda13] or jax[tpu], or try --small")
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "jax": jax.__version__,
        "clip_jax": clip_jax.__version__,
    }


def small_architecture() -> Any:
    """Return a ViT model with the structure of ViT-B/16 and minimal sizes."""
    from clip_jax.config import MODELS, Architecture

    image = dataclasses.replace(MODELS["vit_b16"].image, image_size=32, patch_size=8, width=64, layers=2, heads=2)
    text = dataclasses.replace(
        MODELS["vit_b16"].text, vocab_size=64, eos_id=63, context_length=16, width=64, layers=2, heads=2
    )
    return Architecture(image, text, 64)


def attention(small: bool, deadline: float, record: Record) -> None:
    """Compare the device's bfloat16 attention, output and gradients, with XLA's in float32 on the CPU."""
    del deadline
    record({"device": device_info(small=small)})
    # name: tokens, keys, heads, head width, causal, masked
    cases = {
        "ViT-B/16 image": (197, 197, 12, 64, False, False),
        "ViT-L/14 image": (257, 257, 16, 64, False, False),
        "text": (77, 77, 8, 64, True, False),
        "packed text": (77, 154, 8, 64, False, True),
    }
    if small:
        cases = {"image": (17, 17, 2, 64, False, False), "packed text": (16, 32, 2, 64, False, True)}
    results = {}
    for name, case in cases.items():
        results[name] = _attention_errors(*case, rows=2 if small else 16)
        record(
            {"cases": results, "tolerance": ATTENTION_TOLERANCE, "passed": all(x["passed"] for x in results.values())}
        )


def _attention_errors(
    tokens: int, keys: int, heads: int, head_dim: int, causal: bool, masked: bool, *, rows: int
) -> dict[str, Any]:
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from clip_jax.devices import sharding
    from clip_jax.models.attention import AttentionShape, attend, attention_implementation, short_attention

    random, width = np.random.default_rng(0), heads * head_dim
    shapes = [(rows, tokens, width), (rows, keys, width), (rows, keys, width), (rows, tokens, width)]
    query, key, value, d_out = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes)
    mask = jnp.asarray(random.random((rows, tokens, keys)) < 0.3).at[:, :, 0].set(True) if masked else None
    mesh = sharding.make_mesh(jax.devices()[:1])
    options = {"heads": heads, "causal": causal, "mask_BLM": mask}
    implementation = attention_implementation(AttentionShape(heads, head_dim, keys), mesh, masked=masked)
    device = functools.partial(attend, **options, batch_sharding=sharding.batch_sharding(mesh))
    if mesh.devices.flat[0].platform == "cpu":
        implementation = "Pallas kernel, interpreted"
        device = functools.partial(short_attention, mask_BLM=mask, head_dim=head_dim, causal=causal, interpret=True)

    def run(function: Callable, *inputs: jax.Array) -> dict[str, np.ndarray]:
        def value_and_gradients(*inputs: jax.Array) -> tuple:
            out, pullback = jax.vjp(function, *inputs[:3])
            return (out, *pullback(inputs[3]))

        found = jax.jit(value_and_gradients)(*inputs)
        names = ("output", "d_query", "d_key", "d_value")
        return {name: np.asarray(x, np.float32) for name, x in zip(names, found, strict=True)}

    inputs = (query, key, value, d_out)
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("float32"):
        on_cpu = [jnp.asarray(np.asarray(x, np.float32)) for x in inputs]
        mask_on_cpu = None if mask is None else jnp.asarray(np.asarray(mask))
        expected = run(functools.partial(attend, **options | {"mask_BLM": mask_on_cpu}), *on_cpu)
    errors, xla_errors = (
        {name: float(np.abs(x - expected[name]).max() / np.abs(expected[name]).max()) for name, x in found.items()}
        for found in (run(device, *inputs), run(functools.partial(attend, **options), *inputs))
    )
    passed = all(error <= ATTENTION_TOLERANCE for error in errors.values())
    return {"implementation": implementation, "errors": errors, "xla_bfloat16_errors": xla_errors, "passed": passed}


def train(name: str, small: bool, deadline: float, record: Record) -> None:
    """Time training steps of a preset at the largest batch that fits."""
    import jax
    import truth

    from clip_jax.config import MODELS
    from clip_jax.devices import sharding
    from clip_jax.models import flops
    from clip_jax.models.clip import attention_implementations
    from clip_jax.planner import predict

    record({"device": device_info(small=small)})
    architecture = small_architecture() if small else MODELS[name]
    mesh, (flops_rate, _, source) = sharding.make_mesh(), truth.device_rates(512 if small else 4096)
    options = truth.make_config(architecture, mesh.size).train
    implementations = attention_implementations(
        architecture, mesh, dtype=options.dtype, text_capacity=options.text_capacity
    )
    record({"model": name, "dtype": options.dtype, "remat": options.remat, "attention": implementations})
    record({"flops_per_second": flops_rate, "rates_from": source})

    def attempt(rows: int) -> dict[str, Any] | None:
        if small and rows > SMALL_MAX_ROWS:
            return None
        config = truth.make_config(architecture, rows * mesh.size)
        try:
            lowered, abstract_state, _ = predict.lower_step(config, mesh, 100)
            program = lowered.compile()
            state = truth.init_state(config, mesh, abstract_state)
            batch = sharding.to_global(truth.noise_batch(config), mesh)
            state, _ = jax.block_until_ready(program(state, batch))
            start = time.monotonic()
            for _ in range(STEPS):
                state, metrics = program(state, batch)
            loss = float(metrics["loss"])
            seconds = (time.monotonic() - start) / STEPS
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            return None
        memory = program.memory_analysis()
        model_flops = flops.training_flops(architecture) * rows
        return {
            "loss": loss,
            "step_seconds": seconds,
            "images_per_second_per_device": rows / seconds,
            "mfu": model_flops / seconds / flops_rate,
            "hardware_flops_utilization": truth.traced_flops(config, mesh) / seconds / flops_rate,
            "program_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            "peak_bytes": truth.peak_bytes(),
        }

    largest_batch(attempt, _first_rows(architecture, mesh), deadline, record)


def _first_rows(architecture: Any, mesh: Any) -> int:
    """Return the rows per device whose state, saved activations and as many temporaries fill half of the memory."""
    import jax
    import truth

    from clip_jax.models import count_parameters, make_model
    from clip_jax.planner import predict

    capacity = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    saved = predict.saved_bytes(truth.make_config(architecture, 8 * mesh.size), mesh) / 8
    # float32 parameters, gradients and two moments
    state = 4 * 4 * count_parameters(jax.eval_shape(make_model(architecture).init, jax.random.key(0)))
    return max(8, _round_down(int((0.5 * capacity - state) / (2 * saved)))) if capacity > state else 8


def run_truth(small: bool, deadline: float, record: Record) -> None:
    """Compare the planner's figures with measurements."""
    import truth

    from clip_jax.config import MODELS

    del deadline
    record({"device": device_info(small=small), "model": "vit_b16"})
    architecture = small_architecture() if small else MODELS["vit_b16"]
    record(truth.compare(architecture, 8 if small else 64, rates_side=512 if small else 4096))


def run_torch(small: bool, deadline: float, record: Record) -> None:
    """Time torch's training step of ViT-B/16 on the same device, if there is torch."""
    try:
        import torch
    except ImportError:
        record({"skipped": "torch is not installed"})
        return
    if not small and not torch.cuda.is_available():
        record({"skipped": "torch finds no CUDA device"})
        return
    import accelerator_torch

    accelerator_torch.train(small, deadline, record)


# ------------------------------------------------------------------------------------------------------------- report


def _torch_ratio(sections: dict[str, Any]) -> float | None:
    rates = [
        sections.get(name, {}).get("largest", {}).get("images_per_second_per_device") for name in ("vit_b16", "torch")
    ]
    return rates[0] / rates[1] if all(rates) else None


def table(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [json.dumps(report["device"]), ""]
    for name, section in report["sections"].items():
        lines.append(f"{name}: {section['status']}, {section['seconds']:.0f} s")
        lines += [f"  {section[key]}" for key in ("skipped", "error") if key in section]
        for case, found in section.get("cases", {}).items():
            errors = ", ".join(f"{key} {error:.1e}" for key, error in found["errors"].items())
            verdict = "passed" if found["passed"] else f"FAILED: above {section['tolerance']}"
            xla = max(found["xla_bfloat16_errors"].values())
            lines.append(f"  {case}, {found['implementation']}: {errors}; XLA in bfloat16 {xla:.1e}: {verdict}")
        lines += [f"  {section[key]}" for key in ("model",) if key in section]
        if "attention" in section:
            lines.append("  attention: " + ", ".join(f"{tower} {how}" for tower, how in section["attention"].items()))
        for found in section.get("attempts", []):
            mark = "*" if found["rows_per_device"] == section.get("largest", {}).get("rows_per_device") else " "
            lines.append(f" {mark}{found['rows_per_device']:>6} rows per device: {_figures(found)}")
        if "bound_seconds" in section:
            lines.append(
                "  step {:.4f} s, bounds {:.4f} to {:.4f} s".format(section["step_seconds"], *section["bound_seconds"])
            )
            lines.append(
                f"  memory predicted {section['predicted_bytes'] / 1e9:.3f} GB,"
                f" measured {section['measured_bytes'] / 1e9:.3f} GB"
            )
    if report["speed_relative_to_torch"]:
        model = "tiny sizes, not representative" if report["small"] else "ViT-B/16"
        lines += ["", f"ratio: {report['speed_relative_to_torch']:.2f} times torch's images/s ({model})"]
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> str:
    if not found["fits"]:
        return "out of memory"
    text = f"{found['images_per_second_per_device']:.1f} images/s, {found['step_seconds']:.4f} s per step"
    if "mfu" in found:
        text += f", MFU {found['mfu']:.3f} (computed FLOPs {found['hardware_flops_utilization']:.3f})"
    return text + (f", peak {found['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in found else "")


RUN: dict[str, Callable[[bool, float, Record], None]] = {
    "attention": attention,
    "vit_b16": lambda *arguments: train("vit_b16", *arguments),
    "vit_l14": lambda *arguments: train("vit_l14", *arguments),
    "torch": run_torch,
    "truth": run_truth,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
