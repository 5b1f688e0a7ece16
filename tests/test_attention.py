"""The forms of attention against the formula and against each other, and which one is used where."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from titok_jax.models import attention
from titok_jax.weights import known_models

ROOT = pathlib.Path(__file__).parents[1]
RNG = np.random.default_rng(0)
FORMS = (attention.attention_plain, attention.attention_by_image, jax.nn.dot_product_attention)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def separate(qkv, num_heads):
    """[B, L, 3, D] -> query, key and value [B, L, H, d]."""
    b, length, _, width = qkv.shape
    return [qkv[:, :, i].reshape(b, length, num_heads, width // num_heads) for i in range(3)]


def plain(qkv, num_heads):
    return attention.attention_plain(*separate(qkv, num_heads)).reshape(*qkv.shape[:2], -1)


def test_forms_agree():
    qkv = normal(3, 130, 3, 64)
    q, k, v = separate(qkv, 4)
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k) / 4.0
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    for form in FORMS:
        np.testing.assert_allclose(jax.jit(form)(q, k, v), expected, atol=6e-6)
    ours = jax.jit(attention.attention, static_argnums=1)(qkv, 4)
    np.testing.assert_allclose(ours, expected.reshape(3, 130, 64), atol=6e-6)


def test_gradients_agree():
    q, k, v = (normal(2, 130, 2, 8) for _ in range(3))
    grads = [
        jax.jit(jax.grad(lambda q, k, v, form=form: jnp.sum(form(q, k, v) ** 2), argnums=(0, 1, 2)))(q, k, v)
        for form in (attention.attention_plain, attention.attention_by_image)
    ]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def check_in_bfloat16(form, batch, length, num_heads, head):
    """The output of a form and its gradient are those of float32. Rounding to 8 bits, also of probabilities, gives errors of
    0.3 %. One position too many would take 1 / length of the sum of the outputs. Their values are positive, so that
    rounding cancels."""
    rng, width = np.random.default_rng(length), num_heads * head
    qkv = rng.standard_normal((batch, length, 3, width))
    qkv[:, :, 2] = np.abs(qkv[:, :, 2])
    qkv, weights = jnp.asarray(qkv, jnp.bfloat16), jnp.asarray(rng.standard_normal((batch, length, width)), jnp.bfloat16)

    def outputs(form, qkv):
        out, backward = jax.vjp(lambda qkv: form(qkv, num_heads), qkv)
        return out, *jnp.moveaxis(backward(weights.astype(out.dtype))[0], 2, 0)

    ours = jax.jit(functools.partial(outputs, form))(qkv)
    with jax.default_matmul_precision("highest"):
        exact = outputs(plain, qkv.astype(jnp.float32))
    for name, a, b in zip(("output", "query", "key", "value"), ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert a.shape == b.shape
        error = np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b)
        golden_data.within(error, 1e-2, f"error {error} of {name}")
    np.testing.assert_allclose(np.float64(ours[0]).sum(), np.float64(exact[0]).sum(), rtol=0.3 / length)


@pytest.mark.parametrize("length", [129, 130])
def test_bfloat16_on_this_machine(length):
    check_in_bfloat16(attention.attention, 2, length, 2, 64)


in_rows = functools.partial(attention.attention_rows, interpret=True)


@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "head"),
    [(1, 289, 2, 64), (3, 33, 2, 48), (1, 1089, 1, 64)],
    ids=["two heads in a tile", "three images in a program, narrow", "rows in parts"],
)
def test_the_kernel(batch, length, num_heads, head):
    check_in_bfloat16(in_rows, batch, length, num_heads, head)


def shapes():
    """{(length, elements per head)} of all published models, and of those for 512 pixels."""
    found = {(1024 + 1 + number, 64) for number in (64, 128)}
    for config in known_models.known_configs().values():
        if hasattr(config, "num_heads"):
            found.add((config.num_tokens + 1, config.hidden_size // config.num_heads))
        elif hasattr(config, "encoder"):
            length = (config.image_size // config.patch_size) ** 2 + 1 + config.num_latent_tokens
            found |= {(length, size.width // size.num_heads) for size in (config.encoder, config.decoder)}
    return sorted(found)


@pytest.mark.long
@pytest.mark.parametrize("shape", [*shapes(), (17, 32), (130, 96), (200, 128)], ids=str)
def test_the_kernel_with_every_published_shape(shape):
    """And with the narrowest and widest heads. As many heads as fill tiles, and as many again."""
    length, head = shape
    check_in_bfloat16(in_rows, 2 if length < 600 else 1, length, 16 if head == 48 else 256 // head, head)


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_the_kernel_can_be_lowered_for_a_tpu(shape):
    """With every published shape, forward and backward, to the form that the TPU compiler takes. tests/test_compile.py calls
    that compiler."""
    length, head = shape
    qkv = jax.ShapeDtypeStruct((16, length, 3, 384 if head == 48 else 256), jnp.bfloat16)

    def loss(qkv):
        return attention.attention_rows(qkv, qkv.shape[-1] // head).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss)).trace(qkv).lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("tpu_custom_call") == 1  # the gradient of a sum needs no output
    assert "flops" in lowered


def test_published_shapes():
    assert {(33, 48), (65, 48), (129, 64), (289, 64), (321, 64), (385, 64), (513, 64)} < {*shapes()}


def test_the_kernel_can_be_mapped_and_checkpointed():
    qkv = jnp.asarray(normal(2, 2, 17, 3, 64), jnp.bfloat16)
    function = functools.partial(in_rows, num_heads=2)
    name = attention.CHECKPOINT_NAME

    def loss(form, x):
        def block(x):
            return jnp.sin(jax.ad_checkpoint.checkpoint_name(form(x), name).astype(jnp.float32))

        policy = jax.checkpoint_policies.save_only_these_names(name)
        return jax.checkpoint(block, policy=policy)(x).sum()

    gradient = jax.grad(functools.partial(loss, jax.vmap(function)))
    expected = jax.grad(functools.partial(loss, lambda x: plain(x.reshape(4, 17, 3, 64), 2)))(qkv)
    np.testing.assert_allclose(np.float32(jax.jit(gradient)(qkv)), np.float32(expected), atol=4e-2)
    kernels = re.findall(r"name=(\w+_kernel)", str(jax.make_jaxpr(gradient)(qkv)))
    assert kernels == ["forward_kernel", "backward_kernel"]  # the output is kept, so the first does not run again


def test_the_kernel_has_no_forward_mode_derivative():
    """As docs/library.md says."""
    qkv = jnp.zeros((1, 17, 3, 64), jnp.bfloat16)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(in_rows, num_heads=2), (qkv,), (qkv,))


_ON_A_MESH = """
import functools, json
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from titok_jax.models import attention
from titok_jax.runtime import sharding

