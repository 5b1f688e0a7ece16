"""Training, all kinds: `python -m titok_jax.train --config configs/FILE.py:VARIANT --workdir DIR`.

Examples:
  python -m titok_jax.train --config configs/digits.py:tokenizer --workdir runs/tokenizer
  python -m titok_jax.train --config configs/digits.py:generator --workdir runs/generator \\
      --config.tokenizer=runs/tokenizer/pretrained
  python -m titok_jax.train --config configs/digits.py:tokenizer --workdir runs/small --config.optimizer.learning_rate=1e-3

A run ends with DIR/pretrained, a model folder. Stopped at any point and started again by the same command, it goes on from
DIR/checkpoints and ends with the same parameters, bit for bit, as if it had not been stopped. Also in DIR: metrics.jsonl,
tensorboard/ and previews/.
"""

import fcntl
import json
import signal
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

import jax
import numpy as np
from absl import app, flags, logging
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from titok_jax import inference, pictures, sharding
from titok_jax.checkpoint import Checkpoints, check_config
from titok_jax.data.loader import make_eval_loader, make_loader
from titok_jax.data.sources import make_source
from titok_jax.data.transforms import make_eval_transform, make_train_transform
from titok_jax.metric_log import MetricLog
from titok_jax.models.generator import GeneratorConfig
from titok_jax.tasks import Task, jit_step
from titok_jax.tasks.build import build_task

# What may change when a run is continued; everything else decides the result.
FREE_FIELDS = (
    "mesh",
    "log_every",
    "checkpoint_every",
    "preview_every",
    "keep_checkpoints",
    "data.num_workers",
    "data.num_threads",
)


def check_batch(batch: Mapping[str, np.ndarray], config: ConfigDict, task: Task) -> None:
    """Raises ValueError if the data do not have what the task reads, in the model's size."""
    model = next(iter(task.networks.values())).config
    if isinstance(model, GeneratorConfig) and "tokens" in batch:
        shape, name, expected = batch["tokens"].shape[1:], "tokens", (model.num_tokens,)
        if batch["tokens"].max(initial=0) >= model.codebook_size:
            raise ValueError(f"a token of the data is {batch['tokens'].max()}, the codebook has {model.codebook_size} codes")
    else:
        if "image" not in batch:
            raise ValueError(f"data source {config.data.source.name!r} has no images, and this task needs them")
        if isinstance(model, GeneratorConfig):
            if not config.tokenizer:
                raise ValueError("the data are images: set --config.tokenizer to the tokenizer that makes their tokens")
            size = inference.load_tokenizer_config(config.tokenizer).image_size
        else:
            size = model.image_size
        shape, name, expected = batch["image"].shape[1:], "images", (size, size, 3)
    if tuple(shape) != tuple(expected):
        raise ValueError(f"the data's {name} have shape {list(shape)}, the model takes {list(expected)}: see config.data")
    if isinstance(model, GeneratorConfig) and not 0 <= batch["label"].min() <= batch["label"].max() < model.num_classes:
        raise ValueError(f"labels of the data reach from {batch['label'].min()} to {batch['label'].max()}, "
                         f"the model takes 0 to {model.num_classes - 1}")  # fmt: skip


