"""Single-stage tokenizer training: reconstruct pixels directly (TiTok's VQ-8k and VAE models; the digits).

Trained: all of TiTok, and a discriminator from `discriminator_start` on. Frozen: the perceptual network. Losses:
reconstruction, perceptual, bottleneck (commitment and codebook, or KL) and adversarial. `tasks/pixels.py` has the step.
"""

from titok_jax.models.titok import TiTokConfig
from titok_jax.training.tasks import pixels
from titok_jax.training.tasks.pixels import LossConfig, PixelTask


def make_task(config: TiTokConfig, loss: LossConfig, **options) -> PixelTask:
    """Makes the task. `options` are as in `pixels.make_task`.

    Raises:
      ValueError: for a legacy model, or if something that the loss needs is missing.
    """
    if config.is_legacy:
        raise ValueError("single-stage training is for models that decode to pixels: set is_legacy to False")
    return pixels.make_task(config, loss, **options)
