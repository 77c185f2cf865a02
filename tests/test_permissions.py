"""Files and directories that may not be read or written: EACCES of the kernel, also if the tests run as root."""

import contextlib
import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
from etils import epath

from clip_jax import data, paths
from clip_jax.config import Config, InitConfig, TokenizerConfig, WeightsConfig
from clip_jax.data.sources import emoji
from clip_jax.evals.embed import FeatureCache
from clip_jax.interop import conversion, directory, formats, msgpack, name_tables, reading, torch_file
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training import initialization, workdir
from clip_jax.training.checkpoint import Checkpoints
from tests import commands, runs, tiny_models, tiny_tokenizers
from tests.permissions import as_user

MODEL = tiny_models.ARCHITECTURES["vit_gelu"]


@pytest.fixture
def denied(tmp_path):
    """A directory that may be read and not written."""
    folder = tmp_path / "denied"
    folder.mkdir(mode=0o500)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files with weights and tokenizers, by name, that may not be read."""
    folder, params = tmp_path_factory.mktemp("weights"), tiny_models.params(MODEL)
    msgpack.write(folder / "w.msgpack", params, WeightsConfig(MODEL))
    torch_file.write(folder / "w.pt", conversion.LazyTensors(MODEL, params, name_tables.OPENAI))
    directory.write(folder / "dir", params, WeightsConfig(MODEL))
    (folder / "tokenizer.json").write_bytes(tiny_tokenizers.tokenizer_json())
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0)
    return folder


def test_outputs_are_refused(denied):
    for path in (denied / "file", denied / "new/file"):
        with pytest.raises(ValueError, match=f"--out=.*: expected a directory with write permission, got {denied} "):
            as_user(paths.check_output, "--out", path)
        with pytest.raises(PermissionError) as error:
            as_user(paths.write_atomically, path, "text")
        assert paths.error_sentence(error.value) == (
            f"{path}: permission denied; give another path, or make room or change permissions"
        )


@pytest.mark.parametrize("name", [name for name, entry in formats.FORMATS.items() if entry.write])
def test_no_format_is_written(denied, name):
    with pytest.raises(ValueError, match=f"expected a directory with write permission, got {denied} without"):
        as_user(formats.writer, name, denied / "out")


@pytest.mark.parametrize("name", ["w.msgpack", "w.pt", "dir"])
def test_unreadable_weights_are_named(weights, name):
    with pytest.raises(PermissionError) as error:
        as_user(reading.read, weights / name, activation="gelu")
    assert str(error.value.filename).startswith(str(weights / name))
    key = f"init.weights='{weights / name}': {weights / name}.*: permission denied; give another path"
    with pytest.raises(ValueError, match=key):
        as_user(initialization.initial_params, Config(model=MODEL, init=InitConfig(str(weights / name))))


def test_unreadable_tokenizer_is_named(weights):
    config = TokenizerConfig("huggingface", str(weights / "tokenizer.json"))
    with pytest.raises(PermissionError) as error:
        as_user(make_tokenizer, config, MODEL.text)
    assert error.value.filename == config.path


# --------------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_unwritable_workdir_is_refused(tmp_path, name):
    run = tmp_path / "run"
    (run / name).mkdir(parents=True)
    (run / name).chmod(0o500)
    with pytest.raises(ValueError, match=rf"--workdir={run}: cannot write to {run / name} \(PermissionError: .*"):
        as_user(workdir.check_outputs, epath.Path(run), None)


def test_unreadable_shards_are_named_and_a_cache_is_done_without(tmp_path, denied, caplog):
    config = data.SOURCES["tfrecord"].tiny_config(tmp_path)
    config = dataclasses.replace(config, cache_dir=str(denied))
    assert len(as_user(data.make_source, config)) == 60
    assert f"{denied}/index" in caplog.text and "index not cached" in caplog.text
    (tmp_path / "00001.tfrecord").chmod(0)
    with pytest.raises(PermissionError) as error:
        as_user(data.make_source, config)
    assert error.value.filename == str(tmp_path / "00001.tfrecord")


def test_emoji_are_rendered_to_a_temporary_folder(denied, monkeypatch, caplog):
    three = emoji.concepts()[:3]
    monkeypatch.setattr(emoji, "concepts", lambda: three)
    monkeypatch.setattr(emoji, "_temporary_folder", functools.cache(emoji._temporary_folder.__wrapped__))
    folder = as_user(emoji._rendered, denied, "twemoji")
    assert list(folder.glob("*.tfrecord")) and f"{denied}: not cached: [Errno 13]" in caplog.text


def test_features_are_not_cached(denied, caplog):
    array = np.ones((3, 4), np.float32)
    for _ in range(2):
        found = as_user(FeatureCache(str(denied), "model").get, "key", 3, lambda: array)
        np.testing.assert_array_equal(found, array)
    assert "features not cached: [Errno 13]" in caplog.text


@pytest.mark.parametrize("part", ["", "state", "info", "info/metadata"])
@pytest.mark.parametrize("read_only", [False, True])
def test_checkpoint_of_another_user_is_refused_and_not_renamed(tmp_path, part, read_only):
    """It counted as damaged: it was renamed, and the run began again."""
    state = {"kernel": jax.device_put(np.ones((64, 32), np.float32))}
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as opened:
        opened.save(1, state, {})
    (tmp_path / "checkpoints/1" / part).chmod(0)

    def restore():
        opened = Checkpoints(tmp_path / "checkpoints", read_only=read_only)
        return opened.restore({"kernel": jax.ShapeDtypeStruct((64, 32), np.float32, sharding=state["kernel"].sharding)})

    with pytest.raises(PermissionError, match=f"{tmp_path}/checkpoints/1"):
        as_user(restore)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_file_that_another_host_removes_meanwhile_is_not_unreadable(tmp_path, monkeypatch):
    """Of two hosts that started, one stopped with PermissionError, as the other removed its probe of the directory."""
    rest = tmp_path / "checkpoints/1.orbax-checkpoint-tmp"
    rest.mkdir(parents=True)
    (tmp_path / "checkpoints/.probe-1").write_text("clip_jax")
    found = []

    def access(path, mode):
        found.append(path)
        path.rmdir()
        return False

    monkeypatch.setattr(os, "access", access)
    Checkpoints(tmp_path / "checkpoints").close()
    assert found == [rest]


# ---------------------------------------------------------------------------------------------------- the commands


@pytest.mark.slow  # five commands, which import JAX and TensorFlow
def test_commands_exit_with_2_and_one_sentence(tmp_path, denied, weights):
    msgpack.write(tmp_path / "w.msgpack", tiny_models.params(MODEL), WeightsConfig(MODEL))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").touch(0)
    unreadable, main = weights / "w.msgpack", f"clip_jax.main --config={runs.TINY} --workdir={tmp_path}"
    cases = {
        f"clip_jax.convert {tmp_path}/w.msgpack {denied}/w.npz --to=npz": f"permission, got {denied} without",
        f"clip_jax.convert {unreadable} {tmp_path}/new.msgpack": f"{unreadable}: permission denied; give another path",
        f"clip_jax.evaluate --weights={tmp_path}/w.msgpack --out={denied}/out": f"permission, got {denied} without",
        f"{main}/new --config.init.weights={unreadable}": f"init.weights='{unreadable}': {unreadable}: permission",
        f"{main}/denied/run": f"cannot write to {denied}/run (PermissionError: ",
        f"{main}/run": f"{tmp_path}/run/config.json: permission denied; give another path",
    }
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT), "XLA_FLAGS": ""}
    started = [commands.Command(["tests/permissions.py", *command.split()], env=environment) for command in cases]
    for process, (command, message) in zip(started, cases.items(), strict=True):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 2, (command, errors)
        assert message in errors.splitlines()[-1] and "Traceback" not in errors, (command, errors)
