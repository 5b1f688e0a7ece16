"""The networks. `create` builds one from its configuration; the rest of the library handles parameters as nested dicts.

May import: runtime.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax.models.digits_net import DigitsNet, DigitsNetConfig
from titok_jax.models.discriminator import DiscriminatorConfig, NLayerDiscriminator
from titok_jax.models.generator import GeneratorConfig, make_generator
from titok_jax.models.inception import InceptionConfig, InceptionV3
from titok_jax.models.maskgit_vqgan import MaskgitVQGAN, MaskgitVQGANConfig
from titok_jax.models.perceptual import PerceptualConfig, PerceptualLoss
from titok_jax.models.titok import TiTok, TiTokConfig

Config = (
    TiTokConfig
    | GeneratorConfig
    | MaskgitVQGANConfig
    | DiscriminatorConfig
    | PerceptualConfig
    | InceptionConfig
    | DigitsNetConfig
)


def create(config: Config, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the module that a configuration describes, with newly initialised parameters.

    Args:
      dtype: computation dtype; parameters are float32. The perceptual, Inception and digits networks ignore it and always
        compute in float32.
      remat: recompute each transformer block's activations in the backward pass (TiTok and the generators only).
    """
    if isinstance(config, TiTokConfig):
        return TiTok(config, dtype=dtype, remat=remat, rngs=rngs)
    if isinstance(config, GeneratorConfig):
        return make_generator(config, dtype=dtype, remat=remat, rngs=rngs)
    if isinstance(config, MaskgitVQGANConfig):
        return MaskgitVQGAN(config, dtype=dtype, rngs=rngs)
    if isinstance(config, PerceptualConfig):
        return PerceptualLoss(config, rngs=rngs)
    if isinstance(config, InceptionConfig):
        return InceptionV3(config, rngs=rngs)
    if isinstance(config, DigitsNetConfig):
        return DigitsNet(config, rngs=rngs)
    return NLayerDiscriminator(config, dtype=dtype, rngs=rngs)


def abstract(config: Config, *, dtype=jnp.float32, remat: bool = False) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns (graphdef, parameters as a nested dict of ShapeDtypeStructs) without allocating any array.

    Call `nnx.merge(graphdef, params)` inside a jitted function to get the module back.
    """
    module = nnx.eval_shape(lambda: create(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initialises parameters (float32) as a nested dict. A pure function: jit it with `out_shardings` to shard them."""
    return nnx.to_pure_dict(nnx.split(create(config, rngs=nnx.Rngs(key)))[1])
