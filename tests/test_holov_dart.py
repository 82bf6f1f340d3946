"""HoloV and DART against plain loops."""

import numpy as np
import pytest

from tokzip_jax.compress.dart import dart, shares
from tokzip_jax.compress.holov import crop_index, holov

RNG = np.random.default_rng(0)
BATCH, PATCHES = 6, 20
FEATURES = RNG.standard_normal((BATCH, PATCHES, 6)).astype(np.float32)
# Few patches draw most of the attention, so that shares outgrow their crops.
ATTENTION = (RNG.random((BATCH, PATCHES)) ** 6).astype(np.float32)
KEYS = RNG.standard_normal((BATCH, PATCHES, 5)).astype(np.float32)
QUESTION = RNG.standard_normal((BATCH, 3, 6)).astype(np.float32)


def crop_score(x, attention, alpha):
    """The released formula, patch by patch."""
    number = len(x)
    if number == 1:
        return attention[0]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    variances = []
    for i in range(number):
        similarity = [unit[i] @ unit[j] if j != i else 0.0 for j in range(number)]
        mean = sum(similarity) / (number - 1)
        variances.append(sum((s - mean) ** 2 for s in similarity) / (number - 1))
    scaled = [1000 * a for a in attention]
    scaling = np.mean(np.abs(scaled)) / (np.mean(np.abs(variances)) + 1e-6)
    return np.mean([a + alpha * v * scaling for a, v in zip(scaled, variances, strict=True)])


def holov_loop(x, attention, tokens, crops, alpha, overflow):
    x, attention = x.astype(np.float64), attention.astype(np.float64)
    base, extra = divmod(len(x), crops)
    members, start = [], 0
    for crop in range(crops):
        members.append(list(range(start, start + base + (crop < extra))))
        start += base + (crop < extra)
    score = np.array([crop_score(x[m], attention[m], alpha) for m in members])
    weight = score / (score.sum() + 1e-6)
    share = np.floor(weight * tokens).astype(int)
    best_first = sorted(range(crops), key=lambda c: (-weight[c], c))
    for crop in best_first[: tokens - share.sum()]:
        share[crop] += 1
    share = np.minimum(share, [len(m) for m in members])
    while overflow == "redistribute" and share.sum() < tokens:
        room = [c for c in best_first if share[c] < len(members[c])]
        for crop in room[: tokens - share.sum()]:
            share[crop] += 1
    chosen = []
    for crop, mine in enumerate(members):
        chosen += sorted(mine, key=lambda i: (-attention[i], i))[: share[crop]]
    return sorted(chosen)


@pytest.mark.parametrize(
    ("tokens", "crops", "alpha", "overflow"),
    [
        (15, 3, 0.09, "official"),
        (9, 16, 0.09, "official"),
        (15, 3, 0.09, "redistribute"),
        (12, 6, 3.0, "redistribute"),
        (8, 20, 0.09, "redistribute"),
    ],
)
def test_holov_equals_the_loop(tokens, crops, alpha, overflow):
    result = holov(FEATURES, ATTENTION, tokens=tokens, crops=crops, alpha=alpha, overflow=overflow)
    for row in range(BATCH):
        expected = holov_loop(FEATURES[row], ATTENTION[row], tokens, crops, alpha, overflow)
        filled = len(expected)
        np.testing.assert_array_equal(result.position_BM[row, :filled], expected)
        np.testing.assert_array_equal(result.valid_BM[row], np.arange(tokens) < filled)
        assert filled == tokens or overflow == "official"


def test_holov_official_leaves_slots_empty_where_a_crop_is_too_small():
    # Otherwise the loop above would compare nothing of the overflow.
    result = holov(FEATURES, ATTENTION, tokens=15, crops=3)
    assert not bool(result.valid_BM.all())


def test_holov_gives_a_crop_the_share_of_its_attention():
    attention = np.full((1, PATCHES), 1e-3, np.float32)
    attention[0, 15:] = 0.1
    result = holov(FEATURES[:1], attention, tokens=5, crops=4, overflow="redistribute")
    np.testing.assert_array_equal(result.position_BM[0], np.arange(15, 20))


def test_crops_are_runs_of_the_raster_and_the_first_take_the_rest():
    table = crop_index(11, 4)
    np.testing.assert_array_equal(table, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, -1]])


def dart_loop(x, keys, question, tokens, pivots):
    x, number = x.astype(np.float64), len(x)
    norm = np.abs(keys.astype(np.float64)).sum(axis=1)
    image = sorted(sorted(range(number), key=lambda i: (-norm[i], i))[:pivots])
    vectors = [x[i] for i in image] + [q.astype(np.float64) for q in question]
    chosen, rest = list(image), tokens - pivots
    for place, vector in enumerate(vectors):
        share = rest // len(vectors) + (place < rest % len(vectors))
        cosine = [row @ vector / np.linalg.norm(row) / np.linalg.norm(vector) for row in x]
        free = [i for i in range(number) if i not in chosen]
        chosen += sorted(free, key=lambda i: (cosine[i], i))[:share]
    return sorted(chosen)


@pytest.mark.parametrize(("tokens", "pivots", "asked"), [(9, 2, True), (9, 4, False), (5, 4, True), (7, 7, True)])
def test_dart_equals_the_loop(tokens, pivots, asked):
    question = QUESTION if asked else QUESTION[:, :0]
    result = dart(FEATURES, KEYS, tokens=tokens, pivots=pivots, question_BTH=question if asked else None)
    rows = zip(FEATURES, KEYS, question, strict=True)
    np.testing.assert_array_equal(result.position_BM, [dart_loop(*row, tokens, pivots) for row in rows])


def test_dart_gives_what_the_released_rule_gives_for_its_own_counts():
    # floor(16 / (2 + 2)) = 4 patches a pivot, and the picture's 2 pivots on top: 18.
    assert shares(2 + 4 * (16 // 4), 2, 2) == [4, 4, 4, 4]
    assert shares(10, 3, 0) == [3, 2, 2] and shares(3, 3, 2) == [0] * 5


def test_dart_refuses_a_question_of_another_width():
    with pytest.raises(ValueError, match=r"dart: question has shape \(6, 3, 5\); it must be \(6, any, 6\)"):
        dart(FEATURES, KEYS, tokens=9, question_BTH=QUESTION[:, :, 1:])
