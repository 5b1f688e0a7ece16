"""Files that a user names by paths, globs and braces, on this machine, in a bucket or on the web."""

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from titok_jax.runtime.messages import near_path
from titok_jax.runtime.paths import as_path, files_below, is_file, is_remote, is_web

Paths = str | os.PathLike | Iterable[str | os.PathLike]  # one path or pattern (`find_files`), or several
_MOST_NAMES, _MOST_BRACES = 100_000, 100  # that one pattern may give, and hold
_SHARD = re.compile(r"(.*?)(\d{5,6})-of-(\d{5,6})(.*)", re.DOTALL)


def find_files(paths: Paths, what: str) -> list[str]:
    """Finds the files that match paths and patterns, in the order given. The files of one glob pattern are sorted.

    Patterns are globs (*, ?, [0-9]; ** for any number of folders) and shell braces, as in WebDataset:
    train-{0000..0252}.tar, {train,val}-*.tar. Every alternative in braces must match a file. For the web, only braces: it
    lists no files. A path is taken as it is written as far as it exists, so that folders may have brackets and braces in
    their names: `run [1]/*.tar`.

    A glob gives all shards of a set or none: if it finds x-00000-of-00002.tar, the other one must be there too, unless its
    name does not match. Files that are named without a glob, one by one or in braces, may be some of a set.

    Raises:
      FileNotFoundError: a path, pattern or alternative in braces that matches no file, in which case the message says that
        `what` was expected; or a missing shard.
      OSError: a folder that cannot be read.
      ValueError: no paths, or braces that stand for more than 100,000 names.
    """
    patterns = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    parts = [part for pattern in map(os.fspath, patterns) for part in _alternatives(pattern)]
    if not parts:
        raise ValueError(f"no paths given; expected {what}")
    if any(map(is_remote, parts)):
        with ThreadPoolExecutor() as threads:  # each part is a request, or several
            found = list(threads.map(_matches, parts))
    else:
        found = list(map(_matches, parts))
    for part, matches in zip(parts, found, strict=True):
        if not matches:
            why = "no such file, and no file matches it as a pattern" if is_web(part) or not _exists(part) else "a folder"
            raise FileNotFoundError(f"{part}: {why}; expected {what}{near_path(part)}")
        check_complete(matches, part)
    return [file for matches in found for file in matches]


def check_complete(files: Sequence[str | os.PathLike], pattern: str) -> None:
    """Checks that a glob found every shard whose name it matches: NAME-00002-of-00004.EXT, counted from 0 or 1.

    Raises:
      FileNotFoundError: the message names the first one that is missing, its folder, and how many there should be.
    """
    found: dict[tuple[str, ...], dict[int, str]] = {}  # {folder, NAME-, 00004, .EXT: {number: what follows the 00004}}
    for path in map(os.fspath, files):
        folder, _, name = path.rpartition("/")
        if shard := _SHARD.fullmatch(name):
            before, number, of, after = shard.groups()
            found.setdefault((folder, before, of, Path(after).suffix), {})[int(number)] = after
    for (folder, before, of, suffix), numbers in found.items():
        first = 1 if int(of) in numbers and 0 not in numbers else 0
        after = next(iter(numbers.values())) if len(set(numbers.values())) == 1 else f"*{suffix}"  # the hub adds checksums
        names = [f"{before}{n:0{len(of)}}-of-{of}{after}" for n in range(first, first + int(of)) if n not in numbers]
        missing = [name for name in names if fnmatch.fnmatchcase(name, pattern.rpartition("/")[2])]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FileNotFoundError(
                f"{folder or '.'}: {missing[0]}{others} of {int(of)} shards missing; {pattern} would read the others as if "
                "they were all. Complete them, or name the files that are meant, one by one or in braces"
            )


