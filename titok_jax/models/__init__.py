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
from titok_jax.models.layers import check_remat
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


def create(
    config: Config, *, dtype=jnp.float32, remat: str = "none", scan_layers: bool | None = True, rngs: nnx.Rngs
) -> nnx.Module:
    """Builds the module that a configuration describes, with newly initialised parameters.

    Args:
      dtype: computation dtype; parameters are float32. The perceptual, Inception and digits networks ignore it and always
        compute in float32.
      remat, scan_layers: how the blocks of TiTok and of the generators run, see `layers.run_stack`. Others ignore them.

    Raises:
      ValueError: the configuration belongs to no registered family, or `remat` is unknown.
    """
    check_remat(remat)
    return family_of(config).module(config, dtype=dtype, remat=remat, scan_layers=scan_layers, rngs=rngs)


@functools.lru_cache(maxsize=64)
def _abstract(config: Config, dtype: jnp.dtype, remat: str, scan_layers: bool | None) -> tuple[nnx.GraphDef, nnx.State]:
    module = nnx.eval_shape(lambda: create(config, dtype=dtype, remat=remat, scan_layers=scan_layers, rngs=nnx.Rngs(0)))
    return nnx.split(module)


def abstract(
    config: Config, *, dtype=jnp.float32, remat: str = "none", scan_layers: bool | None = True
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns (graphdef, parameters as a nested dict of ShapeDtypeStructs) without allocating any array.

    Call `nnx.merge(graphdef, params)` inside a jitted function to get the module back.
    """
    graphdef, state = _abstract(config, jnp.dtype(dtype), remat, scan_layers)
    return graphdef, nnx.to_pure_dict(state)


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initialises parameters (float32) as a nested dict. A pure function: jit it with `out_shardings` to shard them."""
    return nnx.to_pure_dict(nnx.split(create(config, rngs=nnx.Rngs(key)))[1])
