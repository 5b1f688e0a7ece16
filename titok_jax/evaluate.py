"""Evaluates models: `python -m titok_jax.evaluate` computes the metrics of the embedded digits model.

With --reconstruct or --reference, it evaluates any tokenizer or generator. docs/evaluation.md explains each metric and which
published figures it can be compared with.

Finished work is kept in JSON.shards until the JSON file is written. After a kill, the same command continues from there.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from titok_jax.evaluation import image_sources
from titok_jax.evaluation.arguments import check_arguments, check_outputs
from titok_jax.inference.arguments import add_precision_arguments, add_sampling_arguments
from titok_jax.runtime.arguments import IMAGES, Parser
from titok_jax.runtime.command import command, require
from titok_jax.weights import published_models

if TYPE_CHECKING:
    from titok_jax.models.generator import SamplingConfig

_EPILOG = """examples:
  python -m titok_jax.evaluate --model digits --json digits.json
      every figure of the embedded digits, in digits-FID, in seconds
  python -m titok_jax.evaluate --model titok_l32 --reconstruct tfds:imagenet2012:validation --inception W.pth --json a.json
      rFID, IS, PSNR, SSIM and codebook usage of a tokenizer, as published (add --lpips FOLDER for LPIPS)
  python -m titok_jax.evaluate --model titok_l32 --reference VIRTUAL_imagenet256_labeled.npz --json l32_gfid.json
      gFID, sFID, IS, precision and recall of 50,000 samples, as published
  python -m titok_jax.evaluate --model titok_l32 --reconstruct imagenet/val --features none --json quality.json
      PSNR, SSIM and codebook usage alone, which need no weights of another network
  python -m titok_jax.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json samples.json
      the same of samples that are there, also in a folder
  python -m titok_jax.evaluate --model titok_b64 --reference VIRTUAL_imagenet256_labeled.npz --num 5000 \\
      --guidance-scale 0,1.5,3.0,4.5 --temperature 2,11 --json sweep.json
      a grid of settings, also as a curve of FID over IS in sweep.png
  python -m titok_jax.evaluate --reference imagenet/train --model titok_l32 --save-reference imagenet_train.npz
      statistics of a data set of one's own, for --reference

