"""The library and a short training with the lowest and the newest jax and flax that pyproject.toml allows.

`make test-versions`, or `python tests/versions.py [lowest] [newest]`. The environments, `.venv-lowest` and `.venv-newest`,
are made anew each time. In the lowest, every package of titok_jax[train] is at its lower bound. In the newest, pip takes the
newest that fit. New versions of jax need a newer Python than this package does, so that environment is made with
$PYTHON_NEWEST, or with python3.13 or python3.12 if there is one.
"""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("layers", "quantizer", "titok", "generator", "maskgit_vqgan", "decoding", "inference", "weights", "pretrained")
TESTS = [*(f"tests/test_{name}.py" for name in NAMES), "tests/test_package.py"]  # the last one also trains from the wheel
TESTS += ["tests/test_train.py::test_a_run_leaves_model_curves_and_pictures"]
SHOW = "import flax, jax, sys; print('Python', *sys.version.split()[:1], 'jax', jax.__version__, 'flax', flax.__version__)"


def lower_bounds() -> list[str]:
    """The packages of titok_jax[train], each at its lower bound: ["jax==0.10.2", ...]."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["train"]
    return [re.sub(r"^([\w-]+)(?:\[.*\])?>=([\w.]+).*$", r"\1==\2", line) for line in lines]


def newest_python() -> str:
    for name in filter(None, (os.environ.get("PYTHON_NEWEST"), "python3.13", "python3.12")):
        try:
            subprocess.run([name, "-c", ""], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return name
    return sys.executable


def run(name: str) -> str:
    """Makes the environment and runs the tests in it. Returns its versions, with what failed."""
    folder = ROOT / f".venv-{name}"
    subprocess.run([sys.executable if name == "lowest" else newest_python(), "-m", "venv", "--clear", folder], check=True)
    python, constraints = folder / "bin" / "python", folder / "constraints.txt"
    constraints.write_text("\n".join(lower_bounds() if name == "lowest" else []))
    print(f"installing into {folder.name}", flush=True)
    install = ["install", "--quiet", "--disable-pip-version-check", "-c", constraints, "-e", ".[train,test]"]
    subprocess.run([python, "-m", "pip", *install], cwd=ROOT, check=True)
    shown = subprocess.run([python, "-c", SHOW], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    print(f"{name}: {shown}", flush=True)
    # Older packages warn of newer ones; our own warnings are errors.
    pytest = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--disable-warnings"]
    status = subprocess.run([*pytest, *TESTS], cwd=ROOT).returncode
    return f"{name}: {shown}: {f'FAILED with status {status}' if status else 'passed'}"


def main() -> int:
    results = [run(name) for name in sys.argv[1:] or ("lowest", "newest")]
    print("\n".join(results))
    return any("FAILED" in line for line in results)


if __name__ == "__main__":
    sys.exit(main())
