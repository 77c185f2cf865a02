"""Contract of every weight format in FORMATS: bit-equal round trip; damaged and hostile files are ValueErrors."""

import io
import json
import pathlib
import pickle
import shutil
import zipfile

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import paths
from clip_jax.config import WeightsConfig, build
from clip_jax.interop import conversion, formats, reading
from clip_jax.interop.convert import convert
from clip_jax.interop.formats import FORMATS, Format
from tests import tiny_models

MODEL = tiny_models.ARCHITECTURES["vit"]
PARAMS = tiny_models.params(MODEL)
CONFIG = WeightsConfig(MODEL, source="vit")
WRITABLE = [name for name, entry in FORMATS.items() if entry.write]


def _assert_params(found):
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, found, PARAMS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the paths written by each writable format."""
    folder = tmp_path_factory.mktemp("written")
    for name in WRITABLE:
        FORMATS[name].write(folder / name, PARAMS, CONFIG)
    return {name: folder / name for name in WRITABLE}


@pytest.mark.parametrize("name", WRITABLE)
def test_round_trip_is_bit_equal(written, name):
    assert formats.detect(written[name]) == name
    found = reading.read(written[name])
    assert found.config.model == MODEL
    _assert_params(found.params)


@pytest.mark.parametrize("name", WRITABLE)
def test_url_as_target_is_written_or_refused(name, tmp_path, monkeypatch):
    if not FORMATS[name].writes_urls:
        with pytest.raises(ValueError, match="target=gs://bucket/x: expected a local path, got a URL"):
            formats.writer(name, "gs://bucket/x")
        return
    monkeypatch.setattr(paths, "is_url", lambda path: True)  # a folder as object store
    formats.writer(name, tmp_path / "x")(tmp_path / "x", PARAMS, CONFIG)
    monkeypatch.undo()
    _assert_params(reading.read(tmp_path / "x").params)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in WRITABLE])
def test_read_only_format_is_refused_as_target(name):
    with pytest.raises(ValueError, match=rf"--to: expected one of .*msgpack, got '{name}', which is read-only"):
        formats.writer(name, "x")


def _damaged(data):
    """Yield truncated, overwritten and extended copies of a file's content."""
    for kept in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
        yield f"first {kept} bytes", data[:kept]
    yield "zeros after 16 bytes", data[:16] + bytes(len(data) - 16)
    yield "noise after 16 bytes", data[:16] + np.random.default_rng(0).bytes(4096)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_file_of_any_format_is_a_value_error_with_its_path(written, name, tmp_path):
    """Every reader gets damaged files of every format, whether it detects them or not."""
    files = [file for path in written.values() for file in (path.rglob("*") if path.is_dir() else [path])]
    weights = [file for file in files if file.suffix in ("", ".safetensors", ".pt")]
    assert len(weights) >= 5
    for file in weights:
        for damage, content in _damaged(file.read_bytes()):
            path = tmp_path / f"damaged{file.suffix}"
            path.write_bytes(content)
            with pytest.raises(ValueError, match="damaged") as error:
                FORMATS[name].read(path)
            assert str(path) in str(error.value), (file, damage)


class _Payload:
    """Pickles to a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _hostile(trace):
    """Return the content of files that run code in a reader that trusts them, by name."""
    pickled = pickle.dumps({"weight": _Payload(trace)}, 2)
    legacy = [pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    archive, objects = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model/data.pkl", pickled)
    np.savez(objects, weight=np.array([_Payload(trace)], object))
    return {
        "pickle": pickled,
        "legacy torch": b"".join([*legacy, pickled, pickle.dumps([], 2)]),
        "torch": archive.getvalue(),
        "npz": objects.getvalue(),
        "safetensors with a huge header": (2**62).to_bytes(8, "little") + b"{}" + bytes(64),
        "outside shard": json.dumps({"weight_map": {"weight": "../../secret"}}).encode(),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_file_is_a_value_error_and_runs_no_code(name, tmp_path):
    trace = tmp_path / "trace"
    for content in _hostile(trace).values():
        path = tmp_path / "hostile"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="hostile"):
            FORMATS[name].read(path)
        assert not trace.exists()


@pytest.mark.parametrize("name", WRITABLE)
def test_hostile_content_in_a_written_path_is_refused(written, name, tmp_path):
    """As above, through `reading.read`, in the place of the weights."""
    trace = tmp_path / "trace"
    for content in _hostile(trace).values():
        path = tmp_path / "hostile"
        if written[name].is_dir():
            shutil.copytree(written[name], path, dirs_exist_ok=True)
            for file in path.glob("*.safetensors"):
                file.write_bytes(content)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="hostile"):
            reading.read(path)
        assert not trace.exists()


# ------------------------------------------------------------------------------------- registered outside the package


def _detect_toy(path, head):
    return head.startswith(b"TOY")


def _read_toy(path):
    with pathlib.Path(path).open("rb") as file:
        file.read(3)
        fields, arrays = json.loads(file.readline()), np.load(file)
        return conversion.nested(dict(arrays)), build(WeightsConfig, {**fields, "tokenizer_file": b""})


def _write_toy(path, params, config):
    from clip_jax.interop.msgpack import config_json

    with pathlib.Path(path).open("wb") as file:
        file.write(b"TOY" + config_json(config).encode() + b"\n")
        np.savez(file, **conversion.flat(params))


def test_format_registered_outside_the_package_is_loaded_and_converted(tmp_path, monkeypatch, written):
    monkeypatch.setitem(FORMATS, "toy", Format(_detect_toy, _read_toy, _write_toy))
    summary = convert(written["msgpack"], tmp_path / "w.toy", to="toy")
    assert summary.splitlines()[0].endswith(": clip_jax msgpack") and "wrote" in summary
    found = reading.read(tmp_path / "w.toy")
    assert (found.config.model, found.format) == (MODEL, "clip_jax toy")
    _assert_params(found.params)
    assert clip_jax.load(tmp_path / "w.toy").encode_text(["a dog"]).shape == (1, MODEL.embed_dim)


def test_format_registered_later_has_precedence(tmp_path, monkeypatch, written):
    monkeypatch.setitem(FORMATS, "mine", Format(lambda path, head: True, lambda path: (PARAMS, CONFIG)))
    assert formats.detect(written["npz"]) == "mine"
    assert reading.read(written["npz"]).format == "clip_jax mine"
