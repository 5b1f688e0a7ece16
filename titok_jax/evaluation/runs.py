"""Runs one evaluation: does the work in pieces, makes the reference and returns the result."""

import argparse
import dataclasses
from typing import Any

import numpy as np

from titok_jax.data.sources import make_source, parse_source
from titok_jax.evaluation import image_sources, pieces, references, scores
from titok_jax.evaluation.digits import DIGITS_SIZE, NEIGHBOURS, NUM_CLASSES, evaluate_digits
from titok_jax.evaluation.jobs import Work, versions
from titok_jax.inference.arguments import precision_settings
from titok_jax.inference.many import balanced_labels
from titok_jax.models.generator import SamplingConfig
from titok_jax.runtime.capacity import check_batch, check_memory, check_space
from titok_jax.runtime.outputs import sha256
from titok_jax.runtime.paths import as_path
from titok_jax.runtime.sharding import local_mesh
from titok_jax.runtime.shards import Shards
from titok_jax.weights.pretrained import weights_sha256


class Evaluation:
    """One run of the command, with everything that its modes share.

    Attributes:
      result: the entries of the JSON file that are common to all modes.
    """

    def __init__(self, args: argparse.Namespace, mode: str, image_size: int, work: Work):
        from titok_jax.evaluation import features

        self.args, self.work, self.image_size = args, work, image_size
        kind = args.features or _default_features(args, mode)
        batch_size = min(args.batch_size, 1024)  # every batch of features is filled up to it
        if kind == "digits":
            if image_size != DIGITS_SIZE:
                raise ValueError(
                    f"--features digits is for {DIGITS_SIZE}x{DIGITS_SIZE} pixels, not {image_size}x{image_size}"
                )
            self.network = features.load_digits_features(batch_size=batch_size)
        elif kind == "none":
            self.network = None
        else:
            self.network = features.load_inception(args.inception, batch_size=batch_size)
        self.prefix = "digits-" if kind == "digits" else ""
        if mode in ("digits", "generation", "sweep"):
            self._check_capacity(mode)
        tokenizer = None if mode in ("samples", "reference") else args.tokenizer or args.model
        generator = args.model if mode in ("digits", "generation", "sweep") else None
        weights = weights_sha256(generator, tokenizer, args.revision, tokenizer_revision(args, generator))
        self.precision = precision_settings(args)
        name = self.network.name if self.network else "none"
        self.identity = {"features": name, **self.precision, **weights}
        digests = {"inception": features.INCEPTION_SHA256, "digits": sha256(features.DIGITS_WEIGHTS), "none": None}
        self.result: dict[str, Any] = {"mode": mode}
        if tokenizer is not None:
            self.result |= {"model": args.model, "tokenizer": str(tokenizer)}
            self.result["sha256"] = {k: v for k, v in self.identity.items() if k in ("generator", "tokenizer")}
        self.result |= {
            "features": {"network": name, "sha256": digests[kind]},
            "image_size": image_size,
            "batch_size": args.batch_size,
            **self.precision,
            "versions": versions(),
        }
        if mode == "sweep":  # common to all points
            self.result |= {"seed": args.seed, "num_images": args.num, "reference_given": args.reference or "digits:train"}

    def _check_capacity(self, mode: str) -> None:
        """Raises ValueError if the machine cannot hold what is kept of the generated images: features, of which one kind is
        in memory at once, and for the figures of digits the images too."""
        args, network, what = self.args, self.network, f"--num {self.args.num}"
        check_batch(min(args.batch_size, args.num), self.image_size, f"--batch-size {args.batch_size}")
        images = 3 * self.image_size**2 if mode == "digits" else 0
        values = network.dim + (network.spatial_dim or 0) + network.num_classes
        check_memory(args.num * (4 * network.dim + images), what)
        check_space(self.work.folder, args.num * (4 * values + images), what)

    def images(self, data: str, crop: str, num: int | None = None) -> image_sources.SourceImages:
        source = make_source(parse_source(data))
        images = image_sources.SourceImages(source, crop, self.image_size, num, skip=self.args.skip_unreadable)
        self.say_left_out(images)
        return images

    def say_left_out(self, images: image_sources.SourceImages) -> None:
        """Prints which images were left out because they cannot be read."""
        if self.work.first and images.left_out is not None:
            reasons = "".join(f"\n  {reason}" for reason in images.left_out)
            print(f"left out: {len(images.left_out)} images that cannot be read; {len(images)} remain{reasons}", flush=True)

    def reference(self, num: int | None = None) -> references.Reference | None:
        """Makes the reference that --reference names, by default the digits. Returns None on all processes but the first."""
        text = self.args.reference or "digits:train"
        about: dict[str, Any] = {"source": text, "image_size": self.image_size}
        adm = None
        if text.endswith(".npz"):
            found = references.read_reference(text, self.network.name, self.image_size)
            about["sha256"] = sha256(text)
            if isinstance(found, references.Reference):
                return dataclasses.replace(found, about=found.about | {"file": text, "sha256": about["sha256"]})
            images = adm = found
        else:
            about["crop"] = "adm"
            images = self.images(text, "adm", num)
            about |= {} if images.left_out is None else {"left_out": len(images.left_out)}
        job = self.work.job("reference", len(images), about | {"features": self.identity["features"]})
        self.work.make(job, pieces.image_pieces(job, images, self.network))
        return references.make_reference(job, self.network.name, about, adm) if job.first else None

    def load_pair(self):
        from titok_jax.inference.loading import load_pair

        args = self.args
        revisions = {"revision": args.revision, "tokenizer_revision": args.tokenizer_revision}
        return load_pair(args.model, args.tokenizer, mesh="local", **self.precision, **revisions)

    def generate(self, name: str, pair, labels: np.ndarray, settings: SamplingConfig) -> Shards:
        """Generates images and returns their pieces."""
        job = self.work.job(name, len(labels), self.identity | dataclasses.asdict(settings) | {"seed": self.args.seed})
        options = (self.network, labels, self.args.seed, settings)
        self.work.make(job, pieces.generation_pieces(job, *pair, *options))
        return job


