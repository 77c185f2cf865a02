"""Commands in processes of their own, forked from one that has imported TensorFlow and JAX: imports take 7 seconds.

`Command(["-m", "clip_jax.main", …])` is `subprocess.Popen([sys.executable, "-m", "clip_jax.main", …])` with that time
saved. README's commands, which `make demo` runs, begin with a new interpreter.

The first command starts this file as a server. For each command it forks a supervisor, which forks the command and
reports its process ID and exit code. The command's process ends as an interpreter does, with its functions of atexit.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
_MAX_REQUEST_BYTES = 2**17


class Command:
    """A started command, with the interface of `subprocess.Popen`: text on pipes."""

    def __init__(self, args: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None):
        self.args, self.returncode = list(args), None
        pipes = [os.pipe() for _ in range(3)]
        request = {"args": self.args, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        socket.send_fds(_server(), [json.dumps(request).encode()], [written for _, written in pipes])
        for _, written in pipes:
            os.close(written)
        self.stdout, self.stderr, self._status = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)
        self.pid = int(self._status.readline())

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return stdout and stderr when the command has ended."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            reads = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            if concurrent.futures.wait(reads, timeout).not_done:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
        if self.returncode is None:
            self.returncode = int(self._status.readline())
        for stream in (self.stdout, self.stderr, self._status):
            stream.close()
        return reads[0].result(), reads[1].result()

    def poll(self) -> int | None:
        """Return the exit code; None while the command runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    args: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """Run a command to its end, as `subprocess.run`."""
    command = Command(args, cwd=cwd, env=env)
    output = command.communicate(timeout)
    return subprocess.CompletedProcess(command.args, command.returncode, *output)


@functools.cache
def _server() -> socket.socket:
    """Return a connection to this worker's server, which ends with the worker."""
    client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (client, server):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MAX_REQUEST_BYTES)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(server.fileno())]
    subprocess.Popen(command, pass_fds=[server.fileno()], env=environment, stdin=subprocess.DEVNULL)
    server.close()
    atexit.register(client.close)  # which ends the server
    return client


def _serve(connection: socket.socket) -> list[str]:
    """Fork for each request. Returns the command's arguments, in its process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are not waited for
    while True:
        message, pipes, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 3)
        if not message:
            os._exit(0)  # the tests have ended
        if not os.fork():
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request = json.loads(message)
            _supervise(*pipes)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["env"])
            return request["args"]
        for pipe in pipes:
            os.close(pipe)


def _supervise(stdout: int, stderr: int, status: int) -> None:
    """Fork the command, in which this returns, and write its process ID and exit code."""
    if pid := os.fork():
        os.close(stdout)
        os.close(stderr)
        os.write(status, f"{pid}\n".encode())
        _, code = os.waitpid(pid, 0)
        os.write(status, f"{os.waitstatus_to_exitcode(code)}\n".encode())
        os._exit(0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for pipe in (stdout, stderr, status):
        os.close(pipe)


def _import() -> None:
    """Import the libraries and packages of the commands, but no command: it can define its flags only once."""
    import clip_jax.evals.run  # noqa: F401
    import clip_jax.training.loop  # noqa: F401


def _set_jax_options() -> None:
    """Set JAX's options from the environment, which JAX has read before."""
    import jax

    kinds = {bool: lambda text: text.lower() in ("1", "true"), int: int, float: float}
    for name, value in list(jax.config.values.items()):
        if (text := os.environ.get(name.upper())) is not None:
            jax.config.update(name, kinds.get(type(value), str)(text))


if __name__ == "__main__":
    _import()
    arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    _set_jax_options()
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [path for path in paths if path]
    if arguments[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
