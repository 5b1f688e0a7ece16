"""A small classifier of the embedded digits, whose features are to them what InceptionV3's are to photographs."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

IMAGE_SIZE = 32
FEATURES = 64
NUM_CLASSES = 10
CHANNELS = (16, 32, 32)  # of three convolutions of stride 2


@dataclasses.dataclass(frozen=True)
class DigitsNetConfig:
    """The one network of digits there is."""


class DigitsNet(nnx.Module):
    """Three 3 x 3 convolutions, 64 features, logits. The features are what enters the last GELU: they may be negative and
    none is always 0, so that their covariance is regular."""

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

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 [B, 32, 32, 3], of which the mean of the channels is seen -> features [B, 64] and logits [B, 10]."""
        return self.from_grey(images.astype(jnp.float32).mean(-1) / 255.0)
