"""What one training step of each kind of training does. A task is a set of pure functions over one state:

    {"step": updates made, "params": {network: ...}, "opt": {network: ...}, "ema": {network: ...}, ...}

The loop in train.py knows no more of a task than `Task` says. Its state, of `Task.begin` and `Task.step`, also counts the
steps that were skipped because they gave a number that is not finite: "nonfinite".
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.evaluation.metrics import SSIM_TAPS, windowed_ssim
from titok_jax.models.layers import target_platform
from titok_jax.models.quantizer import restart_codes
from titok_jax.models.titok import TiTokConfig
from titok_jax.runtime import sharding
from titok_jax.training.optimizer import NO_DECAY_WORDS, adamw, clip_by_global_norm, constant_schedule, cosine_schedule
from titok_jax.weights import convert

State = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of training.

    Attributes:
      networks: the trained networks by name, for the parameter table.
      frozen: parameters that steps read and nothing changes (a tokenizer, a perceptual network); not in checkpoints.
      init: (key, start) -> state. Pure.
      start: {network: parameters} that a run begins with in the place of new ones, given to `init`; None if all are new.
      draw: (key, batch) -> everything random that a step uses, as arrays or keys. Pure.
      update: (state, frozen, batch, draws) -> (state, metrics). Pure.
      preview: (state, frozen, batch, key) -> {title: images [n, H, W, 3] in [0, 1]}, pictures of the state's quality; the
        first `preview_columns` go into the first row of a grid, and so on. Pure. None if there is nothing to see.
      evaluate: (state, frozen, batch, key) -> {metric: [B]}, of each example of a batch that training has not seen, by the
        averaged parameters. Pure. None if there is nothing to measure.
      export: (state, folder) -> None; writes the result as a pretrained folder.
      loss: the metric to show first.
    """

    networks: Mapping[str, "Network"]
    frozen: Any
    init: Callable[..., State]
    draw: Callable[[jax.Array, Batch], Any]
    update: Callable[[State, Any, Batch, Any], tuple[State, Metrics]]
    preview: Callable[[State, Any, Batch, jax.Array], dict[str, jax.Array]] | None
    export: Callable[[State, Path], None]
    loss: str
    start: Mapping[str, convert.Params] | None = None
    evaluate: Callable[[State, Any, Batch, jax.Array], dict[str, jax.Array]] | None = None

    def begin(self, key: jax.Array, start: Mapping[str, convert.Params] | None = None) -> State:
        """The state before the first step: `init` with no step skipped."""
        none = jnp.zeros((), jnp.int32)
        return {**self.init(key, start), "nonfinite": {"total": none, "in_row": none, "longest": none}}

    def step(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One training step; `key` belongs to the whole run, the step's own is derived from it.

        A step with a loss or a gradient norm that is not finite changes no network, optimizer, average or anything else, as
        if its batch were not there; only "step", which is the position of the data, goes on, and "nonfinite" counts it: all
        of them, those in a row up to now, and the longest row. In a state given to `update`, "step" is the number of updates
        made, so that learning rates, averages and the discriminator's start count these alone.
        """
        skipped, draws = state["nonfinite"], self.draw(jax.random.fold_in(key, state["step"]), batch)
        former = {**state, "step": state["step"] - skipped["total"]}
        del former["nonfinite"]
        new, metrics = self.update(former, frozen, batch, draws)
        finite = self._finite(former, new, metrics)
        new = jax.tree.map(lambda n, f: jnp.where(finite, n, f), new, former)
        in_row = jnp.where(finite, 0, skipped["in_row"] + 1)
        counts = {
            "total": skipped["total"] + ~finite,
            "in_row": in_row,
            "longest": jnp.maximum(skipped["longest"], in_row),
        }
        metrics["nonfinite_steps"] = counts["total"]
        return {**new, "step": state["step"] + 1, "nonfinite": counts}, metrics

    def _finite(self, former: State, new: State, metrics: Metrics) -> jax.Array:
        """Whether the losses and the gradient norms of all updates of a step are finite."""
        finite = jnp.isfinite(metrics[self.loss]) & jnp.isfinite(metrics["grad_norm"])
        if "discriminator" in self.networks:
            # One that has not started reports NaN, and has made no update.
            made = new["opt"]["discriminator"][0].count != former["opt"]["discriminator"][0].count
            finite &= ~made | (jnp.isfinite(metrics["discriminator_loss"]) & jnp.isfinite(metrics["disc_grad_norm"]))
        return finite


@dataclasses.dataclass(frozen=True)
class Network:
    """A network in training, with its optimizer.

    Attributes:
      graphdef, abstract: of the module; `nnx.merge(graphdef, params)` makes it.
      optimizer: AdamW with the published weight decay groups and the schedule.
      schedule: learning rate by update, for the log.
      max_grad_norm: gradients are clipped to this global norm.
      trained: the top-level parts of the parameters that are trained; None: all. The others stay as they are, and their
        average, a copy, does too.
    """

    config: models.Config
    graphdef: nnx.GraphDef
    abstract: convert.Params
    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    max_grad_norm: float
    trained: tuple[str, ...] | None = None

    def init(self, key: jax.Array, start: convert.Params | None = None) -> tuple[convert.Params, optax.OptState]:
        """(parameters, optimizer state): new parameters, or `start`."""
        params = models.init(self.config, key) if start is None else start
        return params, self.optimizer.init(self.trainable(params))

    def module(self, params: convert.Params) -> nnx.Module:
        return nnx.merge(self.graphdef, params)

    def trainable(self, params: convert.Params) -> convert.Params:
        """The part of the parameters that is trained, what gradients are taken with respect to."""
        return params if self.trained is None else {name: params[name] for name in self.trained}

    def apply(
        self, params: convert.Params, opt: optax.OptState, grads: convert.Params
    ) -> tuple[convert.Params, optax.OptState, jax.Array]:
        """Clip, update -> (params, optimizer state, gradient norm before clipping); gradients of the trainable part."""
        grads, norm = clip_by_global_norm(grads, self.max_grad_norm)
        trainable = self.trainable(params)
        updates, opt = self.optimizer.update(grads, opt, trainable)
        return {**params, **optax.apply_updates(trainable, updates)}, opt, norm


def make_network(
    config: models.Config,
    optimizer: Mapping[str, Any],
    num_steps: int,
    *,
    trained: tuple[str, ...] | None = None,
    compute_dtype: str = "float32",
    remat: bool = False,
) -> Network:
    """A network with AdamW as the published recipes have it.

    Args:
      optimizer: learning_rate, end_learning_rate, schedule ("cosine" or "constant"), warmup_steps, beta1, beta2,
        weight_decay, max_grad_norm.
      num_steps: updates that the schedule spans.
      trained: see `Network`.

    Raises:
      ValueError: an unknown schedule or dtype.
    """
    if compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"compute_dtype is {compute_dtype!r}, expected 'float32' or 'bfloat16'")
    graphdef, abstract = models.abstract(config, dtype=jnp.dtype(compute_dtype), remat=remat)
    lr, warmup = optimizer["learning_rate"], optimizer["warmup_steps"]
    if optimizer["schedule"] == "cosine":
        schedule = cosine_schedule(lr, end_lr=optimizer["end_learning_rate"], warmup_steps=warmup, total_steps=num_steps)
    elif optimizer["schedule"] == "constant":
        schedule = constant_schedule(lr, warmup_steps=warmup)
    else:
        raise ValueError(f"schedule is {optimizer['schedule']!r}, expected 'cosine' or 'constant'")
    decay_mask = convert.decay_mask(convert.table_for(config), abstract, NO_DECAY_WORDS)
    tx = adamw(
        schedule,
        b1=optimizer["beta1"],
        b2=optimizer["beta2"],
        weight_decay=optimizer["weight_decay"],
        decay_mask=decay_mask if trained is None else {name: decay_mask[name] for name in trained},
    )
    return Network(config, graphdef, abstract, tx, schedule, optimizer["max_grad_norm"], trained)


def jit_step(task: Task, mesh: Mesh, state: Any, frozen: Any) -> Callable:
    """`task.step`, compiled for a mesh: the state is donated and stays where it is placed, the metrics are whole everywhere.
    To be called and traced under `jax.set_mesh(mesh)`.

    Args:
      state, frozen: their shardings, trees of NamedSharding.
    """
    return jax.jit(
        task.step,
        in_shardings=(state, frozen, sharding.batch_sharding(mesh), None),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def split_batch(tree: Any, parts: int) -> Any:
    """Every [B, ...] of a tree -> [parts, B / parts, ...]. Part i takes rows i, i + parts, ..., so that a batch that is cut
    among devices is cut among them in each part."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join_batch(tree: Any) -> Any:
    """The inverse of `split_batch`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


# On a CPU the gradient of a convolution takes 25 times as long in a loop or a branch as in the main program.
_INLINE = {"cpu": True, "gpu": False, "tpu": False}


def cond(condition: jax.Array, branch: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`branch()` where a traced condition holds, else `otherwise()`; on a CPU both are computed."""
    if _INLINE[target_platform()]:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), branch(), otherwise())
    return jax.lax.cond(condition, branch, otherwise)


