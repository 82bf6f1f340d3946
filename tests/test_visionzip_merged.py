"""VisionZip for merged patches against a plain loop."""

import jax
import numpy as np
import pytest

from tokzip_jax.compress.visionzip_merged import merged_budget, visionzip_merged

RNG = np.random.default_rng(0)
BATCH, GROUPS, WIDTH, HEAD = 4, 24, 6, 5
TOKENS = RNG.standard_normal((BATCH, GROUPS, WIDTH)).astype(np.float32)
SCORE = RNG.random((BATCH, 4 * GROUPS)).astype(np.float32)
KEYS = RNG.standard_normal((BATCH, 4 * GROUPS, HEAD)).astype(np.float32)


def loop(tokens, score, keys, place, dominant, contextual, merge):
    """One picture: (positions, sizes, tokens, source); `place` is the raster place of the groups of score and keys."""
    number = len(tokens)
    group_score, group_key = np.zeros(number), np.zeros((number, keys.shape[1]))
    for listed, raster in enumerate(place):
        group_score[raster] = np.mean([score[4 * listed + i] for i in range(4)])
        group_key[raster] = np.mean([keys[4 * listed + i] for i in range(4)], axis=0)
    unit = group_key / np.linalg.norm(group_key, axis=1, keepdims=True)
    kept = sorted(sorted(range(number), key=lambda g: (-group_score[g], g))[:dominant])
    rest = [g for g in range(number) if g not in kept]
    step = max(1, len(rest) // contextual)
    groups = {rest[j * step]: [] for j in range(contextual)}
    for g in rest:
        if g not in groups:
            groups[max(groups, key=lambda t: unit[g] @ unit[t])].append(g)
    out = tokens.astype(np.float64).copy()
    for target, members in groups.items():
        if members and merge == "official":
            out[target] += tokens[members].mean(axis=0)
        if merge == "paper":
            out[target] = tokens[[target, *members]].mean(axis=0)
    position = sorted([*kept, *groups])
    source = [0] * number
    for slot, g in enumerate(position):
        for member in [g, *groups.get(g, ())]:
            source[member] = slot
    return position, [1 + len(groups.get(g, ())) for g in position], out[position], source


@pytest.mark.parametrize(("merge", "windows"), [("official", True), ("paper", False)])
def test_equals_the_loop(merge, windows):
    place = RNG.permutation(GROUPS) if windows else np.arange(GROUPS)
    result = visionzip_merged(
        TOKENS, SCORE, KEYS, dominant=9, contextual=4, place_G=place if windows else None, merge=merge
    )
    for row in range(BATCH):
        position, size, tokens, source = loop(TOKENS[row], SCORE[row], KEYS[row], place, 9, 4, merge)
        np.testing.assert_array_equal(result.position_BM[row], position)
        np.testing.assert_array_equal(result.size_BM[row], size)
        np.testing.assert_array_equal(result.source_BP[row], source)
        np.testing.assert_allclose(result.tokens_BMD[row], tokens, atol=1e-5)
    assert bool(result.valid_BM.all())


def test_everything_dominant_is_the_picture():
    result = visionzip_merged(TOKENS, SCORE, KEYS, dominant=GROUPS, contextual=0)
    np.testing.assert_array_equal(result.tokens_BMD, TOKENS)
    np.testing.assert_array_equal(result.source_BP, np.tile(np.arange(GROUPS), (BATCH, 1)))


def test_each_group_of_patches_pays_its_own_token():
    found = jax.grad(lambda x: visionzip_merged(x, SCORE, KEYS, dominant=9, contextual=4).tokens_BMD.sum())(TOKENS)
    assert np.isfinite(found).all() and np.all(np.abs(found).sum(axis=2) > 0)


def test_shares_round_down_and_leave_one_contextual_token():
    assert merged_budget(100) == (65, 5) and merged_budget(19) == (12, 1)
    assert merged_budget(10, 0.45, 0.05) == (4, 1)
    for shares in ((-0.1, 0.1), (0.9, 0.2)):
        with pytest.raises(ValueError, match="at least 0 and at most 1 together"):
            merged_budget(10, *shares)


def test_wrong_arguments_are_one_sentence():
    with pytest.raises(ValueError, match=r"25 dominant tokens asked of 24 patches; it must be 0 \.\. 24"):
        visionzip_merged(TOKENS, SCORE, KEYS, dominant=25, contextual=0)
    with pytest.raises(ValueError, match=r"95 patches cannot make 24 equal groups"):
        visionzip_merged(TOKENS, SCORE[:, 1:], KEYS, dominant=9, contextual=4)
    with pytest.raises(ValueError, match=r"keys has shape \(4, 95, 5\); it must be \(4, 96, any\)"):
        visionzip_merged(TOKENS, SCORE, KEYS[:, 1:], dominant=9, contextual=4)
    with pytest.raises(ValueError, match=r"place has shape \(23,\); it must be \(24\)"):
        visionzip_merged(TOKENS, SCORE, KEYS, dominant=9, contextual=4, place_G=np.arange(23))
