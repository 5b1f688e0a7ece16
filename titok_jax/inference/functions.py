"""The models as pure functions of (parameters, arrays): the one layer under everything that runs a trained model.

`TokenizerFunctions(config).encode(params, images)` can be jitted, vmapped, differentiated, sharded, and called inside
another program's training step, on any mesh or none. The objects hold no arrays: two with the same configuration are equal,
so a function that closes over one is not compiled again for another. Nothing here checks the values of its arguments; the
classes Tokenizer, VQGAN and Generator do that for arrays on the host.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax import models
from titok_jax.inference import decoding
from titok_jax.models.generator import GeneratorConfig, SamplingConfig
from titok_jax.models.quantizer import DiagonalGaussian
from titok_jax.runtime.sharding import any_mesh, hint
from titok_jax.weights.convert import Params

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("highest", "high", "default")


def default_precision(dtype: str) -> str:
    """The precision of matrix products for a computation dtype: "highest" for float32, "default" for bfloat16.

    By default, TPUs and GPUs compute float32 products in bfloat16 or TF32. Tokens would then depend on the device.
    """
    return "highest" if jnp.dtype(dtype) == jnp.float32 else "default"


def _precise(method: Callable) -> Callable:
    """Decorator: traces a method with the matmul precision of its object, under any mesh (`any_mesh`)."""
    method = any_mesh(method)

    @functools.wraps(method)
    def call(self, *arguments, **named):
        with jax.default_matmul_precision(self.precision):
            return method(self, *arguments, **named)

    return call


@dataclasses.dataclass(frozen=True)
class ModelFunctions:
    """What the functions of all models share.

    Attributes:
      config: the architecture.
      dtype: computation dtype, "float32" or "bfloat16". Parameters may have either.
      precision: of matrix products and convolutions: "highest" (float32), "high" or "default" (what the device does fastest,
        TF32 or bfloat16); None means `default_precision(dtype)`.

    Raises:
      ValueError: for another dtype or precision.
    """

    config: Any
    dtype: str = "float32"
    precision: str | None = None

    def __post_init__(self):
        try:
            name = jnp.dtype(self.dtype).name
        except TypeError:
            name = None
        if name not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'")
        precision = default_precision(name) if self.precision is None else self.precision
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        object.__setattr__(self, "dtype", name)
        object.__setattr__(self, "precision", precision)

    def module(self, params: Params) -> nnx.Module:
        """The module with these parameters, a nested dict of arrays."""
        return nnx.merge(models.abstract(self.config, dtype=self.dtype)[0], params)


def _as_pixels(images: jax.Array, clip: bool, dtype: Any) -> jax.Array:
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.uint8):
        raise ValueError(f"dtype is {dtype}, expected float32 or uint8")
    if dtype == jnp.uint8:
        return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)
    return jnp.clip(images, 0.0, 1.0) if clip else images


@dataclasses.dataclass(frozen=True)
class TokenizerFunctions(ModelFunctions):
    """A TiTok or a MaskGIT-VQGAN: images to tokens and back.

    Below, "tokens" are int32 ids [B, N] (VQGAN: [B, h, w]), or the float32 latents [B, N, C] of a VAE. Images are
    [B, H, W, 3], as input uint8 or float in [0, 1].
    """

    @_precise
    def encoder_output(self, params: Params, images: jax.Array) -> jax.Array:
        """images -> float32, the input of the bottleneck: the latents, or a VAE's mean and log variance [B, N, 2 C]."""
        return self.module(params).encode(hint(images, "batch"))

    @_precise
    def latents(self, params: Params, images: jax.Array) -> jax.Array:
        """images -> float32 [B, N, C] (VQGAN: [B, h, w, C]): the latents before quantization; of a VAE the mean."""
        return self.encoder_output(params, images) if self.config.has_tokens else self.moments(params, images).mean

    @_precise
    def moments(self, params: Params, images: jax.Array) -> DiagonalGaussian:
        """images -> a VAE's posterior, with `mean` and `logvar` float32 [B, N, C].

        Raises:
          ValueError: the model is not a VAE.
        """
        if self.config.has_tokens:
            raise ValueError("moments are of a VAE; this model has token ids")
        return DiagonalGaussian.from_moments(self.encoder_output(params, images))

    @_precise
    def quantize(self, params: Params, latents: jax.Array) -> Any:
        """latents as from `latents` -> what the quantizer returns, among it `quantized` (code vectors, with a gradient that
        passes straight through) and `tokens`.

        Raises:
          ValueError: the model is a VAE.
        """
        self._need_tokens()
        return self.module(params).quantize(hint(latents, "batch"))

    @_precise
    def distances(self, params: Params, latents: jax.Array) -> jax.Array:
        """latents as from `latents` -> float32 [..., K], the squared distance to each code vector.

        Raises:
          ValueError: the model is a VAE.
        """
        self._need_tokens()
        return self.module(params).quantize.distances(hint(latents, "batch"))

    @_precise
    def code_vectors(self, params: Params, ids: jax.Array) -> jax.Array:
        """ids -> float32 code vectors [B, N, C] (VQGAN: [B, h, w, C]), as `decode_latents` takes them. Of ids outside the
        codebook the nearest code is taken.

        Raises:
          ValueError: the model is a VAE.
        """
        self._need_tokens()
        return self.module(params).quantize.lookup(hint(ids, "batch"))

    @_precise
    def encode(self, params: Params, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """images -> tokens.

        Args:
          keys: for a VAE: one typed key per image [B], to draw from the posterior. Without keys, the tokens are its mean.

        Raises:
          ValueError: keys for a model with token ids, which are not drawn.
        """
        if keys is None:
            latents = self.latents(params, images)
            return self.quantize(params, latents).tokens if self.config.has_tokens else latents
        if self.config.has_tokens:
            raise ValueError("keys given, but token ids are not drawn; only a VAE takes keys")
        posterior = self.moments(params, images)
        return posterior.sample(jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys))

    @_precise
    def decode_latents(self, params: Params, latents: jax.Array, *, clip: bool = True, dtype: Any = "float32") -> jax.Array:
        """Latents after the bottleneck -> images.

        Args:
          latents: float [B, N, C] (VQGAN: [B, h, w, C]): code vectors, mixtures of them, or a VAE's latents.
          clip: clip float images to [0, 1]. Clipped pixels have gradient 0.
          dtype: "float32", or "uint8" (clipped, and rounded to the nearest grey level).

        Raises:
          ValueError: a stage 1 model, which has no images, or another dtype.
        """
        if self.config.predicts_codes:
            raise ValueError("a stage 1 model predicts codes of a MaskGIT-VQGAN, not images; train stage 2 first")
        return _as_pixels(self.module(params).decode(hint(latents, "batch")), clip, dtype)

    @_precise
    def decode(self, params: Params, tokens: jax.Array, *, clip: bool = True, dtype: Any = "float32") -> jax.Array:
        """tokens -> images. Arguments and errors are those of `decode_latents`."""
        if self.config.has_tokens:
            tokens = self.code_vectors(params, tokens)
        return self.decode_latents(params, tokens, clip=clip, dtype=dtype)

    def _need_tokens(self) -> None:
        if not self.config.has_tokens:
            raise ValueError("this model is a VAE, which has no token ids and no codes")


