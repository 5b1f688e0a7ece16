"""Measures models: `python -m titok_jax.evaluate` gives the figures of the embedded digits; with --reconstruct or
--reference, those of any tokenizer or generator. docs/evaluation.md says what each means and what it compares with.

Work is kept in JSON.shards until the JSON is written, so a killed command goes on where it was when it is started again.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

import titok_jax
from titok_jax import evaluation, metrics, pictures, zoo
from titok_jax.cli import check_output, command, new_file
from titok_jax.data.digits import load_digits
from titok_jax.sample import (
    MATMUL_PRECISION,
    add_sampling_arguments,
    balanced_labels,
    local_mesh,
    sampling_settings,
    sha256,
    weights_sha256,
    whole_batch,
)
from titok_jax.shards import Shards
from titok_jax.storage import as_path

# JAX is imported where it is first used: `--help` and wrong arguments need not wait for it.

_EPILOG = """examples:
  python -m titok_jax.evaluate --model digits --json digits.json
      every figure of the embedded digits, in digits-FID, in seconds
  python -m titok_jax.evaluate --model titok_l32 --reconstruct tfds:imagenet2012:validation --inception W.pth --json a.json
      rFID, IS, PSNR, SSIM and codebook usage of a tokenizer, as published (add --lpips FOLDER for LPIPS)
  python -m titok_jax.evaluate --model titok_l32 --reference VIRTUAL_imagenet256_labeled.npz --json l32_gfid.json
      gFID, sFID, IS, precision and recall of 50,000 samples, as published
  python -m titok_jax.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json samples.json
      the same of samples that are there
  python -m titok_jax.evaluate --model titok_b64 --reference VIRTUAL_imagenet256_labeled.npz --num 5000 \\
      --guidance-scale 0,1.5,3.0,4.5 --temperature 2,11 --json sweep.json
      a grid of settings, also as a curve of FID over IS in sweep.png
  python -m titok_jax.evaluate --reference imagenet/train --model titok_l32 --save-reference imagenet_train.npz
      statistics of a data set of one's own, for --reference

