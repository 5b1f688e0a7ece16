"""Generator training: fill in masked tokens given the class (MaskGIT, arXiv 2202.04200, section 3; TiTok section 3.3).

Trained: the generator. The tokenizer, if tokens are made on the fly, is frozen.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from titok_jax import models
from titok_jax.inference import decoding
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.layers import float_images
from titok_jax.models.titok import TiTokConfig
from titok_jax.training import losses, masking
from titok_jax.training.optimizer import ema_update
from titok_jax.training.tasks import Batch, Metrics, State, Task, accumulate, make_network
from titok_jax.weights import convert, pretrained


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross entropy of the masked tokens.

    Attributes:
      label_smoothing: of the targets.
      unmasked_weight: weight of the tokens that were not masked.
    """

    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1


def make_task(
    config: GeneratorConfig,
    loss: LossConfig,
    *,
    optimizer: dict,
    num_steps: int,
    tokenizer: tuple[TiTokConfig, convert.Params] | None = None,
    start: convert.Params | None = None,
    ema_decay: float = 0.999,
    compute_dtype: str = "float32",
    remat: bool = False,
    gradient_accumulation: int = 1,
) -> Task:
    """The task.

    Args:
      optimizer: see `tasks.make_network`.
      tokenizer: makes tokens of the batch's images, and images of the previews' tokens; None for batches of tokens.
      start: the generator's parameters to begin with; None: new ones.
      gradient_accumulation: parts that a batch is cut into; the gradient is that of the whole batch (but for the
        dropout's draws).
    """
    network = make_network(config, optimizer, num_steps, compute_dtype=compute_dtype, remat=remat)
    parts = gradient_accumulation
    tokenizer_graphdef = models.abstract(tokenizer[0])[0] if tokenizer else None

    def init(key: jax.Array, start: dict[str, convert.Params] | None = None) -> State:
        params, opt = network.init(key, (start or {}).get("generator"))
        state = {"step": jnp.zeros((), jnp.int32), "params": {"generator": params}, "opt": {"generator": opt}}
        return {**state, "ema": {"generator": params}}

    def draw(key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        mask_key, time_key, label_key, dropout_key = jax.random.split(key, 4)
        b = batch["label"].shape[0]
        return {
            "timesteps": jax.random.uniform(time_key, (b,)),
            "order_uniforms": jax.random.uniform(mask_key, (b, config.num_tokens)),
            "drop_uniforms": jax.random.uniform(label_key, (b,)),
            "dropout": dropout_key,
        }

    def tokens_of(frozen, batch: Batch) -> jax.Array:
        if "tokens" in batch:
            return batch["tokens"]
        return nnx.merge(tokenizer_graphdef, frozen).quantized(float_images(batch["image"])).tokens

    def update(state: State, frozen, batch: Batch, draws: dict[str, jax.Array]) -> tuple[State, Metrics]:
        tokens = tokens_of(frozen, batch)
        masked, mask = masking.mask_tokens(tokens, draws["timesteps"], draws["order_uniforms"], config.mask_id)
        labels = jnp.where(draws["drop_uniforms"] < config.class_label_dropout, config.num_classes, batch["label"])
        rows = {
            "ids": masked,
            "labels": labels,
            "targets": tokens,
            "mask": mask,
            # Normalised over the whole batch, before it is cut; `accumulate` takes the mean over the parts.
            "weights": losses.token_weights(mask, loss.unmasked_weight) * parts,
            # One dropout key per part: the key of its first row.
            "keys": jax.random.split(draws["dropout"], tokens.shape[0]),
        }

        def loss_of(params, rows):
            dropout_key = None if config.dropout == config.attn_dropout == 0.0 else rows["keys"][0]
            logits = network.module(params).logits(rows["ids"], rows["labels"], key=dropout_key)
            total = losses.weighted_token_loss(
                logits, rows["targets"], rows["weights"], label_smoothing=loss.label_smoothing
            )
            correct = losses.correct_tokens(logits, rows["targets"], rows["mask"])
            return total, ({"loss": total, "correct_tokens": correct}, None)

        params, opt = state["params"]["generator"], state["opt"]["generator"]
        grads, metrics, _ = accumulate(loss_of, params, rows, parts)
        metrics["lr"] = network.schedule(state["step"])
        params, opt, metrics["grad_norm"] = network.apply(params, opt, grads)
        ema = ema_update(state["ema"]["generator"], params, state["step"], ema_decay)
        new = {"step": state["step"] + 1, "params": {"generator": params}, "opt": {"generator": opt}}
        return {**new, "ema": {"generator": ema}}, metrics

    def evaluate(state: State, frozen, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """The loss of each example over its own tokens, without dropout, and the share of masked tokens that is right."""
        tokens, draws = tokens_of(frozen, batch), draw(key, batch)
        masked, mask = masking.mask_tokens(tokens, draws["timesteps"], draws["order_uniforms"], config.mask_id)
        logits = network.module(state["ema"]["generator"]).logits(masked, batch["label"], key=None)

        def one(logits, tokens, mask):
            return losses.masked_token_loss(
                logits[None],
                tokens[None],
                mask[None],
                label_smoothing=loss.label_smoothing,
                unmasked_weight=loss.unmasked_weight,
            )[1]

        return jax.vmap(one)(logits, tokens, mask)

    def preview(state: State, frozen, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        labels = jnp.arange(batch["label"].shape[0]) % config.num_classes
        keys = jax.random.split(key, labels.shape[0])
        generator, sampling = network.module(state["ema"]["generator"]), config.sampling
        ids = decoding.parallel_decode(
            generator.logits,
            labels,
            num_tokens=config.num_tokens,
            codebook_size=config.codebook_size,
            num_classes=config.num_classes,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_schedule=sampling.guidance_schedule,
            temperature=sampling.temperature,
            softmax_temperature_annealing=sampling.softmax_temperature_annealing,
            noise=decoding.noise_from_keys(keys),
        ).ids
        images = nnx.merge(tokenizer_graphdef, frozen).decode_tokens(ids)
        return {"sample": jnp.clip(images, 0.0, 1.0)}

    def export(state: State, folder: Path) -> None:
        pretrained.save(folder, config, state["ema"]["generator"], tokenizer=tokenizer, overwrite=True)

    return Task(
        networks={"generator": network},
        frozen=tokenizer[1] if tokenizer else None,
        init=init,
        draw=draw,
        update=update,
        preview=preview if tokenizer else None,
        export=export,
        loss="loss",
        start=None if start is None else {"generator": start},
        evaluate=evaluate,
    )