attention.target_platform, attention._SHORTEST = (lambda: "tpu"), 16
calls, kernel = [], attention.attention_rows

def rows(qkv, num_heads, spec):
    calls.append(str(spec).replace("PartitionSpec", "P"))
    return kernel(qkv, num_heads, spec, interpret=True)

attention.attention_rows = rows
qkv = jax.random.normal(jax.random.key(0), (16, 17, 3, 128))
scale = jnp.ones((128,))

def mean(scale, qkv):
    out = attention.attention((sharding.hint(qkv, "batch") * scale).astype(jnp.bfloat16), 4)
    return jnp.square(out.astype(jnp.float32)).mean(), out

def step(apart, scale, qkv):
    function = functools.partial(sharding.apart_along_data, mean) if apart else mean
    return jax.value_and_grad(function, has_aux=True)(scale, qkv)

def run(apart, sizes, qkv=qkv):
    calls.clear()
    mesh = sizes and sharding.make_mesh(*sizes, devices=jax.devices())
    with sharding.on_mesh(mesh):
        placed = jax.device_put(qkv, sharding.batch_sharding(mesh)) if mesh else qkv
        done = jax.jit(functools.partial(step, apart))(scale, placed)
    return [np.float32(x) for x in jax.tree.leaves(done)], [*calls]

