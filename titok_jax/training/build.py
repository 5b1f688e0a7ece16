"""From a configuration to its task: the models, the frozen networks and the parameters that a run begins with."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from titok_jax import inference, models
from titok_jax.models.discriminator import DiscriminatorConfig
from titok_jax.models.generator import GeneratorConfig, SamplingConfig
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.perceptual import PerceptualConfig
from titok_jax.models.titok import TiTokConfig, transformer_size
from titok_jax.training.optimizer import constant_decay
from titok_jax.training.tasks import Task, generator, maskgit_vqgan, pixels, single_stage, stage1, stage2
from titok_jax.weights import convert, known_models, pretrained
from titok_jax.weights.perceptual_files import load_perceptual, make_perceptual

_LOSSES = {
    "maskgit_vqgan": maskgit_vqgan.LossConfig,
    "stage1": stage1.LossConfig,
    "stage2": pixels.LossConfig,
    "single_stage": pixels.LossConfig,
}


def build_task(config: ConfigDict, *, abstract: bool = False) -> Task:
    """The task of a configuration, its frozen networks loaded.

    Args:
      abstract: do not load them, nor the parameters that the run begins with: `Task.frozen` is a tree of shapes, and a
        known name means its architecture, which asks no network. For compiling a step without running it.

    Raises:
      ValueError, FileNotFoundError: a bad field, or a frozen network that cannot be loaded.
    """
    fields = config.model.to_dict()
    common = {
        "optimizer": config.optimizer.to_dict(),
        "num_steps": config.num_steps,
        "ema_decay": config.ema_decay if config.ema_ramp else constant_decay(config.ema_decay),
        "compute_dtype": config.compute_dtype,
        "remat": config.remat,
        "gradient_accumulation": config.gradient_accumulation,
    }
    if config.task == "generator":
        tokenizer = None
        if config.tokenizer:
            tokenizer = _load(config.tokenizer, TiTokConfig, abstract)
            fields |= {"num_tokens": tokenizer[0].num_latent_tokens, "codebook_size": tokenizer[0].codebook_size}
        fields["sampling"] = _dataclass(SamplingConfig, fields.get("sampling", {}), "model.sampling")
        model = _dataclass(GeneratorConfig, fields, "model")
        if tokenizer:
            inference.check_pair(tokenizer[0], model)
        loss = _dataclass(generator.LossConfig, config.loss, "loss")
        return generator.make_task(model, loss, tokenizer=tokenizer, start=_start(config, model, abstract), **common)
    if config.task not in _LOSSES:
        raise ValueError(f"config.task is {config.task!r}, expected 'generator' or one of {', '.join(map(repr, _LOSSES))}")

    fields |= {tower: transformer_size(fields[tower]) for tower in ("encoder", "decoder") if tower in fields}
    loss = _dataclass(_LOSSES[config.task], config.loss, "loss")
    if config.task == "stage1":
        model = _dataclass(TiTokConfig, fields, "model")
        return stage1.make_task(
            model,
            loss,
            vqgan=_vqgan(config, abstract),
            start=_start(config, model, abstract),
            restart_codes=config.get("restart_codes", False),
            **common,
        )
    if loss.perceptual != "none":
        if abstract:
            network = make_perceptual(loss.perceptual, models.abstract(PerceptualConfig(loss.perceptual))[1])
        else:
            network = load_perceptual(loss.perceptual, config.get("perceptual_weights", ""))
        common["perceptual"] = network
    if loss.discriminator_weight > 0:
        common["discriminator"] = _dataclass(DiscriminatorConfig, config.discriminator, "discriminator")
        common["discriminator_optimizer"] = config.discriminator_optimizer.to_dict()
    if config.task == "maskgit_vqgan":
        model = _dataclass(MaskgitVQGANConfig, fields, "model")
        return maskgit_vqgan.make_task(model, loss, start=_start(config, model, abstract), **common)
    if config.task == "stage2":
        model, start = _stage2_start(config, fields, abstract)
        return stage2.make_task(model, loss, start=start, **common)
    model = _dataclass(TiTokConfig, fields, "model")
    return single_stage.make_task(
        model, loss, start=_start(config, model, abstract), restart_codes=config.get("restart_codes", False), **common
    )


def check_batch(batch: Mapping[str, np.ndarray], config: ConfigDict, task: Task) -> None:
    """Raises ValueError if the data do not have what the task reads, in the model's size."""
    model = next(iter(task.networks.values())).config
    if isinstance(model, GeneratorConfig) and "tokens" in batch:
        shape, name, expected = batch["tokens"].shape[1:], "tokens", (model.num_tokens,)
        if batch["tokens"].max(initial=0) >= model.codebook_size:
            raise ValueError(f"a token of the data is {batch['tokens'].max()}, the codebook has {model.codebook_size} codes")
    else:
        if "image" not in batch:
            raise ValueError(f"data source {config.data.source.name!r} has no images, and this task needs them")
        if isinstance(model, GeneratorConfig):
            if not config.tokenizer:
                raise ValueError("the data are images: set --config.tokenizer to the tokenizer that makes their tokens")
            size = inference.load_tokenizer_config(config.tokenizer).image_size
        else:
            size = model.image_size
        shape, name, expected = batch["image"].shape[1:], "images", (size, size, 3)
    if tuple(shape) != tuple(expected):
        raise ValueError(f"the data's {name} have shape {list(shape)}, the model takes {list(expected)}: see config.data")
    if isinstance(model, GeneratorConfig) and not 0 <= batch["label"].min() <= batch["label"].max() < model.num_classes:
        raise ValueError(f"labels of the data reach from {batch['label'].min()} to {batch['label'].max()}, "
                         f"the model takes 0 to {model.num_classes - 1}")  # fmt: skip


