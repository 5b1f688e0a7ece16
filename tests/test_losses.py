"""titok_jax/losses.py against values and gradients of the published loss classes, and parts of a batch against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from golden_data import compare, load

from titok_jax.training import losses

# Values and gradients sum at most a few thousand float32 terms in another order: up to 1.6e-6 was seen.
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def golden():
    return load("training/losses.npz")


def nhwc(x):
    return jnp.asarray(x).transpose(0, 2, 3, 1)


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("name", "masks"), [("mlm", "mlm/masks"), ("mlm_all", "mlm_all/masks")])
def test_masked_token_loss(golden, name, masks):
    def loss(logits):
        return losses.masked_token_loss(logits, golden["mlm/targets"], golden[masks])

    (_, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(golden["mlm/logits"])
    compare(golden, f"{name}/loss", metrics["loss"], TOLERANCE)
    compare(golden, f"{name}/correct_tokens", metrics["correct_tokens"], TOLERANCE)
    compare(golden, f"{name}/grad", grad, TOLERANCE)


def test_masked_token_loss_of_parts_adds_up(golden):
    """With weights normalised over the batch, the losses and gradients of its two parts add up to those of the whole."""
    weights = losses.token_weights(golden["mlm/masks"], 0.1)

    def part(logits, rows):
        return losses.weighted_token_loss(logits, golden["mlm/targets"][rows], weights[rows], label_smoothing=0.1)

    parts = [slice(0, 1), slice(1, 4)]  # unequal on purpose
    values, grads = zip(*(jax.value_and_grad(part)(golden["mlm/logits"][rows], rows) for rows in parts), strict=True)
    compare(golden, "mlm/loss", sum(values), TOLERANCE)
    compare(golden, "mlm/grad", np.concatenate(grads), TOLERANCE)


@pytest.mark.parametrize("grid", [True, False])
def test_stage1(golden, grid):
    codes = golden["stage1/codes"].reshape((2, 4, 4) if grid else (2, 16))

    def loss(logits):
        return losses.stage1_loss(
            logits, codes, quantizer_loss=0.321, commitment_loss=0.1, codebook_loss=0.221, quantizer_weight=0.7
        )

    (_, metrics), grad = jax.value_and_grad(loss, has_aux=True)(nhwc(golden["stage1/logits"]))
    for name in ("total_loss", "reconstruction_loss", "quantizer_loss", "commitment_loss", "codebook_loss"):
        compare(golden, f"stage1/{name}", metrics[name], TOLERANCE)
    compare(golden, "stage1/grad", nchw(grad), TOLERANCE)


def test_hinge(golden):
    value, (real, fake) = jax.value_and_grad(losses.hinge_d_loss, argnums=(0, 1))(
        jnp.asarray(golden["hinge/logits_real"]), jnp.asarray(golden["hinge/logits_fake"])
    )
    compare(golden, "hinge/loss", value, TOLERANCE)
    compare(golden, "hinge/grad_real", real, TOLERANCE)
    compare(golden, "hinge/grad_fake", fake, TOLERANCE)


def test_lecam_penalty(golden):
    def loss(means, ema):
        return losses.lecam_penalty(means[0], means[1], losses.LeCamEma(ema[0], ema[1]))

    inputs = jnp.asarray(golden["lecam/inputs"])
    values, grads = jax.vmap(jax.value_and_grad(loss))(inputs[:, :2], inputs[:, 2:])
    compare(golden, "lecam/loss", values, TOLERANCE)
    compare(golden, "lecam/grad", grads, TOLERANCE)


def stand_in_discriminator(w, x):
    """The discriminator of the golden runs: x [B, H, W, 3] -> logits [B, H, W]."""
    return 2.0 * jnp.einsum("bhwc,c->bhw", x, w) - 1.0


@pytest.mark.parametrize("weight", [0.001, 1.0])
def test_discriminator_steps(golden, weight):
    """Three calls in a row, the first before the hinge loss starts. LeCam uses the averages from before each call."""
    real, fake = nhwc(golden["gan/real"]), nhwc(golden["gan/fake"])
    ema, rows = losses.init_lecam(), []

    def loss(w, ema, factor):
        total, metrics, ema = losses.discriminator_loss(
            stand_in_discriminator(w, real), stand_in_discriminator(w, fake), ema, factor=factor, lecam_weight=weight
        )
        return total, (metrics, ema)

    for step in (4, 5, 6):
        factor = losses.discriminator_factor(step, 5)
        (_, (m, ema)), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(golden["gan/w"]), ema, factor)
        names = ("discriminator_loss", "logits_real", "logits_fake", "lecam_loss")
        rows.append([*(m[name] for name in names), ema.real, ema.fake, *grad])
    # Element by element, as the columns differ in size. The averages, 1e-3 of the means, have the rounding of 1 - 0.999.
    np.testing.assert_allclose(np.array(rows), golden[f"disc_step/lecam_weight_{weight}"], rtol=2e-6)


def stand_in_perceptual(x, y):
    """The perceptual network of the golden runs: one value per image."""

    def blocks(a):
        return a.reshape(a.shape[0], 4, 4, 4, 4, 3).mean((2, 4))

    return jnp.square(blocks(x) - blocks(y)).mean((1, 2, 3))


@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("name", ["stage2", "vq", "vae"])
def test_generator_totals(golden, name, kind, step):
    """Every logged value and the gradient, before the discriminator's start and at it."""
    images, w = nhwc(golden["gan/real"]), jnp.asarray(golden["gan/w"])
    mean, logvar = (a.transpose(0, 3, 2, 1)[:, :, 0] for a in np.split(golden["generator/vae_parameters"], 2, axis=1))
    logvar = np.clip(logvar, -30.0, 20.0)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1.0 - logvar).sum(-1)  # [B, N]

    def loss(reconstructions):
        common = {
            "perceptual": stand_in_perceptual(images, reconstructions),
            "logits_fake": stand_in_discriminator(w, reconstructions),
            "factor": losses.discriminator_factor(step, 5),
            "kind": kind,
            "perceptual_weight": 1.1,
            "discriminator_weight": 0.1,
        }
        if name == "vae":
            return losses.vae_generator_loss(images, reconstructions, kl=kl, kl_weight=1e-3, logvar=0.25, **common)
        parts = {"quantizer_loss": 0.4, "commitment_loss": 0.08, "codebook_loss": 0.32}
        return losses.vq_generator_loss(images, reconstructions, quantizer_weight=1.0, **parts, **common)

    (_, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(nhwc(golden["gan/fake"]))
    case = f"generator/{name}_{kind}_step{step}/"
    expected = {key.removeprefix(case) for key in golden if key.startswith(case)} - {"grad_fake"}
    assert set(metrics) == {key for key in expected if "." not in key}
    for key, value in metrics.items():
        compare(golden, case + key, value, TOLERANCE)
    compare(golden, case + "grad_fake", nchw(grad), TOLERANCE)


def test_generator_without_discriminator(golden):
    """Without the discriminator (logits None) the loss equals that with a factor of 0."""
    images, fake = nhwc(golden["gan/real"]), nhwc(golden["gan/fake"])
    parts = {"quantizer_loss": 0.4, "commitment_loss": 0.08, "codebook_loss": 0.32}
    total, metrics = losses.vq_generator_loss(
        images,
        fake,
        perceptual=stand_in_perceptual(images, fake),
        logits_fake=None,
        factor=0.0,
        perceptual_weight=1.1,
        quantizer_weight=1.0,
        discriminator_weight=0.1,
        **parts,
    )
    compare(golden, "generator/stage2_l2_step4/total_loss", total, TOLERANCE)
    assert metrics["gan_loss"] == 0


def test_kl_loss(golden):
    """Summed over tokens, averaged over images."""
    kl = golden["kl/kl"]
    np.testing.assert_allclose(losses.kl_loss(kl), kl.sum(dtype=np.float64) / 2, rtol=TOLERANCE)


def test_reconstruction_kind():
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        losses.reconstruction_loss(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3)), "huber")


def test_non_saturating_losses():
    real, fake = np.random.default_rng(0).normal(scale=3.0, size=(2, 2, 4, 4)).astype(np.float32)
    value = losses.non_saturating_d_loss(jnp.asarray(real), jnp.asarray(fake))
    expected = (
        -np.log(scipy.special.expit(real.astype(float))).mean() - np.log1p(-scipy.special.expit(fake.astype(float))).mean()
    )
    np.testing.assert_allclose(value, expected, rtol=TOLERANCE)
    expected = -np.log(scipy.special.expit(fake.astype(float))).mean()
    np.testing.assert_allclose(losses.non_saturating_g_loss(jnp.asarray(fake)), expected, rtol=TOLERANCE)
    # The generator's gradient is largest where the discriminator is sure of a fake. Large logits do not overflow.
    slope = jax.grad(losses.non_saturating_g_loss)(jnp.array([-200.0, 0.0, 200.0]))
    np.testing.assert_allclose(slope, [-1 / 3, -1 / 6, 0.0], atol=1e-7)


def test_entropy_loss_and_its_gradient():
    """Against scipy in float64; the gradient against central differences."""
    distances = np.random.default_rng(1).uniform(0.0, 0.05, (2, 3, 5))

    def expected(distances):  # with the published 1e-5 in one logarithm
        p = scipy.special.softmax(-distances.reshape(-1, 5) / 0.01, axis=-1)
        return scipy.stats.entropy(p, axis=-1).mean() + (p.mean(0) * np.log(p.mean(0) + 1e-5)).sum()

    value, grad = jax.value_and_grad(losses.entropy_loss)(jnp.float32(distances), 0.01)
    np.testing.assert_allclose(value, expected(distances), atol=5e-6)
    for index in np.ndindex(distances.shape):
        step = np.zeros_like(distances)
        step[index] = 1e-6
        slope = (expected(distances + step) - expected(distances - step)) / 2e-6
        np.testing.assert_allclose(grad[index], slope, atol=2e-3 * np.abs(grad).max())


