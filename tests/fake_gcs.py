"""A fake Google Cloud Storage on loopback, for those requests of Orbax that do not go through `etils.epath`. Used by
test_remote.py.

TensorStore itself writes and reads the arrays of a checkpoint by HTTP. It uses single-request uploads, ranges of objects and
object metadata, each with preconditions. This server implements that part of the JSON API on the in-memory file system
that `etils.epath` uses for gs://, so both see the same bucket. Orbax also asks Google's own client for bucket metadata.
"""

import contextlib
import itertools
import json
import re
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google.cloud
import pytest
from fsspec.implementations.memory import MemoryFileSystem


class FakeGcs(ThreadingHTTPServer):
    """Serves the objects of a file system.

    Attributes:
      asked: all requests so far: (method, name of the object).
      refuse: maps a method and the name of an object to the HTTP status to refuse with, or to None.
      client: the replacement for Google's own client.
    """

    daemon_threads = True
    request_queue_size = 128  # TensorStore opens many connections at once

    def __init__(self, files: MemoryFileSystem):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.lock = files, threading.Lock()
        self.asked: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int | None] = lambda method, name: None
        self.client = types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace(name=name))
        self._generations = itertools.count(1)

    def generation(self, path: str) -> int:
        """The generation number of an object, which changes with each write; 0 if there is no object."""
        file = self.files.store.get(path)
        if file is not None and not hasattr(file, "generation"):
            file.generation = next(self._generations)  # no matter who wrote it
        return file.generation if file is not None else 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # sends header and body in one packet
    server: FakeGcs

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        place = re.fullmatch(r"(/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", url.path)
        name = unquote(place[3] or query.get("name", "")) if place else ""
        if not name:
            return self._answer(400, f"not known here: {self.command} {self.path}")
        self.server.asked.append((self.command, name))
        refused = self.server.refuse(self.command, name)
        if refused:
            return self._answer(refused, f"refused: {name}")
        path = f"/{place[2]}/{name}"
        with self.server.lock:
            if self.command == "GET":
                return self._read(path, query)
            return self._write(path, data, query)

    do_POST = do_GET

    def _read(self, path: str, query: dict[str, str]) -> None:
        generation = self.server.generation(path)
        if not generation:
            return self._answer(404, "no such object")
        if generation == int(query.get("ifGenerationNotMatch", -1)):
            return self._answer(304, b"")
        if generation != int(query.get("ifGenerationMatch", generation)):
            return self._answer(412, "another generation")
        if query["alt"] == "json":
            return self._answer_metadata(path)
        data, headers = self.server.files.cat_file(path), {"x-goog-generation": str(generation)}
        if "Range" not in self.headers:
            return self._answer(200, data, headers)
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        part = data[start : int(last) + 1] if first and last else data[start:]
        if not part:
            return self._answer(416, "outside of the object")
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return self._answer(206, part, headers)

    def _write(self, path: str, data: bytes, query: dict[str, str]) -> None:
        generation = self.server.generation(path)
        if generation != int(query.get("ifGenerationMatch", generation)):
            return self._answer(412, "another generation")
        self.server.files.pipe_file(path, data)
        return self._answer_metadata(path)

    def _answer_metadata(self, path: str) -> None:
        bucket, name = path[1:].split("/", 1)
        found = {"bucket": bucket, "name": name, "generation": str(self.server.generation(path))}
        found["size"] = str(self.server.files.size(path))
        self._answer(200, json.dumps(found).encode())

    def _answer(self, status: int, body: str | bytes, headers: dict[str, str] | None = None) -> None:
        if isinstance(body, str):
            body = json.dumps({"error": {"code": status, "message": body}}).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@contextlib.contextmanager
def serve(files: MemoryFileSystem) -> Iterator[FakeGcs]:
    """Runs a server in a thread. Until the block ends, TensorStore uses it and Google's client is replaced."""
    with FakeGcs(files) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # prevents a search for credentials, also on other machines
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(google.cloud, "storage", types.SimpleNamespace(Client=lambda: server.client), raising=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
