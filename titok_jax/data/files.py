"""Files that a user names by paths, globs and braces, on this machine, in a bucket or on the web."""

import glob
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from titok_jax.runtime.messages import near_path
from titok_jax.runtime.paths import as_path, is_file, is_remote, is_web

Paths = str | os.PathLike | Iterable[str | os.PathLike]  # one path or pattern (`find_files`), or several


def find_files(paths: Paths, what: str) -> list[str]:
    """Finds the files that match paths and patterns, in the order given. The files of one glob pattern are sorted.

    Patterns are globs (*, ?, [0-9]; for local files also **) and shell braces, as in WebDataset: train-{0000..0252}.tar,
    {train,val}-*.tar. Every alternative in braces must match a file. For the web, only braces: it lists no files.

    Raises:
      FileNotFoundError: a path, pattern or alternative in braces that matches no file; the message says that `what` was
        expected.
      ValueError: no paths.
    """
    patterns = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    parts = [part for pattern in map(os.fspath, patterns) for part in _expand_braces(pattern)]
    if not parts:
        raise ValueError(f"no paths given; expected {what}")
    with ThreadPoolExecutor() as threads:  # each part in a bucket is one request
        found = list(threads.map(_matches, parts))
    for part, matches in zip(parts, found, strict=True):
        if not matches:
            raise FileNotFoundError(
                f"{part}: no such file, and no file matches it as a pattern; expected {what}{near_path(part)}"
            )
    return [file for matches in found for file in matches]


def _expand_braces(pattern: str) -> list[str]:
    """a{08..10}.tar -> a08.tar, a09.tar, a10.tar; {a,b}.tar -> a.tar, b.tar. Other braces are part of the name."""
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if braces is None or (not is_remote(pattern) and os.path.isfile(pattern)):
        return [pattern]
    first, last, names = braces.groups()
    if names is None:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if re.match("0[0-9]", first) or re.match("0[0-9]", last) else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + step, step)]
    else:
        choices = names.split(",")
    parts = [
        part for choice in choices for part in _expand_braces(pattern[: braces.start()] + choice + pattern[braces.end() :])
    ]
    return list(dict.fromkeys(parts))  # nested braces give some names more than once


def _matches(pattern: str) -> list[str]:
    if is_web(pattern):
        if "*" in pattern:
            raise ValueError(f"{pattern}: the web lists no files for *; name them, e.g. by braces, NAME-{{0000..0252}}.tar")
        return [pattern] if is_file(pattern) else []
    if is_remote(pattern):
        return _remote_matches(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))


def _remote_matches(pattern: str) -> list[str]:
    path = as_path(pattern)
    if path.is_file():
        return [pattern]
    if "**" in pattern:
        raise ValueError(f"{pattern}: ** is for files of this machine, expected * for each folder")
    bucket, *names = pattern.partition("://")[2].split("/")
    root = as_path(f"{pattern.partition('://')[0]}://{bucket}")
    matches = root.glob("/".join(names))  # also matches hidden files, such as leftovers of a killed upload
    return sorted(os.fspath(match) for match in matches if not match.name.startswith(".") and match.is_file())
