"""Compares real weights with the published results: `python -m titok_jax.parity --model titok_l32 IMAGE...`.

It can compare with three things, and needs at least one of them: the published tokens of two ImageNet validation images
(TiTok-L-32), given reconstructions, and the published PyTorch code, which runs from a clone in a separate interpreter.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from titok_jax.data.image_files import ImageFiles, find_images, read_image
from titok_jax.data.transforms import decode_image
from titok_jax.evaluation.comparison import (
    check_clone,
    check_imports,
    check_published_tokens,
    check_reconstruction,
    check_reference,
    published_tokens,
    run,
    run_reference,
    table,
)
from titok_jax.inference.arguments import add_precision_arguments, precision_settings
from titok_jax.runtime.arguments import Parser
from titok_jax.runtime.command import command
from titok_jax.weights import published_models

_EPILOG = """examples:
  python -m titok_jax.parity --model titok_l32 ILSVRC2012_val_00010240.png ILSVRC2012_val_00008636.png
      the 32 tokens of both images against the published ones
  python -m titok_jax.parity --model titok_l32 ILSVRC2012_val_00010240.png --reconstruction published.png
      the decoded image too
  python -m titok_jax.parity --model titok_bl128_vae photos/ --reference 1d-tokenizer --reference-python venv/bin/python
      any tokenizer on any images, against the published code with the same weights

exit status: 0 all within bounds, 1 something is not, 2 nothing was compared (wrong arguments, unreadable files)
"""


def _parser() -> Parser:
    parser = Parser(
        prog="python -m titok_jax.parity",
        description="Encodes and decodes images with a tokenizer and compares the results with published ones: known tokens "
        "(TiTok-L-32 on two ImageNet validation images, recognised by file name), given reconstructions, and the "
        "published PyTorch code.",
        epilog=_EPILOG,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    parser.add_argument(
        "--model",
        required=True,
        help="tokenizer or MaskGIT-VQGAN: a name (`python -m titok_jax.zoo`), hf://owner/name, folder or file",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (HF_TOKEN: a token for it)")
    parser.add_argument(
        "--reconstruction",
        action="append",
        default=[],
        metavar="FILE",
        help="picture that the published code decoded; once per image, in their order",
    )
    parser.add_argument("--reference", type=Path, metavar="CLONE", help="clone of the published PyTorch repository")
    parser.add_argument(
        "--reference-python",
        metavar="PYTHON",
        help="interpreter that has torch and what else the clone requires (default: this one)",
    )
    add_precision_arguments(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.reference is not None:
        check_clone(args.reference)
    if args.reference is None and args.reference_python is not None:
        raise ValueError("--reference-python is given without --reference")
    published_models.find(
        args.model, None if args.model in published_models.names("vqgan") else "tokenizer"
    )  # before JAX is imported
    files = find_images(args.images)
    if args.reconstruction and len(args.reconstruction) != len(files):
        raise ValueError(f"{len(args.reconstruction)} reconstructions for {len(files)} images; give one for each, in order")

    import jax

    from titok_jax import inference
    from titok_jax.models import MaskgitVQGANConfig

    config = inference.load_image_config(args.model, revision=args.revision)
    is_vqgan = isinstance(config, MaskgitVQGANConfig)
    if config.predicts_codes:
        raise ValueError(f"{args.model} is a stage 1 model, which predicts codes, not images; name one of stage 2")
    if is_vqgan and args.reference is not None:
        raise ValueError("--reference: of the published code only TiTok is run; give --reconstruction for a MaskGIT-VQGAN")
    python = args.reference_python or sys.executable
    if args.reference is not None:
        check_imports(args.reference, python)
    size = config.image_size
    images = ImageFiles([path for _, path in files], size)[:]
    given = _read_reconstructions(args.reconstruction, size)
    known = [None if is_vqgan else _known_tokens(config, path) for _, path in files]
    if all(tokens is None for tokens in known) and not given and args.reference is None:
        raise ValueError("nothing to compare with: no published tokens are known; give --reconstruction or --reference")

    precision = precision_settings(args)
    tokenizer = inference.load_image_model(args.model, revision=args.revision, **precision)
    device = jax.devices()[0]
    print(f"{args.model} on {device.platform} ({device.device_kind}), {args.dtype}, precision {precision['precision']}")
    results = run(tokenizer, images, known)
    checks, theirs = [], None
    if args.reference is not None:
        theirs = run_reference(args.reference, python, tokenizer, images, results)
    for index, (path, result) in enumerate(zip((path for _, path in files), results, strict=True)):
        name = path.name
        if known[index] is not None:
            checks.append(check_published_tokens(name, result.tokens, known[index]))
        if given:
            checks.append(check_reconstruction(name, result.image, given[index]))
        if theirs is not None:
            checks += check_reference(name, result, theirs[index])
    failed = sum(not check.passed for check in checks)
    print(table(checks))
    print(f"FAIL: {failed} of {len(checks)} out of bounds" if failed else f"pass: all {len(checks)} within bounds")
    return 1 if failed else 0


def _known_tokens(config, path: Path) -> Sequence[int] | None:
    """Returns an image file's published tokens, or None if none are known or they are for another image size."""
    tokens, size = published_tokens(config).get(path.stem), config.image_size
    if tokens is None:
        return None
    height, width, _ = decode_image(read_image(path), str(path)).shape
    if (width, height) != (size, size):
        print(f"{path}: {width} x {height} pixels, but its published tokens are of {size} x {size}")
        return None
    return tokens


def _read_reconstructions(files: Sequence[str], size: int) -> list[np.ndarray]:
    """Reads pictures as uint8 [size, size, 3].

    Raises:
      ValueError: for a picture of another size. It is not resized, because that would change its pixel values.
    """
    pictures = []
    for file in files:
        picture = decode_image(read_image(file), file)
        if picture.shape != (size, size, 3):
            raise ValueError(f"{file}: {picture.shape[1]} x {picture.shape[0]} pixels, expected {size} x {size}")
        pictures.append(picture)
    return pictures


if __name__ == "__main__":
    sys.exit(main())
