"""Encodes and decodes images with a tokenizer: `python -m titok_jax.reconstruct --model MODEL IMAGE... --out DIR`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from titok_jax.data.digits import load_digits
from titok_jax.data.image_files import ImageFiles, find_images
from titok_jax.evaluation import metrics
from titok_jax.inference.arguments import add_precision_arguments, batch_size_of, precision_settings
from titok_jax.inference.many import reconstruct
from titok_jax.pictures import grids
from titok_jax.runtime.arguments import BATCH, IMAGES, SEED, Parser
from titok_jax.runtime.command import command
from titok_jax.runtime.locks import lock_run
from titok_jax.runtime.outputs import check_output, new_folder
from titok_jax.weights import published_models

_EPILOG = """examples:
  python -m titok_jax.reconstruct
      eight held-out digits through the embedded model, into reconstructions/
  python -m titok_jax.reconstruct --model runs/tokenizer/pretrained cat.jpg dog.png --out pets
      two files through a tokenizer that was trained here
  python -m titok_jax.reconstruct --model maskgit_vqgan cat.jpg
      through the MaskGIT-VQGAN, 256 tokens an image
  python -m titok_jax.reconstruct --model runs/tokenizer/pretrained photos/ --out photos_reconstructed
      every image in a folder and below
"""
_FILES = r"[^/]*_reconstruction\.png|grid\.png|tokens\.json|settings\.json"  # files in the output folder
_SHOWN = 64  # images in grid.png


def _picture_names(names: Sequence[str]) -> list[str]:
    """Makes the file names of the pictures from the stems of the image names. Duplicates are numbered."""
    result: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem, number = Path(name).stem, 1
        # Ignore case, as some file systems do.
        while (unique := stem if number == 1 else f"{stem}_{number}").lower() in taken:
            number += 1
        taken.add(unique.lower())
        result.append(f"{unique}_reconstruction.png")
    return result


def _parser() -> Parser:
    parser = Parser(
        prog="python -m titok_jax.reconstruct",
        description="Encodes images into tokens and decodes these. Writes one picture per image, original beside "
        "reconstruction, all of them in grid.png, the tokens in tokens.json, the model in settings.json; prints the PSNR.",
        epilog=_EPILOG,
    )
    known = ", ".join(published_models.names("tokenizer") + published_models.names("vqgan"))
    parser.add_argument("images", nargs="*", metavar="IMAGE|FOLDER", help="image files, or folders of them, also gs://")
    parser.add_argument("--model", default="digits", help=f"name ({known}) or folder of a tokenizer (default: digits)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--out", default="reconstructions", help="folder to write, also gs:// (default: reconstructions)")
    parser.add_argument("--num", type=IMAGES, default=8, help="without images: how many held-out digits (default: 8)")
    parser.add_argument("--batch-size", type=BATCH, default=64, help="images at a time (default: 64)")
    parser.add_argument("--latents", choices=("sample", "mean"), help="of a VAE: draws of --seed, or the mean (default)")
    parser.add_argument("--seed", type=SEED, default=0, help="of --latents sample (default: 0)")
    add_precision_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return parser


def _inputs(args: argparse.Namespace, files: dict[str, Any], size: int) -> tuple[list[str], "np.ndarray | ImageFiles"]:
    """Returns (names, images) of the files, or of the first held-out digits if there are no files.

    Raises:
      ValueError: for unreadable files, or if more digits are requested than there are.
    """
    if files:
        return list(files), ImageFiles(list(files.values()), size)
    digits, labels = load_digits("test", size)
    if args.num > len(digits):
        raise ValueError(f"--num is {args.num}, but there are {len(digits)} held-out digits")
    names = [f"digit_{index:03d}_{label}" for index, label in enumerate(labels[: args.num])]
    return names, np.repeat(digits[: args.num, ..., None], 3, axis=-1)


def _write(folder: Path, names: Sequence[str], images, batches: Iterable[tuple[slice, np.ndarray, np.ndarray]]) -> float:
    """Writes the pictures and tokens of all batches into a folder and prints each PSNR. Returns the mean PSNR in dB."""
    width, all_psnr, tokens, shown = max(map(len, names)), [], {}, []
    file_names = _picture_names(names)
    with tqdm(total=len(images), unit="image") as bar:
        for where, codes, decoded in batches:
            originals = images[where]
            values = metrics.psnr(originals / 255.0, decoded)
            rows = zip(range(where.start, where.stop), codes, originals, decoded, values, strict=True)
            for index, code, original, image, value in rows:
                caption = f"{Path(names[index]).name}   {value:.2f} dB"
                grids.side_by_side(original, image, caption).save(folder / file_names[index])
                tqdm.write(f"{names[index]:{width}}  PSNR {value:6.2f} dB")
                tokens[names[index]] = code.tolist()
            shown += list(decoded[: _SHOWN - len(shown)])
            all_psnr += values.tolist()
            bar.update(len(codes))
    captions = [f"{value:.1f} dB" for value in all_psnr[: len(shown)]]
    columns = 8 if shown[0].shape[0] <= 64 else 4
    grids.comparison(images[: len(shown)], np.stack(shown), columns, captions).save(folder / "grid.png")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(code)}" for name, code in tokens.items())
    (folder / "tokens.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return float(np.mean(all_psnr))


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if not args.images and args.model != "digits":
        raise ValueError("no images given; name image files or a folder of them")
    out = check_output(args.out, args.overwrite, folder_of=_FILES)
    # Find errors in the names before importing JAX, which is slow.
    published_models.find(args.model, None if args.model in published_models.names("vqgan") else "tokenizer")
    files = dict(find_images(args.images))

    from titok_jax import inference

    config = inference.load_image_config(args.model, revision=args.revision)
    if config.predicts_codes:
        raise ValueError(f"{args.model} is a stage 1 model, which predicts codes, not images; name one of stage 2")
    if config.has_tokens and args.latents:
        raise ValueError(f"--latents is for VAEs; the tokens of {args.model} are not drawn")
    size = config.image_size
    names, images = _inputs(args, files, size)
    batch_size = batch_size_of(args, len(images), size)
    precision = precision_settings(args)
    if config.has_tokens:
        what = f"{config.num_latent_tokens} tokens of {config.codebook_size} codes"
    else:
        what = f"{config.num_latent_tokens} latents of {config.token_size} channels"
    print(f"{args.model}: {size}x{size} pixels to {what}\ncompiling; the first batch takes longer")
    key = args.seed if args.latents == "sample" else None
    about = {"model": args.model, "revision": args.revision, **precision, "num_images": len(images)}
    if not config.has_tokens:
        about |= {"latents": args.latents or "mean", "seed": key}
    with lock_run(out, beside=True):
        tokenizer = inference.load_image_model(args.model, revision=args.revision, mesh="local", **precision)
        batches = reconstruct(tokenizer, images, batch_size=batch_size, key=key)
        with new_folder(out, files=_FILES, replace=args.overwrite, last="tokens.json") as folder:
            mean = _write(folder, names, images, batches)
            (folder / "settings.json").write_text(json.dumps({**about, "psnr": mean}, indent=2) + "\n", encoding="utf-8")
    print(
        f"mean PSNR {mean:.2f} dB over {len(images)} images\nwrote {out}: the pictures, grid.png, tokens.json, settings.json"
    )


if __name__ == "__main__":
    sys.exit(main())
