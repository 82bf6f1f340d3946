"""Numbers of attention against plain loops, and a read-out that finds what was planted and nothing in noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny
from PIL import Image

from tokzip_jax import plots, plots_voco, probe, voco

RNG = np.random.default_rng(0)
LAYERS, ROWS, K, PATCHES = 3, 2, 4, 16
ATTENTION = (RNG.random((LAYERS, ROWS, K, PATCHES)) ** 4).astype(np.float32)
ATTENTION[0, 0, 0] = np.eye(PATCHES)[5]  # one patch only
ATTENTION[0, 0, 1] = 0.01  # all alike
ATTENTION[0, 0, 2] = 0  # nothing
OBJECT = (RNG.random((ROWS, PATCHES)) < 0.3).astype(np.float32)
OBJECT[0, 5] = 1


@pytest.mark.parametrize("overlap", probe.OVERLAPS)
def test_looks_are_plain_loops(overlap):
    found = jax.jit(functools.partial(probe.looks, overlap=overlap))(ATTENTION, OBJECT)
    for layer, row, token in np.ndindex(LAYERS, ROWS, K):
        a = ATTENTION[layer, row, token].astype(np.float64)
        at = (layer, row, token)
        tiny.close(found.spent_LBk[at], a.sum())
        share = a / max(a.sum(), 1e-30)
        tiny.close(found.entropy_LBk[at], -sum(p * np.log(p) for p in share if p > 0))
        tiny.close(found.object_LBk[at], sum(p for p, inside in zip(share, OBJECT[row]) if inside))
        for other in range(K):
            b = ATTENTION[layer, row, other].astype(np.float64)
            b /= max(b.sum(), 1e-30)
            cosine = np.dot(share, b) / max(np.sqrt(np.dot(share, share) * np.dot(b, b)), 1e-30)
            expected = cosine if overlap == "cosine" else np.minimum(share, b).sum()
            tiny.close(found.overlap_LBkk[(*at, other)], expected)
    tiny.close(found.area_B, OBJECT.mean(axis=1))
    assert float(found.entropy_LBk[0, 0, 0]) == 0 and float(found.object_LBk[0, 0, 0]) == 1
    tiny.close(found.entropy_LBk[0, 0, 1], np.log(PATCHES))
    tiny.close(found.object_LBk[0, 0, 1], found.area_B[0])
    tiny.close(np.diagonal(found.overlap_LBkk[1], axis1=1, axis2=2), 1)


def test_looks_do_not_mind_the_scale_and_need_no_mask():
    one, ten = probe.looks(ATTENTION), probe.looks(10 * ATTENTION)
    assert one.object_LBk is None and one.area_B is None
    tiny.close(one.entropy_LBk, ten.entropy_LBk)
    tiny.close(one.overlap_LBkk, ten.overlap_LBkk)
    with pytest.raises(ValueError, match="overlap='iou' is unknown; choose 'cosine' or 'intersection'"):
        probe.looks(ATTENTION, overlap="iou")
    with pytest.raises(ValueError, match=r"the object mask has shape \(2, 9\), but the attention is of \(2, 16\)"):
        probe.looks(ATTENTION, OBJECT[:, :9])


def test_patch_shares_are_in_raster_order():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 0:2, 2:4] = True  # all of patch 1
    mask[0, 6, 0] = True  # a quarter of patch 12
    found = np.asarray(probe.patch_shares(mask, 4))[0]
    assert found[1] == 1 and found[12] == 0.25 and found.sum() == 1.25
    with pytest.raises(ValueError, match="8 x 8 pixels cannot be cut into 3 x 3 patches"):
        probe.patch_shares(mask, 3)


# Read-outs.

COUNT, WIDTH, CLASSES = 400, 60, 4
LABELS = RNG.integers(0, CLASSES, COUNT)
NOISE = RNG.normal(size=(3, COUNT, WIDTH)).astype(np.float32)
TRAIN, TEST = probe.split(COUNT, 0.25, seed=3)


def planted(strength):
    """Layer 0 says nothing, layer 1 says the label along random directions, layer 2 says it very weakly."""
    ways = RNG.normal(size=(CLASSES, WIDTH)) / WIDTH**0.5
    return NOISE + np.array([0, strength, 0.05 * strength])[:, None, None] * ways[LABELS].astype(np.float32)


def test_planted_facts_are_found_and_noise_is_not():
    found = probe.linear_readout(planted(12.0), LABELS, TRAIN, TEST)
    error = np.sqrt(found.majority * (1 - found.majority) / len(TEST))
    assert found.accuracy_L[1] > 0.97
    assert abs(found.accuracy_L[0] - found.chance) < 4 * error
    assert found.accuracy_L[2] < found.accuracy_L[1] - 0.3
    assert found.chance == 0.25 and found.tests == len(TEST) == 100
    most = np.bincount(LABELS[TRAIN]).argmax()
    assert found.majority == np.mean(LABELS[TEST] == most)
    # What says nothing is held down harder than what says much.
    assert found.l2_L[0] > found.l2_L[1]
    # The same features with their labels dealt out anew say nothing.
    shuffled = probe.linear_readout(planted(12.0), np.random.default_rng(1).permutation(LABELS), TRAIN, TEST)
    assert np.all(np.abs(np.asarray(shuffled.accuracy_L) - 0.25) < 0.16)


def test_more_features_than_pictures_are_no_trap():
    """Any labels of 30 pictures can be fitted with 60 features; the test pictures tell."""
    few, rest = TRAIN[:30], np.concatenate([TRAIN[30:], TEST])
    found = probe.linear_readout(planted(12.0), LABELS, few, rest)
    assert abs(found.accuracy_L[0] - 0.25) < 0.1 and found.accuracy_L[1] > 0.4


def test_the_read_out_is_ridge_regression_with_the_best_left_out_rows():
    """Accuracy and regularisation by solving normal equations in float64 anew for every picture left out."""
    features, labels, l2 = planted(4.0)[1:2, :60, :7], LABELS[:60], (0.01, 0.3, 3.0)
    train, test = np.arange(40), np.arange(40, 60)
    found = probe.linear_readout(features, labels, train, test, l2=l2)
    x = features[0].astype(np.float64)
    x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    y = np.eye(CLASSES)[labels]

    def fitted(rows, strength):
        # The mean is fitted too, without regularisation; the strength stays that of all 40 pictures.
        wide = np.concatenate([x[rows], np.ones((len(rows), 1))], axis=1)
        penalty = strength * 40 * np.diag([1.0] * 7 + [0.0])
        weights = np.linalg.solve(wide.T @ wide + penalty, wide.T @ y[rows])
        return lambda at: np.argmax(np.append(x[at], 1) @ weights)

    right = [np.mean([fitted(np.delete(train, i), s)(i) == labels[i] for i in train]) for s in l2]
    best = max(zip(right, l2))[1]
    assert len(set(right)) == 3 and float(found.l2_L[0]) == pytest.approx(best)
    expected = np.mean([fitted(train, best)(at) == labels[at] for at in test])
    assert float(found.accuracy_L[0]) == pytest.approx(expected)


def test_facts_together_are_facts_one_by_one():
    """Facts of 2 to 4 labels that share a decomposition, each with its own regularisation and baselines."""
    features = planted(2.0)
    labels = np.stack([LABELS, LABELS // 2, np.roll(LABELS, 1), np.minimum(LABELS, 2)], axis=1)
    together = probe.linear_readouts(features, labels, TRAIN, TEST)
    assert [found.chance for found in together] == [1 / 4, 1 / 2, 1 / 4, 1 / 3]
    for fact in range(1, 4):
        alone = probe.linear_readout(features, labels[:, fact], TRAIN, TEST)
        np.testing.assert_array_equal(together[fact].accuracy_L, alone.accuracy_L)
        np.testing.assert_array_equal(together[fact].l2_L, alone.l2_L)
        assert together[fact].majority == alone.majority
    assert len({tuple(np.asarray(found.l2_L)) for found in together}) > 1


def test_constant_features_and_labels():
    features = planted(12.0).copy()
    features[:, :, :20] = 7.0
    assert probe.linear_readout(features, LABELS, TRAIN, TEST).accuracy_L[1] > 0.8
    with pytest.raises(ValueError, match="all pictures have the label 2: there is nothing to read out"):
        probe.linear_readout(features, np.full(COUNT, 2), TRAIN, TEST)
    with pytest.raises(ValueError, match=r"labels must be integers >= 0, one for each of the 400 pictures"):
        probe.linear_readout(features, LABELS - 1, TRAIN, TEST)
    with pytest.raises(ValueError, match=r"one for each of the 400 pictures; they are of 7 pictures"):
        probe.linear_readout(features, LABELS[:7], TRAIN, TEST)


def test_split():
    assert sorted([*TRAIN, *TEST]) == list(range(COUNT)) and len(TEST) == 100
    np.testing.assert_array_equal(probe.split(COUNT, 0.25, seed=3)[1], TEST)
    assert list(probe.split(COUNT, 0.25, seed=4)[1]) != list(TEST)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"test_share={share} of 4 pictures"):
            probe.split(4, share)


def cache(positions):
    rng = np.random.default_rng(2)
    k, v = rng.normal(size=(2, 3, 5, 2, 4, 6)).astype(np.float32)  # [L, B, K, m, H]
    ints = {name: jnp.ones((5, 4), jnp.int32) for name in ("kind", "segment")}
    return voco.VocoCache(k, v, position=jnp.asarray(positions), next_position=jnp.ones(5), voco_mask="voco", **ints)


def test_features_of_a_cache():
    ours = cache(np.tile(np.arange(4), (5, 1)))
    keys, values, both = (probe.features(ours, which) for which in probe.FEATURES)
    assert keys.shape == values.shape == (3, 5, 48) and both.shape == (3, 5, 96)
    # Slot by slot, so that a token's numbers stand together.
    np.testing.assert_array_equal(keys[1, 2].reshape(4, 2, 6), ours.k[1, 2].swapaxes(0, 1))
    np.testing.assert_array_equal(both[..., 48:], values)
    with pytest.raises(ValueError, match="stand at different positions; build the cache with positions='compact'"):
        probe.features(cache(np.arange(20).reshape(5, 4)))
    with pytest.raises(ValueError, match="features 'queries' are unknown; choose one of 'keys', 'values', 'both'"):
        probe.features(ours, "queries")


@pytest.fixture
def figures(monkeypatch):
    seen = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (seen.append(figure), save(figure, path)))
    return seen


def readout(accuracy, majority):
    return probe.Readout(np.array(accuracy, np.float32), np.ones(len(accuracy)), majority, 0.25, 100)


KINDS = {"keys": readout([0.3, 0.6, 0.9], 0.3), "both": readout([0.5, 0.5, 0.7], 0.3), "pooled": readout([0.8], 0.3)}


def test_learned_figure(tmp_path, figures):
    numbers, lower = probe.looks(ATTENTION, OBJECT), probe.looks(ATTENTION[::-1], OBJECT)
    path = tmp_path / "figures" / "learned.png"
    facts = dict.fromkeys(("color", "shape", "count", "row"), KINDS)
    plots_voco.learned_figure(numbers, facts, path, untrained=lower)
    with Image.open(path) as picture:
        assert picture.size[0] > 1000
    spent, wide, alike, objects, color, _, count, row, *hidden = figures[0].axes
    titles = [axes.get_title() for axes in (spent, wide, color, row)]
    assert titles == ["attention on patches, %", "patches looked at", "color", "row"]
    assert [axes.get_visible() for axes in (count, row, *hidden)] == [True, True, False, False]
    for axes, values, other in (
        (spent, 100 * numbers.spent_LBk, 100 * lower.spent_LBk),
        (wide, np.exp(numbers.entropy_LBk), np.exp(lower.entropy_LBk)),
        (objects, 100 * numbers.object_LBk, 100 * lower.object_LBk),
    ):
        for token, line in enumerate(axes.lines[:K]):
            np.testing.assert_allclose(line.get_ydata(), np.mean(values[:, :, token], axis=1), rtol=1e-6)
            assert list(line.get_xdata()) == [1, 2, 3] and line.get_label() == f"token {token + 1}"
        np.testing.assert_allclose(axes.lines[K].get_ydata(), np.mean(other, axis=(1, 2)), rtol=1e-6)
    for line, each in zip(alike.lines, (numbers, lower)):
        overlap = np.asarray(each.overlap_LBkk)[:, :, *np.triu_indices(K, 1)].mean(axis=(1, 2))
        np.testing.assert_allclose(line.get_ydata(), overlap, rtol=1e-5)
    assert objects.lines[-1].get_ydata()[0] == pytest.approx(100 * OBJECT.mean())
    keys, both, pooled, majority = color.lines
    assert list(keys.get_ydata()) == pytest.approx([30, 60, 90])
    assert list(both.get_ydata()) == pytest.approx([50, 50, 70])
    assert list(pooled.get_ydata()) == pytest.approx([80, 80]) and list(majority.get_ydata()) == [30, 30]
    shade = color.patches[0].get_extents().transformed(color.transData.inverted())
    assert (shade.y0 + shade.y1) / 2 == pytest.approx(30) and shade.height == pytest.approx(400 * np.sqrt(0.21 / 100))
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (objects, figures[0].axes[6])]
    assert legends[0] == [*(f"token {n}" for n in range(1, 5)), "untrained"]
    assert legends[1] == [*KINDS, "majority"]


def test_learned_figure_of_one_token_without_facts(tmp_path, figures):
    plots_voco.learned_figure(probe.looks(ATTENTION[:, :, :1]), {}, tmp_path / "one.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["attention on patches, %", "patches looked at"]
    with pytest.raises(ValueError, match=r"readouts\['color'\] holds nothing that it was read from"):
        plots_voco.learned_figure(probe.looks(ATTENTION), {"color": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
