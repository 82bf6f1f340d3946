"""The rules of decoder-site methods as functions of arrays, against loops and the official implementation's numbers."""

import jax
import jax.numpy as jnp
import naive_decoder
import numpy as np
import official
import pytest

from tokzip_jax.compress import decoder, fastv, pyramiddrop, sparsevlm

RNG = np.random.default_rng(0)
CLUSTERS = official.read("sparsevlm_cluster")


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_clusters_are_the_official_ones(case):
    x, noise, count = CLUSTERS[f"{case}/x"], CLUSTERS[f"{case}/noise"], int(CLUSTERS[f"{case}/k"])
    found, real = sparsevlm.cluster(
        x, np.ones(x.shape[:2], bool), np.array([count]), clusters=count, noise_BR=jnp.asarray(noise)
    )
    np.testing.assert_allclose(found, CLUSTERS[f"{case}/out"], atol=1e-5)
    assert real.all()


def test_clusters_of_different_sizes_in_one_batch():
    """Rows with fewer tokens and fewer clusters than slots, and one of equal tokens, against the loop."""
    x = RNG.normal(size=(4, 23, 6)).astype(np.float32)
    x[3] = x[3, :1]
    tokens, counts = [23, 14, 1, 9], [3, 2, 1, 2]
    valid = np.arange(23)[None] < np.array(tokens)[:, None]
    found, real = sparsevlm.cluster(x, valid, np.array(counts), clusters=3)
    for row, (size, count) in enumerate(zip(tokens, counts)):
        assert real[row].tolist() == [i < count for i in range(3)]
        expected = naive_decoder.cluster(x[row, :size].astype(np.float64), count)
        np.testing.assert_allclose(found[row, :count], expected, atol=1e-5)


def test_counts_of_recycled_tokens_are_the_released_formula():
    assert sparsevlm.recycled(0) == (0, 0)
    for deleted in range(1, 3000):
        some = int(0.3 * deleted) + 1
        assert sparsevlm.recycled(deleted) == (some, int(some / 10) + 1)


def test_published_schedules_leave_the_published_numbers():
    """Visual tokens of v1.5's stages, kept and merged ones, for 192, 128 and 64 tokens."""
    for keep, after in (
        ((300, 200, 110), [309, 204, 113]),
        ((303, 110, 36), [312, 117, 39]),
        ((66, 30, 17), [82, 32, 18]),
    ):
        steps = decoder.steps("sparsevlm", 576, (3, 7, 16), keep, depth=32)
        assert [step.after for step in steps] == after
    assert pyramiddrop.schedule(576) == (288, 144, 72)
    assert pyramiddrop.schedule(7) == (3, 1, 0)


def test_raters_are_the_loop():
    x = RNG.normal(size=(3, 30, 8)).astype(np.float32)
    vision, text = x[:, :20], x[:, 20:]
    valid, asks = np.ones((3, 20), bool), np.ones((3, 10), bool)
    valid[1, 7:], asks[1, :4], asks[2, 1:] = False, False, False
    found = np.asarray(sparsevlm.raters(vision, valid, text, asks))
    scaled = np.asarray(sparsevlm.raters(vision, valid, text, asks, scaled=True))
    for row in range(3):
        tokens, words = np.flatnonzero(valid[row]), 20 + np.flatnonzero(asks[row])
        wide = x[row].astype(np.float64)
        assert (20 + np.flatnonzero(found[row])).tolist() == naive_decoder.raters(wide, tokens, words)
        # The paper's scale divides the product: as if both sides were shorter by its fourth root.
        assert (20 + np.flatnonzero(scaled[row])).tolist() == naive_decoder.raters(wide / 8**0.25, tokens, words)
    assert found[2].sum() == 1  # one word alone is no better than the average, and rates


