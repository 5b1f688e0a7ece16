"""Parses a recipe's ConfigDict once into frozen dataclasses. No other module of the package uses a ConfigDict after that.

Every configuration error that can be found without the data and the weights is raised here.
"""

import dataclasses
import functools
import json
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from titok_jax import models
from titok_jax.data import workers
from titok_jax.data.checked import CheckedSource, Limits
from titok_jax.data.sources import make_source
from titok_jax.inference import check_pair
from titok_jax.inference.functions import PRECISIONS
from titok_jax.models.discriminator import DiscriminatorConfig
from titok_jax.models.generator import GeneratorConfig, SamplingConfig
from titok_jax.models.layers import check_remat
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.titok import TiTokConfig, transformer_size
from titok_jax.runtime.arguments import MOST_THREADS
from titok_jax.training.optimizer import OptimizerConfig, constant_decay
from titok_jax.training.tasks import generator, maskgit_vqgan, pixels, stage1
from titok_jax.weights import known_models, pretrained

LossConfig = generator.LossConfig | maskgit_vqgan.LossConfig | stage1.LossConfig | pixels.LossConfig
LOSSES: dict[str, type] = {
    "generator": generator.LossConfig,
    "maskgit_vqgan": maskgit_vqgan.LossConfig,
    "stage1": stage1.LossConfig,
    "stage2": pixels.LossConfig,
    "single_stage": pixels.LossConfig,
}


