"""The sampling options of the commands."""

import argparse
from typing import Any

import numpy as np


def add_sampling_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds the options for sampling tokens. With `several`, guidance scale and temperature are lists of numbers."""
    number, more = (_numbers, "; several, separated by commas: a grid") if several else (float, "")
    group = parser.add_argument_group("sampling", "what is not given is taken from the model's configuration")
    group.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    group.add_argument("--steps", type=int, help="decoding steps")
    group.add_argument(
        "--guidance-scale", type=number, help=f"of classifier-free guidance; more: less varied; 0: none{more}"
    )
    group.add_argument("--guidance-schedule", help="how it grows over the steps: constant, linear or power-cosine")
    group.add_argument("--temperature", type=number, help=f"of the noise in the first steps; more: more varied{more}")
    group.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")


def _numbers(text: str) -> list[float]:
    """ "0,1.5" -> [0.0, 1.5]."""
    return [float(part) for part in text.split(",")]


def sampling_settings(args: argparse.Namespace, defaults) -> dict[str, Any]:
    """Checks the options and returns all keyword arguments of `titok_jax.generate`.

    Args:
      args: from a parser with `add_sampling_arguments`.
      defaults: the model's SamplingConfig, for options that are not given.

    Raises:
      ValueError: for a value out of range.
    """
    from titok_jax.models.generator import GUIDANCE_SCHEDULES

    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}, expected at least 1")
    if args.temperature is not None and not 0 <= args.temperature < np.inf:
        raise ValueError(f"--temperature is {args.temperature}, expected at least 0")
    if args.guidance_scale is not None and not np.isfinite(args.guidance_scale):
        raise ValueError(f"--guidance-scale is {args.guidance_scale}, expected a finite number")
    if args.guidance_schedule not in (None, *GUIDANCE_SCHEDULES):
        raise ValueError(
            f"--guidance-schedule is {args.guidance_schedule!r}, expected one of {', '.join(GUIDANCE_SCHEDULES)}"
        )
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed is {args.seed}, expected 0 to {2**32 - 1}")

    def either(value, default):
        return default if value is None else value

    return {
        "num_steps": either(args.steps, defaults.num_steps),
        "guidance_scale": either(args.guidance_scale, defaults.guidance_scale),
        "guidance_schedule": either(args.guidance_schedule, defaults.guidance_schedule),
        "temperature": either(args.temperature, defaults.temperature),
        "softmax_temperature_annealing": defaults.softmax_temperature_annealing,
    }


def parse_labels(text: str, num_classes: int) -> list[int]:
    """ "3,1,4" -> [3, 1, 4], "all" -> every class.

    Raises:
      ValueError: for anything but numbers, or for a label out of range.
    """
    if text.strip() == "all":
        return list(range(num_classes))
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels is {text!r}, expected numbers like 3,1,4, or all") from None
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--labels: {wrong[0]} is out of range; this model has the labels 0 to {num_classes - 1}")
    return labels
