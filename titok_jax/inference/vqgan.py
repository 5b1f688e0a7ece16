"""A MaskGIT-VQGAN with its weights: images to codes and back."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.inference.tokenizer import checked_images
from titok_jax.models.layers import float_images
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.runtime import sharding
from titok_jax.weights import convert


class VQGAN:
    """A MaskGIT-VQGAN with its weights.

    Attributes:
      config: the architecture.
      params: nested dict of float32 arrays.
    """

    def __init__(self, config: MaskgitVQGANConfig, params: convert.Params, *, dtype=jnp.float32, mesh: Mesh | None = None):
        """
        Args:
          dtype: computation dtype, "float32" or "bfloat16".
          mesh: the mesh that holds the parameters; batches are sharded along it. None means one device.
        """
        self.config, self.params = config, params
        graphdef, _ = models.abstract(config, dtype=jnp.dtype(dtype))

        def encode(params, images):
            return nnx.merge(graphdef, params).get_codes(float_images(sharding.constrain_batch(images)))

        def decode(params, codes):
            return nnx.merge(graphdef, params).decode_codes(sharding.constrain_batch(codes))

        self._encode, self._decode = sharding.jit_on(mesh, encode), sharding.jit_on(mesh, decode)

    def encode(self, images) -> jax.Array:
        """Images to codes, one code per 16 x 16 pixels (published sizes).

        Args:
          images: [B, H, W, 3], uint8 or float in [0, 1], whose sides are multiples of `config.downsampling`.

        Returns:
          int32 [B, H/16, W/16].

        Raises:
          ValueError: for a wrong shape or dtype, or (numpy arrays only) a wrong range.
        """
        images, factor = checked_images(images), self.config.downsampling
        if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"images have shape {list(images.shape)}, expected [batch, height, width, 3] with multiples of {factor}"
            )
        return self._encode(self.params, images)

    def decode(self, codes) -> jax.Array:
        """Codes to images.

        Args:
          codes: int [B, h, w] in 0 .. codebook_size - 1.

        Returns:
          float32 [B, 16 h, 16 w, 3] in [0, 1] (published sizes).

        Raises:
          ValueError: for a wrong shape, dtype or range.
        """
        if not hasattr(codes, "shape"):
            codes = np.asarray(codes)
        if codes.ndim != 3 or not jnp.issubdtype(codes.dtype, jnp.integer):
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, expected integers [batch, height, width]")
        largest = self.config.codebook_size - 1
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) <= largest:
            raise ValueError(f"codes reach from {int(codes.min())} to {int(codes.max())}, expected 0 to {largest}")
        return self._decode(self.params, codes)
