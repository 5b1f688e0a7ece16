"""How near the comparisons of a test run came to their bounds: `pytest -p margins` ends with a table, the nearest first.

A bound that one machine meets by luck fails on the next, so a comparison of float32 numbers should leave a factor of 3.
Recorded are `np.testing.assert_allclose` and `golden_data.within` (which `golden_data.compare` calls), not what tests do in
processes of their own. Python finds this file where tests/ is on its path: see `make test-machines`.
"""

import contextlib
import inspect
import os
import pathlib

import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parent
SHOWN = 0.3  # of the bound

_worst: dict[str, tuple[float, str]] = {}  # {place: (largest error over its bound, where that was)}


def _record(error, allowed, label: str) -> None:
    places = []
    frame = inspect.currentframe()
    while frame:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.parent == TESTS and path.name not in ("margins.py", "golden_data.py"):
            places.append(f"{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    place = places[0] if places else "elsewhere"
    error, allowed = np.broadcast_arrays(np.asarray(error, np.float64), np.asarray(allowed, np.float64))
    used = error > 0  # what is equal says nothing, nor does a bound of 0
    if not used.any() or not (allowed[used] > 0).all():
        return
    ratio = float((error[used] / allowed[used]).max())
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].partition("::")[2]
    if ratio > _worst.get(place, (0.0, ""))[0]:
        _worst[place] = ratio, f"{test} {label}"


def install(*, fail: bool = True) -> None:
    """Records from now on; without `fail`, numbers beyond their bounds are recorded and pass."""
    import golden_data  # imports JAX, which must find what conftest.py says

    raise_allclose, raise_within = np.testing.assert_allclose, golden_data.within

    def assert_allclose(actual, desired, rtol=1e-7, atol=0, *arguments, **options):
        with contextlib.suppress(TypeError, ValueError):  # shapes that do not fit fail below
            error = np.abs(np.asarray(actual, np.float64) - np.asarray(desired, np.float64))
            _record(error, atol + rtol * np.abs(np.asarray(desired, np.float64)), options.get("err_msg", ""))
        if fail:
            raise_allclose(actual, desired, rtol, atol, *arguments, **options)

    def within(difference, allowed, label):
        _record(np.abs(difference), allowed, label)
        if fail:
            raise_within(difference, allowed, label)

    np.testing.assert_allclose, golden_data.within = assert_allclose, within


def table() -> list[str]:
    """A line for each place that came near its bound, the nearest first."""
    rows = sorted(_worst.items(), key=lambda row: -row[1][0])
    return [f"{ratio:6.3f} of the bound  {place}  {label}" for place, (ratio, label) in rows if ratio >= SHOWN]


def pytest_configure(config: pytest.Config) -> None:
    install()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """What a worker of pytest-xdist found."""
    for place, (ratio, label) in getattr(node, "workeroutput", {}).get("margins", {}).items():
        if ratio > _worst.get(place, (0.0, ""))[0]:
            _worst[place] = ratio, label


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["margins"] = {place: list(row) for place, row in _worst.items()}


def pytest_terminal_summary(terminalreporter) -> None:
    lines = table()
    terminalreporter.section(f"comparisons that used {SHOWN:.0%} of their bound or more: {len(lines)}")
    for line in lines:
        terminalreporter.write_line(line)
