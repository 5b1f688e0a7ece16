"""Compiles training steps and samplers for TPU slices on a machine without a TPU, to check memory and communication."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from titok_jax.compiler.programs import compile_program, sampler, training_step
from titok_jax.compiler.slices import SLICES, named_slice, topology_devices
from titok_jax.compiler.tables import TABLE, fits, row_name, table
from titok_jax.runtime.arguments import Parser, Real
from titok_jax.runtime.command import command
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import as_path
from titok_jax.training.recipes import read_config

_EPILOG = """examples:
  python -m titok_jax.compile --config configs/stage1.py:l32 --slice v5e-16
      the training step of a recipe as it is
  python -m titok_jax.compile --config configs/stage1.py:l32 --slice v5e-16 --config.mesh.fsdp=16 --config.remat=full
      with changes to its configuration, as for titok_jax.train
  python -m titok_jax.compile --sampler titok_l32 --slice v5e-16
      the sampler of a published generator, with its tokenizer's decoder
  python -m titok_jax.compile --all --results runs/tpu_check.json
      everything in the tables of docs/tpu.md (make tpu-check); what FILE already holds is not compiled again

The TPU compiler is the package libtpu (make tpu-check installs it into .venv-tpu); no TPU is used. Times are what the
compiler estimates.
"""


def _read_rows(path: Path | epath.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _write_row(path: Path | epath.Path, row: Mapping[str, Any]) -> None:
    rows = [old for old in _read_rows(path) if (old["name"], old["slice"]) != (row["name"], row["slice"])]
    with new_file(path, replace=True) as partial:  # the file that the rows were read from
        partial.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


def _compile_all(results: Path | epath.Path) -> int:
    """Compiles each program in its own process, which frees the compiler's memory. A crash loses only one row."""
    order = [(row_name(what, options), slice_name) for what, slice_name, options in TABLE]
    done = {(row["name"], row["slice"]) for row in _read_rows(results)}
    for number, (name, (what, slice_name, options)) in enumerate(zip(order, TABLE, strict=True), 1):
        if name in done:
            continue
        print(f"[{number}/{len(TABLE)}] {' on '.join(name)}", flush=True)
        option = "--config" if what.startswith("configs/") else "--sampler"
        arguments = [option, what, "--slice", slice_name, "--results", str(results), *options]
        subprocess.run([sys.executable, "-m", "titok_jax.compile", *arguments])
    rows = {(row["name"], row["slice"]): row for row in _read_rows(results)}
    found = [rows[name] for name in order if name in rows]
    print(table([row for row in found if row["effort"] > -0.5]))
    print("\n" + fits(sorted(found, key=lambda row: row["name"])))
    problems = [f"{' on '.join(name)}: {'; '.join(rows[name]['problems'])}" for name in order if name in rows]
    problems = [line for line in problems if not line.endswith(": ")]
    problems += [f"{' on '.join(name)}: not compiled" for name in order if name not in rows]
    print("\n".join(["", *problems, f"{len(order)} programs, {len(problems)} with problems"]))
    return bool(problems)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m titok_jax.compile",
        description="Compiles training steps and samplers for TPU slices on a machine without a TPU: memory, operations, "
        "collectives, estimated time.",
        epilog=_EPILOG,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", metavar="FILE.py:VARIANT", help="a recipe, as for titok_jax.train; --config.FIELD=VALUE changes it"
    )
    what.add_argument("--sampler", metavar="NAME", help="a published generator")
    what.add_argument("--all", action="store_true", help="everything in the tables of docs/tpu.md; takes hours")
    names = f"{', '.join(SLICES)}. Names of v4 and v5p count TensorCores, two per chip; others count chips. v5litepod is v5e"
    parser.add_argument("--slice", help=names)
    parser.add_argument(
        "--effort",
        type=Real(-1, 1),
        help="that the compiler makes for speed (default: config.compile_effort, as when the recipe is run; 0 for a "
        "sampler); -1 compiles everything in minutes, and estimates three to six times the time",
    )
    parser.add_argument("--results", type=as_path, help="JSON file that the row is put into, also gs://")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, changes = _parser().parse_known_args(argv)
    if changes and not args.config:
        raise ValueError(f"unknown argument {changes[0]}")
    if args.all:
        if not args.results:
            raise ValueError("--all needs --results FILE, which keeps what is done")
        return _compile_all(args.results)
    if not args.slice:
        raise ValueError("--slice is not set: which slice to compile for")
    on_slice = named_slice(args.slice)
    config = read_config(args.config, changes) if args.config else None
    devices = topology_devices(on_slice)
    import jax

    effort = args.effort
    if effort is None:
        effort = 0.0 if config is None else config.get("compile_effort", 0.0)
    jax.config.update("jax_exec_time_optimization_effort", effort)
    if config is None:
        program = sampler(args.sampler, devices)
    else:
        from titok_jax.training.settings import parse_settings

        settings = parse_settings(config, abstract=True)
        program = training_step(row_name(args.config, changes), settings, devices)
    row = compile_program(program, on_slice)
    if args.results:
        _write_row(args.results, row)
    print(table([row]))
    print("\n".join(f"problem: {problem}" for problem in row["problems"]) or "no problems")
    return bool(row["problems"])


if __name__ == "__main__":
    sys.exit(main())
