"""A generator with its weights: class labels to tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from titok_jax.inference import many
from titok_jax.inference.functions import GeneratorFunctions, as_key, image_keys
from titok_jax.inference.model import Model, as_int32, check_range, on_host
from titok_jax.models.generator import SamplingConfig

# The classes that the published demo shows (demo_util.py, `sample_fn`), before a random one.
DEMO_CLASSES = (1, 7, 282, 604, 724, 179, 751, 404, 850)


class Generator(Model):
    """A generator with its weights. Attributes and arguments are those of `Model`; sampling itself is always float32."""

    functions: GeneratorFunctions
    functions_class = GeneratorFunctions

    def logits(self, ids: Any, labels: Any) -> jax.Array:
        """One forward pass.

        Args:
          ids: int [B, N] in 0 .. codebook_size; the last is the mask.
          labels: int [B] in 0 .. num_classes; the last means unconditional.

        Returns:
          float32 [B, N, codebook_size].

        Raises:
          ValueError: for a wrong shape or dtype, or (numpy arrays and lists only) a wrong range.
        """
        ids = self._checked_ids(ids)
        return self.run("logits", ids, self._checked_labels(labels, self.config.num_classes, ids.shape[0]))

    def generate(
        self,
        labels: Any = None,
        key: Any = 0,
        *,
        ids: Any = None,
        first_index: int = 0,
        return_trace: bool = False,
        sampling: SamplingConfig | None = None,
        **settings: Any,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Generates token ids for class labels.

        An image depends only on its label, the key, its index and its given ids, not on the other images. Changing these,
        the guidance scale or the temperature causes no recompilation.

        Args:
          labels: int [B], 0 .. num_classes - 1. None: ten classes (`demo_labels`).
          key: an int seed, a typed or raw threefry key, or one key per image [B].
          ids: int [B, N] in 0 .. codebook_size to start from. Tokens are kept, and those with the mask id
            (`config.mask_id`) are made, given the others and the label. None: all are made.
          first_index: the index of `labels[0]` in a longer list that is generated in several calls. The results are the
            same as from one call for the whole list.
          return_trace: also return the ids after each step.
          sampling: settings; None means `config.sampling`.
          settings: fields of SamplingConfig to change: `num_steps`, `guidance_scale`, `guidance_schedule`,
            `guidance_scale_pow`, `temperature`, `softmax_temperature_annealing`. Those that are None do not change.
            Guidance scale and temperature may be one number per image [B]. A guidance scale of 0 means no guidance under
            every schedule. (In the published code, "power-cosine" with 0 gives unconditional images.)

        Returns:
          int32 [B, N], for `Tokenizer.decode`; with `return_trace` also int32 [num_steps, B, N] with the mask id where a
          token is not made yet.

        Raises:
          ValueError: for a label, id or setting out of range (of arrays on a device only shape and dtype are checked).
          TypeError: for an unknown setting.
        """
        labels = demo_labels(self.config.num_classes, key) if labels is None else labels
        labels = self._checked_labels(labels, self.config.num_classes - 1)
        batch = labels.shape[0]
        ids = None if ids is None else self._checked_ids(ids, batch)
        sampling, scale, temperature = resolve_sampling(sampling or self.config.sampling, batch, **settings)
        if batch == 0:
            none = jnp.zeros((0, self.config.num_tokens), jnp.int32)
            return (none, jnp.zeros((sampling.num_steps, *none.shape), jnp.int32)) if return_trace else none
        keys = image_keys(key, batch, first_index)
        out = self.run(
            "sample",
            labels,
            keys,
            ids,
            static=("sampling",),
            sampling=sampling,
            guidance_scale=scale,
            temperature=temperature,
        )
        return (out.ids, out.trace) if return_trace else out.ids

    def sample_images(self, tokenizer: Any, labels: Any, seed: int = 0, batch_size: int = 64, **settings: Any) -> np.ndarray:
        """Generates images for class labels, batch by batch.

        Args:
          tokenizer: the tokenizer whose tokens this generator makes.
          labels: int [n], 0 .. num_classes - 1.
          seed: image i depends on its label, the seed and i. The batch size changes it only by the rounding of sums.
          batch_size: images at a time.
          settings: as in `generate`.

        Returns:
          uint8 [n, H, W, 3] in host memory, truncated to grey levels like the published sampling script's.

        Raises:
          ValueError: as in `generate`, or if the two models do not fit together.
        """
        size = tokenizer.config.image_size
        none = np.zeros((0, size, size, 3), np.uint8)
        parts = many.sample(tokenizer, self, np.asarray(labels), seed, batch_size=batch_size, **settings)
        return many.joined((images for _, _, images in parts), none)

    # Checks

    def _checked_labels(self, labels: Any, largest: int, batch: int | None = None) -> np.ndarray | jax.Array:
        labels = on_host(labels)
        if labels.ndim == 1 and labels.size == 0:
            labels = labels.astype(np.int32)
        if (
            labels.ndim != 1
            or not jnp.issubdtype(labels.dtype, jnp.integer)
            or labels.shape[0] != (batch or labels.shape[0])
        ):
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, expected integers [{batch or 'batch'}]")
        check_range(labels, largest, "labels")
        return as_int32(labels)

    def _checked_ids(self, ids: Any, batch: int | None = None) -> np.ndarray | jax.Array:
        ids, config = on_host(ids), self.config
        if (
            ids.ndim != 2
            or ids.shape[1] != config.num_tokens
            or ids.shape[0] != (ids.shape[0] if batch is None else batch)
            or not jnp.issubdtype(ids.dtype, jnp.integer)
        ):
            expected = f"expected integers [{'batch' if batch is None else batch}, {config.num_tokens}]"
            raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}, {expected}")
        check_range(ids, config.mask_id, "ids")
        return as_int32(ids)


def demo_labels(num_classes: int, key: Any = 0) -> np.ndarray:
    """Ten classes to look at, int32 [10]: of ImageNet's 1,000 those of the published demo, nine and a random one; of fewer
    classes the first in turn."""
    if num_classes != 1000:
        return np.arange(10, dtype=np.int32) % num_classes
    random = jax.random.randint(jax.random.fold_in(as_key(key), 0), (), 0, 999)
    return np.array([*DEMO_CLASSES, int(random)], np.int32)


def resolve_sampling(base: SamplingConfig, batch: int, **settings: Any) -> tuple[SamplingConfig, Any, Any]:
    """Returns (settings that decide the compiled program, guidance scale, temperature); see `Generator.generate`.

    Raises:
      ValueError: for a setting out of range, or another number of scales or temperatures than `batch`.
      TypeError: for an unknown setting.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    numbers = {}
    for name in ("guidance_scale", "temperature"):
        value = on_host(settings.pop(name, getattr(base, name)))
        if value.ndim and value.shape != (batch,):
            raise ValueError(f"{name} has shape {list(value.shape)}, expected one number, or one per image [{batch}]")
        if isinstance(value, np.ndarray):
            for number in value.reshape(-1).tolist():
                dataclasses.replace(base, **{name: number})  # raises for a number out of range
        numbers[name] = value.astype(np.float32)
    fixed = dataclasses.replace(base, guidance_scale=0.0, temperature=0.0, **settings)
    return fixed, numbers["guidance_scale"], numbers["temperature"]


def generate(generator: Generator, labels: Any = None, key: Any = 0, **options: Any) -> Any:
    """`generator.generate(labels, key, ...)`."""
    return generator.generate(labels, key, **options)
