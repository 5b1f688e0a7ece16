"""Gradients over parts of a batch, and control flow in a step. Imports no task."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from titok_jax.models.layers import target_platform

Params = Any  # nested dict of arrays

# On a CPU the gradient of a convolution takes 25 times as long in a loop or a branch as in the main program.
_INLINE = {"cpu": True, "gpu": False, "tpu": False}


def split_batch(tree: Any, parts: int) -> Any:
    """Every [B, ...] of a tree -> [parts, B / parts, ...].

    Part i takes rows i, i + parts, ..., so that each part of a sharded batch is sharded among the same devices.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join_batch(tree: Any) -> Any:
    """The inverse of `split_batch`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def cond(condition: jax.Array, branch: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`branch()` where a traced condition holds, else `otherwise()`; on a CPU both are computed."""
    if _INLINE[target_platform()]:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), branch(), otherwise())
    return jax.lax.cond(condition, branch, otherwise)


def map_parts(function: Callable, rows: Any, parts: int) -> Any:
    """`function` of a tree of [B, ...], computed one part of the batch at a time, and once more in the backward pass."""
    if parts == 1:
        return function(rows)
    once = jax.checkpoint(function)
    inline = _INLINE[target_platform()]
    _, outputs = jax.lax.scan(lambda _, part: (None, once(part)), None, split_batch(rows, parts), unroll=inline)
    return join_batch(outputs)


def accumulate(
    loss: Callable, params: Params, rows: Any, parts: int, *, convolutions: bool = False
) -> tuple[Params, dict[str, jax.Array], Any]:
    """Gradient of the mean of a loss over `parts` parts of a batch, computed one part at a time.

    Args:
      loss: (params, rows of one part) -> (scalar, (metrics, outputs [b, ...])).
      rows: tree of [B, ...].
      convolutions: the loss has some, so that on a CPU the parts must not be a loop.

    Returns:
      (gradients, metrics averaged over the parts, outputs of all rows [B, ...]).
    """
    grad = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, (metrics, outputs) = grad(params, rows)
        return grads, metrics, outputs

    def body(total, part):
        grads, (metrics, outputs) = grad(params, part)
        return jax.tree.map(jnp.add, total, grads), (metrics, outputs)

    zeros = jax.tree.map(jnp.zeros_like, params)
    inline = convolutions and _INLINE[target_platform()]
    grads, (metrics, outputs) = jax.lax.scan(body, zeros, split_batch(rows, parts), unroll=inline)
    return (
        jax.tree.map(lambda g: g / parts, grads),
        jax.tree.map(lambda m: m.mean(0), metrics),
        join_batch(outputs),
    )
