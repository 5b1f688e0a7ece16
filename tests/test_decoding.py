"""titok_jax/decoding.py against the published loop's ids after every step and against a second version of that loop in
numpy; its noise against the Gumbel method."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import load, load_json, seeded_model
from scipy import stats

from titok_jax.inference import decoding
from titok_jax.models import tables
from titok_jax.models.generator import GUIDANCE_SCHEDULES, GeneratorConfig, make_generator

K, CLASSES = 20, 5


def toy_weights():
    rng = np.random.default_rng(0)
    shapes = {"ids": (K + 1, 16), "labels": (CLASSES + 1, 16), "positions": (32, 16), "out": (16, K)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def toy_logits(w, ids, labels, xp=jnp):
    """A stand-in generator in numpy or jax: every logit depends on all ids of its image, on the position and the label."""
    x = w["ids"][ids]
    x = x + 2 * x.mean(1, keepdims=True) + w["labels"][labels][:, None] + w["positions"][: ids.shape[1]]
    return xp.tanh(x) @ w["out"]


def published_loop(logits_fn, labels, num_tokens, num_steps, scale, schedule, temperature, annealing, token_u, confidence_u):
    """The published loop in numpy: ids [S, B, N] and mask_len [S]. The first image sets mask_len for all."""

    def gumbel(u):
        return -np.log(np.maximum(-np.log(np.maximum(u, 1e-20)), 1e-20))

    ids = np.full((len(labels), num_tokens), K)
    trace, lengths, s = [], [], (scale if schedule == "constant" else 0.0)
    for step in range(num_steps):
        ratio = (step + 1) / num_steps
        cond, uncond = logits_fn(ids, labels), logits_fn(ids, np.full_like(labels, CLASSES))
        if schedule == "power-cosine":
            s = 1 + (scale - 1) * (1 - math.cos(math.pi * (step / num_steps) ** 3.0)) / 2
            logits = uncond + (cond - uncond) * s
        else:
            logits = cond + (cond - uncond) * s
        if schedule == "linear":
            s = ratio * scale
        if annealing:
            logits = logits / (0.5 + 0.8 * (1 - ratio))
        t = temperature * (1 - ratio)
        masked = ids == K
        new = np.argmax(logits + t * gumbel(token_u[step]), -1)
        new = np.where(masked, new, ids)
        chosen = np.take_along_axis(logits, np.minimum(new, K - 1)[..., None], -1)[..., 0]
        confidence = np.where(masked, chosen + t * gumbel(confidence_u[step]), np.inf)
        length = max(1, min(masked[0].sum() - 1, math.floor(num_tokens * math.acos(ratio) * 2 / math.pi)))
        cut_off = np.sort(confidence, -1)[:, length - 1 : length]
        ids = new if step == num_steps - 1 else np.where(confidence <= cut_off, K, new)
        trace.append(ids)
        lengths.append(length)
    return np.stack(trace), np.array(lengths)


def toy_decode(noise, labels, num_tokens=7, num_steps=4, scale=3.0, schedule="linear", temperature=2.0, annealing=True):
    w = jax.tree.map(jnp.asarray, toy_weights())
    return decoding.parallel_decode(
        lambda ids, labels: toy_logits(w, ids, labels),
        labels,
        num_tokens=num_tokens,
        codebook_size=K,
        num_classes=CLASSES,
        num_steps=num_steps,
        guidance_scale=scale,
        guidance_schedule=schedule,
        temperature=temperature,
        softmax_temperature_annealing=annealing,
        noise=noise,
    )


def uniforms(steps, batch, num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((steps, batch, num_tokens, K), np.float32), rng.random((steps, batch, num_tokens), np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.fixture(scope="module", params=["vit", "uvit"])
def generator(request):
    """A tiny generator: its configuration, its jitted forward pass and the published code's results."""
    name = f"tiny/tiny_{request.param}_generator"
    config = GeneratorConfig.from_published(load_json(f"{name}.config.json"))
    table = tables.vit_generator_table() if request.param == "vit" else tables.uvit_generator_table()
    graphdef, params = seeded_model(lambda: make_generator(config, rngs=nnx.Rngs(0)), table)
    params = jax.tree.map(jnp.asarray, params)
    forward = jax.jit(lambda ids, labels: nnx.merge(graphdef, params).logits(ids, labels))
    return config, forward, load(f"{name}.npz")


