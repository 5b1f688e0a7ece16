"""Converts weights between formats: folder, .safetensors, PyTorch .bin, and the JAX checkpoint of the MaskGIT-VQGAN.

It also converts the published files of the perceptual networks and of FID's InceptionV3, so that training and evaluation
need no torch.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from titok_jax import models
from titok_jax.evaluation import features
from titok_jax.models.families import INCEPTION, PERCEPTUAL
from titok_jax.runtime.arguments import Parser
from titok_jax.runtime.command import command
from titok_jax.runtime.messages import near_path
from titok_jax.runtime.outputs import check_output, new_file, new_folder
from titok_jax.runtime.paths import as_path
from titok_jax.weights import (
    config_files,
    convert,
    flax_file,
    known_models,
    model_files,
    pretrained,
    published_models,
    safetensors_file,
    tensor_files,
    torch_file,
)
from titok_jax.weights import perceptual_files as perceptual

_EPILOG = """examples:
  python tools/convert_weights.py tokenizer_titok_l32.bin titok_l32/
      a published PyTorch checkpoint (needs torch) to a folder: config.json and model.safetensors
  python tools/convert_weights.py runs/stage2/pretrained titok.bin
      what was trained here to a state dict, which load_state_dict of the published code takes with strict=True
  python tools/convert_weights.py tokenizer_imagenet256_checkpoint maskgit-vqgan.safetensors
      the original JAX MaskGIT-VQGAN to the PyTorch one's names; to .msgpack for the other direction
  python tools/convert_weights.py weights-inception-2015-12-05-6726825d.pth inception.safetensors
      the InceptionV3 of FID, checked by its SHA-256, for machines without PyTorch
  python tools/convert_weights.py mine/checkpoint-500000 mine.safetensors
      the averaged weights of a checkpoint of the published trainer
  python tools/convert_weights.py mine.bin mine/ --published-config 1d-tokenizer/configs/infer/TiTok/titok_s128.yaml
      a size that is not in the table of models, with the configuration that it was trained with
  python tools/convert_weights.py titok_l32 titok_l32_bf16.safetensors --dtype bfloat16 --dry-run
      what would be written
  python tools/convert_weights.py vgg16-397923af.pth WEIGHTS/vgg16-397923af.safetensors
      a file of a perceptual network (convnext_small-0c510722, vgg16-397923af, lpips_vgg), for training with
      --config.perceptual_weights=WEIGHTS; of VGG16 only what LPIPS uses, 59 MB of 528

The input's format is told from its content, that of the output from its name: .safetensors; .bin, .pt or .pth (PyTorch);
.msgpack (Flax); no ending, or a slash: a folder. A file of a model that is not one of the published gets its configuration
beside it, with the ending .json. A generator's folder is converted without the tokenizer in it; that is FOLDER/tokenizer.
"""
_ENDINGS = {
    ".safetensors": "safetensors",
    ".bin": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".msgpack": "flax",
    "": "folder",
}
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_KINDS = {name: models.family_named(name).config for name in published_models.KINDS}


class Cast:
    """A tensor in another dtype, read and checked on use."""

    def __init__(self, name: str, tensor: Any, dtype: np.dtype):
        self._name, self._tensor = name, tensor
        self.shape, self.dtype = tuple(tensor.shape), dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.asarray(self._tensor)
        with np.errstate(over="ignore"):
            result = array.astype(self.dtype, copy=False)
        for what, checked in (("the input", array), (f"{self.dtype}", result)):
            # bfloat16 has no isfinite of its own
            if not np.isfinite(checked.astype(np.float32) if checked.dtype.name == "bfloat16" else checked).all():
                raise convert.WeightsError(f"{self._name} is not finite in {what}")
        return result if dtype is None else result.astype(dtype)


def config_of(files: model_files.Source, kind: type | None) -> models.Config | None:
    """Reads the configuration file. Returns None if there is none.

    A published file may describe both a tokenizer and a generator. The weights decide: the result is the configuration whose
    tensor names they match best.
    """
    if files.config is None:
        return None
    configs, errors = [], []
    for cls in _KINDS.values() if kind is None else [kind]:
        try:
            configs.append(config_files.read_config_as(files.config, cls))
        except convert.WeightsError as error:
            errors.append(error)
    if not configs:
        raise errors[0]
    with tensor_files.open_weights(files.weights) as (_, tensors):
        # A later check reports tensors that do not fit.
        return max(configs, key=lambda config: len(tensors.keys() & known_models.published_shapes(config).keys()))


def family_of(config: models.Config | None) -> models.Family:
    """The family of what `open_input` yields."""
    return PERCEPTUAL if config is None else models.family_of(config)


@contextlib.contextmanager
def open_input(files: model_files.Source, kind: type | None) -> Iterator[tuple[models.Config | None, Mapping[str, Any]]]:
    """Yields the configuration and the tensors of the input. The configuration of a perceptual network's file is None."""
    with contextlib.ExitStack() as stack:
        if files.config is None and kind is None:
            used = perceptual.used_tensors(stack.enter_context(tensor_files.open_weights(files.weights)).tensors)
            if used is not None:
                yield None, used
                return
        yield stack.enter_context(pretrained.open_model(files.weights, kind, config_of(files, kind)))


