"""What all kinds of training share: the state, the networks with their optimizers, and the step around an update.

The state of a task is a nested dict of arrays:

    step         int32: number of steps done, which is also the position in the data
    params       {network: parameters}
    opt          {network: optimizer state}
    ema          {network: average of its parameters}, only for the exported network
    lecam        LeCam's averages of the discriminator's logits, if there is a discriminator
    code_usage   [K]: how often each code was used recently, if unused codes are restarted
    nonfinite    {"total", "in_row", "longest"}: counts of skipped steps, see `Task.step`

In the state passed to `Task.update`, "step" counts updates: it does not include skipped steps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.shard_alike import shard_alike
from jax.sharding import Mesh

from titok_jax import models
from titok_jax.inference.functions import DTYPES
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
      graphdef, abstract: the module's graph definition and parameter shapes. `nnx.merge(graphdef, params)` makes the module.
      optimizer: AdamW with the published weight decay groups and the schedule.
      schedule: learning rate schedule, for the log.
      max_grad_norm: gradients are clipped to this global norm.
      trained: names of the trained top-level parts of the parameters; None for all. The other parts and their averages do
        not change.
    """

    config: models.Config
    graphdef: nnx.GraphDef
    abstract: convert.Params
    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    max_grad_norm: float
    trained: tuple[str, ...] | None = None

    def init(self, key: jax.Array, start: convert.Params | None = None) -> tuple[convert.Params, optax.OptState]:
        """Returns (parameters, optimizer state). The parameters are new, or `start` if given."""
        params = models.init(self.config, key) if start is None else start
        return params, self.optimizer.init(self.trainable(params))

    def module(self, params: convert.Params) -> nnx.Module:
        return nnx.merge(self.graphdef, params)

    def trainable(self, params: convert.Params) -> convert.Params:
        """The trained part of the parameters. Gradients are taken with respect to it."""
        return params if self.trained is None else {name: params[name] for name in self.trained}

    def apply(
        self, params: convert.Params, opt: optax.OptState, grads: convert.Params
    ) -> tuple[convert.Params, optax.OptState, jax.Array]:
        """Clips the gradients of the trainable part and applies them. Returns (params, optimizer state, gradient norm before
        clipping)."""
        trainable = self.trainable(params)
        grads = jax.tree.map(lambda g, p: shard_alike(g, p)[0], grads, trainable)
        grads, norm = clip_by_global_norm(grads, self.max_grad_norm)
        updates, opt = self.optimizer.update(grads, opt, trainable)
        return {**params, **optax.apply_updates(trainable, updates)}, opt, norm


