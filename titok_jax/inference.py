"""Trained models as people use them: load by name or folder, images to tokens, tokens to images, labels to tokens."""

import os
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from titok_jax import convert, decoding, models, pretrained, sharding, zoo
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.layers import float_images
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.titok import TiTokConfig


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
          mesh: that of the parameters, over which batches are cut; None: one device.
        """
        self.config, self.params = config, params
        graphdef, _ = models.abstract(config, dtype=jnp.dtype(dtype))

        def encode(params, images, key):
            model, images = nnx.merge(graphdef, params), float_images(sharding.keep_batch(images))
            if config.quantize_mode == "vq":
                return model.quantized(images).tokens
            posterior = model.posterior(images)
            return posterior.mean if key is None else posterior.sample(jax.random.normal(key, posterior.mean.shape))

        def decode(params, tokens):
            model, tokens = nnx.merge(graphdef, params), sharding.keep_batch(tokens)
            images = model.decode_tokens(tokens) if config.quantize_mode == "vq" else model.decode(tokens)
            return jnp.clip(images, 0.0, 1.0)

        self._encode, self._decode = sharding.jit_on(mesh, encode), sharding.jit_on(mesh, decode)

    def encode(self, images, key: jax.Array | None = None) -> jax.Array:
        """Images to tokens.

        Args:
          images: [B, H, W, 3], uint8 or float in [0, 1], of the model's size.
          key: of a VAE: draw from the posterior with this key, instead of its mean.

        Returns:
          int32 [B, N]; of a VAE float32 [B, N, C].

        Raises:
          ValueError: another shape, dtype, size or (of numpy arrays) range than expected.
        """
        size = self.config.image_size
        images = _checked_images(images)
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
          tokens: int [B, N] in 0 .. codebook_size - 1; of a VAE float [B, N, C].

        Returns:
          float32 [B, H, W, 3] in [0, 1].

        Raises:
          ValueError: another shape, dtype or range than expected, or a stage 1 model, which has no pixels.
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


def _checked_images(images) -> np.ndarray | jax.Array:
    """Images as an array of the expected dtype and, of numpy's, range; ValueError otherwise."""
    if not hasattr(images, "shape"):
        images = np.asarray(images)
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images have dtype {images.dtype}, expected uint8, or float in [0, 1]")
    if isinstance(images, np.ndarray) and images.dtype != np.uint8 and images.size:
        low, high = float(images.min()), float(images.max())
        if not -1e-3 <= low <= high <= 1 + 1e-3:  # NaN is not
            raise ValueError(
                f"images reach from {low:g} to {high:g}, expected [0, 1]: divide grey levels by 255 or leave them uint8; of "
                "values in [-1, 1] take (x + 1) / 2"
            )
    return images


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
          mesh: that of the parameters, over which batches are cut; None: one device.
        """
        self.config, self.params = config, params
        graphdef, _ = models.abstract(config, dtype=jnp.dtype(dtype))

        def encode(params, images):
            return nnx.merge(graphdef, params).get_codes(float_images(sharding.keep_batch(images)))

        def decode(params, codes):
            return nnx.merge(graphdef, params).decode_codes(sharding.keep_batch(codes))

        self._encode, self._decode = sharding.jit_on(mesh, encode), sharding.jit_on(mesh, decode)

    def encode(self, images) -> jax.Array:
        """Images to codes, one for each 16 x 16 pixels (published sizes).

        Args:
          images: [B, H, W, 3], uint8 or float in [0, 1], of any size that `config.downsampling` divides.

        Returns:
          int32 [B, H/16, W/16].

        Raises:
          ValueError: another shape, dtype or (of numpy arrays) range than expected.
        """
        images, factor = _checked_images(images), self.config.downsampling
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
          ValueError: another shape, dtype or range than expected.
        """
        if not hasattr(codes, "shape"):
            codes = np.asarray(codes)
        if codes.ndim != 3 or not jnp.issubdtype(codes.dtype, jnp.integer):
            raise ValueError(f"codes are {codes.dtype} {list(codes.shape)}, expected integers [batch, height, width]")
        largest = self.config.codebook_size - 1
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) <= largest:
            raise ValueError(f"codes reach from {int(codes.min())} to {int(codes.max())}, expected 0 to {largest}")
        return self._decode(self.params, codes)


