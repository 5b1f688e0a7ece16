"""The networks. `create` builds one from its configuration; the rest of the library handles parameters as nested dicts.

May import: runtime.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax.models.digits_net import DigitsNet, DigitsNetConfig
from titok_jax.models.discriminator import DiscriminatorConfig, NLayerDiscriminator
from titok_jax.models.families import Family, families, family_for, family_named, family_of, register
from titok_jax.models.generator import GeneratorConfig, SamplingConfig, make_generator
from titok_jax.models.inception import InceptionConfig, InceptionV3
from titok_jax.models.maskgit_vqgan import MaskgitVQGAN, MaskgitVQGANConfig
from titok_jax.models.perceptual import PerceptualConfig, PerceptualLoss
from titok_jax.models.titok import TiTok, TiTokConfig

__all__ = [
    "Config",
    "DigitsNet",
    "DigitsNetConfig",
    "DiscriminatorConfig",
    "Family",
    "GeneratorConfig",
    "InceptionConfig",
    "InceptionV3",
    "MaskgitVQGAN",
    "MaskgitVQGANConfig",
    "NLayerDiscriminator",
    "PerceptualConfig",
    "PerceptualLoss",
    "SamplingConfig",
    "TiTok",
    "TiTokConfig",
    "abstract",
    "create",
    "families",
    "family_for",
    "family_named",
    "family_of",
    "init",
    "make_generator",
    "register",
]

Config = Any  # a configuration of any registered family: a frozen dataclass


def create(config: Config, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the module that a configuration describes, with newly initialised parameters.

    Args:
      dtype: computation dtype; parameters are float32. The perceptual, Inception and digits networks ignore it and always
        compute in float32.
      remat: recompute each transformer block's activations in the backward pass (TiTok and the generators only).

    Raises:
      ValueError: the configuration belongs to no registered family.
    """
    return family_of(config).module(config, dtype=dtype, remat=remat, rngs=rngs)


@functools.lru_cache(maxsize=64)
def _abstract(config: Config, dtype: jnp.dtype, remat: bool) -> tuple[nnx.GraphDef, nnx.State]:
    module = nnx.eval_shape(lambda: create(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    return nnx.split(module)


def abstract(config: Config, *, dtype=jnp.float32, remat: bool = False) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns (graphdef, parameters as a nested dict of ShapeDtypeStructs) without allocating any array.

    Call `nnx.merge(graphdef, params)` inside a jitted function to get the module back.
    """
    graphdef, state = _abstract(config, jnp.dtype(dtype), remat)
    return graphdef, nnx.to_pure_dict(state)


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initialises parameters (float32) as a nested dict. A pure function: jit it with `out_shardings` to shard them."""
    return nnx.to_pure_dict(nnx.split(create(config, rngs=nnx.Rngs(key)))[1])
