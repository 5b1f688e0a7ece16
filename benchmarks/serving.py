"""The processes that benchmarks/speed.py starts, one for each side, case and turn: they read a request, measure, and answer.

This runs in the interpreter of the published code, too, so it imports nothing but Python's own modules.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A case that is ready to run.

    Attributes:
      about: the device and the versions, as the table's heading says them.
      run: runs the case a number of times and waits for the last result.
      peak: -> the largest number of bytes that were in use on the device; None if it does not count them.
    """

    about: str
    run: Callable[[int], None]
    peak: Callable[[], int | None]


def serve(prepare: Callable[[dict[str, Any]], Prepared]) -> None:
    """Reads a request from stdin as JSON, and writes the answer as the last line of stdout.

    The request says how many "rounds" to measure; the rest of it is for `prepare`. The answer has "about", "first", the
    seconds of the first run, which compiles, "seconds" per run in every round, and "peak" in bytes: on a CPU that of the
    process. If anything fails it has "error" instead.
    """
    request = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # so that prints of the published code do not mix with the answer

    try:
        prepared = prepare(request)

        def seconds(times: int) -> float:
            began = time.perf_counter()
            prepared.run(times)
            return time.perf_counter() - began

        answer: dict[str, Any] = {"about": prepared.about, "first": seconds(1)}
        seconds(1)
        # Each round takes half a second, so the resolution of the clock does not matter.
        times = max(1, min(100, round(0.5 / seconds(1))))
        answer["seconds"] = [seconds(times) / times for _ in range(request["rounds"])]
        answer["peak"] = prepared.peak() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except Exception as error:  # the published code, the frameworks and their compilers may raise anything
        lines = str(error).strip().splitlines()
        answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    print("\n" + json.dumps(answer), file=answers, flush=True)