def _dataclass(cls: type, fields: Mapping[str, Any], name: str) -> Any:
    """`cls(**fields)`; a field that it does not have, or a bad value, is an error that names the section."""
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"config.{name} has unknown fields: {', '.join(sorted(unknown))}")
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.{name}: {error}") from None


def _load(source: str, kind: type, abstract: bool = False) -> tuple[models.Config, convert.Params]:
    """A model with its parameters in the host's memory: they are placed with the rest of the state; or their shapes."""
    if not abstract:
        return pretrained.load(source, kind, place=lambda path, array: array)
    known = {name: config for (_, name), config in known_models.known_configs(kind).items()}
    config = known[source] if source in known else pretrained.load_config(source, kind)
    return config, models.abstract(config)[1]


def _vqgan(config: ConfigDict, abstract: bool = False) -> tuple[MaskgitVQGANConfig, convert.Params]:
    """The MaskGIT-VQGAN `config.vqgan`: a name, folder or file; or "random", of the sizes `config.vqgan_model`, which the
    smoke recipes have, always the same one: to see that a recipe runs."""
    if not config.vqgan:
        raise ValueError("no MaskGIT-VQGAN is set: set --config.vqgan to a name, a folder or a file of it")
    if config.vqgan != "random":
        return _load(config.vqgan, MaskgitVQGANConfig, abstract)
    if "vqgan_model" not in config:
        raise ValueError("config.vqgan: 'random' is for the smoke recipes, expected a name, a folder or a file")
    model = _dataclass(MaskgitVQGANConfig, config.vqgan_model.to_dict(), "vqgan_model")
    if abstract:
        return model, models.abstract(model)[1]
    return model, jax.device_get(jax.jit(functools.partial(models.init, model))(jax.random.key(0)))


def _start(config: ConfigDict, model: models.Config, abstract: bool) -> convert.Params | None:
    """The parameters of `model`, from the model `config.init_from` of the same kind; None if nothing is set."""
    if abstract or not config.get("init_from"):
        return None
    found, params = _load(config.init_from, type(model))
    return _fill(config, model, found, params)


def _stage2_start(config: ConfigDict, fields: dict[str, Any], abstract: bool) -> tuple[TiTokConfig, convert.Params | None]:
    """(the model, the parameters it begins with): from a stage 1 model and a VQGAN, or from a stage 2 model."""
    if not config.init_from and not abstract:
        raise ValueError("stage 2 fine-tunes a stage 1 model: set --config.init_from to it, or to 'random' for a trial")
    if config.init_from == "random" or abstract:
        return _dataclass(TiTokConfig, fields | {"pixel_decoder": _vqgan(config, abstract)[0]}, "model"), None
    found, params = _load(config.init_from, TiTokConfig)
    if found.predicts_codes:
        vqgan, vqgan_params = _vqgan(config)
        params = stage2.from_stage1(params, vqgan_params)
    else:
        vqgan = found.pixel_decoder
    model = _dataclass(TiTokConfig, fields | {"pixel_decoder": vqgan}, "model")
    return model, _fill(config, model, found, params)


def _fill(config: ConfigDict, model: models.Config, found: models.Config, given: convert.Params) -> convert.Params:
    """The parameters of `model`: those of the same name and shape are `given`, the others new; prints which.

    Raises:
      ValueError: less than half of the model would be filled; the message lists the fields that differ.
    """
    given, wanted = convert.flatten(given), convert.flatten(models.abstract(model)[1])
    missing = {path: leaf for path, leaf in wanted.items() if path not in given or given[path].shape != leaf.shape}
    unused = sorted(path for path in given if path not in wanted or path in missing)
    fields = sorted({field.name for field in dataclasses.fields(model)} - {"sampling"})
    different = [
        f"  {name}: {getattr(found, name)!r} there, {getattr(model, name)!r} here"
        for name in fields
        if getattr(found, name) != getattr(model, name)
    ]
    total = sum(leaf.size for leaf in wanted.values())
    filled = 1 - sum(leaf.size for leaf in missing.values()) / total
    if filled < 0.5:
        raise ValueError(
            f"config.init_from: {config.init_from} is another model, {filled:.0%} of the parameters are there:\n"
            + "\n".join(different)
        )
    if jax.process_index() == 0:
        print(f"Starting from {config.init_from}: {filled:.1%} of {total:,} parameters, {len(missing)} arrays not filled")
        print(
            *(f"  new: {path} {list(leaf.shape)}" for path, leaf in sorted(missing.items())),
            sep="\n",
            end="\n" * bool(missing),
        )
        if unused:
            print(f"  not used of it: {', '.join(unused)}")
        if "discriminator_optimizer" in config:
            print("  discriminator: new")
        if different:
            print("  differing fields of the two models:", *different, sep="\n  ")
    if not missing:
        return convert.unflatten({path: given[path] for path in wanted})
    new = jax.device_get(jax.jit(functools.partial(models.init, model))(jax.random.key(config.seed)))
    new = convert.flatten(new)
    return convert.unflatten({path: new[path] if path in missing else given[path] for path in wanted})
