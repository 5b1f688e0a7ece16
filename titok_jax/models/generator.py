"""Masked token generators (MaskGIT, Chang et al., arXiv 2202.04200): bidirectional transformers that fill in masked tokens
given a class.

There are two published architectures. ViT is a BERT with post-norm blocks. U-ViT (Bao et al., arXiv 2209.12152) has pre-norm
blocks and long skip connections.

In the vocabulary, 0 .. K - 1 are codes, K is the mask, K + 1 + label is a class, and K + 1 + num_classes means "no class".
The output has K entries. The class is at position 0 of the sequence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax.models import published
from titok_jax.models.layers import (
    MLP,
    Attention,
    LayerNorm,
    PreNormBlock,
    dropout,
    make_stack,
    normal_002,
    run_stack,
    split_key,
)
from titok_jax.runtime.sharding import any_mesh, hint

GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Default settings for sampling tokens; see `titok_jax.inference.decoding`.

    Attributes:
      num_steps: decoding steps.
      guidance_scale, guidance_schedule: strength of classifier-free guidance, and how it changes over the steps.
      guidance_scale_pow: exponent of the schedule "power-cosine"; others ignore it.
      temperature: scale of the Gumbel noise in the first step; it falls to 0 (published name: randomize_temperature).
      softmax_temperature_annealing: divide the logits by 0.5 + 0.8 (1 - ratio), as the published sampling script does.
    """

    num_steps: int = 8
    guidance_scale: float = 3.0
    guidance_schedule: str = "linear"
    guidance_scale_pow: float = 3.0
    temperature: float = 2.0
    softmax_temperature_annealing: bool = True

    def __post_init__(self):
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            known = ", ".join(GUIDANCE_SCHEDULES)
            raise ValueError(f"guidance_schedule is {self.guidance_schedule!r}, expected one of {known}")
        published.check_fields(self)


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Architecture of a generator.

    Attributes:
      model_type: "ViT" or "UViT".
      num_tokens, codebook_size: sizes of the tokenizer whose tokens the model generates.
      num_classes: labels are 0 .. num_classes - 1.
      dropout, attn_dropout: rates in training, used by the ViT only (the published U-ViT ignores them).
      class_label_dropout: probability that training drops the label.
    """

    model_type: str = "ViT"
    num_tokens: int = 32
    codebook_size: int = 4096
    num_classes: int = 1000
    hidden_size: int = 768
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 3072
    dropout: float = 0.1
    attn_dropout: float = 0.1
    class_label_dropout: float = 0.1
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        published.check_fields(self)
        if self.model_type not in ("ViT", "UViT"):
            raise ValueError(f"model_type is {self.model_type!r}, expected 'ViT' or 'UViT'")
        if self.model_type == "UViT" and self.num_layers < 2:
            raise ValueError(f"num_layers is {self.num_layers}, a UViT has at least 2")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def mask_id(self) -> int:
        return self.codebook_size

    @property
    def vocabulary_size(self) -> int:
        return self.codebook_size + self.num_classes + 2

    # Conversion from and to the published config.json.

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> "GeneratorConfig":
        """Reads the published `config.json`, with its interpolations already resolved.

        Raises:
          ValueError: for a missing section or key, an unknown key or a bad value.
        """
        generator = published.section(config, "model.generator", "generator")
        vq = published.section(config, "model.vq_model", "generator")
        if "codebook_size" not in vq:
            raise ValueError("generator configuration lacks model.vq_model.codebook_size")
        sampling = published.take(generator, SAMPLING_KEYS, SamplingConfig, "model.generator")
        fields = published.take(generator, _GENERATOR_KEYS, cls, "model.generator")
        fields |= published.take(vq, {"codebook_size": "codebook_size"}, cls, "model.vq_model")
        published.check_all_taken(generator, "model.generator", (*SAMPLING_KEYS, *_GENERATOR_KEYS))
        missing = [
            k
            for k in ("model_type", "hidden_size", "num_hidden_layers", "image_seq_len", "condition_num_classes")
            if _GENERATOR_KEYS[k] not in fields
        ]
        if missing:
            raise ValueError(f"generator configuration lacks model.generator.{{{', '.join(missing)}}}")
        try:
            return cls(sampling=SamplingConfig(**sampling), **fields)
        except ValueError as error:
            raise ValueError(str(error).replace("guidance_schedule", "model.generator.guidance_decay")) from None

    def to_published(self) -> dict[str, Any]:
        """The configuration in the published format of `config.json`. `from_published` reads it back unchanged."""
        generator = {key: getattr(self, ours) for key, ours in _GENERATOR_KEYS.items()}
        generator |= {key: getattr(self.sampling, ours) for key, ours in SAMPLING_KEYS.items()}
        vq = {"codebook_size": self.codebook_size, "num_latent_tokens": self.num_tokens}
        return {"model": {"vq_model": vq, "generator": generator}}


_GENERATOR_KEYS = {
    "model_type": "model_type",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "dropout": "dropout",
    "attn_drop": "attn_dropout",
    "class_label_dropout": "class_label_dropout",
    "image_seq_len": "num_tokens",
    "condition_num_classes": "num_classes",
}
SAMPLING_KEYS = {  # of `model.generator` in config.json; they do not decide the network
    "num_steps": "num_steps",
    "randomize_temperature": "temperature",
    "guidance_scale": "guidance_scale",
    "guidance_decay": "guidance_schedule",
    "guidance_scale_pow": "guidance_scale_pow",
    "softmax_temperature_annealing": "softmax_temperature_annealing",
}


class PostNormBlock(nnx.Module):
    """norm1(x + attn(x)), then norm2(x + mlp(x)): a BERT layer."""

    def __init__(self, config: GeneratorConfig, *, dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.dropout_rate = config.dropout
        self.attn = Attention(
            width, config.num_heads, qkv_init=normal_002, dropout_rate=config.attn_dropout, dtype=dtype, rngs=rngs
        )
        self.norm1 = LayerNorm(width, epsilon=1e-12, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, epsilon=1e-12, dtype=dtype, rngs=rngs)

    def attention(self, x: jax.Array, keys=(None, None)) -> jax.Array:
        """The first half of the block."""
        return self.norm1(x + dropout(self.attn(x, keys[0]), self.dropout_rate, keys[1]))

    def __call__(self, x: jax.Array, skip: None = None, *, key: jax.Array | None = None) -> jax.Array:
        """x [B, L, D] -> [B, L, D], with dropout if a key is given. `skip` is unused; `run_stack` passes it."""
        del skip
        keys = (None,) * 3 if key is None else split_key(key, 3)
        x = self.attention(x, keys[:2])
        return self.norm2(x + dropout(self.mlp(x), self.dropout_rate, keys[2]))


class BertEmbeddings(nnx.Module):
    """Word, position and (constant) token type embeddings, summed and normalised."""

    def __init__(self, config: GeneratorConfig, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        width = config.hidden_size
        self.word_embeddings = nnx.Param(normal_002(rngs.params(), (config.vocabulary_size, width), jnp.float32))
        self.position_embeddings = nnx.Param(normal_002(rngs.params(), (config.num_tokens + 1, width), jnp.float32))
        self.token_type_embeddings = nnx.Param(normal_002(rngs.params(), (2, width), jnp.float32))
        self.norm = LayerNorm(width, epsilon=1e-12, dtype=dtype, rngs=rngs)

    def sum(self, ids: jax.Array) -> jax.Array:
        """ids [B, L] -> [B, L, D], before the LayerNorm."""
        x = self.word_embeddings[...][ids] + self.position_embeddings[...] + self.token_type_embeddings[...][0]
        return x.astype(self.dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.norm(self.sum(ids))


class ViTGenerator(nnx.Module):
    """The BERT-style generator."""

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        dtype=jnp.float32,
        remat: str = "none",
        scan_layers: bool | None = True,
        rngs: nnx.Rngs,
    ):
        self.config, self.remat, self.scan_layers = config, remat, scan_layers
        self.embeddings = BertEmbeddings(config, dtype=dtype, rngs=rngs)
        self.layers = make_stack(lambda rngs: PostNormBlock(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.lm_head = nnx.Linear(config.hidden_size, config.codebook_size, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    @any_mesh
    def logits(self, ids: jax.Array, labels: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """See `make_generator`."""
        keys = (None, None) if key is None else split_key(key)
        x = self.embeddings(with_class(ids, labels, self.config))
        x = dropout(x, self.config.dropout, keys[0])
        x, _ = run_stack(self.layers, x, key=keys[1], remat=self.remat, scan=self.scan_layers)
        return hint(self.lm_head(x[:, 1:]), "batch", None, "vocabulary").astype(jnp.float32)


class UViTGenerator(nnx.Module):
    """The U-ViT generator: num_layers // 2 input blocks, a middle block, num_layers // 2 output blocks with long skips."""

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        dtype=jnp.float32,
        remat: str = "none",
        scan_layers: bool | None = True,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        self.remat, self.scan_layers = remat, scan_layers
        width = config.hidden_size

        def block(rngs, skip=False):
            return PreNormBlock(
                width,
                config.num_heads,
                config.intermediate_size,
                qkv_bias=False,
                qkv_init=normal_002,
                skip=skip,
                dtype=dtype,
                rngs=rngs,
            )

        self.embeddings = nnx.Param(normal_002(rngs.params(), (config.vocabulary_size, width), jnp.float32))
        self.pos_embed = nnx.Param(normal_002(rngs.params(), (config.num_tokens + 1, width), jnp.float32))
        self.in_blocks = make_stack(block, config.num_layers // 2, rngs)
        self.mid_block = block(rngs)
        self.out_blocks = make_stack(lambda rngs: block(rngs, skip=True), config.num_layers // 2, rngs)
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.lm_head = nnx.Linear(width, config.codebook_size, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids [B, L] -> [B, L, D], with positions added."""
        return (self.embeddings[...][ids] + self.pos_embed[...]).astype(self.dtype)

    @any_mesh
    def logits(self, ids: jax.Array, labels: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """See `make_generator`. The U-ViT has no dropout."""
        del key
        x = self.embed(with_class(ids, labels, self.config))
        x, skips = run_stack(self.in_blocks, x, remat=self.remat, scan=self.scan_layers)
        x = self.mid_block(x)
        x, _ = run_stack(self.out_blocks, x, skips=jnp.flip(skips, 0), remat=self.remat, scan=self.scan_layers)
        return hint(self.lm_head(self.norm(x[:, 1:])), "batch", None, "vocabulary").astype(jnp.float32)


def with_class(ids: jax.Array, labels: jax.Array, config: GeneratorConfig) -> jax.Array:
    """ids [B, N], labels [B] in 0 .. num_classes -> [B, 1 + N]: the class's id in the vocabulary, then the ids."""
    return jnp.concatenate([(labels + config.codebook_size + 1)[:, None], ids], axis=1)


def make_generator(
    config: GeneratorConfig, *, dtype=jnp.float32, remat: str = "none", scan_layers: bool | None = True, rngs: nnx.Rngs
) -> ViTGenerator | UViTGenerator:
    """The generator that `config.model_type` names.

    Its method `logits(ids, labels, key=None)` takes ids int [B, N] in 0 .. codebook_size (the last is the mask) and labels
    int [B] in 0 .. num_classes (the last means unconditional). It returns float32 [B, N, codebook_size] and applies dropout
    if a key is given.

    Args:
      dtype: computation dtype; parameters are float32.
      remat, scan_layers: how the blocks run, see `layers.run_stack`.
    """
    cls = ViTGenerator if config.model_type == "ViT" else UViTGenerator
    return cls(config, dtype=dtype, remat=remat, scan_layers=scan_layers, rngs=rngs)
