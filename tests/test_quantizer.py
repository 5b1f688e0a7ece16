"""The bottlenecks: unused codes move as in the published code; the VAE's divergence."""

import functools

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from titok_jax.models.quantizer import DiagonalGaussian, VectorQuantizer, restart_codes


def latents(golden) -> jax.Array:
    return jnp.asarray(golden["cvq/z"][:, :, 0].transpose(0, 2, 1))  # [B, C, 1, N] -> [B, N, C]


def test_restarts_equal_the_published_ones():
    """Two calls on the same latents; some codes are used, most are not."""
    golden = gd.load("training/losses.npz")
    codebook, usage, z = jnp.asarray(golden["cvq/embedding"]), jnp.zeros(16), latents(golden)
    for call in range(2):
        tokens = golden[f"cvq/indices_{call}"][:, 0]
        former = codebook
        quantizer = VectorQuantizer(16, 6, commitment_cost=0.25, use_l2_norm=False, rngs=nnx.Rngs(0))
        quantizer.embedding[...] = codebook
        found = quantizer(z)
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_allclose(found.quantizer_loss, golden[f"cvq/loss_{call}"], rtol=1e-6)
        np.testing.assert_allclose(found.quantized, golden[f"cvq/z_q_{call}"][:, :, 0].transpose(0, 2, 1), atol=1e-6)
        codebook, usage = restart_codes(codebook, usage, z, tokens, use_l2_norm=False)
        np.testing.assert_allclose(usage, golden[f"cvq/embed_prob_{call}"], rtol=1e-6)
        # Sums of two float32 products, and an exponential with an argument up to 10, which float32 holds to 1e-7 of that.
        np.testing.assert_allclose(codebook, golden[f"cvq/embedding_after_{call}"], rtol=1e-5, atol=1e-6)
        if call == 0:
            moved = np.abs(codebook - former).max(1) > 1e-3
            assert 0 < moved.sum() < 16
            assert not moved[np.unique(tokens)].any()


@pytest.mark.parametrize("use_l2_norm", [False, True])
def test_restarts_bring_dead_codes_into_use(use_l2_norm):
    """One code is near all latents and takes them. Without restarts it stays so; with restarts other codes get a share."""
    rng = np.random.default_rng(0)
    codebook = jnp.asarray(rng.standard_normal((32, 4)) * 0.01 - 1.0, jnp.float32).at[7].set(1.0)
    usage = jnp.zeros(32)

    @jax.jit
    def tokens(codebook, z):
        quantizer = VectorQuantizer(32, 4, use_l2_norm=use_l2_norm, rngs=nnx.Rngs(0))
        quantizer.embedding[...] = codebook
        return quantizer(z).tokens

    def batch():
        return jnp.asarray(rng.standard_normal((8, 16, 4)) + 5.0, jnp.float32)

    assert (tokens(codebook, batch()) == 7).all()
    step = jax.jit(functools.partial(restart_codes, use_l2_norm=use_l2_norm))
    for _ in range(100):
        z = batch()
        codebook, usage = step(codebook, usage, z, tokens(codebook, z))
    assert len(np.unique(tokens(codebook, batch()))) >= 16


def test_divergence_and_sample_with_their_gradient():
    """Two log variances are beyond the clamp, where there is no gradient."""
    golden = gd.load("training/losses.npz")

    def ours(x):
        return jnp.asarray(x[:, :, 0].transpose(0, 2, 1))  # [B, C, 1, N] -> [B, N, C]

    def loss(moments):
        posterior = DiagonalGaussian.from_moments(moments)
        return posterior.kl().sum() / len(moments), posterior

    moments = ours(golden["kl/parameters"])
    (_, posterior), gradient = jax.value_and_grad(loss, has_aux=True)(moments)
    assert ((np.abs(moments[..., 4:] + 5) > 25) & (gradient[..., 4:] == 0)).sum() == 2
    np.testing.assert_allclose(posterior.kl(), golden["kl/kl"], rtol=1e-6)
    np.testing.assert_allclose(gradient, ours(golden["kl/grad_of_sum_over_batch"]), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(posterior.sample(ours(golden["kl/noise"])), ours(golden["kl/sample"]), rtol=1e-6)