def decode_golden(generator, logits_fn, schedule, annealing, num_steps):
    """The settings and the noise of the golden traces."""
    config, _, golden = generator
    shape = (2, config.num_tokens, config.codebook_size)
    token_u, confidence_u = (
        np.stack([np.random.default_rng([1234, 2 * s + i]).random(size).astype(np.float32) for s in range(num_steps)])
        for i, size in enumerate((shape, shape[:2]))
    )
    return decoding.parallel_decode(
        logits_fn,
        jnp.asarray(golden["labels"], jnp.int32),
        num_tokens=config.num_tokens,
        codebook_size=config.codebook_size,
        num_classes=config.num_classes,
        num_steps=num_steps,
        guidance_scale=3.0,
        guidance_schedule=schedule,
        temperature=2.0,
        softmax_temperature_annealing=annealing == "annealing",
        noise=decoding.noise_from_uniforms(jnp.asarray(token_u), jnp.asarray(confidence_u)),
    )


def assert_trace(golden, case, out):
    np.testing.assert_array_equal(out.trace, golden[case], err_msg=case)
    np.testing.assert_array_equal(out.ids, golden[case][-1], err_msg=case)
    np.testing.assert_array_equal(out.mask_len, np.repeat(golden[case + ".mask_len"][:, None], 2, 1), err_msg=case)


@pytest.mark.parametrize("annealing", ["annealing", "plain"])
@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_golden_traces(generator, schedule, annealing):
    """The ids after every step, for 1, 4 and 8 steps, exactly. The closest choice in these runs had a margin of 6e-3. Only
    the forward pass is compiled here: 36 compiled loops would take minutes."""
    _, forward, golden = generator

    def logits_fn(ids, labels):
        with jax.disable_jit(False):
            return forward(ids, labels)

    for num_steps in (1, 4, 8):
        with jax.disable_jit():
            out = decode_golden(generator, logits_fn, schedule, annealing, num_steps)
        assert_trace(golden, f"trace.{schedule}.{annealing}.{num_steps}", out)


def test_golden_trace_compiled(generator):
    """The same, compiled as one program."""
    _, forward, golden = generator
    out = jax.jit(lambda: decode_golden(generator, forward, "linear", "annealing", 8))()
    assert_trace(golden, "trace.linear.annealing.8", out)


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
@pytest.mark.parametrize(("num_tokens", "num_steps", "annealing"), [(12, 5, True), (4, 9, False), (1, 2, True)])
def test_against_numpy(schedule, num_tokens, num_steps, annealing):
    """Three images; fewer and more steps than tokens; guidance on and off."""
    w, labels, u = toy_weights(), np.array([4, 0, 2]), uniforms(num_steps, 3, num_tokens)

    @jax.jit
    def decode(scale, u):
        noise = decoding.noise_from_uniforms(*u)
        return toy_decode(noise, jnp.asarray(labels), num_tokens, num_steps, scale, schedule, 1.5, annealing)

    for scale in (2.5, 0.0):
        want, lengths = published_loop(
            lambda i, y: toy_logits(w, i, y, np), labels, num_tokens, num_steps, scale, schedule, 1.5, annealing, *u
        )
        got = decode(scale, u)
        np.testing.assert_array_equal(got.trace, want)
        np.testing.assert_array_equal(got.mask_len, np.repeat(lengths[:, None], 3, 1))
        assert got.ids.dtype == got.trace.dtype == jnp.int32


