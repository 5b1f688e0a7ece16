"""Table of the published models and the embedded one: architecture, sampling settings, location of the weights."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from titok_jax.runtime.messages import near, near_path
from titok_jax.runtime.paths import HUB_PREFIX, as_path

EMBEDDED = Path(__file__).parents[1] / "embedded"
KINDS = ("tokenizer", "generator", "vqgan")
CHECKPOINTS = "fun-research/TiTok"  # the repository of the published single-file checkpoints


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with a name.

    Attributes:
      name: for `load_tokenizer` and `load_generator`. A generator has the same name as the tokenizer whose tokens it makes.
      kind: "tokenizer", "generator" or "vqgan".
      what: a short description.
      architecture: the section `model` of the published `config.json`, with interpolations resolved. The VQGAN was published
        without a configuration, so its section is our own. None for an embedded model, whose folder has the configuration.
      image_size: pixels per side.
      num_params: number of parameters, without buffers.
      repository, file: location of the weights on the Hugging Face hub. A `config.json` is beside each `model.safetensors`.
      checkpoint: name of the published single-file checkpoint (a PyTorch pickle).
      fid: published FID on ImageNet 256 x 256. For a tokenizer (rFID) it compares reconstructions with the validation
        images; for a generator (gFID), 50,000 generated images with the training set's statistics. rFID and gFID cannot be
        compared.
      folder: folder of an embedded model.
    """

    name: str
    kind: str
    what: str
    architecture: Mapping[str, Any] | None = None
    image_size: int = 256
    num_params: int | None = None
    repository: str | None = None
    file: str = "model.safetensors"
    checkpoint: str | None = None
    fid: float | None = None
    folder: Path | None = None

    @property
    def published_config(self) -> dict[str, Any]:
        """The configuration in the format of `config.json`."""
        return {"model": self.architecture, "dataset": {"preprocessing": {"crop_size": self.image_size}}}

    @property
    def sampling(self) -> str:
        """A description of the published sampling settings; "" if this is not a published generator."""
        if self.kind != "generator" or self.architecture is None:
            return ""
        settings = self.architecture["generator"]
        return (
            f"{settings['num_steps']} steps, temperature {settings['randomize_temperature']}, guidance "
            f"{settings['guidance_scale']} {settings['guidance_decay']}, annealed"
        )

    @property
    def configuration(self) -> str:
        """A description of the architecture; "" if this is not a published model."""
        if self.architecture is None:
            return ""
        if self.kind == "vqgan":
            return "convolutions of 128 x (1, 1, 2, 2, 4), 2 blocks each, 1,024 codes of 256 channels"
        if self.kind == "generator":
            model = self.architecture["generator"]
            size = f"{model['num_hidden_layers']} layers, width {model['hidden_size']}, MLP {model['intermediate_size']}"
            return f"{model['model_type']}, {size}, {model['num_attention_heads']} heads, {model['image_seq_len']} tokens"
        model = self.architecture["vq_model"]
        latents = f"{model['num_latent_tokens']} x {model['token_size']} channels"
        if "codebook_size" in model:
            latents += f", {model['codebook_size']:,} codes" + (" on the unit sphere" if model["use_l2_norm"] else "")
        stages = "two-stage" if model.get("is_legacy", True) else "single-stage"
        sizes = f"{model['vit_enc_model_size']} encoder, {model['vit_dec_model_size']} decoder"
        return f"{stages}, {sizes}, patches of {model['vit_enc_patch_size']}, {latents}"

    def cached(self) -> str | None:
        """The local path of the weights, or None if they are not on this machine. Does not use the network."""
        if self.folder is not None:
            path = self.folder / self.file
            return str(path) if path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repository, self.file)
        return path if isinstance(path, str) else None


def _legacy(size: str, num_tokens: int) -> dict[str, Any]:
    """The section `vq_model` of a two-stage tokenizer."""
    return {
        "codebook_size": 4096,
        "token_size": 12,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": size,
        "vit_dec_model_size": size,
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": num_tokens,
        "finetune_decoder": True,
    }


def _single_stage(encoder: str, decoder: str, num_tokens: int, mode: str) -> dict[str, Any]:
    """The section `vq_model` of a single-stage tokenizer."""
    vq = {"codebook_size": 8192, "use_l2_norm": False, "commitment_cost": 0.25}
    return (vq if mode == "vq" else {"quantize_mode": "vae"}) | {
        "token_size": 64 if mode == "vq" else 16,
        "vit_enc_model_size": encoder,
        "vit_dec_model_size": decoder,
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": num_tokens,
        "finetune_decoder": False,
        "is_legacy": False,
    }