DATA is a folder of images, array_record:FILES, tfds:NAME:SPLIT, webdataset:FILES (a glob, or with braces as in
'imagenet-val-{0000..0049}.tar'), or digits:SPLIT. All but the first need the
weights of InceptionV3: --inception FILE, or its name in the environment variable TITOK_JAX_INCEPTION. Every file and folder
may be in a bucket, gs://BUCKET/... (of DATA not array_record and tfds).
"""

NUM_CLASSES, DIGITS_SIZE = 10, 32

# Neighbours of the classifier of digits. Of the two usual numbers, 3 and 5, the one that reads more of the 1,437 training
# digits right when each is left out in turn: 98.5 % against 98.3 %. Held-out digits had no part in the choice. (One
# neighbour reads 98.9 %, but then a single odd scan decides.)
NEIGHBOURS = 3

_SAMPLING = ("steps", "guidance_scale", "guidance_schedule", "temperature")


class Work:
    """Where the pieces of an evaluation are kept, and what all of its jobs share."""

    def __init__(self, folder: Path | epath.Path, *, batch_size: int, restart: bool = False, quiet: bool = False):
        import jax

        self.folder, self.batch_size, self.quiet = folder, batch_size, quiet
        self._options = {"restart": restart, "process_index": jax.process_index(), "process_count": jax.process_count()}
        self.first = jax.process_index() == 0
        self.jobs: list[Shards] = []

    def job(self, name: str, length: int, settings: dict[str, Any]) -> Shards:
        """The pieces of one job, begun or continued."""
        size = whole_batch(self.batch_size, length)
        shards = Shards(self.folder / name, settings, length, size, **self._options)
        self.jobs.append(shards)
        return shards

    def make(self, shards: Shards, pieces: evaluation.Pieces) -> None:
        """Makes what is missing of a job."""
        shards.make(pieces, name=shards.folder.name, quiet=self.quiet)

    def remove(self) -> None:
        """Removes the pieces of all jobs, once no process reads them any more."""
        for shards in self.jobs:
            shards.wait("used")
        if self.first:
            for shards in self.jobs:
                shards.remove()
            with contextlib.suppress(OSError, ValueError):  # the latter from etils
                self.folder.rmdir()


def evaluate_digits(
    tokenizer, generator, network, work: Work, *, num: int, seed: int, settings: dict[str, Any], identity: dict[str, Any]
) -> dict[str, Any] | None:
    """Every figure of a model of the digits.

    The classifier that reads generated and reconstructed digits has seen the real training digits only, and so has the
    network of digits-FID; every figure has the same one of real held-out digits beside it.

    Args:
      tokenizer, generator: as `titok_jax.load_pair` gives them.
      network: as `titok_jax.features.load_digits_features` gives it.
      num: generated digits, a multiple of 10.
      seed, settings: as of `titok_jax.sample.sample`.
      identity: what says which weights and features these are, for the settings of the pieces.

    Returns:
      A nested dict of numbers; None on all processes but the first. Accuracies are fractions read as the true label, or the
      label generated for; distances are root mean squares over the pixels, of images in [0, 1].
    """
    from titok_jax.data.sources import DigitsSource

    size = tokenizer.config.image_size
    jobs = {}
    for name, split in (("training", "train"), ("held_out", "test")):
        images = evaluation.SourceImages(DigitsSource(split, size), "torchvision", size)
        jobs[name] = work.job(name, len(images), identity | {"data": f"digits:{split}"})
        work.make(jobs[name], evaluation.reconstruction_pieces(jobs[name], images, tokenizer, network, keep=True))
    labels = balanced_labels(range(NUM_CLASSES), num)
    generated = work.job("generated", num, identity | settings | {"seed": seed})
    work.make(
        generated,
        evaluation.generation_pieces(generated, tokenizer, generator, network, labels, seed, settings, keep=True),
    )

    if not generated.first:
        return None
    (train_grey, train_labels), (test_grey, test_labels) = load_digits("train", size), load_digits("test", size)
    images = {name: evaluation.gather(job, "images") for name, job in {**jobs, "generated": generated}.items()}

    def vector(images):  # uint8 [n, H, W] or [n, H, W, 3] -> grey [n, H W] in [0, 1]
        grey = images.mean(-1, dtype=np.float64) if images.ndim == 4 else images.astype(np.float64)
        return grey.reshape(len(images), -1) / 255.0

    references = vector(train_grey)

    def accuracy(images, truth):
        return float(np.mean(metrics.knn_classify(vector(images), references, train_labels, NEIGHBOURS) == truth))

    def nearest(images):
        distances = metrics.nearest_neighbours(vector(images), references)[0][:, 0] / math.sqrt(references.shape[1])
        return {"median": float(np.median(distances)), "percentile_5": float(np.percentile(distances, 5))}

    seen = set(map(tuple, evaluation.gather(jobs["training"], "tokens").tolist()))
    tokens = list(map(tuple, evaluation.gather(generated, "tokens").tolist()))
    reference = evaluation.make_reference(
        jobs["training"], network.name, {"source": "digits:train", "image_size": size}, features="real_"
    )
    held_out = jobs["held_out"]
    few = {} if num <= held_out.length else evaluation.generation_figures(generated, reference, "digits-", held_out.length)
    return {
        "real_accuracy": accuracy(test_grey, test_labels),
        "reconstructed_accuracy": accuracy(images["held_out"], test_labels),
        "generated_accuracy": accuracy(images["generated"], labels),
        "against_training_digits": {
            "generated": evaluation.generation_figures(generated, reference, "digits-") | few,
            "held_out": evaluation.generation_figures(held_out, reference, "digits-", features="real_"),
        },
        "reconstruction": {
            name: {"num_images": job.length}
            | evaluation.reconstruction_figures(job, network.name, tokenizer.config.codebook_size, "digits-")
            for name, job in jobs.items()
        },
        "generation": {
            "num_images": num,
            "distinct_tokens": len(set(tokens)),
            "seen_tokens": sum(sequence in seen for sequence in tokens) / num,
        },
        "distance_to_nearest_training_digit": {"generated": nearest(images["generated"]), "held_out": nearest(test_grey)},
    }


def versions() -> dict[str, str]:
    """Of what the figures depend on, and the kind of device."""
    import flax
    import jax
    import jaxlib

    return {
        "titok_jax": titok_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of the digits for reading."""
    held_out, training = result["reconstruction"]["held_out"], result["reconstruction"]["training"]
    generation, distances = result["generation"], result["distance_to_nearest_training_digit"]
    neighbours = f"read right by {NEIGHBOURS} nearest training digits"
    rows = [
        (f"real held-out digits {neighbours}", f"{result['real_accuracy']:.2%}"),
        (f"reconstructed held-out digits {neighbours}", f"{result['reconstructed_accuracy']:.2%}"),
        (f"generated digits {neighbours}", f"{result['generated_accuracy']:.2%}"),
    ]
    for whose in ("generated", "held_out"):
        figures = result["against_training_digits"][whose]
        rows += [
            (f"{name} of {whose.replace('_', '-')} digits against training digits", f"{value:.3f}")
            for name, value in figures.items()
        ]
    name = next(name for name in held_out if "rFID" in name)
    rows += [
        (f"{name} of reconstructed held-out digits", f"{held_out[name]:.3f}"),
        ("PSNR, held-out / training", f"{held_out['psnr']:.2f} / {training['psnr']:.2f} dB"),
        ("SSIM, held-out / training", f"{held_out['ssim']:.3f} / {training['ssim']:.3f}"),
        ("codebook usage, held-out / training", f"{held_out['codebook_usage']:.1%} / {training['codebook_usage']:.1%}"),
        ("codebook perplexity, held-out / training", f"{held_out['perplexity']:.0f} / {training['perplexity']:.0f}"),
    ]
    for name, key in (("median", "median"), ("5th percentile", "percentile_5")):
        pair = f"{distances['generated'][key]:.3f} / {distances['held_out'][key]:.3f}"
        rows.append((f"distance to nearest training digit, {name}, generated / held-out", pair))
    return [
        *rows,
        ("different token sequences generated", f"{generation['distinct_tokens']} of {generation['num_images']}"),
        ("generated token sequences that a training digit has", f"{generation['seen_tokens']:.1%}"),
    ]


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value:>19}" for name, value in rows), flush=True)


def _write_json(path: str, result: dict[str, Any]) -> None:
    with new_file(path) as partial:
        partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titok_jax.evaluate",
        description="Measures a tokenizer (--reconstruct DATA), a generator (--reference REF), or a model of the digits.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(zoo.names("tokenizer") + zoo.names("vqgan"))
    parser.add_argument("--model", default="digits", help=f"name ({known}) or folder of a model (default: digits)")
    parser.add_argument("--tokenizer", help="name or folder, if not the one in the generator's folder")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--tokenizer-revision", help="the same of the tokenizer, which is in a repository of its own")
    what = parser.add_argument_group("what is measured", "without these: every figure of a model of the digits")
    what.add_argument("--reconstruct", metavar="DATA", help="images against their reconstructions by the tokenizer")
    what.add_argument(
        "--reference",
        metavar="REF",
        help="generated images against these: ADM's or a saved file of statistics, .npz, or DATA",
    )
    what.add_argument("--samples", metavar="FILE", help="an .npz file (arr_0) of generated images, in place of making them")
    what.add_argument(
        "--save-reference", metavar="FILE", help="write the statistics of the DATA in --reference, .npz, and end"
    )
    parser.add_argument(
        "--num",
        type=int,
        help="images: generated, as many per class (default: 50,000; digits: 1,000), or of DATA (default: all)",
    )
    parser.add_argument(
        "--features", choices=("inception", "digits"), help="network of the features (default: digits for digits:SPLIT)"
    )
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help="its published weights; the environment variable TITOK_JAX_INCEPTION if not given",
    )
    parser.add_argument("--lpips", metavar="FOLDER", help="with --reconstruct: also LPIPS, by the weights in this folder")
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures and all settings there; of a sweep, a picture beside it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace that file, and unfinished work of other settings")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model; figures are float64"
    )
    add_sampling_arguments(parser, several=True)
    return parser


