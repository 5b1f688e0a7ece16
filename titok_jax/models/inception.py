"""The InceptionV3 that FID is defined on: the network of 2015-12-05 with the peculiarities of its TensorFlow graph.

The architecture is from Szegedy et al. 2015 (arXiv 1512.00567). It differs from torchvision's in four ways: the resize,
average pools that leave out the padding, a max pool in the last block's pool branch, and 1,008 outputs. Convolutions have
their published names (torch-fidelity, feature_extractor_inceptionv3.py). Everything is computed in float32, even where an
accelerator's default precision is lower.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from titok_jax.runtime.sharding import any_mesh

IMAGE_SIZE = 299  # pixels per side; every image is resized to this
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3
SPATIAL_CHANNELS = 7  # used by sFID: 7 x 17 x 17 = 2,023 features


class _Conv(NamedTuple):
    """A convolution, batch normalisation and ReLU."""

    name: str
    channels: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class _Fork(NamedTuple):
    """Two convolutions of the same input, with concatenated outputs."""

    convs: tuple[_Conv, _Conv]


# A branch is a sequence of steps applied to a block's input. A string is a 3 x 3 pool: "average" and "max" keep the size,
# "halve" is a max pool of stride 2 without padding. A block concatenates the outputs of its branches.
_Branch = tuple[_Conv | _Fork | str, ...]


def _chain(name: str, *convs: tuple) -> _Branch:
    """A branch of convolutions, numbered from 1. Each is given as (channels, height, width)."""
    return tuple(_Conv(f"{name}_{i + 1}", channels, (h, w)) for i, (channels, h, w) in enumerate(convs))


def _halving(branch: _Branch) -> _Branch:
    """The same branch, but its last convolution has stride 2 and no padding."""
    return (*branch[:-1], branch[-1]._replace(stride=2, padding="VALID"))


def _block_a(pool_channels: int) -> tuple[_Branch, ...]:
    return (
        (_Conv("branch1x1", 64),),
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        ("average", _Conv("branch_pool", pool_channels)),
    )


def _block_c(c: int) -> tuple[_Branch, ...]:
    return (
        (_Conv("branch1x1", 192),),
        _chain("branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
        ("average", _Conv("branch_pool", 192)),
    )


def _block_e(pool: str) -> tuple[_Branch, ...]:
    def fork(name):
        return _Fork((_Conv(f"{name}a", 384, (1, 3)), _Conv(f"{name}b", 384, (3, 1))))

    return (
        (_Conv("branch1x1", 320),),
        (*_chain("branch3x3", (384, 1, 1)), fork("branch3x3_2")),
        (*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), fork("branch3x3dbl_3")),
        (pool, _Conv("branch_pool", 192)),
    )


_STEM: dict[str, _Conv | str] = {
    "Conv2d_1a_3x3": _Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    "Conv2d_2a_3x3": _Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    "Conv2d_2b_3x3": _Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "MaxPool_1": "halve",
    "Conv2d_3b_1x1": _Conv("Conv2d_3b_1x1", 80),
    "Conv2d_4a_3x3": _Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    "MaxPool_2": "halve",
}
_BLOCKS: dict[str, tuple[_Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (_Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
        _halving(_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))),
        ("halve",),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        _halving(_chain("branch3x3", (192, 1, 1), (320, 3, 3))),
        _halving(_chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))),
        ("halve",),
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """Configuration of InceptionV3, which has no options."""


def resize(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] float32 -> [B, size, size, C], with TensorFlow 1's bilinear resize. Pixel i samples the input at
    i H / size. There is no half-pixel shift and no antialiasing filter, and the last pixel repeats at the edge."""
    for axis in (2, 1):
        length = images.shape[axis]
        # The TensorFlow graph computes this in float32 too.
        source = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = source.astype(np.int32)
        shape = [1] * 4
        shape[axis] = size
        fraction = (source - low.astype(np.float32)).reshape(shape)
        below, above = (jnp.take(images, i, axis=axis) for i in (low, np.minimum(low + 1, length - 1)))
        images = below + (above - below) * fraction
    return images


