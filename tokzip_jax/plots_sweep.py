"""The figure of a sweep: accuracy against what a question costs, a line a method."""

import os
import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokzip_jax import plots
from tokzip_jax.evals.table import RowResult
from tokzip_jax.plots import COLOURS, LINE_STYLES, MARKERS

# What a panel's horizontal axis is.
COSTS: dict[str, Callable[[RowResult], float | None]] = {
    "FLOPs of the language model for a question (prefill)": lambda row: row.prefill_flops,
    "and of its picture (tower, projector, VoCo's stage one)": lambda row: (
        None if row.picture_flops is None or row.prefill_flops is None else row.prefill_flops + row.picture_flops
    ),
}


def flops_figure(rows: Sequence[RowResult], path: str | os.PathLike[str], *, lines: Sequence[str]) -> None:
    """Draw accuracy against prefill FLOPs, without and with those of the picture, the rows of a method joined; rows in
    `lines` become horizontal lines.

    Args:
        rows: of the sweep's table; those whose names differ in a number alone belong together.
        path: of the PNG; its directory is made where it is missing.
        lines: names of rows that are bounds.

    Raises:
        ValueError: no row that costs anything.
    """
    bounds = [row for row in rows if row.method in lines]
    points = [row for row in rows if row.method not in lines and row.prefill_flops]
    if not points:
        raise ValueError("the figure of a sweep needs at least one row with prefill FLOPs")
    methods: dict[str, list[RowResult]] = {}
    for row in points:
        methods.setdefault(re.sub(r" \d+\b", "", row.method), []).append(row)
    figure = Figure(figsize=(15.5, max(6.2, 0.17 * (len(methods) + len(bounds)))), layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (label, cost) in zip(panels, COSTS.items()):
        _panel(axes, bounds, methods, cost)
        axes.set_xlabel(label)
    panels[0].set_ylabel("accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    plots._save(figure, path)


def _panel(
    axes: Axes,
    bounds: Sequence[RowResult],
    methods: Mapping[str, Sequence[RowResult]],
    cost: Callable[[RowResult], float | None],
) -> None:
    for number, row in enumerate(bounds):
        style = LINE_STYLES[number % len(LINE_STYLES)]
        axes.axhline(100 * row.accuracy, color="0.45", linestyle=style, linewidth=1.3, label=row.method, zorder=1)
    for number, (name, members) in enumerate(methods.items()):
        members = sorted((row for row in members if cost(row) is not None), key=cost)
        axes.plot(
            [cost(row) for row in members],
            [100 * row.accuracy for row in members],
            color=COLOURS[number % len(COLOURS)],
            # The second round of colours goes with other markers than the first.
            marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
            linewidth=1.2,
            markersize=6.5,
            markeredgecolor="white",
            label=name,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
