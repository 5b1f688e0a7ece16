"""What single-stage training and stage 2 share: they train a tokenizer on pixels, against a discriminator.

A step follows the published order. The tokenizer is updated first, with a loss that uses the current discriminator. From
`discriminator_start` on, the discriminator is then updated on the same reconstructions, from before the tokenizer's update.
Last comes the average of the tokenizer's parameters.
"""

import dataclasses
from typing import Any

import jax

from titok_jax.inference.functions import TokenizerFunctions
from titok_jax.models.layers import float_images
from titok_jax.models.titok import TiTokConfig
from titok_jax.training import losses
from titok_jax.training.accumulation import accumulate
from titok_jax.training.tasks.adversarial import AdversarialTask, make_adversary
from titok_jax.training.tasks.base import Batch, Metrics, State, TaskOptions
from titok_jax.weights import convert
from titok_jax.weights.perceptual_files import check_perceptual


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms. A term with weight 0 is not computed.

    Attributes:
      reconstruction: "l2" or "l1".
      kl_weight: weight of the KL divergence in "vae" mode.
      perceptual: name of the perceptual network, e.g. "lpips-convnext_s-1.0-0.1", or "none".
      discriminator_start: first update of the adversarial terms.
    """

    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    quantizer_weight: float = 1.0
    kl_weight: float = 1e-6
    perceptual: str = "none"
    perceptual_weight: float = 1.1
    discriminator_weight: float = 0.0
    discriminator_factor: float = 1.0
    discriminator_start: int = 0
    lecam_weight: float = 0.001
    lecam_decay: float = 0.999


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PixelTask(AdversarialTask):
    """Training on pixels, as described in the module docstring.

    Attributes:
      weights: weights of the loss terms.
    """

    weights: LossConfig

    @property
    def trains_codebook(self) -> bool:
        """Whether the tokenizer has a codebook that is trained."""
        trained = self.networks["tokenizer"].trained
        return self.config.has_codebook and (trained is None or "quantize" in trained)

    def draw(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Draws the noise for a VAE's posterior. A VQ tokenizer needs none."""
        if self.config.has_tokens:
            return {}
        shape = (batch["image"].shape[0], self.config.num_latent_tokens, self.config.token_size)
        return {"noise": jax.random.normal(key, shape)}

    def update(self, state: State, frozen: Any, batch: Batch, draws: dict[str, jax.Array]) -> tuple[State, Metrics]:
        """Updates the tokenizer using the current discriminator, then the discriminator on the same reconstructions."""
        images = float_images(batch["image"])

        def loss(trainable, rows):
            return self.pixel_loss(trainable, rows, state=state, frozen=frozen)

        trainable = self.networks["tokenizer"].trainable(state["params"]["tokenizer"])
        rows, parts = {"images": images, **draws}, self.options.gradient_accumulation
        grads, metrics, outputs = accumulate(loss, trainable, rows, parts, convolutions=True)
        new = self.advance(self.restarted(state, outputs) if self.options.restart_codes else state, grads, metrics)
        if self.adversary:
            new, of_discriminator = self.adversary.update(state, new, images, outputs["reconstructions"])
            metrics |= of_discriminator
        if outputs["tokens"] is not None:
            metrics |= losses.codebook_metrics(outputs["tokens"], self.config.codebook_size)
        return new, metrics

    def pixel_loss(self, trainable: convert.Params, rows: Batch, *, state: State, frozen: Any):
        """Returns (loss, (metrics, {"reconstructions", "tokens", "latents"})) of some rows of a batch."""
        model = self.networks["tokenizer"].module({**state["params"]["tokenizer"], **trainable})
        images, weights = rows["images"], self.weights
        bottleneck = posterior = None
        if self.config.has_tokens:
            bottleneck = model.quantized(images)
            reconstructions = model.decode(bottleneck.quantized)
        else:
            posterior = model.posterior(images)
            reconstructions = model.decode(posterior.sample(rows["noise"]))
        factor, logits_fake = self.judge(state, reconstructions)
        shared = {
            "perceptual": self.perceptual_distance(frozen, images, reconstructions),
            "logits_fake": logits_fake,
            "factor": factor,
            "kind": weights.reconstruction,
            "reconstruction_weight": weights.reconstruction_weight,
            "perceptual_weight": weights.perceptual_weight,
            "discriminator_weight": weights.discriminator_weight,
        }
        if posterior is not None:
            kl, kl_weight = posterior.kl(), weights.kl_weight
            total, metrics = losses.vae_generator_loss(images, reconstructions, kl=kl, kl_weight=kl_weight, **shared)
            return total, (metrics, {"reconstructions": reconstructions, "tokens": None, "latents": None})
        counts = self.trains_codebook  # if the quantizer is not trained, its losses are logged as 0
        total, metrics = losses.vq_generator_loss(
            images,
            reconstructions,
            quantizer_loss=counts * bottleneck.quantizer_loss,
            commitment_loss=counts * bottleneck.commitment_loss,
            codebook_loss=counts * bottleneck.codebook_loss,
            quantizer_weight=weights.quantizer_weight,
            **shared,
        )
        outputs = {"reconstructions": reconstructions, "tokens": bottleneck.tokens, "latents": bottleneck.latents}
        return total, (metrics, outputs)

    def preview(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns images and their reconstructions. A VAE reconstructs from the mean of the posterior."""
        del frozen, key
        functions, params = TokenizerFunctions(self.config, self.options.compute_dtype), state["ema"]["tokenizer"]
        reconstructions = functions.decode(params, functions.encode(params, batch["image"]))
        return {"image": float_images(batch["image"]), "reconstruction": reconstructions}


def make_task(config: TiTokConfig, loss: LossConfig, *, trained: tuple[str, ...] | None = None, **options: Any) -> PixelTask:
    """Makes the task.

    Args:
      trained: the trained parts of the tokenizer; None for all.
      options: as in `TaskOptions`.

    Raises:
      ValueError: if something that the loss needs is missing, or if codes are to be restarted but no codebook is trained.
    """
    given = TaskOptions(**options)
    check_perceptual(loss.perceptual, given.perceptual)
    adversary = make_adversary(loss, given, factor=loss.discriminator_factor)
    task = PixelTask(
        networks={"tokenizer": given.network(config, trained)} | ({"discriminator": adversary.network} if adversary else {}),
        options=given,
        frozen=None if given.perceptual is None else given.perceptual.params,
        adversary=adversary,
        weights=loss,
    )
    if given.restart_codes and not task.trains_codebook:
        raise ValueError("restart_codes is set, but there is no codebook in training: it is for stage 1 and single-stage vq")
    return task
