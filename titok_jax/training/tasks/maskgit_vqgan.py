"""Training of the MaskGIT-VQGAN, the 2D tokenizer of TiTok's two stages (arXiv 2202.04200, after arXiv 2012.09841).

Trained: encoder, codebook and decoder, from scratch, against a discriminator. Frozen: the perceptual network. Losses of the
tokenizer: reconstruction, perceptual, quantizer (codebook, commitment, and the entropies of the codes), and non-saturating
adversarial. Losses of the discriminator: non-saturating adversarial and the R1 penalty.

The trainer was never published. Losses, networks and weights are in google-research/maskgit (`libml/losses.py`,
`nets/vqgan_tokenizer.py`, `configs/vqgan_config.py`). The step follows the trainer that the same group published with MAGVIT
(google-research/magvit, `trainers/vqgan_trainer.py`): it computes both losses with the parameters from before the step. We
chose the discriminator (TiTok's patch discriminator instead of StyleGAN's, so R1 uses an image's mean logit) and the
perceptual network (ConvNeXt-S instead of a ResNet-50).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from titok_jax.inference.functions import TokenizerFunctions
from titok_jax.models.layers import float_images
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.training import losses
from titok_jax.training.accumulation import map_parts
from titok_jax.training.tasks.adversarial import AdversarialTask, make_adversary
from titok_jax.training.tasks.base import Batch, Metrics, State, TaskOptions
from titok_jax.weights import convert
from titok_jax.weights.perceptual_files import check_perceptual


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms. The codebook loss has weight 1.

    Attributes:
      reconstruction: "l2" or "l1".
      entropy_temperature: the entropy loss divides squared distances by it.
      perceptual: name of the perceptual network, e.g. "convnext_s", or "none".
      discriminator_weight: weight of the adversarial term; 0 for no discriminator.
      discriminator_start: first update of the adversarial terms.
      gradient_penalty: weight of R1.
      lecam_weight: weight of LeCam. The published training does not use LeCam.
    """

    reconstruction: str = "l2"
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    perceptual: str = "none"
    perceptual_weight: float = 0.1
    discriminator_weight: float = 0.1
    discriminator_start: int = 0
    gradient_penalty: float = 10.0
    lecam_weight: float = 0.0
    lecam_decay: float = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MaskgitVQGANTask(AdversarialTask):
    """Training of the MaskGIT-VQGAN, as described in the module docstring.

    Attributes:
      weights: weights of the loss terms.
    """

    weights: LossConfig

    model = "vqgan"

    def update(self, state: State, frozen: Any, batch: Batch, draws: Any) -> tuple[State, Metrics]:
        """Updates the tokenizer, then the discriminator. Both losses use the parameters from before the step."""
        images = float_images(batch["image"])
        loss = jax.grad(self.vqgan_loss, has_aux=True)
        grads, (metrics, reconstructions) = loss(state["params"]["vqgan"], images, state=state, frozen=frozen)
        new = self.advance(state, grads, metrics)
        if self.adversary:
            new, of_discriminator = self.adversary.update(state, new, images, reconstructions)
            metrics |= of_discriminator
        return new, metrics

    def vqgan_loss(self, params: convert.Params, images: jax.Array, *, state: State, frozen: Any):
        """Returns (loss, (metrics, reconstructions)) of a full batch.

        The entropy loss is not linear in the parts of a batch, so the gradients of the parts would not add up to that of the
        full batch. The networks run on one part at a time, and the loss is computed on all parts together.
        """
        parts, weights, network = self.options.gradient_accumulation, self.weights, self.networks["vqgan"]
        model = network.module(params)
        latents = map_parts(lambda params, images: network.module(params).encode(images), params, images, parts)
        bottleneck = model.quantize(latents)

        def decode(params, rows):
            images, z = rows
            reconstructions = network.module(params).decode(z)
            distance = self.perceptual_distance(frozen, images, reconstructions)
            factor, logits = self.judge(state, reconstructions)
            judged = (jnp.broadcast_to(factor, len(z)), logits)
            return reconstructions, jnp.broadcast_to(distance, len(z)), judged

        decoded = map_parts(decode, params, (images, bottleneck.quantized), parts)
        reconstructions, distances, (factors, logits_fake) = decoded
        total, metrics = losses.maskgit_vqgan_loss(
            images,
            reconstructions,
            perceptual=distances,
            logits_fake=logits_fake,
            factor=factors[0],
            commitment_loss=bottleneck.commitment_loss,
            codebook_loss=bottleneck.codebook_loss,
            entropy=losses.entropy_loss(model.quantize.distances(latents), weights.entropy_temperature),
            kind=weights.reconstruction,
            perceptual_weight=weights.perceptual_weight,
            commitment_weight=weights.commitment_weight,
            entropy_weight=weights.entropy_weight,
            discriminator_weight=weights.discriminator_weight,
        )
        metrics |= losses.codebook_metrics(bottleneck.tokens, self.config.codebook_size)
        return total, (metrics, reconstructions)

    def preview(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns images and their reconstructions."""
        del frozen, key
        functions, params = TokenizerFunctions(self.config, self.options.compute_dtype), state["ema"]["vqgan"]
        reconstructions = functions.decode(params, functions.encode(params, batch["image"]))
        return {"image": float_images(batch["image"]), "reconstruction": reconstructions}


def make_task(config: MaskgitVQGANConfig, loss: LossConfig, **options: Any) -> MaskgitVQGANTask:
    """Makes the task. Options are as in `TaskOptions`, except that these networks do not support `remat`.

    Raises:
      ValueError: if something that the loss needs is missing, or if `remat` is not "none".
    """
    given = TaskOptions(**options)
    check_perceptual(loss.perceptual, given.perceptual)
    if given.remat != "none":
        raise ValueError("remat is for transformers, expected 'none': to save memory here, raise gradient_accumulation")
    adversary = make_adversary(loss, given, kind="non_saturating", gradient_penalty=loss.gradient_penalty)
    return MaskgitVQGANTask(
        networks={"vqgan": given.network(config)} | ({"discriminator": adversary.network} if adversary else {}),
        options=given,
        frozen=None if given.perceptual is None else given.perceptual.params,
        adversary=adversary,
        weights=loss,
    )
