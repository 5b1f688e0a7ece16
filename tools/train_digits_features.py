"""Trains the network whose features define digits-FID, on the embedded training digits only."""

import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from titok_jax import models
from titok_jax.data.digits import load_digits
from titok_jax.evaluation import features
from titok_jax.models.digits_net import IMAGE_SIZE, NUM_CLASSES, DigitsNetConfig
from titok_jax.runtime.arguments import SEED, Parser, Whole
from titok_jax.runtime.command import command
from titok_jax.runtime.outputs import check_output, new_file
from titok_jax.weights import convert, safetensors_file

_EPILOG = """examples:
  python tools/train_digits_features.py runs/digits_features.safetensors
      as the embedded one was made: 1,000 steps, half a minute on 2 CPU cores

Prints the accuracy on the training and the held-out digits. Another network gives other values of digits-FID: they compare
with each other only if all are of the embedded one.
"""


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Augments images, float [B, 32, 32] in [0, 1].

    Each image is rotated (up to 17 degrees), scaled, sheared, shifted (up to 3 pixels) and warped by a smooth random field.
    Then the contrast changes and noise is added. Images are never mirrored, because that makes another character.
    """
    keys, batch = jax.random.split(key, 8), images.shape[0]

    def uniform(i, shape, largest):
        return jax.random.uniform(keys[i], (batch, *shape), minval=-largest, maxval=largest)

    angle, shear, scale = uniform(0, (), 0.3), uniform(1, (), 0.25), jnp.exp(uniform(2, (2,), 0.2))
    cos, sin, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros(batch)
    turn = jnp.stack([cos, -sin, sin, cos], -1).reshape(batch, 2, 2)
    stretch = jnp.stack([scale[:, 0], shear, zero, scale[:, 1]], -1).reshape(batch, 2, 2)
    centre = (IMAGE_SIZE - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(IMAGE_SIZE) - centre] * 2, indexing="ij"))
    bend = jax.image.resize(jax.random.normal(keys[3], (batch, 2, 4, 4)), (batch, 2, IMAGE_SIZE, IMAGE_SIZE), "cubic")
    bend *= jnp.abs(uniform(4, (1, 1, 1), 1.5))
    places = jnp.einsum("bij,jhw->bihw", turn @ stretch, grid) + centre + uniform(5, (2, 1, 1), 3.0) + bend
    moved = jax.vmap(lambda image, place: jax.scipy.ndimage.map_coordinates(image, list(place), order=1))(images, places)
    contrast = jnp.clip(moved, 1e-6, 1.0) ** jnp.exp(uniform(6, (1, 1), 0.4))
    return jnp.clip(contrast + 0.05 * jax.random.normal(keys[7], moved.shape), 0.0, 1.0)


def train(steps: int, seed: int, batch_size: int = 128) -> convert.Params:
    """Trains the network for `steps` updates and returns its parameters.

    On one machine, the same arguments always give the same parameters.
    """
    grey, labels = load_digits("train", IMAGE_SIZE)
    grey, targets = jnp.asarray(grey / 255.0, jnp.float32), jax.nn.one_hot(labels, NUM_CLASSES)
    graphdef, _ = models.abstract(DigitsNetConfig())
    params = jax.jit(lambda key: models.init(DigitsNetConfig(), key))(jax.random.key(seed))
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit
    def update(params, opt_state, key):
        choose, change = jax.random.split(key)
        chosen = jax.random.randint(choose, (batch_size,), 0, len(grey))
        images = augment(change, grey[chosen])

        def loss(params):
            _, logits = nnx.merge(graphdef, params).from_grey(images)
            return optax.softmax_cross_entropy(logits, targets[chosen]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    with tqdm(range(steps), unit="step") as bar:
        for step in bar:
            params, opt_state, value = update(params, opt_state, jax.random.fold_in(jax.random.key(seed + 1), step))
            if step % 100 == 99:
                bar.set_postfix(loss=f"{float(value):.3f}")
    return jax.device_get(params)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python tools/train_digits_features.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    parser.add_argument("output", help="the .safetensors file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--steps", type=Whole(1, 100_000), default=1000, help="updates of 128 images (default: %(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    output = check_output(args.output, args.overwrite)
    params = train(args.steps, args.seed)
    with new_file(output, replace=args.overwrite) as partial:
        safetensors_file.write_safetensors(partial, convert.to_published(convert.table_for(DigitsNetConfig()), params))
    network = features.load_digits_features(output)
    accuracy = {}
    for split in ("train", "test"):
        grey, labels = load_digits(split, IMAGE_SIZE)
        logits = network(np.repeat(grey[..., None], 3, axis=-1)).logits
        accuracy[split] = float(np.mean(logits.argmax(1) == labels))
    print(f"{output}: {json.dumps({'accuracy': accuracy, 'steps': args.steps, 'seed': args.seed})}")


if __name__ == "__main__":
    sys.exit(main())
