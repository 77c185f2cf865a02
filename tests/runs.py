"""Whole runs in processes of their own, started by the command, for tests that kill them."""

import json
import os
import runpy
import socket
from collections.abc import Sequence
from pathlib import Path

from clip_jax.config import from_config_dict
from tests.commands import ROOT, Command

# For commands in processes of their own: each program is compiled once, by any worker of any session of the tests.
CACHED = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "build/programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# Where only the end of a command is checked, and no number: programs compile in half the time.
QUICK = CACHED | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
TINY = "tests/configs/tiny.py"


def start(
    workdir: Path,
    *flags: str,
    devices: int = 1,
    process: int = 0,
    processes: int = 1,
    port: int = 0,
    config: str = TINY,
):
    """Start one process of `python -m clip_jax.main`; `.stderr` has its log."""
    # The same compiled programs, as the results of the processes are compared bit by bit.
    environment = (
        os.environ
        | CACHED
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            "CLIP_JAX_HEARTBEAT_SECONDS": "20",
            "CLIP_JAX_SHUTDOWN_SECONDS": "10",
        }
    )
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
    return Command(["-m", "clip_jax.main", f"--config={config}", f"--workdir={workdir}", *flags], env=environment)


def start_two(workdir: Path, *flags: str, second: Sequence[str] = ()) -> list[Command]:
    """Start two processes with one device each, as one job; `second`: additional flags of the second process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        start(workdir, *flags, *extra, process=process, processes=2, port=port)
        for process, extra in enumerate(((), second))
    ]


def finish(*processes: Command, code: int = 0) -> list[str]:
    """Wait for the processes, check their exit code, and return the stderr of each."""
    messages = [process.communicate(timeout=240)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [code] * len(codes), f"exit codes {codes}, expected {code}:\n" + "\n".join(messages)
    return messages


def wait_for_step(process: Command, step: int) -> None:
    """Read stderr up to the progress line of `step`."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError("ended before step " + str(step) + ":\n" + "".join(lines))


def fingerprint(workdir: Path, step: int) -> int:
    """Return the checksum of all arrays of a saved state, including optimizer state and counters."""
    return json.loads((workdir / "checkpoints" / str(step) / "info" / "metadata").read_text())["fingerprint"]


def tiny_config_dict():
    return runpy.run_path(str(ROOT / TINY))["get_config"]()


def tiny_model():
    """Return the config of TINY, and its architecture."""
    config = from_config_dict(tiny_config_dict())
    return config, config.model


def damage_checkpoint(checkpoint: Path) -> None:
    """Truncate the arrays of a checkpoint."""
    for path in Path(checkpoint, "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