DATA is a folder of images, array_record:FILES, tfds:NAME:SPLIT, webdataset:FILES or parquet:FILES (globs, or with braces as
in 'imagenet-val-{0000..0049}.tar'), or digits:SPLIT (train, held_out or all). All but digits and --features none need the
weights of InceptionV3: --inception FILE, or its name in the environment variable TITOK_JAX_INCEPTION. Every file and folder
may be in a bucket, gs://BUCKET/... (of DATA not array_record and tfds).
"""


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value:>19}" for name, value in rows), flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m titok_jax.evaluate",
        description="Measures a tokenizer (--reconstruct DATA), a generator (--reference REF), or a model of the digits.",
        epilog=_EPILOG,
    )
    known = ", ".join(published_models.names("tokenizer") + published_models.names("vqgan"))
    parser.add_argument("--model", default="digits", help=f"name ({known}) or folder of a model (default: digits)")
    parser.add_argument("--tokenizer", help="name or folder, if not the one in the generator's folder")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--tokenizer-revision", help="the same of the tokenizer, if that is in a repository of its own")
    what = parser.add_argument_group("what is measured", "without these: every figure of a model of the digits")
    what.add_argument("--reconstruct", metavar="DATA", help="images against their reconstructions by the tokenizer")
    what.add_argument(
        "--reference",
        metavar="REF",
        help="generated images against these: ADM's or a saved file of statistics, .npz, or DATA",
    )
    what.add_argument(
        "--samples", metavar="SAMPLES", help="generated images, in place of making them: an .npz file (arr_0), or DATA"
    )
    what.add_argument(
        "--save-reference", metavar="FILE", help="write the statistics of the DATA in --reference, .npz, and end"
    )
    parser.add_argument(
        "--num",
        type=IMAGES,
        help="images: generated, as many per class (default: 50,000; digits: 1,000), or of DATA (default: all)",
    )
    parser.add_argument(
        "--features",
        choices=("inception", "digits", "none"),
        help="network of the features (default: that of a saved reference; digits for digits:SPLIT); none, with "
        "--reconstruct: PSNR, SSIM and codebook usage alone",
    )
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help="its published weights; the environment variable TITOK_JAX_INCEPTION if not given",
    )
    latents = "of a VAE with --reconstruct: draws of --seed (default, as published), or the mean"
    parser.add_argument("--latents", choices=("sample", "mean"), help=latents)
    parser.add_argument("--lpips", metavar="FOLDER", help="with --reconstruct: also LPIPS, by the weights in this folder")
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures and all settings there; of a sweep, a picture beside it"
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images of DATA that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace that file, and unfinished work of other settings")
    add_precision_arguments(parser)
    add_sampling_arguments(parser, several=True)
    return parser


def _models(args: argparse.Namespace, mode: str) -> "tuple[int, list[SamplingConfig]]":
    """Returns (side of the model's images in pixels, sampling settings of every point).

    For a generator it sets `args.num`, and in the names and revisions of models on the hub the commits that they have now.

    Raises:
      ValueError: if the model cannot be evaluated in this mode.
    """
    from titok_jax import inference
    from titok_jax.evaluation.runs import check_generator, tokenizer_revision
    from titok_jax.evaluation.sweep import settings_grid
    from titok_jax.weights.model_files import pin_pair

    if mode in ("reconstruction", "reference"):
        revision = tokenizer_revision(args, None)
        tokenizer, grid = inference.load_image_config(args.tokenizer or args.model, revision=revision), []
    else:
        revisions = {"revision": args.revision, "tokenizer_revision": args.tokenizer_revision}
        (args.model, args.tokenizer), revisions = pin_pair(args.model, args.tokenizer, **revisions)
        vars(args).update(revisions)
        tokenizer, generator = inference.pair_configs(args.model, args.tokenizer, **revisions)
        grid = settings_grid(args, generator)
        check_generator(args, tokenizer.image_size, generator.num_classes)
    if mode != "reference" and tokenizer.predicts_codes:
        raise ValueError("the tokenizer is a stage 1 model, which predicts codes, not images; name one of stage 2")
    return tokenizer.image_size, grid


def _show(args: argparse.Namespace, mode: str, result: dict[str, Any]) -> None:
    """Prints the metrics of an evaluation and writes them to the JSON file."""
    from titok_jax.evaluation.digits import digits_rows
    from titok_jax.evaluation.jobs import write_json

    _print_table(digits_rows(result) if mode == "digits" else [(k, f"{v:.4f}") for k, v in result["metrics"].items()])
    for note in result.get("notes", ()):
        print(f"note: {note}")
    if args.json:
        write_json(args.json, result, replace=args.overwrite)
        print(f"wrote {args.json}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    mode = check_arguments(args)
    check_outputs(args, mode)
    require("scipy", "matplotlib")  # now, not after an hour of sampling
    samples = image_sources.open_samples(args.samples, args.skip_unreadable) if args.samples else None
    if samples is None:  # before JAX is imported
        kind = "tokenizer" if mode in ("reconstruction", "reference") else "generator"
        vqgan = kind == "tokenizer" and args.model in published_models.names("vqgan")
        published_models.find(args.model, None if vqgan else kind)

    from titok_jax.evaluation import runs
    from titok_jax.evaluation.jobs import Work, work_folder
    from titok_jax.evaluation.sweep import run_sweep
    from titok_jax.runtime import processes

    processes.initialize_distributed()
    image_size, grid = (samples.size, []) if samples is not None else _models(args, mode)
    with work_folder(args.json or args.save_reference) as folder:
        work = Work(folder, batch_size=args.batch_size, image_size=image_size, restart=args.overwrite)
        run = runs.Evaluation(args, mode, image_size, work)
        if mode == "reconstruction":
            figures = runs.run_reconstruction(run)
        elif mode == "samples":
            figures = runs.run_samples(run, samples)
        elif mode == "reference":
            figures = run.reference(args.num)
        elif mode == "sweep":
            figures = run_sweep(run, grid)
        else:
            said = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(grid[0]).items())
            print(f"sampling: {said}, seed {args.seed}", flush=True)
            figures = (runs.run_digits if mode == "digits" else runs.run_generation)(run, grid[0])
        if work.first and mode == "reference":
            figures.save(args.save_reference, replace=args.overwrite)
            print(f"wrote {args.save_reference}: statistics of {figures.about['num_images']} images")
        elif work.first and mode != "sweep":
            _show(args, mode, run.result | figures)
        work.remove()


if __name__ == "__main__":
    sys.exit(main())