# The limits of the numbers in a recipe, from the least to the most, by the names of their fields. `_check_number` has the
# limits of all others. Sizes of models have further ones, which their classes check.
_COUNT = (1, 2**31 - 1)  # steps are int32
_COUNTS = ("num_steps", "log_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite_steps", "eval_images")
_SHARES = ("ema_decay", "beta1", "beta2", "label_smoothing", "lecam_decay")
_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS, _COUNT),
    **dict.fromkeys(("batch_size", "gradient_accumulation"), (1, 1_000_000)),
    **dict.fromkeys(("preview_images", "preview_columns"), (1, 10_000)),
    **dict.fromkeys(("num_workers", "num_threads"), (0, MOST_THREADS)),
    "read_ahead_mib": (1, 1_000_000),
    **dict.fromkeys(_SHARES, (0, 1)),
    **dict.fromkeys(("data", "fsdp", "tensor", "dcn_data"), (-1, 1_000_000)),
    "watchdog_minutes": (0, 100_000),
    "compile_effort": (-1, 1),
    "seed": (0, 2**32 - 1),
    "entropy_temperature": (1e-6, 1_000_000),
    "max_grad_norm": (0, math.inf),  # infinite: gradients are not clipped
}


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data and how batches are made from them.

    Attributes:
      source, eval_source: arguments for `sources.make_source`. Without eval_source, no data are held out.
      transform: argument for `transforms.make_train_transform`, or None for no transform.
      eval_transform: argument for `transforms.make_eval_transform`, or None for no transform.
      batch_size: global batch size.
      num_workers, num_threads: how many workers and threads prepare batches in each process.
      read_ahead_mib: the memory in MiB of the examples that they read ahead in each process, over the batch that is put
        together. An evaluation reads ahead as much again while it runs.
    """

    source: Mapping[str, Any]
    batch_size: int
    num_workers: int
    num_threads: int
    eval_source: Mapping[str, Any] | None = None
    transform: Mapping[str, Any] | None = None
    eval_transform: Mapping[str, Any] | None = None
    read_ahead_mib: int = 1024


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the mesh axes. One of the first three may be -1; it then takes all remaining devices. `dcn_data` is the
    number of TPU slices; -1 takes as many as there are. `shard_optimizer`: also shard optimizer states and averages along
    data."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = -1
    shard_optimizer: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of `titok_jax.runtime.sharding.make_mesh`."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "dcn_data": self.dcn_data}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a training.

    Attributes:
      task: the kind of training.
      seed: determines all random numbers.
      num_steps: number of steps.
      model: the complete model configuration, including values from the tokenizer, the VQGAN or the initial model.
      image_size: side of the training images in pixels; None if the training uses only tokens.
      loss: weights of the loss terms.
      discriminator, discriminator_optimizer: None if the loss has no adversarial term.
      tokenizer, vqgan, perceptual_weights, init_from: names, folders or files of networks to load; "" for none.
      vqgan_model: sizes of a VQGAN with random weights, used by the smoke recipes.
      ema_decay, ema_ramp: decay of the parameter averages. With ema_ramp, it follows the published ramp up to ema_decay;
        otherwise it is ema_decay at every step.
      compute_dtype, discriminator_dtype, remat, scan_layers, gradient_accumulation, restart_codes, log_grad_norms: as in
        `TaskOptions`. Recipes may also write remat as True (full) or False (none), as older ones do. They write scan_layers
        as "auto" (None), True or False.
      token_precision: precision of the matrix products of the frozen network that makes tokens or codes from images, as in
        `titok_jax.inference.functions`.
      log_every, checkpoint_every, eval_every, preview_every: intervals in steps. eval_every and preview_every may be 0 for
        never.
      keep_checkpoints: how many of the newest checkpoints are kept.
      max_nonfinite_steps: the training stops after this many non-finite steps in a row.
      compile_effort: what a TPU's compiler puts into the speed of the programs, from -1 to 1.
      watchdog_minutes: a run whose step takes longer ends with the stacks of its threads, see `Watchdog`; 0 for no watch.
      eval_images: number of held-out examples to evaluate.
      preview_images, preview_columns: number of preview images, and images per row.
      recipe: values of the recipe that belong together. A training that changes one prints a warning.
      scale_with_batch: whether values of the recipe follow the batch size (`batch_scaling`).
      scaled: which of them did, as lines to print.
      given: the full configuration in JSON types; checkpoints store it.
      text: the full configuration in readable form.
    """

    task: str
    seed: int
    num_steps: int
    data: DataSettings
    mesh: MeshSettings
    model: models.Config
    image_size: int | None
    loss: LossConfig
    optimizer: OptimizerConfig
    ema_decay: float
    ema_ramp: bool
    compute_dtype: str
    remat: str
    gradient_accumulation: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    eval_every: int
    eval_images: int
    max_nonfinite_steps: int
    preview_every: int
    preview_images: int
    preview_columns: int
    recipe: Mapping[str, Any]
    given: Mapping[str, Any]
    text: str
    discriminator: DiscriminatorConfig | None = None
    discriminator_optimizer: OptimizerConfig | None = None
    tokenizer: str = ""
    vqgan: str = ""
    vqgan_model: MaskgitVQGANConfig | None = None
    perceptual_weights: str = ""
    init_from: str = ""
    restart_codes: bool = False
    log_grad_norms: bool = False
    compile_effort: float = 0.0
    scan_layers: bool | None = None
    watchdog_minutes: float = 30.0
    token_precision: str = "highest"
    discriminator_dtype: str = "float32"
    scale_with_batch: bool = False
    scaled: tuple[str, ...] = ()

    def __post_init__(self):
        if self.token_precision not in PRECISIONS:
            raise ValueError(f"config.token_precision is {self.token_precision!r}, expected one of {PRECISIONS}")
        object.__setattr__(self, "remat", {"True": "full", "False": "none"}.get(str(self.remat), self.remat))
        check_remat(self.remat, "config.remat")
        forms = {"auto": None, "None": None, "True": True, "False": False}
        if str(self.scan_layers) not in forms:
            raise ValueError(f"config.scan_layers is {self.scan_layers!r}, expected 'auto', True or False")
        object.__setattr__(self, "scan_layers", forms[str(self.scan_layers)])

    @property
    def ema_schedule(self) -> float | Callable[[jax.Array], jax.Array]:
        """The decay of the averages, in the format of `TaskOptions.ema_decay`."""
        return self.ema_decay if self.ema_ramp else constant_decay(self.ema_decay)


