"""Building blocks that the models share: attention's projections, MLP, pre-norm block, block stack, GroupNorm.

Modules are Flax NNX modules that hold only parameters. They have no RNG state; callers pass dropout keys. Parameters are
float32, and `dtype` is the computation dtype. Some functions have a variant that is much faster on a CPU and choose it by
platform. tests/test_layers.py checks the variants against each other.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from titok_jax.models.attention import CHECKPOINT_NAME, attention, setting
from titok_jax.runtime import sharding
from titok_jax.runtime.sharding import target_platform


def normal_init(std: float) -> Callable:
    """Normal(0, std)."""
    return nnx.initializers.normal(stddev=std)


def uniform_init(bound: float) -> Callable:
    """Uniform between -bound and bound."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# The kernels and tables of TiTok's transformers and of the generators. The published code calls torch's
# `trunc_normal_(std=0.02)`. It cuts at -2 and 2, not at two deviations, so nothing is cut.
normal_002 = normal_init(0.02)


def float_images(images: jax.Array) -> jax.Array:
    """[..., 3] uint8, or float in [0, 1] -> float32 in [0, 1].

    Raises:
      ValueError: for another dtype.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255.0
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images have dtype {images.dtype}, expected uint8, or float in [0, 1]")
    return images.astype(jnp.float32)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, as in all published models; the tanh approximation differs by 5e-4."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.7071067811865476))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    """The derivative as one array of x's dtype, which is all that is kept for the backward pass. JAX would keep four."""
    (x,), (slope,) = primals, tangents
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    below = 0.5 * (1.0 + jax.lax.erf(x32 * 0.7071067811865476))
    density = 0.3989422804014327 * jnp.exp(-0.5 * jnp.square(x32))
    return gelu(x), (below + x32 * density).astype(x.dtype) * slope


def split_key(key: jax.Array, num: int = 2) -> jax.Array:
    """Splits a key, or each of a vector of keys, into `num`: [num] or [num, B]."""
    return jax.random.split(key, num) if key.ndim == 0 else jax.vmap(lambda key: jax.random.split(key, num))(key).T


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity when `key` is None (evaluation) or the rate is 0. With keys [B], each row of x [B, ...]
    is drawn from its own, so the draws do not depend on the rows beside it."""
    if key is None or rate == 0.0:
        return x
    if key.ndim == 0:
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    else:
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(key)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def product(x: jax.Array) -> jax.Array:
    """Marks the result of a matrix product with weights, with its bias added. A layer keeps it if `remat` is "dots"."""
    return checkpoint_name(x, "product")


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis with float32 statistics. The default epsilon is torch's, not flax's.

    For the backward pass it keeps its input only, and not the six float32 arrays that JAX would keep.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.checkpoint(super().__call__, prevent_cse=False)(x)


class Attention(nnx.Module):
    """Multi-head self-attention. The kernel of `qkv` has the shape [D, 3, D], so that sharding does not split heads."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qkv_init: Callable | None = None,
        dropout_rate: float = 0.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`qkv_init` None is Xavier's uniform over the fused [3 D, D] matrix, as in torch's MultiheadAttention."""
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        setting()  # so that a wrong one is known before anything is computed
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        qkv_init = qkv_init or uniform_init((6.0 / (width + 3 * width)) ** 0.5)
        self.qkv = nnx.LinearGeneral(width, (3, width), use_bias=qkv_bias, kernel_init=qkv_init, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(width, width, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def heads(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [B, L, D] -> the attended values [B, L, D], before the output projection."""
        drop = None
        if key is not None and self.dropout_rate > 0.0:
            drop = functools.partial(dropout, rate=self.dropout_rate, key=key)
        return attention(product(self.qkv(x)), self.num_heads, drop=drop)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return product(self.proj(self.heads(x, key)))


class MLP(nnx.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, hidden, kernel_init=normal_002, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(product(self.fc1(x))))