def _check(args: argparse.Namespace) -> str:
    """What is asked for: "digits", "reconstruction", "generation", "samples", "sweep" or "reference".

    Raises:
      ValueError: things that do not go together, or cannot be compared.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.num is not None and args.num < 1:
        raise ValueError(f"--num is {args.num}, expected at least 1")
    sampling = [f"--{name.replace('_', '-')}" for name in _SAMPLING if getattr(args, name) is not None]
    several = [len(values or []) > 1 for values in (args.guidance_scale, args.temperature)]
    if args.lpips and not args.reconstruct:
        raise ValueError("--lpips goes with --reconstruct: it is a distance of images and their reconstructions")
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


@contextlib.contextmanager
def _work_folder(json_file: str | None) -> Iterator[Path | epath.Path]:
    if json_file:
        yield as_path(f"{json_file}.shards")
        return
    import jax

    if jax.process_count() > 1:
        raise ValueError(
            "several processes need --json FILE, in a folder that all of them reach: they share their work there"
        )
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "shards"


class Evaluation:
    """One call of the command: what its modes share.

    Attributes:
      result: what goes into the JSON, whatever the mode.
    """

    def __init__(self, args: argparse.Namespace, mode: str, image_size: int, work: Work):
        from titok_jax import features

        self.args, self.work, self.image_size = args, work, image_size
        data = args.reconstruct or args.reference or ("digits:" if mode in ("digits", "sweep") else "")
        digits = args.features == "digits" or (args.features is None and data.startswith("digits:"))
        if digits:
            if image_size != DIGITS_SIZE:
                raise ValueError(
                    f"--features digits is for {DIGITS_SIZE}x{DIGITS_SIZE} pixels, not {image_size}x{image_size}"
                )
            self.network = features.load_digits_features(batch_size=args.batch_size)
        else:
            self.network = features.load_inception(args.inception, batch_size=args.batch_size)
        self.prefix = "digits-" if digits else ""
        tokenizer = None if mode in ("samples", "reference") else args.tokenizer or args.model
        generator = args.model if mode in ("digits", "generation", "sweep") else None
        weights = weights_sha256(generator, tokenizer, args.revision, _tokenizer_revision(args, generator))
        self.identity = {"features": self.network.name, "dtype": args.dtype, **weights}
        digest = sha256(features.DIGITS_WEIGHTS) if digits else features.INCEPTION_SHA256
        self.result: dict[str, Any] = {"mode": mode}
        if tokenizer is not None:
            self.result |= {"model": args.model, "tokenizer": str(tokenizer)}
            self.result["sha256"] = {k: v for k, v in self.identity.items() if k in ("generator", "tokenizer")}
        self.result |= {
            "features": {"network": self.network.name, "sha256": digest},
            "image_size": image_size,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "matmul_precision": MATMUL_PRECISION[args.dtype],
            "versions": versions(),
        }
        if mode == "sweep":  # what every point has
            self.result |= {"seed": args.seed, "num_images": args.num, "reference_given": args.reference or "digits:train"}

    def images(self, data: str, crop: str, num: int | None = None) -> evaluation.SourceImages:
        from titok_jax.data.sources import make_source
        from titok_jax.pretokenize import parse_source

        return evaluation.SourceImages(make_source(parse_source(data)), crop, self.image_size, num)

    def reference(self, num: int | None = None) -> evaluation.Reference | None:
        """That of --reference, of the digits if there is none; None on all processes but the first."""
        text = self.args.reference or "digits:train"
        about: dict[str, Any] = {"source": text, "image_size": self.image_size}
        adm = None
        if text.endswith(".npz"):
            found = evaluation.read_reference(text, self.network.name, self.image_size)
            about["sha256"] = sha256(text)
            if isinstance(found, evaluation.Reference):
                return dataclasses.replace(found, about=found.about | {"file": text, "sha256": about["sha256"]})
            images = adm = found
        else:
            about["crop"] = "adm"
            images = self.images(text, "adm", num)
        job = self.work.job("reference", len(images), about | {"features": self.identity["features"]})
        self.work.make(job, evaluation.image_pieces(job, images, self.network))
        return evaluation.make_reference(job, self.network.name, about, adm) if job.first else None

    def load_pair(self):
        from titok_jax.inference import load_pair

        args = self.args
        revisions = {"revision": args.revision, "tokenizer_revision": args.tokenizer_revision}
        return load_pair(args.model, args.tokenizer, dtype=args.dtype, mesh=local_mesh(), **revisions)

    def generate(self, name: str, pair, labels: np.ndarray, settings: dict[str, Any]) -> Shards:
        """The pieces of generated images."""
        job = self.work.job(name, len(labels), self.identity | settings | {"seed": self.args.seed})
        options = (self.network, labels, self.args.seed, settings)
        self.work.make(job, evaluation.generation_pieces(job, *pair, *options))
        return job


def _tokenizer_revision(args: argparse.Namespace, generator: str | None) -> str | None:
    """Of what `load_tokenizer` reads: without a generator, --model is the tokenizer."""
    return args.tokenizer_revision if generator or args.tokenizer else args.revision


def _digits(run: Evaluation, settings: dict[str, Any]) -> dict[str, Any] | None:
    options = {"num": run.args.num, "seed": run.args.seed, "settings": settings, "identity": run.identity}
    figures = evaluate_digits(*run.load_pair(), run.network, run.work, **options)
    if figures is None:
        return None
    classifier = {"kind": "k nearest neighbours of pixels", "k": NEIGHBOURS, "fitted_on": "real training digits"}
    return {**figures, "classifier": classifier, "sampling": settings, "seed": run.args.seed}


def _reconstruction(run: Evaluation) -> dict[str, Any] | None:
    from titok_jax import inference, models

    args = run.args
    images = run.images(args.reconstruct, "torchvision", args.num)
    about = {"data": args.reconstruct, "crop": "torchvision", "rounding": "round(x * 255)"}
    lpips = None
    if args.lpips:
        from titok_jax.features import load_lpips
        from titok_jax.tasks.perceptual import HEADS_FILE, VGG_FILE

        lpips = load_lpips(args.lpips, mesh=local_mesh())
        names = [file.stem + ending for file in (VGG_FILE, HEADS_FILE) for ending in (".safetensors", ".pth")]
        files = [as_path(args.lpips) / name for name in names]
        about["lpips_sha256"] = {file.name: sha256(file) for file in files if file.is_file()}

    source, revision = args.tokenizer or args.model, _tokenizer_revision(args, None)
    if isinstance(inference.load_image_config(source, revision=revision), models.MaskgitVQGANConfig):
        tokenizer = inference.load_vqgan(source, dtype=args.dtype, mesh=local_mesh(), revision=revision)
        is_vae = False
    else:
        tokenizer = inference.load_tokenizer(source, dtype=args.dtype, mesh=local_mesh(), revision=revision)
        is_vae = tokenizer.config.quantize_mode == "vae"
    job = run.work.job("reconstruction", len(images), run.identity | about)
    run.work.make(job, evaluation.reconstruction_pieces(job, images, tokenizer, run.network, lpips=lpips))
    if not job.first:
        return None
    codebook_size = None if is_vae else tokenizer.config.codebook_size
    figures = evaluation.reconstruction_figures(job, run.network.name, codebook_size, run.prefix)
    return {**about, "num_images": len(images), "metrics": figures}


def _samples(run: Evaluation, images: evaluation.NpzImages) -> dict[str, Any] | None:
    reference = run.reference()
    about = {"samples": run.args.samples, "samples_sha256": sha256(run.args.samples)}
    job = run.work.job("samples", len(images), about | {"features": run.identity["features"]})
    run.work.make(job, evaluation.image_pieces(job, images, run.network))
    if not job.first:
        return None
    figures = evaluation.generation_figures(job, reference, run.prefix)
    result = {**about, "num_images": len(images), "reference": reference.about, "metrics": figures}
    if images.sorted_by_class and len(images) > evaluation.ADM_SPLIT:
        result["notes"] = [
            f"the samples are sorted by class, and the Inception score is a mean over chunks of {evaluation.ADM_SPLIT:,} "
            "images in their order: it is less than that of samples whose classes take turns, as in published figures"
        ]
    return result


def _generation(run: Evaluation, settings: dict[str, Any]) -> dict[str, Any] | None:
    reference, pair = run.reference(), run.load_pair()
    generator = pair[1].config
    labels = balanced_labels(range(generator.num_classes), run.args.num)
    job = run.generate("generated", pair, labels, settings)
    if not job.first:
        return None
    figures = evaluation.generation_figures(job, reference, run.prefix)
    figures |= evaluation.codebook_figures(job, generator.codebook_size)
    return {
        "sampling": settings,
        "seed": run.args.seed,
        "num_images": run.args.num,
        "reference": reference.about,
        "metrics": figures,
    }


def _sweep(run: Evaluation, grid: Sequence[dict[str, Any]]) -> None:
    """Evaluates each setting of a grid. A point that is done is in the JSON and is not done again."""
    args, path = run.args, as_path(run.args.json)
    points = _finished_points(run) if path.exists() else []
    missing = [settings for settings in grid if all(point["sampling"] != settings for point in points)]
    if missing:
        reference, pair = run.reference(), run.load_pair()
        generator = pair[1].config
        labels = balanced_labels(range(generator.num_classes), args.num)
    for settings in missing:
        name = "_".join(f"{key.replace('_', '-')}-{settings[key]:g}" for key in ("guidance_scale", "temperature"))
        job = run.generate(name, pair, labels, settings)
        if job.first:
            figures = evaluation.generation_figures(job, reference, run.prefix)
            figures |= evaluation.codebook_figures(job, generator.codebook_size)
            points.append({"sampling": settings, "metrics": figures, "versions": versions()})
            points.sort(key=lambda point: (point["sampling"]["temperature"], point["sampling"]["guidance_scale"]))
            _write_json(args.json, {**run.result, "reference": reference.about, "points": points})
            job.remove()
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
    if run.work.first:
        with new_file(path.with_suffix(".png")) as partial:
            sweep_picture(points, f"{args.model}, {args.num:,} samples").save(partial)
        print(f"wrote {path} and {path.with_suffix('.png')}")


def _finished_points(run: Evaluation) -> list[dict[str, Any]]:
    """The points of a sweep that was begun with the same settings.

    Raises:
      ValueError: with others, unless --overwrite is given; then there are none.
    """
    path = run.args.json
    try:
        found = json.loads(as_path(path).read_text(encoding="utf-8"))
        points = found.pop("points")
    except (ValueError, AttributeError, KeyError):
        found, points = {}, None
    keys = [key for key in run.result if key != "versions"]
    different = [f"{k}: {found.get(k)!r} there, {run.result[k]!r} now" for k in keys if found.get(k) != run.result[k]]
    if points is not None and not different:
        return points
    if run.args.overwrite:
        return []
    what = f"is a sweep with other settings ({'; '.join(different)})" if points is not None else "is not a sweep"
    raise ValueError(f"{path} {what}; choose another file or add --overwrite")


def sweep_picture(points: Sequence[dict[str, Any]], title: str):
    """FID over Inception score, a line for each temperature, the points named by their guidance scale, beside the table.

    Args:
      points: with "sampling" and "metrics", as in the JSON of a sweep.

    Returns:
      A PIL image.
    """
    names = list(points[0]["metrics"])
    fid, score = (next(n for n in names if n.removeprefix("digits-").startswith(what)) for what in ("FID", "IS"))
    lines: dict[str, list[tuple[float, float]]] = {}
    scales: dict[str, list[str]] = {}
    for point in points:
        settings, figures = point["sampling"], point["metrics"]
        line = f"temperature {settings['temperature']:g}"
        lines.setdefault(line, []).append((figures[score], figures[fid]))
        scales.setdefault(line, []).append(f"{settings['guidance_scale']:g}")
    shown = [n for n in names if "codebook" not in n and n not in ("perplexity", "entropy_bits")]
    table = [["guidance", "temperature", *shown]]
    for point in points:
        settings = point["sampling"]
        table.append(
            [f"{settings['guidance_scale']:g}", f"{settings['temperature']:g}"]
            + [
                f"{point['metrics'][n]:.2f}" if abs(point["metrics"][n]) >= 1 else f"{point['metrics'][n]:.3f}"
                for n in shown
            ]
        )
    title += "; beside the points: guidance scale"
    curve = pictures.curve(lines, x_label=score, y_label=fid, title=title, names=scales)
    return pictures.beside(curve, pictures.table(table))


def _grid(args: argparse.Namespace, defaults) -> list[dict[str, Any]]:
    """The sampling settings of every point."""
    values = [getattr(args, name) or [None] for name in ("guidance_scale", "temperature")]
    points = []
    for guidance_scale, temperature in itertools.product(*values):
        point = argparse.Namespace(**vars(args) | {"guidance_scale": guidance_scale, "temperature": temperature})
        settings = sampling_settings(point, defaults)
        if settings not in points:
            points.append(settings)
    return points


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    mode = _check(args)
    if args.json:
        # The JSON of a sweep is continued, if it is one of the same settings.
        check_output(args.json, args.overwrite or mode == "sweep")
    if mode == "sweep":
        picture = as_path(args.json).with_suffix(".png")
        if picture == as_path(args.json):
            raise ValueError(f"--json {args.json}: the picture of a sweep would have the same name; choose another ending")
        check_output(picture, args.overwrite or as_path(args.json).exists())
    if args.save_reference:
        check_output(args.save_reference, args.overwrite)
    samples = evaluation.NpzImages(args.samples) if args.samples else None
    if samples is None:  # before JAX is imported
        kind = "tokenizer" if mode in ("reconstruction", "reference") else "generator"
        zoo.find(args.model, None if kind == "tokenizer" and args.model in zoo.names("vqgan") else kind)

    import jax

    from titok_jax import inference, models, sharding

    sharding.start_processes()
    predicts_codes = False
    if samples is not None:
        image_size, grid = samples.size, []
    elif mode in ("reconstruction", "reference"):
        revision = _tokenizer_revision(args, None)
        tokenizer_config, grid = inference.load_image_config(args.tokenizer or args.model, revision=revision), []
        if isinstance(tokenizer_config, models.MaskgitVQGANConfig):
            image_size = tokenizer_config.resolution
        else:
            image_size, predicts_codes = tokenizer_config.image_size, tokenizer_config.predicts_codes
    else:
        revisions = {"revision": args.revision, "tokenizer_revision": args.tokenizer_revision}
        tokenizer_config, config = inference.pair_configs(args.model, args.tokenizer, **revisions)
        image_size, grid = tokenizer_config.image_size, _grid(args, config.sampling)
        predicts_codes = tokenizer_config.predicts_codes
        digits = config.num_classes == NUM_CLASSES and image_size == DIGITS_SIZE
        if not (digits or args.reference):
            raise ValueError(
                f"{args.model} is a model of {config.num_classes} classes of {image_size}x{image_size} pixels, not of "
                "digits; say what to measure: --reference REF, or --reconstruct DATA"
            )
        args.num = args.num or (evaluation.PUBLISHED_NUM if args.reference else 1000)
        if args.num % config.num_classes:
            raise ValueError(
                f"--num is {args.num}, expected a multiple of {config.num_classes}, so that every class has as many"
            )
    if mode != "reference" and predicts_codes:
        raise ValueError("the tokenizer is a stage 1 model, which predicts codes, not images; name one of stage 2")

    with _work_folder(args.json or args.save_reference) as folder:
        work = Work(folder, batch_size=args.batch_size, restart=args.overwrite)
        run = Evaluation(args, mode, image_size, work)
        with jax.default_matmul_precision(MATMUL_PRECISION[args.dtype]):
            if mode == "reconstruction":
                figures = _reconstruction(run)
            elif mode == "samples":
                figures = _samples(run, samples)
            elif mode == "reference":
                figures = run.reference(args.num)
            elif mode == "sweep":
                figures = _sweep(run, grid)
            else:
                print("sampling: " + ", ".join(f"{k} {v}" for k, v in grid[0].items()) + f", seed {args.seed}", flush=True)
                figures = (_digits if mode == "digits" else _generation)(run, grid[0])
        if work.first and mode == "reference":
            figures.save(args.save_reference)
            print(f"wrote {args.save_reference}: statistics of {figures.about['num_images']} images")
        elif work.first and mode != "sweep":
            result = run.result | figures
            _print_table(_rows(result) if mode == "digits" else [(k, f"{v:.4f}") for k, v in figures["metrics"].items()])
            for note in figures.get("notes", ()):
                print(f"note: {note}")
            if args.json:
                _write_json(args.json, result)
                print(f"wrote {args.json}")
        work.remove()


if __name__ == "__main__":
    sys.exit(main())
