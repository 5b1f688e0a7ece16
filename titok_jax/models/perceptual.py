"""Perceptual distances between images, for losses on pixels: ConvNeXt-S logits, LPIPS, and a weighted mean of the two.

Both networks are pretrained and stay fixed. ConvNeXt-S is torchvision's (Liu et al. 2022, arXiv 2201.03545). LPIPS (Zhang
et al. 2018, arXiv 1801.03924) is torchvision's VGG16 with a linear head per level. Everything is computed in float32.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from titok_jax.models.layers import MLP, LayerNorm, float_images, make_stack, normal_002, run_stack, target_platform
from titok_jax.models.maskgit_vqgan import conv
from titok_jax.runtime import sharding

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The same for images in [-1, 1], rounded as in LPIPS.
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

CONVNEXT_S = ((3, 96), (3, 192), (27, 384), (3, 768))  # blocks and channels of each stage
CONVNEXT_SIZE = 224  # pixels per side of ConvNeXt's input
NUM_CLASSES = 1000
# Convolutions of VGG16 by their torchvision numbers, one level per row, and the levels' channels.
VGG_LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_CHANNELS = (64, 128, 256, 512, 512)


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """Selects a perceptual distance.

    Attributes:
      name: "convnext_s", "lpips", or "lpips-convnext_s-A-B": (A lpips + B convnext_s) / (A + B).

    Raises:
      ValueError: for another name.
    """

    name: str

    def __post_init__(self):
        lpips, convnext = self.weights
        if lpips < 0 or convnext < 0 or lpips + convnext == 0:
            raise ValueError(f"perceptual network {self.name!r}: the weights must not be negative, nor both 0")

    @property
    def weights(self) -> tuple[float, float]:
        """(weight of LPIPS, weight of ConvNeXt)."""
        number = r"(\d+(?:\.\d*)?)"
        match = re.fullmatch(rf"lpips-convnext_s-{number}-{number}", self.name)
        if match:
            return float(match[1]), float(match[2])
        if self.name in ("lpips", "convnext_s"):
            return float(self.name == "lpips"), float(self.name == "convnext_s")
        raise ValueError(
            f"perceptual network {self.name!r}, expected 'convnext_s', 'lpips' or 'lpips-convnext_s-A-B' with two weights"
        )


def resize(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, 3] -> [B, size, size, 3], bilinear, antialiased if it shrinks (torch: `interpolate(antialias=True)`)."""
    shape = (images.shape[0], size, size, images.shape[3])
    # The resize is a matmul. An accelerator's default precision would round the pixels to bfloat16.
    return jax.image.resize(images, shape, "bilinear", antialias=True, precision="highest")


def depthwise_conv_plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [k, k, 1, C] -> [B, H, W, C], with "same" zero padding."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


@jax.custom_vjp
def depthwise_conv_shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same for odd k, as a sum of shifted arrays. On a CPU it is 4 to 30 times as fast, its gradient 8 to 18 times."""
    (_, height, width, _), size = x.shape, kernel.shape[0]
    padding = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    return sum(x[:, i : i + height, j : j + width] * kernel[i, j, 0] for i in range(size) for j in range(size))


def _shifted_forward(x, kernel):
    return depthwise_conv_shifted(x, kernel), (x, kernel)


def _shifted_backward(saved, grad):
    # The gradient of x is the same sum with the flipped kernel. Automatic differentiation would add 49 padded arrays.
    x, kernel = saved
    _, of_kernel = jax.vjp(lambda k: depthwise_conv_plain(x, k), kernel)
    return depthwise_conv_shifted(grad, kernel[::-1, ::-1]), *of_kernel(grad)


depthwise_conv_shifted.defvjp(_shifted_forward, _shifted_backward)


class DepthwiseConv(nnx.Module):
    """7 x 7 depthwise convolution with bias."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal_002(rngs.params(), (7, 7, 1, channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        form = depthwise_conv_shifted if target_platform() == "cpu" else depthwise_conv_plain
        return form(x, self.kernel[...]) + self.bias[...]


class ConvNeXtBlock(nnx.Module):
    """x + layer_scale * MLP(LayerNorm(depthwise convolution(x)))."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.dwconv = DepthwiseConv(channels, rngs=rngs)
        self.norm = LayerNorm(channels, epsilon=1e-6, rngs=rngs)
        self.mlp = MLP(channels, 4 * channels, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full((channels,), 1e-6))

    def __call__(self, x: jax.Array, skip: None = None, *, key: None = None) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, C]. `skip` and `key` are unused; `run_stack` passes them."""
        del skip, key
        return x + self.layer_scale[...] * self.mlp(self.norm(self.dwconv(x)))


