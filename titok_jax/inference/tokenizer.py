"""A TiTok or a MaskGIT-VQGAN with its weights: images to tokens and back."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from titok_jax.inference import many
from titok_jax.inference.functions import TokenizerFunctions, image_keys
from titok_jax.inference.model import Model, as_int32, check_range, on_host
from titok_jax.models.quantizer import DiagonalGaussian

_DECODING = ("clip", "dtype")  # static arguments


class Tokenizer(Model):
    """A TiTok with its weights. Attributes and arguments are those of `Model`."""

    functions: TokenizerFunctions
    functions_class = TokenizerFunctions

    def encode(self, images: Any, key: Any = None, *, first_index: int = 0) -> jax.Array:
        """Images to tokens.

        Args:
          images: [B, H, W, 3], uint8 or float in [0, 1], of the model's size (VQGAN: sides that are multiples of
            `config.downsampling`).
          key: for VAEs only: draw from the posterior instead of returning its mean. An int seed, a key, or one key per image
            [B]. A draw depends on the key and on the image's index only.
          first_index: the index of the first image in a longer list.

        Returns:
          int32 [B, N] (VQGAN: [B, h, w]); for a VAE float32 [B, N, C].

        Raises:
          ValueError: for a wrong shape, dtype or size, or (numpy arrays only) a wrong range.
        """
        images = self._checked_images(images)
        if key is None:
            return self.run("encode", images)
        if self.config.has_tokens:
            raise ValueError("key given, but the tokens of a vq model are not drawn; only a VAE takes a key")
        return self.run("encode", images, image_keys(key, images.shape[0], first_index))

    def latents(self, images: Any) -> jax.Array:
        """Images to latents before quantization, float32 [B, N, C] (VQGAN: [B, h, w, C]); of a VAE the mean. Arguments and
        errors are those of `encode`."""
        return self.run("latents", self._checked_images(images))

    def moments(self, images: Any) -> DiagonalGaussian:
        """Images to a VAE's posterior: `mean`, `logvar`, `sample(noise)`. Arguments and errors are those of `encode`."""
        return self.run("moments", self._checked_images(images))

    def quantize(self, latents: Any) -> Any:
        """Latents as from `latents` -> `quantized` (code vectors), `tokens` and the quantizer's losses.

        Raises:
          ValueError: for a wrong shape or dtype, or for a VAE.
        """
        return self.run("quantize", self._checked_latents(latents))

    def code_vectors(self, ids: Any) -> jax.Array:
        """Token ids -> code vectors, float32 [B, N, C] (VQGAN: [B, h, w, C]).

        Raises:
          ValueError: for a wrong shape, dtype or (numpy arrays and lists only) range, or for a VAE.
        """
        return self.run("code_vectors", self._checked_ids(ids))

    def decode(self, tokens: Any, *, clip: bool = True, dtype: Any = "float32") -> jax.Array:
        """Tokens to images.

        Args:
          tokens: int [B, N] (VQGAN: [B, h, w]) in 0 .. codebook_size - 1; for a VAE float [B, N, C].
          clip: clip float images to [0, 1].
          dtype: "float32", or "uint8" (clipped, and rounded to the nearest grey level).

        Returns:
          [B, H, W, 3].

        Raises:
          ValueError: for a wrong shape, dtype or (numpy arrays and lists only) range, or for a stage 1 model, which has no
            pixels.
        """
        if not self.config.has_tokens:
            return self.decode_latents(tokens, clip=clip, dtype=dtype)
        return self.run("decode", self._checked_ids(tokens), static=_DECODING, clip=clip, dtype=str(jnp.dtype(dtype)))

    def decode_latents(self, latents: Any, *, clip: bool = True, dtype: Any = "float32") -> jax.Array:
        """Continuous latents after the bottleneck -> images: code vectors or mixtures of them, or a VAE's latents, float
        [B, N, C] (VQGAN: [B, h, w, C]). Other arguments and errors are those of `decode`."""
        latents = self._checked_latents(latents)
        return self.run("decode_latents", latents, static=_DECODING, clip=clip, dtype=str(jnp.dtype(dtype)))

    def encode_all(self, images: Any, batch_size: int = 64, *, key: Any = None) -> np.ndarray:
        """Encodes any number of images, batch by batch; see `encode`.

        Args:
          images: [n, H, W, 3], an object whose slices are such arrays, or an iterable of images [H, W, 3].
          batch_size: images at a time.
          key: for VAEs only: draw from the posterior. Image i depends on the key and i, not on the batch size.

        Returns:
          The tokens of all images in host memory, as from `encode`.
        """
        return many.joined(many.encode(self, images, batch_size=batch_size, key=key), self._no_tokens())

    def decode_all(self, tokens: Iterable, batch_size: int = 64, *, clip: bool = True, dtype: Any = "float32") -> np.ndarray:
        """Decodes any number of token sequences, batch by batch; see `decode`.

        Args:
          tokens: [n, ...] as for `decode`, or an iterable of the tokens of one image each.
          batch_size: images at a time.

        Returns:
          [n, H, W, 3] in host memory.
        """
        size = self.config.image_size
        none = np.zeros((0, size, size, 3), jnp.dtype(dtype))
        return many.joined(many.decode(self, tokens, batch_size=batch_size, clip=clip, dtype=dtype), none)

    # Checks

    def _no_tokens(self) -> np.ndarray:
        return np.zeros((0, *self.config.token_shape), np.int32 if self.config.has_tokens else np.float32)

    def _checked_images(self, images: Any) -> np.ndarray | jax.Array:
        images, size = checked_images(images), self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images have shape {list(images.shape)}, expected [batch, {size}, {size}, 3]: the model takes this size "
                "only, so crop or resize them (titok_jax.data.transforms)"
            )
        return images

    def _checked_ids(self, ids: Any) -> np.ndarray | jax.Array:
        config, ids = self.config, on_host(ids)
        if not config.has_tokens:
            raise ValueError("this tokenizer is a VAE, which has no token ids")
        if ids.ndim != 2 or ids.shape[1] != config.num_latent_tokens or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"tokens are {ids.dtype} {list(ids.shape)}, expected integers [batch, {config.num_latent_tokens}]"
            )
        check_range(ids, config.codebook_size - 1, "tokens")
        return as_int32(ids)

    def _checked_latents(self, latents: Any) -> np.ndarray | jax.Array:
        latents, config = on_host(latents), self.config
        expected = (config.num_latent_tokens, config.token_size)
        if latents.ndim != 3 or latents.shape[1:] != expected or not jnp.issubdtype(latents.dtype, jnp.floating):
            raise ValueError(
                f"latents are {latents.dtype} {list(latents.shape)}, expected float [batch, {expected[0]}, {expected[1]}]"
                + ("" if config.has_tokens else ": this tokenizer is a VAE, which has no token ids")
            )
        return latents


