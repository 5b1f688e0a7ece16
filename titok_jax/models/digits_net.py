"""A small classifier for the embedded digits. Metrics on digits use its features instead of InceptionV3's."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax.runtime.sharding import any_mesh

IMAGE_SIZE = 32
FEATURES = 64
NUM_CLASSES = 10
CHANNELS = (16, 32, 32)  # output channels of the three convolutions, each of stride 2


@dataclasses.dataclass(frozen=True)
class DigitsNetConfig:
    """Configuration of the digits network, which has no options."""


class DigitsNet(nnx.Module):
    """Three 3 x 3 convolutions, a layer of 64 features, and the logits. The features are taken before the last GELU. They
    can be negative and none of them is always 0, so their covariance matrix is invertible."""

    def __init__(self, config: DigitsNetConfig = DigitsNetConfig(), *, rngs: nnx.Rngs):
        self.config = config
        self.convs, inputs = nnx.Dict(), 1
        for i, channels in enumerate(CHANNELS):
            self.convs[str(i)] = nnx.Conv(inputs, channels, (3, 3), strides=2, padding="SAME", rngs=rngs)
            inputs = channels
        self.features = nnx.Linear(inputs * (IMAGE_SIZE // 2 ** len(CHANNELS)) ** 2, FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, NUM_CLASSES, rngs=rngs)

    def from_grey(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, 32, 32] float32 in [0, 1] -> features [B, 64] and logits [B, 10]."""
        with jax.default_matmul_precision("highest"):
            x = 2.0 * x[..., None] - 1.0
            for i in range(len(CHANNELS)):
                x = jax.nn.gelu(self.convs[str(i)](x), approximate=False)
            features = self.features(x.reshape(x.shape[0], -1))
            return features, self.head(jax.nn.gelu(features, approximate=False))

    @any_mesh
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 [B, 32, 32, 3] -> features [B, 64] and logits [B, 10]. The network sees the mean over the channels."""
        return self.from_grey(images.astype(jnp.float32).mean(-1) / 255.0)
