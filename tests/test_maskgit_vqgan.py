"""The MaskGIT-VQGAN against the published PyTorch code with the same seeded weights: every block, then the whole."""

import dataclasses

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import (
    abstract_model,
    compare,
    images,
    load,
    load_json,
    nchw,
    published_shapes,
    seeded_model,
    seeded_weights,
)

from titok_jax.models import tables
from titok_jax.models.maskgit_vqgan import Decoder, MaskgitVQGAN, MaskgitVQGANConfig, VQGANQuantizer
from titok_jax.weights import convert

TABLE = tables.maskgit_vqgan_table()
TOLERANCE = 1e-5
# The decoder amplifies rounding: even two float32 runs of the published code differ by 1.2e-5 in their images.
DECODER_TOLERANCE = 5e-5


def tiny_config() -> MaskgitVQGANConfig:
    published = load_json("tiny/tiny_maskgit_vqgan.config.json")
    known = {field.name for field in dataclasses.fields(MaskgitVQGANConfig)}
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in published.items() if key in known}
    return MaskgitVQGANConfig(**fields)


@pytest.fixture(scope="module")
def golden():
    return load("tiny/tiny_maskgit_vqgan.npz")


@pytest.fixture(scope="module")
def model():
    return seeded_model(lambda: MaskgitVQGAN(tiny_config(), rngs=nnx.Rngs(0)), TABLE)


def encoder_blocks(encoder, x):
    """All intermediates of the encoder by their golden names, one block after the other."""
    out = {"input": x}
    out["conv_in"] = x = encoder.conv_in(x)
    for i in range(len(encoder.down)):
        level = encoder.down[str(i)]
        first = level.block["0"]
        if first.widens:
            out[f"down.{i}.block.0.nin_shortcut"] = first.nin_shortcut(first.transform(x))
            out[f"down.{i}.block.0"] = first(x)
        out[f"down.{i}"] = x = level(x)
    for i in range(len(encoder.mid)):
        out[f"mid.{i}"] = x = encoder.mid[str(i)](x)
    out["norm_out"] = x = encoder.norm_out(x)
    out["conv_out"] = encoder.conv_out(jax.nn.silu(x))
    return {"encoder." + name: value for name, value in out.items()}


def decoder_blocks(decoder, x):
    """All intermediates of the decoder by their golden names."""
    out = {"input": x}
    out["conv_in"] = x = decoder.conv_in(x)
    for i in range(len(decoder.mid)):
        out[f"mid.{i}"] = x = decoder.mid[str(i)](x)
    for i in reversed(range(len(decoder.up))):
        level = decoder.up[str(i)]
        first = level.block["0"]
        if first.widens:
            out[f"up.{i}.block.0.nin_shortcut"] = first.nin_shortcut(first.transform(x))
            out[f"up.{i}.block.0"] = first(x)
        out[f"up.{i}"] = x = level(x)
    out["norm_out"] = x = decoder.norm_out(x)
    out["conv_out"] = decoder.conv_out(jax.nn.silu(x))
    return {"decoder." + name: value for name, value in out.items()}


@pytest.fixture(scope="module")
def outputs(model):
    """All outputs that the tests check, from one compilation."""
    graphdef, params = model

    @jax.jit
    def run(params, x):
        vqgan = nnx.merge(graphdef, params)
        z = vqgan.encode(x)
        codes = vqgan.get_codes(x)
        z_q = vqgan.quantize.lookup(codes)
        blocks = encoder_blocks(vqgan.encoder, x[:1]) | decoder_blocks(vqgan.decoder, z_q[:1])
        return {
            "z": z,
            "codes": codes,
            "z_q": z_q,
            "quantizer": vqgan.quantize(z),
            "distances": vqgan.quantize.distances(z),
            "soft_code": vqgan.quantize.soft_code(z),
            "raw": vqgan.decode(z_q),
            "clamped": vqgan.decode_codes(codes),
        }, {name: value.transpose(0, 3, 1, 2) for name, value in blocks.items()}

    whole, blocks = jax.tree.map(np.asarray, run(params, images(2, 64, 0)))
    moved, _ = run(one_ulp_off(params), images(2, 64, 0))
    return whole, blocks, {name: np.abs(moved[name] - whole[name]).max() for name in ("z", "raw")}


