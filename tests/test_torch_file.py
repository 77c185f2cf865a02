"""torch files, mainly damaged and hostile ones. Files that torch wrote: tests/peers/test_files.py."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import struct
import tempfile
import types
import zipfile

import numpy as np
import pytest

from clip_jax.interop import torch_file

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.float32([7.5]),
    "scalar": np.array(2.5, "f4"),
    "empty": np.zeros((0, 3), "f4"),
}


@pytest.fixture
def file(tmp_path):
    torch_file.write(tmp_path / "w.pt", TENSORS)
    return tmp_path / "w.pt"


def test_round_trip(file):
    found = torch_file.read(file)[0]
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].shape == array.shape and found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)
    with zipfile.ZipFile(file) as archive:  # zip64, for tensors above 2 GiB
        assert all(member.extract_version == 45 for member in archive.infolist() if "/data/" in member.filename)


def test_tensors_are_read_only_views_of_the_file(file):
    found = torch_file.read(file)[0]["a.weight"]
    assert not found.flags.writeable and not found.flags.owndata


def _archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED, byteorder=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)
    return path


def _opcodes(size=(2,), strides=(1,), offset=0, count=2, storage="FloatStorage"):
    """Return the pickle that torch writes for {'t': tensor} with these sizes."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def integer(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    def integers(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    persistent = text("storage") + f"ctorch\n{storage}\n".encode() + text("0") + text("cpu") + integer(count) + b"tQ"
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + persistent + integer(offset) + integers(size) + integers(strides)
    )
    return b"\x80\x02}(" + text("t") + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRu."


TWO = np.float32([1, 2]).tobytes()


def test_compressed_members_are_read(tmp_path):
    path = _archive(tmp_path / "w.pt", _opcodes(), [TWO], zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(torch_file.read(path)[0]["t"], [1, 2])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"size": (3,)}, r"shape \(3,\): expected a storage that contains it, got one of 2 elements"),
        ({"offset": 1}, "expected a storage that contains it"),
        ({"strides": (2,)}, "expected a storage that contains it"),
        ({"strides": (-1,), "offset": 1}, r"expected one stride per axis, none negative, got \(-1,\) at offset 1"),
        ({"offset": -1}, "stride per axis"),
        ({"size": (2, 2), "strides": (1,)}, "stride per axis"),
        # A stride of 0 expands two numbers to terabytes.
        ({"size": (2**40,), "strides": (0,)}, "expected a storage that contains it"),
        ({"count": 3}, "expected 3 float32, got 8 bytes"),
        ({"count": -1}, "expected a size, got -1"),
        ({"storage": "QInt8Storage"}, "got torch.QInt8Storage"),
    ],
)
def test_tensor_outside_its_storage_is_refused(tmp_path, numbers, message):
    path = _archive(tmp_path / "w.pt", _opcodes(**numbers), [TWO])
    with pytest.raises(ValueError, match=message) as error:
        torch_file.read(path)
    assert str(path) in str(error.value)


TRACE = f"{tempfile.gettempdir()}/clip_jax_trace_{os.getpid()}"


class _Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("payload", [_Runs(eval, "1/0"), _Runs(open, TRACE, "w"), _Runs(getattr, "a", "b")])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_other_functions_is_refused_with_their_names(tmp_path, payload, legacy):
    path = tmp_path / "evil.pt"
    if legacy:
        header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(item, 2) for item in [*header, {"w": payload}, []]))
    else:
        _archive(path, pickle.dumps({"w": payload}))
    with pytest.raises(
        ValueError, match=rf"expected a pickle of tensors alone, got \w+\.{payload.call[0].__name__}, which"
    ):
        torch_file.read(path)
    assert not pathlib.Path(TRACE).exists()


def _legacy(missing=0):
    """Return a file of two numbers in the format before torch 1.6, without its last `missing` bytes."""
    stream = io.BytesIO()
    for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(item, stream, 2)
    stream.write(_opcodes(count=2).replace(b"tQ", b"NtQ"))
    pickle.dump(["0"], stream, 2)
    stream.write(struct.pack("<q", 2) + TWO)
    data = stream.getvalue()
    return data[: len(data) - missing]


def test_format_before_torch_1_6_is_read(tmp_path):
    (tmp_path / "w.pt").write_bytes(_legacy())
    np.testing.assert_array_equal(torch_file.read(tmp_path / "w.pt")[0]["t"], [1, 2])


@pytest.mark.parametrize("missing", [1, 8, 12, 40])
def test_truncated_legacy_file_is_refused(tmp_path, missing):
    (tmp_path / "w.pt").write_bytes(_legacy(missing))
    with pytest.raises(ValueError, match=r"w\.pt"):
        torch_file.read(tmp_path / "w.pt")


def test_truncated_archive_is_refused(file, tmp_path):
    data = file.read_bytes()
    for kept in range(0, len(data), 37):
        (tmp_path / "truncated.pt").write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"truncated\.pt"):
            torch_file.read(tmp_path / "truncated.pt")


