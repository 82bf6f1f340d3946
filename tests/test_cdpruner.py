"""CDPruner against determinants: step by step, and against the best set that brute force finds."""

import itertools
import math

import jax
import numpy as np
import pytest

from tokzip_jax.compress.cdpruner import cdpruner, determinantal, scale

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((8, 20, 12)).astype(np.float32)
RELEVANCE = RNG.standard_normal((8, 20)).astype(np.float32)
choose = jax.jit(determinantal, static_argnums=3)


def kernel(x, relevance, sign):
    """L in float64, read from the formula."""
    x, value = x.astype(np.float64), relevance.astype(np.float64) * (-1 if sign == "official" else 1)
    r = (value - value.min() + 1e-6) / (value.max() - value.min())
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return r[:, None] * (unit @ unit.T) * r[None, :]


def determinant(matrix, members):
    return np.linalg.det(matrix[np.ix_(list(members), list(members))])


def loop(matrix, tokens):
    """Always the patch with which the determinant is largest, every determinant computed afresh."""
    chosen = []
    while len(chosen) < tokens:
        rest = [j for j in range(len(matrix)) if j not in chosen]
        chosen.append(max(rest, key=lambda j: determinant(matrix, [*chosen, j])))
    return chosen


@pytest.mark.parametrize("sign", ["official", "plain"])
def test_equals_the_loop_of_determinants(sign):
    everywhere = np.ones((8, 20), bool)
    order, _ = choose(FEATURES, scale(RELEVANCE, everywhere, sign), everywhere, 8)
    expected = [loop(kernel(x, r, sign), 8) for x, r in zip(FEATURES, RELEVANCE, strict=True)]
    np.testing.assert_array_equal(order, expected)
    result = cdpruner(FEATURES, RELEVANCE, tokens=8, sign=sign)
    np.testing.assert_array_equal(result.position_BM, np.sort(expected, axis=1))


def test_the_sign_decides_what_relevant_means():
    relevance = np.where(np.arange(20) < 10, 1.0, 0.0).astype(np.float32)[None].repeat(8, 0)
    assert np.all(np.asarray(cdpruner(FEATURES, relevance, tokens=5, sign="plain").position_BM) < 10)
    assert np.all(np.asarray(cdpruner(FEATURES, relevance, tokens=5).position_BM) >= 10)


def test_greedy_determinant_against_the_best_set():
    # The volume that greedy choice spans is at least 1/k! of the largest (Civril and Magdon-Ismail 2009); the
    # determinant is the square of the volume.
    features, relevance = FEATURES[:, :9], RELEVANCE[:, :9]
    everywhere = np.ones((8, 9), bool)
    order, _ = choose(features, scale(relevance, everywhere, "official"), everywhere, 3)
    for row in range(8):
        matrix = kernel(features[row], relevance[row], "official")
        best = max(determinant(matrix, members) for members in itertools.combinations(range(9), 3))
        found = determinant(matrix, np.asarray(order[row]))
        assert best / math.factorial(3) ** 2 <= found <= best * (1 + 1e-6)


def test_beyond_the_rank_the_most_relevant_follow_and_none_twice():
    flat = FEATURES[:, :, :4]
    everywhere = np.ones((8, 20), bool)
    r = np.asarray(scale(RELEVANCE, everywhere, "official"))
    order, chosen = choose(flat, r, everywhere, 12)
    assert np.all(chosen.sum(axis=1) == 12)
    for row in range(8):
        found = np.asarray(order[row])
        np.testing.assert_array_equal(found[:4], loop(kernel(flat[row], RELEVANCE[row], "official"), 4))
        rest = [j for j in np.argsort(-r[row], kind="stable") if j not in found[:4]]
        np.testing.assert_array_equal(found[4:], rest[:8])


def test_scaled_relevance_runs_from_0_to_1_over_the_valid_patches():
    valid = RNG.random((8, 20)) < 0.5
    valid[:, :2] = True
    r = np.asarray(scale(RELEVANCE, valid, "plain"))
    for row in range(8):
        value = RELEVANCE[row][valid[row]].astype(np.float64)
        np.testing.assert_allclose(r[row][valid[row]], (value - value.min()) / np.ptp(value), atol=1e-5)
        assert not r[row][~valid[row]].any()


def test_equal_relevance_is_a_plain_determinantal_process():
    same = np.full((8, 20), 0.3, np.float32)
    np.testing.assert_array_equal(scale(same, np.ones((8, 20), bool), "official"), np.ones((8, 20)))
    result = cdpruner(FEATURES, same, tokens=5)
    unit = FEATURES.astype(np.float64) / np.linalg.norm(FEATURES.astype(np.float64), axis=2, keepdims=True)
    for row in range(8):
        # Every first determinant is 1 up to rounding: which patch begins is open, what follows is not.
        matrix = unit[row] @ unit[row].T
        members = list(np.asarray(result.position_BM[row]))
        allowed = []
        for first in range(20):
            chosen = [first]
            while len(chosen) < 5:
                rest = [j for j in range(20) if j not in chosen]
                chosen.append(max(rest, key=lambda j: determinant(matrix, [*chosen, j])))
            allowed.append(sorted(chosen))
        assert members in allowed
