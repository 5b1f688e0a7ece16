"""What computes in float32 when the model computes in bfloat16: every loss, the quantizers, the losses' networks."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from titok_jax import models
from titok_jax.models import DiscriminatorConfig, PerceptualConfig
from titok_jax.models.maskgit_vqgan import VQGANQuantizer
from titok_jax.models.quantizer import DiagonalGaussian, VectorQuantizer, restart_codes
from titok_jax.training import losses
from titok_jax.training.optimizer import OptimizerConfig
from titok_jax.training.tasks import pixels
from titok_jax.training.tasks.adversarial import make_adversary
from titok_jax.training.tasks.base import TaskOptions

# Operations that do not round: they move numbers or compare them. A conversion may round only if it gives bfloat16.
EXACT = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "slice", "split", "argmax", "stop_gradient"}


def half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def full(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def rounding(function, *args) -> set[str]:
    """The operations of a function, also in its loops and branches, that may round to bfloat16."""
    found = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            name, inner = equation.primitive.name, list(jaxprs_in_params(equation.params))
            for part in inner:
                walk(part)
            takes, gives = (
                any(getattr(x.aval, "dtype", None) == jnp.bfloat16 for x in side)
                for side in (equation.invars, equation.outvars)
            )
            if not inner and name not in EXACT and (gives or (takes and name != "convert_element_type")):
                found.add(name)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


ONE, IMAGES, LOGITS, LATENTS = half(), half(2, 8, 8, 3), half(2, 4, 4, 1), half(2, 4, 16)
IDS, MASK, LECAM = full(2, 4, dtype=jnp.int32), full(2, 4, dtype=bool), losses.LeCamEma(full(), full())
QUANTIZER = dict.fromkeys(("quantizer_loss", "commitment_loss", "codebook_loss"), ONE)
PIXELS = partial(partial, perceptual_weight=1.0, discriminator_weight=0.1, factor=1.0)
PAIR = ("images", "reconstructions")
JUDGED = {**dict.fromkeys(PAIR, IMAGES), "perceptual": half(2), "logits_fake": LOGITS}
DISCRIMINATOR = partial(losses.discriminator_loss, factor=1.0, lecam_weight=0.1)
PARTS = {
    "masked_token_loss": (losses.masked_token_loss, {"logits": LATENTS, "targets": IDS, "mask": MASK}),
    "stage1_loss": (losses.stage1_loss, {"logits": LATENTS, "codes": IDS, **QUANTIZER}),
    "reconstruction_loss l1": (partial(losses.reconstruction_loss, kind="l1"), dict.fromkeys(PAIR, IMAGES)),
    "vq_generator_loss": (PIXELS(losses.vq_generator_loss, quantizer_weight=1.0), {**JUDGED, **QUANTIZER}),
    "vae_generator_loss": (PIXELS(losses.vae_generator_loss, kl_weight=1e-6), {**JUDGED, "kl": half(2, 4)}),
    "maskgit_vqgan_loss": (
        PIXELS(losses.maskgit_vqgan_loss, commitment_weight=0.25, entropy_weight=0.1),
        {**JUDGED, "commitment_loss": ONE, "codebook_loss": ONE, "entropy": ONE},
    ),
    "entropy_loss": (partial(losses.entropy_loss, temperature=0.01), {"distances": LATENTS}),
    "r1_penalty": (losses.r1_penalty, {"square_norms": half(2)}),
    "discriminator_loss hinge": (DISCRIMINATOR, {"logits_real": LOGITS, "logits_fake": LOGITS, "ema": LECAM}),
    "discriminator_loss non_saturating": (
        partial(DISCRIMINATOR, kind="non_saturating"),
        {"logits_real": LOGITS, "logits_fake": LOGITS, "ema": LECAM},
    ),
    "lecam_penalty": (losses.lecam_penalty, {"real_mean": ONE, "fake_mean": ONE, "ema": LECAM}),
    "update_lecam": (losses.update_lecam, {"ema": LECAM, "real_mean": ONE, "fake_mean": ONE}),
    "KL divergence": (lambda moments: DiagonalGaussian.from_moments(moments).kl(), {"moments": LATENTS}),
    "VAE sample": (
        lambda moments, noise: DiagonalGaussian.from_moments(moments).sample(noise),
        {"moments": LATENTS, "noise": full(2, 4, 8)},
    ),
    "restart_codes": (
        partial(restart_codes, use_l2_norm=True),
        {"embedding": full(8, 16), "usage": full(8), "latents": LATENTS, "tokens": IDS},
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_loss_is_computed_in_float32(name):
    function, inputs = PARTS[name]
    assert not rounding(lambda inputs: function(**inputs), inputs)


@pytest.mark.parametrize("kind", [partial(VectorQuantizer, use_l2_norm=True), VQGANQuantizer])
def test_quantizers_compute_in_float32(kind):
    quantizer = kind(8, 16, rngs=nnx.Rngs(0))
    assert not rounding(quantizer, half(2, 4, 16))
    assert not rounding(quantizer.distances, half(2, 4, 16))


def test_perceptual_networks_compute_in_float32():
    graphdef, params = models.abstract(PerceptualConfig("lpips-convnext_s-1.0-0.1"))
    images = half(1, 16, 16, 3)
    assert not rounding(lambda params, *images: nnx.merge(graphdef, params)(*images), params, images, images)


def test_a_discriminator_computes_in_float32_whatever_its_model_does():
    """In its own update, with LeCam and the R1 penalty, and where it judges for the model. Unless it is told otherwise."""
    images, config = full(2, 8, 8, 3), DiscriminatorConfig(hidden_channels=32, num_stages=1, logits_size=2)
    adam, loss = OptimizerConfig(1e-3, "constant", 0, 0.9, 0.99, 0.0, 1.0), pixels.LossConfig(discriminator_weight=0.1)

    def found(**chosen) -> tuple[set[str], set[str]]:
        options = TaskOptions(
            adam, 20, discriminator_optimizer=adam, compute_dtype="bfloat16", discriminator=config, **chosen
        )
        adversary = make_adversary(loss, options, gradient_penalty=10.0)
        params, opt = jax.eval_shape(adversary.network.init, jax.random.key(0))
        state = {"step": full(dtype=jnp.int32), "lecam": losses.init_lecam()}
        state |= {"params": {"discriminator": params}, "opt": {"discriminator": opt}}
        update = rounding(lambda state, *images: adversary.update(state, state, *images), state, images, images)
        return update, rounding(adversary.judge, state, images)

    assert found() == (set(), set())
    for operations in found(discriminator_dtype="bfloat16"):
        assert operations >= {"conv_general_dilated", "dot_general"}
