"""The shared primitives, the baselines, pooling, and the table of encoder-site methods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokzip_jax.compress import (
    Ask,
    Tower,
    apply,
    average_pool,
    check,
    cls_attention,
    everything,
    ops,
    options,
    random,
    uniform,
    visionzip,
)
from tokzip_jax.compress.select import grid_places
from tokzip_jax.types import VisionFeatures

PATCHES = np.random.default_rng(0).standard_normal((3, 36, 4)).astype(np.float32)
top_mask = jax.jit(ops.top_mask, static_argnums=1)
partition = jax.jit(ops.partition, static_argnums=1)


@pytest.mark.parametrize("k", [0, 1, 5, 12])
@settings(max_examples=20, deadline=None)
@given(score=hnp.arrays(np.float32, (2, 12), elements=st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, np.inf])))
def test_top_mask_breaks_ties_by_index(k, score):
    chosen = top_mask(score, k)
    kept, rest = partition(chosen, k)
    for row in range(2):
        # Python's sort is stable, and -0.0 == 0.0 there too.
        expected = sorted(range(12), key=lambda i: -score[row, i])[:k]
        np.testing.assert_array_equal(kept[row], sorted(expected))
        np.testing.assert_array_equal(rest[row], [i for i in range(12) if i not in expected])


def test_top_mask_never_prefers_nan():
    score = np.array([[np.nan, -np.inf, 1.0, np.nan]], np.float32)
    np.testing.assert_array_equal(top_mask(score, 1), [[False, False, True, False]])
    assert top_mask(score, 3).sum() == 3


def test_primitives_work_under_vmap():
    score = np.random.default_rng(1).random((4, 2, 12), np.float32)
    chosen = jax.vmap(lambda s: ops.top_mask(s, 5))(score)
    np.testing.assert_array_equal(chosen, np.stack([top_mask(s, 5) for s in score]))
    kept = jax.vmap(lambda c: ops.partition(c, 5)[0])(chosen)
    np.testing.assert_array_equal(kept, np.stack([partition(c, 5)[0] for c in chosen]))


def test_rank_and_source():
    chosen = np.array([[False, True, True, False, True]])
    np.testing.assert_array_equal(ops.rank(chosen), [[0, 0, 1, 2, 2]])
    np.testing.assert_array_equal(ops.source(chosen, first=3), [[-1, 3, 4, -1, 5]])


@pytest.mark.parametrize(("length", "count"), [(9, 9), (9, 4), (9, 1), (576, 64), (5, 0)])
def test_evenly_spaced_places_are_distinct_and_centred(length, count):
    places = ops.evenly_spaced(length, count)
    assert len(set(places)) == count
    if count:
        assert abs(places[0] - (length - 1 - places[-1])) <= 1


def test_cosine_of_tiny_huge_and_zero_rows():
    keys = np.array([[[3, 4], [3e-30, 4e-30], [3e30, 4e30], [0, 0], [-4, 3]]], np.float32)
    expected = np.array([[1, 1, 1, 0, 0]] * 3 + [[0] * 5] + [[0, 0, 0, 0, 1]])
    np.testing.assert_allclose(ops.cosine(keys, keys)[0], expected, atol=1e-6)


def test_unit_has_the_right_gradient_and_a_finite_one_at_zero():
    keys = np.array([[[3.0, 4.0], [0.0, 0.0]]], np.float32)
    found = jax.grad(lambda x: ops.unit(x)[0, :, 0].sum())(keys)
    np.testing.assert_allclose(found[0, 0], [16 / 125, -12 / 125], atol=1e-6)
    assert np.isfinite(found).all()


@settings(max_examples=20, deadline=None)
@given(group=hnp.arrays(np.int32, (3, 36), elements=st.integers(-1, 4)))
def test_group_sum_equals_the_loop(group):
    total, count = ops.group_sum(PATCHES, group, 5)
    for row in range(3):
        for number in range(5):
            mine = group[row] == number
            assert count[row, number] == mine.sum()
            np.testing.assert_allclose(total[row, number], PATCHES[row][mine].sum(axis=0), atol=1e-5)


def test_group_sum_adds_bfloat16_in_float32():
    ones = jnp.ones((1, 1000, 1), jnp.bfloat16)
    total, _ = ops.group_sum(ones, jnp.zeros((1, 1000), jnp.int32), 1)
    assert total.dtype == jnp.float32 and float(total[0, 0, 0]) == 1000.0


def naive_received(q, k, segment):
    """Mean over heads and over a token's own segment's queries of the full softmax."""
    batch, heads, length, dim = q.shape
    score = np.zeros((batch, length))
    for b in range(batch):
        for n in range(heads):
            for t in range(length):
                sees = [s for s in range(length) if segment[b, s] == segment[b, t] != 0]
                logits = np.array([q[b, n, t] @ k[b, n * k.shape[1] // heads, s] for s in sees]) / np.sqrt(dim)
                weights = np.exp(logits - logits.max()) if sees else logits
                score[b, sees] += weights / weights.sum() / len(sees) if sees else 0
    return score / heads


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_received_attention_equals_the_full_softmax(kv_heads):
    rng = np.random.default_rng(0)
    q, k = (3 * rng.standard_normal((2, n, 11, 3)).astype(np.float32) for n in (4, kv_heads))
    segment = np.array([[1] * 11, [1] * 4 + [7] * 5 + [0] * 2])
    for block in (1, 4, 64):
        found = ops.received_attention(q, k, segment_BS=segment, block=block)
        np.testing.assert_allclose(found, naive_received(q, k, segment), atol=1e-6)
    free = ops.received_attention(q, k)
    np.testing.assert_allclose(free, naive_received(q, k, np.ones((2, 11))), atol=1e-6)
    np.testing.assert_allclose(found[1, 9:], 0.0)


def test_received_attention_never_holds_the_full_matrix():
    q = jnp.zeros((1, 2, 256, 8))
    compiled = jax.jit(functools.partial(ops.received_attention, block=16)).lower(q, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 256 * 256 * 4


def test_received_attention_refuses_what_does_not_fit():
    q = np.zeros((1, 4, 6, 2), np.float32)
    with pytest.raises(ValueError, match="must agree"):
        ops.received_attention(q, q[:, :3])
    with pytest.raises(ValueError, match="must agree"):
        ops.received_attention(q, q[:, :, :5])
    with pytest.raises(ValueError, match="at least 1"):
        ops.received_attention(q, q, block=0)


def assert_selection(result, patches, tokens):
    """What every plain selection owes: raster order, tokens from their places, sizes 1, sources that point back."""
    assert result.tokens_BMD.shape == (len(patches), tokens, patches.shape[2])
    assert bool(result.valid_BM.all()) and np.all(result.size_BM == 1)
    for row in range(len(patches)):
        position, source = np.asarray(result.position_BM[row]), np.asarray(result.source_BP[row])
        assert np.all(np.diff(position) > 0)
        np.testing.assert_array_equal(result.tokens_BMD[row], patches[row][position])
        np.testing.assert_array_equal(source[position], np.arange(tokens))
        assert (source >= 0).sum() == tokens


@pytest.mark.parametrize("tokens", [7, 36])
def test_selections_in_raster_order(tokens):
    assert_selection(random(PATCHES, tokens=tokens, key=jax.random.key(0)), PATCHES, tokens)
    assert_selection(uniform(PATCHES, tokens=tokens), PATCHES, tokens)


def test_uniform_is_the_same_even_spread_for_all():
    result = uniform(PATCHES, tokens=9)
    np.testing.assert_array_equal(result.position_BM, np.tile(np.arange(2, 36, 4), (3, 1)))


@pytest.mark.parametrize(
    ("grid", "tokens", "places"),
    [
        ((6, 6), 4, [(1, 1), (1, 4), (4, 1), (4, 4)]),
        ((6, 6), 9, [(y, x) for y in (1, 3, 5) for x in (1, 3, 5)]),
        ((6, 6), 1, [(3, 3)]),
        ((6, 6), 5, [(1, 1), (1, 4), (4, 1), (4, 3), (4, 5)]),
        ((4, 9), 6, [(1, 1), (1, 4), (1, 7), (3, 1), (3, 4), (3, 7)]),
        ((9, 4), 1, [(4, 2)]),
        ((36, 1), 3, [(6, 0), (18, 0), (30, 0)]),
    ],
)
def test_uniform_on_a_grid_is_a_smaller_grid(grid, tokens, places):
    result = uniform(PATCHES, tokens=tokens, grid=grid)
    assert_selection(result, PATCHES, tokens)
    found = [divmod(int(place), grid[1]) for place in result.position_BM[0]]
    assert found == places


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (12, 3), (1, 36)])
def test_uniform_meets_every_budget_on_every_grid(grid):
    for tokens in range(1, 37):
        places = grid_places(*grid, tokens)
        assert len(places) == tokens and np.all(np.diff(places) > 0) and places[0] >= 0 and places[-1] < 36
        lines, counts = np.unique(places // grid[1], return_counts=True)
        assert np.ptp(counts) <= 1 and (len(lines) < 3 or np.ptp(np.diff(lines)) <= 1)


def test_uniform_refuses_a_grid_that_is_none():
    with pytest.raises(ValueError, match="uniform: a grid of 5 x 7 is not one of 36 patches"):
        uniform(PATCHES, tokens=4, grid=(5, 7))
    with pytest.raises(ValueError, match="uniform: give grid or valid, not both"):
        uniform(PATCHES, tokens=4, grid=(6, 6), valid_BP=np.ones((3, 36), bool))


def test_random_depends_on_key_and_row_alone():
    first = random(PATCHES, tokens=7, key=jax.random.key(0)).position_BM
    np.testing.assert_array_equal(random(PATCHES + 1, tokens=7, key=jax.random.key(0)).position_BM, first)
    np.testing.assert_array_equal(random(PATCHES[:2], tokens=7, key=jax.random.key(0)).position_BM, first[:2])
    assert np.any(random(PATCHES, tokens=7, key=jax.random.key(1)).position_BM != first)
    assert np.any(first[0] != first[1]) and np.any(first[1] != first[2])


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_random_with_a_key_for_every_picture_ignores_the_row(make):
    keys = jax.random.split(make(3), 3)
    forward = random(PATCHES, tokens=7, key=keys).position_BM
    np.testing.assert_array_equal(random(PATCHES, tokens=7, key=keys[::-1]).position_BM, forward[::-1])
    assert_selection(random(PATCHES, tokens=7, key=make(3)), PATCHES, 7)
    with pytest.raises(ValueError, match="2 keys for 3 pictures"):
        random(PATCHES, tokens=7, key=keys[:2])


def test_random_draws_every_patch_equally_often():
    many = jnp.zeros((2000, 9, 1))
    position = np.asarray(random(many, tokens=3, key=jax.random.key(0)).position_BM)
    # 2000 pictures, a third of the patches each: 667 +- 21 (one standard deviation) a patch.
    assert np.all(np.abs(np.bincount(position.ravel(), minlength=9) - 2000 / 3) < 5 * 21)


def adaptive_pool(picture, rows, columns):
    """AdaptiveAvgPool2d's definition, bin by bin, and the bins: their rows and columns of the picture."""
    side = picture.shape[0]
    down, across = (
        [(i * side // count, -(-(i + 1) * side // count)) for i in range(count)] for count in (rows, columns)
    )
    edges = [(row, column) for row in down for column in across]
    return np.array([picture[a:b, c:d].mean(axis=(0, 1)) for (a, b), (c, d) in edges]), edges


@pytest.mark.parametrize(
    ("grid", "rows"), [(1, 0), (2, 0), (4, 0), (5, 0), (6, 0), (2, 1), (1, 2), (4, 2), (3, 5), (5, 3)]
)
def test_average_pool_equals_the_bins(grid, rows):
    result = average_pool(PATCHES, grid=grid, rows=rows)
    for row in range(3):
        expected, edges = adaptive_pool(PATCHES[row].reshape(6, 6, 4), rows or grid, grid)
        np.testing.assert_allclose(result.tokens_BMD[row], expected, atol=1e-6)
        source, size = np.asarray(result.source_BP[row]), np.asarray(result.size_BM[row])
        np.testing.assert_array_equal(np.bincount(source, minlength=len(edges)), size)
        assert size.sum() == 36 and size.min() > 0
        for patch, slot in enumerate(source):
            for place, (low, high) in zip(divmod(patch, 6), edges[slot], strict=True):
                assert low <= place < high
        for slot, patch in enumerate(np.asarray(result.position_BM[row])):
            for place, (low, high) in zip(divmod(patch, 6), edges[slot], strict=True):
                assert place == (low + high - 1) // 2
    assert bool(result.valid_BM.all())


def test_pooling_to_the_whole_grid_changes_nothing():
    result = average_pool(PATCHES, grid=6)
    np.testing.assert_allclose(result.tokens_BMD, PATCHES, atol=1e-7)
    np.testing.assert_array_equal(result.position_BM, everything(PATCHES).position_BM)


def test_pooling_averages_bfloat16_in_float32():
    half = jnp.asarray(PATCHES, jnp.bfloat16)
    full = average_pool(half.astype(jnp.float32), grid=1).tokens_BMD
    found = average_pool(half, grid=1).tokens_BMD
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, full.astype(jnp.bfloat16))


def test_impossible_grids_are_one_sentence():
    with pytest.raises(ValueError, match="35 patches do not form a square"):
        average_pool(PATCHES[:, :35], grid=1)
    for grid in (0, 7):
        with pytest.raises(ValueError, match=rf"grid = {grid} asked of 6 x 6 patches; it must be 1 \.\. 6"):
            average_pool(PATCHES, grid=grid)
    with pytest.raises(ValueError, match=r"rows = 7 asked of 6 x 6 patches; it must be 1 \.\. 6"):
        average_pool(PATCHES, grid=2, rows=7)


FEATURES = VisionFeatures(
    patches_BPD=PATCHES,
    cls_BD=PATCHES[:, 0] + 1,
    signals={"cls_attention_BP": np.abs(PATCHES[:, :, 0]), "keys_BSH": np.zeros((3, 37, 2), np.float32)},
)


def ask(name, tokens, key=None, **wanted):
    return Ask(tokens, options(name, wanted), Tower(rows=6, columns=6), key)


@pytest.mark.parametrize(("merge", "targets"), [("official", "official"), ("paper", "even")])
def test_visionzip_entry_is_the_function(merge, targets):
    wanted = {"merge": merge, "targets": targets}
    found = apply("visionzip", FEATURES, ask("visionzip", 9, contextual=3, **wanted))
    expected = visionzip(
        FEATURES.patches_BPD, FEATURES.cls_BD, *FEATURES.signals.values(), dominant=6, contextual=3, **wanted
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_entry_needs_a_key():
    with pytest.raises(ValueError, match="needs a JAX random key"):
        apply("random", FEATURES, ask("random", 9))


def test_cls_attention_in_both_orders():
    """Row by row with a stable sort: the highest, or the lowest, of equal ones the lower index."""
    attention = np.round(np.random.default_rng(4).random((3, 36)), 1).astype(np.float32)  # many are equal
    for order, sign in (("highest", -1), ("lowest", 1)):
        for tokens in (1, 7, 36):
            found = cls_attention(PATCHES, attention, tokens=tokens, order=order)
            expected = np.sort(np.argsort(sign * attention, axis=1, kind="stable")[:, :tokens], axis=1)
            np.testing.assert_array_equal(found.position_BM, expected)
            np.testing.assert_array_equal(found.tokens_BMD, np.take_along_axis(PATCHES, expected[:, :, None], axis=1))
    features = dataclasses.replace(FEATURES, signals={"cls_attention_BP": attention})
    lowest = apply("cls_attention", features, ask("cls_attention", 5, order="lowest"))
    np.testing.assert_array_equal(
        lowest.position_BM, cls_attention(PATCHES, attention, tokens=5, order="lowest").position_BM
    )
    with pytest.raises(ValueError, match="order = 'least' is unknown; choose one of highest, lowest"):
        cls_attention(PATCHES, attention, tokens=5, order="least")
    with pytest.raises(ValueError, match=r"score has shape \(3, 35\); it must be \(3, 36\)"):
        cls_attention(PATCHES, attention[:, 1:], tokens=5)


@pytest.mark.parametrize(
    ("name", "tokens", "wanted", "message"),
    [
        ("visionzip", 0, {}, r"0 tokens .* must be 1 \.\. 37"),
        ("visionzip", 38, {}, r"38 tokens .* must be 1 \.\. 37"),
        ("visionzip", 4, {"contextual": 4}, r"no place for the CLS token; options\.contextual must be 0 \.\. 3"),
        ("random", 37, {}, r"random: 37 tokens .* must be 1 \.\. 36"),
        ("uniform", 0, {}, r"uniform: 0 tokens .* must be 1 \.\. 36"),
        ("cls_attention", 37, {}, r"cls_attention: 37 tokens .* must be 1 \.\. 36"),
        ("none", 9, {}, "tokens must be 0 or 36"),
    ],
)
def test_check_says_what_would_be_right(name, tokens, wanted, message):
    with pytest.raises(ValueError, match=message):
        check(name, Tower(rows=6, columns=6), tokens, options(name, wanted))
    with pytest.raises(ValueError, match=r"'zip' is unknown; choose one of .*, none, .*random, .*uniform, visionzip"):
        check("zip", Tower(rows=6, columns=6), 4, None)
