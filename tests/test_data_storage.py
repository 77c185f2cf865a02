"""Byte ranges and listings of files and object stores."""

import logging
import subprocess

import pytest

from clip_jax.data import storage
from clip_jax.data.sources import table
from clip_jax.typing import BadRecord
from tests import object_store

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def store():
    storage._store.cache_clear()
    objects = {f"bucket/set/{number:05d}.tar": CONTENT[: number + 1] for number in range(2500)}
    objects |= {"bucket/set/._00000.tar": b"hidden", "bucket/set/deep/a b.tar": CONTENT, "bucket/top.tar": CONTENT}
    with object_store.serve(objects) as served:
        yield served
    storage._store.cache_clear()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)


@pytest.fixture(params=["local", "gs", "s3", "http"])
def root(request, tmp_path, store):
    """The folder of the same files, locally and in stores."""
    if request.param == "local":
        for name, content in store.objects.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return f"{tmp_path}/bucket"
    return f"{store.url}/bucket" if request.param == "http" else f"{request.param}://bucket"


def test_ranges_and_files_are_those_of_the_content(root):
    path = f"{root}/set/deep/a b.tar"
    assert storage.read_file(path) == CONTENT
    assert storage.read_range(path, 5, 300) == CONTENT[5:300]
    assert storage.read_range(path, len(CONTENT) - 3, len(CONTENT) + 10) == CONTENT[-3:]
    assert storage.read_range(path, 7, 7) == b""
    assert storage.stat(path).size == len(CONTENT)


def test_a_missing_file_is_not_waited_for(root):
    with pytest.raises(FileNotFoundError):
        storage.read_range(f"{root}/missing", 0, 1)
    with pytest.raises(ValueError, match="does not exist"):
        storage.list_files(f"{root}/missing")


def test_brace_ranges_and_lists_name_files_in_their_order(root):
    files = storage.list_files(f"{root}/set/{{00007..00009}}.tar,{root}/top.tar")
    assert [(file.path.removeprefix(root), file.size) for file in files] == [
        ("/set/00007.tar", 8),
        ("/set/00008.tar", 9),
        ("/set/00009.tar", 10),
        ("/top.tar", len(CONTENT)),
    ]
    assert len({file.version for file in files}) >= 2 or "bucket" in files[0].path


@pytest.mark.parametrize("root", ["local", "gs", "s3"], indirect=True)
def test_globs_match_without_hidden_files_and_deeper_folders(root):
    names = [file.path.removeprefix(root) for file in storage.list_files(f"{root}/set/*.tar")]
    assert names == [f"/set/{number:05d}.tar" for number in range(2500)]
    assert [f.path.removeprefix(root) for f in storage.list_files(f"{root}/**/a*.tar")] == ["/set/deep/a b.tar"]
    assert [f.path.removeprefix(root) for f in storage.list_files(f"{root}/set/0000[12].t?r")] == [
        "/set/00001.tar",
        "/set/00002.tar",
    ]


def test_a_range_of_thousands_of_names_lists_their_folder_once(store):
    assert len(storage.list_files("gs://bucket/set/{00000..02499}.tar")) == 2500
    assert store.requests == 3
    with pytest.raises(ValueError, match=r"02500.tar' does not exist, nor do 7 others of 2508"):
        storage.list_files("gs://bucket/set/{00000..02507}.tar")


def test_failures_are_tried_again_and_nothing_is_lost(store):
    store.fail_randomly(0.4)
    failures = storage.counters.failures
    for number in range(60):
        assert storage.read_range("gs://bucket/top.tar", number, 5000 + number) == CONTENT[number : 5000 + number]
    assert store.requests > 60 and storage.counters.failures >= failures


def test_an_outage_is_waited_for_with_a_log_line_until_the_limit(store, caplog, monkeypatch):
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 0})
    store.failure = lambda request: 503
    with caplog.at_level(logging.WARNING), pytest.raises(storage.StorageError, match=r"max_stall_seconds=2: .*"):
        storage.read_range("gs://bucket/top.tar", 0, 1, max_stall_seconds=2.0)
    assert "waiting for the storage" in caplog.text


def test_a_refusal_ends_at_once(store):
    store.failure = lambda request: 403
    with pytest.raises(storage.StorageError, match="credentials"):
        storage.read_range("gs://bucket/top.tar", 0, 1)
    assert store.requests == 1


def test_an_error_of_a_network_mount_is_waited_for(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    errors = iter([OSError(5, "Input/output error"), OSError(116, "Stale file handle")])
    read = storage._read_range

    def flaky(*arguments):
        for error in errors:
            raise error
        return read(*arguments)

    monkeypatch.setattr(storage, "_read_range", flaky)
    assert storage.read_range(f"{tmp_path}/file", 0, 9) == b"abc"
    with pytest.raises(IsADirectoryError):
        storage.read_range(str(tmp_path), 0, 9)


def test_files_of_hugging_face_are_read_with_their_revision(store, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", store.url)
    store.objects["datasets/owner/name/resolve/v1/data/a.tar"] = CONTENT
    assert storage.read_range("hf://datasets/owner/name@v1/data/a.tar", 2, 9) == CONTENT[2:9]
    with pytest.raises(ValueError, match="expected hf://datasets"):
        storage.read_range("hf://name", 0, 1)


def test_a_private_certificate_is_refused_at_once_and_accepted_by_ssl_cert_file(tmp_path, monkeypatch):
    certificate, both = tmp_path / "certificate.pem", tmp_path / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -addext basicConstraints=CA:FALSE -keyout {both}"
    subprocess.run([*command.split(), "-out", str(certificate)], check=True, capture_output=True)
    both.write_text(both.read_text() + certificate.read_text())
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 0})
    with object_store.serve({"bucket/top.tar": CONTENT}, certificate=str(both)) as served:
        path = f"{served.url}/bucket/top.tar"
        with pytest.raises(
            storage.StorageError, match="TLS certificate is not trusted: UnknownIssuer; .*SSL_CERT_FILE"
        ):
            storage.read_range(path, 2, 9, max_stall_seconds=1.0)
        with pytest.raises(BadRecord, match="certificate verify failed"):
            table.load(path, "table.csv")
        storage._store.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert storage.read_range(path, 2, 9, max_stall_seconds=1.0) == CONTENT[2:9]
        assert table.load(path, "table.csv") == CONTENT
    storage._store.cache_clear()


def test_a_folder_is_listed_once_within_the_block_and_again_after_it(store):
    with storage.listed_once():
        assert len(storage.list_files("gs://bucket/set/*.tar")) == 2500 == len(storage.list_files("gs://bucket/set/*"))
        assert store.requests == 3
    storage.list_files("gs://bucket/set/*.tar")
    assert store.requests == 6


def test_requests_and_bytes_are_counted(store):
    before = storage.counters.requests, storage.counters.bytes
    storage.read_range("s3://bucket/top.tar", 0, 100)
    assert (storage.counters.requests - before[0], storage.counters.bytes - before[1]) == (1, 100)
