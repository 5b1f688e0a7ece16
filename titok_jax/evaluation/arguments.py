"""Checks what the command `evaluate` is asked for. Imports no JAX."""

import argparse

from titok_jax.runtime.messages import near_path
from titok_jax.runtime.outputs import check_output
from titok_jax.runtime.paths import as_path

_GUIDANCE = ("guidance_scale", "guidance_schedule", "guidance_scale_pow")
_SAMPLING = ("steps", *_GUIDANCE, "temperature", "softmax_temperature_annealing")


def _is_data(text: str | None) -> bool:
    """Whether an argument is DATA, not a file of arrays."""
    return bool(text) and not text.endswith(".npz")


def check_arguments(args: argparse.Namespace) -> str:
    """Returns the mode: "digits", "reconstruction", "generation", "samples", "sweep" or "reference".

    Raises:
      ValueError: for arguments that are invalid or do not go together, or figures that cannot be compared.
      FileNotFoundError: if the .npz file of --reference does not exist.
    """
    sampling = [f"--{name.replace('_', '-')}" for name in _SAMPLING if getattr(args, name) is not None]
    several = [len(values or []) > 1 for values in (args.guidance_scale, args.temperature)]
    if args.latents and not args.reconstruct:
        raise ValueError("--latents goes with --reconstruct: it chooses the latents of a VAE's reconstructions")
    if args.lpips and not args.reconstruct:
        raise ValueError("--lpips goes with --reconstruct: it is a distance of images and their reconstructions")
    if args.features == "none" and not args.reconstruct:
        raise ValueError("--features none goes with --reconstruct: distances to other images are distances of features")
    if args.skip_unreadable and not any(map(_is_data, (args.reconstruct, args.reference, args.samples))):
        raise ValueError("--skip-unreadable is for the images of DATA, in --reconstruct, --reference or --samples")
    if args.reconstruct:
        if args.reference or args.save_reference:
            raise ValueError(
                "--reconstruct takes no --reference: rFID is measured between images and their own reconstructions. "
                "Statistics of other images, such as ADM's of the training set, are for generated images (gFID); the two "
                "figures cannot be compared"
            )
        if args.samples or sampling:
            raise ValueError(f"--reconstruct goes without {' and '.join(sampling) or '--samples'}: nothing is sampled")
        return "reconstruction"
    if args.save_reference:
        if not args.reference or args.reference.endswith(".npz"):
            raise ValueError("--save-reference needs --reference DATA, the images to take the statistics of")
        if args.samples or sampling:
            raise ValueError(f"--save-reference goes without {' and '.join(sampling) or '--samples'}: nothing is sampled")
        return "reference"
    if args.reference and args.reference.endswith(".npz") and not as_path(args.reference).is_file():
        raise FileNotFoundError(
            f"--reference {args.reference}: no such file; docs/evaluation.md says where ADM's is to be had"
            f"{near_path(args.reference)}"
        )
    if args.samples:
        if not args.reference:
            raise ValueError("--samples needs --reference: ADM's file, a saved one, or a data set")
        if sampling or args.num:
            raise ValueError(f"--samples goes without {' and '.join(sampling) or '--num'}: nothing is sampled")
        return "samples"
    if any(several):
        if not args.json:
            raise ValueError("a grid of settings needs --json FILE: finished points are kept there")
        return "sweep"
    return "generation" if args.reference else "digits"


def check_outputs(args: argparse.Namespace, mode: str) -> None:
    """Raises an error if an output cannot or must not be written."""
    if args.json:
        # A sweep continues an existing JSON file if the settings are the same.
        check_output(args.json, args.overwrite or mode == "sweep")
    if mode == "sweep":
        picture = as_path(args.json).with_suffix(".png")
        if picture == as_path(args.json):
            raise ValueError(f"--json {args.json}: the picture of a sweep would have the same name; choose another ending")
        check_output(picture, args.overwrite or as_path(args.json).exists())
    if args.save_reference:
        check_output(args.save_reference, args.overwrite)
