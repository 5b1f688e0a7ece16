"""The 13 published models at full size against the published code: its seeded weights, its inputs, its outputs.

Only one model at a time is in memory. By default one tokenizer and the original JAX VQGAN run. The rest is marked `parity`:
`make parity` runs all models and prints the rows of the table in docs/parity.md.

Bounds are relative to the largest magnitude of the array. The published code itself differs between float32 and float64
by 7e-7 for encoders, logits of generators and RGB images, by 9e-6 for the VQGAN's images and by 2.5e-5 for images of the
pixel decoder behind a TiTok. A float32 run with sums in another order may add as much again, and by chance a little more.
"""

import functools
import gc
import zlib
from collections.abc import Iterator, Mapping

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from titok_jax import models
from titok_jax.inference import decoding
from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig, tables
from titok_jax.weights import config_files, convert

ENCODER = 5e-6
LOGITS = 5e-6  # for generators and legacy decoders
RGB = 1e-5
VQGAN_ENCODER = 1e-5  # the published code's own floor is 3.2e-6 here
PIXEL_DECODER = 1e-4
CLEAR = 1e-3  # a token must be the same if its second-best code is further away than this

TOKENIZERS = [
    "tokenizer_titok_s128",
    "tokenizer_titok_b64",
    "tokenizer_titok_l32",
    "tokenizer_titok_sl256_vq8k",
    "tokenizer_titok_bl64_vq8k",
    "tokenizer_titok_bl128_vq8k",
    "tokenizer_titok_bl64_vae_c16",
    "tokenizer_titok_bl128_vae_c16",
    "tokenizer_titok_ll32_vae_c16",
]
GENERATORS = ["generator_titok_l32", "generator_titok_b64", "generator_titok_s128"]
BY_DEFAULT = {"tokenizer_titok_s128"}


def cases(names: list[str]) -> list:
    return [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.parity) for name in names]


class Seeded:
    """A published tensor that is made only when read, so that memory never holds two copies of a model."""

    def __init__(self, name: str, shape: tuple[int, ...], scale: float = 1.0):
        self.name, self.shape, self.scale = name, shape, np.float32(scale)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = gd.seeded_array(self.name, self.shape) * self.scale
        return array if dtype is None else array.astype(dtype)


def seeded(config: models.Config, *, attention_output_scale: float = 1.0) -> tuple[nnx.GraphDef, convert.Params]:
    """(graphdef, parameters on the device). The ViT generators were run with their attention outputs scaled down. Otherwise
    24 post-norm layers of random weights make all positions alike."""
    graphdef, abstract = models.abstract(config)
    table = convert.table_for(config)
    weights = {
        name: Seeded(name, shape, attention_output_scale if name.endswith("attention.output.dense.weight") else 1.0)
        for name, shape in convert.published_shapes(table, abstract).items()
    }
    return graphdef, convert.from_published(
        table, abstract, weights, source="seeded weights", place=lambda path, array: jax.device_put(array)
    )


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    gc.collect()
    jax.clear_caches()


class Report:
    """Collects the errors of a model and prints them as rows of a table (seen with -s)."""

    def __init__(self, model: str):
        self.model = model

    def add(self, what: str, error: float, bound: float) -> None:
        print(f"\n| {self.model} | {what} | {error:.1e} | {bound:.0e} |", end="")

    def compare(self, golden: Mapping[str, np.ndarray], name: str, ours, bound: float) -> None:
        self.add(name, gd.compare(golden, name, ours, bound), bound)

    def tokens(self, what: str, ours, golden: np.ndarray, margin: np.ndarray) -> np.ndarray:
        """Asserts that all clear choices and 99.5 % of all choices are the same -> where they are the same."""
        same = np.asarray(ours) == golden
        assert same.shape == margin.shape
        assert same[margin > CLEAR].all(), f"{what}: {np.argwhere(~same & (margin > CLEAR)).tolist()} differ"
        assert same.mean() >= 0.995, f"{what}: {(~same).sum()} of {same.size} differ"
        print(f"\n| {self.model} | {what} | {(~same).sum()} of {same.size} differ | none clear, 0.5 % |", end="")
        return same


