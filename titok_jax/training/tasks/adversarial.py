"""The discriminator of the tasks that train on pixels: its logits for the model's loss, and its own update.

Both begin at update `start`. The discriminator's loss compares the images with reconstructions made before the model's
update. It includes LeCam (Tseng et al. 2021) and, if its weight is not 0, the R1 penalty (Mescheder et al. 2018).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from titok_jax.training import losses
from titok_jax.training.accumulation import cond, map_parts
from titok_jax.training.tasks.base import Metrics, Network, State, Task, TaskOptions, group_norms, make_network

_METRICS = ("discriminator_loss", "logits_real", "logits_fake", "lecam_loss", "disc_grad_norm", "disc_lr")


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator in training. The state holds it under the name "discriminator", and its LeCam averages as "lecam".

    Attributes:
      start: first update of the adversarial terms.
      kind: kind of loss, "hinge" or "non_saturating".
      factor: factor of the adversarial terms from `start` on.
      gradient_penalty: weight of R1, which penalises the gradient of the mean over an image's grid of logits.
      parts: number of parts that a batch is split into to save memory. The update is that of the full batch.
      log_grad_norms: as in `TaskOptions`.
    """

    network: Network
    start: int
    kind: str = "hinge"
    factor: float = 1.0
    lecam_weight: float = 0.001
    lecam_decay: float = 0.999
    gradient_penalty: float = 0.0
    parts: int = 1
    log_grad_norms: bool = False

    def judge(self, state: State, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (factor, logits) of images [b, H, W, 3], with the parameters held constant. Both are 0 before `start`."""
        factor = losses.discriminator_factor(state["step"], self.start, self.factor)
        critic = self.network.module(jax.lax.stop_gradient(state["params"]["discriminator"]))
        grid = jax.eval_shape(critic, images)
        return factor, cond(factor > 0, lambda: critic(images), lambda: jnp.zeros(grid.shape, grid.dtype))

    def update(self, state: State, advanced: State, images: jax.Array, reconstructions: jax.Array) -> tuple[State, Metrics]:
        """Returns (the state after the discriminator's update, metrics). Metrics are NaN before `start`.

        Args:
          state: the state before the step; advanced: the state after the model's update.
        """
        params, opt, lecam = state["params"]["discriminator"], state["opt"]["discriminator"], state["lecam"]
        names = (*_METRICS, "r1_penalty") if self.gradient_penalty else _METRICS
        if self.log_grad_norms:
            names = (*names, *group_norms(params, "disc_grad_norm"))

        def train():
            grads, (metrics, averages) = jax.grad(self._loss, has_aux=True)(params, state, images, reconstructions)
            new_params, new_opt, metrics["disc_grad_norm"] = self.network.apply(params, opt, grads)
            if self.log_grad_norms:
                metrics |= group_norms(grads, "disc_grad_norm")
            metrics["disc_lr"] = self.network.schedule(state["step"] - self.start)
            return new_params, new_opt, averages, {name: metrics[name] for name in names}

        def wait():
            return params, opt, lecam, {name: jnp.float32(jnp.nan) for name in names}

        params, opt, lecam, metrics = cond(state["step"] >= self.start, train, wait)
        new = {
            **advanced,
            "params": {**advanced["params"], "discriminator": params},
            "opt": {**advanced["opt"], "discriminator": opt},
            "lecam": lecam,
        }
        return new, metrics

    def _loss(self, params, state: State, images, reconstructions) -> tuple[jax.Array, tuple[Metrics, losses.LeCamEma]]:
        # LeCam is not linear in the mean logits, so the gradients of the parts would not add up to that of the full batch.
        # The logits of all parts therefore go into one loss.
        def critic(params, part):
            return self.network.module(params)(part)

        def critic_and_slope(params, part):
            return _logits_and_slope(self.network.module(params), part)

        reconstructions = jax.lax.stop_gradient(reconstructions)
        square_norms = None
        if self.gradient_penalty:
            real, square_norms = map_parts(critic_and_slope, params, images, self.parts)
        else:
            real = map_parts(critic, params, images, self.parts)
        total, metrics, lecam = losses.discriminator_loss(
            real,
            map_parts(critic, params, reconstructions, self.parts),
            state["lecam"],
            factor=self.factor,
            lecam_weight=self.lecam_weight,
            lecam_decay=self.lecam_decay,
            kind=self.kind,
        )
        if square_norms is not None:
            metrics["r1_penalty"] = self.gradient_penalty * losses.r1_penalty(square_norms)
            total += metrics["r1_penalty"]
            metrics["discriminator_loss"] = total
        return total, (metrics, lecam)


def make_adversary(loss: Any, options: TaskOptions, **others: Any) -> Adversary | None:
    """Makes the discriminator for a loss, or returns None if `discriminator_weight` is 0.

    Its learning rate schedule begins at its start and spans the rest of the training.

    Args:
      loss: has `discriminator_weight`, `discriminator_start`, `lecam_weight` and `lecam_decay`.
      others: as in `Adversary`.

    Raises:
      ValueError: if the discriminator or its optimizer is not configured.
    """
    if loss.discriminator_weight <= 0:
        return None
    if options.discriminator is None or options.discriminator_optimizer is None:
        raise ValueError("loss.discriminator_weight is set, but no discriminator")
    start = loss.discriminator_start
    steps, dtype = options.num_steps - start, options.discriminator_dtype
    network = make_network(options.discriminator, options.discriminator_optimizer, steps, compute_dtype=dtype)
    lecam = {"lecam_weight": loss.lecam_weight, "lecam_decay": loss.lecam_decay}
    shared = {"parts": options.gradient_accumulation, "log_grad_norms": options.log_grad_norms}
    return Adversary(network, start, **shared, **lecam, **others)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdversarialTask(Task):
    """A training on pixels, with or without a discriminator and a perceptual network.

    Attributes:
      adversary: None if the loss has no adversarial term.
    """

    adversary: Adversary | None

    def init(self, key: jax.Array, start: Mapping[str, Any] | None = None) -> State:
        state = super().init(key, start)
        return {**state, "lecam": losses.init_lecam()} if self.adversary else state

    def judge(self, state: State, reconstructions: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns (factor of the adversarial term, logits of the current discriminator), or (0, None) without one."""
        return self.adversary.judge(state, reconstructions) if self.adversary else (jnp.float32(0.0), None)

    def perceptual_distance(self, frozen: Any, images: jax.Array, reconstructions: jax.Array) -> jax.Array:
        """Returns the distances [B], or one distance for all images. Returns 0 without a perceptual network."""
        perceptual = self.options.perceptual
        return jnp.float32(0.0) if perceptual is None else perceptual.distance(frozen, images, reconstructions)


def _logits_and_slope(critic, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [b, H, W, 3] -> (logits, the squared norm [b] of the gradient of each image's mean logit)."""

    def mean_logits(images):
        logits = critic(images)
        return jnp.sum(logits.mean((1, 2, 3))), logits  # each image's logits depend on that image only

    slope, logits = jax.grad(mean_logits, has_aux=True)(images)
    return logits, jnp.sum(jnp.square(slope), axis=(1, 2, 3))
