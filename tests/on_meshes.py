"""A task on some meshes of 8 simulated devices, for test_sharding.py: prints what happened as JSON.

JAX_NUM_CPU_DEVICES=8 python tests/on_meshes.py
"""

import dataclasses
import json
import math
import re
import sys

import jax
import numpy as np
import tiny_models

from titok_jax import sharding
from titok_jax.models import DiscriminatorConfig, MaskgitVQGANConfig
from titok_jax.tasks import generator, jit_step, maskgit_vqgan, single_stage, stage1, stage2

STEPS = 4
BATCH = 40  # no other size in these models is a multiple of 5, so that a shape tells whether it holds a batch

_OPTIMIZER = {
    "learning_rate": 1e-3,
    "end_learning_rate": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 2,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
}
_ADVERSARIAL = {
    "optimizer": _OPTIMIZER,
    "num_steps": 20,
    "discriminator": DiscriminatorConfig(hidden_channels=32, num_stages=1, logits_size=8),
    "discriminator_optimizer": _OPTIMIZER,
}
_IMAGE_SIZE, _PATCHES = 16, 16
_SIZES = {"image_size": _IMAGE_SIZE, "patch_size": 4, "num_latent_tokens": 7}
_STAGE_1 = dataclasses.replace(tiny_models.STAGE_1, **_SIZES)
_VQGAN = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, z_channels=32)


def make_tasks():
    """{name: task}, tiny, with all that a step of each kind can have; the discriminator starts in the second step."""
    loss = {"discriminator_weight": 0.1, "discriminator_start": 1, "lecam_weight": 0.1}
    stage_2 = dataclasses.replace(_STAGE_1, finetune_decoder=True, commitment_cost=0.0, pixel_decoder=_VQGAN)
    return {
        "maskgit_vqgan": maskgit_vqgan.make_task(
            dataclasses.replace(_VQGAN, channel_mult=(1, 1), codebook_size=64, resolution=_IMAGE_SIZE),
            maskgit_vqgan.LossConfig(**loss),
            **_ADVERSARIAL,
        ),
        "stage1": stage1.make_task(_STAGE_1, stage1.LossConfig(), optimizer=_OPTIMIZER, num_steps=20, vqgan=None),
        "stage2": stage2.make_task(stage_2, stage2.LossConfig(quantizer_weight=0.0, **loss), **_ADVERSARIAL),
        "single_stage": single_stage.make_task(
            dataclasses.replace(tiny_models.TOKENIZER, **_SIZES), single_stage.LossConfig(**loss), **_ADVERSARIAL
        ),
        "generator": generator.make_task(
            dataclasses.replace(tiny_models.GENERATOR, dropout=0.1, class_label_dropout=0.1),
            generator.LossConfig(),
            optimizer=_OPTIMIZER,
            num_steps=20,
        ),
    }


def batch_of(task, step: int) -> dict[str, np.ndarray]:
    """A global batch for a task; the second half is dark, so that a mean over one device shows."""
    rng = np.random.default_rng(step)
    if "generator" in task.networks:
        return {
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
            "tokens": rng.integers(0, 64, (BATCH, 8)).astype(np.int32),
        }
    images = rng.integers(0, 256, (BATCH, _IMAGE_SIZE, _IMAGE_SIZE, 3))
    images[BATCH // 2 :] //= 4
    batch = {"image": images.astype(np.uint8)}
    codes = rng.integers(0, 1024, (BATCH, _PATCHES)).astype(np.int32)
    return batch if "discriminator" in task.networks else batch | {"codes": codes}


def collectives(text: str) -> dict[str, list[tuple[str, list[int]]]]:
    """{kind: (type, shape) of every array that one gives} of a compiled program."""
    found: dict[str, list[tuple[str, list[int]]]] = {}
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for result, kind in re.findall(pattern, text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found.setdefault(kind, []).extend((dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in arrays)
    return found


def begin(task):
    """A first state, in the host's memory. Its parameters are half those of other tests, whose large logits magnify
    rounding."""
    start = {name: tiny_models.params(network.config) for name, network in task.networks.items()}
    return jax.device_get(jax.jit(task.begin)(jax.random.key(0), jax.tree.map(lambda p: p / 2, start)))


def run(task, state, shape):
    """Losses, collectives and placement of one task on one mesh."""
    mesh, key = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)]), jax.random.key(0)
    shardings = sharding.state_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    with jax.set_mesh(mesh):
        arguments = sharding.put_batch(mesh, batch_of(task, 0)), key
        compiled = jit_step(task, mesh, shardings, None).lower(state, None, *arguments).compile()
    metrics = []
    for step in range(STEPS):
        state, found = compiled(state, None, sharding.put_batch(mesh, batch_of(task, step)), key)
        metrics.append({k: None if math.isnan(v) else float(v) for k, v in jax.device_get(found).items()})
    if "lecam" in state:
        metrics[-1] |= {"lecam_real": float(state["lecam"].real), "lecam_fake": float(state["lecam"].fake)}
    placed = {}
    for side, found in (("in", compiled.input_shardings[0][0]), ("out", compiled.output_shardings[0])):
        leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(found), strict=True)
        placed[side] = {
            jax.tree_util.keystr(path, simple=True, separator="/"): [leaf.shape, place.shard_shape(leaf.shape)]
            for (path, leaf), place in leaves
        }
    return {"metrics": metrics, "collectives": collectives(compiled.as_text()), "placed": placed}


if __name__ == "__main__":
    sharding.SMALLEST_SHARDED = 512
    name, *meshes = sys.argv[1:]
    task = make_tasks()[name]
    state = begin(task)
    print(json.dumps({mesh: run(task, state, tuple(map(int, mesh.split(",")))) for mesh in meshes}))
