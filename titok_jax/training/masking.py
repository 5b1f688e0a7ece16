"""Masks tokens for training the masked generator (MaskGIT, section 3.2)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Share of masked tokens as a function of time u in [0, 1); it is 1 at u = 0. The published models use arccos. The other
# schedules are from the comparison in the MaskGIT paper.
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "arccos": lambda u: jnp.arccos(u) / (math.pi * 0.5),
    "cosine": lambda u: jnp.cos(u * (math.pi * 0.5)),
    "linear": lambda u: 1.0 - u,
    "root": lambda u: 1.0 - jnp.sqrt(u),
}


def mask_ratio(timesteps: jax.Array, schedule: str = "arccos") -> jax.Array:
    """Share of masked tokens, in [1e-6, 1], at times [...] in [0, 1].

    Raises:
      ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"mask schedule {schedule!r}, expected one of {sorted(SCHEDULES)}")
    return jnp.clip(SCHEDULES[schedule](timesteps.astype(jnp.float32)), 1e-6, 1.0)


def num_masked(timesteps: jax.Array, num_tokens: int, schedule: str = "arccos") -> jax.Array:
    """How many of `num_tokens` are masked at times [...]: int32, rounded half to even, at least 1."""
    return jnp.maximum(jnp.round(num_tokens * mask_ratio(timesteps, schedule)), 1.0).astype(jnp.int32)


def mask_tokens(
    tokens: jax.Array, timesteps: jax.Array, order_uniforms: jax.Array, mask_id: int, schedule: str = "arccos"
) -> tuple[jax.Array, jax.Array]:
    """Masks a random subset of each row (published: modeling/maskgit.py, `masking_input_tokens`).

    Args:
      tokens: int [B, N].
      timesteps: [B] in [0, 1), one time per row.
      order_uniforms: [B, N] random numbers whose order decides which tokens are masked. Position j is masked if
        argsort(row)[j] < count. This compares the permutation, not its inverse (the ranks). Both give a uniformly random
        subset, but only this one gives the published subset.
      mask_id: the id that replaces masked tokens.

    Returns:
      (tokens with the mask id [B, N] int32, mask [B, N] bool, true where masked).
    """
    count = num_masked(timesteps, tokens.shape[1], schedule)
    mask = jnp.argsort(order_uniforms, axis=-1) < count[:, None]
    return jnp.where(mask, mask_id, tokens).astype(jnp.int32), mask


def random_mask_tokens(
    key: jax.Array, tokens: jax.Array, mask_id: int, schedule: str = "arccos"
) -> tuple[jax.Array, jax.Array]:
    """`mask_tokens` with random times and a random order, both from one key for the whole batch."""
    time_key, order_key = jax.random.split(key)
    timesteps = jax.random.uniform(time_key, tokens.shape[:1])
    return mask_tokens(tokens, timesteps, jax.random.uniform(order_key, tokens.shape), mask_id, schedule)
