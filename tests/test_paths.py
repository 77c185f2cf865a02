"""Files that appear whole, and outputs that are refused: devices, FIFOs, full disks, missing permission."""

import errno
import os
import socket
import sys

import pytest
from absl import flags
from etils import epath

from clip_jax import command, paths
from clip_jax.config import WeightsConfig
from clip_jax.evals.run import Options, prepare
from clip_jax.interop import formats, reading
from clip_jax.training.workdir import check_outputs
from tests import tiny_models

MODEL = tiny_models.ARCHITECTURES["vit_gelu"]


@pytest.fixture
def special(tmp_path):
    """Return paths that are no regular files, by their kind."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("/dev/null")
    names = {"a FIFO": "fifo", "a directory": "folder", "a socket": "socket"}
    return {kind: tmp_path / name for kind, name in names.items()} | {"a device": tmp_path / "link"}


def test_only_regular_files_are_replaced(special, tmp_path):
    for kind, path in special.items():
        assert paths.path_kind(path) == kind
        with pytest.raises(ValueError, match=rf"{path}: expected a file or a new path, got {kind}; give another path"):
            paths.write_atomically(path, "text")
        assert paths.path_kind(path) == kind
    (tmp_path / "file").write_text("old")
    paths.write_atomically(tmp_path / "file", "new")
    paths.write_atomically(tmp_path / "a/b", "new")
    assert (tmp_path / "file").read_text() == (tmp_path / "a/b").read_text() == "new"


def test_files_are_written_through_symbolic_links(tmp_path):
    """The link was replaced by a file in its own directory, perhaps on a small disk."""
    for name in ("old", "new"):
        link, target = tmp_path / name, tmp_path / "large disk" / name
        link.symlink_to(target)
        if name == "old":
            target.parent.mkdir()
            target.write_text("old")
        paths.write_atomically(link, "text")
        assert link.is_symlink() and target.read_text() == "text"


def test_error_of_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    def fill(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as error:
        paths.write_atomically(tmp_path / "file", fill)
    assert error.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_error_of_a_full_disk_in_another_library_is_one_sentence():
    """TensorBoard's of TensorFlow, and SaveFailed, raised from Orbax's."""
    board = RuntimeError("Error '{{node}} /x/events.v2; No space left on device\n\tFailed to flush 6 events'")
    assert paths.error_sentence(board) == (
        "no space left on device; make room, or give another path:"
        " Error '{{node}} /x/events.v2; No space left on device"
    )
    failed = RuntimeError("a checkpoint could not be written to /x")
    failed.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert paths.error_sentence(failed).startswith("disk quota exceeded; make room, or give another path: a checkpoint")
    assert paths.disk_error(RuntimeError("out of memory")) == "" == paths.disk_error(OSError(errno.EIO, "I/O error"))


def test_outputs_are_checked_before_the_work(special, tmp_path, monkeypatch):
    for kind in ("a FIFO", "a socket", "a device"):
        with pytest.raises(ValueError, match=f"--out=.*: expected a file or a directory or a new path, got {kind}"):
            paths.check_output("--out", special[kind])
    (tmp_path / "file").touch()
    for path in ("file", "new/file", "folder", "folder/new/file"):
        paths.check_output("--out", tmp_path / path)
    with pytest.raises(ValueError, match=f"--out=.*: expected a directory {tmp_path / 'file'}, got a file"):
        paths.check_output("--out", tmp_path / "file/below")
    paths.check_output("--out", "gs://bucket/x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match=f"expected a directory with write permission, got {tmp_path} without"):
        paths.check_output("--out", tmp_path / "new/file")


@pytest.mark.parametrize("name", [name for name, entry in formats.FORMATS.items() if entry.write])
def test_no_format_replaces_a_device(special, name):
    for kind in ("a FIFO", "a socket", "a device"):
        with pytest.raises(ValueError, match=f"target=.*: expected a file.* got {kind}"):
            formats.writer(name, special[kind])
    write = formats.FORMATS[name].write
    with pytest.raises(ValueError, match=r"expected .* got"):
        write(special["a device"], tiny_models.params(MODEL), WeightsConfig(MODEL))
    assert paths.path_kind(special["a device"]) == "a device"


def test_outputs_of_the_commands_are_checked_before_they_start(tmp_path):
    (tmp_path / "file").touch()
    for out, kind in (("/dev/full", "a device"), (f"{tmp_path}/file", "a file")):
        with pytest.raises(ValueError, match=f"--out={out}: expected a directory or a new path, got {kind}"):
            prepare(Options("w.msgpack", out=out))
    with pytest.raises(ValueError, match="--export=/dev/full: expected a file or a new path, got a device"):
        check_outputs(epath.Path(tmp_path / "run"), "/dev/full")


def test_special_files_are_not_read(special):
    """Reading a FIFO would wait forever."""
    for kind in ("a FIFO", "a socket", "a device"):
        with pytest.raises(ValueError, match=f"expected a file or directory, got {kind}; copy its content"):
            reading.read(special[kind])


# `clip_jax.main` fails with other errors of the operating system, and with a traceback: the network may come back.
OF_TRAINING = (ValueError, PermissionError, NotADirectoryError, IsADirectoryError)


@pytest.mark.parametrize("refused", [(ValueError, OSError), OF_TRAINING])
@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/x/w.pt"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "/x/w.pt"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/w.pt"),
        OSError(errno.ENOSPC, "No space left on device", "/x/w.pt"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/x/w.pt"),
        OSError(errno.EROFS, "Read-only file system", "/x/w.pt"),
    ],
)
def test_errors_of_the_file_system_are_one_sentence_and_exit_2(error, refused, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(command.app, "run", lambda guarded, flags_parser: guarded(["convert"]))
    monkeypatch.setattr(sys, "argv", ["convert"])
    monkeypatch.setattr(command, "_set_up_logging", lambda level: None)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["convert"])
    with pytest.raises(SystemExit) as ended:
        command.run(fail, refused=refused)
    output = capsys.readouterr()
    assert ended.value.code == command.REFUSED and output.out == ""
    assert output.err == f"clip_jax.convert: /x/w.pt: {error.strerror.lower()}; give another path, or make room or" + (
        " change permissions\n"
    )