def test_rank_and_budgets():
    weights = RNG.random((3, 6, 12)).astype(np.float32)
    weights[1, 3] = weights[1, 1] + weights[1, 2]
    rates, valid = np.ones((3, 6), bool), np.ones((3, 12), bool)
    rates[0, 4:], valid[2, 3:] = False, False
    found = jax.jit(sparsevlm.attention_rank)(weights, rates, valid)
    expected = [np.linalg.matrix_rank(w[r][:, v]) for w, r, v in zip(weights, rates, valid)]
    np.testing.assert_array_equal(found, expected)
    assert expected == [4, 5, 3]
    rank, count = jnp.array([5, 5, 0]), jnp.array([100, 40, 40])
    np.testing.assert_array_equal(sparsevlm.adaptive_keep(rank, count, scale=13.5, bias=0.0), [67, 39, 0])
    np.testing.assert_array_equal(sparsevlm.paper_keep(rank, count, scale=0.5), [53, 23, 20])


def test_select_marks_the_best_up_to_a_count_of_its_own():
    score = np.array([[0.1, 0.5, 0.5, 0.2, 0.9], [0.3, 0.2, 0.1, 0.0, 0.7]], np.float32)
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
    for most, count, expected in (
        (3, [2, 9], [[1, 4], [0, 1, 2]]),
        (5, [3, 9], [[1, 2, 4], [0, 1, 2, 3]]),
        (1, [0, 1], [[], [0]]),
        (0, [1, 1], [[], []]),
    ):
        found = np.asarray(sparsevlm.select(score, valid, np.array(count), most=most))
        assert [np.flatnonzero(row).tolist() for row in found] == expected


def test_gravity_is_a_turned_query_of_ones_with_a_turned_key_of_ones():
    place = RNG.integers(0, 500, (2, 40))
    frequency = 1e4 ** (-np.arange(8) / 8)
    q, k = ((1 + 1j) * np.exp(1j * at[:, None] * frequency) for at in place)
    expected = (q.real * k.real + q.imag * k.imag).sum(axis=1) / 4
    found = sparsevlm.gravity(jnp.asarray(place[0] - place[1]), head_dim=16, theta=1e4)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert float(sparsevlm.gravity(jnp.array(0), head_dim=16, theta=1e4)) == pytest.approx(4.0)


def test_busy_heads_are_those_with_the_most_mass():
    weights = RNG.random((2, 4, 3, 5)).astype(np.float32)
    rates, valid = np.array([[1, 0, 1], [1, 1, 1]], bool), np.array([[1, 1, 0, 1, 1], [1] * 5], bool)
    # Much attention of a row that does not rate, or for an empty slot, is not the raters' attention for the picture.
    weights[0, 1, 1], weights[0, 2, :, 2] = 9.0, 9.0
    found = np.asarray(sparsevlm.busy_heads(weights, rates, valid, heads=2))
    for row in range(2):
        mass = [head[rates[row]][:, valid[row]].sum() for head in weights[row]]
        np.testing.assert_allclose(found[row], weights[row][np.argsort(mass)[-2:]].mean(axis=0), atol=1e-6)


def test_paper_importance_is_the_mean_over_the_tokens_behind():
    weights = RNG.random((2, 3, 7, 4)).astype(np.float32)
    behind = RNG.random((2, 7, 4)) < 0.5
    behind[0, :, 2] = False  # nobody stands behind it
    for keep in (1, 3):
        kept = np.asarray(fastv.fastv_paper(weights, behind, np.ones((2, 4), bool), keep=keep))
        for row in range(2):
            mean = weights[row].mean(axis=0)
            value = [mean[behind[row, :, v], v].mean() if behind[row, :, v].any() else 0.0 for v in range(4)]
            np.testing.assert_array_equal(np.flatnonzero(kept[row]), np.sort(np.argsort(-np.array(value))[:keep]))


GOLDEN_FASTV = official.read("fastv")


@pytest.mark.parametrize("keep", [6, 12])
def test_fastv_keeps_what_the_official_code_keeps(keep):
    rows = np.stack([GOLDEN_FASTV[f"attention_{layer}"][:, 5:29] for layer in range(3)])
    kept = np.asarray(fastv.fastv(rows, np.ones((3, 24), bool), keep=keep))
    for layer in range(3):
        theirs = GOLDEN_FASTV[f"K{layer + 1}_r{keep}/keep"]
        np.testing.assert_array_equal(5 + np.flatnonzero(kept[layer]), theirs[(theirs >= 5) & (theirs < 29)])
        np.testing.assert_allclose(rows[layer].mean(axis=0), GOLDEN_FASTV[f"K{layer + 1}_r{keep}/scores"], atol=1e-6)
