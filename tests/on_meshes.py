"""Runs a task on meshes of 8 simulated devices for test_sharding.py, and prints the results as JSON.

JAX_NUM_CPU_DEVICES=8 python tests/on_meshes.py stage1 1,1,1 2,2,2
"""

import dataclasses
import json
import math
import re
import sys

import jax
import numpy as np
import tiny_models

from titok_jax.models import DiscriminatorConfig, MaskgitVQGANConfig, PerceptualConfig, attention, layers, perceptual
from titok_jax.runtime import sharding
from titok_jax.training import accumulation
from titok_jax.training.optimizer import OptimizerConfig
from titok_jax.training.tasks import generator, maskgit_vqgan, single_stage, stage1, stage2
from titok_jax.training.tasks.base import jit_step
from titok_jax.weights.perceptual_files import make_perceptual

PARTS = 1  # parts of a batch for gradient accumulation
STEPS = 2  # both with the same parameters, because the first step has learning rate 0
BATCH = 40  # the only size that is a multiple of 5, so a shape shows whether it holds a batch

_OPTIMIZER = OptimizerConfig(
    learning_rate=1e-3,
    end_learning_rate=1e-4,
    schedule="cosine",
    warmup_steps=2,
    beta1=0.9,
    beta2=0.99,
    weight_decay=1e-4,
    max_grad_norm=1.0,
)
_ADVERSARIAL = {
    "optimizer": _OPTIMIZER,
    "num_steps": 20,
    "discriminator": DiscriminatorConfig(hidden_channels=32, num_stages=1, logits_size=8),
    "discriminator_optimizer": _OPTIMIZER,
}
_IMAGE_SIZE = 16
_SIZES = {"image_size": _IMAGE_SIZE, "patch_size": 4, "num_latent_tokens": 7}
_STAGE_1 = dataclasses.replace(tiny_models.STAGE_1, **_SIZES)
_VQGAN = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, z_channels=32)
_PERCEPTUAL = "lpips-convnext_s-1.0-0.1"
# The perceptual networks have a fixed size. These are smaller ones for the test.
perceptual.VGG_CHANNELS = (16, 16, 32, 32, 32)
perceptual.CONVNEXT_S, perceptual.CONVNEXT_SIZE = ((1, 16), (1, 32), (2, 32), (1, 64)), 64
perceptual.NUM_CLASSES = 64


def make_tasks():
    """{name: task}: tiny tasks with every feature that a step of each kind can have. The discriminator starts in the second
    step."""
    loss = {"discriminator_weight": 0.1, "discriminator_start": 1, "lecam_weight": 0.1}
    stage_2 = dataclasses.replace(_STAGE_1, finetune_decoder=True, commitment_cost=0.0, pixel_decoder=_VQGAN)
    # With biases near 1 and small kernels, few features are near 0. So rounding does not flip a ReLU or blow up a quotient.
    weights = tiny_models.params(PerceptualConfig(_PERCEPTUAL))
    weights = jax.tree.map(lambda p: 1 + p if p.ndim == 1 else p / 8, weights)
    return {
        "maskgit_vqgan": maskgit_vqgan.make_task(
            dataclasses.replace(_VQGAN, channel_mult=(1, 1), codebook_size=64, resolution=_IMAGE_SIZE),
            maskgit_vqgan.LossConfig(**loss),
            **_ADVERSARIAL,
        ),
        "stage1": stage1.make_task(
            _STAGE_1,
            stage1.LossConfig(),
            optimizer=_OPTIMIZER,
            num_steps=20,
            vqgan=(_VQGAN, tiny_models.params(_VQGAN)),
        ),
        "stage2": stage2.make_task(
            stage_2,
            stage2.LossConfig(quantizer_weight=0.0, perceptual=_PERCEPTUAL, perceptual_weight=20.0, **loss),
            perceptual=make_perceptual(_PERCEPTUAL, weights),
            **_ADVERSARIAL,
        ),
        "single_stage": single_stage.make_task(
            dataclasses.replace(tiny_models.TOKENIZER, **_SIZES),
            single_stage.LossConfig(**loss),
            gradient_accumulation=PARTS,
            **_ADVERSARIAL,
        ),
        "generator": generator.make_task(
            dataclasses.replace(tiny_models.GENERATOR, dropout=0.1, class_label_dropout=0.1),
            generator.LossConfig(),
            optimizer=_OPTIMIZER,
            num_steps=20,
        ),
    }