def map_parts(function: Callable, rows: Any, parts: int) -> Any:
    """`function` of a tree of [B, ...], computed one part of the batch at a time, and once more in the backward pass."""
    if parts == 1:
        return function(rows)
    once = jax.checkpoint(function)
    inline = _INLINE[target_platform()]
    _, outputs = jax.lax.scan(lambda _, part: (None, once(part)), None, split_batch(rows, parts), unroll=inline)
    return join_batch(outputs)


def accumulate(
    loss: Callable, params: convert.Params, rows: Any, parts: int, *, convolutions: bool = False
) -> tuple[convert.Params, Metrics, Any]:
    """Gradient of the mean of a loss over `parts` parts of a batch, computed one part at a time.

    Args:
      loss: (params, rows of one part) -> (scalar, (metrics, outputs [b, ...])).
      rows: tree of [B, ...].
      convolutions: the loss has some, so that on a CPU the parts must not be a loop.

    Returns:
      (gradients, metrics averaged over the parts, outputs of all rows [B, ...]).
    """
    grad = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, (metrics, outputs) = grad(params, rows)
        return grads, metrics, outputs

    def body(total, part):
        grads, (metrics, outputs) = grad(params, part)
        return jax.tree.map(jnp.add, total, grads), (metrics, outputs)

    zeros = jax.tree.map(jnp.zeros_like, params)
    inline = convolutions and _INLINE[target_platform()]
    grads, (metrics, outputs) = jax.lax.scan(body, zeros, split_batch(rows, parts), unroll=inline)
    return (
        jax.tree.map(lambda g: g / parts, grads),
        jax.tree.map(lambda m: m.mean(0), metrics),
        join_batch(outputs),
    )


