"""The figure of a sweep: accuracy against what a question costs, a line a method."""

import os
import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from tokzip_jax import plots
from tokzip_jax.evals.table import RowResult
from tokzip_jax.plots import COLOURS, LINE_STYLES, MARKERS


def flops_figure(rows: Sequence[RowResult], path: str | os.PathLike[str], *, lines: Sequence[str]) -> None:
    """Draw accuracy against prefill FLOPs, the rows of a method joined; rows in `lines` become horizontal lines.

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
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(bounds):
        style = LINE_STYLES[number % len(LINE_STYLES)]
        axes.axhline(100 * row.accuracy, color="0.45", linestyle=style, linewidth=1.3, label=row.method, zorder=1)
    for number, (name, members) in enumerate(methods.items()):
        members = sorted(members, key=lambda row: row.prefill_flops)
        axes.plot(
            [row.prefill_flops for row in members],
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
    axes.set(xlabel="FLOPs of the language model for a question (prefill)", ylabel="accuracy, %")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    plots._save(figure, path)
