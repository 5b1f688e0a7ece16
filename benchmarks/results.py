"""The figures of benchmarks/speed.py: the file that keeps them, and the table."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, Case

from titok_jax.runtime.outputs import new_file

_HEADINGS = (
    *("what", "dtype", "batch", "titok_jax", "images/s", "GiB", "published", "GiB", "ratio"),
    *("torch.compile", "GiB", "ratio", "target on an H100 or H200"),
)


def median(row: Mapping[str, Any], side: str) -> float | None:
    """The median of a side's seconds over all rounds of all turns; None if it was not measured."""
    turns = row.get(side, {}).get("seconds", ())
    return statistics.median(seconds for turn in turns for seconds in turn) if turns else None


def cells_of(row: Mapping[str, Any], side: str) -> list[str]:
    """Milliseconds per batch, GiB, and the ratio to ours."""
    found, ours = median(row, side), median(row, "titok_jax")
    if found is None:
        return ["failed" if "error" in row.get(side, {}) else "", "", ""]
    return [f"{1e3 * found:.1f} ms", f"{row[side]['peak'] / 2**30:.1f}", f"{found / ours:.2f}" if ours else ""]


def target(row: Mapping[str, Any]) -> str:
    """What was wanted of a case, and whether it was met; "" if nothing was wanted."""
    wanted = next((case.target for case in CASES if case.name == row["case"]), None)
    ours, published, compiled = (median(row, side) for side in ("titok_jax", "published", "compiled"))
    if wanted is None or ours is None or published is None:
        return "" if wanted is None else f"{wanted:g}"
    checks = {f"{wanted:g}": published / ours >= wanted, "memory": row["titok_jax"]["peak"] <= row["published"]["peak"]}
    if compiled is not None:
        checks["torch.compile"] = compiled >= ours
    return ", ".join(f"{name} {'met' if met else 'missed'}" for name, met in checks.items())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table. Times are medians per batch, ratios those of medians, GiB the most in use."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---|---|--:" + "|--:" * 9 + "|---|"]
    for row in rows:
        ours = median(row, "titok_jax")
        time_of_ours, memory, _ = cells_of(row, "titok_jax")
        rate = "" if ours is None else row["batch"] / ours
        rate = rate and (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}")
        cells = [row["case"], row["dtype"], str(row["batch"]), time_of_ours, rate, memory]
        cells += [*cells_of(row, "published"), *cells_of(row, "compiled"), target(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Results:
    """The figures, which are kept in a file.

    Attributes:
      about: {"titok_jax" or "published": its device and versions}.
      rows: a dict for each case, dtype and batch. Under the name of a side it has "seconds" per run, in a list for every
        turn, "first" seconds, which compile, and "peak" bytes; or "error".
    """

    def __init__(self, file: str | None, overwrite: bool):
        self.file, self.about, self.rows = file, {}, []
        if file and Path(file).exists() and not overwrite:
            try:
                kept = json.loads(Path(file).read_text())
                self.about, self.rows = dict(kept["about"]), [dict(row) for row in kept["rows"]]
                table(self.rows)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(
                    f"--json {file} is no file of this benchmark; name another one or add --overwrite"
                ) from None

    def row(self, case: Case, dtype: str, batch: int) -> dict[str, Any]:
        key = {"case": case.name, "dtype": dtype, "batch": batch}
        found = next((row for row in self.rows if key.items() <= row.items()), None)
        if found is None:
            self.rows.append(found := key)
        return found

    def turns(self, row: Mapping[str, Any], side: str) -> int:
        """How many turns of a side are done. After an error there are no more."""
        return sys.maxsize if "error" in row.get(side, {}) else len(row.get(side, {}).get("seconds", ()))

    def add(self, row: dict[str, Any], side: str, answer: Mapping[str, Any]) -> None:
        """Adds a turn and writes the file.

        Raises:
          ValueError: the figures in the file come from another device or other versions.
        """
        if "error" in answer:
            row[side] = {"error": answer["error"]}
        else:
            code = "published" if side == "compiled" else side
            if self.about.setdefault(code, answer["about"]) != answer["about"]:
                raise ValueError(
                    f"--json {self.file} has figures of {self.about[code]}, but this is {answer['about']}; "
                    "name another file or add --overwrite"
                )
            old = row.get(side, {"seconds": [], "first": answer["first"], "peak": 0})
            row[side] = old | {"seconds": [*old["seconds"], answer["seconds"]], "peak": max(old["peak"], answer["peak"])}
        if self.file:
            with new_file(self.file, replace=True) as partial:
                partial.write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1) + "\n")
