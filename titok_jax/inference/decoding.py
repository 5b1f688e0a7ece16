"""Parallel decoding for masked generators (MaskGIT section 3.1; TiTok section 3.3), with any `logits(ids, labels)`.

All tokens start masked. Each step samples every masked token and masks those with the least confidence again, fewer in each
step. The last step keeps all tokens. The code here does not depend on a model. Sampling is in float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from titok_jax.models.generator import GUIDANCE_SCHEDULES

# (ids int32 [B', N], labels int32 [B']) -> logits [B', N, K]. The label `num_classes` means unconditional.
LogitsFn = Callable[[jax.Array, jax.Array], jax.Array]
# (step int32, logits float32 [B, N, K], temperature [] or [B]) -> (sampled tokens int32 [B, N], Gumbel noise [B, N] for the
# confidences): `noise_from_keys` or `noise_from_uniforms`.
Noise = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class DecodeOutput(NamedTuple):
    """Attributes:
    ids: [B, N] int32 in [0, K), the answer.
    trace: [S, B, N] int32, the ids after each step, with K for masked tokens; the last entry is `ids`.
    mask_len: [S, B] int32, how many tokens each step planned to mask again (the last step ignores this and masks none).
    """

    ids: jax.Array
    trace: jax.Array
    mask_len: jax.Array


def _per_image(value: jax.Array | float, ndim: int) -> jax.Array:
    """A number for all images [] or one per image [B] -> an array that broadcasts with [B, ...] of `ndim` axes."""
    return value if jnp.ndim(value) == 0 else value.reshape(value.shape + (1,) * (ndim - 1))


def gumbel(uniforms: jax.Array) -> jax.Array:
    """-log(-log(u)) with the published clamps log(max(., 1e-20)): u = 0 gives -3.83, u = 1 gives 46.05, all finite."""

    def log(x):
        return jnp.log(jnp.maximum(x, 1e-20))

    return -log(-log(uniforms))


def sample_gumbel(logits: jax.Array, temperature: jax.Array, uniforms: jax.Array) -> jax.Array:
    """argmax(logits + temperature * Gumbel noise): logits, uniforms [B, ..., K], temperature [] or [B] -> [B, ...] int32. As
    published."""
    return jnp.argmax(logits + _per_image(temperature, logits.ndim) * gumbel(uniforms), axis=-1).astype(jnp.int32)


def sample_inverse_cdf(logits: jax.Array, temperature: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Samples softmax(logits / temperature) with one uniform per token: logits [B, ..., K], temperature [] or [B], uniforms
    [B, ...] in [0, 1) -> [B, ...] int32.

    The distribution is that of `sample_gumbel`, but the draws differ. This function does not need K random numbers and 2 K
    logarithms per token. At temperature 0 it returns the argmax, and the lowest index wins a tie. The cumulative sum runs
    first over blocks, then within the chosen block. Each sum has about sqrt(K) terms, which is faster and more exact than
    one long sum.
    """
    k = logits.shape[-1]
    width = 2 ** math.ceil(math.log2(k) / 2)
    top = logits.max(-1, keepdims=True)
    p = jnp.exp((logits - top) / _per_image(jnp.where(temperature > 0, temperature, 1.0), logits.ndim))

    p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -k % width)]).reshape(*p.shape[:-1], -1, width)  # [..., blocks, width]
    mass = p.sum(-1)
    cumulative = jnp.cumsum(mass, axis=-1)
    target = uniforms[..., None] * cumulative[..., -1:]
    block = _first_beyond(cumulative, mass, target)  # [...]
    before = jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0)[..., None], axis=-1)
    before = jnp.where(block[..., None] > 0, before, 0.0)
    within = jnp.take_along_axis(p, block[..., None, None], axis=-2)[..., 0, :]  # [..., width]
    drawn = block * width + _first_beyond(jnp.cumsum(within, axis=-1), within, target - before)
    # Not as the limit of small temperatures: the compiler may compute `logits` and `top` apart, and then none is equal.
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(_per_image(temperature > 0, best.ndim), drawn, best)