def describe(config: ConfigDict, task: Task, mesh: Mesh, num_examples: int) -> None:
    """Prints what is about to be run."""
    print(f"Configuration:\n{config}")
    for name, network in task.networks.items():
        print(f"{name}:\n{parameter_overview.get_parameter_overview(network.abstract, include_stats=False)}")
    batch, steps = config.data.batch_size, config.num_steps
    print(
        f"Global batch {batch} x {steps:,} steps = {batch * steps:,} examples, {batch * steps / num_examples:.1f} epochs of "
        f"{num_examples:,}\nMesh {dict(mesh.shape)} on {mesh.devices.size} {jax.default_backend()} device(s), "
        f"{jax.process_count()} process(es), compute in {config.compute_dtype}",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs a training to its end, from its newest checkpoint if there is one. Returns the final state."""
    # Parts: everything that can be wrong with the configuration shows here, before anything is written.
    workdir = epath.Path(workdir).expanduser().resolve()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file, expected a folder")
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "num_steps"):
        if config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]}, expected at least 1")
    mesh = sharding.make_mesh(**config.mesh)
    batch_size, num_steps = config.data.batch_size, config.num_steps
    sharding.check_batch_size(mesh, batch_size, config.gradient_accumulation)
    task = build_task(config)
    source = make_source(config.data.source)
    augment = make_train_transform(config.data.transform) if config.data.get("transform") else None
    first_process = jax.process_index() == 0
    stored_config = json.loads(config.to_json())

    def batches(start_step: int):
        return make_loader(
            source,
            seed=config.seed,
            global_batch_size=batch_size,
            start_step=start_step,
            train_transform=augment,
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
        )

    with make_loader(
        source, seed=config.seed, global_batch_size=batch_size, train_transform=augment, num_threads=0
    ) as loader:
        check_batch(next(loader), config, task)
    if first_process:
        describe(config, task, mesh, len(source))

    # State: made on its shards, or read onto them.
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(task.init, key)
    shardings, whole = sharding.state_shardings(mesh, abstract), sharding.replicated(mesh)
    frozen_shardings = sharding.state_shardings(mesh, task.frozen)
    frozen = jax.device_put(task.frozen, frozen_shardings)
    workdir.mkdir(parents=True, exist_ok=True)
    lock = lock_workdir(workdir) if first_process else None
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    restored = checkpoints.restore_newest(
        abstract, shardings, lambda found: check_config(found, stored_config, FREE_FIELDS, str(workdir))
    )
    if restored is None:
        start, state = 0, jax.jit(task.init, out_shardings=shardings)(jax.random.fold_in(key, 0), task.start)
    else:
        start, state = restored
        print(f"Continuing at step {start} of {num_steps} from {workdir}/checkpoints", flush=True)

    # Steps.
    step_fn = jit_step(task, mesh, shardings, frozen_shardings)
    previews = Previews(config, task, mesh, workdir, frozen, first_process) if config.preview_every else None
    step_key = jax.random.fold_in(key, 1)
    log = MetricLog(workdir, first_step=start, num_steps=num_steps, batch_size=batch_size, active=first_process)
    loader, stop, done = batches(start), StopSignal(), start
    try:
        for step in range(start, num_steps):
            began = time.perf_counter()
            batch = next(loader)
            log.waited(time.perf_counter() - began)
            with jax.set_mesh(mesh):
                state, metrics = step_fn(state, frozen, sharding.put_batch(mesh, batch), step_key)
            done = step + 1
            if step == start:  # the first step waits for its compilation
                jax.block_until_ready(metrics)
                log.restart_clock()
            if done % config.log_every == 0 or done == num_steps:
                log.write(done, jax.device_get(metrics), shown=task.loss)
            stopping = stop.agreed(done)
            if done % config.checkpoint_every == 0 or done == num_steps or stopping:
                checkpoints.save(done, state, stored_config)
            if previews and (done % config.preview_every == 0 or done == num_steps):
                previews.draw(state, done, log)
                log.restart_clock()
            if stopping and done < num_steps:
                break
    finally:
        loader.close()
        log.close()
        checkpoints.close()
        stop.close()
        if lock:
            lock.close()
    if done < num_steps:
        print(f"Stopped by SIGTERM after step {done}, which is saved; the same command continues", flush=True)
        return jax.device_get(state)
    host_state = jax.device_get(jax.jit(lambda s: s, out_shardings=whole)(state))
    if first_process:
        task.export(host_state, workdir / "pretrained")
        print(f"Done: {workdir}/pretrained", flush=True)
    return host_state


class StopSignal:
    """SIGTERM, which a preempted machine gets, asks for a checkpoint and an orderly end."""

    def __init__(self):
        self._received = False
        self._former = None
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._former = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self._received = True

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`. With several processes JAX's preemption service agrees on one step for all."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def close(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)


def lock_workdir(workdir: epath.Path) -> IO | None:
    """Holds the workdir until the returned file is closed, or the process ends however it does. Local folders only.

    Raises:
      ValueError: another run holds it.
    """
    if "://" in str(workdir):
        return None
    file = open(str(workdir / ".lock"), "w")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"another run is training in {workdir}; wait for it, or choose another workdir") from None
    return file


class Previews:
    """Pictures of how good the model is, from the averaged parameters: files in workdir/previews, and TensorBoard."""

    def __init__(self, config: ConfigDict, task: Task, mesh: Mesh, workdir: epath.Path, frozen: Any, active: bool):
        self._folder, self._frozen, self._active = workdir / "previews", frozen, active
        self._columns = config.preview_columns
        self._key = jax.random.fold_in(jax.random.key(config.seed), 2)
        self._fn = None
        if task.preview is None:
            return
        self._fn = jax.jit(task.preview, out_shardings=sharding.replicated(mesh))
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = np.lcm(rows, self._columns)
        size = int(-(-config.preview_images // rows) * rows)
        crop = make_eval_transform(config.data.eval_transform) if config.data.get("eval_transform") else None
        source = make_source(config.data.get("eval_source") or config.data.source)
        with make_eval_loader(source, global_batch_size=size, transform=crop, num_threads=0) as loader:
            self._batch = sharding.put_batch(mesh, next(loader))

    def draw(self, state: Any, step: int, log: MetricLog) -> None:
        """Draws and writes the pictures of a state."""
        if self._fn is None:
            return
        images = jax.device_get(self._fn(state, self._frozen, self._batch, self._key))
        if not self._active:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        # One row of each kind, then the next: a reconstruction stands below its original.
        count = len(next(iter(images.values())))
        chunks = [
            (name, kind[i : i + self._columns]) for i in range(0, count, self._columns) for name, kind in images.items()
        ]
        picture = pictures.grid(
            np.concatenate([chunk for _, chunk in chunks]),
            columns=self._columns,
            row_labels=[name for name, _ in chunks],
            title=f"step {step}",
        )
        with (self._folder / f"{step:07d}.png").open("wb") as file:
            picture.save(file, "PNG")
        log.picture(step, "preview", np.asarray(picture))


_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/FILE.py:VARIANT", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: made, or continued")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file at the level of information
    try:
        train(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing; an override of a field that the configuration does not have ends with one line, not a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except OSError as error:
        raise SystemExit(f"error: cannot read the file of --config: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        overrides = " ".join(argument for argument in argv if argument.startswith("--config."))
        raise SystemExit(f"error: {overrides}: the configuration has no field {error}, or one of another type") from None


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
