"""The training loop, in order of execution: prepare, begin or resume, run the steps, export."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from titok_jax.data.files import find_files
from titok_jax.data.loader import Loader, make_loader
from titok_jax.data.token_shards import MANIFEST
from titok_jax.data.transforms import make_train_transform
from titok_jax.runtime import sharding
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import as_path, is_remote
from titok_jax.training.build import build_task
from titok_jax.training.checkpoint import Checkpoints, check_config
from titok_jax.training.lock import BucketLock, lock_workdir
from titok_jax.training.log import MetricLog, TextLog
from titok_jax.training.progress import Evaluation, Previews, check_classes
from titok_jax.training.settings import Settings, check_batch, open_source
from titok_jax.training.tasks.base import State, Task, jit_step
from titok_jax.weights.pretrained import weights_sha256

# These fields may change when a run is resumed: they concern the hardware, and what the run logs and keeps. They affect only
# the rounding, and gradient_accumulation also affects the dropout draws. All other fields determine the result.
FREE_FIELDS = (
    "mesh",
    "remat",
    "gradient_accumulation",
    "log_every",
    "log_grad_norms",
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
    "model.sampling",  # of previews, and the default of the exported model
)

# Fields added to the recipes later, each with the value that was in effect before, given the configuration of such a run.
# Older checkpoints can then be resumed, with a flag for each field whose value today is another.
LATER_FIELDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "token_precision": lambda then: "default",
    "discriminator_dtype": lambda then: then.get("compute_dtype"),  # a discriminator computed in the dtype of its model
    "data.transform.random_crop": lambda then: True,
    "data.transform.random_flip": lambda then: True,
    "data.source.image_key": lambda then: "",
    "data.source.label_key": lambda then: "",
    "data.source.skip_damaged": lambda then: False,
}


def train(settings: Settings, workdir: epath.PathLike) -> State | None:
    """Runs a training to its end. Resumes from the newest checkpoint if there is one.

    Returns:
      The final state in host memory, or None if SIGTERM stopped the run.
    """
    with contextlib.ExitStack() as held:
        text = TextLog()
        if jax.process_index() == 0:
            held.callback(text.copy)
            held.enter_context(contextlib.redirect_stdout(text))
        run = prepare(settings, workdir)
        started = begin(run, held)
        if run.first_process:
            write_config(run)
            text.open(run.workdir)
        state, done = run_steps(run, started)
        if done < settings.num_steps:
            if run.first_process:
                print(f"Stopped by SIGTERM after step {done}, which is saved; the same command continues", flush=True)
            return None
        return export(run, state)


# ---------------------------------------------------------------------------------------------------------------------
# Prepare: errors in the settings are raised here, before anything is written


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a training.

    Attributes:
      part: loader arguments that select this process's part of each batch.
      stored: the configuration and a hash of the frozen networks. Checkpoints store it; it is compared on resume.
      evaluation, previews: None if switched off.
    """

    settings: Settings
    workdir: epath.Path
    mesh: Mesh
    source: Any
    task: Task
    part: dict[str, int]
    stored: dict[str, Any]
    evaluation: Evaluation | None
    previews: Previews | None

    @property
    def first_process(self) -> bool:
        return jax.process_index() == 0

    def batches(self, start_step: int, *, num_workers: int, num_threads: int) -> Loader:
        """A loader of this process's rows of the training batches, beginning at `start_step`."""
        data = self.settings.data
        return make_loader(
            self.source,
            seed=self.settings.seed,
            global_batch_size=data.batch_size,
            start_step=start_step,
            train_transform=make_train_transform(data.transform) if data.transform else None,
            num_workers=num_workers,
            num_threads=num_threads,
            **self.part,
        )


