"""Tells what a file is before anything large is read, so that an error says it in one sentence.

It is told from the first bytes of a file, the names of its tensors, or the sections of a configuration.
"""

from collections.abc import Collection, Mapping
from typing import Any

from titok_jax import models
from titok_jax.models.families import GENERATOR, TOKENIZER, VQGAN, Family
from titok_jax.runtime.messages import shown
from titok_jax.weights.convert import WeightsError

# What files begin with that hold no weights.
_BEGINNINGS = {
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"RIFF": "an image or a sound (RIFF)",
    b"II*\0": "an image (TIFF)",
    b"MM\0*": "an image (TIFF)",
    b"version https://": "the place of a file that Git LFS has not downloaded (git lfs pull)",
    b"<": "a page of the web, not the file",
    b"\x1f\x8b": "compressed (gzip)",
    b"\x83\xafp\xd1\r\x88J?": "records of tokens or images (ArrayRecord)",
    b"PAR1": "a table (Parquet)",
    b"\x93NUMPY": "an array (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"%PDF": "a document (PDF)",
    b"{": "JSON, such as a configuration or lines of tokens",
}


def other_file(start: bytes) -> str | None:
    """What a file is that begins with these bytes, if that holds no weights for certain."""
    return next((what for beginning, what in _BEGINNINGS.items() if start.startswith(beginning)), None)


def family_of_tensors(names: Collection[str]) -> Family | None:
    """The family of models whose tensors have names like these, whatever their sizes; None if it is not known."""
    names = {name.removeprefix("params/") for name in names}  # a Flax checkpoint's
    return next((family for family in models.families() if any(sign <= names for sign in family.signs)), None)


def families_of_config(config: Mapping[str, Any]) -> list[Family]:
    """The published families that a configuration describes. (A generator's names the codes of its tokenizer too; that of a
    published training may describe the whole tokenizer.)"""
    model = config.get("model")
    model = model if isinstance(model, Mapping) else {}
    vq = model.get("vq_model")
    has_tokenizer = isinstance(vq, Mapping) and ("generator" not in model or "vit_enc_model_size" in vq)
    described = {TOKENIZER: has_tokenizer, GENERATOR: "generator" in model, VQGAN: "maskgit_vqgan" in model}
    return [family for family, is_there in described.items() if is_there]


def check_tensors(names: Collection[str], wanted: type, source: str) -> None:
    """Raises WeightsError if tensors with these names belong to another kind of model than `wanted`, a class of
    configurations. It passes if the kind is not known."""
    found = family_of_tensors(names)
    if found is not None and not _is(found, wanted):
        raise WeightsError(f"{source} holds the weights of {found.title}; {belongs(wanted)}")


def check_config(config: Mapping[str, Any], wanted: type, source: str) -> None:
    """Raises WeightsError if a configuration, as JSON, is that of another kind of model than `wanted`."""
    found = families_of_config(config)
    if found and not any(_is(family, wanted) for family in found):
        hint = ": name the one of this generator" if found == [GENERATOR] and _is(TOKENIZER, wanted) else ""
        raise WeightsError(f"{source} is the configuration of {found[0].title}; {belongs(wanted)}{hint}")
    foreign = config.get("architectures") or config.get("_class_name")
    if not found and isinstance(foreign, str | list):
        name = foreign if isinstance(foreign, str) else ", ".join(map(str, foreign[:1]))
        raise WeightsError(f"{source} is the configuration of a {shown(name)}; {belongs(wanted)}")


def belongs(wanted: type | None) -> str:
    """What is expected in place of something else, as a sentence."""
    if wanted is None:
        return "a tokenizer, a generator or a MaskGIT-VQGAN belongs here"
    return f"{models.family_for(wanted).title} belongs here"


def _is(family: Family, wanted: type) -> bool:
    return issubclass(family.config, wanted) or issubclass(wanted, family.config)
