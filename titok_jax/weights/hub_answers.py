"""Downloads a file with `huggingface_hub`, and refuses answers of an endpoint that would lead out of the cache.

`huggingface_hub` makes file paths of two headers of an answer: the ETag, which names the file in the cache, and the commit.
An endpoint that sends "../../x" for one of them decides where the file is written.
"""

import contextvars
import dataclasses
import re
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?')


@dataclasses.dataclass
class _Watch:
    """What the answers to one download have said so far.

    Attributes:
      etag: ETag of the last answer that described the file; None before there is one.
    """

    etag: str | None = None


class _UnwatchedError(Exception):
    """`huggingface_hub` opened a new session during a download, whose answers nobody checked."""


_watch: contextvars.ContextVar[_Watch | None] = contextvars.ContextVar("_watch", default=None)


def watched_download(repository: str, file: str, **options: Any) -> str:
    """`huggingface_hub.hf_hub_download` that checks the answers of the endpoint. Other downloads are as they were.

    Raises:
      ValueError: an ETag is not a checksum, or a commit is not one. Nothing has been written outside of the cache.
      The errors of `hf_hub_download`.
    """
    import huggingface_hub
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # made when the body of the file begins, before anything of it is written
        def __init__(self, *args, **kwargs):
            watch = _watch.get()
            if watch is not None:
                if _check_answer not in huggingface_hub.get_session().event_hooks["response"]:
                    raise _UnwatchedError("the connection was opened anew during the download; try again")
                if watch.etag is not None:
                    _check_etag(watch.etag)
            super().__init__(*args, **kwargs)

    for attempt in range(3):
        hooks = huggingface_hub.get_session().event_hooks["response"]
        if _check_answer not in hooks:
            hooks.append(_check_answer)
        before = _watch.set(_Watch())
        try:
            return huggingface_hub.hf_hub_download(repository, file, tqdm_class=Bar, **options)
        except _UnwatchedError:
            if attempt == 2:
                raise
        finally:
            _watch.reset(before)
    raise AssertionError("unreachable")


def _check_answer(response: Any) -> None:
    """Raises ValueError if an answer to a watched download names no commit or no checksum where it should."""
    watch, commit = _watch.get(), response.headers.get("X-Repo-Commit")
    if watch is None or commit is None:  # without a commit, huggingface_hub takes nothing from an answer
        return
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"the endpoint names the commit {commit[:200]!r}, expected 40 hexadecimal digits")
    etag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag")
    if response.request.method != "HEAD" or response.status_code >= 400 or etag is None:
        return
    watch.etag = etag
    if response.has_redirect_location:
        url, target = response.url, response.url.join(response.headers["Location"])
        if (target.scheme, target.host, target.port) == (url.scheme, url.host, url.port):
            return  # huggingface_hub goes on to there, and the next answer counts
    _check_etag(etag)


def _check_etag(etag: str) -> None:
    if not _ETAG.fullmatch(etag):
        raise ValueError(f"the endpoint names the file {etag[:200]!r} in its ETag, expected 40 or 64 hexadecimal digits")
