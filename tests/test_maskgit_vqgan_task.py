"""Training of the MaskGIT-VQGAN: a step against plain formulas, in parts, on a mesh, and interrupted."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import maskgit_vqgan as recipe
from titok_jax import models
from titok_jax.models import DiscriminatorConfig, MaskgitVQGANConfig
from titok_jax.training import loop, losses
from titok_jax.training.optimizer import OptimizerConfig
from titok_jax.training.settings import parse_settings
from titok_jax.training.tasks import adversarial, maskgit_vqgan
from titok_jax.weights import pretrained
from titok_jax.weights.perceptual_files import Perceptual

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = MaskgitVQGANConfig(
    hidden_channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=8, codebook_size=16, resolution=16
)
CRITIC = DiscriminatorConfig(hidden_channels=32, num_stages=1, logits_size=4)
ADAM = OptimizerConfig(
    learning_rate=1e-3,
    schedule="constant",
    warmup_steps=0,
    beta1=0.0,
    beta2=0.99,
    weight_decay=0.0,
    max_grad_norm=float("inf"),
)
# With these weights no term hides behind another. The distances of these small latents are near 1.
LOSS = maskgit_vqgan.LossConfig(
    entropy_temperature=0.5,
    perceptual="blocks",
    discriminator_weight=0.7,
    discriminator_start=2,
    gradient_penalty=10.0,
    lecam_weight=0.5,
)


def distance(params, images, others):
    """A stand-in for a perceptual network, one value per image."""
    del params
    return jnp.square((images - others).reshape(-1, 4, 4, 4, 4, 3).mean((2, 4))).mean((1, 2, 3))


def make_task(loss=LOSS, **options):
    options = {
        "optimizer": ADAM,
        "num_steps": 10,
        "discriminator": CRITIC,
        "discriminator_optimizer": ADAM,
        "perceptual": Perceptual("blocks", distance, {}),
        **options,
    }
    return maskgit_vqgan.make_task(CONFIG, loss, **options)


def batch(seed: int = 0):
    return {"image": np.random.default_rng(seed).random((4, 16, 16, 3), np.float32)}


def first_state(task, step: int = 0):
    state = jax.jit(task.init)(jax.random.key(0))
    lecam = losses.LeCamEma(jnp.float32(1.0), jnp.float32(-1.0))  # so that both LeCam terms act
    return {**state, "step": jnp.int32(step), "lecam": lecam}


def plain_gradients(task, state, images):
    """Gradients of both networks on the whole batch, from the formulas as the papers state them."""
    params = state["params"]

    def critic(p, x):
        return task.networks["discriminator"].module(p)(x)

    def generator_side(p):
        model = task.networks["vqgan"].module(p)
        z, codebook = model.encode(images), p["quantize"]["embedding"]
        squares = jnp.square(z[..., None, :] - codebook).sum(-1)  # [B, h, w, K]
        chosen = jax.nn.one_hot(squares.argmin(-1), len(codebook)) @ codebook
        reconstructions = model.decode(z + jax.lax.stop_gradient(chosen - z))
        p_code = jax.nn.softmax(-squares / 0.5).reshape(-1, len(codebook))
        entropies = -(p_code * jnp.log(p_code)).sum(-1).mean() + (p_code.mean(0) * jnp.log(p_code.mean(0))).sum()
        total = jnp.square(images - reconstructions).mean() + 0.1 * distance({}, images, reconstructions).mean()
        total += 0.25 * jnp.square(z - jax.lax.stop_gradient(chosen)).mean()
        total += jnp.square(chosen - jax.lax.stop_gradient(z)).mean() + 0.1 * entropies
        total -= 0.7 * jnp.log(jax.nn.sigmoid(critic(params["discriminator"], reconstructions))).mean()
        return total, reconstructions

    grads, reconstructions = jax.grad(generator_side, has_aux=True)(params["vqgan"])

    def discriminator_side(p):
        real, fake = critic(p, images), critic(p, reconstructions)
        total = -jnp.log(jax.nn.sigmoid(real)).mean() - jnp.log(1 - jax.nn.sigmoid(fake)).mean()
        total += 0.5 * ((real.mean() + 1) ** 2 + (1 - fake.mean()) ** 2)
        slopes = jax.vmap(jax.grad(lambda x: critic(p, x[None]).mean()))(images)
        return total + 10.0 * jnp.square(slopes).sum((1, 2, 3)).mean()

    return {"vqgan": grads, "discriminator": jax.grad(discriminator_side)(params["discriminator"])}


def test_gradients_are_those_of_the_formulas():
    """Also with gradients accumulated over two parts of the batch. Entropy, R1 and LeCam are not linear in the parts, which
    differ, because every second image is dark."""
    images = batch()["image"] * np.array([1.0, 0.1, 1.0, 0.1], np.float32)[:, None, None, None]
    logged = []
    for parts in (1, 2):
        task = make_task(gradient_accumulation=parts)
        state = first_state(task, step=3)
        if parts == 1:
            expected = jax.jit(lambda state, task=task: plain_gradients(task, state, images))(state)
        new, metrics = jax.jit(task.update)(state, {}, {"image": images}, {})
        logged.append(metrics)
        assert metrics["lecam_loss"] > 0.1
        assert metrics["r1_penalty"] > 1e-4
        for name, grads in expected.items():
            # As beta1 is 0, the optimizer's first moment is the gradient.
            for (path, want), got in zip(
                jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(new["opt"][name][0].mu), strict=True
            ):
                # The published entropy has 1e-5 inside a logarithm; the rest is rounding.
                largest = max(1e-3, float(jnp.abs(want).max()))
                np.testing.assert_allclose(got, want, atol=2e-4 * largest, err_msg=f"{name} {jax.tree_util.keystr(path)}")
    for key, value in logged[0].items():
        np.testing.assert_allclose(logged[1][key], value, rtol=2e-5, err_msg=key)


def test_all_is_trained_and_the_discriminator_from_its_start_on():
    task = make_task()
    state, update = {**first_state(task), "lecam": losses.init_lecam()}, jax.jit(task.update)
    first = state["params"]
    for step in range(4):
        before = state
        state, metrics = update(state, {}, batch(step), {})
        waiting = step < 2
        assert np.isnan(metrics["r1_penalty"]) == np.isnan(metrics["disc_lr"]) == waiting
        assert (metrics["weighted_gan_loss"] == 0) == (metrics["gan_loss"] == 0) == waiting
        same = [
            np.array_equal(a, b)
            for part in ("params", "opt")
            for a, b in zip(*(jax.tree.leaves(s[part]["discriminator"]) for s in (before, state)), strict=True)
        ]
        assert all(same) if waiting else not any(same)
        assert np.isclose(metrics["lr"], 1e-3)
    assert float(state["lecam"].real) != 0
    for a, b in zip(jax.tree.leaves(first["vqgan"]), jax.tree.leaves(state["params"]["vqgan"]), strict=True):
        assert not np.array_equal(a, b)
    assert 0 < metrics["codebook_usage"] <= 1


def test_r1_penalises_the_slope_of_the_mean_logit():
    """The logits are w x^2, one per pixel. The mean's slope is 2 w x / n, so the derivative of its square in w is known."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 3)), jnp.float32)
    network = types.SimpleNamespace(module=lambda w: lambda x: w * jnp.square(x).sum(-1, keepdims=True))
    adversary = adversarial.Adversary(network, 0, lecam_weight=0.0, gradient_penalty=10.0, parts=3)
    state = {"lecam": losses.init_lecam()}

    def penalty(w):
        return adversary._loss(w, state, x, x)[1][0]["r1_penalty"]

    value, slope = jax.value_and_grad(penalty)(jnp.float32(0.7))
    squares = np.square(2 * np.asarray(x) / 4).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(value, 10 * 0.7**2 * squares, rtol=1e-5)
    np.testing.assert_allclose(slope, 10 * 2 * 0.7 * squares, rtol=1e-5)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="no discriminator"):
        make_task(discriminator=None)
    with pytest.raises(ValueError, match="no network is given"):
        make_task(perceptual=None)
    with pytest.raises(ValueError, match="remat"):
        make_task(remat="full")