def parse_settings(config: ConfigDict, *, abstract: bool = False) -> Settings:
    """Parses a recipe.

    Args:
      abstract: do not access the network. A known model name gives its published configuration. For compiling a step
        without running it.

    Raises:
      ValueError: for a bad field; the message names it.
      FileNotFoundError, DownloadError, WeightsError: if a model that the recipe names is missing or unreadable.
    """
    fields = config.to_dict()
    scaled = tuple(fields.get("recipe", {}).pop("scaled", ()))  # lines to print, no part of the configuration
    config = ConfigDict(fields)
    as_json = {"given": json.loads(config.to_json()), "text": str(config), "scaled": scaled}
    task = fields.get("task")
    if task not in LOSSES:
        others = ", ".join(repr(name) for name in LOSSES if name != "generator")
        raise ValueError(f"config.task is {task!r}, expected 'generator' or one of {others}")
    loss = section(LOSSES[task], fields.pop("loss"), "loss")
    vqgan_model = fields.pop("vqgan_model", None)
    parsed = {
        "loss": loss,
        "data": section(DataSettings, fields.pop("data"), "data"),
        "mesh": section(MeshSettings, fields.pop("mesh"), "mesh"),
        "optimizer": section(OptimizerConfig, fields.pop("optimizer"), "optimizer"),
        "vqgan_model": None if vqgan_model is None else section(MaskgitVQGANConfig, vqgan_model, "vqgan_model"),
    }
    sections = {"discriminator": DiscriminatorConfig, "discriminator_optimizer": OptimizerConfig}
    given = {name: fields.pop(name) for name in sections if name in fields}
    if getattr(loss, "discriminator_weight", 0) > 0:
        parsed |= {name: section(sections[name], value, name) for name, value in given.items()}
    as_json |= {"recipe": fields.pop("recipe", {})}
    model = fields.pop("model")
    incomplete = functools.partial(Settings, model=None, image_size=None)
    settings = section(incomplete, fields | parsed | as_json, "", Settings)
    model, image_size = _model(settings, model, abstract)
    if settings.init_from not in ("", "random") and not abstract:  # another kind of model is refused before any is read
        load_model_config("init_from", settings.init_from, type(model))
    settings = dataclasses.replace(settings, model=model, image_size=image_size)
    _check_sizes(settings)
    _check_read_ahead(settings)
    return settings


def section(make: Callable, fields: Mapping[str, Any], name: str, cls: type | None = None) -> Any:
    """Returns `make(**fields)`.

    Args:
      cls: the dataclass that `make` returns, if `make` is not a dataclass itself.

    Raises:
      ValueError: for an unknown field or a bad value; the message names the section.
    """
    where = f"config.{name}" if name else "config"
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls or make)}
    if unknown:
        raise ValueError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    for field in dataclasses.fields(cls or make):
        if field.name in fields and field.type in (int, float):
            _check_number(f"{where}.{field.name}", fields[field.name], field.type)
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        if str(error).startswith("config."):
            raise
        raise ValueError(f"{where}: {error}") from None


def _check_number(name: str, value: Any, kind: type) -> None:
    least, most = _LIMITS.get(name.rpartition(".")[2], (0, 2**31 - 1 if kind is int else 10_000_000))
    is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # also of NaN
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {repr(value)[:80]}, expected {what} from {least:,} to {most:,}")


def load_model_config(field: str, source: str, kind: type, *, abstract: bool = False) -> models.Config:
    """The configuration of a model that a recipe names.

    Args:
      field: the field of the recipe that names it, for error messages.
      abstract: as in `parse_settings`.
    """
    if abstract:
        known = {name: config for (_, name), config in known_models.known_configs(kind).items()}
        if source in known:
            return known[source]
    try:
        return pretrained.load_config(source, kind)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"config.{field}: {error}") from None


