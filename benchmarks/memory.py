"""What the model of each recipe keeps of an image for its backward pass, under each policy of `config.remat`.

  python benchmarks/memory.py

Prints the table of docs/performance.md. The arrays are counted in the traced program, on any machine: nothing is compiled
or computed. It counts the trained model alone, in bfloat16: not its parameters and gradients, not what a layer needs while
it is computed, and neither frozen networks nor discriminators. A compiler may keep less.
"""

import functools
import importlib
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from titok_jax import models
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.layers import REMAT
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings


def recipes() -> list[str]:
    """The full-size recipes that train a transformer."""
    two_stage = list(importlib.import_module("configs.common").TWO_STAGE)
    variants = {"stage1": two_stage, "stage2": two_stage}
    variants |= {name: list(importlib.import_module(f"configs.{name}").VARIANTS) for name in ("single_stage", "generator")}
    return [f"{name}:{v}" for name, found in variants.items() for v in found if not v.startswith("smoke")]


def kept_bytes(config: models.Config, batch_size: int, remat: str) -> int:
    """Bytes that the backward pass of a model needs of its forward pass, with the parameters."""
    graphdef, params = models.abstract(config, dtype=jnp.bfloat16, remat=remat)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if isinstance(config, GeneratorConfig):
        inputs = jax.ShapeDtypeStruct((batch_size, config.num_tokens), jnp.int32)
    else:
        inputs = jax.ShapeDtypeStruct((batch_size, config.image_size, config.image_size, 3), jnp.float32)

    def outputs(inputs, key, params):
        model = nnx.merge(graphdef, params)
        if isinstance(config, GeneratorConfig):
            return model.logits(inputs, jnp.zeros(batch_size, jnp.int32), key=key)
        latents = model.encode(inputs)
        if not config.has_tokens:
            latents = jnp.split(latents, 2, -1)[0]
        return model.decode(latents)

    backward = jax.eval_shape(lambda inputs, key, params: jax.vjp(functools.partial(outputs, inputs, key), params)[1],
                              inputs, key, params)  # fmt: skip
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def of_an_image(recipe: str, remat: str) -> float:
    """MB that the model of a recipe keeps of an image, or of a row of tokens."""
    changes = ["--config.vqgan=maskgit_vqgan"] if recipe.startswith("stage") else []  # for 512 pixels, of the same sizes
    config = parse_settings(read_config(recipe, changes), abstract=True).model
    return (kept_bytes(config, 2, remat) - kept_bytes(config, 1, remat)) / 1e6


def main() -> None:
    print("| recipe | " + " | ".join(f"`{remat}`" for remat in REMAT) + " |")
    print("|---|" + "--:|" * len(REMAT))
    for name in recipes():
        print(f"| `{name}` | " + " | ".join(f"{of_an_image(name, remat):,.0f}" for remat in REMAT) + " |", flush=True)


if __name__ == "__main__":
    main()
