"""The model families: one entry ties a kind of model's configuration, module, published names and buffers together.

Whatever handles models of any kind (`models.create`, conversion, loading, saving, training) looks the entry up by the class
of the configuration. `register` adds a family from outside the package; docs/library.md has an example.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from titok_jax.models import tables
from titok_jax.models.digits_net import DigitsNet, DigitsNetConfig
from titok_jax.models.discriminator import DiscriminatorConfig, NLayerDiscriminator
from titok_jax.models.generator import GeneratorConfig, make_generator
from titok_jax.models.inception import InceptionConfig, InceptionV3
from titok_jax.models.maskgit_vqgan import MaskgitVQGAN, MaskgitVQGANConfig
from titok_jax.models.perceptual import PerceptualConfig, PerceptualLoss
from titok_jax.models.titok import TiTok, TiTokConfig
from titok_jax.runtime.messages import shown

ENTRY_POINTS = "titok_jax.families"  # group of entry points whose modules register families


def _no_buffers(config: Any) -> dict[str, np.ndarray]:
    del config
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the library knows about one kind of model.

    Attributes:
      name: unique; for messages, and for `config.json` if the family is not a published one.
      config: class of the configurations, a frozen dataclass. If models of this family are saved, it has `from_published`
        and `to_published`, which read and write the JSON of `config.json`. A tokenizer's class is TiTokConfig or derived
        from it, so that everything that takes a tokenizer takes it.
      module: (config, *, dtype, remat, scan_layers, rngs) -> the module with new parameters. `dtype` is the computation
        dtype, `remat` and `scan_layers` are for `layers.run_stack`; a module may ignore them.
      table: config -> published names and layouts (`titok_jax.models.tables`).
      buffers: config -> {published name: constant} that files may hold beside the parameters.
      writes_buffers: whether the published state dict holds the buffers, so that they are written too.
      formats: the forms in which the weights can be written: "folder", "safetensors", "torch", "flax".
      published: whether the published code has this family. `config.json` names the others.
      title: what messages call a model of the family, with its article; "a NAME" if it is "".
      signs: sets of published names. Weights that have all names of one set are of this family and no other.
    """

    name: str
    config: type
    module: Callable[..., nnx.Module]
    table: Callable[[Any], tables.Table]
    buffers: Callable[[Any], Mapping[str, np.ndarray]] = _no_buffers
    writes_buffers: bool = False
    formats: tuple[str, ...] = ("folder", "safetensors", "torch")
    published: bool = False
    title: str = ""
    signs: tuple[frozenset[str], ...] = ()

    def __post_init__(self):
        if not self.title:
            object.__setattr__(self, "title", f"a {self.name}")


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a family and returns it. Adding an equal one again does nothing.

    Raises:
      ValueError: another family has this name or this configuration class.
    """
    for other in _FAMILIES.values():
        if other != family and (other.name == family.name or other.config is family.config):
            raise ValueError(
                f"the family {other.name!r} with {other.config.__name__} is there; {family.name!r} needs its own"
            )
    _FAMILIES[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    """All families, in the order in which they were added."""
    return tuple(_FAMILIES.values())


def family_named(name: str) -> Family:
    """The family with a name. Loads installed packages that declare one under the entry points `titok_jax.families`.

    Raises:
      ValueError: there is none; the message lists the known ones.
    """
    if name not in _FAMILIES:
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            entry_point.load()
    if name not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(
            f"unknown family of models '{shown(name)}', expected one of {known}; import the module that registers it"
        )
    return _FAMILIES[name]


def family_for(kind: type) -> Family:
    """The family whose configurations are of class `kind`.

    Raises:
      ValueError: the class is not registered.
    """
    for family in _FAMILIES.values():
        if family.config is kind:
            return family
    raise ValueError(f"{kind.__name__} belongs to no family of models: add one with titok_jax.models.register")


def family_of(config: Any) -> Family:
    """The family of a configuration. Errors as in `family_for`."""
    return family_for(type(config))


def _position_ids(config: GeneratorConfig) -> dict[str, np.ndarray]:
    """Only transformers 4.30 and older saved this buffer of BERT; newer versions do not load it."""
    if config.model_type != "ViT":
        return {}
    return {"model.embeddings.position_ids": np.arange(config.num_tokens + 1)[None]}


def _generator_table(config: GeneratorConfig) -> tables.Table:
    return tables.vit_generator_table() if config.model_type == "ViT" else tables.uvit_generator_table()


def _taking(module: Callable[..., nnx.Module], *options: str) -> Callable[..., nnx.Module]:
    """A `Family.module` from a module that takes only these of the options `dtype`, `remat` and `scan_layers`."""

    def make(config: Any, *, rngs: nnx.Rngs, **given: Any) -> nnx.Module:
        return module(config, rngs=rngs, **{name: given[name] for name in options})

    return make


def _signs(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(one.split()) for one in names)


TOKENIZER = register(
    Family(
        "tokenizer",
        TiTokConfig,
        TiTok,
        lambda c: tables.titok_table(c.patch_size),
        published=True,
        signs=_signs("latent_tokens encoder.positional_embedding decoder.positional_embedding"),
    )
)
GENERATOR = register(
    Family(
        "generator",
        GeneratorConfig,
        make_generator,
        _generator_table,
        buffers=_position_ids,
        published=True,
        signs=_signs(
            "model.embeddings.word_embeddings.weight model.lm_head.weight", "pos_embed embeddings.weight lm_head.weight"
        ),
    )
)
VQGAN = register(
    Family(
        "vqgan",
        MaskgitVQGANConfig,
        _taking(MaskgitVQGAN, "dtype"),
        lambda _: tables.maskgit_vqgan_table(),
        formats=("folder", "safetensors", "torch", "flax"),
        published=True,
        title="a MaskGIT-VQGAN",
        signs=_signs("quantize.embedding.weight encoder.conv_in.weight", "quantizer/codebook"),
    )
)
DISCRIMINATOR = register(
    Family(
        "discriminator",
        DiscriminatorConfig,
        _taking(NLayerDiscriminator, "dtype"),
        lambda _: tables.discriminator_table(),
        buffers=lambda config: tables.discriminator_buffers(config.num_stages),
        writes_buffers=True,
        formats=("safetensors", "torch"),
        published=True,
        signs=_signs("block_in.0.weight to_logits.0.weight"),
    )
)
PERCEPTUAL = register(
    Family(
        "perceptual",
        PerceptualConfig,
        _taking(PerceptualLoss),
        lambda _: tables.perceptual_table(),
        formats=("safetensors", "torch"),
        published=True,
        title="a network of a perceptual loss (ConvNeXt, VGG or the heads of LPIPS)",
        signs=_signs(
            "features.0.0.weight classifier.2.weight", "features.0.weight features.28.weight", "lin0.model.1.weight"
        ),
    )
)
INCEPTION = register(
    Family(
        "inception",
        InceptionConfig,
        _taking(InceptionV3),
        lambda _: tables.inception_table(),
        formats=("safetensors",),
        published=True,
        title="the InceptionV3 of FID",
        signs=_signs("Conv2d_1a_3x3.conv.weight"),
    )
)
DIGITS_NET = register(
    Family(
        "digits_net",
        DigitsNetConfig,
        _taking(DigitsNet),
        lambda _: tables.digits_net_table(),
        formats=("safetensors",),
        title="the network of digits-FID",
        signs=_signs("convs.0.weight features.weight head.weight"),
    )
)