def make_network(
    config: models.Config,
    optimizer: OptimizerConfig,
    num_steps: int,
    *,
    trained: tuple[str, ...] | None = None,
    compute_dtype: str = "float32",
    remat: str = "none",
    scan_layers: bool | None = True,
) -> Network:
    """Makes a network with AdamW as in the published recipes.

    Args:
      num_steps: number of updates that the schedule spans.
      trained: see `Network`.
      compute_dtype, remat, scan_layers: see `TaskOptions`.
    """
    graphdef, abstract = models.abstract(config, dtype=jnp.dtype(compute_dtype), remat=remat, scan_layers=scan_layers)
    schedule = optimizer.make_schedule(num_steps)
    decay_mask = convert.decay_mask(convert.table_for(config), abstract, NO_DECAY_WORDS)
    tx = adamw(
        schedule,
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        mu_dtype=optimizer.mu_dtype,
        decay_mask=decay_mask if trained is None else {name: decay_mask[name] for name in trained},
    )
    return Network(config, graphdef, abstract, tx, schedule, optimizer.max_grad_norm, trained)


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Options of every kind of training, in addition to its model and its loss.

    Attributes:
      optimizer: optimizer of the model.
      num_steps: number of updates that the schedules span.
      discriminator, discriminator_optimizer: for trainings on pixels whose loss has an adversarial term.
      perceptual: the perceptual network that the loss names, with its weights; None if the loss has none.
      start: the model's initial parameters; None for new ones.
      ema_decay: decay of the parameter average: a number, which is the limit of the published ramp, or a function of the
        update.
      compute_dtype: "float32" or "bfloat16", of the model. Parameters, losses and the perceptual network are float32.
      discriminator_dtype: the same for the discriminator. As published it is float32, whatever the model's.
      remat, scan_layers: how the transformer's layers run, see `layers.run_stack`.
      gradient_accumulation: number of parts that a batch is split into. The gradient is that of the full batch.
      restart_codes: move unused codes of the codebook, see `quantizer.restart_codes`.
      log_grad_norms: also give the norm of the gradient of each group of parameters, see `group_norms`.

    Raises:
      ValueError: for an unknown dtype.
    """

    optimizer: OptimizerConfig
    num_steps: int
    discriminator: DiscriminatorConfig | None = None
    discriminator_optimizer: OptimizerConfig | None = None
    perceptual: Perceptual | None = None
    start: convert.Params | None = None
    ema_decay: float | Callable[[jax.Array], jax.Array] = 0.999
    compute_dtype: str = "float32"
    discriminator_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool | None = True
    gradient_accumulation: int = 1
    restart_codes: bool = False
    log_grad_norms: bool = False

    def __post_init__(self):
        for name in ("compute_dtype", "discriminator_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected 'float32' or 'bfloat16'")

    def network(self, config: models.Config, trained: tuple[str, ...] | None = None) -> Network:
        """The model of this training, with its optimizer."""
        options = {name: getattr(self, name) for name in ("compute_dtype", "remat", "scan_layers")}
        return make_network(config, self.optimizer, self.num_steps, trained=trained, **options)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One kind of training, as pure functions over a state. The training loop uses only this interface.

    Attributes:
      networks: the trained networks by name.
      options: the options that all kinds share.
      frozen: parameters that steps read but never change (a tokenizer, a perceptual network). Checkpoints omit them.
      model: name of the network that is averaged and exported.
      loss: name of the metric to show first.
    """

    networks: Mapping[str, Network]
    options: TaskOptions
    frozen: Any = None

    model: ClassVar[str] = "tokenizer"
    loss: ClassVar[str] = "total_loss"

    @property
    def config(self) -> models.Config:
        """The model's configuration."""
        return self.networks[self.model].config

    @property
    def start(self) -> dict[str, convert.Params] | None:
        """The initial parameters {network: parameters}, passed to `init`. None if all parameters are new."""
        return None if self.options.start is None else {self.model: self.options.start}

    @property
    def shows_pictures(self) -> bool:
        """Whether `preview` can make pictures. If it cannot, tokenizers cannot `evaluate` either."""
        return True

    # Methods that a kind of training may override

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        """All random values that a step uses, as arrays or keys. Pure."""
        del key, batch
        return {}

    def update(self, state: State, frozen: Any, batch: Batch, draws: Any) -> tuple[State, Metrics]:
        """Returns (the state after one update, metrics). Pure."""
        raise NotImplementedError

    def preview(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns pictures made with the averaged model, {title: images [n, H, W, 3] in [0, 1]}. Pure.

        A grid shows them: first one row of `preview_columns` images per title, then the next row of each, and so on.
        """
        raise NotImplementedError

    @property
    def measures(self) -> bool:
        """Whether `evaluate` can compute metrics."""
        return self.shows_pictures

    def evaluate(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns {metric: [B]} of the averaged model, one value per example of a held-out batch. Pure."""
        return reconstruction_quality(self.preview(state, frozen, batch, key))

    def export(self, state: State, folder: Path) -> None:
        """Writes the averaged model as a pretrained folder. Reads each leaf of `state["ema"]` once, in order, and no other
        part of the state: in a run of several processes they are gathered on the way (`placement.gathered`)."""
        pretrained.save(folder, self.config, state["ema"][self.model], overwrite=True)

    # Methods that all kinds share

    def init(self, key: jax.Array, start: Mapping[str, convert.Params] | None = None) -> State:
        """The initial state of the networks. Pure.

        Args:
          start: {network: parameters} to use instead of new ones.
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
        """The state before the first step: that of `init`, plus the counts of skipped steps, which are 0."""
        none = jnp.zeros((), jnp.int32)
        return {**self.init(key, start), "nonfinite": {"total": none, "in_row": none, "longest": none}}

    def step(self, state: State, frozen: Any, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """Runs one training step. `key` is the key of the run; the step derives its own key from it.

        A step is skipped if a loss or gradient norm is not finite. It then changes no network, optimizer or average. "step",
        the position in the data, still advances. "nonfinite" counts the skipped steps: all of them, those in a row up to
        now, and the longest row.
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
        """Whether the losses and gradient norms of all updates in a step are finite."""
        finite = jnp.isfinite(metrics[self.loss]) & jnp.isfinite(metrics["grad_norm"])
        if "discriminator" in self.networks:
            # A discriminator that has not started reports NaN. It has made no update.
            made = new["opt"]["discriminator"][0].count != former["opt"]["discriminator"][0].count
            finite &= ~made | (jnp.isfinite(metrics["discriminator_loss"]) & jnp.isfinite(metrics["disc_grad_norm"]))
        return finite

    def advance(self, state: State, grads: convert.Params, metrics: Metrics) -> State:
        """Updates the model with its gradients and returns the new state. Adds "lr" and "grad_norm" to the metrics."""
        name, network, decay = self.model, self.networks[self.model], self.options.ema_decay
        params, opt, metrics["grad_norm"] = network.apply(state["params"][name], state["opt"][name], grads)
        if self.options.log_grad_norms:
            metrics |= group_norms(grads, "grad_norm")
        metrics["lr"] = network.schedule(state["step"])
        return {
            **state,
            "step": state["step"] + 1,
            "params": {**state["params"], name: params},
            "opt": {**state["opt"], name: opt},
            "ema": {name: ema_update(state["ema"][name], params, state["step"], decay)},
        }

    def restarted(self, state: State, outputs: Mapping[str, jax.Array]) -> State:
        """Applies `restart_codes` to the model's codebook and returns the new state.

        Args:
          outputs: a step's "latents" and "tokens" of all rows.
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


def group_norms(grads: convert.Params, name: str) -> Metrics:
    """{f"{name}/{group}": the global norm of a group's gradient}. Groups are the parts of the network down to the second
    level, such as "encoder/transformer"; the blocks of a stack are one group."""
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in convert.flatten(grads).items():
        groups.setdefault("/".join(path.split("/")[:-1][:2]) or path, []).append(leaf)
    return {f"{name}/{group}": optax.tree.norm(leaves) for group, leaves in groups.items()}


def jit_step(task: Task, mesh: Mesh, state: Any) -> Callable:
    """Compiles `task.step` for a mesh. The state is donated and keeps its sharding; the metrics and the frozen parameters
    are replicated.

    Call and trace the result under `jax.set_mesh(mesh)`.

    Args:
      state: shardings of the state, a tree of NamedSharding.
    """
    return jax.jit(
        task.step,
        in_shardings=(state, sharding.replicated(mesh), sharding.batch_sharding(mesh), None),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )
