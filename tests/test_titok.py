"""TiTok against the published PyTorch code: seeded weights, every stage of the computation, gradients, names and shapes."""

import dataclasses
import json

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_maskgit_vqgan import decoder_blocks

from titok_jax import models
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.quantizer import DiagonalGaussian
from titok_jax.models.titok import TRANSFORMER_SIZES, TiTokConfig, TransformerSize, legacy_reshape, patchify, unpatchify
from titok_jax.weights import convert

TINY_SIZES = {"small": TransformerSize(64, 2, 2), "base": TransformerSize(96, 3, 3), "large": TransformerSize(128, 4, 4)}
NAMES = ["tiny_vq_stage1", "tiny_vq_stage2", "tiny_vq8k", "tiny_vae"]
# From the float32 errors in the golden data's README: 5e-6 would do for encoders and logits, 1e-5 for all but the pixel
# decoder's image. There, even two float32 runs of the published code differ by 1.2e-5.
TOLERANCE = 1e-5
PIXEL_DECODER_TOLERANCE = 5e-5
# A gradient sums thousands of float32 products, in another order than torch.
GRADIENT_TOLERANCE = 2e-5


def tiny_config(name: str) -> TiTokConfig:
    published = gd.load_json(f"tiny/{name}.config.json")
    config = TiTokConfig.from_published(published)
    vq = published["model"]["vq_model"]
    return dataclasses.replace(
        config,
        encoder=TINY_SIZES[vq["vit_enc_model_size"]],
        decoder=TINY_SIZES[vq["vit_dec_model_size"]],
        pixel_decoder=MaskgitVQGANConfig(hidden_channels=32, resolution=64),
    )


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    config = tiny_config(request.param)
    graphdef, abstract = models.abstract(config)
    params = gd.seeded_params(convert.table_for(config), abstract)
    return request.param, config, graphdef, params, gd.load(f"tiny/{request.param}.npz")


def tower_intermediates(tower, prefix: str, x):
    """Runs every block of a transformer tower by hand, and the branches of block 0. x [1, L, D] enters `ln_pre`."""
    out = {f"{prefix}.ln_pre_input": x}
    x = out[f"{prefix}.ln_pre"] = tower.ln_pre(x)
    graphdef, stacked = nnx.split(tower.transformer)
    for i in range(jax.tree.leaves(stacked)[0].shape[0]):
        block = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked))
        if i == 0:
            normed = out[f"{prefix}.transformer.0.ln_1"] = block.norm1(x)
            attn = out[f"{prefix}.transformer.0.attn"] = block.attn(normed)
            out[f"{prefix}.transformer.0.mlp"] = block.mlp(block.norm2(x + attn))
        x = out[f"{prefix}.transformer.{i}"] = block(x)
    return out, x


def grid_nchw(x):
    """[B, h w, D] -> [B, D, h, w] of a square grid."""
    b, n, d = x.shape
    side = int(n**0.5)
    return x.reshape(b, side, side, d).transpose(0, 3, 1, 2)


def latents_published(z):
    """[B, N, C] -> [B, C, 1, N]."""
    return z.transpose(0, 2, 1)[:, :, None]


