"""The MaskGIT-VQGAN (Chang et al. 2022, "MaskGIT: Masked Generative Image Transformer"): a convolutional tokenizer with one
code per 16 x 16 pixels. TiTok's stage 1 predicts its codes, and TiTok's stage 2 uses its decoder to make pixels.

Two details of the published code look like mistakes, but the weights depend on them:

- If a residual block changes the number of channels, its shortcut is a projection of the block's own *output*. The block's
  input is not added at all (`ResBlock`).
- The convolutions in residual blocks and the encoder's first convolution have no bias. All others have one.

Parameter paths are the published names. Levels and blocks have string keys ("0", "1", ...), so that a nested dict of
parameters looks the same whether it comes from a module or from a file. The decoder's `up` is numbered from the finest level
but runs from the coarsest.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax.models import published
from titok_jax.models.layers import GroupNorm, float_images, uniform_init
from titok_jax.models.quantizer import codebook_distances
from titok_jax.runtime.sharding import any_mesh


@dataclasses.dataclass(frozen=True)
class MaskgitVQGANConfig:
    """Sizes of a MaskGIT-VQGAN; the defaults are the published model (ImageNet, 256 x 256).

    Attributes:
      hidden_channels: width of the finest level, a multiple of 32 (GroupNorm uses 32 groups).
      channel_mult: width of each level in units of `hidden_channels`, finest first. Every level but the last halves the
        image.
      num_res_blocks: residual blocks per level, and in the middle.
      z_channels: width of the latents and of the codebook.
      codebook_size: number of codes.
      num_channels: channels of the images.
      resolution: side of the training images in pixels. The model accepts any multiple of `downsampling`.
    """

    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 1024
    num_channels: int = 3
    resolution: int = 256

    def __post_init__(self):
        published.check_fields(self)
        if self.hidden_channels % 32:
            raise ValueError(f"hidden_channels is {self.hidden_channels}, expected a multiple of 32")
        if self.resolution % self.downsampling:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {self.downsampling}, as channel_mult wants")

    @property
    def image_size(self) -> int:
        """`resolution` under the name that the other models use."""
        return self.resolution

    @property
    def downsampling(self) -> int:
        """Pixels per side of the square that one code represents."""
        return 2 ** (len(self.channel_mult) - 1)

    # The names under which every image tokenizer tells what it makes; see TiTokConfig.
    has_tokens = has_codebook = True
    predicts_codes = False

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of one image's codes, at `resolution`."""
        return (self.resolution // self.downsampling,) * 2

    @property
    def num_latent_tokens(self) -> int:
        """Codes per image, at `resolution`."""
        return self.token_shape[0] ** 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.hidden_channels * m for m in self.channel_mult)

    # The published weights come without a configuration. This is the format of our own `config.json`.

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> "MaskgitVQGANConfig":
        """Reads `{"model": {"maskgit_vqgan": {...}}}`. Missing keys have their defaults.

        Raises:
          ValueError: for a configuration of another model, an unknown key or a bad value.
        """
        fields = published.section(config, "model.maskgit_vqgan", "MaskGIT-VQGAN")
        return published.take_all(fields, cls, "model.maskgit_vqgan")

    def to_published(self) -> dict[str, Any]:
        """The configuration in a format that `from_published` reads back unchanged."""
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}
        return {"model": {"maskgit_vqgan": fields}}


