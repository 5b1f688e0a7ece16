"""Stage 1 of the two-stage tokenizer: predict the codes of a 2D tokenizer ("proxy codes": arXiv 2406.07550, section 3.2).

Trained: all of TiTok; its decoder outputs 1024 logits per cell. Frozen: a MaskGIT-VQGAN; its codes of the image are the
targets. Losses: cross entropy of the codes, and the quantizer's losses.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from titok_jax.inference.functions import TokenizerFunctions
from titok_jax.models.layers import float_images
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.titok import PROXY_CODES, TiTokConfig
from titok_jax.training import losses
from titok_jax.training.accumulation import accumulate
from titok_jax.training.tasks.base import Batch, Metrics, State, Task, TaskOptions
from titok_jax.weights import convert


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms. The cross entropy has weight 1.

    Attributes:
      quantizer_weight: weight of the commitment and codebook losses.
    """

    quantizer_weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stage1(Task):
    """Stage 1 training, as described in the module docstring.

    Attributes:
      weights: weights of the loss terms.
      vqgan: the frozen network that computes the target codes; None if the batches contain them.
    """

    weights: LossConfig
    vqgan: TokenizerFunctions | None

    @property
    def shows_pictures(self) -> bool:
        return self.vqgan is not None

    def _init_keys(self, key: jax.Array) -> dict[str, jax.Array]:
        return {self.model: key}

    def update(self, state: State, frozen: Any, batch: Batch, draws: Any) -> tuple[State, Metrics]:
        """Updates the tokenizer on the cross entropy of the VQGAN's codes and the quantizer's losses."""
        images = float_images(batch["image"])
        rows = {"images": images, "codes": self.target_codes(frozen, batch, images)}
        parts = self.options.gradient_accumulation
        grads, metrics, outputs = accumulate(self.code_loss, state["params"]["tokenizer"], rows, parts)
        metrics |= losses.codebook_metrics(outputs["tokens"], self.config.codebook_size)
        if self.options.restart_codes:
            state = self.restarted(state, outputs)
        return self.advance(state, grads, metrics), metrics

    def target_codes(self, frozen: Any, batch: Batch, images: jax.Array) -> jax.Array:
        """Returns the codes to predict, int [B, h, w] or [B, h w]."""
        return batch["codes"] if "codes" in batch else self.vqgan.encode(frozen, images)

    def code_loss(self, params: convert.Params, rows: Batch) -> tuple[jax.Array, tuple[Metrics, dict[str, jax.Array]]]:
        """Returns (loss, (metrics, {"tokens", "latents"})) of some rows of a batch."""
        model = self.networks["tokenizer"].module(params)
        bottleneck = model.quantized(rows["images"])
        total, metrics = losses.stage1_loss(
            model.decode(bottleneck.quantized),
            rows["codes"],
            quantizer_loss=bottleneck.quantizer_loss,
            commitment_loss=bottleneck.commitment_loss,
            codebook_loss=bottleneck.codebook_loss,
            quantizer_weight=self.weights.quantizer_weight,
        )
        return total, (metrics, {"tokens": bottleneck.tokens, "latents": bottleneck.latents})

    def preview(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns images, the VQGAN's own reconstructions ("target"), and the most likely predicted codes decoded by the
        VQGAN ("reconstruction")."""
        del key
        model, images = self.networks["tokenizer"].module(state["ema"]["tokenizer"]), float_images(batch["image"])
        logits = model.decode(model.quantized(images).quantized)[..., : self.vqgan.config.codebook_size]
        return {
            "image": images,
            "target": self.vqgan.decode(frozen, self.vqgan.encode(frozen, images)),
            "reconstruction": self.vqgan.decode(frozen, jnp.argmax(logits, axis=-1)),
        }


def make_task(
    config: TiTokConfig,
    loss: LossConfig,
    *,
    vqgan: tuple[MaskgitVQGANConfig, convert.Params] | None,
    token_precision: str = "highest",
    **options: Any,
) -> Stage1:
    """Makes the task.

    Args:
      vqgan: computes the target codes in float32; None for batches that contain them as "codes" [B, h w].
      token_precision: precision of the VQGAN's matrix products, see `titok_jax.inference.functions`.
      options: as in `TaskOptions`.

    Raises:
      ValueError: if the model does not predict codes, or if the VQGAN has a different grid or more codes.
    """
    if not config.predicts_codes:
        raise ValueError("stage 1 is for models that predict codes: set is_legacy to True and finetune_decoder to False")
    if vqgan and (vqgan[0].downsampling != config.patch_size or vqgan[0].codebook_size > PROXY_CODES):
        raise ValueError(
            f"the VQGAN has {vqgan[0].codebook_size} codes and one per {vqgan[0].downsampling} x {vqgan[0].downsampling} "
            f"pixels; the model takes {PROXY_CODES} and one per {config.patch_size} x {config.patch_size}"
        )
    given = TaskOptions(**options)
    return Stage1(
        networks={"tokenizer": given.network(config)},
        options=given,
        frozen=vqgan[1] if vqgan else None,
        weights=loss,
        vqgan=TokenizerFunctions(vqgan[0], "float32", token_precision) if vqgan else None,
    )
