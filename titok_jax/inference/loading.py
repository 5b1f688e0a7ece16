"""Loads models by name, from a folder or from a file."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from titok_jax.inference.functions import DTYPES, ModelFunctions
from titok_jax.inference.generator import Generator
from titok_jax.inference.tokenizer import VQGAN, Tokenizer
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.titok import TiTokConfig
from titok_jax.runtime import placement, sharding
from titok_jax.weights import model_files, pretrained, published_models


def load_tokenizer(
    source: str | os.PathLike,
    *,
    dtype: Any = "float32",
    precision: str | None = None,
    param_dtype: Any = "float32",
    mesh: Mesh | str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      source: a name ("digits", "titok_l32", ...: `python -m titok_jax.zoo` lists them), a Hugging Face repository
        ("hf://owner/name", optionally with "@revision"), a folder, or a file of weights. A generator's folder or repository
        stands for the tokenizer in it.
      dtype: computation dtype, "float32" or "bfloat16".
      precision: of matrix products: "highest", "high" or "default" (what TPUs and GPUs compute fastest: bfloat16 or TF32).
        None means "highest" for float32, so that tokens and images are the same on every kind of device, and "default" for
        bfloat16.
      param_dtype: of the weights in memory, "float32" or "bfloat16" (half the memory; each weight is rounded once).
      mesh: "local" (all devices of this process), or from `titok_jax.runtime.sharding.make_mesh`. Parameters are read
        directly onto their shards, and batches are sharded; their size must be a multiple of data x fsdp. None means one
        device.
      revision: branch, tag or commit on the hub.
      token: for the hub, if it is not the one of `hf auth login` or HF_TOKEN.

    Raises:
      ValueError: for an unknown name (the message lists the known ones), or for weights that do not fit.
      FileNotFoundError: if a folder holds no model.
      DownloadError (an OSError): if the download from the hub fails.
    """
    return _load(Tokenizer, source, TiTokConfig, dtype, precision, param_dtype, mesh, revision, token)


