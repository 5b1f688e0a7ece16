"""What single-stage training and stage 2 have in common: a tokenizer trained on its pixels, against a discriminator.

Order of a step, as published: the tokenizer's loss and update against the discriminator as it is; from `discriminator_start`
on the discriminator's, on the same reconstructions, made before the update; then the average of the tokenizer's parameters.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from titok_jax.models.discriminator import DiscriminatorConfig
from titok_jax.models.layers import float_images
from titok_jax.models.titok import TiTokConfig
from titok_jax.training import losses
from titok_jax.training.optimizer import ema_update
from titok_jax.training.tasks import (
    Batch,
    Metrics,
    Network,
    State,
    Task,
    accumulate,
    make_network,
    reconstruction_quality,
    restarted,
)
from titok_jax.training.tasks.adversarial import init_state, make_adversary
from titok_jax.weights import convert, pretrained
from titok_jax.weights.perceptual_files import Perceptual, check_perceptual


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms; a term with weight 0 is not computed.

    Attributes:
      reconstruction: "l2" or "l1".
      perceptual: which perceptual network, e.g. "lpips-convnext_s-1.0-0.1", or "none".
      discriminator_start: first update of the adversarial terms.
      kl_weight: of a VAE.
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


def make_task(
    config: TiTokConfig,
    loss: LossConfig,
    *,
    optimizer: dict,
    num_steps: int,
    discriminator: DiscriminatorConfig | None = None,
    discriminator_optimizer: dict | None = None,
    perceptual: Perceptual | None = None,
    trained: tuple[str, ...] | None = None,
    start: convert.Params | None = None,
    ema_decay: float = 0.999,
    compute_dtype: str = "float32",
    remat: bool = False,
    gradient_accumulation: int = 1,
    restart_codes: bool = False,
) -> Task:
    """The task.

    Args:
      optimizer: see `tasks.make_network`.
      num_steps: length of the training; the discriminator's schedule spans what is left of it after its start.
      discriminator, discriminator_optimizer: needed if `loss.discriminator_weight` is not 0.
      perceptual: the network that `loss.perceptual` names, None for "none".
      trained: the top-level parts of the tokenizer that are trained; None: all.
      start: the tokenizer's parameters to begin with; None: new ones.
      gradient_accumulation: parts that a batch is cut into; the step is that of the whole batch.
      restart_codes: see `quantizer.restart_codes`.

    Raises:
      ValueError: a loss without what it needs.
    """
    check_perceptual(loss.perceptual, perceptual)
    if restart_codes and (config.quantize_mode != "vq" or (trained is not None and "quantize" not in trained)):
        raise ValueError("restart_codes is set, but there is no codebook in training: it is for stage 1 and single-stage vq")
    tokenizer = make_network(config, optimizer, num_steps, trained=trained, compute_dtype=compute_dtype, remat=remat)
    networks: dict[str, Network] = {"tokenizer": tokenizer}
    adversary = None
    if loss.discriminator_weight > 0:
        adversary = make_adversary(
            discriminator,
            discriminator_optimizer,
            num_steps,
            compute_dtype=compute_dtype,
            start=loss.discriminator_start,
            factor=loss.discriminator_factor,
            lecam_weight=loss.lecam_weight,
            lecam_decay=loss.lecam_decay,
            parts=gradient_accumulation,
        )
        networks["discriminator"] = adversary.network

    def init(key: jax.Array, start: dict[str, convert.Params] | None = None) -> State:
        state = init_state(networks, key, start)
        if restart_codes:
            state["code_usage"] = jnp.zeros(config.codebook_size)
        return state

    def draw(key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        if config.quantize_mode == "vq":
            return {}
        shape = (batch["image"].shape[0], config.num_latent_tokens, config.token_size)
        return {"noise": jax.random.normal(key, shape)}

    def tokenizer_loss(trainable, rows, *, state: State, frozen):
        images = rows["images"]
        model = tokenizer.module({**state["params"]["tokenizer"], **trainable})
        if config.quantize_mode == "vq":
            bottleneck = model.quantized(images)
            z, tokens, latents = bottleneck.quantized, bottleneck.tokens, bottleneck.latents
        else:
            posterior = model.posterior(images)
            z, tokens, latents = posterior.sample(rows["noise"]), None, None
        reconstructions = model.decode(z)

        factor, logits_fake = adversary.judge(state, reconstructions) if adversary else (jnp.float32(0.0), None)
        shared = {
            "perceptual": jnp.float32(0.0) if perceptual is None else perceptual.distance(frozen, images, reconstructions),
            "logits_fake": logits_fake,
            "factor": factor,
            "kind": loss.reconstruction,
            "reconstruction_weight": loss.reconstruction_weight,
            "perceptual_weight": loss.perceptual_weight,
            "discriminator_weight": loss.discriminator_weight,
        }
        if config.quantize_mode == "vq":
            # Of a quantizer that is not trained, the losses are logged as 0.
            counts = trained is None or "quantize" in trained
            total, metrics = losses.vq_generator_loss(
                images,
                reconstructions,
                quantizer_loss=counts * bottleneck.quantizer_loss,
                commitment_loss=counts * bottleneck.commitment_loss,
                codebook_loss=counts * bottleneck.codebook_loss,
                quantizer_weight=loss.quantizer_weight,
                **shared,
            )
        else:
            total, metrics = losses.vae_generator_loss(
                images, reconstructions, kl=posterior.kl(), kl_weight=loss.kl_weight, **shared
            )
        return total, (metrics, {"reconstructions": reconstructions, "tokens": tokens, "latents": latents})

    def update(state: State, frozen, batch: Batch, draws: dict[str, jax.Array]) -> tuple[State, Metrics]:
        images = float_images(batch["image"])
        params, opt, ema = dict(state["params"]), dict(state["opt"]), dict(state["ema"])

        def loss_of(trainable, rows):
            return tokenizer_loss(trainable, rows, state=state, frozen=frozen)

        rows, trainable = {"images": images, **draws}, tokenizer.trainable(params["tokenizer"])
        grads, metrics, outputs = accumulate(loss_of, trainable, rows, gradient_accumulation, convolutions=True)
        metrics["lr"] = tokenizer.schedule(state["step"])
        new: State = {"step": state["step"] + 1, "params": params, "opt": opt, "ema": ema}
        if restart_codes:
            params["tokenizer"], new["code_usage"] = restarted(config, params["tokenizer"], state["code_usage"], outputs)
        params["tokenizer"], opt["tokenizer"], metrics["grad_norm"] = tokenizer.apply(
            params["tokenizer"], opt["tokenizer"], grads
        )
        if adversary:
            trained = adversary.update(state, images, outputs["reconstructions"])
            params["discriminator"], opt["discriminator"], new["lecam"], disc_metrics = trained
            metrics |= disc_metrics
        if outputs["tokens"] is not None:
            metrics |= losses.codebook_metrics(outputs["tokens"], config.codebook_size)
        ema["tokenizer"] = ema_update(ema["tokenizer"], params["tokenizer"], state["step"], ema_decay)
        return new, metrics

    def preview(state: State, frozen, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        del frozen, key
        model, images = tokenizer.module(state["ema"]["tokenizer"]), float_images(batch["image"])
        z = model.quantized(images).quantized if config.quantize_mode == "vq" else model.posterior(images).mean
        return {"image": images, "reconstruction": jnp.clip(model.decode(z), 0.0, 1.0)}

    def export(state: State, folder: Path) -> None:
        pretrained.save(folder, config, state["ema"]["tokenizer"], overwrite=True)

    return Task(
        networks=networks,
        frozen=None if perceptual is None else perceptual.params,
        init=init,
        draw=draw,
        update=update,
        preview=preview,
        export=export,
        loss="total_loss",
        start=None if start is None else {"tokenizer": start},
        evaluate=reconstruction_quality(preview),
    )
