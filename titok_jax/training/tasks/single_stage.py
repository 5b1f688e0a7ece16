"""Single-stage tokenizer training: pixels in, pixels out (TiTok's VQ-8k and VAE models; the digits).

Trained: the whole TiTok, and a discriminator from `discriminator_start` on. Frozen: the perceptual network. Losses:
reconstruction, perceptual, the bottleneck's (commitment and codebook, or KL), adversarial; the step is in `tasks/pixels.py`.
"""

from titok_jax.models.titok import TiTokConfig
from titok_jax.training.tasks import pixels
from titok_jax.training.tasks.pixels import LossConfig, PixelTask


def make_task(config: TiTokConfig, loss: LossConfig, **options) -> PixelTask:
    """The task; `options` as in `pixels.make_task`.

    Raises:
      ValueError: a legacy model, or a loss without what it needs.
    """
    if config.is_legacy:
        raise ValueError("single-stage training is for models that decode to pixels: set is_legacy to False")
    return pixels.make_task(config, loss, **options)