def published_latents(z) -> np.ndarray:
    """[B, N, C] -> [B, C, 1, N]."""
    return np.asarray(z).transpose(0, 2, 1)[:, :, None]


def our_latents(z: np.ndarray) -> np.ndarray:
    """[B, C, 1, N] -> [B, N, C]."""
    return z[:, :, 0].transpose(0, 2, 1)


def names_in(golden: Mapping[str, np.ndarray]) -> set[str]:
    return {name for name in golden if not name.endswith((".stride", ".shape", ".stats"))}


@pytest.mark.parametrize("name", cases(TOKENIZERS))
def test_tokenizer(name):
    published = config_files.resolve_interpolations(gd.load_json(f"configs/{name}.json"), source=name)
    config = TiTokConfig.from_published(published)
    graphdef, params = seeded(config)
    golden = gd.load(f"tokenizers/{name}.npz")
    report = Report(name)
    image_bound = PIXEL_DECODER if config.is_legacy else RGB

    @jax.jit
    def encode(params, images):
        model = nnx.merge(graphdef, params)
        z = model.encode(images)
        return z, model.quantize(z) if config.quantize_mode == "vq" else None

    @jax.jit
    def decode(params, z):
        model = nnx.merge(graphdef, params)
        logits = model.decoder(z)
        if not config.is_legacy:
            return None, logits
        return logits, model.pixel_decoder(model.soft_codes(logits))

    def check_decoding(z, name):
        logits, image = decode(params, z)
        seen.add(name)
        report.compare(golden, name, gd.nchw(image), image_bound)
        if name == "reconstruction" and config.is_legacy:
            seen.add("reconstruction_logits")
            report.compare(golden, "reconstruction_logits", gd.nchw(logits), LOGITS)

    z, quantized = encode(params, gd.images(2, 256, 0))
    seen = {"encoder_output"}
    report.compare(golden, "encoder_output", published_latents(z), ENCODER)
    if config.quantize_mode == "vq":
        golden_tokens = golden["tokens"].astype(np.int32)
        same = report.tokens("tokens", quantized.tokens, golden_tokens, golden["margin"])
        lookup = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).quantize.lookup(tokens))
        # Where a close call fell the other way, the published choice is used, so that all later values are comparable.
        z_quantized = np.where(same[..., None], quantized.quantized, lookup(params, golden_tokens))
        seen |= {"tokens", "margin", "z_quantized", "random_tokens"}
        report.compare(golden, "z_quantized", published_latents(z_quantized), ENCODER)
        if "quantizer_loss" in golden:
            for loss in ("quantizer_loss", "commitment_loss", "codebook_loss"):
                seen.add(loss)
                report.compare(golden, loss, getattr(quantized, loss)[None], ENCODER)
        check_decoding(z_quantized, "reconstruction")
        check_decoding(lookup(params, golden["random_tokens"].astype(np.int32)), "decode_tokens")
    else:
        posterior = models.titok.DiagonalGaussian.from_moments(z)
        for key in ("mean", "logvar", "std"):
            report.compare(golden, key, published_latents(getattr(posterior, key)), ENCODER)
        report.compare(golden, "kl", posterior.kl(), ENCODER)
        noise = np.random.default_rng(2).standard_normal(golden["mean"].shape).astype(np.float32)
        sample = posterior.sample(our_latents(noise))
        report.compare(golden, "z", published_latents(sample), ENCODER)
        seen |= {"mean", "logvar", "std", "kl", "z"}
        check_decoding(sample, "reconstruction")
        check_decoding(posterior.mean, "reconstruction_of_mean")
    assert seen == names_in(golden)  # every array of the file was compared