class VQGAN(Tokenizer):
    """A MaskGIT-VQGAN with its weights. It takes images of any size that is a multiple of `config.downsampling`; codes are
    int32 [B, h, w], one per 16 x 16 pixels (published sizes). Attributes and methods are those of Tokenizer."""

    def _checked_images(self, images: Any) -> np.ndarray | jax.Array:
        images, factor = checked_images(images), self.config.downsampling
        if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"images have shape {list(images.shape)}, expected [batch, height, width, 3] with multiples of {factor}"
            )
        return images

    def _checked_ids(self, ids: Any) -> np.ndarray | jax.Array:
        ids = on_host(ids)
        if ids.ndim != 3 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"codes are {ids.dtype} {list(ids.shape)}, expected integers [batch, height, width]")
        check_range(ids, self.config.codebook_size - 1, "codes")
        return as_int32(ids)

    def _checked_latents(self, latents: Any) -> np.ndarray | jax.Array:
        latents, channels = on_host(latents), self.config.z_channels
        if latents.ndim != 4 or latents.shape[3] != channels or not jnp.issubdtype(latents.dtype, jnp.floating):
            expected = f"expected float [batch, height, width, {channels}]"
            raise ValueError(f"latents are {latents.dtype} {list(latents.shape)}, {expected}")
        return latents


def checked_images(images: Any) -> np.ndarray | jax.Array:
    """Returns images as an array. Raises ValueError for a wrong dtype or, for numpy arrays only, a wrong range."""
    images = on_host(images)
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
