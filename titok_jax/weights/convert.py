"""Conversion between our parameters and the published weights, with one table of names and layouts per model.

Our parameters are a nested dict. A "path" is its keys joined by "/", e.g. `encoder/transformer/attn/qkv/kernel`. A table is
a list of `Rule`s. The first rule whose pattern matches a path gives the published name and the change of layout. Our stacked
blocks have a leading layer axis; the published names number them, written as "{layer}" in a rule.

Every check is strict: a path without a rule is an error, and so is a published name that is missing, unexpected or has a
wrong shape. One message lists them all. torch is never imported here.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from titok_jax import models
from titok_jax.models.discriminator import BLUR_TAPS

Params = dict[str, Any]  # nested dict of arrays (or of ShapeDtypeStructs)


class WeightsError(ValueError):
    """The weights do not fit the model; the message lists every difference."""


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


def flatten(params: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {path: leaf}."""
    flat = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """{path: leaf} -> nested dict."""
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


class _Entry(NamedTuple):
    names: list[tuple[str, ...]]  # the published names per layer; a single entry if not stacked
    layout: Layout
    stacked: bool


def _entry(table: Table, path: str, shape: tuple[int, ...]) -> _Entry:
    for rule in table:
        match = re.fullmatch(rule.pattern, path)
        if match:
            names = rule.names if isinstance(rule.names, tuple) else (rule.names,)
            names = tuple(match.expand(name) for name in names)
            stacked = "{layer}" in names[0]
            layers = range(shape[0] if stacked else 1)
            return _Entry([tuple(n.replace("{layer}", str(i)) for n in names) for i in layers], rule.layout, stacked)
    raise WeightsError(f"no rule gives parameter {path!r} a published name")


def published_names(table: Table, params: Params) -> dict[str, str]:
    """Returns {path: published name}, with the first name if a parameter has several (layers, query/key/value).

    One name is enough for rules by name, such as weight decay: they treat all names of a parameter alike.
    """
    return {path: _entry(table, path, leaf.shape).names[0][0] for path, leaf in flatten(params).items()}


def published_shapes(table: Table, params: Params) -> dict[str, tuple[int, ...]]:
    """Returns {published name: shape in the published layout} for parameters that are arrays or ShapeDtypeStructs."""
    shapes = {}
    for path, leaf in flatten(params).items():
        entry = _entry(table, path, leaf.shape)
        one = jax.ShapeDtypeStruct(leaf.shape[1:] if entry.stacked else leaf.shape, leaf.dtype)
        outputs = jax.eval_shape(entry.layout.publish, one)
        for names in entry.names:
            shapes.update({name: out.shape for name, out in zip(names, outputs, strict=True)})
    return shapes


