"""The figure of what a compressor kept of real pictures; and what all figures share: colours, markers, saving.

Figures are made without pyplot, so that nothing global (backend, open figures) is touched; a PNG needs no display.
"""

import dataclasses
import os
import pathlib
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch, Rectangle

from tokzip_jax.types import VisualTokens

# Okabe and Ito's colours, told apart by colour-blind readers too; every family has a marker of its own as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#555555")
MARKERS = "osD^vPX*"
TITLE_SIZE = 9
SIDE_BY_SIDE = 8  # panels that a page has room for
HEIGHT, LINE, LETTER = 1.75, 0.17, 0.082  # inches: of a picture, of a line of a title, and across a letter of one
MERGED_ALPHA = 0.55
LINE_STYLES = ((0, (1, 1.5)), (0, (5, 2)), "-", (0, (5, 1.5, 1, 1.5)))


@dataclasses.dataclass(frozen=True)
class KeptPanel:
    """What a compressor made of one picture's patches: one row of a `VisualTokens`, as NumPy arrays."""

    title: str
    position_M: np.ndarray
    valid_M: np.ndarray
    source_P: np.ndarray


@dataclasses.dataclass(frozen=True)
class LooksPanel:
    """Where the VoCo tokens of one picture look.

    Attributes:
        title: heads the column.
        attention_LkP: [layers, k, P], in any scale: each map is drawn from 0 to its own largest value.
    """

    title: str
    attention_LkP: np.ndarray


def kept_panel(title: str, tokens: VisualTokens, row: int) -> KeptPanel:
    """The panel of picture `row` of a batch."""
    return KeptPanel(title, *(np.asarray(x[row]) for x in (tokens.position_BM, tokens.valid_BM, tokens.source_BP)))