def _default_features(args: argparse.Namespace, mode: str) -> str:
    """The kind of features that fits what is compared."""
    from titok_jax.evaluation import features

    data = args.reconstruct or args.reference or ("digits:" if mode in ("digits", "sweep") else "")
    saved = references.saved_network(data) if data.endswith(".npz") else ""
    return "digits" if data.startswith("digits:") or saved == features.DIGITS else "inception"


def _left_out(images: image_sources.SourceImages) -> dict[str, list[str]]:
    return {} if images.left_out is None else {"left_out": images.left_out}


def tokenizer_revision(args: argparse.Namespace, generator: str | None) -> str | None:
    """The revision for `load_tokenizer`. Without a generator, --model is the tokenizer."""
    return args.tokenizer_revision if generator or args.tokenizer else args.revision


def check_generator(args: argparse.Namespace, image_size: int, num_classes: int) -> None:
    """Sets `args.num`, the number of images to generate, if it is not given.

    Raises:
      ValueError: if the model is not a digits model and there is no reference, or if the number of images is not a multiple
        of the number of classes.
    """
    if not (args.reference or (num_classes == NUM_CLASSES and image_size == DIGITS_SIZE)):
        raise ValueError(
            f"{args.model} is a model of {num_classes} classes of {image_size}x{image_size} pixels, not of "
            "digits; say what to measure: --reference REF, or --reconstruct DATA"
        )
    args.num = args.num or (scores.PUBLISHED_NUM if args.reference else 1000)
    if args.num % num_classes:
        raise ValueError(f"--num is {args.num}, expected a multiple of {num_classes}, so that every class has as many")