def batch_of(task, step: int) -> dict[str, np.ndarray]:
    """A global batch for a task. The second half is dark, so that a mean over only one device is noticed."""
    rng = np.random.default_rng(step)
    if "generator" in task.networks:
        return {
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
            "tokens": rng.integers(0, 64, (BATCH, 8)).astype(np.int32),
        }
    images = rng.integers(0, 256, (BATCH, _IMAGE_SIZE, _IMAGE_SIZE, 3))
    images[BATCH // 2 :] //= 4
    return {"image": images.astype(np.uint8)}


def collectives(text: str) -> dict[str, list[tuple[str, list[int]]]]:
    """{kind of collective: (type, shape) of every array that it outputs} for the text of a compiled program."""
    found: dict[str, list[tuple[str, list[int]]]] = {}
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for result, kind in re.findall(pattern, text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found.setdefault(kind, []).extend((dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in arrays)
    return found


def begin(task):
    """An initial state in host memory. Its parameters are half as large as in other tests, whose large logits magnify
    rounding."""
    start = {name: tiny_models.params(network.config) for name, network in task.networks.items()}
    return jax.device_get(jax.jit(task.begin)(jax.random.key(0), jax.tree.map(lambda p: p / 2, start)))


def named(tree) -> list:
    """[(path, leaf)] of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def projections(array: np.ndarray) -> list:
    """[type, largest magnitude, products with a few fixed random arrays] of an array. Any changed element changes them."""
    directions = np.random.default_rng(0).standard_normal((3, array.size))
    return [str(array.dtype), float(np.abs(array).max()), *(directions @ array.astype(np.float64).reshape(-1)).tolist()]


def compile_step(task, state, mesh, shard_optimizer=False):
    """Compiles a step for a mesh. Returns (the compiled step, the sharded state, the replicated frozen parameters)."""
    shardings = sharding.state_shardings(mesh, state, shard_optimizer=shard_optimizer)
    state, frozen = jax.device_put(state, shardings), jax.device_put(task.frozen, sharding.replicated(mesh))
    with sharding.on_mesh(mesh):
        arguments = sharding.put_batch(mesh, batch_of(task, 0)), jax.random.key(0)
        compiled = jit_step(task, mesh, shardings).lower(state, frozen, *arguments).compile()
    return compiled, state, frozen


def run(task, state, shape):
    """Runs one task on one mesh. Returns its losses, final state, collectives and shardings."""
    mesh, key = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)]), jax.random.key(0)
    compiled, state, frozen = compile_step(task, state, mesh)
    metrics = []
    for step in range(STEPS):
        state, found = compiled(state, frozen, sharding.put_batch(mesh, batch_of(task, step)), key)
        metrics.append({k: None if math.isnan(v) else float(v) for k, v in jax.device_get(found).items()})
    places = {
        "in": (state, compiled.input_shardings[0][0]),
        "out": (state, compiled.output_shardings[0]),
        "frozen": (frozen, jax.tree.map(lambda _: sharding.replicated(mesh), frozen)),  # a step may use only some of them
    }
    placed = {}
    for side, (tree, found) in places.items():
        leaves = zip(named(tree), jax.tree.leaves(found), strict=True)
        placed[side] = {name: [leaf.shape, place.shard_shape(leaf.shape)] for (name, leaf), place in leaves}
    return {
        "metrics": metrics,
        "state": {name: projections(leaf) for name, leaf in named(jax.device_get(state))},
        "collectives": collectives(compiled.as_text()),
        "placed": placed,
    }


def print_differences_of_a_sharded_optimizer(name: str, mesh: str) -> None:
    """Prints in what the states after three steps differ with and without a sharded optimizer, and the gradient norms."""
    sharding.SMALLEST_SHARDED = 512
    sharding.SMALLEST_SHARDED = 512
    task, states, norms = make_tasks()[name], [], []
    start, devices = begin(task), sharding.make_mesh(*map(int, mesh.split(",")))
    for shard_optimizer in (False, True):
        copy = jax.tree.map(np.array, start)  # a step is given the memory of its state
        compiled, state, frozen = compile_step(task, copy, devices, shard_optimizer)
        count = sum("data" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(state))
        for step in range(3):
            batch = sharding.put_batch(devices, batch_of(task, step))
            state, metrics = compiled(state, frozen, batch, jax.random.key(0))
            norms.append(float(metrics["grad_norm"]))
        states.append(jax.device_get(state))
    pairs = zip(named(states[0]), jax.tree.leaves(states[1]), strict=True)
    different = [path for (path, one), other in pairs if not np.array_equal(one, other)]
    print(json.dumps({"different": different, "sharded": count, "grad_norm": norms}))


def print_collectives_of_tpu_forms(name: str, *meshes: str) -> None:
    """Prints the collectives of a step with the TPU variants of the layers. The step is compiled but not run."""
    sharding.SMALLEST_SHARDED = 512
    task = make_tasks()[name]
    state = begin(task)
    for module in (accumulation, attention, layers, perceptual):
        module.target_platform = lambda: "tpu"
    found = {mesh: compile_step(task, state, sharding.make_mesh(*map(int, mesh.split(","))))[0] for mesh in meshes}
    print(json.dumps({mesh: collectives(compiled.as_text()) for mesh, compiled in found.items()}))


def main(name: str, *meshes: str) -> None:
    sharding.SMALLEST_SHARDED = 512
    task = make_tasks()[name]
    state = begin(task)
    print(json.dumps({mesh: run(task, state, tuple(map(int, mesh.split(",")))) for mesh in meshes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
