"""PSNR and SSIM for use in jitted functions during training. `evaluation.metrics` has float64 versions."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from titok_jax.evaluation.metrics import SSIM_TAPS, windowed_ssim


def reconstruction_quality(pictures: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns {"psnr": [B] in dB, "ssim": [B]} for pictures "image" and "reconstruction", [B, H, W, 3] in [0, 1]."""
    pair = pictures["image"], jnp.clip(pictures["reconstruction"], 0.0, 1.0)
    return {"psnr": psnr(*pair), "ssim": ssim(*pair)}


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of two [B, H, W, C] in [0, 1] -> float32 [B] in dB."""
    return -10.0 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of two [B, H, W, C] in [0, 1] -> float32 [B]."""

    def window(x):  # [B, H, W, C] -> [B, H - 10, W - 10, C]
        # Two matrix products are fast on every backend; a convolution of one channel is slow.
        rows, columns = (
            jnp.array(sum(tap * np.eye(n - 10, n, k) for k, tap in enumerate(SSIM_TAPS)), jnp.float32) for n in x.shape[1:3]
        )
        return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")

    return windowed_ssim(a, b, window)
