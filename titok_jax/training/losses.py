"""The losses of all trainings, as pure functions of network outputs. No network is called here.

Everything is computed in float32, whatever the input dtype. Functions that combine several terms return the total and a dict
of metrics. The metrics have the names of the published training logs, and the terms in them are already weighted.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def _float32(x: jax.Array | float) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Per-element cross entropy: logits [..., K], targets int [...] in [0, K) -> [...].

    With smoothing s it is (1 - s) nll + s times the mean of -log p over all classes, like torch's CrossEntropyLoss. The
    backward pass keeps the logits and computes the rest again: a float32 copy of them would be the largest array of a step.
    """
    return jax.checkpoint(_cross_entropy, static_argnums=2)(logits, targets, label_smoothing)


def _cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float) -> jax.Array:
    logits = logits.astype(jnp.float32)
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    nll = log_sum - jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    if label_smoothing == 0.0:
        return nll
    return (1.0 - label_smoothing) * nll + label_smoothing * (log_sum - shifted.mean(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Masked generator (published: modeling/modules/losses.py, MLMLoss)


def token_weights(mask: jax.Array, unmasked_weight: float) -> jax.Array:
    """Weights of the tokens of a whole batch: mask bool [B, N], true where masked -> [B, N] float32, summing to 1.

    Before normalisation, masked tokens have weight 1 and the others `unmasked_weight`. The weights sum to 1 over the whole
    batch. For gradient accumulation, compute them before the batch is split; the losses of the parts then add up to the loss
    of the batch.
    """
    weights = jnp.where(mask, 1.0, jnp.float32(unmasked_weight))
    return weights / (weights.sum() + 1e-8)


def weighted_token_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, *, label_smoothing: float) -> jax.Array:
    """sum(weights * cross entropy) over a batch or part of one: logits [b, N, K], targets int [b, N], weights [b, N]."""
    return jnp.sum(weights * cross_entropy(logits, targets, label_smoothing))


def correct_tokens(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Share of masked tokens that the argmax predicts correctly, averaged over the rows of [B, N]. A row without masks
    counts as 0."""
    hits = (jnp.argmax(logits, axis=-1) == targets) & mask
    return jnp.mean(hits.sum(-1) / (mask.sum(-1) + 1e-8))


def masked_token_loss(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, *, label_smoothing: float = 0.1, unmasked_weight: float = 0.1
) -> tuple[jax.Array, Metrics]:
    """Loss of the masked generator on a whole batch: logits [B, N, K], targets int [B, N], mask bool [B, N]."""
    weights = token_weights(mask, unmasked_weight)
    loss = weighted_token_loss(logits, targets, weights, label_smoothing=label_smoothing)
    return loss, {"loss": loss, "correct_tokens": correct_tokens(logits, targets, mask)}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, stage 1 (TiTok section 3.2, "proxy codes"; published: ReconstructionLoss_Stage1)


def proxy_code_loss(logits: jax.Array, codes: jax.Array) -> jax.Array:
    """Mean cross entropy of logits [B, h, w, K] against the 2D tokenizer's codes, int [B, h, w] or row-major [B, h w]."""
    return jnp.mean(cross_entropy(logits, codes.reshape(logits.shape[:-1])))


def stage1_loss(
    logits: jax.Array,
    codes: jax.Array,
    *,
    quantizer_loss: jax.Array,
    commitment_loss: jax.Array,
    codebook_loss: jax.Array,
    quantizer_weight: float = 1.0,
) -> tuple[jax.Array, Metrics]:
    """proxy_code_loss + quantizer_weight * quantizer_loss. `commitment_loss` and `codebook_loss` are only logged."""
    reconstruction = proxy_code_loss(logits, codes)
    quantizer = quantizer_weight * _float32(quantizer_loss)
    total = reconstruction + quantizer
    return total, {
        "total_loss": total,
        "reconstruction_loss": reconstruction,
        "quantizer_loss": quantizer,
        "commitment_loss": commitment_loss,
        "codebook_loss": codebook_loss,
    }


def codebook_metrics(tokens: jax.Array, codebook_size: int) -> Metrics:
    """How `tokens` (int, [B, ...]) use the codebook. "codebook_usage" is the share of codes that occur.
    "codebook_perplexity" is the exp of the entropy: the number of equally frequent codes with the same entropy.
    "tokens_differ" is the share of tokens unlike those at the same place of the first image: 0 if they do not tell images
    apart."""
    p = jnp.zeros(codebook_size, jnp.float32).at[tokens.reshape(-1)].add(1.0) / tokens.size
    return {
        "codebook_usage": jnp.mean(p > 0),
        "codebook_perplexity": jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p))),
        "tokens_differ": jnp.mean(tokens[1:] != tokens[:1]) if len(tokens) > 1 else jnp.nan,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer on pixels: stage 2 and single stage (published: ReconstructionLoss_Stage2, ReconstructionLoss_Single_Stage)


