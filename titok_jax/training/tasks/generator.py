"""Generator training: predict masked tokens given the class (MaskGIT, arXiv 2202.04200, section 3; TiTok section 3.3).

Trained: the generator. Frozen: the tokenizer, if tokens are made from images during training.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from titok_jax.inference.functions import GeneratorFunctions, TokenizerFunctions
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.titok import TiTokConfig
from titok_jax.training import losses, masking
from titok_jax.training.accumulation import accumulate
from titok_jax.training.tasks.base import Batch, Metrics, State, Task, TaskOptions
from titok_jax.weights import convert, pretrained


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross entropy of the masked tokens.

    Attributes:
      label_smoothing: label smoothing of the targets.
      unmasked_weight: weight of the tokens that are not masked.
    """

    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GeneratorTask(Task):
    """Generator training, as described in the module docstring.

    Attributes:
      weights: weights of the loss terms.
      tokenizer: makes tokens from images; None for batches of tokens.
    """

    weights: LossConfig
    tokenizer: TokenizerFunctions | None

    model = "generator"
    loss = "loss"

    @property
    def shows_pictures(self) -> bool:
        return self.tokenizer is not None

    @property
    def measures(self) -> bool:
        return True

    def _init_keys(self, key: jax.Array) -> dict[str, jax.Array]:
        return {self.model: key}

    def draw(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Draws how many and which tokens of each image are masked, whether its label is dropped, and the dropout key."""
        mask_key, time_key, label_key, dropout_key = jax.random.split(key, 4)
        b = batch["label"].shape[0]
        return {
            "timesteps": jax.random.uniform(time_key, (b,)),
            "order_uniforms": jax.random.uniform(mask_key, (b, self.config.num_tokens)),
            "drop_uniforms": jax.random.uniform(label_key, (b,)),
            "dropout": dropout_key,
        }

    def update(self, state: State, frozen: Any, batch: Batch, draws: dict[str, jax.Array]) -> tuple[State, Metrics]:
        """Updates the generator on the cross entropy of the masked tokens, given the other tokens and the class."""
        config, parts = self.config, self.options.gradient_accumulation
        tokens, masked, mask = self.masked(frozen, batch, draws)
        rows = {
            "ids": masked,
            "labels": jnp.where(draws["drop_uniforms"] < config.class_label_dropout, config.num_classes, batch["label"]),
            "targets": tokens,
            "mask": mask,
            # Normalised over the whole batch before it is split; times its rows, because the loss is a mean over rows.
            "weights": losses.token_weights(mask, self.weights.unmasked_weight) * len(tokens),
            "keys": jax.random.split(draws["dropout"], tokens.shape[0]),
        }
        grads, metrics, _ = accumulate(self.token_loss, state["params"]["generator"], rows, parts)
        return self.advance(state, grads, metrics), metrics

    def masked(self, frozen: Any, batch: Batch, draws: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (tokens [B, N], tokens with the mask id in masked places [B, N], mask [B, N], true where masked)."""
        if "tokens" in batch:
            tokens = batch["tokens"]
        else:
            tokens = self.tokenizer.encode(frozen, batch["image"])
        return tokens, *masking.mask_tokens(tokens, draws["timesteps"], draws["order_uniforms"], self.config.mask_id)

    def token_loss(self, params: convert.Params, rows: Batch) -> tuple[jax.Array, tuple[Metrics, None]]:
        """Returns (loss, (metrics, None)) of some rows of a batch."""
        # With accumulation, the draws of a row depend on its key alone, so on no mesh and no number of parts.
        key = rows["keys"][0] if self.options.gradient_accumulation == 1 else rows["keys"]
        key = None if self.config.dropout == self.config.attn_dropout == 0.0 else key
        logits = self.networks["generator"].module(params).logits(rows["ids"], rows["labels"], key=key)
        smoothing = self.weights.label_smoothing
        total = losses.weighted_token_loss(logits, rows["targets"], rows["weights"], label_smoothing=smoothing) / len(logits)
        correct = losses.correct_tokens(logits, rows["targets"], rows["mask"])
        return total, ({"loss": total, "correct_tokens": correct}, None)

    def evaluate(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns each example's loss over its own tokens, without dropout, and its share of correct masked tokens."""
        tokens, masked, mask = self.masked(frozen, batch, self.draw(key, batch))
        logits = self.networks["generator"].module(state["ema"]["generator"]).logits(masked, batch["label"], key=None)
        loss = partial(losses.masked_token_loss, **dataclasses.asdict(self.weights))
        return jax.vmap(lambda *example: loss(*(part[None] for part in example))[1])(logits, tokens, mask)

    def preview(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns samples of classes 0, 1, 2, ... in turn, with the model's sampling settings."""
        labels = jnp.arange(batch["label"].shape[0]) % self.config.num_classes
        functions = GeneratorFunctions(self.config, self.options.compute_dtype)
        out = functions.sample(state["ema"]["generator"], labels, jax.random.split(key, labels.shape[0]))
        return {"sample": self.tokenizer.decode(frozen, out.ids)}

    def export(self, state: State, folder: Path) -> None:
        """Writes the averaged generator as a pretrained folder, together with the tokenizer if it made the tokens."""
        tokenizer = (self.tokenizer.config, self.frozen) if self.tokenizer else None
        pretrained.save(folder, self.config, state["ema"]["generator"], tokenizer=tokenizer, overwrite=True)


def make_task(
    config: GeneratorConfig,
    loss: LossConfig,
    *,
    tokenizer: tuple[TiTokConfig, convert.Params] | None = None,
    token_precision: str = "highest",
    **options: Any,
) -> GeneratorTask:
    """Makes the task.

    Args:
      tokenizer: turns the batch's images into tokens, and the previews' tokens into images; None for batches of tokens. It
        computes in float32.
      token_precision: precision of the tokenizer's matrix products, see `titok_jax.inference.functions`.
      options: as in `TaskOptions`. With `gradient_accumulation`, the gradient is that of the full batch except for the
        dropout draws, which are the same for any number of parts from 2 on.
    """
    given = TaskOptions(**options)
    return GeneratorTask(
        networks={"generator": given.network(config)},
        options=given,
        frozen=tokenizer[1] if tokenizer else None,
        weights=loss,
        tokenizer=TokenizerFunctions(tokenizer[0], "float32", token_precision) if tokenizer else None,
    )
