"""What `make test-machines` and `make test-gpu` say where they cannot do what they are asked for."""

import subprocess
import sys

import machines


def test_a_missing_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(machines, "on_gpu", lambda: False)
    assert machines.main(["gpu"]) == 2
    assert capsys.readouterr().err == "error: JAX finds no GPU here; README.md says what to install for one\n"


def test_the_files_of_tests_exist():
    assert set(machines.ON_GPU) < set(machines.NUMERIC)
    for name in machines.NUMERIC:
        assert (machines.TESTS / f"test_{name}.py").is_file(), name


def test_tests_that_take_too_long_say_what_they_found():
    code = """
import time
try:
    print("started", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("1 failed")
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    assert process.stdout.readline() == "started\n"
    assert machines.finish(process, 0.01) == ("1 failed\n", "", False)
