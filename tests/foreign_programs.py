"""Runs models inside programs that are not ours, on 4 simulated devices, for test_library.py. Prints the errors as JSON.

JAX_NUM_CPU_DEVICES=4 python tests/foreign_programs.py tokenizer generator
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny_models
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from titok_jax import models
from titok_jax.inference.functions import GeneratorFunctions, TokenizerFunctions, image_keys
from titok_jax.models import perceptual

perceptual.VGG_CHANNELS = (16, 16, 32, 32, 32)
perceptual.CONVNEXT_S, perceptual.CONVNEXT_SIZE = ((1, 16), (1, 32), (2, 32), (1, 64)), 64
perceptual.NUM_CLASSES = 64

VQGAN = models.MaskgitVQGANConfig(
    hidden_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=32, resolution=32
)
STAGE_2 = dataclasses.replace(tiny_models.STAGE_1, finetune_decoder=True, pixel_decoder=VQGAN)
UVIT = dataclasses.replace(tiny_models.GENERATOR, model_type="UViT", num_layers=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.random((4, 32, 32, 3), np.float32)
IDS = RNG.integers(0, 64, (4, 8), np.int32)
LABELS = np.arange(4, dtype=np.int32)


def image_loss(model, batch):
    """Through every method, but not through the choice of codes, which rounding may change: the ids are given."""
    images, ids = batch
    z = model.encode(images)
    total = jnp.sum(jnp.square(model.decode(z + 0.1 * model.quantize.lookup(ids))))
    return total + jnp.sum(jnp.sqrt(model.quantize.distances(z) + 1.0))


def tokenizer_loss(model, batch):
    found = model.quantize(model.encode(batch[0]))
    return image_loss(model, batch) + jnp.sum(jnp.square(found.quantized))


def vae_loss(model, batch):
    posterior = model.posterior(batch[0])
    return jnp.sum(posterior.kl()) + jnp.sum(jnp.square(model.decode(posterior.mean)))


def logits_loss(model, batch):
    return jnp.sum(jnp.square(model.logits(batch[1], batch[2])))


CASES = {
    "tokenizer": (tiny_models.TOKENIZER, tokenizer_loss, (IMAGES, IDS)),
    "stage_2": (STAGE_2, image_loss, (IMAGES, IDS)),
    "vae": (tiny_models.VAE, vae_loss, (IMAGES,)),
    "vqgan": (VQGAN, image_loss, (IMAGES, RNG.integers(0, 1024, (4, 4, 4), np.int32))),
    "generator": (tiny_models.GENERATOR, logits_loss, (IMAGES, IDS, LABELS)),
    "uvit": (UVIT, logits_loss, (IMAGES, IDS, LABELS)),
    "discriminator": (
        models.DiscriminatorConfig(hidden_channels=32, num_stages=1, logits_size=8),
        lambda model, batch: jnp.sum(jnp.square(model(batch[0]))),
        (IMAGES,),
    ),
    "lpips": (
        models.PerceptualConfig("lpips"),
        lambda model, batch: jnp.sum(model(batch[0], 1.0 - batch[0])),
        (IMAGES,),
    ),
    "digits_net": (models.DigitsNetConfig(), lambda model, batch: jnp.sum(jnp.square(model(batch[0])[1])), (IMAGES,)),
}


def programs(loss, params, batch):
    """{kind of program: the value and the gradient of a loss in it}."""
    with_gradient = jax.value_and_grad(loss)
    yield "no mesh", lambda: jax.jit(with_gradient)(params, batch)

    def on(kind):
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            own = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))
            return jax.jit(with_gradient)(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), own)

    yield "axes of other names", lambda: on(AxisType.Auto)
    yield "explicit axes", lambda: on(AxisType.Explicit)

    def mapped():
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
        specs = (PartitionSpec(), PartitionSpec("batch"))

        def total(params, batch):
            return jax.lax.psum(loss(params, batch), "batch")

        return jax.jit(jax.shard_map(jax.value_and_grad(total), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))(
            params, batch
        )

    yield "shard_map", mapped


def largest_error(a, b) -> float:
    """The largest difference of two trees, relative to the largest magnitude of each array. Arrays below a thousandth of the
    largest of all are compared with that: a bias in front of a GroupNorm has a gradient of rounding errors only."""
    pairs = list(zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True))
    floor = max(np.abs(x).max() for x, _ in pairs[1:]) / 1000
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), floor)) for x, y in pairs)


def small(config):
    """Random parameters that keep activations small, so that no rounding is blown up."""
    return jax.tree.map(lambda p: p / 2, tiny_models.params(config))


def sampled() -> dict[str, bool]:
    """{kind of program: whether images made in it are those made without a mesh}."""
    config, pictures = tiny_models.GENERATOR, tiny_models.TOKENIZER
    to_ids, to_images = GeneratorFunctions(config), TokenizerFunctions(pictures)
    params = tiny_models.params(config), tiny_models.params(pictures)
    start = np.where(RNG.random((4, 8)) < 0.5, IDS, config.mask_id)

    def sample(params, labels, keys, start):
        out = to_ids.sample(params[0], labels, keys, start)
        return out.ids, to_images.decode(params[1], out.ids)

    keys = image_keys(0, 4)
    wanted = jax.jit(sample)(params, LABELS, keys, start)
    found = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            along = NamedSharding(mesh, PartitionSpec("batch"))
            own = jax.device_put((LABELS, keys, start), along)
            found[str(kind)] = jax.jit(sample)(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), *own)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), *[PartitionSpec("batch")] * 3)
    mapped = jax.shard_map(sample, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("batch"))
    found["shard_map"] = jax.jit(mapped)(params, LABELS, keys, start)
    return {
        kind: bool(np.array_equal(ids, wanted[0]) and np.allclose(images, wanted[1], atol=1e-5))
        for kind, (ids, images) in found.items()
    }


def main(names):
    results = {}
    for name in names:
        if name == "sampled":
            results[name] = sampled()
            continue
        config, loss, batch = CASES[name]
        graphdef = models.abstract(config)[0]

        def whole(params, batch, graphdef=graphdef, loss=loss):
            return loss(nnx.merge(graphdef, params), batch)

        found = {kind: run() for kind, run in programs(whole, small(config), batch)}
        results[name] = {kind: largest_error(found["no mesh"], other) for kind, other in found.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