def one_ulp_off(params):
    """The parameters with every second one of them, by chance, replaced by the next larger float32."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda w: np.where(rng.random(w.shape) < 0.5, np.nextafter(w, np.inf, dtype=w.dtype), w), params)


def test_every_block(golden, outputs):
    whole, blocks, one_rounding = outputs
    stored = {
        name
        for name in golden
        if name.startswith(("encoder.", "decoder.")) and not name.endswith(("stride", "shape", "stats"))
    }
    assert set(blocks) == stored
    for name, value in blocks.items():
        compare(golden, name, value, DECODER_TOLERANCE if name.startswith("decoder.") else TOLERANCE)
    # Called as a whole, the modules give what their blocks give in this order, but round otherwise. What one rounding of
    # each weight does to the output says how much the network amplifies. The largest sums have 2,304 products; added in
    # pairs, each product is in 11 partial sums, whose roundings add like the steps of a random walk: sqrt(11) < 4. Seen on
    # CPUs: a tenth of the bound for the encoder, a fifth for the decoder. On an H200: a fifth.
    golden_data.within(nchw(whole["z"][:1]) - blocks["encoder.conv_out"], 4 * one_rounding["z"], "encoder")
    golden_data.within(nchw(whole["raw"][:1]) - blocks["decoder.conv_out"], 4 * one_rounding["raw"], "decoder")


def test_quantizer(golden, outputs):
    whole, *_ = outputs
    assert golden["margin"].min() > 1e-4  # this file has no close calls
    assert whole["codes"].dtype == np.int32
    assert whole["codes"].shape == (2, 4, 4)
    np.testing.assert_array_equal(whole["codes"].reshape(2, 16), golden["codes"])
    np.testing.assert_array_equal(whole["quantizer"].tokens, whole["codes"])
    compare(golden, "distances", whole["distances"].reshape(32, 1024), TOLERANCE)
    np.testing.assert_array_equal(nchw(whole["z_q"]), golden["z_quantized"])
    compare(golden, "z_quantized", nchw(whole["quantizer"].quantized), TOLERANCE)
    out = whole["quantizer"]  # the PyTorch code applies its weight to the codebook term
    compare(golden, "quantizer_loss", (out.commitment_loss + 0.25 * out.codebook_loss)[None], TOLERANCE)
    # A relative error of 5e-7 in distances up to 600 becomes one of 3e-4 in their exponentials.
    compare(golden, "soft_code", whole["soft_code"].reshape(2, 16, 1024), 3e-4)


def test_reconstruction(golden, outputs):
    whole, *_ = outputs
    compare(golden, "reconstruction_raw", nchw(whole["raw"]), DECODER_TOLERANCE)
    scale = np.abs(golden["reconstruction_raw"]).max()
    compare(golden, "reconstruction", nchw(whole["clamped"]), DECODER_TOLERANCE * scale)


def test_published_size():
    """The full-size model on images smaller than its own size, square and not square."""
    golden = load("maskgit_vqgan.npz")
    graphdef, params = seeded_model(lambda: MaskgitVQGAN(MaskgitVQGANConfig(), rngs=nnx.Rngs(0)), TABLE)

    @jax.jit
    def run(params, x):
        vqgan = nnx.merge(graphdef, params)
        z = vqgan.encode(x)
        codes = vqgan.quantize.codes(z)
        return z, codes, vqgan.decode(vqgan.quantize.lookup(codes))

    x = images(2, 128, 0)
    for prefix, z, codes, raw in (("size128", *run(params, x)), ("size64x128", *run(params, x[:, :64]))):
        np.testing.assert_array_equal(codes.reshape(golden[f"{prefix}.codes"].shape), golden[f"{prefix}.codes"])
        if prefix == "size128":  # for the other size the file has only the results
            assert golden["size128.margin"].min() > 1e-4  # no close calls
            compare(golden, "size128.encoder_output", nchw(z), TOLERANCE)
        # Even the published decoder differs by 9e-6 between float32 and float64.
        compare(golden, f"{prefix}.reconstruction_raw", nchw(raw), 1e-4)


def test_quantizer_gradients():
    """The straight-through gradient and the direction of both loss terms, by hand on two codes."""
    graphdef, _ = nnx.split(VQGANQuantizer(2, 2, rngs=nnx.Rngs(0)))

    def loss(codebook, z):
        out = nnx.merge(graphdef, {"embedding": codebook})(z)
        return out.commitment_loss + 0.25 * out.codebook_loss + (out.quantized * jnp.array([10.0, 20.0])).sum()

    codebook = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    z = jnp.array([[[[0.5, 2.0]]]])
    value, (grad_codebook, grad_z) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(codebook, z)
    difference = np.array([0.5, 2.0]) - 1.0  # z - q
    np.testing.assert_allclose(value, 1.25 * (difference**2).mean() + 30.0, rtol=1e-6)  # q is (1, 1)
    np.testing.assert_allclose(grad_z[0, 0, 0], 2 * difference / 2 + [10.0, 20.0], rtol=1e-6)
    np.testing.assert_allclose(grad_codebook, [0.25 * -2 * difference / 2, [0.0, 0.0]], rtol=1e-6)


def test_lowest_code_wins_a_tie():
    graphdef, _ = nnx.split(VQGANQuantizer(3, 2, rngs=nnx.Rngs(0)))
    quantizer = nnx.merge(graphdef, {"embedding": jnp.array([[9.0, 9.0], [1.0, 2.0], [1.0, 2.0]])})
    assert quantizer.codes(jnp.array([1.0, 2.5])) == 1


@pytest.mark.parametrize(
    ("config", "file"),
    [(tiny_config(), "tiny/tiny_maskgit_vqgan.shapes.json"), (MaskgitVQGANConfig(), "shapes/maskgit_vqgan.json")],
    ids=["tiny", "published"],
)
def test_names_and_shapes_are_the_published_ones(config, file):
    _, params = abstract_model(lambda: MaskgitVQGAN(config, rngs=nnx.Rngs(0)))
    assert convert.published_shapes(TABLE, params) == published_shapes(file)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == load_json(file)["num_params"]


def test_published_weights_come_back(model):
    """Published -> ours -> published is the identity, and a module keeps the string keys of the nested dict."""
    graphdef, params = model
    shapes = published_shapes("tiny/tiny_maskgit_vqgan.shapes.json")
    weights = seeded_weights(shapes)
    back = convert.to_published(TABLE, params)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(back[name], weight, err_msg=name)
    through = nnx.to_pure_dict(nnx.split(nnx.merge(graphdef, params))[1])
    assert convert.flatten(through).keys() == convert.flatten(params).keys()
    assert jax.tree.structure(through) == jax.tree.structure(params)
    with pytest.raises(convert.WeightsError, match=r"missing: decoder\.up\.1\.upsample_conv\.bias"):
        convert.from_published(
            TABLE, params, {n: w for n, w in weights.items() if n != "decoder.up.1.upsample_conv.bias"}, source="test"
        )


def test_pixel_decoder_of_stage_two():
    """The VQGAN as `pixel_decoder` of a TiTok: the same rules apply under another name."""
    published = published_shapes("tiny/tiny_maskgit_vqgan.shapes.json")
    _, params = abstract_model(lambda: Decoder(tiny_config(), rngs=nnx.Rngs(0)))
    found = convert.published_shapes(tables.vqgan_rules(r"(pixel_decoder)"), {"pixel_decoder": params})
    assert found == {"pixel_" + name: shape for name, shape in published.items() if name.startswith("decoder.")}


def test_more_than_ten_blocks_keep_their_order():
    """As a string, "10" sorts before "2". Weights must still reach their own block."""
    config = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1,), num_res_blocks=12, z_channels=4, codebook_size=4)
    graphdef, params = seeded_model(lambda: MaskgitVQGAN(config, rngs=nnx.Rngs(0)), TABLE)
    mid = nnx.merge(graphdef, params).encoder.mid
    for i in range(12):
        np.testing.assert_array_equal(mid[str(i)].conv1.kernel[...], params["encoder"]["mid"][str(i)]["conv1"]["kernel"])


def test_wrong_sizes_are_refused(model):
    vqgan = nnx.merge(*model)
    with pytest.raises(ValueError, match="multiples of 16"):
        vqgan.encode(jnp.zeros((1, 64, 40, 3)))
    with pytest.raises(ValueError, match="expected \\[batch, height, width\\]"):
        vqgan.decode_codes(jnp.zeros((1, 16), jnp.int32))


def test_bfloat16_is_close(golden, model):
    """The computation dtype reaches the convolutions; the distances stay float32."""
    _, params = model
    graphdef, _ = abstract_model(lambda: MaskgitVQGAN(tiny_config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(params, x):
        vqgan = nnx.merge(graphdef, params)
        hidden = vqgan.encoder(x)
        return hidden, vqgan.quantize.distances(hidden)

    hidden, distances = run(params, images(2, 64, 0))
    assert hidden.dtype == jnp.bfloat16
    assert distances.dtype == jnp.float32
    error = compare(golden, "encoder.conv_out", nchw(hidden[:1].astype(jnp.float32)), 0.05)
    assert error > 1e-4  # a smaller error would mean float32: the dtype was ignored