class PreNormBlock(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). With `skip`, x is first Linear([x, skip]), the long skip of U-ViT."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        qkv_bias: bool = True,
        qkv_init: Callable | None = None,
        skip: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if skip:
            self.skip_linear = nnx.Linear(2 * width, width, kernel_init=normal_002, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias, qkv_init=qkv_init, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, skip: jax.Array | None = None, *, key: jax.Array | None = None) -> jax.Array:
        """x, skip [B, L, D] -> [B, L, D]. `key` is unused (these blocks have no dropout); `run_stack` passes it."""
        del key
        if skip is not None:
            x = product(self.skip_linear(jnp.concatenate([x, skip], axis=-1)))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def make_stack(make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` blocks as one module whose parameters have a leading layer axis. Run it with `run_stack`."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs):
        return make_block(rngs)

    return create(rngs)


# What a layer keeps of its forward pass for its backward pass ("remat"): all that JAX keeps; what attention gives, what is
# marked as `product`, and its input; or its input alone. It computes the rest again.
REMAT = ("none", "dots", "full")
_keeps = jax.checkpoint_policies
_POLICIES = {"dots": _keeps.save_only_these_names(CHECKPOINT_NAME, "product"), "full": None}

# Where layers are better run as a loop. docs/performance.md has what the other form takes to compile, and what it saves.
SCANNED = ("cpu", "tpu")


def check_remat(remat: str, name: str = "remat") -> None:
    """Raises ValueError unless `remat` is one of `REMAT`."""
    if remat not in REMAT:
        raise ValueError(f"{name} is {remat!r}, expected 'none', 'dots' or 'full'")


def run_stack(
    stack: nnx.Module,
    x: jax.Array,
    *,
    key: jax.Array | None = None,
    skips: jax.Array | None = None,
    remat: str = "none",
    scan: bool | None = True,
) -> tuple[jax.Array, jax.Array]:
    """Runs x [B, L, D] through a stack of n blocks.

    `key` is a dropout key, or one per row [B]; it is split into one for each layer. `skips` [n, B, L, D] holds a second
    input for each layer. Returns the last output and the outputs of all layers [n, B, L, D], which cost nothing if they are
    not used.

    Args:
      remat: what a layer keeps for the backward pass, one of `REMAT`.
      scan: run the layers as one loop, which compiles like one layer. Otherwise the program repeats the layer n times: it is
        faster, but takes longer to compile. None is a loop on the platforms in `SCANNED`.
    """
    graphdef, params = nnx.split(stack)
    num_layers = jax.tree.leaves(params)[0].shape[0]

    def body(x, layer):
        params, key, skip = layer
        params = sharding.hint_gathered(params, x.dtype)
        x = sharding.hint(nnx.merge(graphdef, params)(sharding.hint(x, "batch"), skip, key=key), "batch")
        return x, x

    if scan is None:
        scan = target_platform() in SCANNED
    if remat != "none":
        # Outside a loop the compiler would find that both passes compute the same, and keep it.
        body = jax.checkpoint(body, prevent_cse=not scan, policy=_POLICIES[remat])
    elif sharding.gathers():  # otherwise each device would keep the kernels of all layers
        body = jax.checkpoint(body, prevent_cse=not scan, policy=_keeps.save_anything_except_these_names(sharding.GATHERED))
    keys = None if key is None else split_key(key, num_layers)
    return jax.lax.scan(body, x, (params, keys, skips), unroll=not scan)


def group_norm_two_pass(x, scale, bias, *, groups: int, epsilon: float) -> jax.Array:
    """GroupNorm over [B, H, W, C] by the textbook formula."""
    b, h, w, c = x.shape
    g = x.astype(jnp.float32).reshape(b, h * w, groups, c // groups)
    mean = g.mean((1, 3), keepdims=True)
    var = jnp.square(g - mean).mean((1, 3), keepdims=True)
    g = (g - mean) * jax.lax.rsqrt(var + epsilon)
    return (g.reshape(b, h, w, c) * scale + bias).astype(x.dtype)


def group_norm_affine(x, scale, bias, *, groups: int, epsilon: float) -> jax.Array:
    """The same from per-channel sums, applied as one multiply and add per element. It is twice as fast on a CPU.
    The variance is E[x^2] - E[x]^2, so it loses digits if the mean is large compared with the deviation."""
    per_group = x.shape[-1] // groups
    x32 = x.astype(jnp.float32)
    mean = x32.mean((1, 2)).reshape(-1, groups, per_group).mean(-1)
    square = jnp.square(x32).mean((1, 2)).reshape(-1, groups, per_group).mean(-1)
    inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + epsilon)
    a = jnp.repeat(inverse, per_group, -1) * scale
    b = bias - jnp.repeat(mean, per_group, -1) * a
    return (x32 * a[:, None, None] + b[:, None, None]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """GroupNorm over [B, H, W, C] with float32 statistics."""

    def __init__(self, channels: int, *, groups: int = 32, epsilon: float, rngs: nnx.Rngs):
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (channels,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        form = group_norm_affine if target_platform() == "cpu" else group_norm_two_pass
        # In the networks that use GroupNorm, every convolution comes before or after one.
        x = sharding.hint(x, "batch")
        x = form(x, self.scale[...], self.bias[...], groups=self.groups, epsilon=self.epsilon)
        return sharding.hint(x, "batch")
