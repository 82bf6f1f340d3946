"""The figure of a sweep: accuracy against what a question costs, a line a method, methods of a kind side by side."""

import os
import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from tokzip_jax import plots
from tokzip_jax.evals.table import RowResult
from tokzip_jax.methods import lines as known_methods
from tokzip_jax.plots import COLOURS, LINE_STYLES, MARKERS
from tokzip_jax.sweep_methods import VARIANTS

# What a row of panels has as its horizontal axis.
COSTS: dict[str, Callable[[RowResult], float | None]] = {
    "FLOPs of a question's prefill": lambda row: row.prefill_flops,
    "and of its picture (tower, projector,\nVoCo's stage one)": lambda row: (
        None if row.picture_flops is None or row.prefill_flops is None else row.prefill_flops + row.picture_flops
    ),
}
KINDS = ("baselines", "by attention", "by similarity", "in the language model", "trained")  # columns of panels


def kind(method: str) -> str:
    """The column of a method: of the encoder site baselines, and the others by their first class of the survey.

    Args:
        method: a name of a sweep, or of a run's own row, which stands for VoCo tokens.
    """
    found = {line.name: line for line in known_methods()}.get(VARIANTS.get(method, (method,))[0])
    if found is None or found.trained:
        return "trained"
    if found.site == "decoder":
        return "in the language model"
    first = f"by {found.classes[0]}" if found.classes else ""
    return first if first in KINDS and found.source != "baseline" else "baselines"


def flops_figure(rows: Sequence[RowResult], path: str | os.PathLike[str], *, lines: Sequence[str]) -> None:
    """Draw accuracy against prefill FLOPs, above without and below with those of the picture.

    There is a column of panels for every kind of method (`kind`), with the rows of a method joined, and those of all
    other kinds in grey. Rows in `lines` become horizontal lines.

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
    kinds = {name: kind(name) for name in methods}
    shown = [name for name in KINDS if name in kinds.values()]
    figure = Figure(figsize=(1.5 + 3.3 * len(shown), 9.0), layout="constrained")
    grid = figure.subplots(len(COSTS), len(shown), sharey=True, sharex="row", squeeze=False)
    for panels, (label, cost) in zip(grid, COSTS.items()):
        for axes, name in zip(panels, shown):
            _panel(axes, bounds, methods, [method for method in methods if kinds[method] == name], cost)
            axes.set_xlabel(label)
        panels[0].set_ylabel("accuracy, %")
    for axes, below, name in zip(*grid, shown):
        axes.set_title(name)
        handles, labels = axes.get_legend_handles_labels()
        below.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False, fontsize=8)
    plots._save(figure, path)


def _panel(
    axes: Axes,
    bounds: Sequence[RowResult],
    methods: Mapping[str, Sequence[RowResult]],
    shown: Sequence[str],
    cost: Callable[[RowResult], float | None],
) -> None:
    for number, row in enumerate(bounds):
        style = LINE_STYLES[number % len(LINE_STYLES)]
        axes.axhline(100 * row.accuracy, color="0.45", linestyle=style, linewidth=1.3, label=row.method, zorder=1)
    for name, members in methods.items():
        members = sorted((row for row in members if cost(row) is not None), key=cost)
        number = shown.index(name) if name in shown else None
        if number is None:
            style = {"color": "0.86", "linewidth": 0.8, "marker": ".", "markersize": 3, "zorder": 2}
        else:
            style = {
                "color": COLOURS[number % len(COLOURS)],
                # The second round of colours goes with other markers than the first.
                "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
                **{"linewidth": 1.3, "markersize": 6.5, "markeredgecolor": "white", "label": name, "zorder": 3},
            }
        axes.plot([cost(row) for row in members], [100 * row.accuracy for row in members], **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
