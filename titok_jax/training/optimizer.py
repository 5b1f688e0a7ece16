"""The optimizer of the published trainings: torch's AdamW, warm-up schedules, clipping, and the EMA.

Updates count from 0 everywhere. Schedules and the EMA's ramp map a traced int32 step to a float32 scalar.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Any  # nested dict of arrays
Schedule = Callable[[jax.Array], jax.Array]

# Weight decay skips a parameter if its published name contains one of these, or if it has fewer than two axes in the
# published layout: `convert.decay_mask(table, params, NO_DECAY_WORDS)`. "embed" also exempts the patch embedding, the
# decoder embedding, positions and codebooks (published: utils/train_utils.py, `create_optimizer`).
NO_DECAY_WORDS = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The AdamW settings of the published recipes.

    Attributes:
      learning_rate: the value after warm-up.
      schedule: "cosine" (decays to `end_learning_rate`) or "constant".
      warmup_steps: updates over which the learning rate rises from 0.
      max_grad_norm: gradients are clipped to this global norm.
      mu_dtype: the dtype in which Adam's first moment is kept, "float32" (published) or "bfloat16", which takes an eighth
        off the state. The update itself is computed in float32.

    Raises:
      ValueError: for an unknown schedule or dtype.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    beta1: float
    beta2: float
    weight_decay: float
    max_grad_norm: float
    end_learning_rate: float = 0.0
    mu_dtype: str = "float32"

    def __post_init__(self):
        if self.mu_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"mu_dtype is {self.mu_dtype!r}, expected 'float32' or 'bfloat16'")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}, expected 'cosine' or 'constant'")

    def make_schedule(self, num_steps: int) -> Schedule:
        """The learning rate schedule of a training of `num_steps` updates."""
        if self.schedule == "constant":
            return constant_schedule(self.learning_rate, warmup_steps=self.warmup_steps)
        return cosine_schedule(
            self.learning_rate, end_lr=self.end_learning_rate, warmup_steps=self.warmup_steps, total_steps=num_steps
        )


def constant_schedule(base_lr: float, *, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up from 0, then `base_lr`. Update k < warmup_steps uses base_lr k / warmup_steps, so update 0 uses 0."""

    def schedule(step):
        ramp = jnp.asarray(step, jnp.float32) / max(1, warmup_steps)
        return jnp.where(step < warmup_steps, base_lr * ramp, jnp.float32(base_lr))

    return schedule


def cosine_schedule(base_lr: float, *, end_lr: float, warmup_steps: int, total_steps: float) -> Schedule:
    """Linear warm-up from 0, then half a cosine from `base_lr` to `end_lr` at `total_steps` (published:
    utils/lr_schedulers.py).

    As published, the progress is not clamped, so the rate rises again after `total_steps`. A discriminator that starts late
    has its own schedule, which counts its own updates. (With P processes the published code sets its `total_steps` to
    max_train_steps - start / P, which may not be an integer.)
    """

    def schedule(step):
        step = jnp.asarray(step)
        ramp = step.astype(jnp.float32) / max(1, warmup_steps)
        # (1 + cos(pi p)) / 2 = sin^2(pi (1 - p) / 2). Near the end the left side cancels in float32, the right does not.
        remaining = (total_steps - step).astype(jnp.float32) / max(1, total_steps - warmup_steps)
        cosine = jnp.square(jnp.sin(0.5 * math.pi * remaining))
        return jnp.where(step < warmup_steps, base_lr * ramp, end_lr + (base_lr - end_lr) * cosine)

    return schedule


def scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: str = "float32") -> optax.GradientTransformation:
    """`optax.scale_by_adam`, with the same state, but with bias corrections that are exact in float32.

    optax computes 1 - b2**t in float32. For b2 = 0.999 this is off by 1.3e-5 in the first updates. torch computes it in
    double precision. -expm1(t log b2) with a double-precision logarithm agrees with torch.
    """

    def init(params):
        kept = None if mu_dtype == "float32" else mu_dtype  # None: that of the parameters
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, kept), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda g, m: b1 * m.astype(g.dtype) + (1.0 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1.0 - b2) * jnp.square(g), grads, state.nu)
        correct1, correct2 = (-jnp.expm1(count * math.log(b)) if b > 0 else 1.0 for b in (b1, b2))
        updates = jax.tree.map(lambda m, v: (m / correct1) / (jnp.sqrt(v / correct2) + eps), mu, nu)
        mu = jax.tree.map(lambda new, former: new.astype(former.dtype), mu, state.mu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adamw(
    schedule: Schedule,
    *,
    b1: float,
    b2: float,
    eps: float = 1e-8,
    weight_decay: float,
    decay_mask: Params,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """torch's AdamW: p <- (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps), with decay where `decay_mask` is true.

    The chain does not clip; use `clip_by_global_norm`, which also returns the norm for logging. The state is a plain pytree.
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps, mu_dtype),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, jax.Array]:
    """Returns (gradients times min(1, max_norm / (norm + 1e-6)), the norm before clipping), like torch's `clip_grad_norm_`.

    optax divides by the norm itself, so it does not change a gradient of norm `max_norm`. torch shrinks it by 1e-6.
    """
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads), norm


def _ema_step(step: jax.Array, max_decay: float) -> jax.Array:
    """1 - ema_decay(step), computed without cancellation."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.where(step <= 0, 1.0, jnp.maximum(9.0 / (10.0 + step), 1.0 - max_decay))


def ema_decay(step: jax.Array, max_decay: float = 0.999) -> jax.Array:
    """Decay of the EMA at its update `step`: 0 at the first update, then min((1 + step) / (10 + step), max_decay)
    (published: modeling/modules/ema_model.py, whose counter is one ahead)."""
    return 1.0 - _ema_step(step, max_decay)


def constant_decay(decay: float) -> Schedule:
    """The same decay at every update, for a plain EMA. (That EMA starts at the first parameters and forgets them slowly.)"""
    return lambda step: jnp.float32(decay)


def ema_update(ema: Params, params: Params, step: jax.Array, decay: float | Schedule = 0.999) -> Params:
    """decay * ema + (1 - decay) * params, after the optimizer's update `step`.

    Args:
      decay: a number is the largest decay of the published ramp `ema_decay`, whose first update copies the parameters. A
        schedule gives the decay of each step instead.
    """
    weight = 1.0 - decay(step) if callable(decay) else _ema_step(step, decay)
    return jax.tree.map(lambda e, p: e - weight * (e - p), ema, params)
