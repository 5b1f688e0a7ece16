"""Images through a tokenizer and back: `python -m titok_jax.reconstruct --model MODEL IMAGE... --out DIR`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from tqdm import tqdm

from titok_jax import metrics, pictures, zoo
from titok_jax.cli import check_output, command, new_folder
from titok_jax.data.digits import load_digits
from titok_jax.data.transforms import IMAGE_SUFFIXES, center_crop_torchvision, decode_image, image_files
from titok_jax.storage import as_path

# JAX is imported where it is first used: `--help` and wrong arguments need not wait for it.

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
_FILES = r".*_reconstruction\.png|grid\.png|tokens\.json"  # what the output folder holds
_SHOWN = 64  # images in grid.png


def reconstruct(
    tokenizer, images: "np.ndarray | ImageFiles", *, batch_size: int = 64
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Encodes and decodes, batch by batch; of a VAE, the mean of the posterior.

    Args:
      tokenizer: as `titok_jax.load_tokenizer` or `load_vqgan` gives it.
      images: [n, H, W, 3] uint8, or float in [0, 1]; or what gives such arrays for its slices.
      batch_size: images at a time; the last batch is filled up, so that one program serves all. Of a tokenizer on a mesh, a
        multiple of the devices that share a batch.

    Yields:
      Where in the images, tokens int32 [b, N] (a VAE: float32 [b, N, C], a VQGAN: int32 [b, h, w]), reconstructions float32
      [b, H, W, 3] in [0, 1].

    Raises:
      ValueError: images of another size than the tokenizer's, or one without pixels (stage 1).
    """
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        filled = np.pad(part, ((0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)), mode="edge")
        tokens = tokenizer.encode(filled)
        decoded = tokenizer.decode(tokens)
        count = len(part)
        yield slice(start, start + count), np.asarray(tokens)[:count], np.asarray(decoded)[:count]


def find_images(arguments: Sequence[str]) -> list[tuple[str, Path | epath.Path]]:
    """(name, file) of image files and of all images in folders and below, sorted there; the name is the path as given.

    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: a folder without images.
    """
    files: list[tuple[str, Path | epath.Path]] = []
    for argument in arguments:
        path = as_path(argument)
        if not path.exists():
            raise FileNotFoundError(f"{argument}: no such file or folder")
        found = [path]
        if path.is_dir():
            found = [path.joinpath(*names) for names in image_files(path)]
            if not found:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise ValueError(f"{argument}: no images in this folder or below; expected {suffixes} files")
        files += [(str(file), file) for file in found]
    return files


class ImageFiles:
    """Images as the published reconstruction score takes them: shorter side to `size`, then the centre.

    `files[a:b]` decodes some, uint8 [b - a, size, size, 3]; `len(files)` is their number. All are decoded once at the start,
    and none is kept but the last that were asked for.

    Raises:
      ValueError: naming every file that cannot be read.
    """

    def __init__(self, paths: Sequence[Path | epath.Path], size: int):
        self._paths, self._size, self._last = list(paths), size, (slice(0, 0), None)
        problems = []
        for path in self._paths:
            try:
                self._read(path)
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if problems:
            raise ValueError("unreadable images, nothing was written:\n  " + "\n  ".join(problems))

    def _read(self, path: Path | epath.Path) -> np.ndarray:
        return center_crop_torchvision(decode_image(path.read_bytes(), str(path)), self._size)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, where: slice) -> np.ndarray:
        where = slice(*where.indices(len(self)))
        if self._last[0] != where:
            self._last = where, np.stack([self._read(path) for path in self._paths[where]])
        return self._last[1]