def test_ties_and_extreme_noise():
    """Equal confidences are masked together, and u = 0 and 1 give finite values, as in the published loop for one image."""
    w, labels, u = toy_weights(), np.array([1]), uniforms(6, 1, 6)
    u[1][:, :, 2:5] = u[1][:, :, 2:3]
    u[0][:, :, 1, 3], u[0][:, :, 0, :] = 1.0, 0.0
    flat = {**w, "out": 0 * w["out"]}  # all logits are equal
    args = 6, 6, 2.0, "constant", 1.5, True
    want, lengths = published_loop(lambda i, y: toy_logits(flat, i, y, np), labels, *args, *u)
    got = decoding.parallel_decode(
        lambda ids, labels: jnp.zeros((*ids.shape, K)),
        jnp.asarray(labels),
        num_tokens=6,
        codebook_size=K,
        num_classes=CLASSES,
        num_steps=6,
        guidance_scale=2.0,
        guidance_schedule="constant",
        temperature=1.5,
        softmax_temperature_annealing=True,
        noise=decoding.noise_from_uniforms(*map(jnp.asarray, u)),
    )
    assert ((want == K).sum(-1) > lengths[:, None])[:-1].any(), "the ties were meant to mask more than mask_len"
    np.testing.assert_array_equal(got.trace, want)
    np.testing.assert_array_equal(got.mask_len[:, 0], lengths)


@pytest.mark.parametrize(
    ("schedule", "scale", "sizes"),
    [
        ("constant", 0.0, [2, 2, 2]),
        ("constant", 3.0, [4, 4, 4]),
        ("linear", 3.0, [2, 4, 4]),
        ("power-cosine", 3.0, [2, 4, 4]),
        ("power-cosine", 1.0, [2, 2, 2]),
    ],
)
def test_forwards(schedule, scale, sizes):
    """Each step runs one forward pass of 2 B images, or of B where guidance has no effect. They are counted as they run."""
    w, ran = jax.tree.map(jnp.asarray, toy_weights()), []

    def logits_fn(ids, labels):
        jax.debug.callback(lambda x: ran.append(len(x)), labels)
        return toy_logits(w, ids, labels)

    @jax.jit
    def decode(scale):
        return decoding.parallel_decode(
            logits_fn,
            jnp.array([1, 2]),
            num_tokens=7,
            codebook_size=K,
            num_classes=CLASSES,
            num_steps=3,
            guidance_scale=scale,
            guidance_schedule=schedule,
            temperature=1.0,
            softmax_temperature_annealing=True,
            noise=decoding.noise_from_uniforms(*map(jnp.asarray, uniforms(3, 2, 7))),
        )

    jax.block_until_ready(decode(scale))
    jax.effects_barrier()
    assert ran == sizes


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_nothing_recompiles(schedule):
    """Labels, seeds, guidance scale (to 0 too) and temperature are data."""
    traces = 0

    @jax.jit
    def decode(keys, labels, scale, temperature):
        nonlocal traces
        traces += 1
        noise = decoding.noise_from_keys(keys)
        return toy_decode(noise, labels, scale=scale, schedule=schedule, temperature=temperature).ids

    def keys(seed):
        return jax.random.split(jax.random.key(seed), 2)

    first = decode(keys(0), jnp.array([1, 2]), 3.0, 2.0)
    changed = [
        decode(keys(0), jnp.array([3, 5]), 3.0, 2.0),
        decode(keys(1), jnp.array([1, 2]), 3.0, 2.0),
        decode(keys(0), jnp.array([1, 2]), 0.0, 2.0),
        decode(keys(0), jnp.array([1, 2]), 3.0, 0.0),
    ]
    assert traces == 1
    assert decode._cache_size() == 1
    for ids in changed:
        assert not np.array_equal(ids, first)
    np.testing.assert_array_equal(decode(keys(0), jnp.array([1, 2]), 3.0, 2.0), first)