def _first_beyond(cumulative: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The first index with a positive weight and a cumulative sum [..., n] above the target [..., 1]: [...] int32.

    A parallel sum rounds each prefix separately. So it may change where a weight is 0; therefore the weight must be
    positive. It may also end below a target that was computed from another sum; the result is then the last index with a
    positive weight.
    """
    index = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where((cumulative > target) & (weights > 0), index, weights.shape[-1]), axis=-1)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1)
    return jnp.minimum(first, last)


def noise_from_uniforms(token_uniforms: jax.Array, confidence_uniforms: jax.Array) -> Noise:
    """Noise from given random numbers, in the published arithmetic, for parity tests: token_uniforms [S, B, N, K] and
    confidence_uniforms [S, B, N], in [0, 1]."""

    def noise(step, logits, temperature):
        tokens = sample_gumbel(logits, temperature, token_uniforms[step])
        return tokens, gumbel(confidence_uniforms[step])

    return noise


def noise_from_keys(keys: jax.Array) -> Noise:
    """Noise for sampling, from one typed threefry key per image [B]. An image depends on its own key, but not on the rest of
    the batch, the backend or the sharding.

    Raises:
      ValueError: for keys of another kind, which give different numbers under vmap.
    """
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or str(jax.random.key_impl(keys)) != "threefry2x32":
        raise ValueError(f"keys of dtype {keys.dtype}, expected threefry keys: jax.random.key(seed, impl='threefry2x32')")

    def noise(step, logits, temperature):
        draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step), (2, logits.shape[1])))
        uniforms = draw(keys)  # [B, 2, N]
        return sample_inverse_cdf(logits, temperature, uniforms[:, 0]), gumbel(uniforms[:, 1])

    return noise


class Steps(NamedTuple):
    """The constants in which the steps differ: arrays with a leading axis [S] for all steps, without it for one step."""

    step: np.ndarray
    guidance: np.ndarray  # multiplies the guidance scale ("power-cosine": the scale minus 1)
    softmax_temperature: np.ndarray
    noise: np.ndarray  # multiplies the temperature of the Gumbel noise
    mask_len: np.ndarray  # [S, N + 1]: how many of 0, 1, ..., N tokens that are to be made are masked again


def steps_plan(num_steps: int, num_tokens: int, schedule: str, power: float, annealing: bool) -> Steps:
    """The constants of each step, computed in float64 before they are converted."""
    start = np.arange(num_steps) / num_steps
    ratio = np.arange(1, num_steps + 1) / num_steps
    guidance = {
        "constant": np.ones(num_steps),
        "linear": start,  # published: the previous step's ratio, so the full scale is never reached
        "power-cosine": (1.0 - np.cos(math.pi * start**power)) / 2.0,
    }[schedule]
    return Steps(
        step=np.arange(num_steps, dtype=np.int32),
        guidance=guidance.astype(np.float32),
        softmax_temperature=(0.5 + 0.8 * (1.0 - ratio) if annealing else np.ones(num_steps)).astype(np.float32),
        noise=(1.0 - ratio).astype(np.float32),
        mask_len=np.floor(np.arange(num_tokens + 1) * (np.arccos(ratio) / (math.pi * 0.5))[:, None]).astype(np.int32),
    )


def decoding_step(
    logits_fn: LogitsFn,
    labels: jax.Array,
    *,
    codebook_size: int,
    num_classes: int,
    num_steps: int,
    guidance_scale: jax.Array,
    guidance_schedule: str,
    temperature: jax.Array,
    noise: Noise,
    unknown: jax.Array | None = None,
) -> Callable[[jax.Array, Steps], tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    """Makes the step of the loop for `jax.lax.scan`: (ids [B, N], a row of `steps_plan`) -> (ids, (ids, mask_len [B])).
    `unknown` [B] is the number of tokens to make, all if not given; the other arguments are those of `parallel_decode`."""
    batch = labels.shape[0]
    from_uncond = guidance_schedule == "power-cosine"
    no_effect = 1.0 if from_uncond else 0.0

    def forward(ids, labels):
        logits = logits_fn(ids, labels)
        expected = (*ids.shape, codebook_size)
        if logits.shape != expected:
            raise ValueError(f"logits_fn gave logits of shape {logits.shape}, expected {expected}")
        return logits.astype(jnp.float32)

    def conditional(ids, scale):
        del scale
        return forward(ids, labels)

    def guided(ids, scale):
        # Each image is next to its unconditional copy, so a sharded batch keeps both on one device.
        pairs = jnp.stack([labels, jnp.full_like(labels, num_classes)], axis=1).reshape(-1)
        logits = forward(jnp.repeat(ids, 2, axis=0), pairs).reshape(batch, 2, ids.shape[1], codebook_size)
        cond, uncond = logits[:, 0], logits[:, 1]
        logits = (uncond if from_uncond else cond) + (cond - uncond) * _per_image(scale, 3)
        # An image without guidance does not depend on whether others in its batch have some.
        return logits if scale.ndim == 0 else jnp.where(_per_image(scale == no_effect, 3), cond, logits)

    def step(ids, plan: Steps):
        scale = 1.0 + (guidance_scale - 1.0) * plan.guidance if from_uncond else guidance_scale * plan.guidance
        logits = jax.lax.cond(jnp.all(scale == no_effect), conditional, guided, ids, scale)
        logits = logits / plan.softmax_temperature
        noise_scale = temperature * plan.noise
        sampled, confidence_noise = noise(plan.step, logits, noise_scale)

        masked = ids == codebook_size
        chosen = jnp.take_along_axis(logits, sampled[..., None], axis=-1)[..., 0]
        confidence = jnp.where(masked, chosen + _per_image(noise_scale, 2) * confidence_noise, jnp.inf)
        sampled = jnp.where(masked, sampled, ids)

        planned = plan.mask_len[-1] if unknown is None else jnp.asarray(plan.mask_len)[unknown]
        mask_len = jnp.maximum(1, jnp.minimum(masked.sum(-1, dtype=jnp.int32) - 1, planned))
        cut_off = jnp.take_along_axis(jnp.sort(confidence, axis=-1), mask_len[:, None] - 1, axis=-1)
        again = masked & (confidence <= cut_off) & (plan.step < num_steps - 1)
        ids = jnp.where(again, codebook_size, sampled)
        return ids, (ids, mask_len)

    return step


def parallel_decode(
    logits_fn: LogitsFn,
    labels: jax.Array,
    *,
    num_tokens: int,
    codebook_size: int,
    num_classes: int,
    num_steps: int,
    guidance_scale: jax.Array | float,
    guidance_schedule: str,
    guidance_scale_pow: float = 3.0,
    temperature: jax.Array | float,
    softmax_temperature_annealing: bool,
    noise: Noise,
    ids: jax.Array | None = None,
) -> DecodeOutput:
    """Generates tokens for labels with the published loop (modeling/maskgit.py, `generate`) as one scan. Jit the caller.

    Labels, noise, `guidance_scale` and `temperature` may be traced, so changing them causes no recompilation. A step without
    effective guidance (scale 0 under "constant", the first step under the other two) computes only the conditional logits.

    The guided logits are, with t = step / num_steps and steps counted from 0:
      "constant":     cond + s (cond - uncond), s = guidance_scale
      "linear":       cond + s (cond - uncond), s = guidance_scale t
      "power-cosine": uncond + s (cond - uncond), s = 1 + (guidance_scale - 1) (1 - cos(pi t^guidance_scale_pow)) / 2
    So the same guidance_scale is weaker by 1 under "power-cosine".

    The number of tokens to mask again is computed per image. The published code uses the first image's number for the whole
    batch. The two differ only if confidences of the first image tie exactly, and then images would depend on each other.

    Args:
      logits_fn: maps int32 ids [B', N] and labels [B'] to logits [B', N, codebook_size]; B' is B or 2 B.
      labels: int [B] in [0, num_classes]; `num_classes` itself means no label.
      num_tokens: N.
      codebook_size: K, also the id of the mask.
      num_steps: S, at least 1. With more steps than tokens, one token stays masked until the last step.
      guidance_scale: one number [], or one per image [B].
      guidance_scale_pow: only for "power-cosine".
      temperature: scale of the Gumbel noise, one number [] or one per image [B]. It is multiplied by
        1 - (step + 1) / num_steps, so it is 0 at the last step (published: randomize_temperature).
      softmax_temperature_annealing: divide the logits by 0.5 + 0.8 (1 - (step + 1) / num_steps), as published sampling does.
      noise: `noise_from_keys` or `noise_from_uniforms`.
      ids: int [B, N] in [0, codebook_size] to start from; None for masks only. Tokens other than the mask are kept. The
        numbers to mask again are then shares of an image's masks at the start, instead of N (as MaskGIT fills in images).

    Raises:
      ValueError: for an unknown schedule, num_steps < 1, or logits of the wrong shape.
    """
    if guidance_schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance schedule {guidance_schedule!r}, expected one of {GUIDANCE_SCHEDULES}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    labels = labels.astype(jnp.int32)
    if ids is None:
        # Made from the labels, so that it varies over the devices as they do, inside a `jax.shard_map`.
        ids = jnp.broadcast_to(labels[:, None] * 0 + codebook_size, (labels.shape[0], num_tokens))
    step = decoding_step(
        logits_fn,
        labels,
        codebook_size=codebook_size,
        num_classes=num_classes,
        num_steps=num_steps,
        guidance_scale=jnp.asarray(guidance_scale, jnp.float32),
        guidance_schedule=guidance_schedule,
        temperature=jnp.asarray(temperature, jnp.float32),
        noise=noise,
        unknown=(ids == codebook_size).sum(-1, dtype=jnp.int32),
    )
    plan = steps_plan(num_steps, num_tokens, guidance_schedule, guidance_scale_pow, softmax_temperature_annealing)
    ids, (trace, mask_len) = jax.lax.scan(step, ids.astype(jnp.int32), plan)
    return DecodeOutput(ids, trace, mask_len)
