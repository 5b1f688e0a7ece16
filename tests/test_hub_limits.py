"""What an endpoint in place of the hub may send: as much as it said, not slowly, and nothing that is waited for long."""

import gzip
import time

import huggingface_hub
import pytest
import tiny_models as tiny
from fake_hub import COMMIT, files_of, serve, use

from titok_jax.weights import hub_answers, pretrained
from titok_jax.weights.hub import DownloadError, Repository

NAME = "someone/tokenizer"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return files_of(tiny.save(tmp_path_factory.mktemp("model") / "model", tiny.TOKENIZER))


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    with serve({NAME: {"main": (COMMIT, files)}}) as hub:
        hub.cache = use(hub, tmp_path, monkeypatch)
        yield hub


def endless(status=200, headers=(), most=50_000_000):
    """An answer with a body that goes on until the client leaves, or 50 MB have gone. Its `sent` has the lengths sent."""
    sent = []

    def answer(handler):
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        sent.append(0)
        try:
            while sent[-1] < most:
                sent[-1] += handler.wfile.write(b"\0" * 10_000)
        except OSError:
            pass

    answer.sent = sent
    return answer


def refused(file) -> str:
    """The message with which a download is given up."""
    with pytest.raises(DownloadError) as error:
        Repository(NAME).download(file)
    assert str(error.value).startswith(f"cannot download hf://{NAME}/{file}: ")
    return str(error.value).removeprefix(f"cannot download hf://{NAME}/{file}: ")


def written(hub) -> list[int]:
    """The sizes of the files that a refused download left in the cache."""
    return [path.stat().st_size for path in hub.cache.glob("*/blobs/*")]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_body_that_does_not_end(file, hub, files):
    hub.bodies = endless()
    assert refused(file) == f"the endpoint sends more than the {len(files[file]):,} bytes that it said the file has"
    (sent,) = hub.bodies.sent  # it was not asked again
    assert sent < 10_000_000  # most of it in the buffers of the system
    assert not any(written(hub))


def test_a_compressed_body_that_becomes_long(hub, files):
    """A file is asked for as it is. What comes compressed all the same counts as what it becomes."""
    asked = []
    body = gzip.compress(b"\0" * 5_000_000)

    def answer(handler):
        asked.append(handler.headers["Accept-Encoding"])
        handler.answer(200, {"Content-Encoding": "gzip"}, body)

    hub.bodies = answer
    assert "the endpoint sends more than the " in refused("config.json")
    assert asked == ["identity"]
    assert not any(written(hub))
    hub.bodies = lambda handler: handler.answer(200, {"Content-Encoding": "gzip"}, gzip.compress(files["config.json"]))
    assert Repository(NAME).download("config.json").read_bytes() == files["config.json"]
    hub.bodies = lambda handler: handler.answer(200, {"Content-Encoding": "zstd"}, body)
    assert refused("model.safetensors") == "the endpoint sends the encoding 'zstd', expected the file as it is"


@pytest.mark.parametrize("status", [302, 403, 404, 500])
def test_answers_that_are_not_the_file_are_short(status, hub):
    hub.bodies = endless(status, {"Location": f"{hub.url}/elsewhere"} if status == 302 else {})
    assert refused("config.json") == "the endpoint sends more than 100,000 bytes that are not the file"
    assert max(hub.bodies.sent) < 10_000_000


def test_a_file_whose_length_is_not_said(hub, files):
    hub.headers = {"Content-Length": None}
    Repository(NAME).download("config.json")  # the second answer says it
    hub.headers |= {"X-Linked-Size": "unknown"}
    hub.bodies = endless()
    assert refused("model.safetensors") == "the endpoint does not say how long the file is"


class Stream:
    """A body in chunks, each after so many seconds, and its clock."""

    def __init__(self, *chunks):
        self.chunks, self.now = chunks, 0.0

    def __iter__(self):
        for seconds, length in self.chunks:
            self.now += seconds
            yield b"\0" * length

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("chunks", "complete"),
    [
        ([(1, 10_000)] * 200, True),
        ([(1, 9_990)] * 59, True),  # it ends within the minute
        ([(1, 9_990)] * 60, False),
        ([(9, 1)] * 6 + [(6, 590_000)], False),
        ([(9, 1)] * 6 + [(6, 600_000)], True),
        ([(59, 700_000)] * 3, True),
        ([(59, 700_000), (1, 1), (60, 1)], False),  # each minute counts
        ([(300, 10)], False),
    ],
)
def test_a_body_is_at_least_so_fast_in_each_minute(chunks, complete):
    stream = Stream(*chunks)
    total = sum(length for _, length in chunks)
    kind = type(huggingface_hub.get_session().build_request("GET", "http://x"))  # of the library that is used
    body = hub_answers._bounded(kind)(stream, hub_answers._Watch(stream.clock), total)
    if complete:
        assert sum(map(len, body)) == total
        return
    with pytest.raises(ValueError, match=r"the endpoint sent [\d,]+ bytes in \d+ seconds, expected at least 10,000 in each"):
        list(body)


def test_a_slow_download_is_given_up(hub, files):
    """Also if each connection lasts only a moment: the minutes are those of the download."""
    ticks = iter(range(0, 10**6, 31))

    def download(file):
        hub_answers.watched_download(NAME, file, clock=lambda: next(ticks))

    hub.bodies = endless(headers={"Content-Length": str(len(files["model.safetensors"]))}, most=20_000)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"the endpoint sent [\d,]+ bytes in 62 seconds, expected at least 10,000 in each"):
        download("model.safetensors")
    assert time.process_time() - start < 5
    assert not any(written(hub))
    hub.bodies = None
    ticks = iter([0.001 * number for number in range(10**6)])
    download("model.safetensors")


def test_a_pause_that_an_endpoint_asks_for_is_short(hub, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for headers in ({"Retry-After": "1000000000"}, {"ratelimit": '"api";r=0;t=301'}, {"Retry-After": "9" * 5000}):
        hub.bodies = lambda handler, headers=headers: handler.answer(429, headers)
        assert "the endpoint asks to wait " in refused("config.json")
    assert not pauses
    hub.bodies = lambda handler: (setattr(hub, "bodies", None), handler.answer(429, {"Retry-After": "20"}))
    Repository(NAME).download("config.json")
    assert pauses[0] == 21


def test_only_the_hub_itself_may_offer_transfers_that_are_not_watched(hub):
    hub.headers = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{hub.url}/xet"}
    assert Repository(NAME).download("model.safetensors").is_file()
    assert not [path for _, path, _ in hub.requests if "xet" in path]


def test_other_downloads_of_the_process_are_as_they_were(hub, files):
    pretrained.load_config(f"hf://{NAME}", type(tiny.TOKENIZER))  # which puts the hooks on the session
    asked = []
    hub.bodies = lambda handler: asked.append(handler.headers["Accept-Encoding"]) or handler.answer(200, {}, b"\0" * 200_000)
    answer = huggingface_hub.get_session().get(f"{hub.url}/something")
    assert len(answer.content) == 200_000
    assert asked != ["identity"]
