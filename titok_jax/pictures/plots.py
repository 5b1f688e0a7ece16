"""Plots numbers with matplotlib: the curves of a training, and a sweep over sampling settings.

The functions return figures. `figure.savefig(file, format="png")` writes one.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

# Colours that people with every kind of colour vision can tell apart (Okabe and Ito, "Color Universal Design", 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_CHANGED = "#6e6e6e"
_DPI = 100
_COLUMNS = 3  # charts per row
_CHART = (4.4, 2.8)  # inches: width and height of a chart with its title and axes
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.75, 0.15, 0.5, 0.35  # inches around the axes of a chart


def training_curves(curves: Mapping[str, Points], changed: Sequence[int] = ()) -> Figure:
    """Draws one chart per name over the training steps, three per row.

    Args:
      curves: name -> its points (step, value), finite, ordered by step.
      changed: steps at which a dashed line says that the run went on with changes.

    Returns:
      A figure with 440 x 280 pixels per chart.

    Raises:
      ValueError: if a curve has no points or a value is not finite.
    """
    rows = math.ceil(len(curves) / _COLUMNS)
    width, height = _CHART
    figure = Figure(figsize=(_COLUMNS * width, rows * height), dpi=_DPI)
    for number, (name, points) in enumerate(curves.items()):
        row, column = divmod(number, _COLUMNS)
        left, bottom = column * width + _LEFT, (rows - 1 - row) * height + _BOTTOM
        size = (width - _LEFT - _RIGHT, height - _BOTTOM - _TOP)
        # Positions are computed here in inches. A layout engine would take longer than all the drawing.
        inches = np.array([left, bottom, *size]) / np.tile(figure.get_size_inches(), 2)
        axes = figure.add_axes(tuple(inches))
        _line(axes, points, COLOURS[0], marked=len(points) == 1)
        for step in changed:
            axes.axvline(step, color=_CHANGED, linewidth=1, linestyle="--")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
    return figure


def sweep(
    lines: Mapping[str, Points],
    names: Mapping[str, Sequence[str]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    table: Sequence[Sequence[str]],
) -> Figure:
    """Draws lines through marked and named points, beside a table of the same points.

    Args:
      lines: name -> its points (x, y), finite, in the order in which the line joins them.
      names: name of a line -> one word beside each of its points.
      table: rows of words, all of the same length. The first row is the header.

    Raises:
      ValueError: if a line has no points or a value is not finite.
    """
    widths = np.array([0.3 + 0.075 * max(map(len, column)) for column in zip(*table, strict=True)])  # inches
    size = (7.2 + widths.sum(), max(5.4, 0.28 * len(table) + 1.0))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    chart, words = figure.subplots(1, 2, width_ratios=(7.2, widths.sum()))
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        _line(chart, points, colour, marked=True, label=name)
        for point, text in zip(points, names[name], strict=True):
            chart.annotate(text, point, xytext=(5, 5), textcoords="offset points", color=colour, fontsize=9)
    chart.set_xlabel(x_label)
    chart.set_ylabel(y_label)
    chart.set_title(title, loc="left", fontsize=11)
    if len(lines) > 1:
        chart.legend(frameon=False, fontsize=9)
    words.axis("off")
    options = {"cellLoc": "right", "colLoc": "right", "edges": "horizontal", "colWidths": widths / widths.sum()}
    cells = words.table(cellText=table[1:], colLabels=table[0], loc="center", **options)
    cells.auto_set_font_size(False)
    cells.set_fontsize(9)
    return figure


def _line(axes, points: Points, colour: str, *, marked: bool, label: str | None = None) -> None:
    """Draws one line through its points, with faint grid lines and only the left and bottom axes."""
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    if not len(x) or not np.isfinite([x, y]).all():
        raise ValueError(f"{len(x)} points, expected at least one, and all finite")
    axes.plot(x, y, color=colour, linewidth=1.6, marker="o" if marked else None, markersize=6, label=label)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors="#6e6e6e", length=0)
