"""Measures the speed on this machine, alone or compared with the published PyTorch code: `python benchmarks/speed.py`.

It times encoding, decoding, sampling (published settings, labels to pixels) and training steps at full size, with inputs
on the device. With --reference, it runs the same with the published code. Each side runs alone on the device, in a process
of its own. The two take turns. The table shows medians over the rounds of all turns, and the most memory that was in use
(on a CPU, by the process). On a GPU, inference in float32 multiplies in TF32 on both sides, as the published scripts do;
bfloat16 means autocast in the published code. Weights are new, which does not change the speed. Steps with a discriminator
include the updates of the model and of the discriminator.

With --json, what is done is in that file after every turn, and the same command goes on from there.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, Case, request
from results import Results, table
from tqdm import tqdm

from titok_jax.evaluation.comparison import check_clone, check_imports, reference_environment
from titok_jax.runtime.arguments import BATCH, Parser, Real, Whole
from titok_jax.runtime.command import command
from titok_jax.runtime.outputs import check_output

_EPILOG = """examples:
  python benchmarks/speed.py
      everything, on what JAX finds
  python benchmarks/speed.py --only sample --dtype bfloat16
      the three samplers
  python benchmarks/speed.py --reference 1d-tokenizer --reference-python reference/bin/python --json speed.json
      beside the published code: a clone of bytedance/1d-tokenizer, and an interpreter with its requirements
  python benchmarks/speed.py --reference 1d-tokenizer --torch-compile
      the published code under torch.compile too
  benchmarks/gpu.sh 1d-tokenizer reference/bin/python
      the cases that have a target, and inference, on an H100 or H200, nine minutes at a time
