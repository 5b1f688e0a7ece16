"""Training, all kinds: `python -m titok_jax.train --config configs/FILE.py:VARIANT --workdir DIR`.

Examples:
  python -m titok_jax.train --config configs/digits.py:tokenizer --workdir runs/tokenizer
  python -m titok_jax.train --config configs/digits.py:generator --workdir runs/generator \
      --config.tokenizer=runs/tokenizer/pretrained
  python -m titok_jax.train --config configs/digits.py:tokenizer --workdir runs/small --config.optimizer.learning_rate=1e-3
  # longer than it was begun for
  python -m titok_jax.train --config configs/digits.py:tokenizer --workdir runs/tokenizer --config.num_steps=6000 \
      --accept-changes

A run ends with DIR/pretrained, a model folder. If it is stopped at any point, the same command resumes it from
DIR/checkpoints. It then ends with the same parameters, bit for bit, as a run that was not stopped. DIR also contains
metrics.jsonl, curves.png, tensorboard/ and previews/. docs/training.md is the guide; docs/recipes.md lists the recipes.
"""

import argparse
import sys
from collections.abc import Sequence

from titok_jax.data import workers
from titok_jax.runtime.arguments import Parser
from titok_jax.runtime.command import command
from titok_jax.training.recipes import read_config, recipe_names

if __name__ == "__mp_main__":  # this is a process that prepares batches
    workers.import_grain_without_jax()


def _parser() -> Parser:
    summary, _, rest = __doc__.partition("\n\n")
    parser = Parser(
        prog="python -m titok_jax.train",
        description=summary.partition(":")[0],
        epilog=rest,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py:VARIANT",
        help=f"a recipe, or NAME:VARIANT of one that comes with the package ({', '.join(recipe_names())}); "
        "--config.FIELD=VALUE changes a value of it",
    )
    parser.add_argument("--workdir", required=True, help="folder of the run, also gs://; made, or continued")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on from a checkpoint although the configuration, the data or the frozen weights have changed since; what "
        "changed is printed, and kept in the checkpoints. The result is then not that of one run",
    )
    parser.add_argument(
        "--profile",
        type=_span,
        metavar="START:STOP",
        help="trace the steps after step START up to step STOP (about ten, not the first ones), for xprof: DIR/tensorboard",
    )
    return parser


def _span(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and len(text) < 25 and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"is {text[:80]}, expected START:STOP, numbers of steps, such as 100:110")
    return int(start), int(stop)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args, changes = _parser().parse_known_args(argv)
    config = read_config(args.config, changes)

    from titok_jax.runtime import processes
    from titok_jax.training.checkpoint import quiet_checkpointing
    from titok_jax.training.loop import train
    from titok_jax.training.settings import parse_settings

    quiet_checkpointing()
    processes.initialize_distributed()
    train(parse_settings(config), args.workdir, accept_changes=args.accept_changes, profile=args.profile)


if __name__ == "__main__":
    sys.exit(main())