def intermediates(graphdef, params, images, noise):
    model = nnx.merge(graphdef, params)
    config, first = model.config, images[:1]
    encoder, decoder = model.encoder, model.decoder
    out = {"encoder.patch_embed": grid_nchw(encoder.patch_embed(patchify(first, config.patch_size)))}
    blocks, x = tower_intermediates(encoder, "encoder", encoder.embed(first, model.latent_tokens[...]))
    out |= blocks
    out["encoder.ln_post"] = encoder.ln_post(x[:, -config.num_latent_tokens :])
    fake2d = encoder.readout(x)
    out["encoder.fake2d"] = fake2d.transpose(0, 2, 1)[..., None]
    out["encoder.conv_out"] = encoder.conv_out(fake2d).transpose(0, 2, 1)[..., None]
    z = model.encode(images)
    out["encoder.output"] = latents_published(z)
    if config.quantize_mode == "vq":
        q = model.quantize(z)
        out |= {
            "tokens": q.tokens,
            "distances": model.quantize.distances(z),
            "z_quantized": latents_published(q.quantized),
            "quantizer_loss": q.quantizer_loss,
            "commitment_loss": q.commitment_loss,
            "codebook_loss": q.codebook_loss,
        }
        z = q.quantized
    else:
        posterior = model.posterior(images)
        out |= {key: latents_published(getattr(posterior, key)) for key in ("mean", "logvar", "std")}
        out["kl"] = posterior.kl()
        out["decode_mean"] = gd_nchw(model.decode(posterior.mean))
        z = posterior.sample(noise)
        out["z"] = latents_published(z)
    out["decoder.decoder_embed"] = decoder.decoder_embed(z[:1])
    blocks, x = tower_intermediates(decoder, "decoder", decoder.embed(z[:1]))
    out |= blocks
    out["decoder.ln_post"] = decoder.ln_post(x[:, 1 : 1 + config.grid_size**2])
    grid = decoder.readout(x)
    out["decoder.ffn_input"] = gd_nchw(grid)
    ffn = decoder.ffn(grid)
    out["decoder.ffn"] = gd_nchw(ffn)
    out["decoder.conv_out"] = gd_nchw(ffn if config.is_legacy else decoder.conv_out(ffn))
    if config.is_legacy and config.finetune_decoder:
        blocks = decoder_blocks(model.pixel_decoder, model.soft_codes(ffn))
        out |= {"pixel_" + name: gd_nchw(value) for name, value in blocks.items()}
    out["reconstruction"] = gd_nchw(model.decode(z))
    return out


def gd_nchw(x):
    return x.transpose(0, 3, 1, 2)


def test_every_stage_equals_the_published_code(case, record_property):
    name, config, graphdef, params, golden = case
    images = gd.images(2, 64, 0)
    shape = (2, config.token_size, 1, config.num_latent_tokens)
    noise = np.random.default_rng(2).standard_normal(shape).astype(np.float32)[:, :, 0].transpose(0, 2, 1)
    ours = jax.jit(intermediates, static_argnums=0)(graphdef, params, images, noise)
    errors = {}
    for key, value in ours.items():
        if key == "tokens":
            continue
        value = np.asarray(value).reshape(1) if np.ndim(value) == 0 else value
        pixels = name == "tiny_vq_stage2" and key.startswith(("pixel_decoder", "reconstruction"))
        tolerance = PIXEL_DECODER_TOLERANCE if pixels else TOLERANCE
        errors[key] = gd.compare(golden, key, value, tolerance)
    if config.quantize_mode == "vq":
        clear = golden["margin"] > 1e-4
        assert clear.any()
        np.testing.assert_array_equal(np.asarray(ours["tokens"])[clear], golden["tokens"][clear])
    worst = max(errors, key=errors.get)
    record_property("largest_error", errors[worst])
    print(f"{name}: largest error {errors[worst]:.1e} ({worst})")
    # Every array of the file is compared, here or in other tests.
    rest = {k for k in golden if not k.endswith((".stride", ".shape", ".stats")) and k not in ours}
    rest = {k for k in rest if not k.startswith(("grad.", "times40."))}
    assert rest <= {"margin", "tokens", "random_tokens", "decode_tokens"}


def test_posterior_clamps_its_log_variance():
    # Uses the stored output, not ours: exp(0.5 * 40 x) would multiply our rounding errors by 20 max |x|.
    golden = gd.load("tiny/tiny_vae.npz")
    assert "encoder.output.stride" not in golden
    posterior = DiagonalGaussian.from_moments(40 * golden["encoder.output"][:, :, 0].transpose(0, 2, 1))
    assert posterior.logvar.min() == -30
    assert posterior.logvar.max() == 20
    for key in ("mean", "logvar", "std"):
        gd.compare(golden, f"times40.{key}", latents_published(getattr(posterior, key)), 1e-6)
    gd.compare(golden, "times40.kl", posterior.kl(), 1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "tiny_vae"])
def test_decoding_of_given_tokens(name):
    config = tiny_config(name)
    graphdef, abstract = models.abstract(config)
    params = gd.seeded_params(convert.table_for(config), abstract)
    golden = gd.load(f"tiny/{name}.npz")
    tokens = golden["random_tokens"].astype(np.int32)
    images = jax.jit(lambda p, t: nnx.merge(graphdef, p).decode_tokens(t))(params, tokens)
    tolerance = PIXEL_DECODER_TOLERANCE if name == "tiny_vq_stage2" else TOLERANCE
    gd.compare(golden, "decode_tokens", gd_nchw(np.asarray(images)), tolerance)