def reconstruction_loss(images: jax.Array, reconstructions: jax.Array, kind: str = "l2") -> jax.Array:
    """Mean squared ("l2") or absolute ("l1") difference of two [B, H, W, 3].

    Raises:
      ValueError: for another kind.
    """
    difference = images.astype(jnp.float32) - reconstructions.astype(jnp.float32)
    if kind == "l2":
        return jnp.mean(jnp.square(difference))
    if kind == "l1":
        return jnp.mean(jnp.abs(difference))
    raise ValueError(f"reconstruction loss {kind!r}, expected 'l1' or 'l2'")


def kl_loss(kl: jax.Array) -> jax.Array:
    """KL divergences [B, N] in nats per token, summed over tokens and averaged over images."""
    return jnp.sum(kl.astype(jnp.float32)) / kl.shape[0]


def discriminator_factor(step: jax.Array, start: int, factor: float = 1.0) -> jax.Array:
    """0 before update `start`, and `factor` from then on. Updates count from 0."""
    return jnp.where(step >= start, jnp.float32(factor), 0.0)


def pixel_terms(
    images: jax.Array,
    reconstructions: jax.Array,
    *,
    perceptual: jax.Array,
    logits_fake: jax.Array | None,
    factor: jax.Array | float,
    kind: str = "l2",
    reconstruction_weight: float = 1.0,
    perceptual_weight: float,
    discriminator_weight: float,
    adversarial: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Metrics]:
    """The weighted terms that all pixel losses share. Returns (reconstruction + perceptual + adversarial, metrics).

    Args:
      images, reconstructions: [B, H, W, 3].
      perceptual: the perceptual distance, one value or one per image. The loss uses its mean.
      logits_fake: the discriminator's logits for the reconstructions, any shape, computed with its parameters held constant.
        None if it was not run (the factor is 0).
      factor: `discriminator_factor` of this step; may be traced. While it is 0, the adversarial term is logged as 0.
      kind: kind of `reconstruction_loss`.
      adversarial: the loss on `logits_fake`, `hinge_g_loss` or `non_saturating_g_loss`.
    """
    factor = _float32(factor)
    gan = jnp.zeros((), jnp.float32)
    if logits_fake is not None:
        gan = jnp.where(factor > 0, adversarial(logits_fake), 0.0)
    terms = {
        "reconstruction_loss": reconstruction_weight * reconstruction_loss(images, reconstructions, kind),
        "perceptual_loss": perceptual_weight * jnp.mean(_float32(perceptual)),
        "weighted_gan_loss": discriminator_weight * factor * gan,
    }
    return sum(terms.values()), {**terms, "discriminator_factor": factor, "gan_loss": gan}


