"""The sampling options of the commands."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from titok_jax.runtime.arguments import BATCH, SEED, Real, Reals, Whole
from titok_jax.runtime.capacity import check_batch

if TYPE_CHECKING:
    from titok_jax.models.generator import GeneratorConfig, SamplingConfig

_OPTIONS = {"num_steps": "steps"}  # fields of SamplingConfig whose options have other names


def add_sampling_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds the options for sampling tokens. With `several`, guidance scale and temperature are lists of numbers."""
    number, more = (Reals(), "; several, separated by commas: a grid") if several else (Real(), "")
    group = parser.add_argument_group("sampling", "what is not given is taken from the model's configuration")
    group.add_argument("--seed", type=SEED, default=0, help="same seed, same images (default: 0)")
    group.add_argument("--steps", type=Whole(1, 10_000), help="decoding steps")
    group.add_argument(
        "--guidance-scale", type=number, help=f"of classifier-free guidance; more: less varied; 0: none{more}"
    )
    group.add_argument("--guidance-schedule", help="how it grows over the steps: constant, linear or power-cosine")
    group.add_argument("--guidance-scale-pow", type=Real(), help="exponent of power-cosine; more: later")
    group.add_argument("--temperature", type=number, help=f"of the noise in the first steps; more: more varied{more}")
    group.add_argument(
        "--softmax-temperature-annealing",
        action=argparse.BooleanOptionalAction,
        help="divide the logits by a temperature that falls from about 1.3 to 0.5",
    )
    group.add_argument("--batch-size", type=BATCH, default=64, help="images at a time (default: 64)")


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the arithmetic of a model, the same in every command."""
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="the model computes in it")
    parser.add_argument(
        "--precision",
        choices=["highest", "high", "default"],
        help="of matrix products: highest is float32 on every device; default is what TPUs and GPUs do faster, in bfloat16 "
        "or TF32 (default: highest for float32, default for bfloat16)",
    )


def precision_settings(args: argparse.Namespace) -> dict[str, str]:
    """{"dtype", "precision"} of a parser with `add_precision_arguments`: arguments of the loaders, and what is recorded."""
    from titok_jax.inference.functions import default_precision

    return {"dtype": args.dtype, "precision": args.precision or default_precision(args.dtype)}


def sampling_settings(args: argparse.Namespace, model: "GeneratorConfig") -> "SamplingConfig":
    """Checks the options and returns all sampling settings.

    Args:
      args: from a parser with `add_sampling_arguments`.
      model: has the settings for options that are not given.

    Raises:
      ValueError: for an unknown schedule, or more steps than tokens.
    """
    if args.steps is not None and args.steps > model.num_tokens:
        raise ValueError(
            f"--steps is {args.steps}, expected at most {model.num_tokens}: the model makes {model.num_tokens} tokens, at "
            "least one in each step"
        )
    settings = model.sampling
    for field in dataclasses.fields(settings):
        option = _OPTIONS.get(field.name, field.name)
        value = getattr(args, option)
        if value is None:
            continue
        try:
            settings = dataclasses.replace(settings, **{field.name: value})
        except ValueError as error:
            raise ValueError(f"--{option.replace('_', '-')}{str(error).removeprefix(field.name)}") from None
    return settings


def batch_size_of(args: argparse.Namespace, num: int, image_size: int) -> int:
    """How many images to compute at a time: --batch-size, or all `num` if there are fewer.

    Raises:
      ValueError: this machine cannot hold so many images of `image_size` pixels per side.
    """
    size = min(args.batch_size, num)
    check_batch(size, image_size, f"--batch-size {args.batch_size}")
    return size


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
        raise ValueError(f"--labels is {text[:80]!r}, expected numbers like 3,1,4, or all") from None
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--labels: {wrong[0]} is out of range; this model has the labels 0 to {num_classes - 1}")
    return labels