@pytest.mark.parametrize("name", cases(GENERATORS))
def test_generator(name):
    published = config_files.resolve_interpolations(gd.load_json(f"configs/{name}.json"), source=name)
    config = GeneratorConfig.from_published(published)
    graphdef, params = seeded(config, attention_output_scale=0.3)
    golden = gd.load(f"generators/{name}.npz")
    labels = golden["labels"].astype(np.int32)
    report = Report(name)

    def logits(params, ids, labels):
        return nnx.merge(graphdef, params).logits(ids, labels)

    forward = jax.jit(logits)
    for drop, given in ((0, labels), (1, np.full_like(labels, config.num_classes))):
        ours = np.asarray(forward(params, golden["ids"].astype(np.int32), given))
        report.compare(golden, f"drop{drop}.logits", ours, LOGITS)
        report.tokens(f"drop{drop}.argmax", ours.argmax(-1), golden[f"drop{drop}.argmax"], golden[f"drop{drop}.argmax_gap"])

    # Decoding uses the settings of the published sampling script and the noise of its run.
    settings, trace, gaps = config.sampling, golden["trace.ids"].astype(np.int32), golden["trace.gaps"]
    num_steps = settings.num_steps
    assert trace.shape == (num_steps, 2, config.num_tokens)
    shapes = ((2, config.num_tokens, config.codebook_size), (2, config.num_tokens))
    uniforms = [
        np.stack([np.random.default_rng([1234, 2 * s + i]).random(shape).astype(np.float32) for s in range(num_steps)])
        for i, shape in enumerate(shapes)
    ]
    common = {
        "codebook_size": config.codebook_size,
        "num_classes": config.num_classes,
        "num_steps": num_steps,
        "guidance_scale": np.float32(settings.guidance_scale),
        "guidance_schedule": settings.guidance_schedule,
        "temperature": np.float32(settings.temperature),
    }

    @jax.jit
    def one_step(params, ids, plan, uniforms):
        noise = decoding.noise_from_uniforms(*uniforms)
        step = decoding.decoding_step(functools.partial(logits, params), labels, noise=noise, **common)
        return step(ids, plan)[1]

    @jax.jit
    def whole(params, uniforms):
        return decoding.parallel_decode(
            functools.partial(logits, params),
            labels,
            num_tokens=config.num_tokens,
            softmax_temperature_annealing=settings.softmax_temperature_annealing,
            noise=decoding.noise_from_uniforms(*uniforms),
            **common,
        )

    uniforms = jax.device_put(uniforms)
    # Each step starts from the stored ids, so that one close call cannot hide the rest.
    plan = decoding.steps_plan(
        num_steps, config.num_tokens, settings.guidance_schedule, 3.0, settings.softmax_temperature_annealing
    )
    start = np.full_like(trace[0], config.mask_id)
    wrong = {}
    for s, want in enumerate(trace):
        ids, mask_len = one_step(
            params, start if s == 0 else trace[s - 1], jax.tree.map(lambda a, s=s: a[s], plan), uniforms
        )
        assert mask_len.tolist() == [golden["trace.mask_len"][s]] * 2, s
        if (np.asarray(ids) != want).any():
            wrong[s] = (int((np.asarray(ids) != want).sum()), gaps[:, s].tolist())
    assert not wrong, f"steps that gave other ids from the stored ones (how many, gaps): {wrong}"
    print(f"\n| {name} | {num_steps} steps from the stored ids | 0 ids differ | equal |", end="")

    out = whole(params, uniforms)
    differ = np.flatnonzero((np.asarray(out.trace) != trace).any((1, 2)))
    assert not differ.size, f"the whole trace leaves the stored one at step {differ[0]}, gaps {gaps[:, differ[0]]}"
    np.testing.assert_array_equal(out.ids, trace[-1])
    print(f"\n| {name} | {num_steps} steps as a whole | 0 ids differ | equal |", end="")
    assert names_in(golden) == {
        *(f"drop{d}.{what}" for d in (0, 1) for what in ("logits", "argmax", "argmax_gap")),
        *("ids", "labels", "trace.ids", "trace.gaps", "trace.mask_len"),
    }


def vqgan_functions(graphdef):
    def encode(params, images):
        vqgan = nnx.merge(graphdef, params)
        z = vqgan.encode(images)
        return z, vqgan.quantize.codes(z)

    def decode(params, codes):
        vqgan = nnx.merge(graphdef, params)
        return vqgan.decode(vqgan.quantize.lookup(codes))

    return jax.jit(encode), jax.jit(decode)


