"""What all kinds of training share: the state, the networks with their optimizers, and the step around an update.

The state of a task is a nested dict of arrays:

    step         int32: steps made, which is also the position of the data
    params       {network: parameters}
    opt          {network: optimizer state}
    ema          {network: average of its parameters}, of the network that is exported
    lecam        LeCam's averages of the discriminator's logits, where there is a discriminator
    code_usage   [K] how often each code was used lately, where unused codes are restarted
    nonfinite    {"total", "in_row", "longest"}: steps that were skipped, see `Task.step`

In the state that `Task.update` sees, "step" counts updates: it leaves out the steps that were skipped.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.models.discriminator import DiscriminatorConfig
from titok_jax.models.quantizer import restart_codes
from titok_jax.runtime import sharding
from titok_jax.training.optimizer import (
    NO_DECAY_WORDS,
    OptimizerConfig,
    adamw,
    clip_by_global_norm,
    ema_update,
)
from titok_jax.training.quality import reconstruction_quality
from titok_jax.weights import convert, pretrained
from titok_jax.weights.perceptual_files import Perceptual

State = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


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
    optimizer: OptimizerConfig,
    num_steps: int,
    *,
    trained: tuple[str, ...] | None = None,
    compute_dtype: str = "float32",
    remat: bool = False,
) -> Network:
    """A network with AdamW as the published recipes have it.

    Args:
      num_steps: updates that the schedule spans.
      trained: see `Network`.

    Raises:
      ValueError: an unknown dtype.
    """
    if compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"compute_dtype is {compute_dtype!r}, expected 'float32' or 'bfloat16'")
    graphdef, abstract = models.abstract(config, dtype=jnp.dtype(compute_dtype), remat=remat)
    schedule = optimizer.make_schedule(num_steps)
    decay_mask = convert.decay_mask(convert.table_for(config), abstract, NO_DECAY_WORDS)
    tx = adamw(
        schedule,
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        decay_mask=decay_mask if trained is None else {name: decay_mask[name] for name in trained},
    )
    return Network(config, graphdef, abstract, tx, schedule, optimizer.max_grad_norm, trained)


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """What every kind of training is given beside its model and its loss.

    Attributes:
      optimizer: of the model.
      num_steps: updates that the schedules span.
      discriminator, discriminator_optimizer: of the trainings on pixels whose loss has an adversarial term.
      perceptual: the network that the loss names, with its weights; None if the loss is without.
      start: the model's parameters to begin with; None: new ones.
      ema_decay: of the average, a number or (update) -> number; a number is the limit of the published ramp.
      compute_dtype: "float32" or "bfloat16"; parameters are float32.
      remat: recompute each transformer block in the backward pass.
      gradient_accumulation: parts that a batch is split into; the gradient is that of the whole batch.
      restart_codes: move unused codes of the codebook, see `quantizer.restart_codes`.
    """

    optimizer: OptimizerConfig
    num_steps: int
    discriminator: DiscriminatorConfig | None = None
    discriminator_optimizer: OptimizerConfig | None = None
    perceptual: Perceptual | None = None
    start: convert.Params | None = None
    ema_decay: float | Callable[[jax.Array], jax.Array] = 0.999
    compute_dtype: str = "float32"
    remat: bool = False
    gradient_accumulation: int = 1
    restart_codes: bool = False

    def network(self, config: models.Config, trained: tuple[str, ...] | None = None) -> Network:
        """The model of this training, with its optimizer."""
        options = {"trained": trained, "compute_dtype": self.compute_dtype, "remat": self.remat}
        return make_network(config, self.optimizer, self.num_steps, **options)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One kind of training: pure functions over a state. The loop knows no more of a kind than is here.

    Attributes:
      networks: the trained networks by name.
      options: what every kind is given.
      frozen: parameters that steps read and nothing changes (a tokenizer, a perceptual network); not in checkpoints.
      model: the name of the network that is averaged and exported.
      loss: the metric to show first.
    """

    networks: Mapping[str, Network]
    options: TaskOptions
    frozen: Any = None

    model: ClassVar[str] = "tokenizer"
    loss: ClassVar[str] = "total_loss"

    @property
    def config(self) -> models.Config:
        """Of the model."""
        return self.networks[self.model].config

    @property
    def start(self) -> dict[str, convert.Params] | None:
        """{network: parameters} that a run begins with in the place of new ones, given to `init`; None if all are new."""
        return None if self.options.start is None else {self.model: self.options.start}

    @property
    def shows_pictures(self) -> bool:
        """Whether `preview` can draw something; where it cannot, tokenizers have no `evaluate` either."""
        return True

    # What a kind may do in its own way

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        """Everything random that a step uses, as arrays or keys. Pure."""
        del key, batch
        return {}

    def update(self, state: State, frozen: Any, batch: Batch, draws: Any) -> tuple[State, Metrics]:
        """(the state after one update, what it logs). Pure."""
        raise NotImplementedError

    def preview(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """{title: images [n, H, W, 3] in [0, 1]}: pictures of how good the averaged model is. Pure.

        The first `preview_columns` of each kind go into the first rows of a grid, and so on.
        """
        raise NotImplementedError

    @property
    def measures(self) -> bool:
        """Whether `evaluate` can measure something."""
        return self.shows_pictures

    def evaluate(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """{metric: [B]} of each example of a batch that training has not seen, by the averaged model. Pure."""
        return reconstruction_quality(self.preview(state, frozen, batch, key))

    def export(self, state: State, folder: Path) -> None:
        """Writes the averaged model as a pretrained folder."""
        pretrained.save(folder, self.config, state["ema"][self.model], overwrite=True)

    # What all kinds do alike

    def init(self, key: jax.Array, start: Mapping[str, convert.Params] | None = None) -> State:
        """The first state of the networks. Pure.

        Args:
          start: {network: parameters} in the place of new ones.
        """
        state: State = {"step": jnp.zeros((), jnp.int32), "params": {}, "opt": {}}
        for name, network_key in self._init_keys(key).items():
            state["params"][name], state["opt"][name] = self.networks[name].init(network_key, (start or {}).get(name))
        state["ema"] = {self.model: state["params"][self.model]}
        if self.options.restart_codes:
            state["code_usage"] = jnp.zeros(self.config.codebook_size)
        return state

    def _init_keys(self, key: jax.Array) -> dict[str, jax.Array]:
        return dict(zip(self.networks, jax.random.split(key, len(self.networks)), strict=True))

    def begin(self, key: jax.Array, start: Mapping[str, convert.Params] | None = None) -> State:
        """The state before the first step: `init` with no step skipped."""
        none = jnp.zeros((), jnp.int32)
        return {**self.init(key, start), "nonfinite": {"total": none, "in_row": none, "longest": none}}

    def step(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One training step; `key` belongs to the whole run, the step's own is derived from it.

        A step with a loss or a gradient norm that is not finite changes no network, optimizer or average, as if its batch
        were not there. Only "step", the position of the data, goes on, and "nonfinite" counts such steps: all of them, those
        in a row up to now, and the longest row.
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

    def advance(self, state: State, grads: convert.Params, metrics: Metrics) -> State:
        """The state after an update of the model by its gradients; adds "lr" and "grad_norm" to the metrics."""
        name, network, decay = self.model, self.networks[self.model], self.options.ema_decay
        params, opt, metrics["grad_norm"] = network.apply(state["params"][name], state["opt"][name], grads)
        metrics["lr"] = network.schedule(state["step"])
        return {
            **state,
            "step": state["step"] + 1,
            "params": {**state["params"], name: params},
            "opt": {**state["opt"], name: opt},
            "ema": {name: ema_update(state["ema"][name], params, state["step"], decay)},
        }

    def restarted(self, state: State, outputs: Mapping[str, jax.Array]) -> State:
        """The state after `restart_codes` of the model's codebook.

        Args:
          outputs: of a step: "latents" and "tokens" of all rows.
        """
        config, params = self.config, state["params"][self.model]
        codebook, usage = restart_codes(
            params["quantize"]["embedding"],
            state["code_usage"],
            outputs["latents"],
            outputs["tokens"],
            use_l2_norm=config.use_l2_norm,
        )
        params = {**params, "quantize": {**params["quantize"], "embedding": codebook}}
        return {**state, "params": {**state["params"], self.model: params}, "code_usage": usage}


def jit_step(task: Task, mesh: Mesh, state: Any, frozen: Any) -> Callable:
    """`task.step`, compiled for a mesh: the state is donated and stays where it is, the metrics are replicated.

    Call and trace it under `jax.set_mesh(mesh)`.

    Args:
      state, frozen: their shardings, trees of NamedSharding.
    """
    return jax.jit(
        task.step,
        in_shardings=(state, frozen, sharding.batch_sharding(mesh), None),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )
