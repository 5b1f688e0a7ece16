"""Tiny models with random parameters, and folders of them, for tests that need no trained weights."""

import functools

import jax
import numpy as np

from titok_jax import models
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.titok import TiTokConfig, TransformerSize
from titok_jax.weights import pretrained

_SIZE = TransformerSize(width=32, num_layers=2, num_heads=2)
TOKENIZER = TiTokConfig(
    image_size=32,
    patch_size=8,
    num_latent_tokens=8,
    token_size=4,
    codebook_size=64,
    encoder=_SIZE,
    decoder=_SIZE,
    is_legacy=False,
)
VAE = TiTokConfig(
    image_size=32,
    patch_size=8,
    num_latent_tokens=8,
    token_size=4,
    quantize_mode="vae",
    encoder=_SIZE,
    decoder=_SIZE,
    is_legacy=False,
)
STAGE_1 = TiTokConfig(
    image_size=32, patch_size=8, num_latent_tokens=8, codebook_size=64, encoder=_SIZE, decoder=_SIZE, finetune_decoder=False
)
GENERATOR = GeneratorConfig(
    num_tokens=8, codebook_size=64, num_classes=10, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64
)


@functools.cache
def params(config, seed: int = 0):
    """Random parameters of a model, as a nested dict of arrays. (The model's own initialisation would need compilation.)"""
    rng = np.random.default_rng(seed)
    shapes = models.abstract(config)[1]
    return jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(s.dtype), shapes)


def save(folder, config=GENERATOR, tokenizer=TOKENIZER):
    """Saves a model. A generator is saved together with its tokenizer."""
    pair = (tokenizer, params(tokenizer, 1)) if isinstance(config, GeneratorConfig) and tokenizer is not None else None
    return pretrained.save(folder, config, params(config), tokenizer=pair)
