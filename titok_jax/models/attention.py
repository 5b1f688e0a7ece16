"""Multi-head self-attention, softmax(q k^T / sqrt(d)) v, in the form that is fastest on the platform:

    TPU, bfloat16, from 64 positions on                  a Pallas kernel, `attention_rows`
    one NVIDIA GPU, bfloat16, from 128 positions on      cuDNN's kernel, `attention_flash`
    one CPU, float32, from 128 positions on              one image at a time, `attention_by_image`
    otherwise, and with dropout                          XLA's operations

The environment variable TITOK_JAX_ATTENTION changes the choice. It is read when a model is built and when a program is
traced:

    auto      as above
    plain     none of the two kernels. They have no forward-mode derivatives (`jax.jvp`, `jax.linearize`)
    kernel    cuDNN's kernel on several GPUs too. JAX's users report programs of several GPUs that end because it cannot be
              captured into a CUDA graph (github.com/jax-ml/jax/issues/27599)

tests/test_attention.py checks the forms against each other.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from titok_jax.runtime import sharding
from titok_jax.runtime.sharding import target_platform

SETTING = "TITOK_JAX_ATTENTION"

# The output's name for policies of `jax.checkpoint`. If they keep it, the kernel does not run forward again in the backward
# pass: its gradient needs the projections only.
CHECKPOINT_NAME = "attention"


def setting() -> str:
    """The value of TITOK_JAX_ATTENTION; "auto" if it is not set.

    Raises:
      ValueError: an unknown value.
    """
    value = os.environ.get(SETTING) or "auto"
    if value not in ("auto", "plain", "kernel"):
        raise ValueError(f"the environment variable {SETTING} is {value!r}, expected auto, plain or kernel")
    return value


def attention(qkv: jax.Array, num_heads: int, *, drop: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """Multi-head self-attention, with the form that is fastest on the platform.

    Args:
      qkv: [B, L, 3, D], query, key and value; the heads are consecutive parts of D.
      drop: applied to the probabilities [B, H, L, L].

    Returns:
      [B, L, D], named `CHECKPOINT_NAME` for policies of `jax.checkpoint`.
    """
    b, length, _, width = qkv.shape
    if drop is None and (spec := _split_of_rows(qkv, num_heads)) is not None:
        out = attention_rows(qkv, num_heads, spec)
    else:
        q, k, v = (qkv[:, :, i].reshape(b, length, num_heads, width // num_heads) for i in range(3))
        out = (_form(length, qkv.dtype) if drop is None else functools.partial(attention_plain, drop=drop))(q, k, v)
        out = out.reshape(b, length, width)
    return checkpoint_name(out, CHECKPOINT_NAME)


def _form(length: int, dtype) -> Callable:
    """The form for this platform, other than the TPU's kernel."""
    platform = target_platform()
    if platform == "cpu":
        alone = length >= 128 and jax.device_count() == 1 and dtype != jnp.bfloat16
        return attention_by_image if alone else attention_plain
    # Decided before anything runs: where cuDNN's kernel cannot be captured, the whole program ends.
    captured = {"auto": jax.device_count() == 1, "plain": False, "kernel": True}[setting()]
    if platform == "gpu" and captured and dtype == jnp.bfloat16 and length >= 128 and _has_flash():
        return attention_flash
    return jax.nn.dot_product_attention


