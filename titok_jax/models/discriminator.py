"""The convolutional discriminator for stage 2 and single-stage training.

It is the "improved" PatchGAN of TiTok's published code, with GroupNorm and with blurred downsampling after Zhang 2019,
"Making Convolutional Networks Shift-Invariant Again".
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from titok_jax.models import published
from titok_jax.models.layers import GroupNorm, float_images, target_platform
from titok_jax.models.maskgit_vqgan import conv
from titok_jax.runtime.sharding import any_mesh

BLUR_TAPS = (1.0, 3.0, 3.0, 1.0)  # the blur kernel is the outer product of these with themselves, divided by its sum


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are the published ones, for 256 x 256 images.

    Attributes:
      num_channels: channels of the images.
      hidden_channels: width of the first convolution, a multiple of 32 (GroupNorm uses 32 groups). The first stage keeps
        this width, and each later stage doubles it.
      num_stages: number of stages. Each stage halves the image.
      logits_size: height and width of the grid of logits, independent of the image size (published: 16). A grid finer than
        the output of the last stage repeats elements, so choose image size / 2^num_stages or less for smaller images.
    """

    num_channels: int = 3
    hidden_channels: int = 128
    num_stages: int = 3
    logits_size: int = 16

    def __post_init__(self):
        published.check_fields(self)
        if self.hidden_channels % 32:
            raise ValueError(f"hidden_channels is {self.hidden_channels}, expected a multiple of 32")


def _leaky_relu(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.1)


def _blur_axis(x: jax.Array, axis: int) -> jax.Array:
    """Applies the taps along one axis with stride 2 and "same" zero padding, in float32: n -> ceil(n / 2)."""
    n = x.shape[axis]
    out = -(-n // 2)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 2 * out + 1 - n)
    x = jnp.pad(x, padding)
    shifted = [jax.lax.slice_in_dim(x, k, k + 2 * out - 1, 2, axis) for k in range(len(BLUR_TAPS))]
    return sum(tap / sum(BLUR_TAPS) * part for tap, part in zip(BLUR_TAPS, shifted, strict=True))


def blur_shifted(x: jax.Array) -> jax.Array:
    """The blur as a sum of shifted arrays. On a CPU a depthwise convolution takes 3 times as long, and its gradient 20
    times."""
    return _blur_axis(_blur_axis(x.astype(jnp.float32), 1), 2).astype(x.dtype)


def blur_convolution(x: jax.Array) -> jax.Array:
    """The same as a depthwise convolution. The taps are exact in bfloat16; float32 is multiplied in float32."""
    channels = x.shape[-1]
    taps = np.outer(BLUR_TAPS, BLUR_TAPS) / sum(BLUR_TAPS) ** 2
    kernel = jnp.broadcast_to(jnp.asarray(taps, x.dtype)[:, :, None, None], (*taps.shape, 1, channels))
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (2, 2),
        [(1, 2 * -(-n // 2) + 1 - n) for n in x.shape[1:3]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        precision=jax.lax.Precision.HIGHEST,
    )


def blur_downsample(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C]: the 4 x 4 blur with stride 2 and "same" zero padding, in the form that
    is fast on the platform. The taps are constants because an array held by an nnx module would be trained."""
    return (blur_convolution if target_platform() == "tpu" else blur_shifted)(x)


def _max_axis(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Maximum along one axis over `size` windows. Window i runs from floor(i n / size) to ceil((i + 1) n / size)."""
    n = x.shape[axis]
    starts = np.arange(size) * n // size
    ends = -(-np.arange(1, size + 1) * n // size)
    best = None
    for k in range((ends - starts).max()):
        if n % size == 0:  # adjacent windows: strided slices, whose gradient needs no scatter
            candidate = jax.lax.slice_in_dim(x, k, n, n // size, axis)
        else:
            candidate = jnp.take(x, np.minimum(starts + k, ends - 1), axis=axis)  # repeats a window's end
        if best is None:
            best = candidate
        else:
            # jnp.maximum would split the gradient between equal elements. Torch gives all of it to the first.
            best = jnp.where((candidate > best) | jnp.isnan(candidate), candidate, best)
    return best


def adaptive_max_pool(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, size, size, C], like torch's AdaptiveMaxPool2d. Windows overlap if `size` does not divide H or W,
    and they repeat elements if it is larger. The gradient goes to the first maximum of a window in row-major order."""
    # Columns come first: the first column wins within each row, then the first row wins.
    return _max_axis(_max_axis(x, size, 2), size, 1)


class DiscriminatorStage(nnx.Module):
    """3x3 convolution, blur with stride 2, GroupNorm, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv(in_channels, out_channels, 3, use_bias=True, dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(out_channels, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C_in] -> [B, ceil(H/2), ceil(W/2), C_out]."""
        return _leaky_relu(self.norm(blur_downsample(self.conv(x))))


class NLayerDiscriminator(nnx.Module):
    """Maps images to a grid of logits, which are high for real images. Small images need a small discriminator, for example
    `DiscriminatorConfig(hidden_channels=32, num_stages=2, logits_size=8)` for 32 x 32."""

    def __init__(self, config: DiscriminatorConfig = DiscriminatorConfig(), *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        hidden = config.hidden_channels
        widths = [hidden, *(hidden * 2**i for i in range(config.num_stages))]
        self.block_in = conv(config.num_channels, hidden, 5, use_bias=True, dtype=dtype, rngs=rngs)
        self.blocks = nnx.Dict(
            {str(i): DiscriminatorStage(widths[i], widths[i + 1], dtype=dtype, rngs=rngs) for i in range(config.num_stages)}
        )
        self.to_logits_0 = conv(widths[-1], widths[-1], 1, use_bias=True, dtype=dtype, rngs=rngs)
        self.to_logits_2 = conv(widths[-1], 1, 5, use_bias=True, dtype=dtype, rngs=rngs)

    @any_mesh
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3], uint8 or float in [0, 1] -> logits [B, logits_size, logits_size, 1] float32."""
        x = _leaky_relu(self.block_in(float_images(images)))
        for i in range(len(self.blocks)):
            x = self.blocks[str(i)](x)
        x = adaptive_max_pool(x, self.config.logits_size)
        x = _leaky_relu(self.to_logits_0(x))
        return self.to_logits_2(x).astype(jnp.float32)