def run_digits(run: Evaluation, settings: SamplingConfig) -> dict[str, Any] | None:
    options = {"num": run.args.num, "seed": run.args.seed, "settings": settings, "identity": run.identity}
    figures = evaluate_digits(*run.load_pair(), run.network, run.work, **options)
    if figures is None:
        return None
    classifier = {"kind": "k nearest neighbours of pixels", "k": NEIGHBOURS, "fitted_on": "real training digits"}
    return {**figures, "classifier": classifier, "sampling": dataclasses.asdict(settings), "seed": run.args.seed}


def run_reconstruction(run: Evaluation) -> dict[str, Any] | None:
    from titok_jax import inference

    args = run.args
    images = run.images(args.reconstruct, "torchvision", args.num)
    about = {"data": args.reconstruct, "crop": "torchvision", "rounding": "round(x * 255)"} | _left_out(images)
    lpips = None
    if args.lpips:
        from titok_jax.evaluation.features import load_lpips
        from titok_jax.weights.perceptual_files import HEADS_FILE, VGG_FILE

        lpips = load_lpips(args.lpips, mesh=local_mesh())
        names = [file.stem + ending for file in (VGG_FILE, HEADS_FILE) for ending in (".safetensors", ".pth")]
        files = [as_path(args.lpips) / name for name in names]
        about["lpips_sha256"] = {file.name: sha256(file) for file in files if file.is_file()}

    source, revision = args.tokenizer or args.model, tokenizer_revision(args, None)
    tokenizer = inference.load_image_model(source, mesh="local", revision=revision, **run.precision)
    if not tokenizer.config.has_tokens:
        about["latents"] = args.latents or "sample"
        about |= {"seed": args.seed} if about["latents"] == "sample" else {}
    elif args.latents:
        raise ValueError(f"--latents is for VAEs; the tokens of {source} are not drawn")
    job = run.work.job("reconstruction", len(images), run.identity | about)
    options = {"lpips": lpips, "key": about.get("seed")}
    run.work.make(job, pieces.reconstruction_pieces(job, images, tokenizer, run.network, **options))
    if not job.first:
        return None
    codebook_size = tokenizer.config.codebook_size if tokenizer.config.has_tokens else None
    network = run.network and run.network.name
    figures = scores.reconstruction_figures(job, network, codebook_size, run.prefix)
    return {**about, "num_images": len(images), "metrics": figures}


def run_samples(run: Evaluation, images: image_sources.NpzImages | image_sources.SourceImages) -> dict[str, Any] | None:
    about: dict[str, Any] = {"samples": run.args.samples}
    if isinstance(images, image_sources.SourceImages):
        about |= {"samples_digest": images.digest} | _left_out(images)
        run.say_left_out(images)
    else:
        about["samples_sha256"] = sha256(run.args.samples)
    reference = run.reference()
    job = run.work.job("samples", len(images), about | {"features": run.identity["features"]})
    run.work.make(job, pieces.image_pieces(job, images, run.network))
    if not job.first:
        return None
    figures = scores.generation_figures(job, reference, run.prefix)
    result = {**about, "num_images": len(images), "reference": reference.about, "metrics": figures}
    if images.sorted_by_class and len(images) > scores.ADM_SPLIT:
        result["notes"] = [
            f"the samples are sorted by class, and the Inception score is a mean over chunks of {scores.ADM_SPLIT:,} "
            "images in their order: it is less than that of samples whose classes take turns, as in published figures"
        ]
    return result


def run_generation(run: Evaluation, settings: SamplingConfig) -> dict[str, Any] | None:
    reference, pair = run.reference(), run.load_pair()
    generator = pair[1].config
    labels = balanced_labels(range(generator.num_classes), run.args.num)
    job = run.generate("generated", pair, labels, settings)
    if not job.first:
        return None
    figures = scores.generation_figures(job, reference, run.prefix)
    figures |= scores.codebook_figures(job, generator.codebook_size)
    return {
        "sampling": dataclasses.asdict(settings),
        "seed": run.args.seed,
        "num_images": run.args.num,
        "reference": reference.about,
        "metrics": figures,
    }
