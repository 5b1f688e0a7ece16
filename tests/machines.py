"""The numeric tests as other machines would run them: `make test-machines`, `make test-gpu`, or `python tests/machines.py
[NAME...]`.

XLA's code and numpy's matrix products depend on the CPU, on its number and on how far they are optimised, and each of them
rounds in its own way. Each machine here runs the same tests; the last lines say what each gave, and which comparisons came
nearest to their bounds (margins.py). The machine "gpu" runs them on the GPU that JAX finds, and only when it is named.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import NamedTuple

from tqdm import tqdm


class Machine(NamedTuple):
    """Attributes:
    environment: what is set for the tests. Where XLA_FLAGS is set, conftest.py adds no flags, so that the programs are
      optimised as in use.
    front: a command in front of theirs.
    processes: how many run tests at a time.
    spread: whether each takes the next test, not the next file.
    long: whether long tests run, too.
    seconds: after so many the tests are interrupted, and the machine has failed; None for no limit.
    """

    environment: dict[str, str]
    front: tuple[str, ...] = ()
    processes: int = 2
    spread: bool = False
    long: bool = True
    seconds: float | None = None


TESTS = pathlib.Path(__file__).parent
MACHINES = {
    "this": Machine({"XLA_FLAGS": ""}),
    "one-thread": Machine({"XLA_FLAGS": ""}, ("taskset", "-c", "0"), processes=1),
    "avx2": Machine({"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}),
    "sse4.2": Machine({"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"}),
    "blas": Machine({"OPENBLAS_CORETYPE": "Nehalem"}),  # a core that every x86-64 CPU of today can play
}
# Float32 products, as the bounds suppose; by default a GPU rounds their factors to 10 bits. The processes share its memory.
GPU = Machine(
    {
        "JAX_PLATFORMS": "",  # what JAX finds
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "XLA_FLAGS": "",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
    processes=max(1, min(4, os.cpu_count() or 1)),
    spread=True,
    long=False,
    seconds=460.0,
)
NUMERIC = (
    *("tasks", "perceptual", "discriminator", "titok", "maskgit_vqgan", "maskgit_vqgan_task", "inception", "generator"),
    *("decoding", "layers", "losses", "optimizer", "quantizer", "masking", "metrics", "features", "evaluate", "inference"),
)
# On a GPU: models, losses, sampling and training steps. Left out is what computes in numpy or on the host (masking, metrics)
# and what tests files and commands around the models (features, evaluate, inference).
ON_GPU = tuple(name for name in NUMERIC if name not in ("masking", "metrics", "features", "evaluate", "inference"))
# In float64 no machine's rounding reaches the bounds; it takes minutes, and `make test` has it.
DETERMINED = "tests/test_tasks.py::test_training_on_pixels_in_float64_equals_the_published_run_to_its_end"


def on_gpu() -> bool:
    code = "import sys, jax; sys.exit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": ""}, check=False).returncode == 0


def finish(process: subprocess.Popen, seconds: float | None) -> tuple[str, str, bool]:
    """-> (stdout, stderr, whether they ended in time) of tests. Upon an interrupt pytest says what it has found."""
    try:
        return *process.communicate(timeout=seconds), True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return *process.communicate(timeout=15), False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return *process.communicate(), False


def run(machine: Machine, names: tuple[str, ...]) -> tuple[bool, str]:
    """-> (whether all tests of these files passed, pytest's last line and the nearest comparisons)."""
    marks = "not parity and not soak" + ("" if machine.long else " and not long")
    command = [
        *machine.front,
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "margins",
        "-m",
        marks,
        "-rfE",
        "--deselect",
        DETERMINED,
    ]
    if machine.processes > 1:
        command += [
            "-n",
            str(machine.processes),
            "--dist",
            "load" if machine.spread else "loadfile",
            "--no-loadscope-reorder",
        ]
    files = [str(TESTS / f"test_{name}.py") for name in names]
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **machine.environment, "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *files], cwd=TESTS.parent, env=env, start_new_session=True, **pipes)
    stdout, stderr, in_time = finish(process, machine.seconds)
    lines = stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED") or line.startswith("ERROR")]
    near = [line for line in lines if re.match(r" *\d+\.\d+ of the bound", line)][:10]
    last = lines[-1] if lines else stderr[-500:]
    if not in_time:
        last = f"interrupted after {machine.seconds:.0f} s: {last}"
    return in_time and process.returncode == 0, "\n".join([last, *failed, *(line[:160] for line in near)])


def main(names: list[str]) -> int:
    unknown = set(names) - {*MACHINES, "gpu"}
    if unknown:
        print(f"error: unknown machines {sorted(unknown)}, expected some of {[*MACHINES, 'gpu']}", file=sys.stderr)
        return 2
    if "gpu" in names and not on_gpu():
        print("error: JAX finds no GPU here; README.md says what to install for one", file=sys.stderr)
        return 2
    passed = []
    for name in tqdm(names or list(MACHINES), unit="machine"):
        good, text = run(GPU, ON_GPU) if name == "gpu" else run(MACHINES[name], NUMERIC)
        passed.append(good)
        tqdm.write(f"\n{name}: {'passed' if good else 'FAILED'}: {text}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
