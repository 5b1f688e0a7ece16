"""TiTok in JAX: compact 1D image tokenizers and masked image generators.

import titok_jax
tokenizer, generator = titok_jax.load_tokenizer("digits"), titok_jax.load_generator("digits")
ids = generator.generate([3, 1, 4], key=0)
images = tokenizer.decode(ids)  # [3, 32, 32, 3] float32 in [0, 1]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titok_jax.inference.functions import GeneratorFunctions, TokenizerFunctions
    from titok_jax.inference.generator import Generator, generate
    from titok_jax.inference.loading import load_generator, load_pair, load_tokenizer, load_vqgan
    from titok_jax.inference.tokenizer import VQGAN, Tokenizer

__version__ = "0.1.0"
__all__ = [
    "VQGAN",
    "Generator",
    "GeneratorFunctions",
    "Tokenizer",
    "TokenizerFunctions",
    "generate",
    "load_generator",
    "load_pair",
    "load_tokenizer",
    "load_vqgan",
]


def __getattr__(name: str) -> Any:
    # Import on first use, so that data workers and `--help` do not import JAX, which is slow.
    if name in __all__:
        from titok_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
