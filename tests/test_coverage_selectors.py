"""SCOPE and MMTok, which cover the picture, against plain loops."""

import itertools

import jax
import numpy as np
import pytest

from tokzip_jax.compress import ops
from tokzip_jax.compress.mmtok import covering as cover_both
from tokzip_jax.compress.mmtok import mmtok, spread
from tokzip_jax.compress.scope import covering, scope

RNG = np.random.default_rng(0)
BATCH, PATCHES, WORDS = 6, 20, 4
FEATURES = RNG.standard_normal((BATCH, PATCHES, 6)).astype(np.float32)
SALIENCY = RNG.random((BATCH, PATCHES), np.float32)
TEXT = np.tanh(RNG.standard_normal((BATCH, WORDS, PATCHES))).astype(np.float32)
TEXT_VALID = RNG.random((BATCH, WORDS)) < 0.7


def cosines(x):
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


def scope_loop(x, saliency, tokens, alpha, combine):
    similarity, cover, chosen = cosines(x), np.zeros(len(x)), []
    while len(chosen) < tokens:
        best, best_gain = None, -np.inf
        for j in range(len(x)):
            gain = sum(max(0.0, similarity[i, j] - cover[i]) for i in range(len(x)))
            weight = float(saliency[j]) ** alpha
            gain = gain * weight if combine == "multiply" else gain + weight
            if j not in chosen and gain > best_gain:
                best, best_gain = j, gain
        chosen.append(best)
        cover = np.maximum(cover, similarity[best])
    return chosen


@pytest.mark.parametrize(("alpha", "combine"), [(0.5, "multiply"), (1.0, "add")])
def test_scope_equals_the_loop(alpha, combine):
    result = scope(FEATURES, SALIENCY, tokens=7, alpha=alpha, combine=combine)
    expected = [scope_loop(x, s, 7, alpha, combine) for x, s in zip(FEATURES, SALIENCY, strict=True)]
    np.testing.assert_array_equal(result.position_BM, np.sort(expected, axis=1))


def test_scope_at_alpha_0_forgets_the_saliency():
    # Against no loop: two patches that cover one another alone gain the same, and rounding decides between them.
    one, other = (scope(FEATURES, saliency, tokens=7, alpha=0.0).position_BM for saliency in (SALIENCY, SALIENCY**3))
    np.testing.assert_array_equal(one, other)


def test_scope_chooses_in_the_order_of_the_loop():
    everywhere = np.ones((BATCH, PATCHES), bool)
    order, _ = jax.jit(covering, static_argnums=(3, 4))(
        ops.cosine(FEATURES, FEATURES), SALIENCY, everywhere, 7, "multiply"
    )
    expected = [scope_loop(x, s, 7, 1.0, "multiply") for x, s in zip(FEATURES, SALIENCY, strict=True)]
    np.testing.assert_array_equal(order, expected)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def mmtok_weights(x, text, valid, alpha, text_temperature, vision_temperature):
    """Rows of words and of patches, each spread over the patches: [words + patches, patches]."""
    words = [softmax(row.astype(np.float64) / text_temperature) / max(valid.sum(), 1) for row in text[valid]]
    patches = [alpha * softmax(row / vision_temperature) / len(x) for row in cosines(x)]
    return np.array(words + patches)


def covered(weights, members):
    return weights[:, list(members)].max(axis=1).sum()


def mmtok_loop(weights, tokens):
    """Always the patch with which the set covers most: the definition, with no state between two choices."""
    chosen = []
    while len(chosen) < tokens:
        rest = [j for j in range(weights.shape[1]) if j not in chosen]
        chosen.append(max(rest, key=lambda j: covered(weights, [*chosen, j])))
    return chosen


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "text_temperature": 0.02, "vision_temperature": 0.2},
        {"alpha": 3.0, "text_temperature": 0.3, "vision_temperature": 0.05},
    ],
)
def test_mmtok_equals_the_loop(options):
    result = mmtok(FEATURES, TEXT, tokens=7, text_valid_BT=TEXT_VALID, **options)
    rows = zip(FEATURES, TEXT, TEXT_VALID, strict=True)
    expected = [mmtok_loop(mmtok_weights(x, text, valid, **options), 7) for x, text, valid in rows]
    np.testing.assert_array_equal(result.position_BM, np.sort(expected, axis=1))


def test_mmtok_defaults_are_the_published_ones():
    default = mmtok(FEATURES, TEXT, tokens=7)
    named = mmtok(FEATURES, TEXT, tokens=7, alpha=0.5, text_temperature=0.02, vision_temperature=0.2)
    np.testing.assert_array_equal(default.position_BM, named.position_BM)
    other = mmtok(FEATURES, TEXT, tokens=7, alpha=5.0)
    assert np.any(default.position_BM != other.position_BM)


def test_mmtok_without_a_question_covers_the_picture_alone():
    result = mmtok(FEATURES, TEXT[:, :0], tokens=7)
    nothing = mmtok(FEATURES, TEXT, tokens=7, text_valid_BT=np.zeros_like(TEXT_VALID))
    expected = [mmtok_loop(mmtok_weights(x, TEXT[0, :0], TEXT_VALID[0, :0], 0.5, 0.02, 0.2), 7) for x in FEATURES]
    np.testing.assert_array_equal(result.position_BM, np.sort(expected, axis=1))
    np.testing.assert_array_equal(nothing.position_BM, result.position_BM)


def test_mmtok_weights_of_a_row_sum_to_its_share():
    valid = RNG.random((BATCH, PATCHES)) < 0.7
    weights = np.asarray(spread(TEXT, 0.1, TEXT_VALID, valid))
    total = weights.sum(axis=1)
    share = TEXT_VALID / np.maximum(TEXT_VALID.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(total, share, atol=1e-6)
    assert not weights[~valid].any()


def test_cover_is_within_the_greedy_bound_of_the_best_set():
    # Coverage is monotone and submodular: greedy reaches 1 - 1/e of the best (Nemhauser et al. 1978).
    weights = RNG.random((3, 8, 5)).astype(np.float32)  # [B, P, R]
    _, chosen = cover_both(weights, np.ones((3, 8), bool), 3)
    for row in range(3):
        best = max(covered(weights[row].T, members) for members in itertools.combinations(range(8), 3))
        found = covered(weights[row].T, np.flatnonzero(chosen[row]))
        assert (1 - 1 / np.e) * best <= found <= best + 1e-6
