"""The training loop, in order of execution: prepare, begin or resume, run the steps, export."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from titok_jax.data.files import find_files
from titok_jax.data.loader import Loader, make_loader
from titok_jax.data.token_shards import MANIFEST, read_manifest
from titok_jax.data.transforms import make_train_transform
from titok_jax.runtime import placement, sharding
from titok_jax.runtime.locks import BucketLock, lock_run
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import as_path, is_remote
from titok_jax.training import same_run
from titok_jax.training.build import build_task, check_capacity
from titok_jax.training.checkpoint import Checkpoints
from titok_jax.training.compiling import compile_step, compiler
from titok_jax.training.flops import work
from titok_jax.training.log import MetricLog, TextLog
from titok_jax.training.log_files import LogFolder
from titok_jax.training.profiling import Profile
from titok_jax.training.progress import CodebookWatch, Evaluation, Previews, check_classes
from titok_jax.training.replaced import ReplacedImages
from titok_jax.training.settings import Settings, check_batch, open_source, read_ahead
from titok_jax.training.stopping import StopSignal, check_finite
from titok_jax.training.tasks.base import State, Task, jit_step
from titok_jax.training.telemetry import RunTime, Telemetry
from titok_jax.training.watchdog import COMPILE, LONG, Watchdog
from titok_jax.weights.pretrained import weights_sha256


def train(
    settings: Settings,
    workdir: epath.PathLike,
    *,
    accept_changes: bool = False,
    profile: tuple[int, int] | None = None,
) -> State | None:
    """Runs a training to its end. Resumes from the newest checkpoint if there is one.

    Args:
      accept_changes: resume also if the configuration, the data or the frozen networks are not those of the checkpoint.
      profile: (start, stop), the steps to trace, see `Profile`.

    Returns:
      The final state, or None if SIGTERM stopped the run. It is in host memory if there is one process. With several it
      stays on the devices, as sharded arrays, since no process need be able to hold it whole.
    """
    if profile and profile[0] >= settings.num_steps:
        raise ValueError(f"--profile {profile[0]}:{profile[1]} is after the end: this run has {settings.num_steps:,} steps")
    with contextlib.ExitStack() as held:
        text = TextLog()
        watchdog = held.enter_context(Watchdog(settings.watchdog_minutes))
        if jax.process_index() == 0:
            held.enter_context(contextlib.redirect_stdout(text))
        run = prepare(settings, workdir)
        started = begin(run, held, accept_changes=accept_changes)
        folder = None
        if run.first_process:
            write_config(run)
            folder = held.enter_context(LogFolder(run.workdir))
            text.open(folder)
            watchdog.note = lambda found: (text.note(found), folder.copy())
        state, done = run_steps(run, started, folder, watchdog, Profile(profile, folder))
        if done < settings.num_steps:
            if run.first_process:
                print(f"Stopped by SIGTERM after step {done}, which is saved; the same command continues", flush=True)
            return None
        watchdog.at("the export", LONG)
        return export(run, state)


# ---------------------------------------------------------------------------------------------------------------------
# Prepare: errors in the settings are raised here, before anything is written


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a training.

    Attributes:
      part: loader arguments that select this process's part of each batch.
      stored: the configuration, a hash of the frozen networks, and what the data are. Checkpoints store it; it is compared
        on resume.
      evaluation, previews: None if switched off.
      began: when this start of it began, as `time.time`.
    """

    settings: Settings
    workdir: epath.Path
    mesh: Mesh
    source: Any
    task: Task
    part: dict[str, Any]
    stored: dict[str, Any]
    evaluation: Evaluation | None
    previews: Previews | None
    began: float

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
            read_ahead=read_ahead(self.settings, data.source),
            **self.part,
        )


