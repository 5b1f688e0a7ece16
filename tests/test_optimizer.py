"""titok_jax/optimizer.py against torch's AdamW, clipping and the published schedules and EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import compare, load, load_json, published_shapes

from titok_jax.models import tables
from titok_jax.training import optimizer
from titok_jax.weights import convert


@pytest.fixture(scope="module")
def golden():
    return load("training/losses.npz")


def assert_schedule(schedule, want):
    got = np.array(jax.jit(jax.vmap(schedule))(jnp.arange(len(want), dtype=jnp.int32)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)  # update 0 is exactly 0


def test_cosine_schedule(golden):
    """Covers the warm-up and steps beyond the end, where the rate rises again."""
    schedule = optimizer.cosine_schedule(1e-4, end_lr=1e-5, warmup_steps=10, total_steps=100)
    assert_schedule(schedule, golden["lr/cosine_used_by_update_f64"])
    assert_schedule(schedule, golden["lr/cosine_4proc_gen_f64"])  # several processes change nothing


def test_cosine_schedule_of_discriminator(golden):
    """The discriminator's schedule counts its own updates. Several processes shift its end (a published peculiarity)."""
    schedule = optimizer.cosine_schedule(1e-4, end_lr=1e-5, warmup_steps=10, total_steps=100 - 20)
    assert_schedule(schedule, golden["lr/cosine_disc_start20_f64"])
    schedule = optimizer.cosine_schedule(1e-4, end_lr=1e-5, warmup_steps=10, total_steps=100 - 20 / 4)
    assert_schedule(schedule, golden["lr/cosine_4proc_disc_f64"])


def test_long_cosine_schedule_to_zero():
    """Against float64, for the published number of steps. The schedule ends at 0, where float32 cosines would cancel."""
    schedule = optimizer.cosine_schedule(1e-4, end_lr=0.0, warmup_steps=10_000, total_steps=1_000_000)
    steps = np.array([9_999, 10_000, 500_000, 990_000, 999_000, 999_999], np.int32)
    progress = (steps.astype(np.float64) - 10_000) / 990_000
    want = 1e-4 * np.where(steps < 10_000, steps / 10_000, np.cos(0.5 * np.pi * progress) ** 2)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), want, rtol=1e-6)


def test_constant_schedule(golden):
    assert_schedule(optimizer.constant_schedule(1e-4, warmup_steps=10), golden["lr/constant_used_by_update_f64"])
    assert_schedule(optimizer.constant_schedule(3e-4), np.full(3, 3e-4))


def adamw_trajectory(tx, start, grads):
    """Parameters after each update."""

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update({"w": grad}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["w"]

    params = {"w": jnp.asarray(start)}
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(grads))[1])()


def test_adamw(golden):
    """Four updates of torch's AdamW at rates 0, 1e-3, 2e-3, 3e-3. The first one changes only the moments."""
    tx = optimizer.adamw(lambda k: 1e-3 * k, b1=0.9, b2=0.99, weight_decay=0.05, decay_mask={"w": True})
    got = adamw_trajectory(tx, golden["adamw/start"], golden["adamw/grads"])
    np.testing.assert_array_equal(got[0], golden["adamw/start"])
    # Both round the parameters to float32 at every update: a few ulp of the largest value, 1.8.
    compare(golden, "adamw/params", got, 1e-6)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.9, 0.96), (0.0, 0.99)])
def test_adamw_against_float64(b1, b2):
    """Parameters start at 0, so that their rounding does not hide errors of the update. Gradients are tiny and large."""
    grads = np.random.default_rng(0).standard_normal((20, 3, 4)) * 10.0 ** np.arange(-9, 3).reshape(3, 4)
    grads = grads.astype(np.float32).astype(np.float64)
    m = v = p = np.zeros((3, 4))
    want = []
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p * (1 - 1e-3 * 0.1) - 1e-3 * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        want.append(p)
    tx = optimizer.adamw(lambda k: 1e-3, b1=b1, b2=b2, weight_decay=0.1, decay_mask={"w": True})
    got = adamw_trajectory(tx, np.zeros((3, 4), np.float32), grads.astype(np.float32))
    # A few ulp of the largest. Optax's own float32 bias correction is off by 8e-6 here for b2 = 0.999.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)


