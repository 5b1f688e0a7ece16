"""Evaluates a grid of sampling settings. Keeps finished points in a JSON file and draws them."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from titok_jax.evaluation import scores
from titok_jax.evaluation.jobs import versions, write_json
from titok_jax.evaluation.runs import Evaluation
from titok_jax.inference.arguments import sampling_settings
from titok_jax.inference.many import balanced_labels
from titok_jax.models.generator import GeneratorConfig, SamplingConfig
from titok_jax.pictures import plots
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import as_path


def run_sweep(run: Evaluation, grid: Sequence[SamplingConfig]) -> None:
    """Evaluates each setting of a grid, except those already in the JSON file, and writes the JSON file and the plot."""
    args, path = run.args, as_path(run.args.json)
    replace_picture = args.overwrite or path.exists()
    points = _finished_points(run) if path.exists() else []
    missing = [settings for settings in grid if all(point["sampling"] != dataclasses.asdict(settings) for point in points)]
    if missing:
        reference, pair = run.reference(), run.load_pair()
        generator = pair[1].config
        labels = balanced_labels(range(generator.num_classes), args.num)
    for settings in missing:
        name = "_".join(f"{key.replace('_', '-')}-{getattr(settings, key):g}" for key in ("guidance_scale", "temperature"))
        job = run.generate(name, pair, labels, settings)
        if job.first:
            figures = scores.generation_figures(job, reference, run.prefix)
            figures |= scores.codebook_figures(job, generator.codebook_size)
            ours = args.overwrite or bool(points)  # after the first point the file is that of this sweep
            points.append({"sampling": dataclasses.asdict(settings), "metrics": figures, "versions": versions()})
            points.sort(key=lambda point: (point["sampling"]["temperature"], point["sampling"]["guidance_scale"]))
            write_json(args.json, {**run.result, "reference": reference.about, "points": points}, replace=ours)
            job.remove()
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
    if run.work.first:
        with new_file(path.with_suffix(".png"), replace=replace_picture) as partial:
            sweep_plot(points, f"{args.model}, {args.num:,} samples").savefig(partial, format="png")
        print(f"wrote {path} and {path.with_suffix('.png')}")


def _finished_points(run: Evaluation) -> list[dict[str, Any]]:
    """Returns the finished points of a sweep that was begun with the same settings.

    Raises:
      ValueError: if the settings differ or the file is not a sweep. With --overwrite, returns no points instead.
    """
    path = run.args.json
    try:
        found = json.loads(as_path(path).read_text(encoding="utf-8"))
        points = found.pop("points")
        known = all({"sampling", "metrics"} <= point.keys() for point in points)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        found, points = {}, None
    keys = [key for key in run.result if key != "versions"]
    different = [f"{k}: {found.get(k)!r} there, {run.result[k]!r} now" for k in keys if found.get(k) != run.result[k]]
    if points is not None and not different:
        return points
    if run.args.overwrite:
        return []
    what = f"is a sweep with other settings ({'; '.join(different)})" if points is not None else "is not a sweep"
    raise ValueError(f"{path} {what}; choose another file or add --overwrite")


def sweep_plot(points: Sequence[dict[str, Any]], title: str) -> Figure:
    """Plots FID over Inception score beside a table. Each temperature has one line; guidance scales name its points.

    Args:
      points: dicts with "sampling" and "metrics", as in the JSON of a sweep.
    """
    names = list(points[0]["metrics"])
    fid, score = (next(n for n in names if n.removeprefix("digits-").startswith(what)) for what in ("FID", "IS"))
    lines: dict[str, list[tuple[float, float]]] = {}
    scales: dict[str, list[str]] = {}
    for point in points:
        settings, figures = point["sampling"], point["metrics"]
        line = f"temperature {settings['temperature']:g}"
        lines.setdefault(line, []).append((figures[score], figures[fid]))
        scales.setdefault(line, []).append(f"{settings['guidance_scale']:g}")
    shown = [n for n in names if "codebook" not in n and n not in ("perplexity", "entropy_bits")]
    table = [["guidance", "temperature", *shown]]
    for point in points:
        settings = point["sampling"]
        table.append(
            [f"{settings['guidance_scale']:g}", f"{settings['temperature']:g}"]
            + [
                f"{point['metrics'][n]:.2f}" if abs(point["metrics"][n]) >= 1 else f"{point['metrics'][n]:.3f}"
                for n in shown
            ]
        )
    title += "; beside the points: guidance scale"
    return plots.sweep(lines, scales, x_label=score, y_label=fid, title=title, table=table)


def settings_grid(args: argparse.Namespace, model: GeneratorConfig) -> list[SamplingConfig]:
    """The sampling settings of every point in the grid."""
    values = [getattr(args, name) or [None] for name in ("guidance_scale", "temperature")]
    points = []
    for guidance_scale, temperature in itertools.product(*values):
        point = argparse.Namespace(**vars(args) | {"guidance_scale": guidance_scale, "temperature": temperature})
        settings = sampling_settings(point, model)
        if settings not in points:
            points.append(settings)
    return points