def _picture_names(names: Sequence[str]) -> list[str]:
    """File names of the pictures, from the stems; equal ones are numbered."""
    result: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem, number = Path(name).stem, 1
        # Compared without case, as some file systems do.
        while (unique := stem if number == 1 else f"{stem}_{number}").lower() in taken:
            number += 1
        taken.add(unique.lower())
        result.append(f"{unique}_reconstruction.png")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titok_jax.reconstruct",
        description="Encodes images into tokens and decodes these. Writes one picture per image, original beside "
        "reconstruction, all of them in grid.png, and the tokens in tokens.json; prints the PSNR.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(zoo.names("tokenizer") + zoo.names("vqgan"))
    parser.add_argument("images", nargs="*", metavar="IMAGE|FOLDER", help="image files, or folders of them, also gs://")
    parser.add_argument("--model", default="digits", help=f"name ({known}) or folder of a tokenizer (default: digits)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--out", default="reconstructions", help="folder to write, also gs:// (default: reconstructions)")
    parser.add_argument("--num", type=int, default=8, help="without images: how many held-out digits (default: 8)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for option, value in (("--num", args.num), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{option} is {value}, expected at least 1")
    if not args.images and args.model != "digits":
        raise ValueError("no images given; name image files or a folder of them")
    out = check_output(args.out, args.overwrite, folder_of=_FILES)
    zoo.find(args.model, None if args.model in zoo.names("vqgan") else "tokenizer")  # before JAX is imported
    files = dict(find_images(args.images))

    from titok_jax import inference
    from titok_jax.models import MaskgitVQGANConfig
    from titok_jax.sample import local_mesh, whole_batch

    config = inference.load_image_config(args.model, revision=args.revision)
    is_vqgan = isinstance(config, MaskgitVQGANConfig)
    if not is_vqgan and config.predicts_codes:
        raise ValueError(f"{args.model} is a stage 1 model, which predicts codes, not images; name one of stage 2")
    size = config.resolution if is_vqgan else config.image_size
    if files:
        names, images = list(files), ImageFiles(list(files.values()), size)
    else:
        digits, labels = load_digits("test", size)
        if args.num > len(digits):
            raise ValueError(f"--num is {args.num}, but there are {len(digits)} held-out digits")
        digits, labels = digits[: args.num], labels[: args.num]
        names = [f"digit_{index:03d}_{label}" for index, label in enumerate(labels)]
        images = np.repeat(digits[..., None], 3, axis=-1)

    load = inference.load_vqgan if is_vqgan else inference.load_tokenizer
    tokenizer = load(args.model, revision=args.revision, mesh=local_mesh())
    batch_size = whole_batch(args.batch_size, len(images))
    if is_vqgan:
        what = f"{(size // config.downsampling) ** 2} tokens of {config.codebook_size} codes"
    elif config.quantize_mode == "vae":
        what = f"{config.num_latent_tokens} latents of {config.token_size} channels"
    else:
        what = f"{config.num_latent_tokens} tokens of {config.codebook_size} codes"
    print(f"{args.model}: {size}x{size} pixels to {what}\ncompiling; the first batch takes longer")
    width, all_psnr, tokens, shown = max(map(len, names)), [], {}, []
    with new_folder(out, last="tokens.json") as folder, tqdm(total=len(images), unit="image") as bar:
        file_names = _picture_names(names)
        for where, codes, decoded in reconstruct(tokenizer, images, batch_size=batch_size):
            originals = images[where]
            values = metrics.psnr(originals / 255.0, decoded)
            rows = zip(range(where.start, where.stop), codes, originals, decoded, values, strict=True)
            for index, code, original, image, value in rows:
                caption = f"{Path(names[index]).name}   {value:.2f} dB"
                pictures.side_by_side(original, image, caption).save(folder / file_names[index])
                tqdm.write(f"{names[index]:{width}}  PSNR {value:6.2f} dB")
                tokens[names[index]] = code.tolist()
            shown += list(decoded[: _SHOWN - len(shown)])
            all_psnr += values.tolist()
            bar.update(len(codes))
        captions = [f"{value:.1f} dB" for value in all_psnr[: len(shown)]]
        columns = 8 if size <= 64 else 4
        pictures.comparison(images[: len(shown)], np.stack(shown), columns, captions).save(folder / "grid.png")
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(code)}" for name, code in tokens.items())
        (folder / "tokens.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(
        f"mean PSNR {np.mean(all_psnr):.2f} dB over {len(images)} images\nwrote {out}: the pictures, grid.png, tokens.json"
    )


if __name__ == "__main__":
    sys.exit(main())
