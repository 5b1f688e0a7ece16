"""How messages show names that files or users give: escaped, short, few, and with what was perhaps meant. No JAX."""

import difflib
import functools
import logging
import os
from collections.abc import Iterable, Sequence

_LONGEST = 200  # characters of a name
_LONGEST_LINE = 2000
_MOST = 5  # lines of a list


def shown(name: object) -> str:
    """A name as it may be printed: at most 200 characters, with escapes for line breaks and what else is not printable."""
    text = str(name)
    return escaped(text[:_LONGEST]) + ("..." if len(text) > _LONGEST else "")


def escaped(text: str) -> str:
    """A text with Python's escapes in place of all characters that are not printable."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def printable(message: str) -> str:
    """A whole message as it may be printed: each line escaped, and cut after 2,000 characters. It may be a library's, with
    names from files in it."""
    lines = message.split("\n")
    return "\n".join(escaped(line[:_LONGEST_LINE]) + ("..." if len(line) > _LONGEST_LINE else "") for line in lines)


@functools.lru_cache(maxsize=1000)
def say_once(text: str) -> None:
    """Logs a warning, once per process: a command may read a file more than once."""
    logging.getLogger(__name__).warning("%s", text)


def first_lines(lines: Sequence[str], what: str = "") -> list[str]:
    """The first five of a list of lines, then "... and 145 more WHAT"."""
    more = len(lines) - _MOST
    return [*lines[:_MOST], *([f"... and {more:,} more {what}".rstrip()] if more > 0 else [])]


def near(name: str, known: Iterable[str], before: str = "") -> str:
    """The end of a message, "; did you mean NAME?", with the nearest of the known names, and `before` before it. "" if none
    is near."""
    found = difflib.get_close_matches(name[:_LONGEST], list(known), n=1)
    return f"; did you mean {before}{shown(found[0])}?" if found else ""


def near_path(path: str | os.PathLike) -> str:
    """`near` for a local path that does not exist: with the nearest name in the last of its folders that exists. "" for
    others."""
    if "://" in os.fspath(path):
        return ""
    path = os.path.normpath(path)
    while True:
        folder, name = os.path.split(path)
        if os.path.isdir(folder or os.curdir):
            break
        if folder == path:
            return ""
        path = folder
    try:
        names = os.listdir(folder or os.curdir)[:10_000]
    except OSError:
        return ""
    stem, suffix = os.path.splitext(name)
    # Names that end alike are compared without that, which would make all of them near.
    alike = {os.path.splitext(other)[0]: other for other in names if suffix and other.endswith(suffix)}
    found = [alike[other] for other in difflib.get_close_matches(stem, alike, n=1)]
    found = found or difflib.get_close_matches(name, [other for other in names if other not in alike.values()], n=1)
    return f"; did you mean {shown(os.path.join(folder, found[0]))}?" if found else ""
