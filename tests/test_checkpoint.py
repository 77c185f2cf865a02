"""Checkpoints: round trip, damage, failed saves."""

import contextlib
import json
import logging
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices import sharding
from clip_jax.training.checkpoint import Checkpoints, SaveFailed, fingerprint


def _state(value: float = 1.0, devices: int = 8, dtype=jnp.float32):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(0)
    # Noise is incompressible: most bits of the file are data and not header.
    state = {"kernel": rng.normal(size=(64, 32)).astype(np.float32) + value, "step": np.int32(value)}
    return jax.device_put(
        jax.tree.map(lambda x: jnp.asarray(x, dtype if x.ndim else None), state), sharding.replicated(mesh)
    )


def _abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", keep=3)
    yield opened
    opened.close()


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = _state()
    opened = Checkpoints("runs/checkpoints", keep=3)
    opened.save(1, state, {})
    opened.wait()
    restored, _ = opened.restore(_abstract(state))
    opened.close()
    np.testing.assert_array_equal(restored["kernel"], state["kernel"])
    assert (tmp_path / "runs/checkpoints/1").is_dir()


def _save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, _state(step), {"examples": step * 8})
    checkpoints.wait()


def test_round_trip_on_any_number_of_devices(checkpoints):
    _save(checkpoints, 1, 2)
    for devices in (1, 2, 8):
        state, info = checkpoints.restore(_abstract(_state(devices=devices)))
        np.testing.assert_array_equal(state["kernel"], _state(2)["kernel"])
        assert info["examples"] == 16
        assert len(state["kernel"].sharding.device_set) == devices


def test_new_directory_restores_none(checkpoints):
    assert checkpoints.restore(_abstract(_state())) is None


def test_newest_checkpoints_are_kept(checkpoints):
    _save(checkpoints, 1, 2, 3, 4, 5)
    assert checkpoints.steps() == [3, 4, 5]


def test_all_checkpoints_are_kept_by_default(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        _save(checkpoints, 1, 2, 3, 4)
        assert checkpoints.steps() == [1, 2, 3, 4]


def test_keep_every_steps_is_permanent(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every_steps=2)
    _save(checkpoints, 1, 2, 3, 4, 5)
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()


def test_flipped_bits_are_detected(checkpoints, caplog):
    _save(checkpoints, 1, 2)
    directory = Path(checkpoints.directory)
    pristine = directory.parent / "pristine"
    checkpoints.close()
    shutil.copytree(directory, pristine)
    expected = np.asarray(_state(2)["kernel"]), np.asarray(_state(1)["kernel"])
    files = sorted(p for p in (pristine / "2" / "state").rglob("*") if p.is_file() and p.stat().st_size > 4096)
    assert files
    rng = np.random.default_rng(0)
    fallbacks = 0
    for file in files:
        for position in rng.integers(0, file.stat().st_size, 4):
            shutil.rmtree(directory)
            shutil.copytree(pristine, directory)
            content = bytearray(file.read_bytes())
            content[position] ^= 1 << rng.integers(8)
            (directory / file.relative_to(pristine)).write_bytes(content)
            again = Checkpoints(directory)
            state, info = again.restore(_abstract(_state()))
            again.close()
            # Either the bit is unused, or the older step is restored.
            newest, fallback = expected
            fell_back = info["examples"] == 8
            np.testing.assert_array_equal(state["kernel"], fallback if fell_back else newest)
            fallbacks += fell_back
    assert fallbacks


@pytest.mark.parametrize("damage", ["arrays truncated", "info missing", "info truncated", "arrays missing"])
def test_damaged_checkpoint_falls_back_to_older_step(checkpoints, caplog, damage):
    _save(checkpoints, 1, 2)
    newest = Path(checkpoints.directory) / "2"
    if damage == "arrays truncated":
        for file in (newest / "state").rglob("*"):
            if file.is_file() and file.stat().st_size > 4096:
                file.write_bytes(file.read_bytes()[:100])
    elif damage == "info truncated":
        file = newest / "info" / "metadata"
        file.write_text(file.read_text()[:20])
    else:
        shutil.rmtree(newest / ("info" if damage == "info missing" else "state"))
    with caplog.at_level(logging.WARNING):
        state, info = checkpoints.restore(_abstract(_state()))
    assert info["examples"] == 8 and int(state["step"]) == 1
    assert "2 (" in caplog.text and "falling back to step 1" in caplog.text
    assert (Path(checkpoints.directory) / "2.corrupt").exists()
    _save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]


def test_directory_named_like_a_step_is_not_a_checkpoint(checkpoints):
    _save(checkpoints, 1)
    (Path(checkpoints.directory) / "500").mkdir()
    again = Checkpoints(checkpoints.directory)
    assert again.steps() == [1]
    again.close()


