"""What Tokenizer, VQGAN and Generator share: parameters, compiled functions, and checks of arrays on the host."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.inference.functions import ModelFunctions
from titok_jax.runtime import placement, sharding
from titok_jax.weights import convert


class Model:
    """A model with its weights.

    Methods take arrays on the host, which they check, and arrays on devices or inside `jax.jit`, `jax.vmap` and `jax.grad`,
    of which they check shape and dtype only. Traced in another program, they make the weights constants of that program; use
    `functions` with `params` as an argument there.

    Attributes:
      functions: the model as pure functions of (params, arrays).
      config: the architecture.
      params: nested dict of arrays on the device or the mesh.
      mesh: the mesh that holds them, or None.
    """

    functions: ModelFunctions
    functions_class: ClassVar[type[ModelFunctions]]

    def __init__(
        self,
        config: Any,
        params: convert.Params,
        *,
        dtype: Any = "float32",
        precision: str | None = None,
        mesh: Mesh | None = None,
    ):
        """
        Args:
          params: nested dict of float32 or bfloat16 arrays.
          dtype: computation dtype, "float32" or "bfloat16".
          precision: of matrix products, "highest", "high" or "default"; None means "highest" for float32, else "default".
          mesh: the mesh that holds the parameters; batches are sharded along it. None means one device.

        Raises:
          WeightsError: the parameters do not fit the configuration.
          ValueError: another dtype or precision.
        """
        functions = self.functions_class(config, dtype, precision)
        check_params(config, params)
        if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
            # On one device, or on the shards of a mesh.
            if mesh is None:
                params = jax.device_put(params)
            else:
                params = placement.put(params, sharding.state_shardings(mesh, params))
        self.functions, self.params, self.mesh = functions, params, mesh
        self._compiled: dict[str, Any] = {}  # by the name of a function

    @property
    def config(self) -> Any:
        """The architecture."""
        return self.functions.config

    def run(self, name: str, *arguments: Any, static: tuple[str, ...] = (), **options: Any) -> Any:
        """Calls a function of `functions` with the parameters, compiled, on the mesh."""
        if name not in self._compiled:
            self._compiled[name] = sharding.jit_on(self.mesh, getattr(self.functions, name), static_argnames=static)
        return self._compiled[name](self.params, *arguments, **options)


def check_params(config: models.Config, params: convert.Params) -> None:
    """Raises WeightsError unless the parameters are those of the model: names, shapes, float32 or bfloat16."""
    wanted, given = (convert.flatten(tree) for tree in (models.abstract(config)[1], params))
    shapes = [{name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (wanted, given)]
    convert.check_shapes(*shapes, "params")
    for name, leaf in given.items():
        if leaf.dtype not in (jnp.float32, jnp.bfloat16):
            raise convert.WeightsError(f"params: {name} is {leaf.dtype}, expected float32 or bfloat16")


def on_host(value: Any) -> np.ndarray | jax.Array:
    """Returns arrays as they are, and anything else (lists, numbers) as a numpy array."""
    return value if isinstance(value, (np.ndarray, jax.Array)) else np.asarray(value)


def check_range(array: np.ndarray | jax.Array, largest: int, what: str) -> None:
    """Raises ValueError unless integers are in 0 .. largest. Looks at numpy arrays only: arrays on a device would have to be
    fetched, and traced ones have no values."""
    if isinstance(array, np.ndarray) and array.size and not 0 <= array.min() <= array.max() <= largest:
        raise ValueError(f"{what} reach from {array.min()} to {array.max()}, expected 0 to {largest}")


def as_int32(array: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The same integers as int32."""
    return array if array.dtype == np.int32 else array.astype(np.int32)
