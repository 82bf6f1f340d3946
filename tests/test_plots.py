"""The figures: what is drawn where (on the drawn objects and pixels), and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tokzip_jax import methods, plots, plots_accuracy, plots_sweep, sweep_methods
from tokzip_jax.evals.table import RowResult
from tokzip_jax.types import VisualTokens

# 16 patches: slot 0 is CLS, slots 1 and 2 keep patches 0 and 5, slot 3 stands on patch 10 and took 3 and 11,
# slot 4 was not filled. Patch 7 went to the slot that was not filled; all others were dropped.
SOURCE = np.full(16, -1)
SOURCE[[0, 5, 10, 3, 11, 7]] = [1, 2, 3, 3, 3, 4]
PANEL = plots.KeptPanel("zip", np.array([-1, 0, 5, 10, 7]), np.array([1, 1, 1, 1, 0], bool), SOURCE)
LOOKS = plots.LooksPanel("voco", np.random.default_rng(0).random((3, 2, 16)))
PICTURES = np.full((2, 8, 8, 3), 200, np.uint8)


def result(method, tokens, accuracy, **fields):
    scores = {"accuracy": accuracy, "accuracy_by_type": {}, "accuracy_not_yes_no": accuracy / 2}
    return RowResult(method=method, visual_tokens=tokens, **scores, **fields)


def width(path):
    with Image.open(path) as picture:
        return picture.size[0]


ROWS = [
    result("prior", None, 0.67),
    result("lower", 1, 0.7),
    result("upper", 64, 0.97),
    result("voco_1", 1, 0.96),
    result("voco_4", 4, 0.965),
    result("random_16", 16, 0.8, spread=0.01),
    result("upper_official", 65, 0.968),
]


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved, so that tests can look at what was drawn."""
    seen = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (seen.append(figure), save(figure, path)))
    return seen


def test_states_and_colours_of_patches():
    states = plots.patch_states(PANEL)
    assert list(np.flatnonzero(states == "kept")) == [0, 5, 10]
    assert list(np.flatnonzero(states == "merged")) == [3, 11]
    assert list(plots.slot_colours(PANEL)) == [3]
    many = plots.KeptPanel("m", np.arange(64), np.ones(64, bool), np.repeat(np.arange(32), 2))
    assert len(set(plots.slot_colours(many).values())) == 32


def test_kept_panel_takes_one_picture_of_a_batch():
    tokens = VisualTokens(
        tokens_BMD=jnp.zeros((2, 5, 3)),
        valid_BM=jnp.stack([jnp.zeros(5, bool), PANEL.valid_M]),
        position_BM=jnp.stack([jnp.zeros(5, int), PANEL.position_M]),
        size_BM=jnp.ones((2, 5), int),
        source_BP=jnp.stack([jnp.zeros(16, int), PANEL.source_P]),
    )
    panel = plots.kept_panel("zip", tokens, 1)
    assert all(np.array_equal(getattr(panel, f.name), getattr(PANEL, f.name)) for f in dataclasses.fields(PANEL))


def test_kept_tokens_figure(tmp_path, figures):
    path = tmp_path / "figures" / "kept_tokens.png"
    plots.kept_tokens_figure(PICTURES, [[PANEL, LOOKS]] * 2, path)
    assert width(path) > 600
    titles = [axes.get_title() for axes in figures[0].axes if axes.get_title()]
    assert titles[:2] == ["picture", "zip"] and titles[2].startswith("voco\nlayers 1-3") and len(titles) == 3
    # Per picture: itself, one panel of patches, 3 x 2 maps; and the frame that carries the title of the maps.
    assert len(figures[0].axes) == 2 * (1 + 1 + 6) + 1
    zipped = next(axes for axes in figures[0].axes if axes.get_title() == "zip")
    cover = zipped.images[1].get_array().reshape(16, 4)
    assert list(np.flatnonzero(cover[:, 3] == 0)) == [0, 5, 10]
    assert np.allclose(cover[[3, 11], :3], plots.slot_colours(PANEL)[3])
    assert len({tuple(cover[place]) for place in (1, 2, 7, 15)}) == 1 and cover[1, :3].max() < 0.2
    frames = zipped.collections[1].get_edgecolor()
    assert np.allclose(frames[:2], 1) and np.allclose(frames[2, :3], plots.slot_colours(PANEL)[3])