def kept_tokens_figure(
    pictures_BHWC: np.ndarray,
    panels: Sequence[Sequence[KeptPanel | LooksPanel]],
    path: str | os.PathLike[str],
    *,
    side_by_side: int = SIDE_BY_SIDE,
) -> None:
    """Draw a row per picture: the picture, and one panel per method.

    A kept patch is shown as it is, framed in white; a patch that others were merged into is framed in its slot's
    colour, and those others are tinted with it; a dropped patch is dark. A `LooksPanel` lays attention in red over the
    grey picture, layers along one axis and VoCo tokens along the other.

    Args:
        pictures_BHWC: [B, H, W, 3] uint8.
        panels: for every picture the same panels (by kind and title), in the order of the columns.
        path: of the PNG; its directory is made where it is missing.
        side_by_side: so many panels at most; the next ones are drawn below, beside the pictures once more. 0 = all.

    Raises:
        ValueError: no picture, a picture without panels or with others than the first has, or a number of patches
            that is no square.
    """
    _check_panels(pictures_BHWC, panels)
    count = side_by_side or len(panels[0])
    bands = [slice(start, start + count) for start in range(0, len(panels[0]), count)]
    every = [[1.0, *map(_width, panels[0][band])] for band in bands]
    height, between = HEIGHT, 0.06
    title = 0.12 + LINE * max(2, *(_title(panel).count("\n") + 1 for panel in panels[0]))
    longest = max(sum(widths) + between * len(widths) for widths in every)
    across = height * longest
    # The legend's entries side by side are 7 inches wide; a narrower figure has them in two lines or four.
    columns = 4 if across >= 7 else 2 if across >= 4.5 else 1
    below = 0.14 + 0.2 * (4 // columns)
    inches = len(bands) * (height * len(panels) + title) + below
    figure = Figure(figsize=(across, inches))
    # Margins in inches, so that titles and legend have the same room whatever the number of pictures.
    margins = {"left": 0.01, "right": 0.99, "top": 1 - (title - 0.01) / inches, "bottom": below / inches}
    outer = figure.add_gridspec(len(bands), 1, hspace=title / (height * len(panels)), **margins)
    for band, widths, where in zip(bands, every, outer):
        # Every second column is a gap. Behind a shorter band's last one the room stays empty, so that panels are
        # equally large in all bands and stand below one another.
        ratios = [ratio for width in widths for ratio in (width, between)]
        ratios[-1] += longest - sum(ratios)
        grid = where.subgridspec(len(panels), len(ratios), width_ratios=ratios, wspace=0, hspace=between)
        for row, (picture, chosen) in enumerate(zip(pictures_BHWC, panels)):
            axes = _bare(figure, grid[row, 0], picture)
            if row == 0:
                axes.set_title("picture", fontsize=TITLE_SIZE)
            for column, panel in enumerate(chosen[band], start=1):
                draw = _draw_kept if isinstance(panel, KeptPanel) else _draw_looks
                draw(figure, grid[row, 2 * column], picture, panel, row == 0)
    if any(isinstance(panel, KeptPanel) for panel in panels[0]):
        figure.legend(handles=_kept_legend(), loc="lower center", ncols=columns, frameon=False, fontsize=9)
    _save(figure, path)


def _check_panels(pictures_BHWC: np.ndarray, panels: Sequence[Sequence[KeptPanel | LooksPanel]]) -> None:
    if not len(panels) or len(pictures_BHWC) != len(panels):
        raise ValueError(f"{len(pictures_BHWC)} pictures need as many rows of panels (at least one), not {len(panels)}")
    first = [(type(panel), panel.title) for panel in panels[0]]
    for number, chosen in enumerate(panels):
        if not chosen or [(type(panel), panel.title) for panel in chosen] != first:
            raise ValueError(f"picture {number} must have the same panels as picture 0, at least one")
        for panel in chosen:
            _side(panel.source_P.size if isinstance(panel, KeptPanel) else panel.attention_LkP.shape[-1])


def _side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches are no square grid, so they cannot be laid over the picture")
    return side


def _width(panel: KeptPanel | LooksPanel) -> float:
    """Width of a panel in pictures, all of them one picture high; titles need some width."""
    if isinstance(panel, KeptPanel):
        return 1.0
    layers, voco, _ = panel.attention_LkP.shape
    return max(layers / voco, voco / layers)


def _title(panel: KeptPanel | LooksPanel) -> str:
    """What stands above a panel, in lines that are no wider than it is."""
    wide = max(1, int(_width(panel) * HEIGHT / LETTER))
    lines = textwrap.wrap(panel.title, wide)
    if isinstance(panel, LooksPanel):
        across, down = _axes(panel)
        below = f", {down[0]} 1-{down[1]} ↓" if down[1] > 1 else ""
        lines += textwrap.wrap(f"{across[0]} 1-{across[1]} →{below}", wide)
    return "\n".join(lines)


def _axes(panel: LooksPanel) -> tuple[tuple[str, int], tuple[str, int]]:
    """(name, count) of what runs from left to right, and from top to bottom.

    The longer axis runs from left to right, so that maps are as large as a row's height allows.
    """
    layers, voco, _ = panel.attention_LkP.shape
    axes = ("layers", layers), ("tokens", voco)
    return axes if layers >= voco else axes[::-1]


def _bare(figure: Figure, cell: SubplotSpec, picture_HWC: np.ndarray) -> Axes:
    axes = figure.add_subplot(cell)
    _lay_over(axes, picture_HWC)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.75", linewidth=0.5)
    return axes


def _lay_over(axes: Axes, image: np.ndarray) -> None:
    """Stretch an image of any resolution over the unit square, first row on top."""
    axes.imshow(image, interpolation="nearest", extent=(0, 1, 1, 0), aspect="equal")


def slot_colours(panel: KeptPanel) -> dict[int, tuple[float, float, float]]:
    """RGB of every slot that stands for more than one patch, by slot number."""
    slots, counts = np.unique(panel.source_P[panel.source_P >= 0], return_counts=True)
    merged = [int(slot) for slot, count in zip(slots, counts) if count > 1 and panel.valid_M[slot]]
    named = matplotlib.colormaps["tab10"].colors
    many = matplotlib.colormaps["hsv"](np.linspace(0, 1, len(merged), endpoint=False))[:, :3]
    colours = named if len(merged) <= len(named) else many
    return {slot: tuple(map(float, colour)) for slot, colour in zip(merged, colours)}


def patch_states(panel: KeptPanel) -> np.ndarray:
    """[P] what became of each patch: "kept", "merged" (into another place's token) or "dropped"."""
    source, place = panel.source_P, np.arange(panel.source_P.size)
    known = (source >= 0) & panel.valid_M[source]
    kept = known & (panel.position_M[source] == place)
    return np.where(kept, "kept", np.where(known, "merged", "dropped"))


def _draw_kept(figure: Figure, cell: SubplotSpec, picture: np.ndarray, panel: KeptPanel, titled: bool) -> None:
    axes = _bare(figure, cell, picture)
    side = _side(panel.source_P.size)
    states, colours = patch_states(panel), slot_colours(panel)
    cover = np.zeros((side * side, 4))
    cover[states == "dropped"] = (0.08, 0.08, 0.1, 0.8)
    for slot, colour in colours.items():
        cover[(states == "merged") & (panel.source_P == slot)] = (*colour, MERGED_ALPHA)
    _lay_over(axes, cover.reshape(side, side, 4))
    kept = np.flatnonzero(states == "kept")
    own = [colours.get(int(panel.source_P[place])) for place in kept]
    inset = 0.12 / side  # frames of neighbours stand side by side
    size = 1 / side - 2 * inset
    frames = [Rectangle((place % side / side + inset, place // side / side + inset), size, size) for place in kept]
    widths = np.array([22 if colour else 13 for colour in own]) / (side + 4)
    # A black frame under the coloured one: white alone is lost on a pale picture, black alone on a dropped patch.
    for edges, extra in (("black", 11 / (side + 4)), ([colour or "white" for colour in own], 0)):
        style = {"facecolor": "none", "edgecolor": edges, "linewidth": widths + extra, "joinstyle": "miter"}
        axes.add_collection(PatchCollection(frames, **style))
    if titled:
        axes.set_title(_title(panel), fontsize=TITLE_SIZE)


def _kept_legend() -> list[Patch]:
    return [
        Patch(facecolor="white", edgecolor="black", linewidth=0.8, label="kept"),
        Patch(facecolor="none", edgecolor=COLOURS[1], linewidth=2, label="target of a merge"),
        Patch(facecolor=COLOURS[1], alpha=MERGED_ALPHA, label="merged into the target of that colour"),
        Patch(facecolor="0.1", label="dropped"),
    ]


def _draw_looks(figure: Figure, cell: SubplotSpec, picture: np.ndarray, panel: LooksPanel, titled: bool) -> None:
    side = _side(panel.attention_LkP.shape[-1])
    grey = np.repeat(np.asarray(picture, np.float32).mean(-1, keepdims=True) / 255, 3, axis=-1)
    maps = panel.attention_LkP.swapaxes(0, 1) if _axes(panel)[0][0] == "layers" else panel.attention_LkP
    inner = cell.subgridspec(*maps.shape[:2], wspace=0.06, hspace=0.06)
    for row, column in np.ndindex(maps.shape[:2]):
        axes = _bare(figure, inner[row, column], grey)
        heat = maps[row, column].reshape(side, side).astype(np.float32)
        # Opacity is the attention, so that the picture stays to be seen where nobody looks.
        red = np.broadcast_to(np.array([0.8, 0.0, 0.0], np.float32), (side, side, 3))
        share = np.clip(heat / max(float(heat.max()), 1e-12), 0, 1)
        _lay_over(axes, np.concatenate([red, 0.95 * share[..., None]], axis=-1))
    if titled:
        frame = figure.add_subplot(cell, frameon=False, xticks=[], yticks=[])
        frame.set_title(_title(panel), fontsize=TITLE_SIZE)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
