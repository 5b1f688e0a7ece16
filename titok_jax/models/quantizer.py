"""The two bottlenecks of TiTok: a vector quantizer and a diagonal Gaussian. Both always compute in float32."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax.models.layers import uniform_init
from titok_jax.runtime.sharding import any_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class QuantizerOutput:
    """Outputs of the vector quantizer for latents z [B, N, C].

    Attributes:
      quantized: [B, N, C], the chosen code vectors. Their gradient passes straight through to z.
      tokens: [B, N] int32, the indices of the codes.
      latents: [B, N, C] float32, the given z, not normalised.
      commitment_loss, codebook_loss, quantizer_loss: scalars; the last is the sum that training minimises.
    """

    quantized: jax.Array
    tokens: jax.Array
    latents: jax.Array
    commitment_loss: jax.Array
    codebook_loss: jax.Array
    quantizer_loss: jax.Array


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) along the last axis, like torch's `normalize`."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    # The maximum applies to the square so that a zero vector has gradient 0, not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def codebook_distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances [..., K] from vectors z [..., C] to every row of a codebook [K, C], computed in float32 as
    |z|^2 + |e|^2 - 2 z.e. This is the published formula; its rounding decides near ties."""
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    dots = jnp.einsum("...c,kc->...k", z, codebook, precision="highest")
    return jnp.sum(z * z, axis=-1, keepdims=True) + jnp.sum(codebook * codebook, axis=-1) - 2.0 * dots


class VectorQuantizer(nnx.Module):
    """Chooses the nearest code by Euclidean distance (van den Oord et al. 2017). With `use_l2_norm`, latents and codes are
    L2-normalised first (Yu et al. 2022)."""

    def __init__(
        self,
        codebook_size: int,
        token_size: int,
        *,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.commitment_cost, self.use_l2_norm = commitment_cost, use_l2_norm
        init = uniform_init(1.0 / codebook_size)
        self.embedding = nnx.Param(init(rngs.params(), (codebook_size, token_size)))

    def codebook(self) -> jax.Array:
        """The code vectors that are compared and looked up: [K, C] float32, normalised if `use_l2_norm`."""
        codebook = self.embedding[...].astype(jnp.float32)
        return l2_normalize(codebook) if self.use_l2_norm else codebook

    def normalized(self, z: jax.Array) -> jax.Array:
        """z in float32, ready to compare with the codebook: normalised if `use_l2_norm`."""
        z = z.astype(jnp.float32)
        return l2_normalize(z) if self.use_l2_norm else z

    @any_mesh
    def distances(self, z: jax.Array) -> jax.Array:
        """z [..., C] -> squared distances to the codes [..., K]."""
        return codebook_distances(self.normalized(z), self.codebook())

    @any_mesh
    def __call__(self, z: jax.Array) -> QuantizerOutput:
        """z [B, N, C] -> QuantizerOutput. The lowest index wins a tie."""
        latents = z.astype(jnp.float32)
        z, codebook = self.normalized(z), self.codebook()
        tokens = jnp.argmin(codebook_distances(z, codebook), axis=-1).astype(jnp.int32)
        codes = codebook[tokens]
        commitment = self.commitment_cost * jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - z))
        codebook_loss = jnp.mean(jnp.square(codes - jax.lax.stop_gradient(z)))
        quantized = z + jax.lax.stop_gradient(codes - z)
        return QuantizerOutput(quantized, tokens, latents, commitment, codebook_loss, commitment + codebook_loss)

    @any_mesh
    def lookup(self, tokens: jax.Array) -> jax.Array:
        """tokens int [B, N] -> code vectors [B, N, C]."""
        return self.codebook()[tokens]


def restart_codes(
    embedding: jax.Array, usage: jax.Array, latents: jax.Array, tokens: jax.Array, *, use_l2_norm: bool, decay: float = 0.99
) -> tuple[jax.Array, jax.Array]:
    """Moves unused codes onto latents of the batch, as in the training of the text-aware models (published:
    modeling/quantizer/quantizer.py, `clustering_vq`, after Zheng and Vedaldi, "Online Clustered Codebook", ICCV 2023).

    A code with usage u moves a share exp(-10 K u / (1 - decay) - 0.001) of the way to the nearest latent in the global
    batch. It moves all of the way at u = 0, a third at a thousandth of the even share 1 / K, and not visibly at a
    hundredth. Nothing is random. Each training step does this between the forward pass and the update, starting from the
    codebook that the step used.

    A moved code keeps its Adam moments. It reaches u = 0.001 / K only hundreds of steps after its last use, when its first
    moment has decayed to nothing. An unused code has no gradient, so nothing carries the new vector away.

    Args:
      embedding: [K, C], as stored.
      usage: [K] running average of each code's share of the tokens. It starts at 0, so the first step moves all codes that
        the first batch does not use.
      latents: [B, N, C], the encoder's output; tokens: [B, N], their codes.

    Returns:
      embedding and usage after this step.
    """
    size, rows = embedding.shape[0], jax.lax.stop_gradient(latents.reshape(-1, latents.shape[-1])).astype(jnp.float32)
    share = jnp.zeros(size, jnp.float32).at[tokens.reshape(-1)].add(1.0 / tokens.size)
    usage = decay * usage + (1.0 - decay) * share
    same = l2_normalize if use_l2_norm else (lambda x: x)
    nearest = rows[jnp.argmin(codebook_distances(same(rows), same(embedding)), axis=0)]  # [K, C]
    move = jnp.exp(-usage * (10 * size / (1.0 - decay)) - 1e-3)[:, None]
    return embedding * (1.0 - move) + nearest * move, usage


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DiagonalGaussian:
    """The VAE's posterior over latents: independent normals.

    Attributes:
      mean, logvar: [B, N, C] float32; logvar is clamped to [-30, 20].
    """

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: jax.Array) -> "DiagonalGaussian":
        """moments [B, N, 2 C]: the means, then the log variances."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    @property
    def std(self) -> jax.Array:
        return jnp.exp(0.5 * self.logvar)

    def sample(self, noise: jax.Array) -> jax.Array:
        """mean + std * noise, where noise [B, N, C] is standard normal."""
        return self.mean + self.std * noise

    def kl(self) -> jax.Array:
        """KL divergence to the standard normal, summed over channels: [B, N], in nats per token."""
        return 0.5 * jnp.sum(jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=-1)