"""
HERE = Path(__file__).parent
FOREVER = 10_000  # minutes, a week


def answer(arguments: Sequence[str], asked: dict[str, Any], environment: Mapping[str, str], seconds: float) -> dict:
    """Starts the process of a side, asks it, and waits until it has ended.

    Returns:
      its answer, see serving.py.

    Raises:
      TimeoutError: it took longer than `seconds`.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            stdout, _ = process.communicate(json.dumps(asked), timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:  # with the processes that a compiler started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        try:
            return json.loads(stdout.splitlines()[-1])
        except (ValueError, IndexError):
            log.seek(0)
            last = (log.read().strip().splitlines() or ["nothing"])[-1]
            return {"error": f"it ended with status {process.returncode}; it said: {last[:300]}"}


class Benchmark:
    """What one start of the command does: the turns that are not done yet, until the time is up."""

    def __init__(self, args, cases: Sequence[Case], folder: str):
        self.args, self.started = args, time.monotonic()
        self.results = Results(args.json, args.overwrite)
        self.environment = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/jax"} | os.environ
        on_cpu = platform() == "cpu"
        dtypes = args.dtype or (["float32"] if on_cpu else ["float32", "bfloat16"])
        batches = [args.batch or case.batches[0 if on_cpu else 1] for case in cases]
        self.work = [(case, dtype, batch) for case, batch in zip(cases, batches, strict=True) for dtype in dtypes]

    def left(self) -> float:
        """The seconds until the time is up."""
        return 60 * self.args.minutes - (time.monotonic() - self.started)

    def schedule(self) -> list[tuple[Case, str, int, str, int]]:
        """All turns in their order: case by case, the sides in turn; then torch.compile, which takes long."""
        turns = [
            (*what, side, turn)
            for what in self.work
            for turn in range(self.args.turns)
            for side in ("published", "titok_jax")
            if side == "titok_jax" or (self.args.reference and what[0].comparable)
        ]
        if self.args.torch_compile:
            turns += [(*what, "compiled", 0) for what in self.work if what[0].comparable]
        return turns

    def run(self) -> bool:
        """-> whether all is done."""
        begun = False
        for case, dtype, batch, side, turn in (progress := tqdm(self.schedule(), unit="turn")):
            row = self.results.row(case, dtype, batch)
            if self.results.turns(row, side) > turn:
                continue
            progress.set_description(f"{case.name}, {dtype}, {side}")
            limits = [self.left()] + [60 * self.args.compile_minutes] * (side == "compiled")
            # A compiler may take all of its time, so it is begun where there is as much, or if nothing else was done before.
            if limits[0] <= 0 or (begun and limits[0] < limits[-1]):
                return False
            begun = True
            try:
                found = self.ask(case, side, dtype, batch, min(limits))
            except TimeoutError:
                if side != "compiled":
                    return False
                found = {"error": f"did not end in {min(limits):.0f} s"}
            self.results.add(row, side, found)
            progress.write(table([row]).splitlines()[-1])
        return True

    def ask(self, case: Case, side: str, dtype: str, batch: int, seconds: float) -> dict[str, Any]:
        asked = request(case, side, dtype, batch, self.args.rounds)
        if side == "titok_jax":
            return answer([sys.executable, str(HERE / "ours.py")], asked, self.environment, seconds)
        python, clone = self.args.reference_python or sys.executable, str(self.args.reference.resolve())
        return answer([python, str(HERE / "published.py"), clone], asked, reference_environment(), seconds)


def platform() -> str:
    """What JAX finds: "cpu", "gpu" or "tpu". Another process looks, because one that has looked keeps memory of a GPU."""
    code = "import jax; print(jax.devices()[0].platform)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"JAX finds no device: {(found.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return found.stdout.split()[-1]


def _parser() -> Parser:
    parser = Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="cases whose name has one of these texts in it, in their order"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else both")
    parser.add_argument("--batch", type=BATCH, help="images at a time (default: a case's own)")
    parser.add_argument("--rounds", type=Whole(1, 1000), default=5, help="measurements in each turn (default: 5)")
    parser.add_argument("--turns", type=Whole(1, 100), default=2, help="processes of each side, in turn (default: 2)")
    parser.add_argument("--reference", type=Path, metavar="CLONE", help="clone of the published PyTorch repository")
    parser.add_argument("--reference-python", metavar="PYTHON", help="interpreter with its requirements (default: this one)")
    parser.add_argument("--torch-compile", action="store_true", help="the published code compiled too; takes minutes")
    parser.add_argument(
        "--compile-minutes", type=Real(0.01, 600), default=10, help="longest time of a case under it (default: 10)"
    )
    parser.add_argument(
        "--minutes", type=Real(0.01, FOREVER), default=FOREVER, help="stop after so many; the same command goes on"
    )
    parser.add_argument("--json", metavar="FILE", help="keep all figures here; what is there, or failed, is not tried again")
    parser.add_argument("--overwrite", action="store_true", help="begin anew if FILE exists")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    cases = {case.name: case for text in args.only or [""] for case in CASES if text in case.name}
    if not cases:
        raise ValueError(f"--only {' '.join(args.only)}: no case has that in its name; --list prints them")
    if args.list:
        print("\n".join(cases))
        return 0
    if args.reference is None and (args.reference_python or args.torch_compile):
        raise ValueError("--reference-python and --torch-compile need --reference CLONE")
    if args.minutes < FOREVER and not args.json:
        raise ValueError("--minutes needs --json FILE, where the next start finds what is done")
    if args.json:
        check_output(args.json, True)
    if args.reference is not None:
        check_clone(args.reference)
    with tempfile.TemporaryDirectory(prefix="titok_speed_") as folder:
        benchmark = Benchmark(args, list(cases.values()), folder)
        if args.reference is not None:
            check_imports(args.reference, args.reference_python or sys.executable)
        done = benchmark.run()
    results = benchmark.results
    for side, about in results.about.items():
        print(f"{side}: {about}")
    for row in results.rows:
        for side in ("titok_jax", "published", "compiled"):
            if "error" in row.get(side, {}):
                print(f"{row['case']}, {row['dtype']}, {side}: {row[side]['error']}")
    print(table(results.rows))
    if not done:
        print(f"The {args.minutes:g} minutes are over; the same command goes on. What is done is in {args.json}.")
    return int(not done)


if __name__ == "__main__":
    sys.exit(main())