def prepare(settings: Settings, workdir: epath.PathLike) -> Run:
    """Prepares a training. Reads the frozen networks and one batch, and writes nothing.

    Raises:
      ValueError, OSError: if the settings do not fit the devices, the data or the networks.
    """
    workdir = epath.Path(as_path(workdir)).expanduser()
    if not is_remote(workdir):
        workdir = workdir.resolve()  # would turn gs:// into a local path
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file, expected a folder")
    mesh = sharding.make_mesh(**dataclasses.asdict(settings.mesh))
    sharding.check_batch_size(mesh, settings.data.batch_size, settings.gradient_accumulation)
    # Open the data before building the task, because the task may download networks.
    source = open_source(settings.data.source, settings, "--config.data.source")
    check_tokens(settings)
    task = build_task(settings)
    # A recipe of one's own may lack this field. Without it, a checkpoint is older than the field: see LATER_FIELDS.
    dtype = {"discriminator_dtype": settings.discriminator_dtype} if settings.discriminator else {}
    run = Run(
        settings=settings,
        workdir=workdir,
        mesh=mesh,
        source=source,
        task=task,
        part=sharding.batch_part(mesh),
        stored={**dtype, **settings.given, "frozen_weights": fingerprint(task.frozen), "class_names": source.class_names},
        evaluation=None,
        previews=None,
    )
    with run.batches(0, num_workers=0, num_threads=0) as loader:
        check_batch(next(loader), settings)
    run = dataclasses.replace(
        run,
        evaluation=Evaluation(settings, task, mesh) if settings.eval_every else None,
        previews=Previews(settings, task, mesh, workdir) if settings.preview_every else None,
    )
    if run.evaluation:
        check_classes(source, run.evaluation.source)
    if run.first_process:
        describe(run)
    return run


def check_tokens(settings: Settings) -> None:
    """Raises ValueError if the token records were made by another tokenizer than the one exported with the generator.

    `pretokenize.json` beside the records has the SHA-256 of its weights. Records of other programs have no such file.
    """
    if settings.data.source.get("name") != "tokens" or not settings.tokenizer:
        return
    files = find_files(settings.data.source["paths"], "token files")
    manifests = sorted({str(as_path(path).parent / MANIFEST) for path in files})
    manifests = [manifest for manifest in manifests if as_path(manifest).exists()]
    weights = weights_sha256(None, settings.tokenizer)["tokenizer"] if manifests else ""
    for manifest in manifests:
        made_by = json.loads(as_path(manifest).read_text())
        if made_by.get("weights", weights) != weights:
            raise ValueError(
                f"{manifest}: the tokens were made by {made_by.get('model')} (SHA-256 {made_by['weights'][:12]}...), but "
                f"config.tokenizer is {settings.tokenizer} (SHA-256 {weights[:12]}...): name the tokenizer that made them"
            )


def describe(run: Run) -> None:
    """Prints the configuration, the networks, the batch and the mesh."""
    settings, mesh = run.settings, run.mesh
    print(f"Configuration:\n{settings.text}")
    for name, network in run.task.networks.items():
        print(f"{name}:\n{parameter_overview.get_parameter_overview(network.abstract, include_stats=False)}")
    batch, steps, num_examples = settings.data.batch_size, settings.num_steps, len(run.source)
    judged = f", discriminator in {settings.discriminator_dtype}" if settings.discriminator else ""
    print(
        f"Global batch {batch} x {steps:,} steps = {batch * steps:,} examples, {batch * steps / num_examples:.1f} epochs of "
        f"{num_examples:,}\nMesh {dict(mesh.shape)} on {mesh.devices.size} {jax.default_backend()} device(s), "
        f"{jax.process_count()} process(es), compute in {settings.compute_dtype}{judged}",
        flush=True,
    )
    if run.source.class_names:
        print(f"Classes: {class_list(run.source.class_names)}", flush=True)
    for line in off_recipe(settings.given, settings.recipe):
        print(f"WARNING: {line}", flush=True)


def class_list(names: Sequence[str], shown: int = 12) -> str:
    """ "0 cat, 1 dog, ..., 9 fish"."""
    items = [f"{number} {name}" for number, name in enumerate(names)]
    return ", ".join(items if len(items) <= shown else [*items[: shown - 1], "...", items[-1]])


