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


def learned_figure(looks: Looks, readouts: Readouts, path: str | os.PathLike[str]) -> None:
    """Draw one row of panels over the numbers of `probe.looks`, and one over the read-outs.

    Above, against the layer: how many patches each token looks at (e to the power of the entropy), how alike two
    tokens look (mean over pairs; of several tokens only), and how much of the look falls on objects (with a mask
    only). Lines are means over pictures. Below: a panel for every kind of features, a line for every fact, with the
    majority baseline dashed in the fact's colour; the shade around it is two standard errors of as many test pictures:
    what lies inside has not been found.

    Args:
        looks: of some pictures.
        readouts: {"keys": {"color": ..., "shape": ...}, "values": {...}}; may be empty.
        path: of the PNG; its directory is made where it is missing.

    Raises:
        ValueError: a kind of features without a fact.
    """
    for kind, facts in readouts.items():
        if not facts:
            raise ValueError(f"readouts[{kind!r}] holds no fact to draw")
    draws = [_draw_entropy]
    if looks.overlap_LBkk.shape[-1] > 1:
        draws.append(_draw_overlap)
    if looks.object_LBk is not None:
        draws.append(_draw_objects)
    rows = 1 + bool(readouts)
    figure = Figure(figsize=(3.7 * max(len(draws), len(readouts)) + 1.5, 3.2 * rows), layout="constrained")
    parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    upper = parts[0].subplots(1, len(draws), squeeze=False)[0]
    for axes, draw in zip(upper, draws):
        _layer_axis(axes, looks.entropy_LBk.shape[0])
        draw(axes, looks)
    _legend(upper[0], upper[-1])
    if readouts:
        lower = parts[1].subplots(1, len(readouts), squeeze=False, sharey=True)[0]
        for axes, (kind, facts) in zip(lower, readouts.items()):
            _layer_axis(axes, len(next(iter(facts.values())).accuracy_L))
            _draw_facts(axes, facts)
            axes.set_title(f"read from {kind}", fontsize=plots.TITLE_SIZE)
        lower[0].set_ylabel("accuracy, %")
        _legend(lower[0], lower[-1])
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


def _draw_entropy(axes: Axes, looks: Looks) -> None:
    wide_Lk = np.exp(np.asarray(looks.entropy_LBk)).mean(axis=1)
    for token in range(wide_Lk.shape[1]):
        _line(axes, wide_Lk[:, token], token, f"token {token + 1}")
    axes.set_ylim(bottom=0)
    axes.set_title("patches looked at", fontsize=plots.TITLE_SIZE)


def _draw_overlap(axes: Axes, looks: Looks) -> None:
    overlap_Lkk = np.asarray(looks.overlap_LBkk).mean(axis=1)
    above = np.triu_indices(overlap_Lkk.shape[-1], 1)
    pairs = overlap_Lkk[:, above[0], above[1]]
    layer = np.arange(1, len(pairs) + 1)
    axes.fill_between(layer, pairs.min(axis=1), pairs.max(axis=1), color="0.85", linewidth=0, label="range of pairs")
    axes.plot(layer, pairs.mean(axis=1), color="0.2", marker="o", markersize=5.5, markeredgecolor="white", zorder=3)
    axes.set_ylim(0, 1.03)
    axes.set_title("how alike two tokens look", fontsize=plots.TITLE_SIZE)


def _draw_objects(axes: Axes, looks: Looks) -> None:
    share_Lk = 100 * np.asarray(looks.object_LBk).mean(axis=1)
    for token in range(share_Lk.shape[1]):
        _line(axes, share_Lk[:, token], token, f"token {token + 1}")
    area = 100 * float(np.mean(looks.area_B))
    axes.axhline(area, color="0.45", linestyle=(0, (5, 2)), linewidth=1.3, zorder=1)
    axes.annotate("their area", (1.0, area), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize=8, color="0.35")
    axes.set_ylim(bottom=0)
    axes.set_title("look on objects, %", fontsize=plots.TITLE_SIZE)


def _draw_facts(axes: Axes, facts: Mapping[str, Readout]) -> None:
    for number, (fact, readout) in enumerate(facts.items()):
        _line(axes, 100 * np.asarray(readout.accuracy_L), number, fact)
        colour, usual = plots.COLOURS[number % len(plots.COLOURS)], readout.majority
        axes.axhline(100 * usual, color=colour, linestyle=(0, (5, 2)), linewidth=1.1, zorder=1)
        error = 200 * (usual * (1 - usual) / readout.tests) ** 0.5
        axes.axhspan(100 * usual - error, 100 * usual + error, color=colour, alpha=0.1, linewidth=0, zorder=0)
    axes.set_ylim(0, 103)
