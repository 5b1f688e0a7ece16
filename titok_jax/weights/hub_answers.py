"""Downloads a file with `huggingface_hub`, and refuses answers of an endpoint that would do harm.

`huggingface_hub` makes file paths of two headers of an answer: the ETag, which names the file in the cache, and the commit.
An endpoint that sends "../../x" for one of them decides where the file is written. And the library writes what comes for as
long as something comes. So a hook on its session looks at every answer, and counts what each one sends.
"""

import contextvars
import dataclasses
import functools
import importlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

SLOWEST = 10_000  # bytes a second, on the average of each minute of waiting for the body of an answer
_MINUTE = 60.0
_MOST_BESIDES = 100_000  # bytes of an answer that is not the file, such as an error, or beside the file's own
_LONGEST_PAUSE = 300  # seconds that an endpoint may ask to wait

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?')
_ENCODINGS = ("identity", "gzip", "x-gzip", "deflate")  # which make a thousandth of a body at most
_OWN_HOST = "huggingface.co"


@dataclasses.dataclass
class _Watch:
    """What the answers to one download have said and sent so far.

    Attributes:
      clock: time in seconds.
      etag, size: of the last answer that described the file; None before there is one, or if it does not tell the size.
      waited, received: seconds of waiting and bytes since the last minute was complete.
    """

    clock: Callable[[], float]
    etag: str | None = None
    size: int | None = None
    waited: float = 0.0
    received: int = 0

    def check_speed(self) -> None:
        """Raises ValueError if a minute of waiting is over and too little has come in it."""
        if self.waited >= _MINUTE:
            if self.received < SLOWEST * self.waited:
                raise ValueError(
                    f"the endpoint sent {self.received:,} bytes in {self.waited:.0f} seconds, expected at least {SLOWEST:,} "
                    "in each; try again later"
                )
            self.waited, self.received = 0.0, 0


class _UnwatchedError(Exception):
    """`huggingface_hub` opened a new session during a download, whose answers nobody checked."""


_watch: contextvars.ContextVar[_Watch | None] = contextvars.ContextVar("_watch", default=None)


def watched_download(repository: str, file: str, *, clock: Callable[[], float] = time.monotonic, **options: Any) -> str:
    """`huggingface_hub.hf_hub_download` that checks the answers of the endpoint. Other downloads are as they were.

    Raises:
      ValueError: an ETag is not a checksum, or a commit is not one, and nothing has been written outside of the cache. The
        body is longer than was said, or slower than `SLOWEST`; but not if it comes over Xet, which only the hub's own host
        may offer.
      The errors of `hf_hub_download`.
    """
    import huggingface_hub
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # made when the body of the file begins, before anything of it is written
        def __init__(self, *args, **kwargs):
            watch, self._watched = _watch.get(), None
            if watch is not None:
                if _check_answer not in huggingface_hub.get_session().event_hooks["response"]:
                    raise _UnwatchedError("the connection was opened anew during the download; try again")
                if watch.etag is not None:
                    _check_etag(watch.etag)
                if kwargs.get("name") == "huggingface_hub.http_get":
                    self._watched, self._written = watch, kwargs.get("initial") or 0
            super().__init__(*args, **kwargs)

        def update(self, n=1):  # before n bytes are written, which are more than were sent if those were compressed
            if self._watched is not None:
                self._written += n
                if self._written > self._watched.size:
                    raise ValueError(_too_long(self._watched.size))
            return super().update(n)

    for attempt in range(3):
        hooks = huggingface_hub.get_session().event_hooks
        if _check_answer not in hooks["response"]:
            hooks["request"].append(_ask_plainly)
            hooks["response"].append(_check_answer)
        before = _watch.set(_Watch(clock))
        try:
            return huggingface_hub.hf_hub_download(repository, file, tqdm_class=Bar, **options)
        except _UnwatchedError:
            if attempt == 2:
                raise
        finally:
            _watch.reset(before)
    raise AssertionError("unreachable")


def _ask_plainly(request: Any) -> None:
    """Asks for a file as it is, not compressed."""
    if _watch.get() is not None:
        request.headers["Accept-Encoding"] = "identity"