def test_panels_go_on_below(tmp_path, figures):
    """Five panels, two side by side: three bands, each with the pictures and titles of its own."""
    panels = [dataclasses.replace(PANEL, title=f"m{number}") for number in range(5)]
    plots.kept_tokens_figure(PICTURES, [panels] * 2, tmp_path / "kept.png", side_by_side=2)
    titled = [axes for axes in figures[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in titled] == ["picture", "m0", "m1", "picture", "m2", "m3", "picture", "m4"]
    assert len(figures[0].axes) == 2 * (5 + 3)
    boxes = [axes.get_position() for axes in titled]
    assert [box.x0 for box in boxes[3:]] == pytest.approx([box.x0 for box in (*boxes[:3], *boxes[:2])])
    # A band stands wholly below the one before, with room for its titles.
    lowest = [min(axes.get_position().y0 for axes in figures[0].axes[start : start + 6]) for start in (0, 6)]
    inch = 1 / figures[0].get_figheight()
    assert lowest[0] - boxes[3].y1 > 0.4 * inch and lowest[1] - boxes[6].y1 > 0.4 * inch


def test_looks_put_the_strongest_red_where_the_token_looks_most(tmp_path, figures):
    plots.kept_tokens_figure(PICTURES[:1], [[LOOKS]], tmp_path / "looks.png")
    maps = [axes for axes in figures[0].axes if len(axes.images) == 2]
    assert len(maps) == 6
    assert "layers 1-3 →, tokens 1-2 ↓" in figures[0].axes[-1].get_title()
    corners = [axes.get_position() for axes in maps]
    assert np.all(np.diff([box.x0 for box in corners[:3]]) > 0)  # layers from left to right
    # The second token below the first.
    assert corners[3].y1 < corners[0].y0 and corners[3].x0 == pytest.approx(corners[0].x0)
    for number, axes in enumerate(maps):
        token, layer = divmod(number, 3)
        alpha = axes.images[1].get_array()[..., 3].reshape(-1)
        assert alpha.argmax() == LOOKS.attention_LkP[layer, token].argmax()
        assert alpha.max() == pytest.approx(0.95)


def test_more_tokens_than_layers_run_from_left_to_right(tmp_path, figures):
    wide = plots.LooksPanel("voco", LOOKS.attention_LkP.swapaxes(0, 1))  # 2 layers, 3 tokens
    plots.kept_tokens_figure(PICTURES[:1], [[wide]], tmp_path / "looks.png")
    assert "tokens 1-3 →, layers 1-2 ↓" in figures[0].axes[-1].get_title()
    maps = [axes.images[1].get_array()[..., 3].reshape(-1) for axes in figures[0].axes if len(axes.images) == 2]
    assert maps[1].argmax() == wide.attention_LkP[0, 1].argmax()
    assert maps[3].argmax() == wide.attention_LkP[1, 0].argmax()


@pytest.mark.parametrize(
    "pictures, panels, message",
    [
        (PICTURES, [[PANEL]], "2 pictures need as many rows of panels"),
        (PICTURES[:0], [], "at least one"),
        (PICTURES, [[PANEL], [LOOKS]], "picture 1 must have the same panels as picture 0"),
        (PICTURES[:1], [[]], "picture 0 must have the same panels"),
        (PICTURES[:1], [[plots.LooksPanel("v", np.ones((1, 1, 15)))]], "15 patches are no square grid"),
    ],
)
def test_kept_tokens_figure_refuses(pictures, panels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plots.kept_tokens_figure(pictures, panels, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_retention_figure(tmp_path, figures):
    plots_accuracy.retention_figure(ROWS, tmp_path / "figures" / "retention.png")
    assert width(tmp_path / "figures" / "retention.png") > 600
    left, right = figures[0].axes
    assert (left.get_xscale(), left.get_title(), right.get_title()) == (
        *("log", "all questions", "without yes/no questions"),
    )
    assert left.get_legend_handles_labels()[1] == ["prior", "lower", "upper", "voco", "random_16", "upper_official"]
    lines = {line.get_label(): line for line in left.lines if not line.get_label().startswith("_")}
    assert lines["prior"].get_ydata()[0] == pytest.approx(67)
    voco, *_ = next(box for box in left.containers if box.get_label() == "voco")
    assert list(voco.get_xdata()) == [1, 4] and list(voco.get_ydata()) == pytest.approx([96, 96.5])
    voco, *_ = next(box for box in right.containers if box.get_label() == "voco")
    assert list(voco.get_ydata()) == pytest.approx([48, 48.25])
    # 65 would touch 64's label, had 64 one; 1, 4, 16 and 65 stand apart.
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "4", "16", "65"]
    mean = result("auto", 1.93, 0.9)
    for rows, ticks in (([*ROWS, mean], ["1", "4", "16", "65"]), ([mean], ["1.93"])):
        plots_accuracy.retention_figure(rows, tmp_path / "means.png")
        assert [tick.get_text() for tick in figures[-1].axes[0].get_xticklabels()] == ticks


def test_families_are_rows_whose_names_differ_in_one_number():
    names = ["VoCo 1", "VoCo 4, shuffled", "VoCo 2", "unshuffle 2 at 4", "unshuffle 2 at 16", "kl 0.5 long"]
    names += ["VoCo 1, shuffled", "mlp 2 @4", "mlp 3 @4", "mlp 2 @16", "16", "4"]
    joined = plots_accuracy.families([result(name, 4, 0.5) for name in names])
    assert {name: [row.method for row in members] for name, members in joined.items()} == {
        "VoCo": ["VoCo 1", "VoCo 2"],
        "VoCo, shuffled": ["VoCo 4, shuffled", "VoCo 1, shuffled"],
        "unshuffle 2 at": ["unshuffle 2 at 4", "unshuffle 2 at 16"],
        "kl 0.5 long": ["kl 0.5 long"],
        "mlp 2": ["mlp 2 @4", "mlp 2 @16"],
        "mlp 3 @4": ["mlp 3 @4"],
        "16": ["16"],
        "4": ["4"],
    }


def test_a_panel_for_each_type_of_question(tmp_path, figures):
    """Two types, of which one row answers one alone; a variant of a family looks like it, but hollow and dashed."""
    scores = {"VoCo 1": (0.9, 0.4), "VoCo 4": (0.95, 0.6), "VoCo 4, shuffled": (0.5, 0.3), "upper": (1.0, 0.7)}
    rows = [dataclasses.replace(ROWS[0], accuracy_by_type={"order": 0.2})]
    for name, values in scores.items():
        row = result(name, 4 if "4" in name else 1, 0.5, spread=0.1)
        rows.append(dataclasses.replace(row, accuracy_by_type=dict(zip(("order", "count"), values))))
    plots_accuracy.types_figure(rows, tmp_path / "types.png", lines=("prior", "upper"))
    count, order = figures[0].axes
    assert (count.get_title(), order.get_title()) == ("count", "order")
    for axes, values in ((count, [40, 60]), (order, [90, 95])):
        voco, shuffled = axes.containers
        assert list(voco[0].get_ydata()) == pytest.approx(values) and not voco.has_yerr
        assert voco[0].get_color() == shuffled[0].get_color() and voco[0].get_marker() == shuffled[0].get_marker()
        assert (voco[0].get_linestyle(), shuffled[0].get_linestyle()) == ("-", "--")
        assert (voco[0].get_markerfacecolor(), shuffled[0].get_markerfacecolor()) == (voco[0].get_color(), "white")
    for axes, levels in ((count, [70]), (order, [20, 100])):
        found = [line.get_ydata()[0] for line in axes.lines if line.get_label() in ("prior", "upper")]
        assert found == pytest.approx(levels)
    with pytest.raises(ValueError, match="at least one row with accuracies by type"):
        plots_accuracy.types_figure(ROWS, tmp_path / "none.png")


def test_titles_are_as_wide_as_their_panels(tmp_path, figures):
    """A single narrow column with a long title: in lines, inside of the figure and above the panel."""
    title = "4 VoCo tokens from the cells of a grid: where each token looks"
    narrow = plots.LooksPanel(title, np.random.default_rng(0).random((2, 2, 16)))
    for panel in (narrow, dataclasses.replace(PANEL, title="a selector with quite a long name, and then some more")):
        plots.kept_tokens_figure(PICTURES[:1], [[panel]], tmp_path / "narrow.png")
        figure = figures[-1]
        figure.draw_without_rendering()
        titled = [axes for axes in figure.axes if axes.get_title() not in ("", "picture")]
        [box] = [axes.title.get_window_extent() for axes in titled]
        right, top = figure.canvas.get_width_height()
        assert box.x0 >= 0 and box.x1 <= right and box.y1 <= top
        assert box.y0 >= max(axes.get_window_extent().y1 for axes in figure.axes)
        assert titled[0].get_title().replace("\n", " ").startswith(panel.title)


def test_no_two_labels_of_the_retention_figure_overlap(tmp_path, figures):
    rows = [*ROWS, *[result(f"visionzip_{n}", n, 0.9) for n in (14, 15, 17, 60, 64)]]
    rows = [*rows, *[result(f"a_rather_long_name_of_kind_{c}", 2, 0.9) for c in "abcdef"]]
    plots_accuracy.retention_figure(rows, tmp_path / "retention.png")
    (figure,) = figures
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    boxes += [axes.title.get_window_extent() for axes in figure.axes]
    for axes in figure.axes:
        boxes += [tick.get_window_extent() for tick in axes.get_xticklabels()] + [axes.xaxis.label.get_window_extent()]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    right, top = figure.canvas.get_width_height()
    looks = {(box[0].get_color(), box[0].get_marker()) for box in figure.axes[0].containers}
    assert len(looks) == len(figure.axes[0].containers) == 10
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= right and box.y1 <= top for box in boxes)


def test_the_legend_is_inside_of_the_figure(tmp_path, figures):
    """Of four columns where names are short, of fewer where they are long."""
    columns = []
    for number, word in enumerate(("a", "trained with a loss of its own and another one of its teacher")):
        rows = [*ROWS, *(result(f"{word} {letter}", 2, 0.9) for letter in "bcdefghij")]
        plots_accuracy.retention_figure(rows, tmp_path / f"{number}.png")
        figures[number].draw_without_rendering()
        [legend] = figures[number].legends
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figures[number].bbox.width and box.y0 >= 0
        columns.append(legend._ncols)
    assert columns[0] == 4 > columns[1]


def test_retention_figure_without_rows_or_points(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        plots_accuracy.retention_figure([], tmp_path / "x.png")
    plots_accuracy.retention_figure(ROWS[:1], tmp_path / "only_a_line.png")
    assert (tmp_path / "only_a_line.png").exists()


def test_every_method_of_a_sweep_is_in_one_column():
    names = [line.name for line in methods.lines()] + list(sweep_methods.VARIANTS) + ["VoCo"]
    kinds = {name: plots_sweep.kind(name) for name in names}
    assert set(kinds.values()) == set(plots_sweep.KINDS)
    expected = {
        "baselines": ("random", "uniform", "downsample", "cls_attention", "cls_attention_lowest"),
        "by attention": ("visionzip", "prumerge", "holov_restore"),
        "by similarity": ("tome", "divprune_restore", "cdpruner"),
        "in the language model": ("fastv", "sparsevlm_plus"),
        "trained": ("qformer", "mlp_pool", "voco", "VoCo"),
    }
    assert {name: kinds[name] for column in expected.values() for name in column} == {
        name: column for column, members in expected.items() for name in members
    }


def test_the_figure_of_a_sweep_joins_methods_and_shows_others_in_grey(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots_sweep.plots, "_save", lambda figure, path: drawn.append(figure))
    costs = [("lower", None), ("random 4", 2e6), ("random 1", 1e6), ("fastv 32", 4e6), ("VoCo 1", 1e6)]
    rows = [result(name, 1, 0.5, prefill_flops=flops, picture_flops=1e6) for name, flops in costs]
    plots_sweep.flops_figure(rows, tmp_path / "x.png", lines=("lower",))
    above, below = drawn[0].axes[:3], drawn[0].axes[3:]
    assert [axes.get_title() for axes in above] == ["baselines", "in the language model", "trained"]
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in below]
    assert labels == [["lower", "random"], ["lower", "fastv"], ["lower", "VoCo"]]
    for axes, more in zip((above[0], below[0]), (0, 1e6)):
        [line] = [line for line in axes.get_lines() if line.get_label() == "random"]
        assert line.get_xdata().tolist() == [1e6 + more, 2e6 + more]
        assert len([line for line in axes.get_lines() if line.get_color() == "0.86"]) == 2
    with pytest.raises(ValueError, match="at least one row with prefill FLOPs"):
        plots_sweep.flops_figure(rows[:1], tmp_path / "x.png", lines=())
