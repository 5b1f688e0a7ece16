"""The training loop, told in time order."""

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from titok_jax.data.loader import make_loader
from titok_jax.data.sources import make_source
from titok_jax.data.transforms import make_train_transform
from titok_jax.runtime import sharding
from titok_jax.runtime.paths import as_path, is_remote
from titok_jax.training.build import build_task, check_batch
from titok_jax.training.checkpoint import Checkpoints, check_config
from titok_jax.training.lock import lock_workdir
from titok_jax.training.log import MetricLog
from titok_jax.training.progress import Evaluation, Previews
from titok_jax.training.tasks import Task, jit_step

# What may change when a run is continued: the machine that it runs on, what it shows and keeps. Everything else decides the
# result, of which these change the rounding, and accumulation the draws of dropout.
FREE_FIELDS = (
    "mesh",
    "remat",
    "gradient_accumulation",
    "log_every",
    "checkpoint_every",
    "preview_every",
    "preview_images",
    "preview_columns",
    "eval_every",
    "eval_images",
    "keep_checkpoints",
    "max_nonfinite_steps",
    "recipe",
    "data.num_workers",
    "data.num_threads",
    "data.eval_source",
    "data.eval_transform",
)


def fingerprint(params: Any) -> str:
    """SHA-256 of a tree of arrays: paths, types, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_same_run(found: Mapping[str, Any], now: Mapping[str, Any], config: ConfigDict, workdir: epath.Path) -> None:
    """Raises ValueError unless a checkpoint's configuration and frozen networks are those of this run."""
    check_config({**found, "frozen_weights": ""}, {**now, "frozen_weights": ""}, FREE_FIELDS, str(workdir))
    if found.get("frozen_weights") != now["frozen_weights"]:
        names = [n for n in ("tokenizer", "vqgan", "perceptual_weights") if config.get(n)]
        then, today = str(found.get("frozen_weights"))[:12], now["frozen_weights"][:12]
        raise ValueError(
            f"the frozen weights of {' or '.join(f'config.{n} ({config[n]})' for n in names)} are not those that the run in "
            f"{workdir} began with (SHA-256 {then}... then, {today}... now): "
            "put the former back, or use another workdir"
        )