def _alternatives(pattern: str) -> list[str]:
    """The paths and globs that a pattern stands for: with all braces expanded behind the part of it that exists."""
    fixed = _existing(pattern)
    if pattern.count("{", fixed) > _MOST_BRACES:
        raise ValueError(f"{pattern[:200]}: a pattern may have {_MOST_BRACES} pairs of braces")
    names = list(itertools.islice(_expanded(pattern[fixed:]), _MOST_NAMES + 1))
    if len(names) > _MOST_NAMES:
        raise ValueError(f"{pattern[:200]}: its braces stand for more than {_MOST_NAMES:,} names")
    return [pattern[:fixed] + name for name in dict.fromkeys(names)]


def _existing(pattern: str) -> int:
    """The length of the beginning of a pattern that is a path as it is written: whole components, with the / behind them."""
    end = 0
    for name in [] if is_web(pattern) else pattern.split("/"):
        if (glob.has_magic(name) or "{" in name) and not _exists(pattern[:end] + name):
            break
        end += len(name) + 1
    return min(end, len(pattern))


def _exists(path: str) -> bool:
    return as_path(path).exists() if is_remote(path) else os.path.exists(path)


def _expanded(text: str) -> Iterator[str]:
    """a{08..10}.tar -> a08.tar, a09.tar, a10.tar; {a,b}.tar -> a.tar, b.tar. Other braces are part of the name. A name is
    made when it is asked for, because a short text may stand for any number of them."""
    start = -1
    while (start := text.find("{", start + 1)) >= 0:
        end, commas = _closing(text, start)
        inner = text[start + 1 : end]
        if numbers := re.fullmatch(r"(\d{1,100})\.\.(\d{1,100})", inner):
            choices = _numbers(*numbers.groups())
        elif commas:
            names = (text[first + 1 : last] for first, last in itertools.pairwise([start, *commas, end]))
            choices = (choice for name in names for choice in _expanded(name))
        else:
            continue
        for choice in choices:
            for rest in _expanded(text[end + 1 :]):
                yield text[:start] + choice + rest
        return
    yield text


def _closing(text: str, start: int) -> tuple[int, list[int]]:
    """The places of the } that closes the { at `start`, and of the commas between, outside other braces. Without a closing
    one: (end of the text, [])."""
    depth, commas = 0, []
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place, commas
        if depth == 1 and text[place] == ",":
            commas.append(place)
    return len(text), []


def _numbers(first: str, last: str) -> Iterator[str]:
    step = 1 if int(first) <= int(last) else -1
    width = max(len(first), len(last)) if re.match("0[0-9]", first) or re.match("0[0-9]", last) else 0
    for number in range(int(first), int(last) + step, step):
        yield f"{number:0{width}}"


def _matches(part: str) -> list[str]:
    """The files of a path or glob without braces."""
    if is_web(part):
        if "*" in part:
            raise ValueError(f"{part}: the web lists no files for *; name them, e.g. by braces, NAME-{{0000..0252}}.tar")
        return [part] if is_file(part) else []
    if is_file(part):
        return [part]
    fixed = _existing(part)
    return sorted(_in_folder(part[:fixed], part[fixed:].split("/"))) if glob.has_magic(part[fixed:]) else []


def _in_folder(folder: str, names: Sequence[str]) -> Iterator[str]:
    """The files in `folder` (ends in /, or is empty) whose paths fit the components of a glob. Hidden ones do not fit *."""
    name, *rest = names
    if not _exists(folder or "."):
        return
    if name == "**":
        for below in files_below(folder or "."):
            if not below[-1].startswith(".") and _fits(below, names):
                yield folder + "/".join(below)
        return
    if not glob.has_magic(name) or _exists(folder + name):
        found = [name]
    else:
        there = os.listdir(folder or ".") if not is_remote(folder) else [path.name for path in as_path(folder).iterdir()]
        found = [other for other in fnmatch.filter(there, name) if not other.startswith(".") or name.startswith(".")]
    for name in found:
        if rest:
            yield from _in_folder(f"{folder}{name}/", rest)
        elif is_file(folder + name):
            yield folder + name


def _fits(path: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the components of a path fit those of a glob with **."""
    if not names or not path:
        return not path and all(name == "**" for name in names)
    if names[0] == "**":
        return _fits(path, names[1:]) or _fits(path[1:], names)
    return fnmatch.fnmatchcase(path[0], names[0]) and _fits(path[1:], names[1:])
