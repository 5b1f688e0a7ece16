"""Stage 2 of the two-stage tokenizer: fine-tuning of the decoder on pixels (TiTok, arXiv 2406.07550, section 3.2).

A stage 1 model predicts codes of the MaskGIT-VQGAN; here its logits mix the VQGAN's code vectors, and the VQGAN's decoder
turns the mixture into pixels, all of which is trained end to end. Trained: TiTok's decoder, the VQGAN's code vectors and
decoder, and a discriminator from `discriminator_start` on. Frozen: encoder, latent tokens and codebook, so that tokens stay
what they were, and the perceptual network. Losses: reconstruction, perceptual, adversarial; the quantizer's has weight 0.
The step is in `tasks/pixels.py`.
"""

from titok_jax.models.titok import PROXY_CODES, TiTokConfig
from titok_jax.training.tasks import pixels
from titok_jax.training.tasks.pixels import LossConfig, PixelTask
from titok_jax.weights import convert

TRAINED = ("decoder", "pixel_quantize", "pixel_decoder")


def from_stage1(stage1: convert.Params, vqgan: convert.Params) -> convert.Params:
    """The parameters that stage 2 begins with: all of stage 1, with the VQGAN's codebook and decoder."""
    return {**stage1, "pixel_quantize": vqgan["quantize"], "pixel_decoder": vqgan["decoder"]}


def make_task(config: TiTokConfig, loss: LossConfig, **options) -> PixelTask:
    """The task; `options` as in `pixels.make_task`. `start` is made by `from_stage1`, or is a whole stage 2 model.

    Raises:
      ValueError: a model without a pixel decoder of stage 2, or a loss without what it needs.
    """
    if not (config.is_legacy and config.finetune_decoder):
        raise ValueError("stage 2 is for two-stage models: set is_legacy and finetune_decoder to True")
    pixel = config.pixel_decoder
    if pixel.downsampling != config.patch_size or pixel.codebook_size != PROXY_CODES:
        raise ValueError(
            f"the VQGAN has {pixel.codebook_size} codes and one per {pixel.downsampling} x {pixel.downsampling} pixels; the "
            f"model takes {PROXY_CODES} and one per {config.patch_size} x {config.patch_size}"
        )
    return pixels.make_task(config, loss, trained=TRAINED, **options)