def test_image_does_not_depend_on_its_batch():
    """The same key and label give the same image, alone, in a batch, and in another order."""
    keys, labels = jax.random.split(jax.random.key(3), 5), jnp.array([0, 1, 2, 1, 5])

    @jax.jit
    def decode(keys, labels):
        return toy_decode(decoding.noise_from_keys(keys), labels, num_tokens=12, num_steps=5)

    together = decode(keys, labels)
    for i in range(5):
        np.testing.assert_array_equal(decode(keys[i : i + 1], labels[i : i + 1]).trace[:, 0], together.trace[:, i])
    order = np.array([4, 2, 0, 1, 3])
    np.testing.assert_array_equal(decode(keys[order], labels[order]).ids, together.ids[order])
    # Two images with one label differ by their keys.
    assert not np.array_equal(together.ids[1], together.ids[3])


def test_keyed_noise_is_fresh():
    """Every step and every image has its own noise, and so do tokens and confidences."""
    noise = decoding.noise_from_keys(jax.random.split(jax.random.key(0), 2))
    draws = [noise(step, jnp.zeros((2, 50, 2)), 1.0) for step in (0, 1)]
    rows = [np.asarray(x[image]) for tokens, gumbel in draws for x in (tokens, gumbel < 0.3665) for image in (0, 1)]
    # The median of a Gumbel variable is 0.3665, so all rows are fair bits. Two rows from the same draw would agree or
    # disagree everywhere; independent rows agree in 25 +- 3.5 of 50.
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert 10 < (a == b).sum() < 40