@dataclasses.dataclass(frozen=True)
class GeneratorFunctions(ModelFunctions):
    """A generator: class labels to token ids."""

    config: GeneratorConfig

    @_precise
    def logits(self, params: Params, ids: jax.Array, labels: jax.Array) -> jax.Array:
        """One forward pass: ids int [B, N] in 0 .. K (K is the mask), labels int [B] in 0 .. num_classes (the last means
        unconditional) -> float32 [B, N, K]."""
        return self.module(params).logits(hint(ids, "batch"), hint(labels, "batch"))

    @_precise
    def sample(
        self,
        params: Params,
        labels: jax.Array,
        keys: jax.Array,
        ids: jax.Array | None = None,
        *,
        sampling: SamplingConfig | None = None,
        guidance_scale: jax.Array | float | None = None,
        temperature: jax.Array | float | None = None,
    ) -> decoding.DecodeOutput:
        """Generates token ids for class labels (`decoding.parallel_decode`).

        Args:
          labels: int [B] in 0 .. num_classes - 1.
          keys: one typed threefry key per image [B]. An image depends on its own key, label and ids only.
          ids: int [B, N] to start from; tokens other than the mask are kept. None for masks only.
          sampling: settings, static under jit; None means those of the configuration.
          guidance_scale, temperature: in place of those in `sampling`; numbers or arrays [] or [B], which may be traced. A
            guidance scale of 0 means no guidance under every schedule.

        Raises:
          ValueError: for keys of another kind.
        """
        sampling = self.config.sampling if sampling is None else sampling
        scale = jnp.asarray(sampling.guidance_scale if guidance_scale is None else guidance_scale, jnp.float32)
        if sampling.guidance_schedule == "power-cosine":
            scale = jnp.where(scale == 0, 1.0, scale)  # in this formula, 1 means no guidance
        return decoding.parallel_decode(
            functools.partial(self.logits, params),
            hint(labels, "batch"),
            num_tokens=self.config.num_tokens,
            codebook_size=self.config.codebook_size,
            num_classes=self.config.num_classes,
            num_steps=sampling.num_steps,
            guidance_scale=scale,
            guidance_schedule=sampling.guidance_schedule,
            guidance_scale_pow=sampling.guidance_scale_pow,
            temperature=sampling.temperature if temperature is None else temperature,
            softmax_temperature_annealing=sampling.softmax_temperature_annealing,
            noise=decoding.noise_from_keys(keys),
            ids=ids if ids is None else hint(ids, "batch"),
        )


def as_key(key: Any) -> jax.Array:
    """An int seed, a typed key or a raw key (uint32 [2]), or several of them [B] or [B, 2] -> typed threefry keys [] or [B].

    Raises:
      ValueError: for anything else, also for keys of another generator, which give other numbers under vmap.
    """
    if isinstance(key, bool) or (isinstance(key, int) and not 0 <= key < 2**63):
        raise ValueError(f"key is {key}, expected a seed from 0 to 2**63 - 1, or a key")
    if isinstance(key, int):
        return jax.random.key(key, impl="threefry2x32")
    if not hasattr(key, "dtype"):
        key = jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) != "threefry2x32":
            raise ValueError(f"keys of dtype {key.dtype}, expected threefry keys: jax.random.key(seed, impl='threefry2x32')")
        return key
    if key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer):
        return jax.random.key(key, impl="threefry2x32")
    if key.dtype == jnp.uint32 and key.ndim in (1, 2) and key.shape[-1] == 2:
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    raise ValueError(
        f"key is {key.dtype} {list(key.shape)}, expected a seed, a typed key, or raw keys uint32 [2] or [batch, 2]"
    )


def image_keys(key: Any, count: int, first_index: int | jax.Array = 0) -> jax.Array:
    """One key per image, typed [count]: the key of image i is `key` folded with its index. Keys per image are returned as
    they are.

    Args:
      key: as in `as_key`.
      first_index: the index of the first image in a longer list that is made in several calls.

    Raises:
      ValueError: for a bad key, or another number of keys.
    """
    key = as_key(key)
    if key.ndim == 1:
        if key.shape != (count,):
            raise ValueError(f"there are {key.shape[0]} keys for {count} images")
        return key
    return _fold(key, first_index, count)


@functools.partial(jax.jit, static_argnums=2)
def _fold(key: jax.Array, first_index: jax.Array, count: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first_index + jnp.arange(count))