def restarted(
    config: TiTokConfig, params: convert.Params, usage: jax.Array, outputs: Mapping[str, jax.Array]
) -> tuple[convert.Params, jax.Array]:
    """A tokenizer's parameters and its codes' usage after `restart_codes`; `outputs` holds "latents" and "tokens"."""
    codebook, usage = restart_codes(
        params["quantize"]["embedding"],
        usage,
        outputs["latents"],
        outputs["tokens"],
        use_l2_norm=config.use_l2_norm,
    )
    return {**params, "quantize": {**params["quantize"], "embedding": codebook}}, usage


def reconstruction_quality(preview: Callable) -> Callable[[State, Any, Batch, jax.Array], dict[str, jax.Array]]:
    """`Task.evaluate` of a tokenizer whose previews hold the image and its reconstruction: PSNR and SSIM."""

    def evaluate(state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        pictures = preview(state, frozen, batch, key)
        pair = pictures["image"], jnp.clip(pictures["reconstruction"], 0.0, 1.0)
        return {"psnr": psnr(*pair), "ssim": ssim(*pair)}

    return evaluate


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """`metrics.psnr` in a jitted function: [B, H, W, C] in [0, 1], twice -> float32 [B] in dB."""
    return -10.0 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """`metrics.ssim` in a jitted function: [B, H, W, C] in [0, 1], twice -> float32 [B]."""

    def window(x):  # [B, H, W, C] -> [B, H - 10, W - 10, C]
        # As two matrix products, which every backend does fast; a convolution of one channel is slow.
        rows, columns = (
            jnp.array(sum(tap * np.eye(n - 10, n, k) for k, tap in enumerate(SSIM_TAPS)), jnp.float32) for n in x.shape[1:3]
        )
        return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")

    return windowed_ssim(a, b, window)
