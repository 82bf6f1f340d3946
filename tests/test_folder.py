"""FOLDER, simple and in a block, against the official numbers and a plain loop."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import merging
import numpy as np
import padded
import pytest

from tokzip_jax.compress import bipartite
from tokzip_jax.compress.folder import between, check_budget, fold, folder, folds

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "folder_simple.npz")
RNG = np.random.default_rng(0)
PATCHES, METRIC = RNG.normal(size=(3, 21, 6)).astype(np.float32), RNG.normal(size=(3, 21, 4)).astype(np.float32)
ATTENTION = RNG.dirichlet(np.ones(21), size=3).astype(np.float32)
SCALES = {"always": lambda n: 1 + math.log(n), "none": lambda n: 1.0}


# One fold with its scale, two folds, four folds at full size, the fold that goes without the scale, a single pair, and
# a metric of its own.
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "m"])
def test_official_numbers_of_the_simple_form(case):
    x, removed = GOLDEN[f"{case}/x"], int(GOLDEN[f"{case}/r"])
    metric = GOLDEN["m/metric_in"] if case == "m" else None
    protect = case != "m" and bool(GOLDEN[f"{case}/class_token"])
    result = folder(x, metric, tokens=x.shape[1] - removed, protect=protect)
    np.testing.assert_array_equal(result.size_BM, GOLDEN[f"{case}/size"][:, :, 0])
    np.testing.assert_allclose(result.tokens_BMD, GOLDEN[f"{case}/out"], atol=1e-5)
    merging.assert_books(result, x.shape[1])


def test_official_numbers_of_the_matcher_with_attention():
    """The released matcher with a penalty of 30, which sums attention where `fold` averages it."""
    x, metric, attention = (jnp.asarray(GOLDEN[f"cls/{name}"]) for name in ("x", "metric_in", "attn"))

    @jax.jit
    def run(x, metric, attention):
        pairs = bipartite.pair(metric, 12, penalty_BT=30.0 * attention, order="raster")
        result = bipartite.merge(bipartite.begin(x), pairs)
        metric = bipartite.mean(pairs, metric, jnp.ones(metric.shape[:2], jnp.int32))
        return result, metric, bipartite.add_up(pairs, attention[:, :, None])[:, :, 0]

    result, metric, attention = run(x, metric, attention)
    np.testing.assert_array_equal(result.size_BT, GOLDEN["cls/size"][:, :, 0])
    np.testing.assert_allclose(result.x_BTD, GOLDEN["cls/out"], atol=1e-5)
    np.testing.assert_allclose(metric, GOLDEN["cls/metric"], atol=1e-5)
    np.testing.assert_allclose(attention, GOLDEN["cls/attn_out"], atol=1e-6)


# No fold, one, two, and down to the end.
@pytest.mark.parametrize(
    ("tokens", "scale", "protect"), [(21, "always", True), (15, "always", False), (8, "none", True), (2, "none", False)]
)
def test_simple_form_equals_the_loop(tokens, scale, protect):
    result = folder(PATCHES, METRIC, tokens=tokens, scale=scale, protect=protect)
    assert bool(result.valid_BM.all()) and np.all(np.diff(result.position_BM, axis=1) > 0)
    merging.assert_books(result, 21)
    for row in range(3):
        state = merging.first_tokens(PATCHES[row], METRIC[row])
        while len(state) > tokens:
            count = min((len(state) - 1) // 2, len(state) - tokens)
            state = merging.step(state, count, protected=protect, order="raster")
        merging.assert_same(result, row, state, scale=SCALES[scale])
    if tokens == 21:
        np.testing.assert_array_equal(result.tokens_BMD, PATCHES)


# One fold with the released scale and without it, several folds, and none, beside one another.
@pytest.mark.parametrize("layout", padded.LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "scale", "protect"),
    [(9, "official", True), (2, "official", False), (6, "always", False), (6, "none", True)],
)
def test_a_picture_with_padding_is_the_smaller_picture(layout, tokens, scale, protect):
    valid = padded.masks((20, 11, 15), 21, layout)
    run = functools.partial(folder, tokens=tokens, scale=scale, protect=protect)
    padded.assert_as_alone(run, (PATCHES, METRIC), valid)


@pytest.mark.parametrize("scale", ["official", "always"])
def test_fewer_patches_than_tokens_stay_as_they_are(scale):
    valid = padded.masks((7, 2, 0), 21, "scattered")
    result = folder(PATCHES, tokens=9, scale=scale, valid_BP=valid)
    np.testing.assert_array_equal(result.valid_BM, np.arange(9)[None] < [[7], [2], [0]])
    np.testing.assert_array_equal(result.size_BM, result.valid_BM)
    np.testing.assert_array_equal(result.source_BP, np.where(valid, np.cumsum(valid, axis=1) - 1, -1))
    for row, real in enumerate(valid):
        index = np.flatnonzero(real)
        np.testing.assert_array_equal(result.position_BM[row, : len(index)], index)
        np.testing.assert_array_equal(result.tokens_BMD[row, : len(index)], PATCHES[row, index])
        assert np.all(result.position_BM[row, len(index) :] == -1)
        assert not np.any(result.tokens_BMD[row, len(index) :])


def test_padding_counts_nowhere():
    run = functools.partial(folder, tokens=7)
    padded.assert_padding_counts_nowhere(run, (PATCHES, METRIC), padded.masks((17, 9, 4), 21, "scattered"))


def in_block(tokens, penalty, patches, metric, attention):
    state = fold(bipartite.begin(patches), metric, attention, removed=20 - tokens, penalty=penalty)
    return bipartite.finish(state, cls=True)


run_in_block = jax.jit(in_block, static_argnums=(0, 1))


@pytest.mark.parametrize(("tokens", "penalty"), [(14, 500.0), (6, 500.0), (1, 30.0), (6, 0.0)])
def test_fold_in_a_block_equals_the_loop(tokens, penalty):
    result = run_in_block(tokens, penalty, PATCHES, METRIC, ATTENTION)
    merging.assert_books(result, 20)
    for row in range(3):
        state, left = merging.first_tokens(PATCHES[row], METRIC[row], ATTENTION[row]), 20 - tokens
        while left:
            count = min((len(state) - 1) // 2, left)
            state, left = merging.step(state, count, protected=True, penalty=penalty), left - count
        assert state[0]["members"] == [0]
        merging.assert_same(result, row, state, first=1)


def test_attended_patches_do_not_leave():
    """With the released penalty the even patches with the least attention leave, whatever they look like."""
    result = run_in_block(14, 500.0, PATCHES, METRIC, ATTENTION)
    for row in range(3):
        evens = range(2, 21, 2)
        least = sorted(evens, key=lambda i: ATTENTION[row, i])[:6]
        gone = set(range(20)) - set(result.position_BM[row].tolist())
        assert gone == {i - 1 for i in least}


def test_jit_eager_vmap_and_neighbours():
    run = functools.partial(in_block, 14, 500.0)
    inputs = tuple(jnp.asarray(x) for x in (PATCHES, METRIC, ATTENTION))
    jitted = run_in_block(14, 500.0, *inputs)
    with jax.disable_jit():
        eager = run(*inputs)
    single = jax.jit(jax.vmap(lambda *row: jax.tree.map(lambda y: y[0], run(*(x[None] for x in row)))))(*inputs)
    turned = jax.tree.map(lambda y: y[::-1], run_in_block(14, 500.0, *(x[::-1] for x in inputs)))
    for other in (eager, single, turned):
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(other)):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradient_is_that_of_the_scaled_average():
    weight = np.random.default_rng(1).normal(size=(3, 8, 6)).astype(np.float32)
    patches = PATCHES.copy()
    patches[:, 3] = 0.0  # also the metric
    found = jax.jit(jax.grad(lambda x: jnp.sum(weight * folder(x, tokens=8).tokens_BMD)))(patches)
    result = folder(patches, tokens=8)
    for row in range(3):
        source, size = np.asarray(result.source_BP[row]), np.asarray(result.size_BM[row])
        share = (1 + np.log(size)) / size
        np.testing.assert_allclose(found[row], (share[:, None] * weight[row])[source], atol=1e-5)


def test_bfloat16_is_merged_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (PATCHES, METRIC)]
    low, high = folder(*half, tokens=8), folder(*(x.astype(jnp.float32) for x in half), tokens=8)
    assert low.tokens_BMD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low.source_BP, high.source_BP)
    np.testing.assert_array_equal(low.tokens_BMD, high.tokens_BMD.astype(jnp.bfloat16))


def test_folds_are_halves():
    assert folds(577, 384) == (288, 96) and folds(577, 432) == (288, 144)
    assert folds(65, 2) == (2,) and folds(9, 0) == () and folds(1, 0) == ()
    assert sum(folds(577, 575)) == 575


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match=r"FOLDER: 1 tokens asked of 21 patches; it must be 2 \.\. 21"):
        folder(PATCHES, tokens=1)
    with pytest.raises(ValueError, match=r"FOLDER: 22 tokens asked of 21 patches; it must be 2 \.\. 21"):
        check_budget(21, 22, simple=True)
    with pytest.raises(ValueError, match=r"FOLDER: 0 tokens asked of 20 patches; it must be 1 \.\. 20"):
        between(20, 0, 1)
    with pytest.raises(ValueError, match=r"folding 21 tokens cannot remove 20; it must be 0 \.\. 19"):
        folds(21, 20)
    with pytest.raises(ValueError, match="scale = 'size' is unknown; choose one of official, always, none"):
        folder(PATCHES, tokens=4, scale="size")
    with pytest.raises(ValueError, match=r"metric of shape \(3, 20, 4\) does not fit"):
        folder(PATCHES, METRIC[:, 1:], tokens=4)
    with pytest.raises(ValueError, match=r"FOLDER: valid has shape \(3, 20\); it must be \(3, 21\)"):
        folder(PATCHES, tokens=4, valid_BP=np.ones((3, 20), bool))
