"""Gradient accumulation over parts of a batch, and control flow inside a step. Imports no task."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from titok_jax.runtime import sharding
from titok_jax.runtime.sharding import target_platform

Params = Any  # nested dict of arrays

# On a CPU, the gradient of a convolution takes 25 times as long inside a loop or a branch as in the main program.
_INLINE = {"cpu": True, "gpu": False, "tpu": False}


def split_batch(tree: Any, parts: int) -> Any:
    """Reshapes every array [B, ...] of a tree to [parts, B / parts, ...].

    Part i takes rows i, i + parts, ..., so each part of a sharded batch is sharded over the same devices.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join_batch(tree: Any) -> Any:
    """The inverse of `split_batch`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def cond(condition: jax.Array, branch: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """Returns `branch()` if a traced condition holds, else `otherwise()`. On a CPU, both are computed."""
    if _INLINE[target_platform()]:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), branch(), otherwise())
    return jax.lax.cond(condition, branch, otherwise)


def map_parts(function: Callable, params: Any, rows: Any, parts: int) -> Any:
    """Applies `function(params, rows)` to a tree of [B, ...], one part of the batch at a time. The backward pass computes it
    again.

    What it does with a row may not depend on the other rows. The gradient of `params` is summed over the devices
    once, not for each part.
    """
    if parts == 1:
        return function(params, rows)
    once = jax.checkpoint(function)
    inline = _INLINE[target_platform()]

    def one_by_one(params, rows):
        _, outputs = jax.lax.scan(lambda _, part: (None, once(params, part)), None, split_batch(rows, parts), unroll=inline)
        return None, join_batch(outputs)

    return sharding.apart_along_data(one_by_one, params, rows)[1]


def accumulate(
    loss: Callable, params: Params, rows: Any, parts: int, *, convolutions: bool = False
) -> tuple[Params, dict[str, jax.Array], Any]:
    """Computes the gradient of a loss averaged over `parts` parts of a batch, one part at a time.

    With several parts, a device adds up the gradients of its own rows, and the devices along data sum them once at the end.

    Args:
      loss: (params, rows of one part) -> (scalar, (metrics, outputs [b, ...])). The scalar and the metrics are means over
        rows.
      rows: tree of [B, ...].
      convolutions: whether the loss contains convolutions. If so, the loop over the parts is unrolled on a CPU.

    Returns:
      (gradients, metrics averaged over the parts, outputs of all rows [B, ...]).
    """
    grad = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, (metrics, outputs) = grad(params, rows)
        return grads, metrics, outputs

    inline = convolutions and _INLINE[target_platform()]

    def one_by_one(params, rows):
        def body(total, part):
            grads, (metrics, outputs) = grad(params, part)
            return jax.tree.map(jnp.add, total, grads), (metrics, outputs)

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, (metrics, outputs) = jax.lax.scan(body, zeros, split_batch(rows, parts), unroll=inline)
        means = jax.tree.map(lambda g: g / parts, grads), jax.tree.map(lambda m: m.mean(0), metrics)
        return means, join_batch(outputs)

    (grads, metrics), outputs = sharding.apart_along_data(one_by_one, params, rows)
    return grads, metrics, outputs