def _check_answer(response: Any) -> None:
    """Raises ValueError if an answer to a watched download says what it should not. Bounds what is read of its body."""
    watch = _watch.get()
    if watch is None:
        return
    _check_pause(response)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in _ENCODINGS:
        raise ValueError(f"the endpoint sends the encoding {encoding[:200]!r}, expected the file as it is")
    if response.url.host != _OWN_HOST:
        # Xet transfers, which cannot be watched, are then not offered. The same file is to be had by HTTP.
        response.headers.pop("X-Xet-Hash", None)
    if response.headers.get("X-Repo-Commit") is not None:  # without it, huggingface_hub takes nothing from an answer
        _check_description(response, watch)
    # Before it is described, huggingface_hub may ask for other things.
    is_file = watch.etag is not None and response.request.method == "GET" and response.status_code in (200, 206)
    if is_file and watch.size is None:
        watch.size = _length(response.headers.get("Content-Length"))
        if watch.size is None:
            raise ValueError("the endpoint does not say how long the file is")
    response.stream = _bounded(type(response))(response.stream, watch, watch.size if is_file else None)


def _check_description(response: Any, watch: _Watch) -> None:
    """Checks and keeps what an answer says of the file."""
    commit = response.headers["X-Repo-Commit"]
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"the endpoint names the commit {commit[:200]!r}, expected 40 hexadecimal digits")
    etag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag")
    if response.request.method != "HEAD" or response.status_code >= 400 or etag is None:
        return
    size = response.headers.get("X-Linked-Size")
    if size is None and not response.has_redirect_location:
        size = response.headers.get("Content-Length")
    watch.etag, watch.size = etag, _length(size)
    if response.has_redirect_location:
        url, target = response.url, response.url.join(response.headers["Location"])
        if (target.scheme, target.host, target.port) == (url.scheme, url.host, url.port):
            return  # huggingface_hub goes on to there, and the next answer counts
    _check_etag(etag)


def _check_etag(etag: str) -> None:
    if not _ETAG.fullmatch(etag):
        raise ValueError(f"the endpoint names the file {etag[:200]!r} in its ETag, expected 40 or 64 hexadecimal digits")


def _check_pause(response: Any) -> None:
    """Raises ValueError if an answer asks for a pause of more than five minutes, which would be made."""
    asked = re.fullmatch(r"\s*(\d+)\s*", response.headers.get("Retry-After", ""))
    asked = asked or re.search(r"\bt=(\d+)", response.headers.get("ratelimit", ""))
    if response.status_code >= 400 and asked and (len(asked[1]) > 9 or int(asked[1]) > _LONGEST_PAUSE):
        raise ValueError(
            f"the endpoint asks to wait {asked[1][:20]} seconds (status {response.status_code}); try again later"
        )


def _too_long(size: int | None) -> str:
    if size is None:
        return f"the endpoint sends more than {_MOST_BESIDES:,} bytes that are not the file"
    return f"the endpoint sends more than the {size:,} bytes that it said the file has"


def _length(header: str | None) -> int | None:
    return int(header) if header is not None and re.fullmatch(r"\d{1,18}", header) else None


@functools.cache
def _bounded(kind: type) -> type:
    """The class of a stream that reads another one, and raises ValueError if it is longer than a file of `size` bytes (None:
    an answer that is no file) or too slow. `kind` is the class of the answers, in httpx or what took its place."""
    library = importlib.import_module(kind.__module__.partition(".")[0])

    class Bounded(library.SyncByteStream):
        def __init__(self, stream: Any, watch: _Watch, size: int | None):
            self._stream, self._watch, self._size = stream, watch, size

        def __iter__(self) -> Iterator[bytes]:
            chunks, received = iter(self._stream), 0
            while True:
                start = self._watch.clock()
                try:
                    chunk = next(chunks)
                except StopIteration:
                    return
                finally:
                    self._watch.waited += self._watch.clock() - start
                received += len(chunk)
                self._watch.received += len(chunk)
                if received > (self._size or 0) + _MOST_BESIDES:
                    raise ValueError(_too_long(self._size))
                self._watch.check_speed()
                yield chunk

        def close(self) -> None:
            self._stream.close()

    return Bounded
