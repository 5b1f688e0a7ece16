"""Whatever is changed in what people give, the answer is a result or one sentence (tests/mutations.py)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_mutations_end_in_a_result_or_a_sentence(count):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, TESTS / "mutations.py", "--count", str(count), "--seed", str(count)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    kinds = [json.loads(line) for line in run.stdout.splitlines()]
    assert sum(kind.get("accepted", 0) + kind.get("refused", 0) for kind in kinds) == pytest.approx(count, abs=20)
    assert all(kind["refused"] > 0 for kind in kinds)