class Generator:
    """A generator with its weights.

    Attributes:
      config: the architecture, with the default sampling settings.
      params: nested dict of float32 arrays.
    """

    def __init__(self, config: GeneratorConfig, params: convert.Params, *, dtype=jnp.float32, mesh: Mesh | None = None):
        """
        Args:
          dtype: computation dtype, "float32" or "bfloat16"; sampling itself is float32 always.
          mesh: that of the parameters, over which batches are cut; None: one device.
        """
        self.config, self.params = config, params
        graphdef, _ = models.abstract(config, dtype=jnp.dtype(dtype))

        def logits(params, ids, labels):
            return nnx.merge(graphdef, params).logits(ids, labels)

        def sample(params, labels, key, first_index, scale, temperature, *, num_steps, schedule, annealing):
            keys = jax.vmap(partial(jax.random.fold_in, key))(first_index + jnp.arange(labels.shape[0]))
            return decoding.parallel_decode(
                partial(logits, params),
                sharding.keep_batch(labels),
                num_tokens=config.num_tokens,
                codebook_size=config.codebook_size,
                num_classes=config.num_classes,
                num_steps=num_steps,
                guidance_scale=scale,
                guidance_schedule=schedule,
                temperature=temperature,
                softmax_temperature_annealing=annealing,
                noise=decoding.noise_from_keys(keys),
            ).ids

        self._logits = sharding.jit_on(mesh, logits)
        self._sample = sharding.jit_on(mesh, sample, static_argnames=("num_steps", "schedule", "annealing"))

    def logits(self, ids, labels) -> jax.Array:
        """One forward pass.

        Args:
          ids: int [B, N] in 0 .. codebook_size; the last is the mask.
          labels: int [B] in 0 .. num_classes; the last means unconditional.

        Returns:
          float32 [B, N, codebook_size].

        Raises:
          ValueError: another shape or range than expected.
        """
        ids, labels = np.asarray(ids), np.asarray(labels)
        if ids.ndim != 2 or ids.shape[1] != self.config.num_tokens or ids.dtype.kind not in "iu":
            raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}, expected integers [batch, {self.config.num_tokens}]")
        if ids.size and not 0 <= ids.min() <= ids.max() <= self.config.mask_id:
            raise ValueError(f"ids reach from {ids.min()} to {ids.max()}, expected 0 to {self.config.mask_id}")
        self._check_labels(labels, self.config.num_classes, ids.shape[0])
        return self._logits(self.params, ids.astype(np.int32), labels.astype(np.int32))

    def _check_labels(self, labels: np.ndarray, largest: int, batch: int | None = None) -> None:
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or (batch is not None and len(labels) != batch):
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, expected integers [{batch or 'batch'}]")
        if labels.size and not 0 <= labels.min() <= labels.max() <= largest:
            raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, expected 0 to {largest}")


def generate(
    generator: Generator,
    labels: Sequence[int] | np.ndarray,
    key: jax.Array,
    *,
    first_index: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_schedule: str | None = None,
    temperature: float | None = None,
    softmax_temperature_annealing: bool | None = None,
) -> jax.Array:
    """Token ids for class labels. What is None is taken from `generator.config.sampling`.

    An image depends on its label, the key and its place in `labels` only, not on the others beside it. Nothing is
    compiled again when labels, key, first index, scale or temperature change.

    Args:
      labels: [B], 0 .. num_classes - 1.
      key: from `jax.random.key`.
      first_index: the place of `labels[0]` in a longer list that is generated in several calls: the answers are those of
        one call for the whole list.
      num_steps: decoding steps, at least 1.
      guidance_scale: 0 for none, under every schedule. (Published, "power-cosine" with 0 leads to unconditional images.)
      guidance_schedule: "constant", "linear" or "power-cosine".
      temperature: of the noise in the first step, at least 0; more gives more diverse images.
      softmax_temperature_annealing: divide the logits by a temperature that falls from about 1.3 to 0.5.

    Returns:
      int32 [B, N], for `Tokenizer.decode`.

    Raises:
      ValueError: a label or setting out of range.
    """
    defaults, config = generator.config.sampling, generator.config
    labels = np.asarray(labels)
    generator._check_labels(labels, config.num_classes - 1)
    num_steps = defaults.num_steps if num_steps is None else num_steps
    guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    schedule = guidance_schedule or defaults.guidance_schedule
    temperature = defaults.temperature if temperature is None else temperature
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected at least 0")
    if schedule not in decoding.GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule is {schedule!r}, expected one of {decoding.GUIDANCE_SCHEDULES}")
    if schedule == "power-cosine" and guidance_scale == 0:
        guidance_scale = 1.0  # in this formula, 1 is no guidance
    return generator._sample(
        generator.params,
        labels.astype(np.int32),
        key,
        np.int32(first_index),
        np.float32(guidance_scale),
        np.float32(temperature),
        num_steps=num_steps,
        schedule=schedule,
        annealing=defaults.softmax_temperature_annealing
        if softmax_temperature_annealing is None
        else softmax_temperature_annealing,
    )