def _generator(model_type: str, num_tokens: int, sizes: tuple[int, int, int, int], **sampling) -> dict[str, Any]:
    """The section `generator`. The sizes are width, layers, heads and MLP width."""
    width, layers, heads, mlp = sizes
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "dropout": 0.1,
        "attn_drop": 0.1,
        "class_label_dropout": 0.1,
        "image_seq_len": num_tokens,
        "condition_num_classes": 1000,
        **sampling,
    }


def _tokenizer(name: str, what: str, vq_model: dict[str, Any], num_params: int, fid: float) -> Model:
    vae = vq_model.get("quantize_mode") == "vae"
    published = f"{name}_c16" if vae else name  # 16 channels
    return Model(
        name,
        "tokenizer",
        what,
        {"vq_model": vq_model},
        num_params=num_params,
        repository=f"yucornetto/tokenizer_{published}_imagenet",
        checkpoint=f"{published}.bin" if vae else f"tokenizer_{published}.bin",
        fid=fid,
    )


def _published_generator(name: str, what: str, vq_model, generator: dict[str, Any], num_params: int, fid: float) -> Model:
    return Model(
        name,
        "generator",
        what,
        {"vq_model": vq_model, "generator": generator},
        num_params=num_params,
        repository=f"yucornetto/generator_{name}_imagenet",
        checkpoint=f"generator_{name}.bin",
        fid=fid,
    )


_L32, _B64, _S128 = _legacy("large", 32), _legacy("base", 64), _legacy("small", 128)
_VIT, _UVIT = (768, 24, 16, 3072), (1024, 20, 16, 4096)


def _sampling(steps: int, temperature: float, scale: float, schedule: str) -> dict[str, Any]:
    return {
        "num_steps": steps,
        "randomize_temperature": temperature,
        "guidance_scale": scale,
        "guidance_decay": schedule,
    }


MODELS = (
    Model(
        "digits",
        "tokenizer",
        "embedded: hand-written digits, 32 x 32",
        image_size=32,
        num_params=493_884,
        folder=EMBEDDED / "digits" / "tokenizer",
    ),
    Model(
        "digits",
        "generator",
        "embedded: hand-written digits, 32 x 32",
        image_size=32,
        num_params=829_184,
        folder=EMBEDDED / "digits",
    ),
    _tokenizer("titok_l32", "TiTok-L-32: 32 tokens of 4,096 codes", _L32, 641_054_735, 2.21),
    _tokenizer("titok_b64", "TiTok-B-64: 64 tokens of 4,096 codes", _B64, 204_814_095, 1.70),
    _tokenizer("titok_s128", "TiTok-S-128: 128 tokens of 4,096 codes", _S128, 83_674_639, 1.71),
    _tokenizer(
        "titok_bl64_vq8k",
        "TiTok-BL-64: 64 tokens of 8,192 codes",
        _single_stage("base", "large", 64, "vq"),
        390_016_148,
        2.06,
    ),
    _tokenizer(
        "titok_bl128_vq8k",
        "TiTok-BL-128: 128 tokens of 8,192 codes",
        _single_stage("base", "large", 128, "vq"),
        390_179_988,
        1.49,
    ),
    _tokenizer(
        "titok_sl256_vq8k",
        "TiTok-SL-256: 256 tokens of 8,192 codes",
        _single_stage("small", "large", 256, "vq"),
        330_260_884,
        1.03,
    ),
    _tokenizer(
        "titok_ll32_vae",
        "TiTok-LL-32 VAE: 32 latents of 16 channels",
        _single_stage("large", "large", 32, "vae"),
        606_879_604,
        1.61,
    ),
    _tokenizer(
        "titok_bl64_vae",
        "TiTok-BL-64 VAE: 64 latents of 16 channels",
        _single_stage("base", "large", 64, "vae"),
        389_418_100,
        1.25,
    ),
    _tokenizer(
        "titok_bl128_vae",
        "TiTok-BL-128 VAE: 128 latents of 16 channels",
        _single_stage("base", "large", 128, "vae"),
        389_581_940,
        0.84,
    ),
    _published_generator(
        "titok_l32",
        "MaskGIT-ViT for TiTok-L-32",
        _L32,
        _generator("ViT", 32, _VIT, **_sampling(8, 9.5, 4.5, "linear")),
        177_202_432,
        2.77,
    ),
    _published_generator(
        "titok_b64",
        "MaskGIT-ViT for TiTok-B-64",
        _B64,
        _generator("ViT", 64, _VIT, **_sampling(8, 11.0, 3.0, "linear")),
        177_227_008,
        2.48,
    ),
    _published_generator(
        "titok_s128",
        "MaskGIT-UViT for TiTok-S-128",
        _S128,
        _generator("UViT", 128, _UVIT, **_sampling(64, 2.8, 6.9, "power-cosine")),
        294_990_848,
        1.97,
    ),
    Model(
        "maskgit_vqgan",
        "vqgan",
        "MaskGIT-VQGAN: 256 tokens of 1,024 codes",
        {"maskgit_vqgan": {}},
        num_params=54_515_587,
        repository="fun-research/TiTok",
        file="maskgit-vqgan-imagenet-f16-256.bin",
        checkpoint="maskgit-vqgan-imagenet-f16-256.bin",
        fid=2.28,
    ),
)


