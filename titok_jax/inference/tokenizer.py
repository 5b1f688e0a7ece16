"""A TiTok with its weights: images to tokens and back."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.models.layers import float_images
from titok_jax.models.titok import TiTokConfig
from titok_jax.runtime import sharding
from titok_jax.weights import convert


class Tokenizer:
    """A TiTok with its weights.

    Attributes:
      config: the architecture.
      params: nested dict of float32 arrays.
    """

    def __init__(self, config: TiTokConfig, params: convert.Params, *, dtype=jnp.float32, mesh: Mesh | None = None):
        """
        Args:
          dtype: computation dtype, "float32" or "bfloat16".
          mesh: the mesh that holds the parameters; batches are sharded along it. None means one device.
        """
        self.config, self.params = config, params
        graphdef, _ = models.abstract(config, dtype=jnp.dtype(dtype))

        def encode(params, images, key):
            model, images = nnx.merge(graphdef, params), float_images(sharding.constrain_batch(images))
            if config.quantize_mode == "vq":
                return model.quantized(images).tokens
            posterior = model.posterior(images)
            return posterior.mean if key is None else posterior.sample(jax.random.normal(key, posterior.mean.shape))

        def decode(params, tokens):
            model, tokens = nnx.merge(graphdef, params), sharding.constrain_batch(tokens)
            images = model.decode_tokens(tokens) if config.quantize_mode == "vq" else model.decode(tokens)
            return jnp.clip(images, 0.0, 1.0)

        self._encode, self._decode = sharding.jit_on(mesh, encode), sharding.jit_on(mesh, decode)

    def encode(self, images, key: jax.Array | None = None) -> jax.Array:
        """Images to tokens.

        Args:
          images: [B, H, W, 3], uint8 or float in [0, 1], of the model's size.
          key: for VAEs only: sample the posterior with this key instead of returning its mean.

        Returns:
          int32 [B, N]; for a VAE float32 [B, N, C].

        Raises:
          ValueError: for a wrong shape, dtype or size, or (numpy arrays only) a wrong range.
        """
        size = self.config.image_size
        images = checked_images(images)
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images have shape {list(images.shape)}, expected [batch, {size}, {size}, 3]: the model takes this size "
                "only, so crop or resize them (titok_jax.data.transforms)"
            )
        if key is not None and self.config.quantize_mode == "vq":
            raise ValueError("key given, but the tokens of a vq model are not drawn; only a VAE takes a key")
        return self._encode(self.params, images, key)

    def decode(self, tokens) -> jax.Array:
        """Tokens to images.

        Args:
          tokens: int [B, N] in 0 .. codebook_size - 1; for a VAE float [B, N, C].

        Returns:
          float32 [B, H, W, 3] in [0, 1].

        Raises:
          ValueError: for a wrong shape, dtype or range, or for a stage 1 model, which has no pixels.
        """
        config = self.config
        if config.predicts_codes:
            raise ValueError("a stage 1 model predicts codes of a MaskGIT-VQGAN, not images; train stage 2 first")
        if not hasattr(tokens, "shape"):
            tokens = np.asarray(tokens)
        if config.quantize_mode == "vae":
            expected = (config.num_latent_tokens, config.token_size)
            if tokens.ndim != 3 or tokens.shape[1:] != expected or not jnp.issubdtype(tokens.dtype, jnp.floating):
                raise ValueError(
                    f"latents are {tokens.dtype} {list(tokens.shape)}, expected float [batch, {expected[0]}, "
                    f"{expected[1]}]: this tokenizer is a VAE, which has no token ids"
                )
            return self._decode(self.params, tokens)
        if tokens.ndim != 2 or tokens.shape[1] != config.num_latent_tokens or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens are {tokens.dtype} {list(tokens.shape)}, expected integers [batch, {config.num_latent_tokens}]"
            )
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.codebook_size:
            raise ValueError(
                f"tokens reach from {int(tokens.min())} to {int(tokens.max())}, expected 0 to {config.codebook_size - 1}"
            )
        return self._decode(self.params, tokens)


def checked_images(images) -> np.ndarray | jax.Array:
    """Returns images as an array. Raises ValueError for a wrong dtype or, for numpy arrays only, a wrong range."""
    if not hasattr(images, "shape"):
        images = np.asarray(images)
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images have dtype {images.dtype}, expected uint8, or float in [0, 1]")
    if isinstance(images, np.ndarray) and images.dtype != np.uint8 and images.size:
        low, high = float(images.min()), float(images.max())
        if not -1e-3 <= low <= high <= 1 + 1e-3:  # also true for NaN
            raise ValueError(
                f"images reach from {low:g} to {high:g}, expected [0, 1]: divide grey levels by 255 or leave them uint8; of "
                "values in [-1, 1] take (x + 1) / 2"
            )
    return images