class ConvBatchNorm(nnx.Module):
    """Convolution without bias, batch normalisation with the stored mean and variance, ReLU. The parameters start as zeros
    and ones because they are always read from a file."""

    def __init__(self, inputs: int, conv: _Conv):
        self.conv = conv
        self.kernel = nnx.Param(jnp.zeros((*conv.size, inputs, conv.channels)))
        self.scale, self.bias = nnx.Param(jnp.ones(conv.channels)), nnx.Param(jnp.zeros(conv.channels))
        self.mean, self.var = nnx.Param(jnp.zeros(conv.channels)), nnx.Param(jnp.ones(conv.channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.conv.stride,) * 2
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, self.kernel[...], strides, self.conv.padding, dimension_numbers=layout)
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + BATCH_NORM_EPSILON)
        return jax.nn.relu((x - self.mean[...]) * scale + self.bias[...])


def _pool(kind: str, x: jax.Array) -> jax.Array:
    if kind == "average":
        return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    if kind == "max":
        return nnx.max_pool(x, (3, 3), (1, 1), "SAME")
    return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


class InceptionOutputs(NamedTuple):
    """The activations that the metrics use, all float32.

    Attributes:
      pool64, pool192, pool768: means over the positions after the first pool, the second pool and Mixed_6e.
      pool: [B, 2048], the features of FID.
      spatial: [B, 2023], the features of sFID, in the order row, column, channel: the first 7 channels of ADM's
        `mixed_6/conv`, which is Mixed_6d's branch1x1 after its ReLU here.
      logits_unbiased: [B, 1008] without the bias, for the Inception score.
      logits: [B, 1008].
    """

    pool64: jax.Array
    pool192: jax.Array
    pool768: jax.Array
    pool: jax.Array
    spatial: jax.Array
    logits_unbiased: jax.Array
    logits: jax.Array


class InceptionV3(nnx.Module):
    """The network. `convs` holds its convolutions under their published names."""

    def __init__(self, config: InceptionConfig = InceptionConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.convs, channels = nnx.Dict(), 3

        def add(name: str, step: _Conv | _Fork | str, inputs: int) -> int:
            """Creates the convolutions of a step and returns its number of output channels."""
            if isinstance(step, str):
                return inputs
            for conv in step.convs if isinstance(step, _Fork) else [step]:
                self.convs[name + conv.name] = ConvBatchNorm(inputs, conv)
            return 2 * conv.channels if isinstance(step, _Fork) else conv.channels

        for step in _STEM.values():
            channels = add("", step, channels)
        for name, branches in _BLOCKS.items():
            inputs, channels = channels, 0
            for branch in branches:
                width = inputs
                for step in branch:
                    width = add(f"{name}.", step, width)
                channels += width
        self.fc = nnx.Linear(channels, NUM_CLASSES, rngs=rngs)

    def _step(self, prefix: str, step: _Conv | _Fork | str, x: jax.Array) -> jax.Array:
        if isinstance(step, str):
            return _pool(step, x)
        if isinstance(step, _Fork):
            return jnp.concatenate([self.convs[prefix + conv.name](x) for conv in step.convs], axis=-1)
        return self.convs[prefix + step.name](x)

    def activations(self, images: jax.Array) -> dict[str, Any]:
        """uint8 [B, H, W, 3] -> {published name: [B, h, w, C]}: "resized", each layer before the blocks, each block, and the
        first branch of Mixed_6d under "Mixed_6d.branch1x1"."""
        with jax.default_matmul_precision("highest"):
            x = resize(images.astype(jnp.float32), IMAGE_SIZE)
            outputs = {"resized": x}
            x = (x - 128.0) / 128.0
            for name, step in _STEM.items():
                outputs[name] = x = self._step("", step, x)
            for name, branches in _BLOCKS.items():
                parts = []
                for branch in branches:
                    part = x
                    for step in branch:
                        part = self._step(f"{name}.", step, part)
                    parts.append(part)
                if name == "Mixed_6d":
                    outputs["Mixed_6d.branch1x1"] = parts[0]
                outputs[name] = x = jnp.concatenate(parts, axis=-1)
            return outputs

    @any_mesh
    def __call__(self, images: jax.Array) -> InceptionOutputs:
        """uint8 [B, H, W, 3], of any size -> what FID, sFID and the Inception score need."""
        found = self.activations(images)
        pool64, pool192, pool768, pool = (
            found[name].mean((1, 2)) for name in ("MaxPool_1", "MaxPool_2", "Mixed_6e", "Mixed_7c")
        )
        spatial = found["Mixed_6d.branch1x1"][..., :SPATIAL_CHANNELS].reshape(images.shape[0], -1)
        with jax.default_matmul_precision("highest"):
            unbiased = pool @ self.fc.kernel[...]
        return InceptionOutputs(pool64, pool192, pool768, pool, spatial, unbiased, unbiased + self.fc.bias[...])
