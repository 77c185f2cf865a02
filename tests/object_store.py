"""An object store on the loopback, for tests and benchmarks, with the answers of Google Cloud Storage and S3.

It serves the XML interface that both share: objects with ranges, listings in pages of 1,000 names, uploads. It counts
requests and bytes, waits before each answer, and can fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import random
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from xml.sax.saxutils import escape

PAGE = 1000
ENVIRONMENT = {  # of obstore: where the stores are, without credentials
    "GOOGLE_BASE_URL": "{url}",
    "GOOGLE_BEARER_TOKEN": "any",
    "AWS_ENDPOINT_URL": "{url}",
    "AWS_ALLOW_HTTP": "true",
    "AWS_SKIP_SIGNATURE": "true",
    "AWS_REGION": "us-east-1",
}


class ObjectStore:
    """Objects by '<bucket>/<name>', and how the server behaves. Attributes may change while it runs."""

    def __init__(self, objects: MutableMapping[str, bytes], latency: float = 0.0):
        self.objects, self.latency = objects, latency
        self.failure: Callable[[int], str | int | None] = lambda request: None  # status, 'cut' or 'hang' of a request
        self.requests = self.bytes = 0
        self.lock = threading.Lock()
        self.url = ""

    def fail_randomly(self, fraction: float, kinds: tuple[str | int, ...] = (429, 503, "cut"), seed: int = 0) -> None:
        rng = random.Random(seed)
        self.failure = lambda request: rng.choice(kinds) if rng.random() < fraction else None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: ObjectStore

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        name = urllib.parse.unquote(parts.path).strip("/")
        if self._fails():
            return
        if "list-type" in query or "/" not in name:
            self._send(200, _listing(self.store.objects, name, query), {"Content-Type": "application/xml"})
        elif name not in self.store.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._send_object(self.store.objects[name])

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._fails():
            self.store.objects[urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")] = content
            self._send(200, b"", {"ETag": _etag(content)})

    def _fails(self) -> bool:
        time.sleep(self.store.latency)
        with self.store.lock:
            self.store.requests += 1
            self._failure = self.store.failure(self.store.requests)
        if isinstance(self._failure, int):
            self._send(self._failure, b"<Error><Code>Injected</Code></Error>")
            return True
        if self._failure == "hang":
            time.sleep(3600)
        return False

    def _send_object(self, content: bytes) -> None:
        headers = {"ETag": _etag(content), "Last-Modified": "Sat, 28 Nov 2026 00:00:00 GMT"}
        if not (requested := self.headers.get("Range")):
            return self._send(200, content, headers)
        first, _, last = requested.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        if start >= len(content):
            return self._send(416, b"")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(206, memoryview(content)[start:stop], headers)

    def _send(self, status: int, body: bytes | memoryview, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._failure == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
        with self.store.lock:
            self.store.bytes += len(body)


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content[:64] + len(content).to_bytes(8)).hexdigest()}"'


def _listing(objects: Mapping[str, bytes], bucket: str, query: Mapping[str, str]) -> bytes:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    names = sorted(name.removeprefix(f"{bucket}/") for name in objects if name.startswith(f"{bucket}/{prefix}"))
    if delimiter:
        names = [name for name in names if delimiter not in name[len(prefix) :]]
    names = [name for name in names if name > query.get("continuation-token", "")]
    page = names[:PAGE]
    more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(names) > PAGE else ""
    contents = "".join(
        f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-28T00:00:00.000Z</LastModified>"
        f"<ETag>{escape(_etag(objects[f'{bucket}/{name}']))}</ETag><Size>{len(objects[f'{bucket}/{name}'])}</Size>"
        "</Contents>"
        for name in page
    )
    truncated = str(bool(more)).lower()
    return (
        f"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult><Name>{bucket}</Name><KeyCount>{len(page)}</KeyCount>"
        f"<IsTruncated>{truncated}</IsTruncated>{more}{contents}</ListBucketResult>"
    ).encode()


@contextlib.contextmanager
def serve(objects: MutableMapping[str, bytes], latency: float = 0.0, certificate: str = "") -> Iterator[ObjectStore]:
    """Serve objects, which obstore finds at gs:// and s3:// in this process and its children.

    certificate: PEM file with a key and a certificate of localhost, to serve https:// at `url`.
    """
    store = ObjectStore(objects, latency)
    handler = type("Handler", (_Handler,), {"store": store})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    store.url = f"https://localhost:{server.server_port}" if certificate else f"http://127.0.0.1:{server.server_port}"
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= {name: value.format(url=store.url) for name, value in ENVIRONMENT.items()}
    from clip_jax.data import storage

    storage._store.cache_clear()  # its clients have the address of an earlier server
    try:
        yield store
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.shutdown()
        server.server_close()