def vqgan_config(settings: Settings, *, abstract: bool = False) -> MaskgitVQGANConfig:
    """The configuration of the MaskGIT-VQGAN that `config.vqgan` names: a name, folder or file, or "random" (smoke recipes).

    Raises:
      ValueError: if none is set, or if it is "random" without sizes.
    """
    if not settings.vqgan:
        raise ValueError("no MaskGIT-VQGAN is set: set --config.vqgan to a name, a folder or a file of it")
    if settings.vqgan != "random":
        return load_model_config("vqgan", settings.vqgan, MaskgitVQGANConfig, abstract=abstract)
    if settings.vqgan_model is None:
        raise ValueError("config.vqgan: 'random' is for the smoke recipes, expected a name, a folder or a file")
    return settings.vqgan_model


def _model(settings: Settings, fields: dict[str, Any], abstract: bool) -> tuple[models.Config, int | None]:
    """Returns (the complete model configuration, the side of the training images or None if there are only tokens)."""
    name = fields.pop("family", None)
    cls = _model_class(settings.task, name)
    if settings.task == "maskgit_vqgan":
        vqgan = section(cls, fields, "model")
        return vqgan, vqgan.image_size
    if settings.task == "generator":
        tokenizer = None
        if settings.tokenizer:
            tokenizer = load_model_config("tokenizer", settings.tokenizer, TiTokConfig, abstract=abstract)
            if not tokenizer.has_tokens:
                raise ValueError(f"config.tokenizer: {settings.tokenizer} is a VAE, which has no token ids")
            for name, own in (("num_tokens", tokenizer.num_latent_tokens), ("codebook_size", tokenizer.codebook_size)):
                fields[name] = fields.get(name) or own  # 0 or absent: the tokenizer's
                if fields[name] != own:
                    raise ValueError(
                        f"config.model.{name} is {fields[name]}, but the tokenizer {settings.tokenizer} has {own}: take the "
                        f"recipe of this tokenizer, whose sampling settings fit it too, or set --config.model.{name}={own}"
                    )
        fields["sampling"] = section(SamplingConfig, fields.get("sampling", {}), "model.sampling")
        model = section(cls, fields, "model")
        if tokenizer:
            check_pair(tokenizer, model)
        return model, tokenizer.image_size if tokenizer else None
    towers = [name for name in ("encoder", "decoder") if name in fields]
    fields |= {name: transformer_size(fields[name], f"config.model.{name}") for name in towers}
    if settings.task == "stage2":
        fields["pixel_decoder"] = _pixel_decoder(settings, abstract)
    model = section(cls, fields, "model")
    return model, model.image_size


def _model_class(task: str, family: str | None) -> type:
    """The class of the model's configuration: the published one, or that of the family that `config.model.family` names."""
    published = {"generator": GeneratorConfig, "maskgit_vqgan": MaskgitVQGANConfig}.get(task, TiTokConfig)
    if family is None:
        return published
    try:
        cls = models.family_named(family).config
    except ValueError as error:
        raise ValueError(f"config.model.family: {error}") from None
    if not issubclass(cls, published):
        raise ValueError(f"config.model.family is {family!r}, but the task {task!r} trains a {published.__name__}")
    return cls


def _pixel_decoder(settings: Settings, abstract: bool) -> MaskgitVQGANConfig:
    """The configuration of stage 2's pixel decoder. It comes from `init_from` if that is a stage 2 model, else from the
    VQGAN."""
    if not settings.init_from and not abstract:
        raise ValueError("stage 2 fine-tunes a stage 1 model: set --config.init_from to it, or to 'random' for a trial")
    if settings.init_from != "random" and not abstract:
        found = load_model_config("init_from", settings.init_from, TiTokConfig)
        if not found.predicts_codes:
            return found.pixel_decoder
    return vqgan_config(settings, abstract=abstract)


