"""Training of the MaskGIT-VQGAN, the 2D tokenizer of TiTok's two stages (arXiv 2202.04200, after arXiv 2012.09841).

Trained: encoder, codebook and decoder, from scratch, against a discriminator. Frozen: the perceptual network. Losses:
reconstruction, perceptual, the quantizer's (codebook, commitment, and the entropies of the codes), and the non-saturating
adversarial one; of the discriminator that and the R1 penalty.

The trainer was never published. Losses, networks and weights are in google-research/maskgit (`libml/losses.py`,
`nets/vqgan_tokenizer.py`, `configs/vqgan_config.py`). How a step combines them is in the trainer that the same group
published with MAGVIT (google-research/magvit, `trainers/vqgan_trainer.py`): both losses are taken at the parameters before
the step. Choices of ours: the discriminator (TiTok's patches in the place of StyleGAN's, so that R1 is on an image's mean
logit), and the perceptual network (ConvNeXt-S in the place of a ResNet-50).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from titok_jax.models.discriminator import DiscriminatorConfig
from titok_jax.models.layers import float_images
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.training import losses
from titok_jax.training.optimizer import ema_update
from titok_jax.training.tasks import Batch, Metrics, Network, State, Task, make_network, map_parts, reconstruction_quality
from titok_jax.training.tasks.adversarial import init_state, make_adversary
from titok_jax.weights import convert, pretrained
from titok_jax.weights.perceptual_files import Perceptual, check_perceptual


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms; the codebook's has weight 1.

    Attributes:
      reconstruction: "l2" or "l1".
      entropy_temperature: squared distances are divided by it.
      perceptual: which perceptual network, e.g. "convnext_s", or "none".
      discriminator_weight: of the adversarial term; 0: no discriminator.
      discriminator_start: first update of the adversarial terms.
      gradient_penalty: weight of R1.
      lecam_weight: of LeCam, which the published training does not have.
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


def make_task(
    config: MaskgitVQGANConfig,
    loss: LossConfig,
    *,
    optimizer: dict,
    num_steps: int,
    discriminator: DiscriminatorConfig | None = None,
    discriminator_optimizer: dict | None = None,
    perceptual: Perceptual | None = None,
    start: convert.Params | None = None,
    ema_decay: float = 0.999,
    compute_dtype: str = "float32",
    remat: bool = False,
    gradient_accumulation: int = 1,
) -> Task:
    """The task; options as in `pixels.make_task`, but `remat`, which these networks do not have.

    Raises:
      ValueError: a loss without what it needs.
    """
    check_perceptual(loss.perceptual, perceptual)
    if remat:
        raise ValueError("remat is for transformers: to save memory here, raise gradient_accumulation")
    vqgan = make_network(config, optimizer, num_steps, compute_dtype=compute_dtype)
    networks: dict[str, Network] = {"vqgan": vqgan}
    adversary = None
    if loss.discriminator_weight > 0:
        adversary = make_adversary(
            discriminator,
            discriminator_optimizer,
            num_steps,
            compute_dtype=compute_dtype,
            start=loss.discriminator_start,
            kind="non_saturating",
            lecam_weight=loss.lecam_weight,
            lecam_decay=loss.lecam_decay,
            gradient_penalty=loss.gradient_penalty,
            parts=gradient_accumulation,
        )
        networks["discriminator"] = adversary.network

    def init(key: jax.Array, start: dict[str, convert.Params] | None = None) -> State:
        return init_state(networks, key, start)

    def draw(key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        del key, batch
        return {}

    def vqgan_loss(params, images: jax.Array, *, state: State, frozen):
        # The entropy of the mean over all codes is not linear in the parts of a batch, so that gradients of parts would not
        # add up to that of the whole: the networks run on one part at a time, the loss is of all.
        model = vqgan.module(params)
        latents = map_parts(model.encode, images, gradient_accumulation)
        bottleneck = model.quantize(latents)

        def decode(rows):
            images, z = rows
            reconstructions = model.decode(z)
            distance = jnp.float32(0.0) if perceptual is None else perceptual.distance(frozen, images, reconstructions)
            judged = (jnp.zeros(len(z)), None)
            if adversary:
                factor, logits = adversary.judge(state, reconstructions)
                judged = (jnp.broadcast_to(factor, len(z)), logits)
            return reconstructions, jnp.broadcast_to(distance, len(z)), judged

        reconstructions, distances, (factors, logits_fake) = map_parts(
            decode, (images, bottleneck.quantized), gradient_accumulation
        )
        total, metrics = losses.maskgit_vqgan_loss(
            images,
            reconstructions,
            perceptual=distances,
            logits_fake=logits_fake,
            factor=factors[0],
            commitment_loss=bottleneck.commitment_loss,
            codebook_loss=bottleneck.codebook_loss,
            entropy=losses.entropy_loss(model.quantize.distances(latents), loss.entropy_temperature),
            kind=loss.reconstruction,
            perceptual_weight=loss.perceptual_weight,
            commitment_weight=loss.commitment_weight,
            entropy_weight=loss.entropy_weight,
            discriminator_weight=loss.discriminator_weight,
        )
        metrics |= losses.codebook_metrics(bottleneck.codes, config.codebook_size)
        return total, (metrics, reconstructions)

    def update(state: State, frozen, batch: Batch, draws: dict[str, jax.Array]) -> tuple[State, Metrics]:
        del draws
        images = float_images(batch["image"])
        params, opt = dict(state["params"]), dict(state["opt"])
        grads, (metrics, reconstructions) = jax.grad(vqgan_loss, has_aux=True)(
            params["vqgan"], images, state=state, frozen=frozen
        )
        metrics["lr"] = vqgan.schedule(state["step"])
        params["vqgan"], opt["vqgan"], metrics["grad_norm"] = vqgan.apply(params["vqgan"], opt["vqgan"], grads)
        ema = {"vqgan": ema_update(state["ema"]["vqgan"], params["vqgan"], state["step"], ema_decay)}
        new = {"step": state["step"] + 1, "params": params, "opt": opt, "ema": ema}
        if adversary:
            trained = adversary.update(state, images, reconstructions)
            params["discriminator"], opt["discriminator"], new["lecam"], disc_metrics = trained
            metrics |= disc_metrics
        return new, metrics

    def preview(state: State, frozen, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        del frozen, key
        model, images = vqgan.module(state["ema"]["vqgan"]), float_images(batch["image"])
        return {"image": images, "reconstruction": model.decode_codes(model.get_codes(images))}

    def export(state: State, folder: Path) -> None:
        pretrained.save(folder, config, state["ema"]["vqgan"], overwrite=True)

    return Task(
        networks=networks,
        frozen=None if perceptual is None else perceptual.params,
        init=init,
        draw=draw,
        update=update,
        preview=preview,
        export=export,
        loss="total_loss",
        start=None if start is None else {"vqgan": start},
        evaluate=reconstruction_quality(preview),
    )
