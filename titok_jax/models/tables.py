"""The published names and layouts of every model's parameters: one table per model.

A "path" is the keys of our nested dict of parameters joined by "/", e.g. `encoder/transformer/attn/qkv/kernel`. A table is a
list of `Rule`s. The first rule whose pattern matches a path gives the published name and the change of layout. Our stacked
blocks have a leading layer axis; the published names number them, written as "{layer}" in a rule. The tables are applied by
`titok_jax.weights.convert`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from titok_jax.models import perceptual
from titok_jax.models.discriminator import BLUR_TAPS
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig


class Layout(NamedTuple):
    """A change of layout between one of our arrays and one or more published arrays."""

    publish: Callable[[Any], tuple]  # ours -> published arrays
    load: Callable[[tuple], Any]  # published arrays -> ours


def _single(publish: Callable, load: Callable) -> Layout:
    return Layout(lambda a: (publish(a),), lambda arrays: load(arrays[0]))


SAME = _single(lambda a: a, lambda a: a)
ROW = _single(lambda a: a[None], lambda a: a[0])  # [...] <-> [1, ...]
LINEAR = _single(lambda a: a.T, lambda a: a.T)  # [in, out] <-> [out, in]
CONV = _single(lambda a: a.transpose(3, 2, 0, 1), lambda a: a.transpose(2, 3, 1, 0))  # HWIO <-> OIHW
CHANNELS = _single(lambda a: a[:, None, None], lambda a: a[:, 0, 0])  # [C] <-> [C, 1, 1]
HEAD = _single(lambda a: a[None, :, None, None], lambda a: a[0, :, 0, 0])  # [in] <-> [1, in, 1, 1]
CONV1X1 = _single(lambda a: a.T[:, :, None, None], lambda a: a[:, :, 0, 0].T)  # [in, out] <-> [out, in, 1, 1]
# [D, 3, D] <-> [3 D, D]: query, key and value are stacked along the output
QKV = _single(
    lambda a: a.transpose(1, 2, 0).reshape(3 * a.shape[2], a.shape[0]),
    lambda a: a.reshape(3, a.shape[0] // 3, a.shape[1]).transpose(2, 0, 1),
)
QKV_BIAS = _single(lambda a: a.reshape(-1), lambda a: a.reshape(3, -1))
# Query, key and value as separate published tensors
SPLIT_QKV = Layout(
    lambda a: tuple(a[:, i].T for i in range(3)),
    lambda arrays: np.stack([a.T for a in arrays], axis=1),
)
SPLIT_QKV_BIAS = Layout(lambda a: tuple(a[i] for i in range(3)), lambda arrays: np.stack(arrays))


def patches(patch_size: int) -> Layout:
    """Patchify matmul [p p 3, D] (pixel order: row, column, channel) <-> kernel [D, 3, p, p] of a strided convolution."""
    p = patch_size
    return _single(
        lambda a: a.reshape(p, p, 3, a.shape[1]).transpose(3, 2, 0, 1),
        lambda a: a.transpose(2, 3, 1, 0).reshape(p * p * 3, a.shape[0]),
    )


class Rule(NamedTuple):
    pattern: str  # regular expression that matches a whole path
    names: str | tuple[str, ...]  # published name(s); \1 refers to the pattern's groups, {layer} to the stacked layer
    layout: Layout = SAME


Table = list[Rule]


def _norm(ours: str, published: str) -> list[Rule]:
    return [Rule(ours + "/scale", published + ".weight"), Rule(ours + "/bias", published + ".bias")]


def _linear(ours: str, published: str, layout: Layout = LINEAR) -> list[Rule]:
    return [Rule(ours + "/kernel", published + ".weight", layout), Rule(ours + "/bias", published + ".bias")]


def titok_table(patch_size: int) -> Table:
    """All TiTok variants, including the pixel decoder of stage 2 (`pixel_quantize`, `pixel_decoder`)."""
    tower, block = r"(encoder|decoder)", r"(encoder|decoder)/transformer"
    return [
        Rule(r"latent_tokens", "latent_tokens"),
        Rule(tower + r"/(class_embedding|positional_embedding|latent_token_positional_embedding|mask_token)", r"\1.\2"),
        *_linear(r"encoder/patch_embed", "encoder.patch_embed", patches(patch_size)),
        *_linear(r"decoder/decoder_embed", "decoder.decoder_embed"),
        *_norm(tower + r"/(ln_pre|ln_post)", r"\1.\2"),
        *_norm(block + r"/norm(\d)", r"\1.transformer.{layer}.ln_\2"),
        Rule(block + r"/attn/qkv/kernel", r"\1.transformer.{layer}.attn.in_proj_weight", QKV),
        Rule(block + r"/attn/qkv/bias", r"\1.transformer.{layer}.attn.in_proj_bias", QKV_BIAS),
        *_linear(block + r"/attn/proj", r"\1.transformer.{layer}.attn.out_proj"),
        *_linear(block + r"/mlp/fc1", r"\1.transformer.{layer}.mlp.c_fc"),
        *_linear(block + r"/mlp/fc2", r"\1.transformer.{layer}.mlp.c_proj"),
        *_linear(r"encoder/conv_out", "encoder.conv_out", CONV1X1),
        *_linear(r"decoder/ffn_(\d)", r"decoder.ffn.\1", CONV1X1),
        *_linear(r"decoder/conv_out", "decoder.conv_out", CONV),
        Rule(r"(quantize|pixel_quantize)/embedding", r"\1.embedding.weight"),
        *vqgan_rules(r"(pixel_decoder)"),
    ]


def vit_generator_table() -> Table:
    """The BERT-style generator."""
    emb, layer = "model.embeddings.", "model.encoder.layer.{layer}."
    separate = tuple(layer + f"attention.self.{n}" for n in ("query", "key", "value"))
    return [
        Rule(r"embeddings/(word_embeddings|position_embeddings|token_type_embeddings)", emb + r"\1.weight"),
        *_norm(r"embeddings/norm", emb + "LayerNorm"),
        Rule(r"layers/attn/qkv/kernel", tuple(n + ".weight" for n in separate), SPLIT_QKV),
        Rule(r"layers/attn/qkv/bias", tuple(n + ".bias" for n in separate), SPLIT_QKV_BIAS),
        *_linear(r"layers/attn/proj", layer + "attention.output.dense"),
        *_norm(r"layers/norm1", layer + "attention.output.LayerNorm"),
        *_linear(r"layers/mlp/fc1", layer + "intermediate.dense"),
        *_linear(r"layers/mlp/fc2", layer + "output.dense"),
        *_norm(r"layers/norm2", layer + "output.LayerNorm"),
        *_linear(r"lm_head", "model.lm_head"),
    ]


def uvit_generator_table() -> Table:
    """The U-ViT generator."""
    rules = [Rule(r"pos_embed", "pos_embed", ROW), Rule(r"embeddings", "embeddings.weight")]
    for ours, published in ((r"(in_blocks|out_blocks)", r"\1.{layer}"), (r"(mid_block)", r"\1")):
        rules += [
            *_norm(ours + r"/norm(\d)", published + r".norm\2"),
            Rule(ours + r"/attn/qkv/kernel", published + ".attn.qkv.weight", QKV),
            *_linear(ours + r"/attn/proj", published + ".attn.proj"),
            *_linear(ours + r"/mlp/fc(\d)", published + r".mlp.fc\2"),
            *_linear(ours + r"/skip_linear", published + ".skip_linear"),
        ]
    return [*rules, *_norm(r"norm", "norm"), *_linear(r"lm_head", "lm_head")]


def vqgan_rules(tower: str) -> Table:
    """The encoder or decoder of the MaskGIT-VQGAN. `tower` is a pattern with one group, which matches its name."""
    rules = []
    for ours, published in ((r"/(down|up)/(\d+)/block/(\d+)", r"\1.\2.\3.block.\4"), (r"/mid/(\d+)", r"\1.mid.\2")):
        for n in "12":
            rules += _norm(f"{tower}{ours}/norm{n}", f"{published}.norm{n}")
            rules += _linear(f"{tower}{ours}/conv{n}", f"{published}.conv{n}", CONV)
        rules += _linear(f"{tower}{ours}/nin_shortcut", f"{published}.nin_shortcut", CONV1X1)
    return [
        *rules,
        *_linear(tower + r"/up/(\d+)/upsample_conv", r"\1.up.\2.upsample_conv", CONV),
        *_linear(tower + r"/(conv_in|conv_out)", r"\1.\2", CONV),
        *_norm(tower + r"/norm_out", r"\1.norm_out"),
    ]


def maskgit_vqgan_table() -> Table:
    """The MaskGIT-VQGAN in its PyTorch format."""
    return [
        *_linear(r"encoder/conv_out", "encoder.conv_out", CONV1X1),  # before the general rule, for the decoder's 3x3
        *vqgan_rules(r"(encoder|decoder)"),
        Rule(r"quantize/embedding", "quantize.embedding.weight"),
    ]


PUBLISHED_VQGAN = MaskgitVQGANConfig()


def jax_vqgan_names(config: MaskgitVQGANConfig = PUBLISHED_VQGAN) -> dict[str, str]:
    """{path in the `params` of the original JAX MaskGIT-VQGAN: published PyTorch name}.

    Flax numbered the modules of each class in call order. So the numbers of the residual blocks continue from level to
    level: in the encoder from the finest level to the middle, in the decoder from the middle to the finest level.
    """
    levels, blocks = len(config.channel_mult), range(config.num_res_blocks)
    widths = config.widths
    down = [f"down.{level}.block.{i}" for level in range(levels) for i in blocks]
    up = [f"up.{level}.block.{i}" for level in reversed(range(levels)) for i in blocks]
    mid = [f"mid.{i}" for i in blocks]
    # The widths of the inputs of the levels. Where it differs from the level's width, the first block has a projection.
    inputs = {"down": (config.hidden_channels, *widths[:-1]), "up": (*widths[1:], widths[-1])}
    convolutions = {
        "encoder": {0: ("conv_in", False), 1: ("conv_out", True)},
        "decoder": {0: ("conv_in", True)}
        | {levels - level: (f"up.{level}.upsample_conv", True) for level in range(1, levels)}
        | {levels: ("conv_out", True)},
    }
    names = {}
    for tower, order in (("encoder", down + mid), ("decoder", mid + up)):
        for number, block in enumerate(order):
            ours, theirs = f"{tower}/ResBlock_{number}", f"{tower}.{block}"
            for i in range(2):
                names[f"{ours}/GroupNorm_{i}/scale"] = f"{theirs}.norm{i + 1}.weight"
                names[f"{ours}/GroupNorm_{i}/bias"] = f"{theirs}.norm{i + 1}.bias"
                names[f"{ours}/Conv_{i}/kernel"] = f"{theirs}.conv{i + 1}.weight"
            kind, *place = block.split(".")
            if kind != "mid" and place[-1] == "0" and inputs[kind][int(place[0])] != widths[int(place[0])]:
                names[f"{ours}/Conv_2/kernel"] = f"{theirs}.nin_shortcut.weight"
        names[f"{tower}/GroupNorm_0/scale"] = f"{tower}.norm_out.weight"
        names[f"{tower}/GroupNorm_0/bias"] = f"{tower}.norm_out.bias"
        for number, (name, has_bias) in convolutions[tower].items():
            names[f"{tower}/Conv_{number}/kernel"] = f"{tower}.{name}.weight"
            if has_bias:
                names[f"{tower}/Conv_{number}/bias"] = f"{tower}.{name}.bias"
    names["quantizer/codebook"] = "quantize.embedding.weight"
    return names


def discriminator_table() -> Table:
    """The discriminator. Its constant blur kernels are not parameters here; see `discriminator_buffers`."""
    return [
        *_linear(r"block_in", "block_in.0", CONV),
        *_linear(r"blocks/(\d+)/conv", r"blocks.\1.0", CONV),
        *_norm(r"blocks/(\d+)/norm", r"blocks.\1.2"),
        *_linear(r"to_logits_0", "to_logits.0", CONV1X1),
        *_linear(r"to_logits_2", "to_logits.2", CONV),
    ]


def discriminator_buffers(num_stages: int) -> dict[str, np.ndarray]:
    """The blur kernels [1, 1, 4, 4] that a published state dict of the discriminator holds beside its parameters.

    They must be added when weights are published, and left out when weights are loaded.
    """
    taps = np.asarray(BLUR_TAPS, np.float32)
    kernel = np.outer(taps, taps) / np.square(taps.sum())
    return {f"blocks.{i}.1.kernel": kernel[None, None] for i in range(num_stages)}


def perceptual_table() -> Table:
    """ConvNeXt-S with torchvision's names, and LPIPS, with the prefixes `convnext.` and `lpips.` of the published code.

    The constants that normalise the images are not parameters here.
    """
    stages = len(perceptual.CONVNEXT_S)
    rules = []
    # torchvision alternates downsampling and stages. features.0 is the first convolution, then its norm; features.2 is a
    # norm, then the second convolution; and so on.
    for i in range(stages):
        norm, conv = (0, 1) if i else (1, 0)
        down, block = f"convnext.features.{2 * i}", f"convnext.features.{2 * i + 1}.{{layer}}"
        rules += [
            *_norm(f"convnext/downsample/{i}/norm", f"{down}.{norm}"),
            *_linear(f"convnext/downsample/{i}/conv", f"{down}.{conv}", CONV),
            Rule(f"convnext/stages/{i}/layer_scale", f"{block}.layer_scale", CHANNELS),
            *_linear(f"convnext/stages/{i}/dwconv", f"{block}.block.0", CONV),
            *_norm(f"convnext/stages/{i}/norm", f"{block}.block.2"),
            *_linear(f"convnext/stages/{i}/mlp/fc1", f"{block}.block.3"),
            *_linear(f"convnext/stages/{i}/mlp/fc2", f"{block}.block.5"),
        ]
    return [
        *rules,
        *_norm("convnext/norm", "convnext.classifier.0"),
        *_linear("convnext/head", "convnext.classifier.2"),
        *_linear(r"lpips/net/(slice\d)/(\d+)", r"lpips.net.\1.\2", CONV),
        Rule(r"lpips/lin/(\d)", r"lpips.lin\1.model.1.weight", HEAD),
    ]


def inception_table() -> Table:
    """InceptionV3 with torch-fidelity's names. The batch statistics are parameters here."""
    conv = r"convs/([\w.]+)"
    return [
        Rule(conv + "/kernel", r"\1.conv.weight", CONV),
        Rule(conv + "/scale", r"\1.bn.weight"),
        Rule(conv + "/bias", r"\1.bn.bias"),
        Rule(conv + "/(mean|var)", r"\1.bn.running_\2"),
        *_linear("fc", "fc"),
    ]


def digits_net_table() -> Table:
    """The digits classifier, in PyTorch's layouts. It is our own; there is no other published version."""
    return [*_linear(r"convs/(\d)", r"convs.\1", CONV), *_linear(r"(features|head)", r"\1")]