def _check_sizes(settings: Settings) -> None:
    """Raises ValueError if the crop size differs from the model's image size, or is larger than the resized image."""
    expected, data = settings.image_size, settings.data
    if expected is None:
        return
    for name, transform in (("transform", data.transform), ("eval_transform", data.eval_transform)):
        for option in ("crop_size", "size"):
            if not transform or option not in transform:
                continue
            found = f"config.data.{name}.{option} is {transform[option]}"
            if transform[option] != expected:
                raise ValueError(f"{found}, but the model takes images of {expected} x {expected} pixels")
            edge = transform.get("resize_shorter_edge") or expected
            if not isinstance(edge, int) or not expected <= edge <= 8192:
                raise ValueError(f"{found}, but resize_shorter_edge beside it is {edge!r}, expected {expected} to 8,192")


def read_ahead(settings: Settings, spec: Mapping[str, Any]) -> int:
    """How many examples of a data source may be read ahead in each process, by `data.read_ahead_mib`."""
    return settings.data.read_ahead_mib * 2**20 // _example_bytes(settings, spec)


def _example_bytes(settings: Settings, spec: Mapping[str, Any]) -> int:
    """The memory of an example in a batch: its image, or its tokens of 4 bytes, and up to 16 bytes of label and marks."""
    if settings.image_size is None or spec.get("name") == "tokens":
        return 4 * settings.model.num_tokens + 16
    return 3 * settings.image_size**2 + 16


def _check_read_ahead(settings: Settings) -> None:
    """Raises ValueError if `data.read_ahead_mib` is too small for the workers and threads."""
    data = settings.data
    for spec, num_workers in ((data.source, data.num_workers), (data.eval_source, 0)):
        least = workers.parts_ahead(num_workers, data.num_threads)
        if spec and read_ahead(settings, spec) < least:
            size, readers = _example_bytes(settings, spec), workers.named(num_workers, data.num_threads)
            raise ValueError(
                f"config.data.read_ahead_mib is {data.read_ahead_mib}, expected at least {-(-least * size // 2**20)}, which "
                f"is {least} examples of {size / 1024:,.1f} KiB, the least for {readers}; or set fewer "
                "config.data.num_workers or config.data.num_threads"
            )


def open_source(spec: Mapping[str, Any], settings: Settings, flag: str = "", *, replace: bool = False) -> CheckedSource:
    """Opens a data source of a training. Each example is checked as it is read: the labels and tokens that the model reads.
    With `replace`, the next image takes the place of one that cannot be decoded. Damaged tokens are always an error.

    Raises:
      ValueError, FileNotFoundError: as `sources.make_source`.
    """
    model, limits = settings.model, Limits()
    if settings.task == "generator":
        limits = Limits(model.num_classes, model.num_tokens, model.codebook_size)
    return CheckedSource(make_source(spec, flag), limits, replace=replace and spec["name"] != "tokens")


def check_batch(batch: Mapping[str, np.ndarray], settings: Settings) -> None:
    """Raises ValueError if a batch lacks what the task reads, or if its shapes do not fit the model. (Labels and tokens are
    checked one by one as they are read, see `open_source`.)"""
    model = settings.model
    if settings.task == "generator" and "tokens" in batch:
        shape, name, expected = batch["tokens"].shape[1:], "tokens", (model.num_tokens,)
    else:
        if "image" not in batch:
            raise ValueError(f"data source {settings.data.source['name']!r} has no images, and this task needs them")
        if settings.image_size is None:
            raise ValueError("the data are images: set --config.tokenizer to the tokenizer that makes their tokens")
        shape, name, expected = batch["image"].shape[1:], "images", (settings.image_size, settings.image_size, 3)
    if tuple(shape) != tuple(expected):
        raise ValueError(f"the data's {name} have shape {list(shape)}, the model takes {list(expected)}: see config.data")