@pytest.mark.parametrize("name", ["tiny_vq_stage1", "tiny_vq8k", "tiny_vae"])
def test_gradients_equal_the_published_code(name):
    config = tiny_config(name)
    graphdef, abstract = models.abstract(config)
    table = convert.table_for(config)
    params = gd.seeded_params(table, abstract)
    golden = gd.load(f"tiny/{name}.npz")
    shape = (2, config.token_size, 1, config.num_latent_tokens)
    noise = np.random.default_rng(2).standard_normal(shape).astype(np.float32)[:, :, 0].transpose(0, 2, 1)
    output_shape = (2, 1024, 4, 4) if config.predicts_codes else (2, 3, 64, 64)
    cotangent = np.random.default_rng(5).standard_normal(output_shape).astype(np.float32).transpose(0, 2, 3, 1)

    @jax.jit
    def gradient(params):
        def objective(params):
            model = nnx.merge(graphdef, params)
            images = gd.images(2, 64, 0)
            if config.quantize_mode == "vq":
                z = model.quantized(images).quantized
            else:
                z = model.posterior(images).sample(noise)
            return jnp.sum(model.decode(z) * cotangent)

        return jax.grad(objective)(params)

    ours = convert.to_published(table, gradient(jax.tree.map(jnp.asarray, params)))
    for key in golden:
        if key.startswith("grad.") and not key.endswith((".stride", ".shape", ".stats")):
            gd.compare(golden, key, ours[key.removeprefix("grad.")], GRADIENT_TOLERANCE)
    norms = gd.load_json(f"tiny/{name}.grad_norms.json")
    assert set(norms) == set(ours)
    for key, (norm, _, largest) in norms.items():
        gd.within(np.linalg.norm(ours[key]) - norm, GRADIENT_TOLERANCE * norm + 1e-9, f"{key}: norm")
        gd.within(np.abs(ours[key]).max() - largest, GRADIENT_TOLERANCE * largest + 1e-9, f"{key}: largest")


def test_names_and_shapes_are_the_published_ones(case):
    name, config, _, params, _ = case
    table = convert.table_for(config)
    shapes = convert.published_shapes(table, params)
    assert shapes == gd.published_shapes(f"tiny/{name}.shapes.json")
    written = convert.to_published(table, params)
    assert {n: a.shape for n, a in written.items()} == shapes
    for n, array in written.items():
        np.testing.assert_array_equal(array, gd.seeded_array(n, array.shape), err_msg=n)


def test_legacy_reshape_is_the_row_major_reinterpretation():
    latents = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)  # [B, N, D]
    out = np.asarray(legacy_reshape(jnp.asarray(latents)))
    published = latents.reshape(2, 4, 3)  # torch: x.reshape(batch, width, num_latent_tokens)
    for n in range(3):
        for d in range(4):
            np.testing.assert_array_equal(out[:, n, d], published[:, d, n])
    assert not np.array_equal(out, latents)  # a transpose would give the latents back


def test_unpatchify_inverts_patchify():
    images = gd.images(2, 32, 1)
    x = patchify(jnp.asarray(images), 8)
    np.testing.assert_array_equal(unpatchify(x.reshape(2, 4, 4, -1), 8), images)
    np.testing.assert_array_equal(x[0, 1], images[0, :8, 8:16].reshape(-1))


@pytest.mark.parametrize(
    "path", sorted(p.name for p in (gd.GOLDEN / "configs").glob("tokenizer_*") if "resolved" not in p.name)
)
def test_published_configurations_are_read(path):
    published = gd.load_json(f"configs/{path}")
    config = TiTokConfig.from_published(published)
    vq = published["model"]["vq_model"]
    assert config.encoder == TRANSFORMER_SIZES[vq["vit_enc_model_size"]]
    assert config.decoder == TRANSFORMER_SIZES[vq["vit_dec_model_size"]]
    assert config.is_legacy is vq.get("is_legacy", True)
    again = TiTokConfig.from_published(json.loads(json.dumps(config.to_published())))
    assert again == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "unknown keys"),
        ({"vit_enc_model_size": "giant"}, "vit_enc_model_size is 'giant'"),
        ({"quantize_mode": "fsq"}, "quantize_mode"),
        ({"vit_dec_patch_size": 8}, "differ"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    published = gd.load_json("tiny/tiny_vq8k.config.json")
    published["model"]["vq_model"] |= change
    with pytest.raises(ValueError, match=message):
        TiTokConfig.from_published(published)
