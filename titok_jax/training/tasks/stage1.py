"""Stage 1 of the two-stage tokenizer: predict the codes of a 2D tokenizer ("proxy codes": arXiv 2406.07550, section 3.2).

Trained: the whole TiTok, whose decoder gives 1024 logits per cell. Frozen: a MaskGIT-VQGAN, whose codes of the image are the
targets. Losses: cross entropy of the codes, and the quantizer's.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax import models
from titok_jax.models.layers import float_images
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.titok import PROXY_CODES, TiTokConfig
from titok_jax.training import losses
from titok_jax.training.optimizer import ema_update
from titok_jax.training.tasks import Batch, Metrics, State, Task, accumulate, make_network, reconstruction_quality, restarted
from titok_jax.weights import convert, pretrained


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The cross entropy has weight 1.

    Attributes:
      quantizer_weight: of the commitment and codebook losses.
    """

    quantizer_weight: float = 1.0


def make_task(
    config: TiTokConfig,
    loss: LossConfig,
    *,
    optimizer: dict,
    num_steps: int,
    vqgan: tuple[MaskgitVQGANConfig, convert.Params] | None,
    start: convert.Params | None = None,
    ema_decay: float = 0.999,
    compute_dtype: str = "float32",
    remat: bool = False,
    gradient_accumulation: int = 1,
    restart_codes: bool = False,
) -> Task:
    """The task.

    Args:
      optimizer: see `tasks.make_network`.
      vqgan: gives the target codes, in float32; None for batches that hold them as "codes" [B, h w].
      start: the parameters to begin with; None: new ones.
      gradient_accumulation: parts that a batch is cut into; the gradient is that of the whole batch.
      restart_codes: see `quantizer.restart_codes`.

    Raises:
      ValueError: a model that does not predict codes, or a VQGAN with another grid or more codes.
    """
    if not config.predicts_codes:
        raise ValueError("stage 1 is for models that predict codes: set is_legacy to True and finetune_decoder to False")
    if vqgan and (vqgan[0].downsampling != config.patch_size or vqgan[0].codebook_size > PROXY_CODES):
        raise ValueError(
            f"the VQGAN has {vqgan[0].codebook_size} codes and one per {vqgan[0].downsampling} x {vqgan[0].downsampling} "
            f"pixels; the model takes {PROXY_CODES} and one per {config.patch_size} x {config.patch_size}"
        )
    network = make_network(config, optimizer, num_steps, compute_dtype=compute_dtype, remat=remat)
    vqgan_graphdef = models.abstract(vqgan[0])[0] if vqgan else None

    def init(key: jax.Array, start: dict[str, convert.Params] | None = None) -> State:
        params, opt = network.init(key, (start or {}).get("tokenizer"))
        state = {"step": jnp.zeros((), jnp.int32), "params": {"tokenizer": params}, "opt": {"tokenizer": opt}}
        if restart_codes:
            state["code_usage"] = jnp.zeros(config.codebook_size)
        return {**state, "ema": {"tokenizer": params}}

    def draw(key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        del key, batch
        return {}

    def loss_of(params, rows):
        model = network.module(params)
        bottleneck = model.quantized(rows["images"])
        total, metrics = losses.stage1_loss(
            model.decode(bottleneck.quantized),
            rows["codes"],
            quantizer_loss=bottleneck.quantizer_loss,
            commitment_loss=bottleneck.commitment_loss,
            codebook_loss=bottleneck.codebook_loss,
            quantizer_weight=loss.quantizer_weight,
        )
        return total, (metrics, {"tokens": bottleneck.tokens, "latents": bottleneck.latents})

    def update(state: State, frozen, batch: Batch, draws: dict[str, jax.Array]) -> tuple[State, Metrics]:
        del draws
        images = float_images(batch["image"])
        codes = batch["codes"] if "codes" in batch else nnx.merge(vqgan_graphdef, frozen).get_codes(images)
        rows = {"images": images, "codes": codes}
        params, opt = state["params"]["tokenizer"], state["opt"]["tokenizer"]
        grads, metrics, outputs = accumulate(loss_of, params, rows, gradient_accumulation)
        metrics["lr"] = network.schedule(state["step"])
        metrics |= losses.codebook_metrics(outputs["tokens"], config.codebook_size)
        usage = {}
        if restart_codes:
            params, usage["code_usage"] = restarted(config, params, state["code_usage"], outputs)
        params, opt, metrics["grad_norm"] = network.apply(params, opt, grads)
        ema = ema_update(state["ema"]["tokenizer"], params, state["step"], ema_decay)
        new = {"step": state["step"] + 1, "params": {"tokenizer": params}, "opt": {"tokenizer": opt}}
        return {**new, **usage, "ema": {"tokenizer": ema}}, metrics

    def preview(state: State, frozen, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """The most likely codes through the VQGAN's decoder, below what the VQGAN itself makes of the image."""
        del key
        model, images = network.module(state["ema"]["tokenizer"]), float_images(batch["image"])
        two_dimensional = nnx.merge(vqgan_graphdef, frozen)
        predicted = jnp.argmax(model.decode(model.quantized(images).quantized)[..., : vqgan[0].codebook_size], axis=-1)
        return {
            "image": images,
            "target": two_dimensional.decode_codes(two_dimensional.get_codes(images)),
            "reconstruction": two_dimensional.decode_codes(predicted),
        }

    def export(state: State, folder: Path) -> None:
        pretrained.save(folder, config, state["ema"]["tokenizer"], overwrite=True)

    return Task(
        networks={"tokenizer": network},
        frozen=vqgan[1] if vqgan else None,
        init=init,
        draw=draw,
        update=update,
        preview=preview if vqgan else None,
        export=export,
        loss="total_loss",
        start=None if start is None else {"tokenizer": start},
        evaluate=reconstruction_quality(preview) if vqgan else None,
    )