def test_entropy_loss_rewards_sure_vectors_and_even_use():
    sure_and_even = 1.0 - jnp.eye(4)
    np.testing.assert_allclose(losses.entropy_loss(sure_and_even, 0.01), -np.log(4), atol=1e-4)
    one_code = jnp.ones((4, 4)).at[:, 0].set(0.0)
    np.testing.assert_allclose(losses.entropy_loss(one_code, 0.01), 0.0, atol=1e-4)
    unsure = jnp.ones((4, 4))
    np.testing.assert_allclose(losses.entropy_loss(unsure, 0.01), 0.0, atol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_maskgit_vqgan_total(golden, factor):
    images, fake = nhwc(golden["gan/real"]), nhwc(golden["gan/fake"])
    logits = stand_in_discriminator(jnp.asarray(golden["gan/w"]), fake)
    total, metrics = losses.maskgit_vqgan_loss(
        images,
        fake,
        perceptual=jnp.array([2.0, 4.0]),
        logits_fake=logits,
        factor=factor,
        commitment_loss=0.3,
        codebook_loss=0.5,
        entropy=-1.5,
        perceptual_weight=0.1,
        commitment_weight=0.25,
        entropy_weight=0.2,
        discriminator_weight=0.4,
    )
    gan = np.log1p(np.exp(-np.asarray(logits, float))).mean()
    parts = [np.square(np.asarray(images, float) - np.asarray(fake)).mean(), 0.3, 0.25 * 0.3, 0.5, -0.3, factor * 0.4 * gan]
    np.testing.assert_allclose(total, sum(parts), rtol=TOLERANCE)
    names = (
        "reconstruction_loss",
        "perceptual_loss",
        "commitment_loss",
        "codebook_loss",
        "entropy_loss",
        "weighted_gan_loss",
    )
    np.testing.assert_allclose([metrics[name] for name in names], parts, rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["gan_loss"], gan if factor else 0.0, rtol=TOLERANCE)


def test_use_of_codes_by_hand():
    found = losses.codebook_metrics(jnp.array([[0, 0, 3], [5, 0, 3]]), 8)
    np.testing.assert_allclose(found["codebook_usage"], 3 / 8)
    np.testing.assert_allclose(found["codebook_perplexity"], np.exp(scipy.stats.entropy([3, 2, 1])), rtol=1e-6)
    np.testing.assert_allclose(found["tokens_differ"], 1 / 3, rtol=1e-6)
    alike = losses.codebook_metrics(jnp.array([[0, 1, 2, 3]] * 5), 8)
    np.testing.assert_allclose(alike["codebook_perplexity"], 4, rtol=1e-6)
    assert alike["tokens_differ"] == 0
    assert losses.codebook_metrics(jnp.zeros((2, 4), jnp.int32), 8)["codebook_perplexity"] == 1
