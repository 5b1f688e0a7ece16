"""TiTok: an image as a short 1D sequence of tokens (Yu et al., "An Image is Worth 32 Tokens", arXiv 2406.07550, section 3).

The encoder passes patches and K latent tokens through a transformer and returns the latent tokens. The bottleneck is a
vector quantizer or a diagonal Gaussian. The decoder passes the latents and a grid of mask tokens through a transformer and
returns the grid as pixels. In the legacy two-stage models it returns 1024 logits per cell instead. These predict the codes
of a MaskGIT-VQGAN, and stage 2 turns them into pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax.models import published
from titok_jax.models.layers import (
    LayerNorm,
    PreNormBlock,
    float_images,
    make_stack,
    normal_002,
    normal_init,
    run_stack,
    uniform_init,
)
from titok_jax.models.maskgit_vqgan import Decoder as PixelDecoder
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.quantizer import DiagonalGaussian, QuantizerOutput, VectorQuantizer
from titok_jax.runtime.sharding import any_mesh, hint

PROXY_CODES = 1024  # codebook size of the MaskGIT-VQGAN whose codes legacy decoders predict


@dataclasses.dataclass(frozen=True)
class TransformerSize:
    width: int
    num_layers: int
    num_heads: int

    def __post_init__(self):
        published.check_fields(self)
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")


TRANSFORMER_SIZES = {
    "small": TransformerSize(512, 8, 8),
    "base": TransformerSize(768, 12, 12),
    "large": TransformerSize(1024, 24, 16),
}


# Keys of the published training configurations that do not decide the network: which VQGAN stage 1 and 2 start from, and
# whether unused codes are restarted.
_OF_TRAINING = {"pretrained_tokenizer_weight": str, "clustering_vq": bool}


@dataclasses.dataclass(frozen=True)
class TiTokConfig:
    """Architecture of a TiTok tokenizer.

    Attributes:
      image_size: height and width of the images in pixels.
      patch_size: pixels per side of an encoder patch, and of a cell of the decoder's grid.
      num_latent_tokens: tokens per image.
      token_size: channels of a latent.
      quantize_mode: "vq" (discrete tokens) or "vae" (continuous ones).
      codebook_size, use_l2_norm, commitment_cost: settings of the vector quantizer; a VAE ignores them.
      encoder, decoder: sizes of the transformers.
      is_legacy: True for the published two-stage models (L-32, B-64, S-128), which reshape latents without transposing and
        whose decoder predicts VQGAN codes. False for the single-stage models, whose decoder predicts pixels.
      finetune_decoder: for legacy models only. True is stage 2, with the VQGAN's pixel decoder. False is stage 1, which
        outputs logits.
      pixel_decoder: the VQGAN whose decoder stage 2 uses.

    A model with another quantizer derives its configuration from this class (`titok_jax.models.register`). Fields that it
    adds are numbers, strings, booleans or tuples of whole numbers.

    Raises:
      ValueError: for numbers that contradict each other.
    """

    image_size: int = 256
    patch_size: int = 16
    num_latent_tokens: int = 32
    token_size: int = 12
    quantize_mode: str = "vq"
    codebook_size: int = 4096
    use_l2_norm: bool = True
    commitment_cost: float = 0.25
    encoder: TransformerSize = TRANSFORMER_SIZES["base"]
    decoder: TransformerSize = TRANSFORMER_SIZES["base"]
    is_legacy: bool = True
    finetune_decoder: bool = True
    pixel_decoder: MaskgitVQGANConfig = dataclasses.field(default_factory=MaskgitVQGANConfig)

    def __post_init__(self):
        published.check_fields(self)
        if self.quantize_mode not in ("vq", "vae"):
            raise ValueError(f"quantize_mode is {self.quantize_mode!r}, expected 'vq' or 'vae'")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.is_legacy and self.quantize_mode == "vae":
            raise ValueError("a legacy TiTok is a vq model; a vae needs is_legacy False")
        pixel = self.pixel_decoder
        if (
            self.is_legacy
            and self.finetune_decoder
            and (pixel.downsampling != self.patch_size or pixel.codebook_size != PROXY_CODES or pixel.num_channels != 3)
        ):
            raise ValueError(
                f"the pixel decoder (the VQGAN) has {pixel.codebook_size} codes, one per {pixel.downsampling} x "
                f"{pixel.downsampling} pixels, and {pixel.num_channels} channels; stage 2 takes {PROXY_CODES}, one per "
                f"{self.patch_size} x {self.patch_size} (patch_size), and 3"
            )

    @property
    def grid_size(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def has_tokens(self) -> bool:
        """Whether an image becomes token ids; False if it becomes continuous latents."""
        return self.quantize_mode == "vq"

    @property
    def has_codebook(self) -> bool:
        """Whether the token ids are rows of a codebook that is trained (the parameter `quantize/embedding`)."""
        return self.has_tokens

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of one image's tokens."""
        return (self.num_latent_tokens,) if self.has_tokens else (self.num_latent_tokens, self.token_size)

    @property
    def predicts_codes(self) -> bool:
        """Whether the model outputs logits of VQGAN codes (stage 1) instead of an image."""
        return self.is_legacy and not self.finetune_decoder

    # Conversion from and to the published config.json.

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> "TiTokConfig":
        """Reads the published `config.json`. Missing keys have the defaults of the published code.

        Our own models may have transformers of other sizes than small, base or large. In place of the name, the file then
        holds `{"width": ., "num_layers": ., "num_heads": .}`.

        Raises:
          ValueError: for a missing section or key, an unknown key or a bad value.
        """
        vq = published.section(config, "model.vq_model", "tokenizer")
        where, image = "dataset.preprocessing", published.section(config, "dataset.preprocessing", "tokenizer")
        if "crop_size" not in image:
            raise ValueError(f"tokenizer configuration lacks {where}.crop_size")
        names = {
            "num_latent_tokens": "num_latent_tokens",
            "token_size": "token_size",
            "quantize_mode": "quantize_mode",
            "codebook_size": "codebook_size",
            "use_l2_norm": "use_l2_norm",
            "commitment_cost": "commitment_cost",
            "is_legacy": "is_legacy",
            "finetune_decoder": "finetune_decoder",
            "vit_enc_patch_size": "patch_size",
        }
        required = ["num_latent_tokens", "token_size", "vit_enc_model_size", "vit_dec_model_size", "vit_enc_patch_size"]
        if vq.get("quantize_mode", "vq") == "vq":
            required.append("codebook_size")
        missing = [key for key in required if key not in vq]
        if missing:
            raise ValueError(f"tokenizer configuration lacks model.vq_model.{{{', '.join(missing)}}}")
        fields = published.take(image, {"crop_size": "image_size"}, cls, where)
        fields |= published.take(vq, names, cls, "model.vq_model")
        for tower, key in (("encoder", "vit_enc_model_size"), ("decoder", "vit_dec_model_size")):
            fields[tower] = transformer_size(vq.pop(key), f"model.vq_model.{key}")
        decoder = published.take(vq, {"vit_dec_patch_size": "patch_size"}, cls, "model.vq_model")
        if decoder.get("patch_size", fields["patch_size"]) != fields["patch_size"]:
            raise ValueError("vit_enc_patch_size and vit_dec_patch_size differ; one size for both is supported")
        # Fields that a derived configuration adds have the same names in the file.
        fields |= published.take(vq, {name: name for name in _added_fields(cls)}, cls, "model.vq_model")
        for key, kind in _OF_TRAINING.items():
            if key in vq:
                published.check(f"model.vq_model.{key}", vq.pop(key), key, kind)
        if "pixel_decoder" in vq:
            where = "model.vq_model.pixel_decoder"
            fields["pixel_decoder"] = published.take_all(vq.pop("pixel_decoder"), MaskgitVQGANConfig, where)
        published.check_all_taken(vq, "model.vq_model", (*names, *required, *_OF_TRAINING))
        return cls(**fields)

    def to_published(self) -> dict[str, Any]:
        """The configuration in the published format of `config.json`. `from_published` reads it back unchanged."""
        vq: dict[str, Any] = {
            "quantize_mode": self.quantize_mode,
            "token_size": self.token_size,
            "vit_enc_model_size": _size_name(self.encoder),
            "vit_dec_model_size": _size_name(self.decoder),
            "vit_enc_patch_size": self.patch_size,
            "vit_dec_patch_size": self.patch_size,
            "num_latent_tokens": self.num_latent_tokens,
            "finetune_decoder": self.finetune_decoder,
            "is_legacy": self.is_legacy,
        }
        if self.has_tokens:
            vq |= {
                "codebook_size": self.codebook_size,
                "use_l2_norm": self.use_l2_norm,
                "commitment_cost": self.commitment_cost,
            }
        if self.pixel_decoder != MaskgitVQGANConfig():
            pixel = dataclasses.asdict(self.pixel_decoder)
            vq["pixel_decoder"] = {k: list(v) if isinstance(v, tuple) else v for k, v in pixel.items()}
        added = {name: getattr(self, name) for name in _added_fields(type(self))}
        vq |= {name: list(value) if isinstance(value, tuple) else value for name, value in added.items()}
        return {"model": {"vq_model": vq}, "dataset": {"preprocessing": {"crop_size": self.image_size}}}


