"""The figures of a run's accuracies against visual tokens: of all questions, and of each type of question."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from tokzip_jax import plots
from tokzip_jax.evals.table import RowResult, token_count
from tokzip_jax.plots import COLOURS, LINE_STYLES, MARKERS

Measure = Callable[[RowResult], float | None]
BOUNDS = ("prior", "lower", "upper")
ACROSS = 3  # panels of question types side by side
NUMBER = r"[\s_@-]*\d+(?:\.\d+)?"  # of a name, with what joins it to the word before


def retention_figure(
    rows: Sequence[RowResult], path: str | os.PathLike[str], *, lines: Sequence[str] = BOUNDS
) -> None:
    """Draw accuracy against visual tokens: over all questions, and beside it without yes/no questions.

    Rows named in `lines`, and rows that have no number of tokens, become horizontal lines (names that are no row are
    passed over). The others become points, joined within a family (see `families`).

    Args:
        rows: the lines of the results table.
        path: of the PNG; its directory is made where it is missing.
        lines: names of rows that are bounds.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("the retention figure needs at least one row of results")
    measures: dict[str, Measure] = {
        "all questions": lambda row: row.accuracy,
        "without yes/no questions": lambda row: row.accuracy_not_yes_no,
    }
    _draw(rows, path, lines, measures, across=len(measures), spread="all questions")


def types_figure(rows: Sequence[RowResult], path: str | os.PathLike[str], *, lines: Sequence[str] = BOUNDS) -> None:
    """Draw accuracy against visual tokens, a panel for each type of question.

    Args:
        rows, path, lines: as of `retention_figure`.

    Raises:
        ValueError: no row knows a type of question.
    """
    types = sorted({name for row in rows for name in row.accuracy_by_type})
    if not types:
        raise ValueError("the figure of question types needs at least one row with accuracies by type")

    def measure(name: str) -> Measure:
        return lambda row: row.accuracy_by_type.get(name)

    _draw(rows, path, lines, {name: measure(name) for name in types}, across=ACROSS)


def _draw(
    rows: Sequence[RowResult],
    path: str | os.PathLike[str],
    lines: Sequence[str],
    measures: Mapping[str, Measure],
    *,
    across: int,
    spread: str = "",
) -> None:
    """A panel for every measure that a row has, with the spread over seeds in the one named."""
    measures = {name: key for name, key in measures.items() if any(key(row) is not None for row in rows)}
    bounds = [row for row in rows if row.method in lines or not row.visual_tokens]
    joined = families([row for row in rows if row not in bounds])
    down = math.ceil(len(measures) / across)
    across = min(across, len(measures))
    figure = Figure(figsize=(1 + 4.4 * across, 1.2 + 3.4 * down), layout="constrained")
    every = figure.subplots(down, across, squeeze=False)
    for axes, (name, key) in zip(every.flat, measures.items()):
        _draw_bounds(axes, bounds, key)
        _draw_families(axes, joined, key, spread=name == spread)
        _token_axis(axes, [row.visual_tokens for members in joined.values() for row in members])
        axes.set(title=name, xlabel="visual tokens that the question can read")
    for axes in every[:, 0]:
        axes.set_ylabel("accuracy, %")
    for axes in every.flat[len(measures) :]:
        axes.remove()
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    _legend_below(figure, handles)
    plots._save(figure, path)


def _legend_below(figure: Figure, handles: dict[str, Artist]) -> None:
    """A legend of as many columns as the figure is wide enough for, four at most; the figure grows with its lines."""
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
        )
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    lines = math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + 0.21 * max(0, lines - 5))


