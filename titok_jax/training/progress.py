"""Metrics on held-out examples and preview images during training. Both use the averaged parameters."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from titok_jax.data.loader import Loader, make_eval_loader
from titok_jax.data.transforms import make_eval_transform
from titok_jax.pictures import grids
from titok_jax.runtime import sharding
from titok_jax.runtime.outputs import new_file
from titok_jax.training.log import MetricLog
from titok_jax.training.settings import Settings, check_batch, open_source, read_ahead
from titok_jax.training.tasks.base import Task


def check_classes(source: Any, held_out: Any) -> None:
    """Raises ValueError if both sources name their classes and these differ: the same label would mean two classes."""
    if source.class_names and held_out.class_names and source.class_names != held_out.class_names:
        only = sorted(set(source.class_names) ^ set(held_out.class_names))
        raise ValueError(
            f"config.data.eval_source has {len(held_out.class_names)} classes and config.data.source "
            f"{len(source.class_names)}, so the labels do not mean the same; in one of them only: {', '.join(only[:5])}"
        )


def held_out_source(settings: Settings) -> Any:
    """The held-out examples, `config.data.eval_source`. None if only the source's name is set."""
    spec = settings.data.eval_source
    given = spec and any(spec[option] for option in spec if option != "name")
    return open_source(spec, settings, "--config.data.eval_source") if given else None


class Evaluation:
    """Mean metrics of the averaged parameters over held-out examples. Falsy if there is nothing to evaluate.

    Attributes:
      source: the held-out examples; None if there are none.
    """

    def __init__(self, settings: Settings, task: Task, mesh: Mesh):
        self.source = held_out_source(settings) if settings.eval_every and task.measures else None
        if self.source is None:
            return
        self._mesh, self._num_threads = mesh, settings.data.num_threads
        self._read_ahead = read_ahead(settings, settings.data.eval_source)
        self._crop = make_eval_transform(settings.data.eval_transform) if settings.data.eval_transform else None
        self._key = jax.random.fold_in(jax.random.key(settings.seed), 3)
        # A batch is as large as one accumulation part of a training batch, so it fits in memory if training does.
        self._batch_size = settings.data.batch_size // settings.gradient_accumulation
        self._num_batches = -(-settings.eval_images // self._batch_size)
        with self._loader() as loader:
            check_batch(next(loader), settings)

        def sums(state, frozen, batch, key):
            values = task.evaluate(state, frozen, batch, key)
            return {name: jnp.sum(jnp.where(batch["valid"], v, 0.0)) for name, v in values.items()}, batch["valid"].sum()

        self._sums = sharding.jit_on(mesh, sums, out_shardings=sharding.replicated(mesh))

    def __bool__(self) -> bool:
        return self.source is not None

    def _loader(self) -> Loader:
        return make_eval_loader(
            self.source,
            global_batch_size=self._batch_size,
            transform=self._crop,
            num_threads=self._num_threads,
            read_ahead=self._read_ahead,
            **sharding.batch_part(self._mesh),
        )

    def measure(self, state: Any, frozen: Any) -> dict[str, float]:
        """Returns {metric: mean} over `eval_images` examples, rounded up to full batches. Every call uses the same examples
        and random draws."""
        total, count = {}, 0
        with self._loader() as loader:
            for i, batch in enumerate(itertools.islice(loader, self._num_batches)):
                arrays = sharding.put_batch(self._mesh, batch)
                sums, rows = jax.device_get(self._sums(state, frozen, arrays, jax.random.fold_in(self._key, i)))
                total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
                count += int(rows)
        return {name: value / count for name, value in total.items()}


class Previews:
    """Preview images made with the averaged parameters. They go to workdir/previews and to TensorBoard."""

    def __init__(self, settings: Settings, task: Task, mesh: Mesh):
        self._columns = settings.preview_columns
        self._key = jax.random.fold_in(jax.random.key(settings.seed), 2)
        self._fn = None
        if not task.shows_pictures:
            return
        self._fn = sharding.jit_on(mesh, task.preview, out_shardings=sharding.replicated(mesh))
        rows = np.lcm(sharding.batch_devices(mesh), self._columns)
        size = int(-(-settings.preview_images // rows) * rows)
        crop = make_eval_transform(settings.data.eval_transform) if settings.data.eval_transform else None
        source = held_out_source(settings) or open_source(settings.data.source, settings, replace=True)
        part = sharding.batch_part(mesh)
        with make_eval_loader(source, global_batch_size=size, transform=crop, num_threads=0, **part) as loader:
            batch = next(loader)
        check_batch(batch, settings)
        self._batch = sharding.put_batch(mesh, batch)

    def draw(self, state: Any, frozen: Any, step: int, log: MetricLog) -> None:
        """Draws and writes the preview images of a state."""
        if self._fn is None:
            return
        images = jax.device_get(self._fn(state, frozen, self._batch, self._key))
        if jax.process_index():
            return
        if "reconstruction" in images:
            images["difference"] = np.abs(images["image"] - images["reconstruction"])
        folder = log.folder / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        # The rows alternate between the kinds, so each reconstruction is below its original.
        count = len(next(iter(images.values())))
        chunks = [
            (name, kind[i : i + self._columns]) for i in range(0, count, self._columns) for name, kind in images.items()
        ]
        picture = grids.grid(
            np.concatenate([chunk for _, chunk in chunks]),
            columns=self._columns,
            row_labels=[name for name, _ in chunks],
            title=f"step {step}",
        )
        with new_file(folder / f"{step:07d}.png", replace=True) as partial:
            picture.save(partial)
        log.picture(step, "preview", np.asarray(picture))


class CodebookWatch:
    """Notices a collapsed codebook: after the warm-up, `LINES` log lines in a row whose perplexity is below `SHARE` of the
    codes that a batch can use. It is said once."""

    LINES, SHARE, ALIKE = 5, 0.02, 0.05

    def __init__(self, settings: Settings):
        self._settings, self._low, self._said = settings, 0, settings.task in ("stage2", "generator")

    def warning(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """What to print after a log line; None if there is nothing to say.

        Args:
          step: number of updates made.
          metrics: those of the line, with the values of `losses.codebook_metrics`.
        """
        settings = self._settings
        if self._said or "codebook_perplexity" not in metrics or step <= settings.optimizer.warmup_steps:
            return None
        codes, perplexity = settings.model.codebook_size, float(metrics["codebook_perplexity"])
        usable = min(codes, settings.data.batch_size * int(np.prod(settings.model.token_shape)))
        self._low = self._low + 1 if perplexity < self.SHARE * usable else 0
        if self._low < self.LINES:
            return None
        self._said = True
        return (
            f"WARNING: the codebook has collapsed: its perplexity has stayed below {100 * self.SHARE:g} % of {usable:,} "
            f"codes for {self.LINES} lines, and is {perplexity:.1f}; {self._remedy(float(metrics['tokens_differ']))}"
        )

    def _remedy(self, differ: float) -> str:
        if self._settings.task == "maskgit_vqgan":
            return "a higher --config.loss.entropy_weight spreads the codes"
        lower = "a lower --config.loss.quantizer_weight (a tenth) lets the latents move apart"
        if differ < self.ALIKE:
            return (
                f"only {100 * differ:.1f} % of the tokens differ between images, so the decoder does not use them. "
                f"--config.restart_codes=True cannot help: it moves codes onto latents that are alike. {lower}"
            )
        if self._settings.restart_codes:
            return f"restart_codes is on and does not suffice; {lower}"
        return f"--config.restart_codes=True moves unused codes onto latents of the batch, and {lower}"