def vq_generator_loss(
    images: jax.Array,
    reconstructions: jax.Array,
    *,
    quantizer_loss: jax.Array,
    commitment_loss: jax.Array,
    codebook_loss: jax.Array,
    quantizer_weight: float,
    **pixels,
) -> tuple[jax.Array, Metrics]:
    """Total loss of a tokenizer with a vector quantizer: stage 2, and single-stage training in "vq" mode.

    Args:
      images, reconstructions, pixels: as in `pixel_terms`.
      quantizer_loss, commitment_loss, codebook_loss: the quantizer's losses. The first is the sum of the other two, which
        are only logged.
    """
    total, metrics = pixel_terms(images, reconstructions, adversarial=hinge_g_loss, **pixels)
    quantizer = quantizer_weight * _float32(quantizer_loss)
    return total + quantizer, {
        "total_loss": total + quantizer,
        **metrics,
        "quantizer_loss": quantizer,
        "commitment_loss": commitment_loss,
        "codebook_loss": codebook_loss,
        "d_weight": jnp.float32(pixels["discriminator_weight"]),
    }


def vae_generator_loss(
    images: jax.Array,
    reconstructions: jax.Array,
    *,
    kl: jax.Array,
    kl_weight: float,
    logvar: float = 0.0,
    reconstruction_weight: float = 1.0,
    **pixels,
) -> tuple[jax.Array, Metrics]:
    """Total loss of a tokenizer with a Gaussian bottleneck (single-stage training in "vae" mode).

    The reconstruction loss is divided by exp(logvar). `logvar` is a constant of the published configuration, where it is 0.
    `kl` [B, N] is in nats per token. The other arguments are those of `pixel_terms`.
    """
    pixels["reconstruction_weight"] = reconstruction_weight / jnp.exp(logvar)
    total, metrics = pixel_terms(images, reconstructions, adversarial=hinge_g_loss, **pixels)
    weighted_kl = kl_weight * kl_loss(kl)
    return total + weighted_kl, {
        "total_loss": total + weighted_kl,
        **metrics,
        "kl_loss": weighted_kl,
        "d_weight": jnp.float32(pixels["discriminator_weight"]),
    }


class LeCamEma(NamedTuple):
    """Running means of the discriminator's logits on real and on reconstructed images: float32 scalars, initially 0."""

    real: jax.Array
    fake: jax.Array