def families(rows: Sequence[RowResult]) -> dict[str, list[RowResult]]:
    """Rows whose names differ in one number, under the name without it: voco_1 and voco_4 are both voco.

    Numbers that all of them share stay in the name ("unshuffle 2 at 4" and "unshuffle 2 at 16" are "unshuffle 2 at");
    where names differ in several numbers, it is the last one of them that a family leaves out. A row without relatives
    is a family of its own, under its full name.
    """
    alike: dict[str, list[RowResult]] = {}
    for row in rows:
        alike.setdefault(re.sub(NUMBER, "#", row.method), []).append(row)
    names = {}
    for members in alike.values():
        numbers = [re.findall(NUMBER, row.method) for row in members]
        varying = [place for place, values in enumerate(zip(*numbers)) if len(set(values)) > 1]
        for row in members:
            names[id(row)] = _without(row.method, varying[-1]) if varying else row.method
    sizes = Counter(names.values())
    found: dict[str, list[RowResult]] = {}
    for row in rows:  # again, so that families stand in the order of their first rows
        name = names[id(row)]
        found.setdefault(name if sizes[name] > 1 else row.method, []).append(row)
    return found


def _without(name: str, place: int) -> str:
    """A name without one of its numbers, the one at `place` among them."""
    span = list(re.finditer(NUMBER, name))[place]
    return (name[: span.start()] + name[span.end() :]).rstrip(" ,_@-") or name


def _draw_bounds(axes: Axes, bounds: Sequence[RowResult], key: Measure) -> None:
    for number, row in enumerate(bounds):
        if (value := key(row)) is not None:
            style = LINE_STYLES[number % len(LINE_STYLES)]
            axes.axhline(100 * value, color="0.45", linestyle=style, linewidth=1.3, label=row.method, zorder=1)


def _looks(joined: Mapping[str, Sequence[RowResult]]) -> dict[str, dict[str, object]]:
    """Colour, marker and line of every family.

    One whose name goes on behind another's, or behind that of one of its rows, and a comma ("VoCo, shuffled") is a
    variant of it: of the same colour and marker, dashed and hollow.
    """
    family = {row.method: name for name, members in joined.items() for row in members} | {name: name for name in joined}
    looks: dict[str, dict[str, object]] = {}
    own = [name for name in joined if name.rpartition(", ")[0] not in family]
    for number, name in enumerate(own):
        # The second round of colours goes with other markers than the first.
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        looks[name] = {"color": COLOURS[number % len(COLOURS)], "marker": marker, "markeredgecolor": "white"}
    for name in sorted(joined, key=lambda name: name.count(", ")):  # a variant's variant behind that variant
        if name not in looks:
            of = looks[family[name.rpartition(", ")[0]]]
            hollow = {"markerfacecolor": "white", "markeredgecolor": of["color"], "linestyle": (0, (4, 2))}
            looks[name] = {**of, **hollow}
    return looks


def _draw_families(
    axes: Axes, joined: Mapping[str, Sequence[RowResult]], key: Measure, *, spread: bool
) -> None:
    looks = _looks(joined)
    for name, members in joined.items():
        members = sorted((row for row in members if key(row) is not None), key=lambda row: row.visual_tokens)
        if not members:
            continue
        # The spread is that of the overall accuracy, so it is drawn only there.
        ranges = [100 * (row.spread or 0) for row in members] if spread else [0]
        axes.errorbar(
            [row.visual_tokens for row in members],
            [100 * key(row) for row in members],
            yerr=ranges if any(ranges) else None,
            **{"markersize": 7.5, "linewidth": 1.6, "capsize": 3, "zorder": 3, "label": name},
            **looks[name],
        )


def _token_axis(axes: Axes, counts: Sequence[float]) -> None:
    """A logarithmic axis with ticks at the counts that occur, but for those that would touch their neighbour.

    Means, of questions that pick their number, have a tick where there is no whole number.
    """
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if not counts:
        return
    axes.set_xscale("log", base=2)
    low, high = min(counts), max(counts)
    gap = max(np.log2(high / low), 1) / 9
    ticks: list[float] = []
    for count in sorted({count for count in counts if count == int(count)} or set(counts)):
        if not ticks or np.log2(count / ticks[-1]) >= gap:
            ticks.append(count)
    axes.set_xticks(ticks, [token_count(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low / 2**gap, high * 2**gap)