def names(kind: str | None = None) -> list[str]:
    """The known names, each once, of one kind or of all kinds."""
    return list(dict.fromkeys(model.name for model in MODELS if kind in (None, model.kind)))


def find(name_or_path: str | os.PathLike, kind: str | None = None) -> Model | Path | epath.Path | str:
    """Finds the model that a user's name or path refers to.

    Args:
      name_or_path: a known name, a folder, a file, a Hugging Face repository, "hf://owner/name", or one file in it,
        "hf://owner/name/FILE"; the latter two also with "@revision". Repositories and files of the published weights are
        known without "hf://" too.
      kind: one of KINDS; None for any kind.

    Returns:
      The table entry for a known name, the path for a folder or file, or "owner/name", "owner/name/FILE" or one of them
      with "@revision" for the hub.

    Raises:
      ValueError: it is none of these, or the revision cannot be one. The message has what was perhaps meant; the known names
        if the text is none of a file.
    """
    text = os.fspath(name_or_path)
    for model in MODELS:
        if model.name == text and kind in (None, model.kind):
            return model
    published = {model.repository for model in MODELS} | {f"{CHECKPOINTS}/{model.checkpoint}" for model in MODELS}
    if text.startswith(HUB_PREFIX) or (text.partition("@")[0] in published and not as_path(text).exists()):
        repository, at, revision = text.removeprefix(HUB_PREFIX).partition("@")
        repository = repository.strip("/")
        if repository.count("/") < 1 or ".." in repository:
            raise ValueError(
                f"{text!r}: expected {HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name@revision (or a file, owner/name/FILE)"
            )
        if at:
            check_revision(revision)
        return repository + at + revision
    if as_path(text).exists():
        return as_path(text)
    others = [model.kind for model in MODELS if model.name == text]
    if others:
        raise ValueError(f"{text!r} is a {others[0]}, not a {kind}; of this kind there are: {', '.join(names(kind))}")
    if _is_path(text):
        hub = f"; a repository on the hub is {HUB_PREFIX}{text}" if re.fullmatch(r"[\w-]+/[\w.-]+", text) else ""
        raise ValueError(f"{text}: no such file or folder{near_path(text) or hub}")
    known = names(kind)
    raise ValueError(
        f"unknown model {text!r}: it is no file or folder here, not {HUB_PREFIX}owner/name, and none of "
        f"{', '.join(known)}{near(text, known) or near_path(text)}"
    )


def _is_path(text: str) -> bool:
    """Whether a text that names nothing was meant as a path."""
    return "/" in text or os.sep in text or text.startswith("~") or bool(re.search(r"\.[a-z]+$", text))


def check_revision(revision: str) -> None:
    """Raises ValueError unless the text can be the name of a branch, a tag or a commit. It becomes a part of file paths."""
    if ".." in revision or not all(re.fullmatch(r"\w[\w.+=#@-]*", part) for part in revision.split("/")):
        raise ValueError(f"revision {revision!r}: expected the name of a branch, a tag or a commit")


def what(name: str) -> str:
    """A description of the models with a name."""
    return "; ".join(dict.fromkeys(model.what for model in MODELS if model.name == name))


def table(models: Sequence[Model] = MODELS) -> str:
    """Formats the models as two text tables: an overview, and the architectures with the locations of the weights."""
    fid = {"tokenizer": "rFID", "generator": "gFID", "vqgan": "rFID"}
    rows = [("name", "kind", "parameters", "published", "sampling", "on this machine")]
    details = [("name", "kind", "configuration", "weights", "published checkpoint")]
    for model in models:
        rows.append(
            (
                model.name,
                model.kind,
                "" if model.num_params is None else f"{model.num_params:,}",
                "" if model.fid is None else f"{fid[model.kind]} {model.fid:.2f}",
                model.sampling,
                "yes" if model.cached() else "no",
            )
        )
        weights = "in this package" if model.folder else f"{HUB_PREFIX}{model.repository}/{model.file}"
        details.append((model.name, model.kind, model.configuration, weights, model.checkpoint or ""))
    return f"{_aligned(rows)}\n\n{_aligned(details)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
