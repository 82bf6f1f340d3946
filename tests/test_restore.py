"""RESTORE's merging against a plain loop, and its attention bias against the formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax.attention import attend
from tokzip_jax.compress import visionzip
from tokzip_jax.compress.divprune import divprune
from tokzip_jax.compress.restore import restore, restore_bias

RNG = np.random.default_rng(0)
BATCH, PATCHES, WIDTH = 5, 20, 6
FEATURES = RNG.standard_normal((BATCH, PATCHES, WIDTH)).astype(np.float32)
BASE = divprune(FEATURES, tokens=4)


def loop(x, kept, tokens, free):
    """One picture: slots as (position, size, token, members), in raster order."""
    x = x.astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    standing = {i: sum(cosine[i, j] for j in free) for i in free}
    score = {}
    for i in free:
        higher = [cosine[i, j] for j in free if standing[j] > standing[i]]
        score[i] = standing[i] * (1 - max(higher) if higher else 1.0)
    anchors = sorted(sorted(free, key=lambda i: (-score[i], i))[: tokens - len(kept)])
    groups = {i: [i] for i in anchors}
    for i in free:
        if i not in anchors:
            groups[max(anchors, key=lambda a: cosine[i, a])].append(i)
    slots = [(i, 1, x[i], [i]) for i in kept]
    for members in groups.values():
        members = sorted(members)
        slots.append((members[(len(members) - 1) // 2], len(members), x[members].mean(axis=0), members))
    return sorted(slots, key=lambda slot: slot[0])


def assert_like_loop(result, kept, tokens, free):
    for row in range(BATCH):
        slots = loop(FEATURES[row], kept[row], tokens, free[row])
        np.testing.assert_array_equal(result.position_BM[row, : len(slots)], [slot[0] for slot in slots])
        np.testing.assert_array_equal(result.size_BM[row, : len(slots)], [slot[1] for slot in slots])
        np.testing.assert_allclose(result.tokens_BMD[row, : len(slots)], [slot[2] for slot in slots], atol=1e-5)
        np.testing.assert_array_equal(result.valid_BM[row], np.arange(tokens) < len(slots))
        source = np.full(PATCHES, -1)
        for number, slot in enumerate(slots):
            source[slot[3]] = number
        np.testing.assert_array_equal(result.source_BP[row], source)


@pytest.mark.parametrize("tokens", [9, PATCHES])
def test_equals_the_loop(tokens):
    kept = [np.asarray(row) for row in BASE.position_BM]
    free = [[i for i in range(PATCHES) if i not in row] for row in kept]
    result = restore(BASE, FEATURES, tokens=tokens)
    assert_like_loop(result, kept, tokens, free)
    assert np.all(result.size_BM.sum(axis=1) == PATCHES)


def test_the_whole_budget_gives_the_picture_back():
    result = restore(BASE, FEATURES, tokens=PATCHES)
    np.testing.assert_allclose(result.tokens_BMD, FEATURES, atol=1e-7)
    np.testing.assert_array_equal(result.position_BM, np.tile(np.arange(PATCHES), (BATCH, 1)))


def test_padding_takes_no_part_and_slots_may_stay_empty():
    valid = RNG.random((BATCH, PATCHES)) < 0.6
    valid[0] = np.arange(PATCHES) < 5  # one patch is left to merge, for five slots
    base = divprune(FEATURES, tokens=4, valid_BP=valid)
    kept = [np.asarray(row) for row in base.position_BM]
    free = [[i for i in range(PATCHES) if valid[r, i] and i not in kept[r]] for r in range(BATCH)]
    result = restore(base, FEATURES, tokens=9, valid_BP=valid)
    assert_like_loop(result, kept, 9, free)
    np.testing.assert_array_equal(result.valid_BM.sum(axis=1), np.minimum(valid.sum(axis=1), 9))
    assert not np.any(result.tokens_BMD[0, 5:]) and np.all(result.position_BM[0, 5:] == -1)
    painted = restore(base, np.where(valid[:, :, None], FEATURES, np.float32(np.nan)), tokens=9, valid_BP=valid)
    jax.tree.map(np.testing.assert_array_equal, painted, result)


def test_a_selection_with_a_cls_token_may_come_before():
    cls, attention = FEATURES[:, 0] + 1, RNG.random((BATCH, PATCHES)).astype(np.float32)
    base = visionzip(FEATURES, cls, attention, np.zeros((BATCH, 1 + PATCHES, 2)), dominant=4, contextual=0)
    result = restore(base, FEATURES, tokens=9)
    np.testing.assert_array_equal(result.tokens_BMD[:, 0], cls)
    assert np.all(result.position_BM[:, 0] == -1) and np.all(np.diff(result.position_BM, axis=1) > 0)
    np.testing.assert_array_equal(result.size_BM.sum(axis=1), PATCHES)
    for row in range(BATCH):
        counted = np.bincount(np.asarray(result.source_BP[row]), minlength=9)
        np.testing.assert_array_equal(counted, result.size_BM[row])


def test_a_picture_does_not_feel_its_neighbours_and_jit_is_eager():
    mixed = np.concatenate([FEATURES[:1], 3 * RNG.standard_normal(FEATURES[1:].shape).astype(np.float32)])
    one = jax.tree.map(lambda x: x[:1], restore(BASE, FEATURES, tokens=9))
    base = jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y[1:]]), BASE, divprune(mixed, tokens=4))
    with jax.disable_jit():
        eager = restore(jax.tree.map(lambda x: x[:1], BASE), jnp.asarray(FEATURES[:1]), tokens=9)
    for other in (jax.tree.map(lambda x: x[:1], restore(base, mixed, tokens=9)), eager):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradient_is_that_of_the_means():
    weight = RNG.standard_normal((BATCH, 9, WIDTH)).astype(np.float32)

    def loss(x):
        result = restore(BASE, x, tokens=9)
        return jnp.sum(weight * result.tokens_BMD), result

    found, result = jax.grad(loss, has_aux=True)(FEATURES)
    expected = np.zeros_like(FEATURES)
    for row in range(BATCH):
        for patch, slot in enumerate(np.asarray(result.source_BP[row])):
            if patch not in BASE.position_BM[row]:  # the kept tokens came in as numbers
                expected[row, patch] = weight[row, slot] / int(result.size_BM[row, slot])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bfloat16_chooses_and_averages_in_float32():
    half = jnp.asarray(FEATURES, jnp.bfloat16)
    base = dataclasses.replace(BASE, tokens_BMD=BASE.tokens_BMD.astype(jnp.bfloat16))
    result = restore(base, half, tokens=9)
    full = restore(BASE, half.astype(jnp.float32), tokens=9)
    assert result.tokens_BMD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.source_BP, full.source_BP)
    np.testing.assert_array_equal(result.tokens_BMD, full.tokens_BMD.astype(jnp.bfloat16))


def test_bias_equals_the_formula():
    query, key = np.array([[0, 40, 611]]), np.array([[0, 35, 610, 2]])
    size = np.array([[1, 7, 2.5, 0]])
    found = restore_bias(query, key, size, head_dim=8, theta=100.0, offset=2.5)
    for t in range(3):
        for s in range(4):
            distance = abs(query[0, t] - key[0, s])
            decay = np.mean([np.cos(distance * 100.0 ** (-2 * f / 8)) for f in range(4)])
            expected = np.log(max(size[0, s], 1) * (2.5 - decay))
            np.testing.assert_allclose(found[0, t, s], expected, atol=2e-4)  # angles of 600 rad in float32


def test_bias_of_a_patch_at_its_own_place_is_nothing_and_grows_with_size_and_distance():
    place = np.arange(0, 600, 50)[None]
    bias = np.asarray(restore_bias(place, place, np.ones((1, 12)), head_dim=128))[0]
    np.testing.assert_allclose(np.diag(bias), 0.0, atol=1e-5)
    assert bias.min() > -1e-5 and bias[0, 11] > bias[0, 1] > bias[0, 0] - 1e-5
    larger = np.asarray(restore_bias(place, place, np.full((1, 12), 4.0), head_dim=128))[0]
    np.testing.assert_allclose(larger - bias, np.log(4.0), atol=1e-5)


def test_bias_of_a_size_acts_as_so_many_copies_of_the_key():
    q, k, v = (jnp.asarray(RNG.standard_normal((1, 2, n, 4)).astype(np.float32)) for n in (1, 3, 3))
    copies = jnp.array([0, 1, 1, 1, 2])
    bias = restore_bias(np.zeros((1, 1)), np.zeros((1, 3)), np.array([[1, 3, 1]]), head_dim=4)
    found = attend(q, k, v, bias=bias)
    np.testing.assert_allclose(found, attend(q, k[:, :, copies], v[:, :, copies]), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"), [(4, r"4 tokens .* 20 patches, 4 of them kept .* must be 5 \.\. 20"), (21, r"5 \.\. 20")]
)
def test_impossible_budget_is_one_sentence(tokens, message):
    with pytest.raises(ValueError, match=message):
        restore(BASE, FEATURES, tokens=tokens)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"restore: base.source_BP has shape \(5, 20\); it must be \(5, 19\)"):
        restore(BASE, FEATURES[:, 1:], tokens=9)
    with pytest.raises(ValueError, match=r"restore: base.tokens_BMD has shape"):
        restore(BASE, FEATURES[:, :, 1:], tokens=9)
    with pytest.raises(ValueError, match=r"head_dim = 7 must be even"):
        restore_bias(np.zeros((1, 1)), np.zeros((1, 1)), np.ones((1, 1)), head_dim=7)
    with pytest.raises(ValueError, match=r"offset = 1.0 must be above 1"):
        restore_bias(np.zeros((1, 1)), np.zeros((1, 1)), np.ones((1, 1)), head_dim=8, offset=1.0)


def test_equal_patches_are_anchors_of_their_own():
    same = np.repeat(FEATURES[:, :1], PATCHES, axis=1)
    result = restore(BASE, same, tokens=9)
    assert np.all(result.size_BM >= 1) and bool(result.valid_BM.all())
    np.testing.assert_array_equal(result.size_BM.sum(axis=1), PATCHES)