def to_published(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Our parameters -> {published name: array in the published layout}."""
    weights = {}
    for path, leaf in flatten(params).items():
        entry = _entry(table, path, leaf.shape)
        array = np.asarray(leaf)
        for names, one in zip(entry.names, array if entry.stacked else [array], strict=True):
            for name, out in zip(names, entry.layout.publish(one), strict=True):
                weights[name] = np.ascontiguousarray(out)
    return weights


def check_shapes(expected: Mapping[str, tuple], found: Mapping[str, tuple], source: str) -> None:
    """Raises WeightsError if names are missing or unexpected, or shapes are wrong; the message lists all of them."""
    problems = [f"missing: {n} {list(expected[n])}" for n in expected if n not in found]
    problems += [f"surplus: {n} {list(found[n])}" for n in found if n not in expected]
    problems += [
        f"shape of {n}: {list(found[n])}, expected {list(expected[n])}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    if problems:
        raise WeightsError(f"{source}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))


def from_published(
    table: Table,
    abstract: Params,
    weights: Mapping[str, Any],
    *,
    source: str,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:
    """{published name: array} -> our parameters, the exact inverse of `to_published`.

    Args:
      abstract: the model's parameters as arrays or ShapeDtypeStructs, for their shapes and dtypes.
      weights: {published name: value}. A value has `.shape`, and `np.asarray` converts it, so it may be read lazily. Only
        one of our parameters at a time is in memory, beside the results of `place`.
      source: name of the weights in errors (a file name).
      place: (path, array) -> array on its device; the default keeps numpy arrays.

    Raises:
      WeightsError: the message lists every missing or unexpected tensor and every wrong shape, or names the first tensor
        that is not floating-point or not finite.
    """
    check_shapes(published_shapes(table, abstract), {n: tuple(w.shape) for n, w in weights.items()}, source)
    flat = {
        path: place(path, _gather(_entry(table, path, leaf.shape), leaf, weights, source))
        for path, leaf in flatten(abstract).items()
    }
    return unflatten(flat)


def _gather(entry: _Entry, leaf: Any, weights: Mapping[str, Any], source: str) -> np.ndarray:
    """Makes one of our parameters from its published tensors. The tensors of one layer at a time are in memory beside it."""
    array = np.empty(leaf.shape, leaf.dtype)
    for part, names in zip(array if entry.stacked else [array], entry.names, strict=True):
        with np.errstate(over="ignore"):
            part[...] = entry.layout.load(tuple(_float(weights[name], name, source) for name in names))
        if not np.isfinite(part).all():
            raise WeightsError(
                f"{source}: tensor {' or '.join(names)} holds a NaN, an infinity or a number too large for {leaf.dtype}; "
                "the training that it is from diverged, or the file is damaged"
            )
    return array


def _float(value: Any, name: str, source: str) -> np.ndarray:
    array = np.asarray(value)
    check_float(array.dtype, name, source)
    return array


def check_float(dtype: np.dtype, name: str, source: str) -> None:
    """Raises WeightsError unless a tensor has a floating-point dtype."""
    if dtype.kind != "f" and dtype.name != "bfloat16":
        raise WeightsError(f"{source}: tensor {name} has dtype {dtype}, expected a floating-point type")


def decay_mask(table: Table, params: Params, exempt: Iterable[str]) -> Params:
    """A mask that is True where weight decay applies.

    The published rule decays a tensor if it has two or more axes in the *published* layout and its published name contains
    none of the `exempt` words.
    """
    shapes = published_shapes(table, params)
    names = published_names(table, params)
    flat = {p: len(shapes[n]) >= 2 and not any(word in n for word in exempt) for p, n in names.items()}
    return unflatten(flat)


# ---------------------------------------------------------------------------------------------------------------------
# The tables


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


PUBLISHED_VQGAN = models.MaskgitVQGANConfig()


def jax_vqgan_names(config: models.MaskgitVQGANConfig = PUBLISHED_VQGAN) -> dict[str, str]:
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


def jax_vqgan_to_published(
    tree: Mapping, *, source: str, config: models.MaskgitVQGANConfig = PUBLISHED_VQGAN
) -> dict[str, np.ndarray]:
    """The original JAX MaskGIT-VQGAN -> {published PyTorch name: array}, for `from_published` (which checks the shapes).

    The returned arrays are views.

    Args:
      tree: nested dict of arrays as in its msgpack checkpoint, `{"params": {"encoder": ...}}`, or its entry `params`. The
        convolutions are HWIO.
      source: name of the checkpoint in errors.

    Raises:
      WeightsError: the message lists every missing or unexpected path.
    """
    flat = flatten(tree.get("params", tree))
    names = jax_vqgan_names(config)
    problems = [f"missing: {path}" for path in names if path not in flat]
    problems += [f"surplus: {path}" for path in flat if path not in names]
    if problems:
        raise WeightsError(f"{source}: {len(problems)} arrays are not a JAX MaskGIT-VQGAN's:\n  " + "\n  ".join(problems))
    arrays = {path: np.asarray(array) for path, array in flat.items()}
    return {name: a.transpose(3, 2, 0, 1) if (a := arrays[path]).ndim == 4 else a for path, name in names.items()}


def published_to_jax_vqgan(weights: Mapping[str, Any], *, config: models.MaskgitVQGANConfig = PUBLISHED_VQGAN) -> Params:
    """The inverse of `jax_vqgan_to_published`: {published name: array} -> `{"params": {"encoder": ...}}`."""
    arrays = {path: np.asarray(weights[name]) for path, name in jax_vqgan_names(config).items()}
    return {"params": unflatten({path: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for path, a in arrays.items()})}


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
    stages = len(models.perceptual.CONVNEXT_S)
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


def table_for(config: models.Config) -> Table:
    """The table for the model that `config` describes."""
    if isinstance(config, models.TiTokConfig):
        return titok_table(config.patch_size)
    if isinstance(config, models.GeneratorConfig):
        return vit_generator_table() if config.model_type == "ViT" else uvit_generator_table()
    if isinstance(config, models.MaskgitVQGANConfig):
        return maskgit_vqgan_table()
    if isinstance(config, models.PerceptualConfig):
        return perceptual_table()
    if isinstance(config, models.InceptionConfig):
        return inception_table()
    if isinstance(config, models.DigitsNetConfig):
        return digits_net_table()
    return discriminator_table()