def _added_fields(cls: type[TiTokConfig]) -> list[str]:
    """The names of the fields that a derived class has beside those of TiTokConfig."""
    known = {field.name for field in dataclasses.fields(TiTokConfig)}
    return [field.name for field in dataclasses.fields(cls) if field.name not in known]


def transformer_size(value: Any, where: str = "transformer size") -> TransformerSize:
    """A size by name (small, base, large) or as {"width": ., "num_layers": ., "num_heads": .}.

    Raises:
      ValueError: if it is neither. The message calls it `where`.
    """
    if isinstance(value, str) and value in TRANSFORMER_SIZES:
        return TRANSFORMER_SIZES[value]
    if isinstance(value, Mapping) and set(value) == {"width", "num_layers", "num_heads"}:
        return published.take_all(value, TransformerSize, where)
    raise ValueError(
        f"{where} is {value!r}, expected one of {sorted(TRANSFORMER_SIZES)} or "
        "{'width': int, 'num_layers': int, 'num_heads': int}"
    )


def _size_name(size: TransformerSize) -> str | dict[str, int]:
    for name, known in TRANSFORMER_SIZES.items():
        if size == known:
            return name
    return dataclasses.asdict(size)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H/p W/p, p p C], patches row by row. A matmul on the result is the strided convolution."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(x: jax.Array, patch_size: int) -> jax.Array:
    """[B, h, w, p p C] -> [B, h p, w p, C], pixel order (row, column, channel) within a patch."""
    b, h, w, d = x.shape
    p = patch_size
    x = x.reshape(b, h, w, p, p, d // (p * p)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, d // (p * p))


def legacy_reshape(latents: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, N, D], wrong on purpose.

    The published legacy encoder reinterprets the row-major [N, D] block of each image as [D, N] instead of transposing it.
    So "token n, channel d" of the result is element d N + n of the block. The weights of L-32, B-64 and S-128 were trained
    with this.
    """
    b, n, d = latents.shape
    return latents.reshape(b, d, n).transpose(0, 2, 1)


class Encoder(nnx.Module):
    """Maps images and latent tokens to latents."""

    def __init__(
        self, config: TiTokConfig, *, dtype=jnp.float32, remat: str = "none", scan_layers: bool | None = True, rngs: nnx.Rngs
    ):
        self.config, self.dtype = config, dtype
        self.remat, self.scan_layers = remat, scan_layers
        size, grid = config.encoder, config.grid_size
        init = normal_init(size.width**-0.5)
        self.patch_embed = nnx.Linear(3 * config.patch_size**2, size.width, kernel_init=normal_002, dtype=dtype, rngs=rngs)
        self.class_embedding = nnx.Param(init(rngs.params(), (1, size.width)))
        self.positional_embedding = nnx.Param(init(rngs.params(), (grid**2 + 1, size.width)))
        self.latent_token_positional_embedding = nnx.Param(init(rngs.params(), (config.num_latent_tokens, size.width)))
        self.ln_pre = LayerNorm(size.width, dtype=dtype, rngs=rngs)
        self.transformer = make_stack(
            lambda rngs: PreNormBlock(size.width, size.num_heads, 4 * size.width, dtype=dtype, rngs=rngs),
            size.num_layers,
            rngs,
        )
        self.ln_post = LayerNorm(size.width, dtype=dtype, rngs=rngs)
        channels = config.token_size * (1 if config.has_tokens else 2)
        self.conv_out = nnx.Linear(size.width, channels, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def embed(self, images: jax.Array, latent_tokens: jax.Array) -> jax.Array:
        """images [B, H, W, 3], latent tokens [N, D] -> [B, 1 + patches + N, D]: class, patches, latents; all with
        positions."""
        b = images.shape[0]
        patches = self.patch_embed(patchify(images.astype(self.dtype), self.config.patch_size))
        width = patches.shape[-1]
        cls = jnp.broadcast_to(self.class_embedding[...], (b, 1, width)).astype(self.dtype)
        x = jnp.concatenate([cls, patches], axis=1) + self.positional_embedding[...].astype(self.dtype)
        latents = (latent_tokens + self.latent_token_positional_embedding[...]).astype(self.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(latents, (b, *latents.shape))], axis=1)

    def readout(self, x: jax.Array) -> jax.Array:
        """Transformer output [B, 1 + patches + N, D] -> the input of `conv_out` [B, N, D]."""
        latents = self.ln_post(x[:, -self.config.num_latent_tokens :])
        return legacy_reshape(latents) if self.config.is_legacy else latents

    def __call__(self, images: jax.Array, latent_tokens: jax.Array) -> jax.Array:
        """Returns float32 latents [B, N, token_size]; a VAE returns [B, N, 2 token_size] (mean, logvar)."""
        x = self.ln_pre(self.embed(images, latent_tokens))
        x, _ = run_stack(self.transformer, x, remat=self.remat, scan=self.scan_layers)
        return self.conv_out(self.readout(x)).astype(jnp.float32)


class Decoder(nnx.Module):
    """Maps latents to a grid of 1024 logits per cell (legacy) or to pixels, by filling in mask tokens."""

    def __init__(
        self, config: TiTokConfig, *, dtype=jnp.float32, remat: str = "none", scan_layers: bool | None = True, rngs: nnx.Rngs
    ):
        self.config, self.dtype = config, dtype
        self.remat, self.scan_layers = remat, scan_layers
        size, grid = config.decoder, config.grid_size
        init = normal_init(size.width**-0.5)

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, kernel_init=normal_002, dtype=dtype, rngs=rngs)

        self.decoder_embed = linear(config.token_size, size.width)
        self.class_embedding = nnx.Param(init(rngs.params(), (1, size.width)))
        self.positional_embedding = nnx.Param(init(rngs.params(), (grid**2 + 1, size.width)))
        self.mask_token = nnx.Param(init(rngs.params(), (1, 1, size.width)))
        self.latent_token_positional_embedding = nnx.Param(init(rngs.params(), (config.num_latent_tokens, size.width)))
        self.ln_pre = LayerNorm(size.width, dtype=dtype, rngs=rngs)
        self.transformer = make_stack(
            lambda rngs: PreNormBlock(size.width, size.num_heads, 4 * size.width, dtype=dtype, rngs=rngs),
            size.num_layers,
            rngs,
        )
        self.ln_post = LayerNorm(size.width, dtype=dtype, rngs=rngs)
        if config.is_legacy:
            self.ffn_0 = linear(size.width, 2 * size.width)
            self.ffn_2 = linear(2 * size.width, PROXY_CODES)
        else:
            self.ffn_0 = linear(size.width, 3 * config.patch_size**2)
            self.conv_out = nnx.Conv(3, 3, (3, 3), padding="SAME", kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def embed(self, z: jax.Array) -> jax.Array:
        """z [B, N, token_size] -> [B, 1 + cells + N, D]: class, mask tokens, latents; all with positions."""
        b, cells = z.shape[0], self.config.grid_size**2
        latents = self.decoder_embed(z.astype(self.dtype))
        width = latents.shape[-1]
        cls = jnp.broadcast_to(self.class_embedding[...], (b, 1, width))
        grid = jnp.broadcast_to(self.mask_token[...], (b, cells, width))
        x = jnp.concatenate([cls, grid], axis=1) + self.positional_embedding[...]
        latents = latents + self.latent_token_positional_embedding[...].astype(self.dtype)
        return jnp.concatenate([x.astype(self.dtype), latents], axis=1)

    def readout(self, x: jax.Array) -> jax.Array:
        """Transformer output [B, 1 + cells + N, D] -> the grid [B, h, w, D]."""
        grid = self.config.grid_size
        x = self.ln_post(x[:, 1 : 1 + grid**2])
        return x.reshape(x.shape[0], grid, grid, x.shape[-1])

    def ffn(self, x: jax.Array) -> jax.Array:
        """Grid [B, h, w, D] -> logits [B, h, w, 1024] (legacy) or pixels [B, H, W, 3] before the last convolution."""
        if self.config.is_legacy:
            return hint(self.ffn_2(hint(jnp.tanh(self.ffn_0(x)), "batch")), "batch")
        return unpatchify(hint(self.ffn_0(x), "batch"), self.config.patch_size)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns float32 logits [B, h, w, 1024] (legacy) or float32 images [B, H, W, 3], not clamped."""
        x = self.ln_pre(self.embed(z))
        x, _ = run_stack(self.transformer, x, remat=self.remat, scan=self.scan_layers)
        x = self.ffn(self.readout(x))
        if not self.config.is_legacy:
            x = self.conv_out(x)
        return x.astype(jnp.float32)


class _PixelCodebook(nnx.Module):
    """The codes of the VQGAN, in a module of their own, so that their published name ends in `embedding.weight`."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(uniform_init(1.0 / rows)(rngs.params(), (rows, width)))


class TiTok(nnx.Module):
    """The tokenizer. Images are NHWC float32 in [0, 1], latents [B, N, C] float32, tokens [B, N] int32."""

    def __init__(
        self, config: TiTokConfig, *, dtype=jnp.float32, remat: str = "none", scan_layers: bool | None = True, rngs: nnx.Rngs
    ):
        """
        Args:
          dtype: computation dtype. Parameters are float32, and the bottleneck always computes in float32.
          remat, scan_layers: how the blocks run, see `layers.run_stack`.
        """
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, remat=remat, scan_layers=scan_layers, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, remat=remat, scan_layers=scan_layers, rngs=rngs)
        width = config.encoder.width
        self.latent_tokens = nnx.Param(normal_init(width**-0.5)(rngs.params(), (config.num_latent_tokens, width)))
        if config.has_tokens:
            self.quantize = self.make_quantizer(rngs)
        if config.is_legacy and config.finetune_decoder:
            self.pixel_quantize = _PixelCodebook(config.pixel_decoder.codebook_size, config.pixel_decoder.z_channels, rngs)
            self.pixel_decoder = PixelDecoder(config.pixel_decoder, dtype=dtype, rngs=rngs)

    def make_quantizer(self, rngs: nnx.Rngs) -> nnx.Module:
        """The quantizer. A model with another one overrides this; what it returns has the methods of VectorQuantizer."""
        config = self.config
        options = {"commitment_cost": config.commitment_cost, "use_l2_norm": config.use_l2_norm, "rngs": rngs}
        return VectorQuantizer(config.codebook_size, config.token_size, **options)

    @any_mesh
    def encode(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3], uint8 or float in [0, 1] -> input of the bottleneck [B, N, token_size] (VAE: [B, N, 2
        token_size])."""
        return self.encoder(float_images(images), self.latent_tokens[...])

    @any_mesh
    def quantized(self, images: jax.Array) -> QuantizerOutput:
        """Encodes and quantizes images. For vq models only."""
        return self.quantize(self.encode(images))

    @any_mesh
    def posterior(self, images: jax.Array) -> DiagonalGaussian:
        """Encodes images. For VAEs only."""
        return DiagonalGaussian.from_moments(self.encode(images))

    @any_mesh
    def soft_codes(self, logits: jax.Array) -> jax.Array:
        """Stage 2: logits [B, h, w, 1024] -> mixture of VQGAN code vectors [B, h, w, 256]."""
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.einsum("bhwk,kc->bhwc", weights, self.pixel_quantize.embedding[...])

    @any_mesh
    def decode(self, z: jax.Array) -> jax.Array:
        """Latents [B, N, token_size] after the bottleneck -> images [B, H, W, 3], not clamped. A stage 1 model returns
        logits [B, h, w, 1024] instead."""
        x = self.decoder(z)
        if self.config.is_legacy and self.config.finetune_decoder:
            return self.pixel_decoder(self.soft_codes(x)).astype(jnp.float32)
        return x

    @any_mesh
    def decode_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens int [B, N] -> the output of `decode`. For vq models only."""
        return self.decode(self.quantize.lookup(tokens))
