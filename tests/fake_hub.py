"""A fake Hugging Face hub on loopback."""

import contextlib
import hashlib
import http.server
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import safetensors.numpy

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40
PRIVATE = "someone/private"  # a repository that needs the token "good"


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories by name, revision and file. As on the hub, a redirect leads large files to another address."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories  # {name: {revision: (commit, {file: bytes})}}
        self.blobs = {}
        self.requests = []  # (method, path, requested Range)
        self.break_after = None  # bytes after which the next download ends
        self.truncated = None  # a large file that is announced and sent too short
        self.headers = {}  # headers of the answers about a file that are other than they should be
        self.pushes = {}  # {(method, path): function to call when the next answer to it is ready}
        self.bodies = None  # a function of the handler that answers the GET of a file in another way

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def other_url(self):
        """The same server under another host name: the client downloads from the host to which it is redirected."""
        return f"http://localhost:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if hub.bodies is not None and self.command == "GET" and not self.path.startswith("/api/"):
            return hub.bodies(self)
        if self.path.startswith("/large/"):
            return self.large(hub.blobs[self.path.removeprefix("/large/")])
        match = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path)
        if match is None:
            return self.answer(404, {})
        repository, revision, file = map(urllib.parse.unquote, match.groups())
        allowed = repository != PRIVATE or self.headers.get("Authorization") == "Bearer good"
        if repository not in hub.repositories or not allowed:
            return self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
        commits = {commit: (commit, files) for commit, files in hub.repositories[repository].values()}
        revisions = commits | hub.repositories[repository]
        if revision not in revisions:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        commit, files = revisions[revision]
        hub.pushes.pop((self.command, self.path), lambda: None)()
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        data = files[file]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        forged = {name: value for name, value in hub.headers.items() if self.command == "HEAD"}
        if file.endswith(".json"):
            digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's checksum identifies a small file
            return self.answer(200, {**headers, "ETag": f'"{digest}"'} | forged, data)
        hub.blobs[digest] = data
        linked = {
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{hub.other_url}/large/{digest}",
        }
        return self.answer(302, {**headers, **linked} | forged)

    def large(self, data):
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-")).group(1))
        body = data[start:]
        if hashlib.sha256(data).hexdigest() == self.server.truncated:
            body = body[:-100]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stop, self.server.break_after = self.server.break_after, None
        self.wfile.write(body[:stop])
        if stop is not None:
            self.close_connection = True


def files_of(folder):
    """The files as the published code writes them, without the checksums that our files have."""
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    files = {"config.json": (folder / "config.json").read_bytes(), "model.safetensors": safetensors.numpy.save(weights)}
    if (folder / "tokenizer").is_dir():
        files |= {f"tokenizer/{name}": data for name, data in files_of(folder / "tokenizer").items()}
    return files


@contextlib.contextmanager
def serve(repositories) -> Iterator[Hub]:
    """Serves repositories, as in `Hub`, until the block ends."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def use(hub: Hub, folder: Path, monkeypatch) -> Path:
    """Makes this process read from a hub into an empty cache in a folder. Returns the cache."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "notes"))
    return folder / "hub"
