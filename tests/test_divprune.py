"""DivPrune against the official numbers, a plain loop, and the best set that brute force finds."""

import itertools
import pathlib

import jax
import numpy as np
import pytest

from tokzip_jax.compress.divprune import divprune, farthest

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "divprune.npz")
choose = jax.jit(farthest, static_argnums=2)


def distances(x):
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return 1 - unit @ unit.T


def loop(x, tokens):
    """The rule of the paper, pair by pair."""
    distance, number = distances(x), len(x)
    chosen = [max(range(number), key=lambda i: min(distance[i, j] for j in range(number) if j != i))]
    while len(chosen) < tokens:
        rest = [i for i in range(number) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i, j] for j in chosen)))
    return chosen


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_official_choices_in_their_order(case):
    x, expected = GOLDEN[f"{case}/x"][None], GOLDEN[f"{case}/selected_in_order"]
    order, _ = choose(x, np.ones(x.shape[:2], bool), len(expected))
    np.testing.assert_array_equal(order[0], expected)
    result = divprune(x, tokens=len(expected))
    np.testing.assert_array_equal(result.position_BM[0], np.sort(expected))
    np.testing.assert_array_equal(result.tokens_BMD[0], x[0, np.sort(expected)])


def test_equals_the_loop():
    x = np.random.default_rng(0).standard_normal((8, 20, 6)).astype(np.float32)
    order, _ = choose(x, np.ones((8, 20), bool), 7)
    np.testing.assert_array_equal(order, [loop(row, 7) for row in x])


def test_greedy_is_within_half_of_the_best_set():
    # Farthest-point choice is a 2-approximation for metrics (Ravi et al. 1994). The chord between unit vectors is a
    # metric, and 1 - cosine is half its square: within 1/2 there is within 1/4 here.
    x = np.random.default_rng(1).standard_normal((8, 9, 3)).astype(np.float32)
    for tokens in (2, 4):
        order, _ = choose(x, np.ones((8, 9), bool), tokens)
        for row in range(8):
            chord = np.sqrt(2 * np.maximum(distances(x[row]), 0))

            def value(members, chord=chord):
                return min(chord[i, j] for i, j in itertools.combinations(members, 2))

            best = max(value(members) for members in itertools.combinations(range(9), tokens))
            assert best / 2 <= value(np.asarray(order[row])) <= best


def test_a_zero_row_is_one_away_from_everything():
    x = np.array([[[1, 0], [1, 0], [0, 0], [0, 1]]], np.float32)
    order, _ = choose(x, np.ones((1, 4), bool), 3)
    np.testing.assert_array_equal(order, [[2, 0, 3]])