def load_tokenizer_config(
    source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> TiTokConfig:
    """Loads only the configuration of a tokenizer, without its weights. Errors are those of `load_tokenizer`."""
    return pretrained.load_config(source, TiTokConfig, revision=revision, token=token)


def load_generator(
    source: str | os.PathLike,
    *,
    dtype: Any = "float32",
    precision: str | None = None,
    param_dtype: Any = "float32",
    mesh: Mesh | str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Generator:
    """Loads a generator. Arguments and errors are those of `load_tokenizer`. Published generators have the names of their
    tokenizers."""
    return _load(Generator, source, GeneratorConfig, dtype, precision, param_dtype, mesh, revision, token)


def load_vqgan(
    source: str | os.PathLike,
    *,
    dtype: Any = "float32",
    precision: str | None = None,
    param_dtype: Any = "float32",
    mesh: Mesh | str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> VQGAN:
    """Loads a MaskGIT-VQGAN: "maskgit_vqgan", a folder, or a file. The file may be a PyTorch file, a safetensors file or the
    original JAX checkpoint (Flax msgpack). Other arguments and errors are those of `load_tokenizer`."""
    return _load(VQGAN, source, MaskgitVQGANConfig, dtype, precision, param_dtype, mesh, revision, token)


def load_image_model(
    source: str | os.PathLike,
    *,
    dtype: Any = "float32",
    precision: str | None = None,
    param_dtype: Any = "float32",
    mesh: Mesh | str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Tokenizer:
    """Loads what turns images into tokens: a TiTok or a MaskGIT-VQGAN, whichever `source` is. Arguments and errors are those
    of `load_tokenizer`."""
    kind = pretrained.tokenizer_kind(source, revision=revision, token=token)
    cls = VQGAN if kind is MaskgitVQGANConfig else Tokenizer
    return _load(cls, source, kind, dtype, precision, param_dtype, mesh, revision, token)


def load_image_config(
    source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> TiTokConfig | MaskgitVQGANConfig:
    """Loads only the configuration of a TiTok or a MaskGIT-VQGAN, without its weights. The type of the result says which of
    the two `source` is. Errors are those of `load_tokenizer`."""
    kind = pretrained.tokenizer_kind(source, revision=revision, token=token)
    return pretrained.load_config(source, kind, revision=revision, token=token)


def _load(cls: type, source, kind: type, dtype, precision, param_dtype, mesh, revision, token):
    ModelFunctions(None, dtype, precision)  # reports bad values before weights are read
    if jnp.dtype(param_dtype).name not in DTYPES:
        raise ValueError(f"param_dtype is {param_dtype!r}, expected 'float32' or 'bfloat16'")
    if isinstance(mesh, str):
        if mesh != "local":
            raise ValueError(f"mesh is {mesh!r}, expected a mesh, 'local' or None")
        mesh = sharding.local_mesh()
    put = (lambda path, array: jax.device_put(array)) if mesh is None else placement.placer(mesh)

    def place(path: str, array: np.ndarray) -> jax.Array:
        return put(path, array.astype(jnp.dtype(param_dtype)))

    config, params = pretrained.load(source, kind, revision=revision, token=token, place=place)
    return cls(config, params, dtype=dtype, precision=precision, mesh=mesh)


def load_pair(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    dtype: Any = "float32",
    precision: str | None = None,
    param_dtype: Any = "float32",
    mesh: Mesh | str | None = None,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[Tokenizer, Generator]:
    """Loads a generator and the tokenizer for its tokens.

    If `tokenizer` is None, the tokenizer has the same name as the generator, or is in the generator's folder or repository.
    The published tokenizers are in repositories of their own, which have their own revisions. All files of a repository are
    read from one commit.

    Raises:
      ValueError: as `load_tokenizer`, and if the two do not fit together.
      FileNotFoundError: as `load_tokenizer`, and if no tokenizer is named and none belongs to the generator.
    """
    revisions = {"revision": revision, "tokenizer_revision": tokenizer_revision}
    (source, tokenizer), revisions = model_files.pin_pair(source, tokenizer, **revisions, token=token)
    pair_configs(source, tokenizer, **revisions, token=token)  # reports a mismatch before weights are read
    options = {"dtype": dtype, "precision": precision, "param_dtype": param_dtype, "mesh": mesh, "token": token}
    generator = load_generator(source, revision=revisions["revision"], **options)
    source = source if tokenizer is None else tokenizer
    return load_tokenizer(source, revision=revisions["tokenizer_revision"], **options), generator


def pair_configs(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[TiTokConfig, GeneratorConfig]:
    """Loads only the configurations of a pair and checks that they fit together. Errors are those of `load_pair`."""
    revisions = {"revision": revision, "tokenizer_revision": tokenizer_revision}
    (source, tokenizer), revisions = model_files.pin_pair(source, tokenizer, **revisions, token=token)
    generator = pretrained.load_config(source, GeneratorConfig, revision=revisions["revision"], token=token)
    if (
        tokenizer is None
        and source not in published_models.names("tokenizer")
        and not (epath.Path(source) / "tokenizer").is_dir()
    ):
        raise FileNotFoundError(f"{source} holds no sub-folder tokenizer: name the tokenizer of this generator")
    source = source if tokenizer is None else tokenizer
    pair = load_tokenizer_config(source, revision=revisions["tokenizer_revision"], token=token), generator
    check_pair(*pair)
    return pair


def check_pair(tokenizer: TiTokConfig, generator: GeneratorConfig) -> None:
    """Raises ValueError unless the generator was made for the tokens of this tokenizer."""
    if not tokenizer.has_tokens:
        raise ValueError("the tokenizer is a VAE, which has no token ids; the generator needs a vq tokenizer")
    for what, ours, theirs in (
        ("tokens per image", tokenizer.num_latent_tokens, generator.num_tokens),
        ("codebook size", tokenizer.codebook_size, generator.codebook_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the tokenizer does not fit the generator: {what} {ours} against {theirs}; name the one it was trained with"
            )
