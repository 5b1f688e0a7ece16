"""Builds the task of a training from its settings. Loads the frozen networks and the initial parameters."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.perceptual import PerceptualConfig
from titok_jax.models.titok import TiTokConfig
from titok_jax.runtime import sharding
from titok_jax.runtime.capacity import check_memory
from titok_jax.training.settings import Settings, load_model_config, vqgan_config
from titok_jax.training.tasks import generator, maskgit_vqgan, single_stage, stage1, stage2
from titok_jax.training.tasks.base import Task
from titok_jax.weights import convert, pretrained
from titok_jax.weights.perceptual_files import Perceptual, load_perceptual, make_perceptual


def build_task(settings: Settings, *, abstract: bool = False) -> Task:
    """Builds the task of a training and loads its frozen networks.

    Args:
      abstract: load neither the frozen networks nor the initial parameters. `Task.frozen` is then a tree of shapes. A known
        model name gives its published architecture without network access. For compiling a step without running it.

    Raises:
      ValueError, FileNotFoundError: if a network does not fit or cannot be loaded.
    """
    options = {
        "optimizer": settings.optimizer,
        "num_steps": settings.num_steps,
        "ema_decay": settings.ema_schedule,
        "compute_dtype": settings.compute_dtype,
        "remat": settings.remat,
        "scan_layers": settings.scan_layers,
        "gradient_accumulation": settings.gradient_accumulation,
        "restart_codes": settings.restart_codes,
        "log_grad_norms": settings.log_grad_norms,
        "start": None if abstract else _start(settings),
    }
    model, loss = settings.model, settings.loss
    if settings.task == "generator":
        tokenizer = _load("tokenizer", settings.tokenizer, TiTokConfig, abstract) if settings.tokenizer else None
        return generator.make_task(model, loss, tokenizer=tokenizer, token_precision=settings.token_precision, **options)
    if settings.task == "stage1":
        vqgan = _vqgan(settings, abstract)
        return stage1.make_task(model, loss, vqgan=vqgan, token_precision=settings.token_precision, **options)
    options |= {
        "perceptual": _perceptual(settings, abstract),
        "discriminator": settings.discriminator,
        "discriminator_optimizer": settings.discriminator_optimizer,
        "discriminator_dtype": settings.discriminator_dtype,
    }
    kinds = {"maskgit_vqgan": maskgit_vqgan, "stage2": stage2, "single_stage": single_stage}
    return kinds[settings.task].make_task(model, loss, **options)


def check_capacity(settings: Settings, task: Task, mesh: Mesh) -> None:
    """Checks that the devices of this process can hold its part of a training, by the least that it needs.

    Raises:
      ValueError: they cannot.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # unknown for CPUs
    memory = None if limit is None else limit * jax.local_device_count()
    trained = (network.trainable(network.abstract) for network in task.networks.values())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(list(trained)))
    processes = jax.process_count()
    shards = min(mesh.shape["fsdp"] * mesh.shape["tensor"], processes)
    moments = 2 * parameters // (processes if settings.mesh.shard_optimizer else shards)
    check_memory(4 * (parameters // shards + moments), f"a model of {parameters:,} parameters, with AdamW,", memory)

    batch, size = settings.data.batch_size, settings.image_size or 0
    part = sharding.batch_part(mesh)
    what, rows = f"config.data.batch_size={batch}", batch * len(part["blocks"]) // part["num_blocks"]
    check_memory(3 * rows * size**2, what)  # as uint8, not on the devices
    values = 3 * size**2
    if settings.task == "generator":
        values += settings.model.num_tokens * settings.model.codebook_size  # logits
    check_memory(4 * rows * values // settings.gradient_accumulation, what, memory)


def _load(field: str, source: str, kind: type, abstract: bool = False) -> tuple[models.Config, convert.Params]:
    """Loads the model that a field of the recipe names, with its parameters, or their shapes if `abstract`. The parameters
    stay in host memory; they are moved to the devices with the rest of the state."""
    if not abstract:
        return pretrained.load(source, kind, place=lambda path, array: array)
    config = load_model_config(field, source, kind, abstract=True)
    return config, models.abstract(config)[1]


def _vqgan(settings: Settings, abstract: bool = False) -> tuple[MaskgitVQGANConfig, convert.Params]:
    """The MaskGIT-VQGAN with its parameters. A "random" one, for testing that a recipe runs, is always the same."""
    config = vqgan_config(settings, abstract=abstract)
    if settings.vqgan != "random":
        return _load("vqgan", settings.vqgan, MaskgitVQGANConfig, abstract)
    if abstract:
        return config, models.abstract(config)[1]
    return config, _new_params(config, jax.random.key(0))


def _perceptual(settings: Settings, abstract: bool) -> Perceptual | None:
    """The perceptual network that the loss names."""
    name = settings.loss.perceptual
    if name == "none":
        return None
    if abstract:
        return make_perceptual(name, models.abstract(PerceptualConfig(name))[1])
    return load_perceptual(name, settings.perceptual_weights)


def _new_params(config: models.Config, key: jax.Array) -> convert.Params:
    """New parameters in host memory."""
    return jax.device_get(jax.jit(functools.partial(models.init, config))(key))


def _start(settings: Settings) -> convert.Params | None:
    """The model's initial parameters from `config.init_from`, or None if all are new.

    A stage 2 model starts from a stage 1 model and the VQGAN, or from a stage 2 model.
    """
    if not settings.init_from or settings.init_from == "random":
        return None
    found, params = _load("init_from", settings.init_from, type(settings.model))
    if settings.task == "stage2" and found.predicts_codes:
        params = stage2.from_stage1(params, _vqgan(settings)[1])
    return _fill(settings, found, params)


def _fill(settings: Settings, found: models.Config, given: convert.Params) -> convert.Params:
    """Fills the model's parameters: takes those with the same name and shape from `given` and makes the others new. Prints
    which are new.

    Raises:
      ValueError: if less than half of the model would be filled. The message lists the fields that differ.
    """
    model = settings.model
    given, wanted = convert.flatten(given), convert.flatten(models.abstract(model)[1])
    missing = {path: leaf for path, leaf in wanted.items() if path not in given or given[path].shape != leaf.shape}
    different = _different_fields(found, model)
    total = sum(leaf.size for leaf in wanted.values())
    filled = 1 - sum(leaf.size for leaf in missing.values()) / total
    if filled < 0.5:
        raise ValueError(
            f"config.init_from: {settings.init_from} is another model, {filled:.0%} of the parameters are there:\n"
            + "\n".join(different)
        )
    if jax.process_index() == 0:
        print(f"Starting from {settings.init_from}: {filled:.1%} of {total:,} parameters, {len(missing)} arrays not filled")
        for path, leaf in sorted(missing.items()):
            print(f"  new: {path} {list(leaf.shape)}")
        unused = sorted(path for path in given if path not in wanted or path in missing)
        if unused:
            print(f"  not used of it: {', '.join(unused)}")
        if "discriminator_optimizer" in settings.given:
            print("  discriminator: new")
        if different:
            print("  differing fields of the two models:", *different, sep="\n  ")
    if not missing:
        return convert.unflatten({path: given[path] for path in wanted})
    new = convert.flatten(_new_params(model, jax.random.key(settings.seed)))
    return convert.unflatten({path: new[path] if path in missing else given[path] for path in wanted})


def _different_fields(found: models.Config, model: models.Config) -> list[str]:
    """One line for each field that differs between two configurations of the same class."""
    fields = sorted({field.name for field in dataclasses.fields(model)} - {"sampling"})
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(found, name), getattr(model, name)) for name in fields]
    return [f"  {name}: {theirs!r} there, {ours!r} here" for name, theirs, ours in pairs if theirs != ours]
