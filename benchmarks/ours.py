"""Runs titok_jax for benchmarks/speed.py: one case of it, in a process of its own.

Inputs are on the device. Weights are new, because the speed does not depend on them.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from serving import Prepared, serve

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find the configurations from any current folder

from titok_jax import models
from titok_jax.compiler.programs import training_step
from titok_jax.inference import Generator, Tokenizer, generate
from titok_jax.runtime.sharding import on_mesh
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings
from titok_jax.weights import known_models


def _new(tree: Any, *, scale: float) -> Any:
    """New arrays with the shapes and shardings of a tree: floats from Normal(0, scale), random integers in 0..255."""

    def make(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.randint(jax.random.key(0), x.shape, 0, 256, jnp.int32).astype(x.dtype)
        return jax.random.normal(jax.random.key(0), x.shape, x.dtype) * scale

    shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.jit(lambda: jax.tree.map(make, tree), out_shardings=shardings)()


def training(model: str, dtype: str, batch: int) -> Callable[[int], None]:
    """Training steps of a recipe TASK:VARIANT, as a function that makes a number of them and waits for the last one."""
    task, variant = model.split(":")
    config = read_config(str(Path(__file__).parents[1] / "configs" / f"{task}.py") + f":{variant}", [])
    config.data.batch_size, config.compute_dtype = batch, dtype
    if "discriminator_start" in config.loss:
        config.loss.discriminator_start = 0
    program = training_step(model, parse_settings(config, abstract=True), jax.devices()[:1])
    state, frozen, examples, _ = program.args
    zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), state)
    key, held = jax.random.key(0), [zeros | {"params": _new(state["params"], scale=0.02)}]
    frozen, examples = _new(frozen, scale=0.02), _new(examples, scale=0.0)
    del zeros

    def run(times: int) -> None:
        with on_mesh(program.mesh):
            for _ in range(times):
                held[0], metrics = program.function(held[0], frozen, examples, key)
            jax.block_until_ready((held[0], metrics))

    return run


def inference(kind: str, model: str, dtype: str, batch: int) -> Callable[[int], None]:
    """Encoding, decoding or sampling by a model of the zoo, as a function that does it a number of times."""
    key, known = jax.random.key(0), known_models.known_configs()

    def load(cls, part):
        config = known[part, model]
        return cls(config, jax.jit(lambda key: models.init(config, key))(key), dtype=dtype)

    tokenizer = load(Tokenizer, "tokenizer")
    config = tokenizer.config
    if kind == "encode":
        images = jax.random.uniform(key, (batch, config.image_size, config.image_size, 3))

        def call():
            return tokenizer.encode(images)

    elif kind == "decode":
        tokens = jax.random.randint(key, (batch, config.num_latent_tokens), 0, config.codebook_size)

        def call():
            return tokenizer.decode(tokens)

    else:
        generator = load(Generator, "generator")
        labels = jnp.arange(batch)

        def call():
            return tokenizer.decode(generate(generator, labels, key))

    def run(times: int) -> None:
        for _ in range(times):
            out = call()
        jax.block_until_ready(out)

    return run


def prepare(request: dict[str, Any]) -> Prepared:
    device = jax.devices()[0]
    settings = request["model"], request["dtype"], request["batch"]
    run = training(*settings) if request["kind"] == "train" else inference(request["kind"], *settings)
    about = f"{device.device_kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
    return Prepared(about, run, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


if __name__ == "__main__":
    serve(prepare)