def off_recipe(config: Mapping[str, Any], recipe: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line for each value that differs from the recipe's."""
    for name, value in recipe.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from off_recipe(config[name], value, f"{prefix}{name}.")
        elif config[name] != value:
            yield f"{prefix}{name} is {config[name]}, the recipe has {value}"


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
    for line in off_recipe(config, config.recipe):
        print(f"WARNING: {line}", flush=True)


def train(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any] | None:
    """Runs a training to its end, from its newest checkpoint if there is one. Returns the final state, or None if SIGTERM
    stopped it."""
    with contextlib.ExitStack() as held:
        return _train(config, workdir, held)


def _train(config: ConfigDict, workdir: epath.PathLike, held: contextlib.ExitStack) -> dict[str, Any] | None:
    # Parts: everything that can be wrong with the configuration shows here, before anything is written.
    workdir = epath.Path(as_path(workdir)).expanduser()
    if not is_remote(workdir):
        workdir = workdir.resolve()  # which would make a local path of gs://
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file, expected a folder")
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "num_steps", "max_nonfinite_steps", "eval_images"):
        if config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]}, expected at least 1")
    mesh = sharding.make_mesh(**config.mesh)
    batch_size, num_steps = config.data.batch_size, config.num_steps
    sharding.check_batch_size(mesh, batch_size, config.gradient_accumulation)
    # Before the task, which may download the networks that it takes.
    source = make_source(config.data.source, "--config.data.source")
    task = build_task(config)
    augment = make_train_transform(config.data.transform) if config.data.get("transform") else None
    first_process, part = jax.process_index() == 0, sharding.batch_part(mesh)
    stored_config = json.loads(config.to_json()) | {"frozen_weights": fingerprint(task.frozen)}

    def batches(start_step: int):
        return make_loader(
            source,
            seed=config.seed,
            global_batch_size=batch_size,
            start_step=start_step,
            train_transform=augment,
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
            **part,
        )

    with make_loader(
        source, seed=config.seed, global_batch_size=batch_size, train_transform=augment, num_threads=0, **part
    ) as loader:
        check_batch(next(loader), config, task)
    evaluation = Evaluation(config, task, mesh) if config.eval_every else None
    previews = Previews(config, task, mesh, workdir) if config.preview_every else None
    if first_process:
        describe(config, task, mesh, len(source))

    # State: made on its shards, or read onto them.
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(task.begin, key)
    shardings = sharding.state_shardings(mesh, abstract)
    frozen_shardings = sharding.state_shardings(mesh, task.frozen)
    frozen = jax.device_put(task.frozen, frozen_shardings)
    workdir.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context(lock_workdir(workdir))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    restored = checkpoints.restore_newest(
        abstract, shardings, lambda found: check_same_run(found, stored_config, config, workdir)
    )
    if restored is None:
        given = jax.device_put(task.start, sharding.state_shardings(mesh, task.start))
        start, state = 0, jax.jit(task.begin, out_shardings=shardings)(jax.random.fold_in(key, 0), given)
        del given
    else:
        start, state = restored
        if first_process:
            print(f"Continuing at step {start} of {num_steps} from {workdir}/checkpoints", flush=True)

    # Steps.
    step_fn = jit_step(task, mesh, shardings, frozen_shardings)
    step_key = jax.random.fold_in(key, 1)
    log = MetricLog(workdir, first_step=start, num_steps=num_steps, batch_size=batch_size, active=first_process)

    def due(every: int, step: int) -> bool:
        return step > 0 and (step % every == 0 or step == num_steps)

    def look(step: int) -> None:
        """Measures and draws what is to be seen after `step`, outside the time that counts."""
        evaluate, preview = evaluation and due(config.eval_every, step), previews and due(config.preview_every, step)
        if evaluate or preview or step == num_steps:
            jax.block_until_ready(state)
            with log.paused():
                if evaluate:
                    log.write_evaluation(step, evaluation.measure(state, frozen))
                if preview:
                    previews.draw(state, frozen, step, log)
                log.draw_curves()

    loader, stop, done = batches(start), StopSignal(), start
    try:
        look(start)  # what a run that was stopped right after a checkpoint had no time for
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
            log_now = due(config.log_every, done)
            if log_now:
                log.write(done, jax.device_get(metrics), shown=task.loss)
            stopping = stop.agreed(done)
            save_now = due(config.checkpoint_every, done) or stopping
            if log_now or save_now:
                check_finite(state, done, config.max_nonfinite_steps)
            if save_now:
                if lock:
                    lock.check()
                checkpoints.save(done, state, stored_config)
            if stopping and done < num_steps:
                break
            look(done)
    finally:
        loader.close()
        log.close()
        checkpoints.close()
        stop.close()
    if done < num_steps:
        if first_process:
            print(f"Stopped by SIGTERM after step {done}, which is saved; the same command continues", flush=True)
        return None
    host_state = sharding.to_host(state)
    if first_process:
        task.export(host_state, workdir / "pretrained")
        print(f"Done: {workdir}/pretrained", flush=True)
    multihost_utils.sync_global_devices("end")  # the others wait for the export, however long it takes
    return host_state


def check_finite(state: Any, step: int, limit: int) -> None:
    """Raises FloatingPointError if `limit` steps in a row were skipped, which changed nothing; see `Task.step`."""
    counts = jax.device_get(state["nonfinite"])
    if counts["longest"] >= limit:
        raise FloatingPointError(
            f"{counts['longest']} steps in a row, of the {step} until now, gave a loss or gradient norm that is not finite: "
            "stopped. They changed nothing, and the newest checkpoint is from before. Try a lower learning rate, or "
            "--config.compute_dtype=float32; look for broken data; or allow more of them by --config.max_nonfinite_steps"
        )


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