def load_tokenizer(
    source: str | os.PathLike,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Tokenizer:
    """A tokenizer: by name ("digits", "titok_l32", ...: `python -m titok_jax.zoo`), of a Hugging Face repository
    ("hf://owner/name", also with "@revision"), from a folder (of a generator's folder, the tokenizer in it) or a file of
    weights.

    Args:
      dtype: computation dtype, "float32" or "bfloat16".
      mesh: from `titok_jax.sharding.make_mesh`: every parameter is read straight onto its shards, and batches, whose size
        must be a multiple of data x fsdp, are cut; None: one device.
      revision: branch, tag or commit, of what is on the hub.
      token: for the hub, if not that of `hf auth login` or HF_TOKEN.

    Raises:
      ValueError: an unknown name (the message lists the known ones), or weights that do not fit.
      FileNotFoundError: a folder that holds no model.
      DownloadError (an OSError): the hub does not give it.
    """
    return Tokenizer(*_load(source, TiTokConfig, mesh, revision, token), dtype=dtype, mesh=mesh)


def load_tokenizer_config(
    source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> TiTokConfig:
    """The configuration of what `load_tokenizer` loads; reads no weights, errors as there."""
    return pretrained.load_config(source, TiTokConfig, revision=revision, token=token)


def load_generator(
    source: str | os.PathLike,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Generator:
    """A generator; arguments and errors as of `load_tokenizer`. A published one has the name of its tokenizer."""
    return Generator(*_load(source, GeneratorConfig, mesh, revision, token), dtype=dtype, mesh=mesh)


def load_vqgan(
    source: str | os.PathLike,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> VQGAN:
    """A MaskGIT-VQGAN: "maskgit_vqgan", a folder, or a file of it: PyTorch's, safetensors or the original JAX checkpoint
    (Flax msgpack); arguments and errors as of `load_tokenizer`."""
    return VQGAN(*_load(source, MaskgitVQGANConfig, mesh, revision, token), dtype=dtype, mesh=mesh)


def load_image_config(
    source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> TiTokConfig | MaskgitVQGANConfig:
    """The configuration of a tokenizer of images, which `load_tokenizer` or `load_vqgan` loads: which one, it says. Reads no
    weights; errors as there."""
    kind = pretrained.tokenizer_kind(source, revision=revision, token=token)
    return pretrained.load_config(source, kind, revision=revision, token=token)


def _load(source, kind: type, mesh: Mesh | None, revision: str | None, token: str | None):
    place = {} if mesh is None else {"place": sharding.placer(mesh)}
    return pretrained.load(source, kind, revision=revision, token=token, **place)


def load_pair(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[Tokenizer, Generator]:
    """A generator and the tokenizer for its tokens: that of `tokenizer`, or the one of the same name or in the generator's
    folder. They are in different repositories of the hub, so each has its revision.

    Raises:
      ValueError: as `load_tokenizer`, and if the two do not fit together.
      FileNotFoundError: as `load_tokenizer`, and if no tokenizer belongs to the generator and none is named.
    """
    revisions = {"revision": revision, "tokenizer_revision": tokenizer_revision, "token": token}
    pair_configs(source, tokenizer, **revisions)  # so that what does not fit is known before weights are read
    generator = load_generator(source, dtype=dtype, mesh=mesh, revision=revision, token=token)
    source = source if tokenizer is None else tokenizer
    return load_tokenizer(source, dtype=dtype, mesh=mesh, revision=tokenizer_revision, token=token), generator


def pair_configs(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[TiTokConfig, GeneratorConfig]:
    """The configurations of what `load_pair` loads, checked against each other; reads no weights, errors as there."""
    generator = pretrained.load_config(source, GeneratorConfig, revision=revision, token=token)
    if tokenizer is None and source not in zoo.names("tokenizer") and not (epath.Path(source) / "tokenizer").is_dir():
        raise FileNotFoundError(f"{source} holds no sub-folder tokenizer: name the tokenizer of this generator")
    source = source if tokenizer is None else tokenizer
    pair = load_tokenizer_config(source, revision=tokenizer_revision, token=token), generator
    check_pair(*pair)
    return pair


def check_pair(tokenizer: TiTokConfig, generator: GeneratorConfig) -> None:
    """Raises ValueError unless the tokenizer makes the tokens that the generator is for."""
    if tokenizer.quantize_mode != "vq":
        raise ValueError("the tokenizer is a VAE, which has no token ids; the generator needs a vq tokenizer")
    for what, ours, theirs in (
        ("tokens per image", tokenizer.num_latent_tokens, generator.num_tokens),
        ("codebook size", tokenizer.codebook_size, generator.codebook_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the tokenizer does not fit the generator: {what} {ours} against {theirs}; name the one it was trained with"
            )
