"""What a data source holds, in a few numbers: to notice that the data of a training have changed. No image is read."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from titok_jax.runtime.messages import first_lines
from titok_jax.runtime.paths import file_size

# A source with more files is kept folder by folder, one with more folders than this only as a whole.
MOST_PARTS = 2000


def sized_files(paths: Iterable[str], counts: Iterable[int]) -> Iterator[tuple[str, int, int]]:
    """Yields (path, number of examples, size in bytes) of each file, as the method `files` of a source does."""
    for path, count in zip(paths, counts, strict=True):
        yield path, count, file_size(path)


def source_contents(source: Any) -> dict[str, Any]:
    """Describes a source by its files, in their order.

    Args:
      source: an object with `__len__`, and `files() -> iterator of (path, number of examples, size in bytes)` if it has
        files. Of any other source only the number of examples is known.

    Returns:
      JSON values: "examples"; "digest", of the names, sizes and numbers of examples of all files; and "parts", {name of a
      file or folder, below the folder that all share: [examples, bytes, digest]}, in the order of the source.
    """
    files = list(source.files()) if hasattr(source, "files") else []
    below = _below_common_folder([path for path, _, _ in files])
    rows = [(name, examples, size) for name, (_, examples, size) in zip(below, files, strict=True)]
    parts: dict[str, list[Any]] = {}
    for names in (below, [str(PurePosixPath(name).parent) for name in below]):
        if len(set(names)) <= MOST_PARTS:
            grouped: dict[str, list[tuple[str, int, int]]] = {}
            for name, row in zip(names, rows, strict=True):
                grouped.setdefault(name, []).append(row)
            parts = {name: [sum(r[1] for r in of), sum(r[2] for r in of), _digest(of)] for name, of in grouped.items()}
            break
    return {"examples": len(source), "digest": _digest(rows), "parts": parts}


def _below_common_folder(paths: list[str]) -> list[str]:
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [path.removeprefix(folder).lstrip("/") for path in paths]


def _digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def content_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says in lines what differs between two results of `source_contents`; nothing if they are the same."""
    if then == now:
        return []
    lines = []
    if then["examples"] != now["examples"]:
        lines.append(f"{then['examples']:,} examples then, {now['examples']:,} now")
    lines += first_lines(list(_part_changes(then["parts"], now["parts"])))
    if not lines:
        same = then["parts"] == now["parts"] and then["parts"]
        lines.append("the files are in another order" if same else "files have other names, sizes or numbers of examples")
    return lines


def _part_changes(then: Mapping[str, list], now: Mapping[str, list]) -> Iterator[str]:
    if not then or not now:
        return
    for name in dict.fromkeys([*then, *now]):
        if name not in now:
            yield f"{name}: there then, missing now"
        elif name not in then:
            yield f"{name}: new"
        elif then[name] != now[name]:
            (examples, size, _), (examples_now, size_now, _) = then[name], now[name]
            if (examples, size) == (examples_now, size_now):
                yield f"{name}: files in it have other names or sizes"
            else:
                yield f"{name}: {examples:,} examples in {size:,} bytes then, {examples_now:,} in {size_now:,} now"
