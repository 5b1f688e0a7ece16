"""Imported before anything of ours: the names that ours has for float32 then mean float64."""

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64

from titok_jax import models  # noqa: E402

_abstract = models.abstract
# The computation dtype is told by its name.
models.abstract = lambda config, dtype=None, **options: _abstract(config, dtype=jnp.float64, **options)
