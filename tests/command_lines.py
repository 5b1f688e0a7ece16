"""Command lines of the documents, run one after the other in one process, which saves the time of their starts."""

import contextlib
import io
import json
import os
import pathlib
import runpy
import shlex
import subprocess
import sys
import traceback

ROOT = pathlib.Path(__file__).parents[1]


def run(lines: list[str], folder: pathlib.Path) -> list[str]:
    """Runs lines like `python -m MODULE ...` and `python tools/FILE.py ...` in a folder -> what each printed.

    The folder gets links to the parts of the checkout that the lines name. The first line that fails fails the test.
    """
    for name in ("configs", "titok_jax", "tools"):
        (folder / name).symlink_to(ROOT / name)
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, __file__, json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"line"')]
    assert done.returncode == 0, done.stderr[-3000:]
    for result in results:
        assert result["status"] == 0, f"{result['line']}\n{result['stderr'][-3000:]}"
    assert len(results) == len(lines)
    return [result["stdout"] for result in results]


def _run_one(line: str) -> dict:
    python, *arguments = shlex.split(line)
    assert python == "python", line
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
            if arguments[0] == "-m":
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    return {"line": line, "status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as `python -m` does
    for text in json.loads(sys.argv[1]):
        result = _run_one(text)
        print(json.dumps(result), flush=True)
        if result["status"]:
            break
