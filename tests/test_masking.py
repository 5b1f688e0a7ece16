"""titok_jax/masking.py against the counts and masks that the published training drew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import load

from titok_jax.training import masking


@pytest.fixture(scope="module")
def golden():
    return load("training/losses.npz")


@pytest.mark.parametrize("num_tokens", [8, 32, 64, 128, 256])
def test_num_masked(golden, num_tokens):
    """Exactly the published counts, also at u = 0, 1e-7, 0.5, 0.9999999 and 1 - 2^-24."""
    got = jax.jit(masking.num_masked, static_argnums=1)(golden[f"masking/{num_tokens}/timesteps"], num_tokens)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, golden[f"masking/{num_tokens}/num_masked"])


@pytest.mark.parametrize("num_tokens", [8, 32])
def test_mask_tokens(golden, num_tokens):
    case = f"masking/{num_tokens}/"
    tokens = np.random.default_rng(0).integers(0, 64, golden[case + "mask"].shape)
    masked, mask = masking.mask_tokens(tokens, golden[case + "timesteps"], golden[case + "order_uniforms"], 64)
    np.testing.assert_array_equal(mask, golden[case + "mask"])
    np.testing.assert_array_equal(masked, np.where(golden[case + "mask"], 64, tokens))


def test_random_mask_tokens():
    """The share of masked tokens follows the schedule: for arccos, E[ratio] = 2/pi. Every position is equally likely."""
    rows, n = 4096, 16
    tokens = jnp.zeros((rows, n), jnp.int32)
    masked, mask = jax.jit(lambda key: masking.random_mask_tokens(key, tokens, 7))(jax.random.key(0))
    np.testing.assert_array_equal(masked, np.where(mask, 7, 0))
    # Over u the ratio has mean 2/pi = 0.637 and variance (pi - 3) 4/pi^2 = 0.0574: standard error 0.0037 over 4096 rows.
    assert abs(mask.mean() - 2 / np.pi) < 4 * 0.0037
    # The share of a position is binomial with standard error 0.0075.
    assert np.abs(mask.mean(0) - 2 / np.pi).max() < 4.5 * 0.0075
    _, other = masking.random_mask_tokens(jax.random.key(1), tokens, 7)
    assert not np.array_equal(mask, other)


def test_schedules():
    """All schedules are 1 at time 0, fall, and end at (nearly) 0. Their values at 1/2 follow from their formulas."""
    u = jnp.linspace(0.0, 1.0, 101)
    half = {"arccos": 2 / 3, "cosine": 0.5**0.5, "linear": 0.5, "root": 1 - 0.5**0.5}
    assert set(half) == set(masking.SCHEDULES)
    for name, value in half.items():
        ratio = masking.mask_ratio(u, name)
        assert ratio[0] == 1
        assert ratio[-1] <= 2e-6
        assert (jnp.diff(ratio) < 0).all()
        np.testing.assert_allclose(ratio[50], value, rtol=1e-6)  # a few float32 roundings
    with pytest.raises(ValueError, match="expected one of"):
        masking.mask_ratio(u, "sine")