def init_lecam() -> LeCamEma:
    return LeCamEma(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def hinge_g_loss(logits_fake: jax.Array) -> jax.Array:
    """-mean(fake), over logits of any shape."""
    return -jnp.mean(logits_fake.astype(jnp.float32))


def hinge_d_loss(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """0.5 (mean relu(1 - real) + mean relu(1 + fake)), over logits of any shape."""
    real, fake = logits_real.astype(jnp.float32), logits_fake.astype(jnp.float32)
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def lecam_penalty(real_mean: jax.Array, fake_mean: jax.Array, ema: LeCamEma) -> jax.Array:
    """relu(real - ema_fake)^2 + relu(ema_real - fake)^2 of the mean logits (LeCam regularisation, Tseng et al. 2021)."""
    real_mean, fake_mean, ema = jax.tree.map(_float32, (real_mean, fake_mean, ema))
    return jnp.square(jax.nn.relu(real_mean - ema.fake)) + jnp.square(jax.nn.relu(ema.real - fake_mean))


def update_lecam(ema: LeCamEma, real_mean: jax.Array, fake_mean: jax.Array, decay: float = 0.999) -> LeCamEma:
    """decay * ema + (1 - decay) * mean, without bias correction and without gradient."""
    means = jax.lax.stop_gradient(LeCamEma(_float32(real_mean), _float32(fake_mean)))
    return jax.tree.map(lambda e, m: decay * e + (1.0 - decay) * m, ema, means)


def non_saturating_d_loss(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """mean(-log sigmoid(real)) + mean(-log(1 - sigmoid(fake))), over logits of any shape (Goodfellow et al. 2014)."""
    real, fake = logits_real.astype(jnp.float32), logits_fake.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def r1_penalty(square_norms: jax.Array) -> jax.Array:
    """The R1 penalty (Mescheder et al. 2018): the mean over real images of the squared norm [B] of the gradient of the
    discriminator's output with respect to the image. The original MaskGIT code weights it by 10, without that paper's
    factor 1/2."""
    return jnp.mean(square_norms.astype(jnp.float32))


def discriminator_loss(
    logits_real: jax.Array,
    logits_fake: jax.Array,
    ema: LeCamEma,
    *,
    factor: jax.Array | float,
    lecam_weight: float,
    lecam_decay: float = 0.999,
    kind: str = "hinge",
) -> tuple[jax.Array, Metrics, LeCamEma]:
    """Total loss of the discriminator, factor * adversarial + lecam_weight * LeCam, and the averages after this step.

    LeCam uses the averages from before this step's update. The factor does not affect LeCam and the averages. Do not call
    this before the discriminator starts, so that the averages stay 0 as in the published training. `kind` is "hinge" or
    "non_saturating".
    """
    real_mean, fake_mean = (jnp.mean(x.astype(jnp.float32)) for x in (logits_real, logits_fake))
    lecam = lecam_weight * lecam_penalty(real_mean, fake_mean, ema)
    adversarial = {"hinge": hinge_d_loss, "non_saturating": non_saturating_d_loss}[kind](logits_real, logits_fake)
    total = factor * adversarial + lecam
    metrics = {"discriminator_loss": total, "logits_real": real_mean, "logits_fake": fake_mean, "lecam_loss": lecam}
    return total, metrics, update_lecam(ema, real_mean, fake_mean, lecam_decay)


# ---------------------------------------------------------------------------------------------------------------------
# MaskGIT-VQGAN (published: google-research/maskgit, libml/losses.py and nets/vqgan_tokenizer.py)


def non_saturating_g_loss(logits_fake: jax.Array) -> jax.Array:
    """mean(-log sigmoid(fake)), over logits of any shape (Goodfellow et al. 2014)."""
    return jnp.mean(jax.nn.softplus(-logits_fake.astype(jnp.float32)))


def entropy_loss(distances: jax.Array, temperature: float) -> jax.Array:
    """Mean entropy of p = softmax(-distances / T) minus the entropy of the mean p, in nats.

    It is low if each vector clearly prefers one code and all codes are used equally. `distances` [..., K] are squared
    distances, and the means are over all vectors of the batch. As published, 1e-5 is added inside the logarithm of the mean.
    """
    log_p = jax.nn.log_softmax(-distances.astype(jnp.float32).reshape(-1, distances.shape[-1]) / temperature, axis=-1)
    p = jnp.exp(log_p)
    mean = p.mean(0)
    return jnp.sum(mean * jnp.log(mean + 1e-5)) - jnp.mean(jnp.sum(p * log_p, axis=-1))


def maskgit_vqgan_loss(
    images: jax.Array,
    reconstructions: jax.Array,
    *,
    commitment_loss: jax.Array,
    codebook_loss: jax.Array,
    entropy: jax.Array,
    commitment_weight: float,
    entropy_weight: float,
    **pixels,
) -> tuple[jax.Array, Metrics]:
    """Total loss of the MaskGIT-VQGAN: `pixel_terms` with the non-saturating adversarial loss, plus the quantizer's terms.

    Pass `commitment_loss` and `codebook_loss` unweighted (the latter has weight 1), and `entropy` from `entropy_loss`.
    """
    total, metrics = pixel_terms(images, reconstructions, adversarial=non_saturating_g_loss, **pixels)
    commitment, codebook_loss = commitment_weight * _float32(commitment_loss), _float32(codebook_loss)
    entropy = entropy_weight * _float32(entropy)
    total += commitment + codebook_loss + entropy
    return total, {
        "total_loss": total,
        **metrics,
        "commitment_loss": commitment,
        "codebook_loss": codebook_loss,
        "entropy_loss": entropy,
    }