def test_restore_raises_if_every_checkpoint_is_damaged(checkpoints):
    _save(checkpoints, 1)
    shutil.rmtree(Path(checkpoints.directory) / "1" / "state")
    with pytest.raises(RuntimeError, match="every checkpoint .* is damaged: 1"):
        checkpoints.restore(_abstract(_state()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"kernel": jnp.zeros((64, 33)), "step": jnp.int32(0)},
            r"kernel: expected float32\[64, 33\], got float32\[64, 32\]",
        ),
        (
            {"kernel": jnp.zeros((64, 32), jnp.bfloat16), "step": jnp.int32(0)},
            "kernel: expected bfloat16.*, got float32",
        ),
        ({"weight": jnp.zeros((64, 32)), "step": jnp.int32(0)}, "weight: expected .*, got absent"),
    ],
)
def test_checkpoint_of_another_model_is_refused_with_one_sentence(checkpoints, other, message):
    _save(checkpoints, 1)
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(_abstract(other))
    assert checkpoints.steps() == [1]


def test_failed_save_is_raised_at_the_next_poll(checkpoints):
    _save(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as on a full disk
    try:
        with pytest.raises(SaveFailed, match="Earlier checkpoints are intact"):
            checkpoints.save(2, _state(2), {})
            while checkpoints._manager.is_saving_in_progress():
                pass
            checkpoints.poll()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(checkpoints.directory)
    state, _ = again.restore(_abstract(_state()))
    assert int(state["step"]) == 1
    again.close()


def test_unwritable_directory_is_refused_when_opened(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(SaveFailed, match="choose another --workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_save_copies_arrays_before_the_next_step(checkpoints):
    """The training step donates its state, so an asynchronous save needs a copy."""
    state = _state(1)
    expected = np.asarray(state["kernel"])
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints.save(1, state, {})
    for _ in range(5):
        state = add(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(_abstract(_state()))
    np.testing.assert_array_equal(restored["kernel"], expected)


def test_fingerprint_depends_on_every_bit_and_not_on_sharding():
    single = _state(devices=1)
    sharded = {"kernel": sharding.to_global(np.asarray(single["kernel"]), sharding.make_mesh()), "step": single["step"]}
    sharded["step"] = jax.device_put(np.asarray(single["step"]), sharding.replicated(sharding.make_mesh()))
    assert int(fingerprint(single)) == int(fingerprint(sharded))
    rng = np.random.default_rng(0)
    for position, bit in zip(rng.integers(0, 64 * 32, 100), rng.integers(0, 32, 100), strict=True):
        bits = np.asarray(single["kernel"]).view(np.uint32).copy().ravel()
        bits[position] ^= np.uint32(1) << np.uint32(bit)
        changed = single | {"kernel": jnp.asarray(bits.view(np.float32).reshape(64, 32))}
        assert int(fingerprint(changed)) != int(fingerprint(single))


def test_fingerprint_depends_on_the_position_of_every_element():
    """Neighbors along either axis are swapped, then two arrays of a tree."""
    kernel = np.asarray(_state(devices=1)["kernel"])
    flat = [np.arange(kernel.size).reshape(kernel.shape) for _ in range(2)]
    flat[0][:, [4, 5]], flat[1][[6, 7]] = flat[0][:, [5, 4]], flat[1][[7, 6]]
    rng = np.random.default_rng(0)
    for order in (*flat, *(_swapped(kernel.size, first, first + 1) for first in rng.integers(0, kernel.size - 1, 50))):
        assert int(fingerprint({"x": kernel.ravel()[order.ravel()]})) != int(fingerprint({"x": kernel.ravel()}))
    one, other = {"a": kernel[0], "b": kernel[1]}, {"a": kernel[1], "b": kernel[0]}
    assert int(fingerprint(one)) != int(fingerprint(other))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_fingerprint_depends_on_the_order_of_opposite_numbers(dtype):
    """A number and its negative differ in the highest bit, which linear checksums multiply by even differences."""
    x = np.arange(1, 65).repeat(2) * np.tile([1, -1], 64)
    prints = [
        int(fingerprint({"x": x[_swapped(128, first, second)].astype(dtype)}))
        for first, second in ((0, 0), (0, 1), (2, 3), (2, 19), (64, 127))
    ]
    assert len(set(prints)) == len(prints)


def test_checkpoint_of_another_version_is_refused_and_kept(checkpoints):
    _save(checkpoints, 1)
    path = checkpoints.directory / "1" / "info" / "metadata"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match="expected a checkpoint of version 2, got 1; finish the run"):
        checkpoints.restore(_abstract(_state()))
    assert checkpoints.steps() == [1]


def _swapped(count, first, second):
    order = np.arange(count)
    order[[first, second]] = second, first
    return order


def test_info_is_json(checkpoints):
    _save(checkpoints, 1)
    info = json.loads((Path(checkpoints.directory) / "1" / "info" / "metadata").read_text())
    assert info["arrays"] == {"kernel": "float32[64, 32]", "step": "int32[]"}