def off_recipe(config: Mapping[str, Any], recipe: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields one line for each value that differs from the recipe's."""
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            yield from off_recipe(config[name], value, f"{prefix}{name}.")
        elif config[name] != value:
            yield f"{prefix}{name} is {config[name]}, the recipe has {value}"


def fingerprint(params: Any) -> str:
    """SHA-256 of a tree of arrays: its paths, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Begin or resume


@dataclasses.dataclass(frozen=True)
class Started:
    """A training whose state is on the devices.

    Attributes:
      step: the first step to run.
      state, frozen: sharded arrays; shardings, frozen_shardings: their trees of NamedSharding.
      lock: the lock of a workdir in a bucket; None on a local disk.
    """

    step: int
    state: State
    frozen: Any
    shardings: Any
    frozen_shardings: Any
    checkpoints: Checkpoints
    lock: BucketLock | None


def begin(run: Run, held: contextlib.ExitStack) -> Started:
    """Locks the workdir until `held` is closed. Restores the newest checkpoint or initialises the state, sharded."""
    key = jax.random.key(run.settings.seed)
    abstract = jax.eval_shape(run.task.begin, key)
    shardings = sharding.state_shardings(run.mesh, abstract)
    frozen_shardings = sharding.state_shardings(run.mesh, run.task.frozen)
    frozen = jax.device_put(run.task.frozen, frozen_shardings)
    run.workdir.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context(lock_workdir(run.workdir))
    checkpoints = Checkpoints(run.workdir / "checkpoints", keep=run.settings.keep_checkpoints)
    restored = checkpoints.restore_newest(abstract, shardings, lambda found: check_same_run(found, run))
    if restored is None:
        given = jax.device_put(run.task.start, sharding.state_shardings(run.mesh, run.task.start))
        step, state = 0, jax.jit(run.task.begin, out_shardings=shardings)(jax.random.fold_in(key, 0), given)
    else:
        step, state = restored
        if run.first_process:
            print(f"Continuing at step {step} of {run.settings.num_steps} from {run.workdir}/checkpoints", flush=True)
    return Started(step, state, frozen, shardings, frozen_shardings, checkpoints, lock)


def write_config(run: Run) -> None:
    """Writes the configuration to `workdir/config.json`, in place of that of an earlier start. Leaves another file there."""
    path = run.workdir / "config.json"
    if path.exists():
        with contextlib.suppress(ValueError):
            found = json.loads(path.read_text())
            if not (isinstance(found, Mapping) and found.keys() >= {"task", "model", "data"}):
                print(f"WARNING: {path} is of another origin, so the configuration is in the checkpoints only", flush=True)
                return
    with new_file(path) as partial:
        partial.write_text(json.dumps(run.settings.given, indent=2) + "\n")


def renamed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration in which the augmentation `center_crop_flip` has the name and the fields that it has today."""
    transform = config.get("data", {}).get("transform") or {}
    if transform.get("name") != "center_crop_flip":
        return config
    others = {name: value for name, value in transform.items() if name not in ("name", "size")}
    sizes = dict.fromkeys(("resize_shorter_edge", "crop_size"), transform.get("size"))
    today = {"name": "random_resize_crop_flip", **sizes, "random_crop": False, "random_flip": True, **others}
    return {**config, "data": {**config["data"], "transform": today}}


def check_same_run(found: Mapping[str, Any], run: Run) -> None:
    """Raises ValueError if a checkpoint's configuration or frozen networks differ from those of this run."""
    now = run.stored
    then, today = ({**renamed(stored), "frozen_weights": "", "class_names": ""} for stored in (found, now))
    names = [list(stored.get("class_names", now.get("class_names", ()))) for stored in (found, now)]
    if names[0] != names[1]:
        raise ValueError(
            f"the classes of config.data.source are {class_list(names[1]) or 'not named'}; the run in {run.workdir} began "
            f"with {class_list(names[0]) or 'none'}: labels would mean other classes"
        )
    later = {name: former(found) for name, former in LATER_FIELDS.items()}
    check_config(then, today, FREE_FIELDS, str(run.workdir), later=later)
    if found.get("frozen_weights") != now["frozen_weights"]:
        named = {n: getattr(run.settings, n) for n in ("tokenizer", "vqgan", "perceptual_weights")}
        networks = " or ".join(f"config.{name} ({source})" for name, source in named.items() if source)
        then, today = str(found.get("frozen_weights"))[:12], now["frozen_weights"][:12]
        raise ValueError(
            f"the frozen weights of {networks} are not those that the run in "
            f"{run.workdir} began with (SHA-256 {then}... then, {today}... now): "
            "put the former back, or use another workdir"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def run_steps(run: Run, started: Started) -> tuple[State, int]:
    """Runs the remaining steps. Returns (state, number of steps done), which is less than `num_steps` after SIGTERM."""
    settings, start, num_steps, state = run.settings, started.step, run.settings.num_steps, started.state
    step_fn = jit_step(run.task, run.mesh, started.shardings, started.frozen_shardings)
    step_key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    log = MetricLog(
        run.workdir,
        first_step=start,
        num_steps=num_steps,
        batch_size=settings.data.batch_size,
        active=run.first_process,
    )
    loader = run.batches(start, num_workers=settings.data.num_workers, num_threads=settings.data.num_threads)
    stop, done = StopSignal(), start
    try:
        look(run, log, state, started.frozen, start)  # in case the run was stopped right after writing this checkpoint
        for step in range(start, num_steps):
            began = time.perf_counter()
            batch = next(loader)
            log.waited(time.perf_counter() - began)
            with sharding.on_mesh(run.mesh):
                state, metrics = step_fn(state, started.frozen, sharding.put_batch(run.mesh, batch), step_key)
            done = step + 1
            if step == start:  # the first step includes compilation
                jax.block_until_ready(metrics)
                log.restart_clock()
            log_now = due(settings.log_every, done, num_steps)
            if log_now:
                log.write(done, jax.device_get(metrics), shown=run.task.loss)
            stopping = stop.agreed(done)
            save_now = due(settings.checkpoint_every, done, num_steps) or stopping
            if log_now or save_now:
                check_finite(state, done, settings.max_nonfinite_steps)
            if save_now:
                if started.lock:
                    started.lock.check()
                started.checkpoints.save(done, state, run.stored)
            if stopping and done < num_steps:
                break
            look(run, log, state, started.frozen, done)
    finally:
        loader.close()
        log.close()
        started.checkpoints.close()
        stop.close()
    return state, done


def due(every: int, step: int, num_steps: int) -> bool:
    """Whether something that happens every `every` steps and after the last step is due after `step`."""
    return step > 0 and (step % every == 0 or step == num_steps)


def look(run: Run, log: MetricLog, state: State, frozen: Any, step: int) -> None:
    """Runs the evaluation and draws the previews and curves that are due after `step`. The speed excludes this time."""
    settings, last = run.settings, run.settings.num_steps
    evaluate = run.evaluation and due(settings.eval_every, step, last)
    preview = run.previews and due(settings.preview_every, step, last)
    if not (evaluate or preview or step == last):
        return
    jax.block_until_ready(state)
    with log.paused():
        if evaluate:
            log.write_evaluation(step, run.evaluation.measure(state, frozen))
        if preview:
            run.previews.draw(state, frozen, step, log)
        log.draw_curves()


def check_finite(state: Any, step: int, limit: int) -> None:
    """Raises FloatingPointError if `limit` steps in a row were skipped (see `Task.step`)."""
    counts = jax.device_get(state["nonfinite"])
    if counts["longest"] >= limit:
        raise FloatingPointError(
            f"{counts['longest']} steps in a row, of the {step} until now, gave a loss or gradient norm that is not finite: "
            "stopped. They changed nothing, and the newest checkpoint is from before. Try a lower learning rate, or "
            "--config.compute_dtype=float32; look for broken data; or allow more of them by --config.max_nonfinite_steps"
        )


class StopSignal:
    """Watches for SIGTERM, which a preempted machine receives. The run then writes a checkpoint and ends."""

    def __init__(self):
        self._received = False
        self._former = None
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._former = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self._received = True

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`. With several processes, JAX's preemption service chooses one step for all."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def close(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export(run: Run, state: State) -> State:
    """Writes workdir/pretrained and returns the state in host memory."""
    host_state = sharding.to_host(state)
    if run.first_process:
        run.task.export(host_state, run.workdir / "pretrained")
        print(f"Done: {run.workdir}/pretrained", flush=True)
    multihost_utils.sync_global_devices("end")  # the other processes wait for the export
    return host_state