def attention_plain(q, k, v, *, drop: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over [B, L, H, d], with the softmax in float32. `drop` is applied to the probabilities."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = weights if drop is None else drop(weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def attention_by_image(q, k, v) -> jax.Array:
    """The same, one image of the batch at a time. This is 3 x faster on one CPU at L = 289, where a batched score matrix
    does not fit in the cache.

    Do not use it for a sharded batch, because a loop over a sharded axis gathers the batch. Do not use it in bfloat16
    either: it divides by the softmax's sum at the end, which then costs the gradients of q and k two digits.
    """

    def one(qkv):
        q, k, v = (a.transpose(1, 0, 2) for a in qkv)  # [H, L, d]
        scores = jnp.einsum("hqd,hkd->hqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        e = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = (e.astype(v.dtype) @ v) / e.sum(-1, keepdims=True).astype(v.dtype)
        return out.transpose(1, 0, 2)

    return jax.lax.map(one, (q, k, v))


def attention_flash(q, k, v) -> jax.Array:
    """The same in bfloat16 with cuDNN's kernel, which never writes the scores to memory. Its gradient supports only even
    lengths, so an odd length is padded with one position that nothing attends to."""
    length, lengths = q.shape[1], None
    if length % 2:
        q, k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (q, k, v))
        lengths = jnp.full(q.shape[0], length, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")[:, :length]


@functools.cache
def _has_flash() -> bool:
    """Whether the local devices support `attention_flash`, which needs CUDA and Ampere or newer."""
    device = jax.local_devices()[0]
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return is_cuda and float(device.compute_capability) >= 8.0


# The TPU's kernel. A program of its grid computes some heads of some images, whole rows of scores at a time. So scores and
# probabilities are never in the memory outside the core, and the softmax is the plain one. It reads the projections and
# writes their gradients as [3, B, L, D], which is a layout that XLA's matrix product can write and read by itself. A block
# spans all of L, so nothing is padded in memory; the compiler pads it to tiles inside the core, and masks sums and maxima.

_LANES = 128
_SHORTEST = 64  # by the compiler's schedules, XLA's operations take half of the kernel's time at 33 positions
_MOST_SCORES = 640**2  # at a time, so that they fit in the 16 MiB of a v4's core; longer sequences are computed in parts
_ROWS_OF_PROGRAM = 512  # of images: a program takes several short sequences, up to so many rows
_LARGEST_BLOCK = 2**18  # elements of L x lanes; the core's memory holds seven blocks twice, and some float32 scores


def _split_of_rows(qkv: jax.Array, num_heads: int) -> PartitionSpec | None:
    """How `attention_rows` is split over the mesh: the sharding of its result. None where it is not used.

    A kernel cannot be partitioned by the compiler. So each device runs it on its images and heads, where it is known which
    these are: on one device, under `sharding.on_mesh`, or inside a `jax.shard_map` over all axes.
    """
    b, length, _, width = qkv.shape
    if target_platform() != "tpu" or qkv.dtype != jnp.bfloat16 or setting() == "plain":
        return None
    axes, head = sharding.split_by_rules({"batch": b, "heads": num_heads}), width // num_heads
    if axes is None or head not in range(32, 129, 16) or length < _SHORTEST:
        return None
    pieces = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes["heads"])
    if length * _lanes_of_block(width // pieces, head) > _LARGEST_BLOCK:
        return None
    return PartitionSpec(axes["batch"] or None, None, axes["heads"] or None)


def _lanes_of_block(width: int, head: int) -> int:
    """How many of the last axis' elements a program computes: whole heads and whole tiles, or all."""
    lanes = math.lcm(head, _LANES)
    return lanes if width % lanes == 0 else width


def attention_rows(
    qkv: jax.Array, num_heads: int, spec: PartitionSpec | None = None, *, interpret: bool = False
) -> jax.Array:
    """The same by the TPU's kernel: [B, L, 3, D] in bfloat16 -> [B, L, D].

    The products have bfloat16 factors and float32 sums, and the softmax is float32. The gradient computes the probabilities
    again from query and key. There is no forward-mode derivative.

    Args:
      spec: the sharding of the result over the mesh, if there is one.
      interpret: compute on any device, slowly.
    """
    return _rows(jnp.moveaxis(qkv, 2, 0), _Call(qkv.shape[-1] // num_heads, spec or PartitionSpec(), interpret))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a call of the kernel knows beside its arrays: elements per head, and see `attention_rows`."""

    head: int
    spec: PartitionSpec
    interpret: bool

    def __call__(self, kernel: Callable, products: int, stacked_result: bool, *arrays: jax.Array) -> jax.Array:
        """Runs a kernel on each device's images and heads. Arrays are [3, B, L, D] or [B, L, D]."""
        stacked = PartitionSpec(None, *self.spec)
        function = functools.partial(_on_device, self, kernel, products, stacked_result)
        specs = tuple(stacked if array.ndim == 4 else self.spec for array in arrays)
        return sharding.split(function, specs, stacked if stacked_result else self.spec)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rows(qkv: jax.Array, call: _Call) -> jax.Array:
    return call(_forward_kernel, 2, False, qkv)


def _rows_forward(qkv, call):
    return _rows(qkv, call), qkv


def _rows_backward(call, qkv, gradient):
    return (call(_backward_kernel, 5, True, qkv, gradient),)


_rows.defvjp(_rows_forward, _rows_backward)


def _on_device(call: _Call, kernel: Callable, products: int, stacked_result: bool, *arrays: jax.Array) -> jax.Array:
    """One device's call of a kernel."""
    _, b, length, width = arrays[0].shape
    lanes = _lanes_of_block(width, call.head)
    images = max(n for n in range(1, max(1, _ROWS_OF_PROGRAM // length) + 1) if b % n == 0)

    def block(ndim: int) -> pl.BlockSpec:
        if ndim == 4:
            return pl.BlockSpec((3, images, length, lanes), lambda image, part: (0, image, 0, part))
        return pl.BlockSpec((images, length, lanes), lambda image, part: (image, 0, part))

    shape = (3, b, length, width) if stacked_result else (b, length, width)
    # What the estimate counts (compiler/hlo.py): operations and exponentials on whole tiles. The pauses between the steps of
    # a head take as long as 50 more tiles, by the compiler's schedules.
    rows, columns, heads = -(-length // 8) * 8, -(-length // _LANES) * _LANES, b * (width // call.head)
    scores = heads * rows * columns
    cost = pl.CostEstimate(
        flops=2 * products * scores * _LANES,
        transcendentals=scores + heads * 50 * 8 * _LANES,
        bytes_accessed=2 * (sum(array.size for array in arrays) + math.prod(shape)),
    )
    return pl.pallas_call(
        functools.partial(kernel, call.head),
        name=kernel.__name__.strip("_"),
        grid=(b // images, width // lanes),
        in_specs=[block(array.ndim) for array in arrays],
        out_specs=block(len(shape)),
        out_shape=jax.ShapeDtypeStruct(shape, arrays[0].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=cost,
        interpret=call.interpret,
    )(*arrays)


def _product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """The product of two matrices over one axis of each, with float32 sums, whatever the caller's default precision."""
    numbers = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _parts(length: int) -> list[slice]:
    """The parts of a sequence whose queries are computed at a time."""
    number = -(-(length**2) // _MOST_SCORES)
    size = length if number == 1 else -(-length // number // 16) * 16  # whole tiles
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _each_group(head: int, ref, compute: Callable) -> None:
    """Calls compute(image, heads) for everything in a block [..., images, L, lanes]. `heads` are slices of the last axis,
    which are computed together: while the matrix unit works for one, the vector unit works for another."""
    length, lanes = ref.shape[-2:]
    together = max(1, _MOST_SCORES // length**2) * head

    def one(image, _):
        for start in range(0, lanes, together):
            stop = min(start + together, lanes)
            compute(image, [slice(i, i + head) for i in range(start, stop, head)])

    jax.lax.fori_loop(0, ref.shape[-3], one, None)


def _each(function: Callable, *arguments: list) -> list:
    """The function of each head's arguments."""
    return [function(*each) for each in zip(*arguments, strict=True)]


def _joined(heads: list, values: list, dtype) -> tuple[slice, jax.Array]:
    """Where the values [rows, head] of neighbouring heads belong, and the values side by side."""
    return slice(heads[0].start, heads[-1].stop), jnp.concatenate([value.astype(dtype) for value in values], axis=-1)


def _forward_kernel(head: int, qkv_ref, out_ref) -> None:
    """Blocks [3, images, L, lanes] -> [images, L, lanes]."""

    def compute(image, heads):
        q, k, v = ([qkv_ref[i, image, :, lanes] for lanes in heads] for i in range(3))
        for part in _parts(out_ref.shape[1]):
            scores = _each(lambda q, k, part=part: _product(q[part] * head**-0.5, k, (1, 1)), q, k)
            e = [jnp.exp(s - s.max(-1, keepdims=True)) for s in scores]
            inverse = [1.0 / e.sum(-1, keepdims=True) for e in e]
            out = _each(lambda e, v, inverse: _product(e.astype(v.dtype), v, (1, 0)) * inverse, e, v, inverse)
            lanes, out = _joined(heads, out, out_ref.dtype)
            out_ref[image, part, lanes] = out

    _each_group(head, qkv_ref, compute)


def _backward_kernel(head: int, qkv_ref, gradient_ref, out_ref) -> None:
    """Blocks [3, images, L, lanes], [images, L, lanes] -> the gradient of the first.

    Here the scores are [keys, queries]. Only small matrices are then transposed for the products.
    """
    dtype = out_ref.dtype

    def compute(image, heads):
        q, k, v = ([qkv_ref[i, image, :, lanes] for lanes in heads] for i in range(3))
        dk, dv = [0.0] * len(heads), [0.0] * len(heads)
        for part in _parts(gradient_ref.shape[1]):
            scaled = [q[part] * head**-0.5 for q in q]
            gradient = [gradient_ref[image, part, lanes] for lanes in heads]
            scores = _each(lambda k, q: _product(k, q, (1, 1)), k, scaled)
            dp = _each(lambda v, g: _product(v, g, (1, 1)), v, gradient)
            e = [jnp.exp(s - s.max(0, keepdims=True)) for s in scores]
            p = [e * (1.0 / e.sum(0, keepdims=True)) for e in e]
            dv = _each(lambda dv, p, g: dv + _product(p.astype(dtype), g, (1, 0)), dv, p, gradient)
            ds = _each(lambda p, dp: (p * (dp - (dp * p).sum(0, keepdims=True))).astype(dtype), p, dp)
            dq = _each(lambda k, ds: _product(k, ds, (0, 0)).T * head**-0.5, k, ds)
            dk = _each(lambda dk, ds, q: dk + _product(ds, q, (1, 0)), dk, ds, scaled)
            lanes, dq = _joined(heads, dq, dtype)
            out_ref[0, image, part, lanes] = dq
        for i, values in ((1, dk), (2, dv)):
            lanes, values = _joined(heads, values, dtype)
            out_ref[i, image, :, lanes] = values

    _each_group(head, qkv_ref, compute)