def conv(in_channels: int, out_channels: int, size: int, *, use_bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Conv | nnx.Linear:
    """A convolution over [B, H, W, C] with "same" padding and stride 1. As in torch, kernel and bias are initialised
    uniformly within fan_in^-0.5. A convolution of size 1 is a matrix product, which is faster on a CPU."""
    init = uniform_init((in_channels * size * size) ** -0.5)
    options = {"use_bias": use_bias, "kernel_init": init, "bias_init": init, "dtype": dtype, "rngs": rngs}
    if size == 1:
        return nnx.Linear(in_channels, out_channels, **options)
    return nnx.Conv(in_channels, out_channels, (size, size), padding="SAME", **options)


def downsample(x: jax.Array) -> jax.Array:
    """[B, 2h, 2w, C] -> [B, h, w, C], the mean of each 2 x 2 square."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, 2h, 2w, C], nearest neighbour: each element is repeated four times."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class ResBlock(nnx.Module):
    """(GroupNorm, SiLU, 3x3 convolution) twice. If the width stays the same, the input is added. If it changes, the
    projected output is added."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, epsilon=1e-6, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels, 3, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, epsilon=1e-6, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, 3, use_bias=False, dtype=dtype, rngs=rngs)
        self.widens = in_channels != out_channels
        if self.widens:
            self.nin_shortcut = conv(out_channels, out_channels, 1, use_bias=False, dtype=dtype, rngs=rngs)

    def transform(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C_in] -> the transformed state [B, H, W, C_out], before the shortcut."""
        x = self.conv1(jax.nn.silu(self.norm1(x)))
        return self.conv2(jax.nn.silu(self.norm2(x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.transform(x)
        # The projection is of the transformed state, not of x: the published weights were trained this way.
        return h + (self.nin_shortcut(h) if self.widens else x)


def _res_blocks(in_channels: int, out_channels: int, count: int, *, dtype, rngs: nnx.Rngs) -> nnx.Dict:
    """`count` blocks under the keys "0", "1", ...; the first one changes the width."""
    widths = [in_channels] + [out_channels] * (count - 1)
    return nnx.Dict({str(i): ResBlock(width, out_channels, dtype=dtype, rngs=rngs) for i, width in enumerate(widths)})


def _run(blocks: nnx.Dict, x: jax.Array) -> jax.Array:
    for i in range(len(blocks)):
        x = blocks[str(i)](x)
    return x


class DownLevel(nnx.Module):
    """One level of the encoder: residual blocks, then downsampling by 2 if `halves`."""

    def __init__(self, in_channels: int, out_channels: int, count: int, *, halves: bool, dtype, rngs: nnx.Rngs):
        self.block = _res_blocks(in_channels, out_channels, count, dtype=dtype, rngs=rngs)
        self.halves = halves

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C_in] -> [B, h/2, w/2, C_out], or [B, h, w, C_out] at the coarsest level."""
        x = _run(self.block, x)
        return downsample(x) if self.halves else x


class UpLevel(nnx.Module):
    """One level of the decoder: residual blocks, then upsampling by 2 and a convolution if `doubles`."""

    def __init__(self, in_channels: int, out_channels: int, count: int, *, doubles: bool, dtype, rngs: nnx.Rngs):
        self.block = _res_blocks(in_channels, out_channels, count, dtype=dtype, rngs=rngs)
        self.doubles = doubles
        if doubles:
            self.upsample_conv = conv(out_channels, out_channels, 3, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C_in] -> [B, 2h, 2w, C_out], or [B, h, w, C_out] at the finest level."""
        x = _run(self.block, x)
        return self.upsample_conv(upsample(x)) if self.doubles else x


class Encoder(nnx.Module):
    """Maps images to continuous latents."""

    def __init__(self, config: MaskgitVQGANConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        widths, n = config.widths, config.num_res_blocks
        self.downsampling = config.downsampling
        self.conv_in = conv(config.num_channels, config.hidden_channels, 3, use_bias=False, dtype=dtype, rngs=rngs)
        inputs, last = (config.hidden_channels, *widths), len(widths) - 1
        self.down = nnx.Dict(
            {
                str(i): DownLevel(inputs[i], width, n, halves=i < last, dtype=dtype, rngs=rngs)
                for i, width in enumerate(widths)
            }
        )
        self.mid = _res_blocks(widths[-1], widths[-1], n, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], epsilon=1e-6, rngs=rngs)
        self.conv_out = conv(widths[-1], config.z_channels, 1, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3] in [0, 1] -> latents [B, H/16, W/16, z_channels] (published sizes).

        Raises:
          ValueError: if `downsampling` does not divide the height and the width.
        """
        if images.shape[1] % self.downsampling or images.shape[2] % self.downsampling:
            height, width = images.shape[1:3]
            raise ValueError(f"images of {height} x {width} pixels: the encoder needs multiples of {self.downsampling}")
        x = self.conv_in(images)
        x = _run(self.down, x)
        x = _run(self.mid, x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Maps code vectors, or mixtures of them, to pixels."""

    def __init__(self, config: MaskgitVQGANConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        widths, n = config.widths, config.num_res_blocks
        self.conv_in = conv(config.z_channels, widths[-1], 3, use_bias=True, dtype=dtype, rngs=rngs)
        self.mid = _res_blocks(widths[-1], widths[-1], n, dtype=dtype, rngs=rngs)
        inputs = (*widths[1:], widths[-1])
        self.up = nnx.Dict(
            {str(i): UpLevel(inputs[i], width, n, doubles=i > 0, dtype=dtype, rngs=rngs) for i, width in enumerate(widths)}
        )
        self.norm_out = GroupNorm(widths[0], epsilon=1e-6, rngs=rngs)
        self.conv_out = conv(widths[0], config.num_channels, 3, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, z_q: jax.Array) -> jax.Array:
        """z_q [B, h, w, z_channels] -> pixels [B, 16 h, 16 w, 3] (published sizes), near [0, 1] but not clamped."""
        x = self.conv_in(z_q)
        x = _run(self.mid, x)
        for i in reversed(range(len(self.up))):
            x = self.up[str(i)](x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class VQGANQuantizerOutput:
    """Outputs of the quantizer for latents z [B, h, w, C].

    Attributes:
      quantized: [B, h, w, C] float32, the chosen code vectors. Their gradient passes straight through to z.
      tokens: [B, h, w] int32.
      commitment_loss: mean((sg(q) - z)^2), which pulls latents to their codes.
      codebook_loss: mean((q - sg(z))^2), the same number, which pulls codes to their latents.

    One of the two losses is weighted by 0.25 in training. The original training, van den Oord et al. 2017 (eq. 3) and TiTok
    weight the commitment loss; the published PyTorch port weights the codebook loss.
    """

    quantized: jax.Array
    tokens: jax.Array
    commitment_loss: jax.Array
    codebook_loss: jax.Array


class VQGANQuantizer(nnx.Module):
    """Nearest code by Euclidean distance, in float32."""

    def __init__(self, codebook_size: int, channels: int, *, rngs: nnx.Rngs):
        # As in the original JAX code. The PyTorch port has 1 / codebook_size, with which a training uses fewer codes.
        init = uniform_init((3.0 / codebook_size) ** 0.5)
        self.embedding = nnx.Param(init(rngs.params(), (codebook_size, channels)))

    @any_mesh
    def distances(self, z: jax.Array) -> jax.Array:
        """z [..., C] -> squared distances to every code [..., K] float32."""
        return codebook_distances(z, self.embedding[...])

    @any_mesh
    def codes(self, z: jax.Array) -> jax.Array:
        """z [..., C] -> [...] int32, the nearest codes; the lowest index wins a tie."""
        return jnp.argmin(self.distances(z), axis=-1).astype(jnp.int32)

    @any_mesh
    def lookup(self, codes: jax.Array) -> jax.Array:
        """codes [...] int -> code vectors [..., C] float32."""
        return self.embedding[...][codes]

    @any_mesh
    def soft_code(self, z: jax.Array) -> jax.Array:
        """z [..., C] -> a distribution over the codes [..., K] float32: the softmax of the negative squared distances."""
        return jax.nn.softmax(-self.distances(z), axis=-1)

    @any_mesh
    def __call__(self, z: jax.Array) -> VQGANQuantizerOutput:
        """z [B, h, w, C] -> VQGANQuantizerOutput."""
        z = z.astype(jnp.float32)
        codes = self.codes(z)
        q = self.lookup(codes)
        commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(q) - z))
        codebook = jnp.mean(jnp.square(q - jax.lax.stop_gradient(z)))
        quantized = z + jax.lax.stop_gradient(q - z)
        return VQGANQuantizerOutput(quantized, codes, commitment, codebook)


class MaskgitVQGAN(nnx.Module):
    """The complete tokenizer. Its quantizer `quantize` (`VQGANQuantizer`) always computes in float32."""

    def __init__(self, config: MaskgitVQGANConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quantize = VQGANQuantizer(config.codebook_size, config.z_channels, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    @any_mesh
    def encode(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3], uint8 or float in [0, 1] -> latents z [B, h, w, C] float32, before quantization."""
        return self.encoder(float_images(images)).astype(jnp.float32)

    @any_mesh
    def get_codes(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3] in [0, 1] -> codes [B, h, w] int32."""
        return self.quantize.codes(self.encode(images))

    @any_mesh
    def decode(self, z_q: jax.Array) -> jax.Array:
        """Code vectors [B, h, w, C] -> pixels [B, H, W, 3] float32, not clamped, so that losses can use them."""
        return self.decoder(z_q).astype(jnp.float32)

    @any_mesh
    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """codes [B, h, w] int -> images [B, H, W, 3] float32, clamped to [0, 1].

        Raises:
          ValueError: if the codes do not have three axes.
        """
        if codes.ndim != 3:
            raise ValueError(f"codes of shape {codes.shape}: expected [batch, height, width]")
        return jnp.clip(self.decode(self.quantize.lookup(codes)), 0.0, 1.0)
