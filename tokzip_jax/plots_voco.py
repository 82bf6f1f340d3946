"""The figure of what VoCo tokens learned: where they look, layer by layer, and what can be read from their cache."""

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokzip_jax import plots
from tokzip_jax.probe import Looks, Readout

Readouts = Mapping[str, Mapping[str, Readout]]
COLUMNS = 3  # panels of read-outs in a row
GRAY = "0.45"


def learned_figure(
    looks: Looks, readouts: Readouts, path: str | os.PathLike[str], *, untrained: Looks | None = None
) -> None:
    """Draw one row of panels over the numbers of `probe.looks`, and below a panel for every fact that was read.

    Above, against the layer: how much attention is spent on the patches, how many patches each token looks at (e to the
    power of the entropy), how alike two tokens look (mean over pairs; of several tokens only), and how much of the look
    falls on objects (with a mask only). Lines are means over pictures. Below: a line for every kind of features, a
    level one for features that belong to no layer, and the majority baseline dashed; the shade around it is two
    standard errors of as many test pictures: what lies inside has not been found.

    Args:
        looks: of some pictures.
        readouts: {"color": {"keys": ..., "values": ...}, "shape": {...}}; may be empty.
        path: of the PNG; its directory is made where it is missing.
        untrained: what a model that did not learn it does with the same pictures; the mean over its tokens is drawn.

    Raises:
        ValueError: a fact that was read from nothing.
    """
    for fact, kinds in readouts.items():
        if not kinds:
            raise ValueError(f"readouts[{fact!r}] holds nothing that it was read from")
    draws = [_draw_spent, _draw_entropy]
    if looks.overlap_LBkk.shape[-1] > 1:
        draws.append(_draw_overlap)
    if looks.object_LBk is not None:
        draws.append(_draw_objects)
    layers, rows = looks.entropy_LBk.shape[0], -(-len(readouts) // COLUMNS)
    figure = Figure(figsize=(3.4 * max(len(draws), min(COLUMNS, len(readouts))) + 1.7, 2.9 * (1 + rows)))
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06)
    parts = figure.subfigures(1 + bool(rows), 1, squeeze=False, height_ratios=[1, rows][: 1 + bool(rows)])[:, 0]
    upper = parts[0].subplots(1, len(draws), squeeze=False)[0]
    for axes, draw in zip(upper, draws):
        _layer_axis(axes, layers)
        draw(axes, looks, untrained)
    _legend(upper[0], upper[-1])
    if readouts:
        lower = parts[1].subplots(rows, min(COLUMNS, len(readouts)), squeeze=False, sharey=True)
        for axes, (fact, kinds) in zip(lower.flat, readouts.items()):
            _layer_axis(axes, layers)
            _draw_kinds(axes, kinds, layers)
            axes.set_title(fact, fontsize=plots.TITLE_SIZE)
        for axes in lower.flat[len(readouts) :]:
            axes.set_visible(False)
        for axes in lower[:, 0]:
            axes.set_ylabel("read out, %")
        _legend(lower[0, 0], lower[0, -1])
    plots._save(figure, path)


def _layer_axis(axes: Axes, layers: int) -> None:
    axes.set_xlim(1 - 0.04 * layers, layers + 0.04 * layers)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("layer")
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(source: Axes, beside: Axes) -> None:
    """The entries of one panel to the right of the last one."""
    handles, labels = source.get_legend_handles_labels()
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0}
    beside.legend(handles, labels, frameon=False, fontsize=9, **place)