class ConvNeXt(nnx.Module):
    """torchvision's ConvNeXt-S without stochastic depth, which is only active when ConvNeXt itself is trained."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.downsample, self.stages = nnx.Dict(), nnx.Dict()
        inputs = 3
        for i, (blocks, channels) in enumerate(CONVNEXT_S):
            size = 2 if i else 4
            down = nnx.Dict(
                norm=LayerNorm(inputs if i else channels, epsilon=1e-6, rngs=rngs),
                conv=nnx.Conv(inputs, channels, (size, size), strides=size, padding="VALID", rngs=rngs),
            )
            self.downsample[str(i)] = down
            self.stages[str(i)] = make_stack(
                lambda rngs, channels=channels: ConvNeXtBlock(channels, rngs=rngs), blocks, rngs
            )
            inputs = channels
        self.norm = LayerNorm(inputs, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(inputs, NUM_CLASSES, rngs=rngs)

    def features(self, x: jax.Array) -> list[jax.Array]:
        """x [B, 224, 224, 3], normalised -> the output of each stage, [B, 56, 56, 96] to [B, 7, 7, 768]."""
        outputs = []
        for i in range(len(CONVNEXT_S)):
            down = self.downsample[str(i)]
            # The first LayerNorm comes after its convolution, the others come before.
            x = down["conv"](down["norm"](x)) if i else down["norm"](down["conv"](x))
            x, _ = run_stack(self.stages[str(i)], x)
            outputs.append(x)
        return outputs

    def __call__(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3] in [0, 1], of any size -> logits [B, 1000] float32."""
        x = resize(images.astype(jnp.float32), CONVNEXT_SIZE)
        x = (x - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32)
        x = sharding.hint(self.norm(self.features(x)[-1].mean((1, 2))), "batch")
        return sharding.hint(self.head(x), "batch")


def _halve(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C], the maximum of each 2 x 2 square."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def _unit(x: jax.Array) -> jax.Array:
    """x / (|x| + 1e-10) along the last axis. Where x is 0, the gradient is 0, not NaN."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    nonzero = square > 0
    return x / (jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, square, 1.0)), 0.0) + 1e-10)


class LPIPS(nnx.Module):
    """Distance between VGG16 features at five levels, at the images' own resolution (16 pixels per side or more)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.net, inputs = nnx.Dict(), 3
        for level, (numbers, channels) in enumerate(zip(VGG_LEVELS, VGG_CHANNELS, strict=True)):
            convs = nnx.Dict()
            for number in numbers:
                convs[str(number)] = conv(inputs, channels, 3, use_bias=True, dtype=jnp.float32, rngs=rngs)
                inputs = channels
            self.net[f"slice{level + 1}"] = convs
        self.lin = nnx.Dict({str(i): nnx.Param(jnp.full((c,), 1.0 / c)) for i, c in enumerate(VGG_CHANNELS)})

    def features(self, images: jax.Array) -> list[jax.Array]:
        """images [B, H, W, 3] in [0, 1] -> activations [B, H / 2^i, W / 2^i, C_i] of the levels i = 0 .. 4."""
        shift, scale = np.asarray(LPIPS_SHIFT, np.float32), np.asarray(LPIPS_SCALE, np.float32)
        x, outputs = (images.astype(jnp.float32) * 2.0 - 1.0 - shift) / scale, []
        for level, numbers in enumerate(VGG_LEVELS):
            x = _halve(x) if level else x
            for number in numbers:
                x = sharding.hint(jax.nn.relu(self.net[f"slice{level + 1}"][str(number)](x)), "batch")
            outputs.append(x)
        return outputs

    def terms(self, images: jax.Array, others: jax.Array) -> list[jax.Array]:
        """The five terms of the distance, each [B]."""
        pairs = zip(self.features(images), self.features(others), strict=True)
        return [
            jnp.einsum("bhwc,c->b", jnp.square(_unit(a) - _unit(b)), self.lin[str(i)][...]) / (a.shape[1] * a.shape[2])
            for i, (a, b) in enumerate(pairs)
        ]

    def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
        """Two [B, H, W, 3] in [0, 1] -> distances [B]."""
        return sum(self.terms(images, others))


class PerceptualLoss(nnx.Module):
    """The distance that a `PerceptualConfig` names (published: modeling/modules/perceptual_loss.py)."""

    def __init__(self, config: PerceptualConfig, *, rngs: nnx.Rngs):
        self.config = config
        lpips, convnext = config.weights
        if lpips:
            self.lpips = LPIPS(rngs=rngs)
        if convnext:
            self.convnext = ConvNeXt(rngs=rngs)

    @sharding.any_mesh
    def __call__(self, images: jax.Array, reconstructions: jax.Array) -> jax.Array:
        """Two [B, H, W, 3], uint8 or float in [0, 1] -> distances [B]. ConvNeXt alone gives one scalar: the
        mean squared difference of the logits over images and classes. Reconstructions may lie outside [0, 1]."""
        lpips, convnext = self.config.weights
        images, reconstructions = float_images(images), float_images(reconstructions)
        total = jnp.zeros((), jnp.float32)
        if lpips:
            total += lpips * self.lpips(images, reconstructions)
        if convnext:
            total += convnext * jnp.mean(jnp.square(self.convnext(images) - self.convnext(reconstructions)))
        return total / (lpips + convnext)