def test_damaged_pickle_raises_only_value_errors(file, tmp_path):
    """One byte of the pickle is replaced: the result is tensors, or a ValueError with the path."""
    data, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    begin, end = data.index(b"\x80\x02}"), data.index(b"u.") + 2
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(begin, end)] = rng.integers(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            torch_file.read(tmp_path / "damaged.pt")
        except ValueError as error:
            assert "damaged.pt" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a torch file"),
        (b"hello world, this is text", "expected a torch file, got a file that starts with b'hello world,'"),
        (pickle.dumps({"a": 1}, 2), "expected a torch file, got another pickle"),
    ],
)
def test_files_of_other_formats_are_refused(tmp_path, content, message):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        torch_file.read(tmp_path / "w.pt")


def test_big_endian_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="big-endian"):
        torch_file.read(_archive(tmp_path / "w.pt", _opcodes(), [TWO], byteorder=b"big"))


def test_names_of_nested_containers_are_joined_by_dots(tmp_path):
    state = b"X\x0a\x00\x00\x00state_dict" + _opcodes()[2:-1]
    content = b"\x80\x02}(X\x05\x00\x00\x00epochK\x03" + state + b"u."
    assert list(torch_file.read(_archive(tmp_path / "w.pt", content, [TWO]))[0]) == ["state_dict.t"]


# Values that trainers save alongside the weights, as pickled by this Python and NumPy.
HARMLESS = {
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "complex": 1j,
    "bytes": b"\0\xff",
    "bytearray": bytearray(b"ab"),
    "slice": slice(1, 2),
    "range": range(3),
    "Namespace": argparse.Namespace(lr=1e-3, betas=[0.9, 0.98]),
    "SimpleNamespace": types.SimpleNamespace(lr=1),
    "path": pathlib.Path("/a/b"),
    "Windows path": pathlib.PureWindowsPath("c:/x"),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=3),
    "datetime": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "timedelta": datetime.timedelta(hours=3),
    "scalar": np.float64(0.5),
    "int scalar": np.int64(7),
    "bool scalar": np.bool_(True),
    "array": np.arange(6.0).reshape(2, 3),
    "strings": np.array(["a", "bc"]),
    "objects": np.array([{"a": 1}], object),
    "dtype": np.dtype("float32"),
    "random state": np.random.RandomState(0),
    "generator": np.random.default_rng(0),
    "legacy state": np.random.RandomState(0).get_state(),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("numpy_module", [b"numpy._core", b"numpy.core"])  # NumPy 2 and 1
@pytest.mark.parametrize("name", HARMLESS)
def test_values_alongside_the_weights_are_ignored(tmp_path, name, numpy_module, protocol):
    pickled = pickle.dumps({"value": HARMLESS[name], "epoch": 3}, protocol)
    if protocol == 2:
        pickled = pickled.replace(b"cnumpy._core.", b"c" + numpy_module + b".")
        pickled = pickled.replace(b"}q\x00(", b"}q\x00(" + _opcodes()[4:-2], 1)
    else:
        old, new = (len(x).to_bytes(1) + x for x in (b"numpy._core.multiarray", numpy_module + b".multiarray"))
        pickled = pickled[:2] + pickled[11:].replace(b"\x8c" + old, b"\x8c" + new)  # without its frame
        pickled = pickled.replace(b"}\x94(", b"}\x94(" + _opcodes()[4:-2], 1)
    found, _ = torch_file.read(_archive(tmp_path / "w.pt", pickled, [TWO]))
    assert found.keys() == {"t"}
    np.testing.assert_array_equal(found["t"], [1, 2])


def test_file_without_tensors_is_refused(tmp_path):
    content = pickle.dumps(collections.OrderedDict(epoch=3), 2)
    with pytest.raises(ValueError, match="got no tensors"):
        torch_file.read(_archive(tmp_path / "w.pt", content))


def _containing_itself(key):
    content = collections.OrderedDict(epoch=3)
    content[key] = content
    return content


def _doubled_at_each_level():
    content = collections.OrderedDict()
    for _ in range(50):  # 2**50 names
        content = collections.OrderedDict(left=content, right=content)
    return content


@pytest.mark.parametrize(
    "content", [_containing_itself("state_dict"), _containing_itself("layer"), _doubled_at_each_level()]
)
def test_pickle_that_contains_itself_is_refused(tmp_path, content):
    path = _archive(tmp_path / "w.pt", pickle.dumps(content, 2))
    message = r"w\.pt: expected at most 1,048,576 values in 64 nested containers, got more"
    with pytest.raises(ValueError, match=message):
        torch_file.read(path)


def test_limits_of_containers_are_exact(monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_VALUES", 10)
    assert len(torch_file._named_tensors({str(i): np.ones(1) for i in range(9)})) == 9  # and the dict
    with pytest.raises(torch_file.Refused, match="at most 10 values"):
        torch_file._named_tensors({str(i): np.ones(1) for i in range(10)})
    monkeypatch.undo()
    nested = np.ones(1)
    for _ in range(64):
        nested = {"a": nested}
    assert len(torch_file._named_tensors(nested)) == 1
    with pytest.raises(torch_file.Refused, match="in 64 nested containers"):
        torch_file._named_tensors({"a": nested})


def test_archive_without_a_pickle_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("archive/version", "3")
    with pytest.raises(ValueError, match=r"expected a torch zip archive with one data\.pkl, got 0"):
        torch_file.read(tmp_path / "w.pt")
