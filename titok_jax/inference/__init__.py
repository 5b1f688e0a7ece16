"""Trained models, ready to use: images to tokens and back, class labels to tokens, one batch or many.

The public names load on first use, so that commands parse their arguments before they import JAX.
May import: runtime, data, pictures, models, weights.
"""

import importlib
from typing import Any

_PUBLIC = {
    "Tokenizer": "tokenizer",
    "VQGAN": "tokenizer",
    "Generator": "generator",
    "generate": "generator",
    "GeneratorFunctions": "functions",
    "TokenizerFunctions": "functions",
    **dict.fromkeys(
        (
            *("check_pair", "load_generator", "load_image_config", "load_image_model", "load_pair", "load_tokenizer"),
            *("load_tokenizer_config", "load_vqgan", "pair_configs"),
        ),
        "loading",
    ),
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"titok_jax.inference.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_PUBLIC, *(name for name in globals() if name.startswith("__"))})