def prepare(settings: Settings, workdir: epath.PathLike) -> Run:
    """Prepares a training. Reads the frozen networks and one batch, and writes nothing.

    Raises:
      ValueError, OSError: if the settings do not fit the devices, the data or the networks.
    """
    began = time.time()
    workdir = epath.Path(as_path(workdir)).expanduser()
    if not is_remote(workdir):
        workdir = workdir.resolve()  # would turn gs:// into a local path
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file, expected a folder")
    mesh = sharding.make_mesh(**settings.mesh.sizes)
    sharding.check_batch_size(mesh, settings.data.batch_size, settings.gradient_accumulation)
    # Open the data before building the task, because the task may download networks.
    source = open_source(settings.data.source, settings, "--config.data.source", replace=True)
    check_tokens(settings)
    task = build_task(settings)
    check_capacity(settings, task, mesh)
    contents = source.contents()
    same_run.check_same_data(contents)
    # A recipe of one's own may lack this field. Without it, a checkpoint is older than the field: see LATER_FIELDS.
    dtype = {"discriminator_dtype": settings.discriminator_dtype} if settings.discriminator else {}
    run = Run(
        settings=settings,
        workdir=workdir,
        mesh=mesh,
        source=source,
        task=task,
        part=sharding.batch_part(mesh),
        stored={
            **dtype,
            **settings.given,
            same_run.FROZEN: same_run.fingerprint(task.frozen),
            same_run.CLASSES: source.class_names,
            same_run.CONTENTS: contents,
        },
        evaluation=None,
        previews=None,
        began=began,
    )
    with run.batches(0, num_workers=0, num_threads=0) as loader:
        check_batch(next(loader), settings)
    run = dataclasses.replace(
        run,
        evaluation=Evaluation(settings, task, mesh) if settings.eval_every else None,
        previews=Previews(settings, task, mesh) if settings.preview_every else None,
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
        made_by = read_manifest(as_path(manifest))
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
        print(f"Classes: {same_run.class_list(run.source.class_names)}", flush=True)
    for line in settings.scaled:
        print(line, flush=True)
    for line in off_recipe(settings.given, settings.recipe):
        print(f"WARNING: {line}", flush=True)


def off_recipe(config: Mapping[str, Any], recipe: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields one line for each value that differs from the recipe's."""
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            yield from off_recipe(config[name], value, f"{prefix}{name}.")
        elif config[name] != value:
            yield f"{prefix}{name} is {config[name]}, the recipe has {value}"


# ---------------------------------------------------------------------------------------------------------------------
# Begin or resume


@dataclasses.dataclass(frozen=True)
class Started:
    """A training whose state is on the devices.

    Attributes:
      step: the first step to run.
      stored: what checkpoints store: `Run.stored`, and the changes that were accepted on the way.
      sums: of metrics, see `Means`.
      state, frozen: sharded arrays; shardings: a NamedSharding for each of the state.
      lock: the lock of a workdir in a bucket; None on a local disk.
    """

    step: int
    stored: dict[str, Any]
    sums: Mapping[str, list[float]]
    state: State
    frozen: Any
    shardings: Any
    checkpoints: Checkpoints
    lock: BucketLock | None


def begin(run: Run, held: contextlib.ExitStack, *, accept_changes: bool = False) -> Started:
    """Locks the workdir until `held` is closed. Restores the newest checkpoint or initialises the state, sharded.

    Raises:
      ValueError: the checkpoint is of a run with another configuration, data or frozen networks, and this is not accepted;
        or the processes have read different weights.
    """
    key = jax.random.key(run.settings.seed)
    abstract = jax.eval_shape(run.task.begin, key)
    shardings = sharding.state_shardings(run.mesh, abstract, shard_optimizer=run.settings.mesh.shard_optimizer)
    frozen = placement.put(run.task.frozen, sharding.replicated(run.mesh), same_run.frozen_fields(run.settings))
    # Here, because nothing is written yet.
    placement.check_same(run.task.start, run.mesh, f"config.init_from ({run.settings.init_from})")
    several = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    lock = held.enter_context(lock_run(run.workdir, what="workdir", **several))
    held.enter_context(compiler(run.mesh, run.settings.compile_effort, run.workdir / "compiled"))
    checkpoints = Checkpoints(run.workdir / "checkpoints", keep=run.settings.keep_checkpoints)
    stored, sums = run.stored, {}

    def check(step: int, found: Mapping[str, Any]) -> None:
        nonlocal stored, sums
        lines = same_run.changes(found, run.stored, run.settings)
        same_run.check_accepted(lines, step, run.workdir, accept=accept_changes)
        accepted = [*found.get(same_run.CHANGES, []), *([{"step": step, "changes": lines}] if lines else [])]
        stored = {**run.stored, same_run.CHANGES: accepted}
        sums = found.get(same_run.SUMS, {})

    restored = checkpoints.restore_newest(abstract, shardings, check)
    if restored is None:
        given = placement.put_checked(run.task.start, sharding.state_shardings(run.mesh, run.task.start))
        step, state = 0, jax.jit(run.task.begin, out_shardings=shardings)(jax.random.fold_in(key, 0), given)
    else:
        step, state = restored
        if run.first_process:
            print(f"Continuing at step {step} of {run.settings.num_steps} from {run.workdir}/checkpoints", flush=True)
    return Started(step, stored, sums, state, frozen, shardings, checkpoints, lock)


def write_config(run: Run) -> None:
    """Writes the configuration to `workdir/config.json`, in place of that of an earlier start. Leaves another file there."""
    path = run.workdir / "config.json"
    if path.exists():
        with contextlib.suppress(ValueError):
            found = json.loads(path.read_text())
            if not (isinstance(found, Mapping) and found.keys() >= {"task", "model", "data"}):
                print(f"WARNING: {path} is of another origin, so the configuration is in the checkpoints only", flush=True)
                return
    with new_file(path, replace=True) as partial:
        partial.write_text(json.dumps(run.settings.given, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def run_steps(
    run: Run, started: Started, folder: LogFolder | None, watchdog: Watchdog, profile: Profile
) -> tuple[State, int]:
    """Runs the remaining steps. Returns (state, number of steps done), which is less than `num_steps` after SIGTERM."""
    settings, start, num_steps, state = run.settings, started.step, run.settings.num_steps, started.state
    step_fn = jit_step(run.task, run.mesh, started.shardings)
    step_key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    changed = [change["step"] for change in started.stored.get(same_run.CHANGES, ())]
    log = MetricLog(folder, first_step=start, num_steps=num_steps, changed=changed)
    telemetry = Telemetry(work(settings, run.mesh), start, RunTime(log.former, run.began), started.sums)
    loader = run.batches(start, num_workers=settings.data.num_workers, num_threads=settings.data.num_threads)
    replaced = ReplacedImages(run.source, run.part["blocks"][0])
    stop, done, codebook = StopSignal(), start, CodebookWatch(settings)
    with contextlib.ExitStack() as closing:  # closes all of them, even if one cannot write what is left
        # From last to first: a machine that is taken away leaves half a minute to write the checkpoint.
        for opened in (stop, loader, log, profile, started.checkpoints):
            closing.callback(opened.close)
        closing.callback(watchdog.at, "the last checkpoint and the end of the log", LONG)
        watchdog.at(f"the evaluation and the previews after step {start}", LONG)
        look(run, log, telemetry, state, started.frozen, start)  # in case the run was stopped right after this checkpoint
        for step in range(start, num_steps):
            first = step == start  # it includes compilation
            watchdog.at(f"the batch of step {step + 1}, which the data source has not given", COMPILE if first else 1)
            with telemetry.waiting():
                batch = next(loader)
            watchdog.at(f"step {step + 1}", COMPILE if first else 1)
            with sharding.on_mesh(run.mesh), profile.step(step):
                inputs = state, started.frozen, sharding.put_batch(run.mesh, batch), step_key
                if first:
                    step_fn = compile_step(step_fn, *inputs)
                state, metrics = step_fn(*inputs)
            done = step + 1
            telemetry.step(metrics, first=first)
            if profile.ends_after(done):
                telemetry.wait()
                profile.close()
            log_now = due(settings.log_every, done, num_steps)
            if log_now:
                values, figures = telemetry.line(done)
                log.write(done, values, shown=run.task.loss, figures=figures, slowest=telemetry.slowest(figures))
                if run.first_process and (warning := codebook.warning(done, values)):
                    print(warning, flush=True)
            stopping = stop.agreed(done)
            save_now = due(settings.checkpoint_every, done, num_steps) or stopping
            if log_now or save_now:
                check_finite(state, done, settings.max_nonfinite_steps)
                replaced.check(loader.take_replaced(), (done - start) * settings.data.batch_size)
            if save_now:
                watchdog.at(f"the checkpoint of step {done}", LONG)
                with telemetry.spending("checkpoint"):
                    if started.lock:
                        started.lock.check()
                    started.checkpoints.save(done, state, {**started.stored, same_run.SUMS: telemetry.stored()})
            if stopping and done < num_steps:
                break
            watchdog.at(f"the evaluation and the previews after step {done}", LONG)
            look(run, log, telemetry, state, started.frozen, done)
        if run.first_process and done > start:
            print(telemetry.summary(), flush=True)
    return state, done


def due(every: int, step: int, num_steps: int) -> bool:
    """Whether something that happens every `every` steps and after the last step is due after `step`."""
    return step > 0 and (step % every == 0 or step == num_steps)


def look(run: Run, log: MetricLog, telemetry: Telemetry, state: State, frozen: Any, step: int) -> None:
    """Runs the evaluation and draws the previews and curves that are due after `step`. The speed excludes this time."""
    settings, last = run.settings, run.settings.num_steps
    evaluate = run.evaluation and due(settings.eval_every, step, last)
    preview = run.previews and due(settings.preview_every, step, last)
    if not (evaluate or preview or step == last):
        return
    with telemetry.spending("evaluation"):
        if evaluate:
            log.write_evaluation(step, run.evaluation.measure(state, frozen))
        if preview:
            run.previews.draw(state, frozen, step, log)
        log.draw_curves()


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export(run: Run, state: State) -> State:
    """Writes workdir/pretrained, one parameter at a time, from the first process. Returns the state as `train` does."""
    averages = placement.gathered(state["ema"])
    if run.first_process:
        run.task.export({**state, "ema": averages}, run.workdir / "pretrained")
        print(f"Done: {run.workdir}/pretrained", flush=True)
    else:
        placement.take_part(averages)
    multihost_utils.sync_global_devices("end")  # the other processes wait for the export
    return jax.device_get(state) if jax.process_count() == 1 else state