def test_errors():
    noise = decoding.noise_from_keys(jax.random.split(jax.random.key(0), 2))
    labels = jnp.array([1, 2])
    with pytest.raises(ValueError, match="guidance schedule 'cosine'"):
        toy_decode(noise, labels, schedule="cosine")
    with pytest.raises(ValueError, match="num_steps is 0"):
        toy_decode(noise, labels, num_steps=0)
    with pytest.raises(ValueError, match=r"shape \(2, 7, 21\), expected \(2, 7, 20\)"):
        decoding.parallel_decode(
            lambda ids, labels: jnp.zeros((*ids.shape, K + 1)),
            labels,
            num_tokens=7,
            codebook_size=K,
            num_classes=CLASSES,
            num_steps=2,
            guidance_scale=0.0,
            guidance_schedule="constant",
            temperature=1.0,
            softmax_temperature_annealing=True,
            noise=noise,
        )
    for keys in (jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        with pytest.raises(ValueError, match="expected threefry keys"):
            decoding.noise_from_keys(keys)


# ---------------------------------------------------------------------------------------------------------------------
# The draws


@pytest.mark.parametrize("k", [2, 37, 64, 1000])
def test_inverse_cdf_has_the_distribution(k):
    """Many draws of either method pass a chi-square test against softmax(logits / T), for square K and others."""
    n, chunks, temperature = 80_000, 20, 1.7
    logits = 2 * jnp.asarray(np.random.default_rng(k).standard_normal(k).astype(np.float32))
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    p /= p.sum()

    def inverse(key):
        u = jax.random.uniform(key, (n // chunks,))
        return decoding.sample_inverse_cdf(jnp.broadcast_to(logits, (*u.shape, k)), temperature, u)

    def plain(key):
        return decoding.sample_gumbel(logits, temperature, jax.random.uniform(key, (n // chunks, k)))

    for draw in (inverse, plain):
        keys = jax.random.split(jax.random.key(k), chunks)
        counts = np.bincount(jax.jit(lambda keys, draw=draw: jax.lax.map(draw, keys))(keys).reshape(-1), minlength=k)
        # Chi-square needs large expected counts, so the rarest tokens are merged until 10 draws of them are expected.
        order = np.argsort(p)
        rare = max(1, int(np.searchsorted(np.cumsum(p[order]) * n, 10.0)))
        observed, expected = (np.append(x[order[rare:]], x[order[:rare]].sum()) for x in (counts, p * n))
        # The seeds are fixed, so this never fails by chance.
        assert stats.chisquare(observed, expected).pvalue > 1e-3, draw.__name__


def test_inverse_cdf_against_float64_quantiles():
    """Each uniform gives the token whose cumulative probability passes it, with blocks or without."""
    k = 1000
    logits = 3 * np.random.default_rng(1).standard_normal(k).astype(np.float32)
    u = np.concatenate([np.linspace(0, 1, 4000, endpoint=False), [1 - 2.0**-23, 1 - 2.0**-24]]).astype(np.float32)
    p = np.exp(logits.astype(np.float64) / 0.7)
    cdf = np.cumsum(p / p.sum())
    got = jax.jit(decoding.sample_inverse_cdf)(jnp.broadcast_to(jnp.asarray(logits), (len(u), k)), 0.7, jnp.asarray(u))
    # Within the rounding of float32 sums either neighbour may be drawn; elsewhere only the exact token.
    lower, upper = cdf[got] - p[got] / p.sum(), cdf[got]
    assert (lower <= u + 1e-6).all()
    assert (upper >= u - 1e-6).all()
    assert (p[got] > 0).all()
    exact = np.searchsorted(cdf, u, side="right")
    assert (got == np.minimum(exact, k - 1)).mean() > 0.995


@pytest.mark.parametrize("k", [37, 64])
def test_inverse_cdf_never_draws_the_impossible(k):
    """Tokens of probability 0 (single, at the end of a block, whole blocks, padding) are never drawn. That holds for the
    largest uniform too, and on the border of two blocks, where a block's sum and the running sum within it disagree."""
    rows = 20_000
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, k)).astype(np.float32)
    possible = rng.random(k) < 0.7
    possible[6:8], possible[5], possible[16:24], possible[29:] = False, True, False, False  # blocks are of 8
    logits[:, ~possible] = -np.inf
    p = np.exp(logits)
    border = p[:, :8].sum(1) / p.sum(1)
    for u in (np.full(rows, 1 - 2.0**-23), border, np.nextafter(border, 0), np.zeros(rows)):
        got = jax.jit(decoding.sample_inverse_cdf)(logits, 1.0, u.astype(np.float32))
        assert possible[np.asarray(got)].all()


def test_temperature_zero_is_argmax():
    """The uniforms do not matter. Of equal maxima the first is taken, as by argmax."""
    logits = np.random.default_rng(0).standard_normal((500, 37)).astype(np.float32)
    logits[::2, 20], logits[::2, 30] = 9.0, 9.0
    u = np.random.default_rng(1).random(500, np.float32)
    got = jax.jit(decoding.sample_inverse_cdf)(jnp.asarray(logits), 0.0, u)
    np.testing.assert_array_equal(got, logits.argmax(-1))


def test_keyed_decoding_has_the_distribution_of_the_published():
    """Whole decodings: each token ends at each position equally often with noise from keys and with the published noise."""
    n, tokens = 6000, 3
    labels = jnp.full(n, 2)
    u = uniforms(3, n, tokens, seed=5)
    decode = jax.jit(
        lambda noise_args, keyed: (
            toy_decode(
                (decoding.noise_from_keys if keyed else decoding.noise_from_uniforms)(*noise_args),
                labels,
                num_tokens=tokens,
                num_steps=3,
                scale=0.3,
                temperature=6.0,
            ).ids
        ),
        static_argnums=1,
    )
    keyed = np.asarray(decode((jax.random.split(jax.random.key(1), n),), True))
    plain = np.asarray(decode(u, False))
    for position in range(tokens):
        table = np.stack([np.bincount(ids[:, position], minlength=K) for ids in (keyed, plain)])
        table = table[:, table.sum(0) >= 20]
        assert table.shape[1] >= 5, "the test needs spread-out draws"
        assert stats.chi2_contingency(table).pvalue > 1e-3, position
