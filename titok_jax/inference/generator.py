"""A generator with its weights: class labels to tokens."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.inference import decoding
from titok_jax.models.generator import GUIDANCE_SCHEDULES, GeneratorConfig
from titok_jax.runtime import sharding
from titok_jax.weights import convert


class Generator:
    """A generator with its weights.

    Attributes:
      config: the architecture, with the default sampling settings.
      params: nested dict of float32 arrays.
    """

    def __init__(self, config: GeneratorConfig, params: convert.Params, *, dtype=jnp.float32, mesh: Mesh | None = None):
        """
        Args:
          dtype: computation dtype, "float32" or "bfloat16"; sampling itself is always float32.
          mesh: the mesh that holds the parameters; batches are sharded along it. None means one device.
        """
        self.config, self.params = config, params
        graphdef, _ = models.abstract(config, dtype=jnp.dtype(dtype))

        def logits(params, ids, labels):
            return nnx.merge(graphdef, params).logits(ids, labels)

        def sample(params, labels, key, first_index, scale, temperature, *, num_steps, schedule, annealing):
            keys = jax.vmap(partial(jax.random.fold_in, key))(first_index + jnp.arange(labels.shape[0]))
            return decoding.parallel_decode(
                partial(logits, params),
                sharding.constrain_batch(labels),
                num_tokens=config.num_tokens,
                codebook_size=config.codebook_size,
                num_classes=config.num_classes,
                num_steps=num_steps,
                guidance_scale=scale,
                guidance_schedule=schedule,
                temperature=temperature,
                softmax_temperature_annealing=annealing,
                noise=decoding.noise_from_keys(keys),
            ).ids

        self._logits = sharding.jit_on(mesh, logits)
        self._sample = sharding.jit_on(mesh, sample, static_argnames=("num_steps", "schedule", "annealing"))

    def logits(self, ids, labels) -> jax.Array:
        """One forward pass.

        Args:
          ids: int [B, N] in 0 .. codebook_size; the last is the mask.
          labels: int [B] in 0 .. num_classes; the last means unconditional.

        Returns:
          float32 [B, N, codebook_size].

        Raises:
          ValueError: for a wrong shape or range.
        """
        ids, labels = np.asarray(ids), np.asarray(labels)
        if ids.ndim != 2 or ids.shape[1] != self.config.num_tokens or ids.dtype.kind not in "iu":
            raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}, expected integers [batch, {self.config.num_tokens}]")
        if ids.size and not 0 <= ids.min() <= ids.max() <= self.config.mask_id:
            raise ValueError(f"ids reach from {ids.min()} to {ids.max()}, expected 0 to {self.config.mask_id}")
        self._check_labels(labels, self.config.num_classes, ids.shape[0])
        return self._logits(self.params, ids.astype(np.int32), labels.astype(np.int32))

    def _check_labels(self, labels: np.ndarray, largest: int, batch: int | None = None) -> None:
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or (batch is not None and len(labels) != batch):
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, expected integers [{batch or 'batch'}]")
        if labels.size and not 0 <= labels.min() <= labels.max() <= largest:
            raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, expected 0 to {largest}")


def generate(
    generator: Generator,
    labels: Sequence[int] | np.ndarray,
    key: jax.Array,
    *,
    first_index: int = 0,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_schedule: str | None = None,
    temperature: float | None = None,
    softmax_temperature_annealing: bool | None = None,
) -> jax.Array:
    """Generates token ids for class labels. Settings that are None come from `generator.config.sampling`.

    An image depends only on its label, the key and its position in `labels`, not on the other images. Changing labels, key,
    first index, scale or temperature causes no recompilation.

    Args:
      labels: [B], 0 .. num_classes - 1.
      key: from `jax.random.key`.
      first_index: the position of `labels[0]` in a longer list that is generated in several calls. The results are the
        same as from one call for the whole list.
      num_steps: decoding steps, at least 1.
      guidance_scale: 0 means no guidance under every schedule. (In the published code, "power-cosine" with 0 gives
        unconditional images.)
      guidance_schedule: "constant", "linear" or "power-cosine".
      temperature: scale of the noise in the first step, at least 0. Higher values give more diverse images.
      softmax_temperature_annealing: divide the logits by a temperature that falls from about 1.3 to 0.5.

    Returns:
      int32 [B, N], for `Tokenizer.decode`.

    Raises:
      ValueError: for a label or setting out of range.
    """
    defaults, config = generator.config.sampling, generator.config
    labels = np.asarray(labels)
    generator._check_labels(labels, config.num_classes - 1)
    num_steps = defaults.num_steps if num_steps is None else num_steps
    guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    schedule = guidance_schedule or defaults.guidance_schedule
    temperature = defaults.temperature if temperature is None else temperature
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected at least 0")
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule is {schedule!r}, expected one of {GUIDANCE_SCHEDULES}")
    if schedule == "power-cosine" and guidance_scale == 0:
        guidance_scale = 1.0  # in this formula, 1 means no guidance
    return generator._sample(
        generator.params,
        labels.astype(np.int32),
        key,
        np.int32(first_index),
        np.float32(guidance_scale),
        np.float32(temperature),
        num_steps=num_steps,
        schedule=schedule,
        annealing=defaults.softmax_temperature_annealing
        if softmax_temperature_annealing is None
        else softmax_temperature_annealing,
    )