def small(**changes):
    config = recipe.get_config("smoke")
    config.model.update({"channel_mult": (1, 1), "z_channels": 8, "codebook_size": 32})
    config.discriminator.num_stages = 1
    config.data.batch_size = 8
    config.loss.update({"discriminator_start": 2, "lecam_weight": 0.001})
    config.update({"num_steps": 4, "log_every": 1, "checkpoint_every": 2, "preview_every": 0, "eval_every": 0, **changes})
    return config


ON_EIGHT_DEVICES = """
import sys
import test_maskgit_vqgan_task as test
config = test.small()
config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
test.loop.sharding.SMALLEST_SHARDED = 64
test.loop.train(test.parse_settings(config), sys.argv[1])
"""


def test_an_interrupted_run_ends_as_a_straight_one(tmp_path, monkeypatch):
    straight = loop.train(parse_settings(small()), tmp_path / "straight")
    real_write = loop.MetricLog.write

    def crash(self, step, metrics, **options):
        real_write(self, step, metrics, **options)
        if step == 3:
            raise InterruptedError

    monkeypatch.setattr(loop.MetricLog, "write", crash)
    with pytest.raises(InterruptedError):
        loop.train(parse_settings(small()), tmp_path / "resumed")
    monkeypatch.undo()
    resumed = loop.train(parse_settings(small()), tmp_path / "resumed")  # from the checkpoint of step 2
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    # The run writes a model folder with the averaged parameters.
    loaded, params = pretrained.load(tmp_path / "straight" / "pretrained", MaskgitVQGANConfig)
    assert loaded.resolution == 32
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(straight["ema"]["vqgan"]), strict=True):
        np.testing.assert_array_equal(a, b)
    images = np.zeros((1, 32, 32, 3), np.float32)
    assert nnx.merge(models.abstract(loaded)[0], params).get_codes(images).shape == (1, 16, 16)


@pytest.mark.long
def test_a_run_on_a_mesh_ends_as_one_on_one_device(tmp_path):
    loop.train(parse_settings(small()), tmp_path / "straight")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(tmp_path / "eight")]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "eight")
    ]
    for one, eight in zip(*logs, strict=True):
        for name in ("total_loss", "entropy_loss", "grad_norm", "discriminator_loss", "r1_penalty"):
            if one[name] is None:
                assert eight[name] is None
            else:
                # Sums over devices are in another order, and Adam's first steps amplify rounding.
                np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, err_msg=name)