def table(tensors: Mapping[str, Any], dtypes: Mapping[str, np.dtype]) -> str:
    """Formats names, shapes and dtypes (before and after) as lines of text."""
    width = max(map(len, tensors))
    lines = []
    for name, tensor in tensors.items():
        before, after = tensor.dtype.name, dtypes[name].name
        lines.append(f"{name:{width}}  {list(tensor.shape)!s:22}  {before if before == after else f'{before} -> {after}'}")
    return "\n".join(lines)


def write(path: Path, format: str, tensors: Mapping[str, Any], config: models.Config | None) -> None:
    """Writes {published name: tensor} to a single file in a format."""
    family = family_of(config)
    bare = "folder" not in family.formats  # these have no configuration file
    if family.writes_buffers:
        tensors = {**tensors, **family.buffers(config)}
    if family is INCEPTION:
        safetensors_file.write_safetensors(path, tensors, features.CONVERTED_FROM_PUBLISHED)
    elif format == "safetensors" and bare:
        safetensors_file.write_safetensors(path, tensors)
    elif format == "safetensors":
        pretrained.write_weights(path, tensors, config)
    elif format == "torch":
        torch_file.write_torch(path, tensors)
    else:
        flax_file.write_flax(path, convert.published_to_jax_vqgan(tensors, config=config))


def compare(path: Path, tensors: Mapping[str, Any], config: models.Config | None) -> None:
    """Reads a written file back. Raises WeightsError unless it holds exactly these tensors."""
    opened = tensor_files.open_weights(path) if config is None else pretrained.open_model(path, type(config), config)
    with opened as (_, written):
        for name, tensor in tensors.items():
            wanted, found = np.ascontiguousarray(tensor), np.ascontiguousarray(written[name])
            if wanted.dtype != found.dtype or wanted.tobytes() != found.tobytes():
                raise convert.WeightsError(f"{path}: {name} was not written as it should be; is the disk sound?")