exact, found = run(False, None)
found = {"none": [0.0, found]}
for apart, sizes in ((False, (2, 2, 2)), (True, (2, 2, 2)), (True, (8, 1, 1))):
    arrays, used = run(apart, sizes)
    error = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(arrays, exact))
    found[f"{sizes} {apart}"] = [error, used]
found["heads"] = [0.0, run(False, (1, 1, 8))[1]]
print(json.dumps(found))
"""


def test_each_device_runs_the_kernel_on_its_images_and_heads():
    done = subprocess.run([sys.executable, "-c", _ON_A_MESH], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert all(error < 1e-2 for error, _ in found.values()), found
    assert {name: used for name, (_, used) in found.items()} == {
        "none": [],  # eight devices, and no mesh that says what each has
        "(2, 2, 2) False": ["P(('data', 'fsdp'), None, 'tensor')"],
        "(2, 2, 2) True": ["P('fsdp', None, 'tensor')"],
        "(8, 1, 1) True": ["P('fsdp', None, 'tensor')"],
        "heads": [],  # four heads, which eight devices cannot share
    }


def forms_used(monkeypatch, platform, *, devices=1, dtype=jnp.bfloat16, shape=(2, 129, 3, 128), heads=2, drop=None):
    """The form that `attention` calls, traced for a platform."""
    monkeypatch.setattr(attention, "target_platform", lambda: platform)
    monkeypatch.setattr(attention, "_has_flash", lambda: platform == "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    used = []
    for name in ("attention_rows", "attention_flash", "attention_plain", "attention_by_image"):
        zeros = jnp.zeros((*shape[:2], shape[-1])) if name == "attention_rows" else jnp.zeros((*shape[:2], heads, 64))
        monkeypatch.setattr(attention, name, lambda *a, name=name, zeros=zeros, **k: used.append(name) or zeros)
    jax.eval_shape(lambda x: attention.attention(x, heads, drop=drop), jax.ShapeDtypeStruct(shape, dtype))
    return used


def test_which_form_is_used(monkeypatch):
    used = functools.partial(forms_used, monkeypatch)
    monkeypatch.delenv(attention.SETTING, raising=False)
    assert used("tpu") == ["attention_rows"]
    assert used("tpu", dtype=jnp.float32) == []  # XLA's
    assert used("tpu", devices=4) == []
    assert used("tpu", shape=(2, 129, 3, 32)) == []  # 16 elements per head
    assert used("tpu", shape=(2, 33, 3, 128)) == []
    assert used("tpu", drop=lambda p: p) == ["attention_plain"]
    assert used("gpu") == ["attention_flash"]
    assert used("gpu", devices=2) == []
    assert used("gpu", shape=(2, 65, 3, 128)) == []
    assert used("cpu") == ["attention_plain"]
    assert used("cpu", dtype=jnp.float32) == ["attention_by_image"]
    monkeypatch.setenv(attention.SETTING, "kernel")
    assert used("gpu", devices=2) == ["attention_flash"]
    monkeypatch.setenv(attention.SETTING, "plain")
    assert used("tpu") == used("gpu") == []


def test_an_unknown_setting_is_refused_before_anything_is_computed(monkeypatch):
    from flax import nnx

    from titok_jax.models import layers

    monkeypatch.setenv(attention.SETTING, "fast")
    with pytest.raises(ValueError, match="TITOK_JAX_ATTENTION is 'fast', expected auto, plain or kernel"):
        layers.Attention(8, 2, rngs=nnx.Rngs(0))


def test_dropout_acts_on_the_probabilities():
    q, k, v = (
        normal(1, 5, 1, 4),
        normal(1, 5, 1, 4),
        np.broadcast_to(np.eye(5, dtype=np.float32)[None, :, None], (1, 5, 1, 5)),
    )
    # v is the identity, so the output is the probabilities.
    dropped = np.random.default_rng(0).random((1, 1, 5, 5)) < 0.5
    out = attention.attention_plain(q, k, v, drop=lambda p: jnp.where(dropped, 0, 2 * p))
    whole = 2 * np.asarray(attention.attention_plain(q, k, v))
    np.testing.assert_allclose(out, np.where(dropped[:, 0, :, None], 0, whole), rtol=1e-6)