@pytest.mark.parity
def test_maskgit_vqgan():
    """At 256 x 256; tests/test_maskgit_vqgan.py has the other sizes of the file."""
    graphdef, params = seeded(MaskgitVQGANConfig())
    encode, decode = vqgan_functions(graphdef)
    golden, report = gd.load("maskgit_vqgan.npz"), Report("maskgit_vqgan")
    z, codes = encode(params, gd.images(2, 256, 0))
    report.compare(golden, "encoder_output", gd.nchw(z), VQGAN_ENCODER)
    report.tokens("codes", codes.reshape(2, 256), golden["codes"], golden["margin"])
    raw = decode(params, golden["codes"].astype(np.int32).reshape(2, 16, 16))
    report.compare(golden, "reconstruction_raw", gd.nchw(raw), PIXEL_DECODER)
    report.compare(golden, "reconstruction", gd.nchw(jnp.clip(raw, 0, 1)), PIXEL_DECODER)
    raw = decode(params, golden["random_codes"].astype(np.int32).reshape(2, 16, 16))
    report.compare(golden, "decode_random_raw", gd.nchw(raw), PIXEL_DECODER)


def seeded_flax_array(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight with which the original JAX VQGAN was run."""
    w = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape).astype(np.float32)
    leaf = path.split("/")[-1]
    if leaf == "scale":
        return 1 + 0.1 * w
    if leaf == "bias":
        return 0.1 * w
    return w if leaf == "codebook" else w * np.float32(np.prod(shape[:-1]) ** -0.5)


def test_original_jax_vqgan():
    """The original's parameter tree, converted by the table of names, gives the original's numbers."""
    tree = gd.load_json("jax_vqgan.json")
    table = gd.load_json("jax_vqgan_to_torch.json")["table"]
    assert tables.jax_vqgan_names() == {path: name for path, (name, _) in table.items()}
    flat = {path: seeded_flax_array(path, tuple(shape)) for path, shape in tree["tree"].items()}
    assert sum(a.size for a in flat.values()) == tree["num_params"]
    checkpoint = {"params": convert.unflatten(flat)}
    weights = convert.jax_vqgan_to_published(checkpoint, source="checkpoint")
    for path, (name, axes) in table.items():
        np.testing.assert_array_equal(weights[name], flat[path] if axes is None else flat[path].transpose(axes))

    config = MaskgitVQGANConfig()
    graphdef, abstract = models.abstract(config)
    params = convert.from_published(tables.maskgit_vqgan_table(), abstract, weights, source="checkpoint")
    encode, decode = vqgan_functions(graphdef)
    golden, report = gd.load("jax_vqgan.npz"), Report("jax_vqgan")
    z, codes = encode(params, gd.images(1, 256, 0))
    report.compare(golden, "encoder_output", z, VQGAN_ENCODER)
    report.tokens("ids", codes, golden["ids"], golden["margin"])
    report.compare(golden, "reconstruction", decode(params, golden["ids"].astype(np.int32)), PIXEL_DECODER)
    report.compare(golden, "decode_random_ids", decode(params, golden["random_ids"].astype(np.int32)), PIXEL_DECODER)
    report.compare(golden, "size128.encoder_output", encode(params, gd.images(1, 128, 0))[0], VQGAN_ENCODER)

    # Converted back, it is the tree that the original code would read.
    back = convert.published_to_jax_vqgan(convert.to_published(tables.maskgit_vqgan_table(), params))
    assert back.keys() == {"params"}
    assert convert.flatten(back["params"]).keys() == flat.keys()
    for path, array in convert.flatten(back["params"]).items():
        np.testing.assert_array_equal(array, flat[path], err_msg=path)


def test_jax_vqgan_trees_that_do_not_fit_are_refused():
    flat = {path: np.zeros(1) for path in tables.jax_vqgan_names()}
    del flat["quantizer/codebook"]
    flat["encoder/Conv_9/kernel"] = np.zeros(1)
    with pytest.raises(convert.WeightsError) as error:
        convert.jax_vqgan_to_published({"params": convert.unflatten(flat)}, source="some.msgpack")
    message = str(error.value)
    assert "some.msgpack: 2 arrays" in message
    assert "missing: quantizer/codebook" in message
    assert "surplus: encoder/Conv_9/kernel" in message
