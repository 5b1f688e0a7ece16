"""The numeric tests as other machines would run them: `make test-machines`, or `python tests/machines.py [NAME...]`.

XLA's code and numpy's matrix products depend on the CPU, on its number and on how far they are optimised, and each of them
rounds in its own way. Each machine here runs the same tests; the last lines say what each gave, and which comparisons came
nearest to their bounds (margins.py).
"""

import os
import pathlib
import re
import subprocess
import sys

from tqdm import tqdm

TESTS = pathlib.Path(__file__).parent
# {name: (environment, command in front, processes)}. Where XLA_FLAGS is set, conftest.py adds no flags: all but the last
# machine run programs that are optimised as in use.
MACHINES: dict[str, tuple[dict[str, str], list[str], int]] = {
    "this": ({"XLA_FLAGS": ""}, [], 2),
    "one-thread": ({"XLA_FLAGS": ""}, ["taskset", "-c", "0"], 1),
    "avx2": ({"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}, [], 2),
    "sse4.2": ({"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"}, [], 2),
    "blas": ({"OPENBLAS_CORETYPE": "Nehalem"}, [], 2),  # a core that every x86-64 CPU of today can play
}
NUMERIC = (
    *("tasks", "perceptual", "discriminator", "titok", "maskgit_vqgan", "maskgit_vqgan_task", "inception", "generator"),
    *("decoding", "layers", "losses", "optimizer", "quantizer", "masking", "metrics", "features", "evaluate", "inference"),
)
# In float64 no machine's rounding reaches the bounds; it takes minutes, and `make test` has it.
DETERMINED = "tests/test_tasks.py::test_training_on_pixels_in_float64_equals_the_published_run_to_its_end"


def run(name: str) -> tuple[bool, str]:
    """-> (whether all passed, pytest's last line and the nearest comparisons)."""
    environment, front, processes = MACHINES[name]
    command = [*front, sys.executable, "-m", "pytest", "-p", "margins", "-m", "not parity and not soak", "-rfE"]
    command += ["--deselect", DETERMINED]
    if processes > 1:
        command += ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    files = [str(TESTS / f"test_{file}.py") for file in NUMERIC]
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **environment, "PYTHONPATH": path}
    done = subprocess.run([*command, *files], cwd=TESTS.parent, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED") or line.startswith("ERROR")]
    near = [line for line in lines if re.match(r" *\d+\.\d+ of the bound", line)][:10]
    last = lines[-1] if lines else done.stderr[-500:]
    return done.returncode == 0, "\n".join([last, *failed, *(line[:160] for line in near)])


def main(names: list[str]) -> int:
    unknown = set(names) - set(MACHINES)
    if unknown:
        print(f"error: unknown machines {sorted(unknown)}, expected some of {list(MACHINES)}", file=sys.stderr)
        return 2
    passed = []
    for name in tqdm(names or list(MACHINES), unit="machine"):
        good, text = run(name)
        passed.append(good)
        tqdm.write(f"\n{name}: {'passed' if good else 'FAILED'}: {text}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
