"""Stage 2 of the two-stage tokenizer: fine-tune the decoder on pixels (TiTok, arXiv 2406.07550, section 3.2).

A stage 1 model predicts codes of the MaskGIT-VQGAN. Here its logits mix the VQGAN's code vectors, and the VQGAN's decoder
turns the mixture into pixels. All of this is trained end to end. Trained: TiTok's decoder, the VQGAN's code vectors and
decoder, and a discriminator from `discriminator_start` on. Frozen: the encoder, the latent tokens and the codebook, so the
tokens do not change, and the perceptual network. Losses: reconstruction, perceptual and adversarial; the quantizer's loss
has weight 0. `tasks/pixels.py` has the step.
"""

from titok_jax.models.titok import PROXY_CODES, TiTokConfig
from titok_jax.training.tasks import pixels
from titok_jax.training.tasks.pixels import LossConfig, PixelTask
from titok_jax.weights import convert

TRAINED = ("decoder", "pixel_quantize", "pixel_decoder")


def from_stage1(stage1: convert.Params, vqgan: convert.Params) -> convert.Params:
    """The initial parameters of stage 2: all of stage 1, plus the VQGAN's codebook and decoder."""
    return {**stage1, "pixel_quantize": vqgan["quantize"], "pixel_decoder": vqgan["decoder"]}


def make_task(config: TiTokConfig, loss: LossConfig, **options) -> PixelTask:
    """Makes the task. `options` are as in `pixels.make_task`. `start` comes from `from_stage1`, or is a full stage 2 model.

    Raises:
      ValueError: if the model is not a two-stage model with a fitting pixel decoder, or if something that the loss needs is
        missing.
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
