"""Single-stage tokenizer training: pixels in, pixels out (TiTok's VQ-8k and VAE models; the digits).

Trained: the whole TiTok, and a discriminator from `discriminator_start` on. Order of a step, as published: the tokenizer's
loss and update against the discriminator as it is; then the discriminator's on the same reconstructions, made before the
update; then the average of the tokenizer's parameters.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from titok_jax import losses, pretrained
from titok_jax.models.discriminator import DiscriminatorConfig
from titok_jax.models.titok import TiTokConfig
from titok_jax.optimizer import ema_update
from titok_jax.tasks import Batch, Metrics, Network, State, Task, accumulate, float_images, make_network


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
    perceptual: Callable | None = None,
    perceptual_params=None,
    ema_decay: float = 0.999,
    compute_dtype: str = "float32",
    remat: bool = False,
    gradient_accumulation: int = 1,
) -> Task:
    """The task.

    Args:
      optimizer: see `tasks.make_network`.
      num_steps: length of the training; the discriminator's schedule spans what is left of it after its start.
      discriminator, discriminator_optimizer: needed if `loss.discriminator_weight` is not 0.
      perceptual: (perceptual_params, images, reconstructions) -> distances, or None.
      gradient_accumulation: parts that a batch is cut into. (LeCam then sees the means of the parts.)

    Raises:
      ValueError: a legacy model, or a loss without what it needs.
    """
    if config.is_legacy:
        raise ValueError("single-stage training is for models with a pixel decoder: set is_legacy to False")
    if (loss.perceptual != "none") != (perceptual is not None):
        raise ValueError(
            f"loss.perceptual is {loss.perceptual!r}, but its network is {'absent' if perceptual is None else 'given'}"
        )
    tokenizer = make_network(config, optimizer, num_steps, compute_dtype=compute_dtype, remat=remat)
    networks: dict[str, Network] = {"tokenizer": tokenizer}
    adversarial = loss.discriminator_weight > 0
    if adversarial:
        if discriminator is None or discriminator_optimizer is None:
            raise ValueError("loss.discriminator_weight is set, but no discriminator")
        networks["discriminator"] = make_network(
            discriminator, discriminator_optimizer, num_steps - loss.discriminator_start, compute_dtype=compute_dtype
        )

    def init(key: jax.Array) -> State:
        state: State = {"step": jnp.zeros((), jnp.int32), "params": {}, "opt": {}, "ema": {}}
        for name, network, network_key in zip(
            networks, networks.values(), jax.random.split(key, len(networks)), strict=True
        ):
            state["params"][name], state["opt"][name] = network.init(network_key)
        state["ema"]["tokenizer"] = state["params"]["tokenizer"]
        if adversarial:
            state["lecam"] = losses.init_lecam()
        return state

    def draw(key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        if config.quantize_mode == "vq":
            return {}
        shape = (batch["image"].shape[0], config.num_latent_tokens, config.token_size)
        return {"noise": jax.random.normal(key, shape)}

    def tokenizer_loss(params, rows, *, state: State, frozen):
        images = rows["images"]
        model = tokenizer.module(params)
        if config.quantize_mode == "vq":
            bottleneck = model.quantized(images)
            z, tokens = bottleneck.quantized, bottleneck.tokens
        else:
            posterior = model.posterior(images)
            z, tokens = posterior.sample(rows["noise"]), None
        reconstructions = model.decode(z)

        factor, logits_fake = jnp.float32(0.0), None
        if adversarial:
            factor = losses.discriminator_factor(state["step"], loss.discriminator_start, loss.discriminator_factor)
            critic = networks["discriminator"].module(jax.lax.stop_gradient(state["params"]["discriminator"]))
            grid = jax.eval_shape(critic, reconstructions)
            logits_fake = jax.lax.cond(factor > 0, critic, lambda _: jnp.zeros(grid.shape, grid.dtype), reconstructions)
        shared = {
            "perceptual": jnp.float32(0.0) if perceptual is None else perceptual(frozen, images, reconstructions),
            "logits_fake": logits_fake,
            "factor": factor,
            "kind": loss.reconstruction,
            "reconstruction_weight": loss.reconstruction_weight,
            "perceptual_weight": loss.perceptual_weight,
            "discriminator_weight": loss.discriminator_weight,
        }
        if config.quantize_mode == "vq":
            total, metrics = losses.vq_generator_loss(
                images,
                reconstructions,
                quantizer_loss=bottleneck.quantizer_loss,
                commitment_loss=bottleneck.commitment_loss,
                codebook_loss=bottleneck.codebook_loss,
                quantizer_weight=loss.quantizer_weight,
                **shared,
            )
        else:
            total, metrics = losses.vae_generator_loss(
                images, reconstructions, kl=posterior.kl(), kl_weight=loss.kl_weight, **shared
            )
        return total, (metrics, {"reconstructions": reconstructions, "tokens": tokens})

    def discriminator_update(state: State, images, reconstructions):
        """-> (params, optimizer state, LeCam averages, metrics) of the discriminator."""
        network, start = networks["discriminator"], state["step"] >= loss.discriminator_start

        def discriminator_loss(params, rows):
            critic = network.module(params)
            total, metrics, lecam = losses.discriminator_loss(
                critic(rows["images"]),
                critic(rows["reconstructions"]),
                state["lecam"],
                factor=loss.discriminator_factor,
                lecam_weight=loss.lecam_weight,
                lecam_decay=loss.lecam_decay,
            )
            # The averages are means over the parts, as the metrics are.
            return total, ({**metrics, "lecam": lecam}, None)

        def train(_):
            params, opt = state["params"]["discriminator"], state["opt"]["discriminator"]
            rows = {"images": images, "reconstructions": jax.lax.stop_gradient(reconstructions)}
            grads, metrics, _ = accumulate(discriminator_loss, params, rows, gradient_accumulation)
            lecam = metrics.pop("lecam")
            updates_made = state["step"] - loss.discriminator_start
            params, opt, norm = network.apply(params, opt, grads)
            return params, opt, lecam, {**metrics, "disc_grad_norm": norm, "disc_lr": network.schedule(updates_made)}

        def wait(_):
            nothing = ("discriminator_loss", "logits_real", "logits_fake", "lecam_loss", "disc_grad_norm", "disc_lr")
            metrics = {name: jnp.float32(jnp.nan) for name in nothing}
            return state["params"]["discriminator"], state["opt"]["discriminator"], state["lecam"], metrics

        return jax.lax.cond(start, train, wait, None)

    def update(state: State, frozen, batch: Batch, draws: dict[str, jax.Array]) -> tuple[State, Metrics]:
        images = float_images(batch)
        params, opt, ema = dict(state["params"]), dict(state["opt"]), dict(state["ema"])

        def loss_of(params, rows):
            return tokenizer_loss(params, rows, state=state, frozen=frozen)

        rows = {"images": images, **draws}
        grads, metrics, outputs = accumulate(loss_of, params["tokenizer"], rows, gradient_accumulation)
        metrics["lr"] = tokenizer.schedule(state["step"])
        params["tokenizer"], opt["tokenizer"], metrics["grad_norm"] = tokenizer.apply(
            params["tokenizer"], opt["tokenizer"], grads
        )
        new = {"step": state["step"] + 1, "params": params, "opt": opt, "ema": ema}
        if adversarial:
            trained = discriminator_update(state, images, outputs["reconstructions"])
            params["discriminator"], opt["discriminator"], new["lecam"], disc_metrics = trained
            metrics |= disc_metrics
        if outputs["tokens"] is not None:
            used = jnp.zeros(config.codebook_size, bool).at[outputs["tokens"].reshape(-1)].set(True)
            metrics["codebook_usage"] = used.mean()
        ema["tokenizer"] = ema_update(ema["tokenizer"], params["tokenizer"], state["step"], ema_decay)
        return new, metrics

    def preview(state: State, frozen, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        del frozen, key
        model, images = tokenizer.module(state["ema"]["tokenizer"]), float_images(batch)
        z = model.quantized(images).quantized if config.quantize_mode == "vq" else model.posterior(images).mean
        return {"image": images, "reconstruction": jnp.clip(model.decode(z), 0.0, 1.0)}

    def export(state: State, folder: Path) -> None:
        pretrained.save(folder, config, state["ema"]["tokenizer"], overwrite=True)

    return Task(networks, perceptual_params, init, draw, update, preview, export, loss="total_loss")