def _parser() -> Parser:
    parser = Parser(
        prog="python tools/convert_weights.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "input", help="a folder or file of weights, a known name (python -m titok_jax.zoo) or hf://owner/name"
    )
    parser.add_argument("output", help="folder or file to write, also gs://; must not exist")
    parser.add_argument("--kind", choices=_KINDS, help="which model of a name or folder (default: told from the tensors)")
    parser.add_argument("--revision", help="branch, tag or commit, of an input on the hub")
    parser.add_argument(
        "--published-config",
        type=Path,
        metavar="FILE",
        help="configuration of the input: a YAML file of the published configs/, or a config.json",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the output (default: that of each tensor)")
    parser.add_argument("--dry-run", action="store_true", help="print names, shapes and dtypes; write nothing")
    return parser


def _check(args: argparse.Namespace, output: Path, format: str, files: model_files.Source, config: Any) -> None:
    """Raises ValueError if a model cannot be written in a format."""
    family = family_of(config)
    if format not in family.formats:
        raise ValueError(f"{output}: {family.title} is written as {' or '.join(family.formats)}, not as {format}")
    if family is INCEPTION:
        if args.dtype not in (None, "float32"):
            raise ValueError(f"{output}: the InceptionV3 of FID is written as .safetensors in float32 only")
        features.verify_inception(files.weights)


def _write_output(output: Path, format: str, tensors: Mapping[str, Any], config: models.Config | None) -> None:
    """Writes a folder or a file, with its configuration beside it unless it is that of a known model; reads it back."""
    if format == "folder":
        with new_folder(output, files=pretrained.FOLDER_FILES, replace=False, last=pretrained.CONFIG_FILE) as folder:
            write(folder / pretrained.WEIGHTS_FILE, "safetensors", tensors, config)
            compare(folder / pretrained.WEIGHTS_FILE, tensors, config)
            config_files.write_config(folder / pretrained.CONFIG_FILE, config)
        return
    with new_file(output, replace=False) as partial:
        write(partial, format, tensors, config)
        compare(partial, tensors, config)
    if _needs_config(config):
        with new_file(output.with_suffix(".json"), replace=False) as partial:
            config_files.write_config(partial, config)


def _needs_config(config: models.Config | None) -> bool:
    """Whether a file of weights does not tell its configuration by its tensors."""
    return config is not None and config not in known_models.known_configs().values()


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    output = as_path(args.output)
    format = "folder" if args.output.endswith("/") else _ENDINGS.get(output.suffix)
    if format is None:
        raise ValueError(
            f"{output}: unknown ending {output.suffix}; expected one of {', '.join(filter(None, _ENDINGS))}, or /"
        )
    if format == "torch" and not args.dry_run:
        torch_file.import_torch(output, "write")
    kind = None if args.kind is None else _KINDS[args.kind]
    if kind is None and all(args.input in published_models.names(name) for name in ("generator", "tokenizer")):
        raise ValueError(f"{args.input} is a tokenizer and a generator; add --kind tokenizer or --kind generator")
    files = model_files.locate(args.input, kind, revision=args.revision)
    if args.published_config is not None:
        if not args.published_config.is_file():
            raise FileNotFoundError(
                f"--published-config {args.published_config}: no such file{near_path(args.published_config)}"
            )
        files = files._replace(config=args.published_config)
    pretrained.check_downloads(files.weights)
    if args.published_config is None:
        pretrained.check_config(files)
    with open_input(files, kind) as (config, found):
        _check(args, output, format, files, config)
        beside = output.with_suffix(".json") if format != "folder" and _needs_config(config) else None
        dtypes = {name: tensor.dtype if args.dtype is None else _DTYPES[args.dtype] for name, tensor in found.items()}
        if args.dry_run:
            print(table(found, dtypes))
        else:
            for path in filter(None, (output, beside)):
                if path.exists() or os.path.islink(path):
                    raise FileExistsError(f"{path} exists and nothing was overwritten; choose another output or remove it")
            check_output(output, False, folder_of="" if format == "folder" else None)
        tensors = {name: Cast(name, tensor, dtypes[name]) for name, tensor in found.items()}
        if not args.dry_run:
            _write_output(output, format, tensors, config)
        count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
        done = "dry run, nothing written" if args.dry_run else "read again and equal"
        names = sorted({dtype.name for dtype in dtypes.values()})
        print(f"{files.weights} -> {output}: {len(tensors)} tensors, {count:,} parameters, {', '.join(names)}; {done}")


if __name__ == "__main__":
    sys.exit(main())