def _line(axes: Axes, values_L: np.ndarray, number: int, label: str) -> None:
    colour = plots.COLOURS[number % len(plots.COLOURS)]
    marker = plots.MARKERS[(number + number // len(plots.COLOURS)) % len(plots.MARKERS)]
    style = {"color": colour, "marker": marker, "markersize": 5.5, "markeredgecolor": "white", "linewidth": 1.5}
    axes.plot(np.arange(1, len(values_L) + 1), values_L, label=label, zorder=3, **style)


def _tokens(axes: Axes, values_LBk: np.ndarray, untrained_LBk: np.ndarray | None, title: str) -> None:
    """A line for every token, and one for what an untrained model's tokens do on average."""
    for token in range(values_LBk.shape[2]):
        _line(axes, values_LBk[:, :, token].mean(axis=1), token, f"token {token + 1}")
    if untrained_LBk is not None:
        _gray(axes, untrained_LBk.mean(axis=(1, 2)))
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=plots.TITLE_SIZE)


def _gray(axes: Axes, values_L: np.ndarray) -> None:
    style = {"color": GRAY, "linestyle": plots.LINE_STYLES[0], "linewidth": 1.6, "zorder": 2}
    axes.plot(np.arange(1, len(values_L) + 1), values_L, label="untrained", **style)


def _draw_spent(axes: Axes, looks: Looks, untrained: Looks | None) -> None:
    spent = [None if each is None else 100 * np.asarray(each.spent_LBk) for each in (looks, untrained)]
    _tokens(axes, *spent, "attention on patches, %")
    axes.set_ylim(0, 103)


def _draw_entropy(axes: Axes, looks: Looks, untrained: Looks | None) -> None:
    wide = [None if each is None else np.exp(np.asarray(each.entropy_LBk)) for each in (looks, untrained)]
    _tokens(axes, *wide, "patches looked at")


def _draw_overlap(axes: Axes, looks: Looks, untrained: Looks | None) -> None:
    above = np.triu_indices(looks.overlap_LBkk.shape[-1], 1)
    pairs = np.asarray(looks.overlap_LBkk).mean(axis=1)[:, above[0], above[1]]
    layer = np.arange(1, len(pairs) + 1)
    axes.fill_between(layer, pairs.min(axis=1), pairs.max(axis=1), color="0.85", linewidth=0, label="range of pairs")
    axes.plot(layer, pairs.mean(axis=1), color="0.2", marker="o", markersize=5.5, markeredgecolor="white", zorder=3)
    if untrained is not None and untrained.overlap_LBkk.shape[-1] > 1:
        _gray(axes, np.asarray(untrained.overlap_LBkk).mean(axis=1)[:, above[0], above[1]].mean(axis=1))
    axes.set_ylim(0, 1.03)
    axes.set_title("how alike two tokens look", fontsize=plots.TITLE_SIZE)


def _draw_objects(axes: Axes, looks: Looks, untrained: Looks | None) -> None:
    known = [looks, untrained if untrained is not None and untrained.object_LBk is not None else None]
    share = [None if each is None else 100 * np.asarray(each.object_LBk) for each in known]
    _tokens(axes, *share, "look on objects, %")
    area = 100 * float(np.mean(looks.area_B))
    axes.axhline(area, color=GRAY, linestyle=plots.LINE_STYLES[1], linewidth=1.3, zorder=1)
    axes.annotate("their area", (1.0, area), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize=8, color="0.35")


def _draw_kinds(axes: Axes, kinds: Mapping[str, Readout], layers: int) -> None:
    for number, (kind, readout) in enumerate(kinds.items()):
        accuracy = 100 * np.asarray(readout.accuracy_L)
        if len(accuracy) == layers:
            _line(axes, accuracy, number, kind)
        else:
            colour = plots.COLOURS[number % len(plots.COLOURS)]
            axes.axhline(accuracy[0], color=colour, linestyle=plots.LINE_STYLES[3], linewidth=1.5, label=kind, zorder=2)
    some = next(iter(kinds.values()))
    usual, error = 100 * some.majority, 200 * (some.majority * (1 - some.majority) / some.tests) ** 0.5
    axes.axhline(usual, color=GRAY, linestyle=plots.LINE_STYLES[1], linewidth=1.3, label="majority", zorder=1)
    axes.axhspan(usual - error, usual + error, color=GRAY, alpha=0.15, linewidth=0, zorder=0)
    axes.set_ylim(0, 103)
