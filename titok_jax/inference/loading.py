"""Models by name, folder or file, ready to use."""

import os

from etils import epath
from jax.sharding import Mesh

from titok_jax.inference.generator import Generator
from titok_jax.inference.tokenizer import Tokenizer
from titok_jax.inference.vqgan import VQGAN
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.titok import TiTokConfig
from titok_jax.runtime import sharding
from titok_jax.weights import pretrained, published_models


def load_tokenizer(
    source: str | os.PathLike,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Tokenizer:
    """A tokenizer: by name ("digits", "titok_l32", ...: `python -m titok_jax.zoo`), of a Hugging Face repository
    ("hf://owner/name", also with "@revision"), from a folder (of a generator's folder, the tokenizer in it) or a file of
    weights.

    Args:
      dtype: computation dtype, "float32" or "bfloat16".
      mesh: from `titok_jax.sharding.make_mesh`: every parameter is read straight onto its shards, and batches, whose size
        must be a multiple of data x fsdp, are cut; None: one device.
      revision: branch, tag or commit, of what is on the hub.
      token: for the hub, if not that of `hf auth login` or HF_TOKEN.

    Raises:
      ValueError: an unknown name (the message lists the known ones), or weights that do not fit.
      FileNotFoundError: a folder that holds no model.
      DownloadError (an OSError): the hub does not give it.
    """
    return Tokenizer(*_load(source, TiTokConfig, mesh, revision, token), dtype=dtype, mesh=mesh)


def load_tokenizer_config(
    source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> TiTokConfig:
    """The configuration of what `load_tokenizer` loads; reads no weights, errors as there."""
    return pretrained.load_config(source, TiTokConfig, revision=revision, token=token)


def load_generator(
    source: str | os.PathLike,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Generator:
    """A generator; arguments and errors as of `load_tokenizer`. A published one has the name of its tokenizer."""
    return Generator(*_load(source, GeneratorConfig, mesh, revision, token), dtype=dtype, mesh=mesh)


def load_vqgan(
    source: str | os.PathLike,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> VQGAN:
    """A MaskGIT-VQGAN: "maskgit_vqgan", a folder, or a file of it: PyTorch's, safetensors or the original JAX checkpoint
    (Flax msgpack); arguments and errors as of `load_tokenizer`."""
    return VQGAN(*_load(source, MaskgitVQGANConfig, mesh, revision, token), dtype=dtype, mesh=mesh)


def load_image_config(
    source: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> TiTokConfig | MaskgitVQGANConfig:
    """The configuration of a tokenizer of images, which `load_tokenizer` or `load_vqgan` loads: which one, it says. Reads no
    weights; errors as there."""
    kind = pretrained.tokenizer_kind(source, revision=revision, token=token)
    return pretrained.load_config(source, kind, revision=revision, token=token)


def _load(source, kind: type, mesh: Mesh | None, revision: str | None, token: str | None):
    place = {} if mesh is None else {"place": sharding.placer(mesh)}
    return pretrained.load(source, kind, revision=revision, token=token, **place)


def load_pair(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    dtype="float32",
    mesh: Mesh | None = None,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[Tokenizer, Generator]:
    """A generator and the tokenizer for its tokens: that of `tokenizer`, or the one of the same name or in the generator's
    folder. They are in different repositories of the hub, so each has its revision.

    Raises:
      ValueError: as `load_tokenizer`, and if the two do not fit together.
      FileNotFoundError: as `load_tokenizer`, and if no tokenizer belongs to the generator and none is named.
    """
    revisions = {"revision": revision, "tokenizer_revision": tokenizer_revision, "token": token}
    pair_configs(source, tokenizer, **revisions)  # so that what does not fit is known before weights are read
    generator = load_generator(source, dtype=dtype, mesh=mesh, revision=revision, token=token)
    source = source if tokenizer is None else tokenizer
    return load_tokenizer(source, dtype=dtype, mesh=mesh, revision=tokenizer_revision, token=token), generator


def pair_configs(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[TiTokConfig, GeneratorConfig]:
    """The configurations of what `load_pair` loads, checked against each other; reads no weights, errors as there."""
    generator = pretrained.load_config(source, GeneratorConfig, revision=revision, token=token)
    if (
        tokenizer is None
        and source not in published_models.names("tokenizer")
        and not (epath.Path(source) / "tokenizer").is_dir()
    ):
        raise FileNotFoundError(f"{source} holds no sub-folder tokenizer: name the tokenizer of this generator")
    source = source if tokenizer is None else tokenizer
    pair = load_tokenizer_config(source, revision=tokenizer_revision, token=token), generator
    check_pair(*pair)
    return pair


def check_pair(tokenizer: TiTokConfig, generator: GeneratorConfig) -> None:
    """Raises ValueError unless the tokenizer makes the tokens that the generator is for."""
    if tokenizer.quantize_mode != "vq":
        raise ValueError("the tokenizer is a VAE, which has no token ids; the generator needs a vq tokenizer")
    for what, ours, theirs in (
        ("tokens per image", tokenizer.num_latent_tokens, generator.num_tokens),
        ("codebook size", tokenizer.codebook_size, generator.codebook_size),
    ):
        if ours != theirs:
            raise ValueError(
                f"the tokenizer does not fit the generator: {what} {ours} against {theirs}; name the one it was trained with"
            )