def test_adamw_mask_and_abstract_state():
    """The mask exempts parameters from decay. The state is a plain pytree with the parameters' shapes."""
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    mask = {"a": {"kernel": True, "bias": False}}
    tx = optimizer.adamw(lambda k: 0.5, b1=0.9, b2=0.99, weight_decay=0.1, decay_mask=mask)
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(abstract)) == [(), (), (2, 3), (2, 3), (3,), (3,)]
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.05 * np.ones((2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(updates["a"]["bias"], np.zeros(3))


@pytest.mark.parametrize("case", ["big", "small"])
def test_clip(golden, case):
    grads = {"a": golden["clip/in_0"], "b": {"c": golden["clip/in_1"]}}
    grads = jax.tree.map(lambda g: jnp.asarray(g) * (1.0 if case == "big" else 0.01), grads)
    clipped, norm = jax.jit(optimizer.clip_by_global_norm, static_argnums=1)(grads, 1.0)
    # A float32 sum of 22 squares, and two products.
    compare(golden, f"clip/{case}_norm", norm, 3e-7)
    compare(golden, f"clip/{case}_0", clipped["a"], 3e-7)
    compare(golden, f"clip/{case}_1", clipped["b"]["c"], 3e-7)


def test_clip_divisor():
    """torch adds 1e-6 to the norm, which shows where the gradient is that small."""
    clipped, norm = optimizer.clip_by_global_norm({"a": jnp.array([2e-6, 0.0])}, 1e-6)
    np.testing.assert_allclose(norm, 2e-6, rtol=1e-6)
    np.testing.assert_allclose(clipped["a"][0], 2e-6 / 3, rtol=1e-6)


def test_ema_decay(golden):
    """The published counter is ahead of ours by one."""
    steps = jnp.asarray(golden["ema/optimization_step"]) - 1
    got = jax.jit(jax.vmap(optimizer.ema_decay))(steps)
    np.testing.assert_allclose(got, golden["ema/decay_at_f64"], rtol=5e-7)  # a few ulp
    np.testing.assert_allclose([optimizer.ema_decay(k) for k in range(5)], golden["ema/decay_f64"], rtol=5e-7)
    assert jax.jit(optimizer.ema_decay, static_argnums=1)(10**6, 0.9999) == np.float32(0.9999)


def test_ema_update(golden):
    ema = {"w": jnp.asarray(golden["ema/start"])}
    for step, params in enumerate(golden["ema/params"]):
        ema = jax.jit(optimizer.ema_update)(ema, {"w": params}, step)
        # Each update rounds the difference once.
        np.testing.assert_allclose(ema["w"], golden["ema/shadow"][step], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["stage1", "stage2", "single_stage_vae", "generator", "generator_uvit"])
def test_no_decay_words(name):
    """For every kind of model, the two groups of the published optimizer, by published name and rank."""
    golden = load_json(f"training/{name}_steps.json")
    disc = {"discriminator." + n: shape for n, shape in published_shapes("shapes/discriminator.json").items()}
    groups = [("", golden["shapes"])] + ([("disc_", disc)] if "disc_decay" in golden else [])
    for prefix, shapes in groups:
        names = golden[prefix + "no_decay"] + golden[prefix + "decay"]
        params = {n.replace(".", "/"): jax.ShapeDtypeStruct(tuple(shapes[n]), jnp.float32) for n in names}
        table = [tables.Rule(path, path.replace("/", ".")) for path in params]
        mask = convert.flatten(convert.decay_mask(table, convert.unflatten(params), optimizer.NO_DECAY_WORDS))
        assert {path.replace("/", ".") for path, decays in mask.items() if decays} == set(golden[prefix + "decay"])


def test_plain_ema_is_the_weighted_mean_of_all_it_saw():
    """In closed form: the first value has weight decay^n, and the value of update k has (1 - decay) decay^(n - k)."""
    rng = np.random.default_rng(0)
    start, seen = rng.standard_normal((1, 5)), rng.standard_normal((6, 5))
    ema = jnp.asarray(start[0], jnp.float32)
    for step, params in enumerate(seen):
        ema = optimizer.ema_update(ema, jnp.asarray(params, jnp.float32), jnp.int32(step), optimizer.constant_decay(0.9))
    weights = np.concatenate([[0.9**6], 0.1 * 0.9 ** np.arange(5, -1, -1.0)])
    np.testing.assert_allclose(ema, weights @ np.concatenate([start, seen]), rtol=1e-5, atol=1e-6)


def test_a_first_moment_in_bfloat16_changes_the_state_and_little_else():
    """The update uses the moment before it is rounded, so the first step is the same and later ones differ by rounding."""
    params = {"w": jnp.linspace(-1.0, 1.0, 64)}
    options = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0, "decay_mask": {"w": False}}
    both = [optimizer.adamw(lambda k: 1.0, mu_dtype=dtype, **options) for dtype in ("float32", "bfloat16")]
    states = [tx.init(params) for tx in both]
    for step in range(5):
        grads = {"w": jnp.cos((step + 1) * jnp.arange(64.0))}
        results = [tx.update(grads, state, params) for tx, state in zip(both, states, strict=True)]
        states = [state for _, state in results]
        one, other = (np.asarray(updates["w"]) for updates, _ in results)
        if step == 0:
            np.testing.assert_array_equal(one, other)
        else:  # the former moment, at most 1 here, is rounded to 8 bits and divided by the root of the second
            assert 0 < np.abs(one - other).max() < 0.05
    assert [state[0].mu["w"].dtype for state in states] == [jnp.float32, jnp.bfloat16]
    with pytest.raises(ValueError, match="mu_dtype is 'float16', expected 'float32' or 'bfloat16'"):
        optimizer.OptimizerConfig(1e-3, "constant", 0, 0.9, 0.99, 0.0, 1.0, mu_dtype="float16")
