"""ToMe against the official numbers and a plain loop, its schedule, and its steps inside the vision tower."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import merging
import numpy as np
import padded
import pytest

from tokzip_jax.compress import bipartite
from tokzip_jax.compress.tome import between, check_budget, merge_step, merged, removals, tome

DATA = pathlib.Path(__file__).parent / "data"
RNG = np.random.default_rng(0)
PATCHES, METRIC = RNG.normal(size=(3, 21, 6)).astype(np.float32), RNG.normal(size=(3, 21, 4)).astype(np.float32)


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_official_numbers(case):
    golden = np.load(DATA / "tome.npz")
    x, metric, removed, cls = (golden[f"{case}/{name}"] for name in ("x", "metric", "r", "class_token"))
    step = jax.jit(functools.partial(merge_step, removed=int(removed), cls=bool(cls)))
    result = step(bipartite.begin(jnp.asarray(x)), metric)
    np.testing.assert_array_equal(result.size_BT, golden[f"{case}/size"][:, :, 0])
    np.testing.assert_allclose(result.x_BTD, golden[f"{case}/out"], atol=1e-5)
    if not cls:
        done = tome(x, metric, tokens=x.shape[1] - int(removed))
        np.testing.assert_allclose(done.tokens_BMD, golden[f"{case}/out"], atol=1e-5)


def naive(row, tokens, patches=PATCHES):
    state = merging.first_tokens(patches[row], METRIC[row])
    while len(state) > tokens:
        state = merging.step(state, min(len(state) // 2, len(state) - tokens), protected=False, order="score")
    return state


@pytest.mark.parametrize("tokens", [21, 15, 8, 1])
def test_equals_the_loop_at_any_budget(tokens):
    result = tome(PATCHES, METRIC, tokens=tokens)
    assert result.tokens_BMD.shape == (3, tokens, 6) and bool(result.valid_BM.all())
    merging.assert_books(result, 21)
    for row in range(3):
        merging.assert_same(result, row, naive(row, tokens))
    if tokens == 21:
        np.testing.assert_array_equal(result.tokens_BMD, PATCHES)


def test_ties_and_zero_keys_take_the_lower_place():
    metric = np.zeros((1, 8, 2), np.float32)
    metric[0, 4:] = 1.0
    result = tome(PATCHES[:1, :8], metric, tokens=5)
    # Of the even 0, 2 (alike to nothing), 4, 6 (alike to 5 and 7): 4 and 6 join 5, then 0 joins 1; 2 stays.
    np.testing.assert_array_equal(result.position_BM, [[2, 1, 3, 5, 7]])
    np.testing.assert_array_equal(result.source_BP, [[1, 1, 0, 2, 3, 3, 3, 4]])


def test_step_keeps_cls_and_weighs_by_size():
    def run(x, metric):
        state = bipartite.begin(x)
        for removed in (4, 8, 3):
            state = merge_step(state, metric[:, : state.x_BTD.shape[1]], removed=removed)
        return bipartite.finish(state, cls=True)

    result = jax.jit(run)(PATCHES, METRIC)
    merging.assert_books(result, 20)
    for row in range(3):
        state = merging.first_tokens(PATCHES[row], METRIC[row])
        for removed in (4, 8, 3):
            for token, metric in zip(state, METRIC[row]):
                token["metric"] = metric.astype(float)  # every block measures on keys of its own
            state = merging.step(state, removed, protected=True)
        merging.assert_same(result, row, state, first=1)
        assert state[0]["members"] == [0]


def test_jit_eager_vmap_and_neighbours():
    run = functools.partial(tome, tokens=15)
    jitted = run(PATCHES, METRIC)
    with jax.disable_jit():
        eager = run(jnp.asarray(PATCHES), jnp.asarray(METRIC))
    single = jax.vmap(lambda x, m: jax.tree.map(lambda y: y[0], run(x[None], m[None])))(PATCHES, METRIC)
    turned = jax.tree.map(lambda y: y[::-1], run(PATCHES[::-1], METRIC[::-1]))
    for other in (eager, single, turned):
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(other)):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=1e-6)


# Steps: none to four, of different numbers in one batch.
@pytest.mark.parametrize("layout", padded.LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_a_picture_with_padding_is_the_smaller_picture(layout, tokens):
    valid = padded.masks((19, 9, 14), 21, layout)
    padded.assert_as_alone(functools.partial(tome, tokens=tokens), (PATCHES, METRIC), valid)


@pytest.mark.parametrize("tokens", [9, 21])
def test_fewer_patches_than_tokens_stay_as_they_are(tokens):
    valid = padded.masks((7, 2, 0), 21, "scattered")
    result = tome(PATCHES, METRIC, tokens=tokens, valid_BP=valid)
    for row, real in enumerate(valid):
        index = np.flatnonzero(real)
        np.testing.assert_array_equal(result.valid_BM[row], np.arange(tokens) < len(index))
        np.testing.assert_array_equal(
            result.position_BM[row], np.pad(index, (0, tokens - len(index)), "constant", constant_values=-1)
        )
        np.testing.assert_array_equal(result.tokens_BMD[row, : len(index)], PATCHES[row, index])
        assert not np.any(result.tokens_BMD[row, len(index) :])
        np.testing.assert_array_equal(result.source_BP[row], np.where(real, np.cumsum(real) - 1, -1))
        np.testing.assert_array_equal(result.size_BM[row], result.valid_BM[row])


def test_padding_counts_nowhere():
    run = functools.partial(tome, tokens=7)
    padded.assert_padding_counts_nowhere(run, (PATCHES, METRIC), padded.masks((17, 9, 4), 21, "scattered"))


def test_ties_of_a_picture_with_padding_take_the_lower_place():
    metric, valid = np.zeros((3, 21, 2), np.float32), padded.masks((13, 16, 8), 21, "scattered")
    metric[:, 9:] = 1.0
    padded.assert_as_alone(functools.partial(tome, tokens=5), (PATCHES, metric), valid)


def test_gradient_goes_to_features_alone():
    weight = np.random.default_rng(1).normal(size=(3, 8, 6)).astype(np.float32)
    loss = jax.jit(jax.grad(lambda x, m: jnp.sum(weight * tome(x, m, tokens=8).tokens_BMD), argnums=(0, 1)))
    metric = METRIC.copy()
    metric[:, 3] = 0.0
    by_features, by_metric = loss(PATCHES, metric)
    result = tome(PATCHES, metric, tokens=8)
    for row in range(3):
        source, size = np.asarray(result.source_BP[row]), np.asarray(result.size_BM[row])
        np.testing.assert_allclose(by_features[row], weight[row, source] / size[source, None], atol=1e-6)
    assert not np.any(by_metric)


def test_bfloat16_is_merged_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (PATCHES, METRIC)]
    low, high = tome(*half, tokens=8), tome(*(x.astype(jnp.float32) for x in half), tokens=8)
    assert low.tokens_BMD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low.source_BP, high.source_BP)
    np.testing.assert_array_equal(low.tokens_BMD, high.tokens_BMD.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("patches", "tokens", "blocks", "inflect", "expected"),
    [
        (16, 10, 3, 0.0, (2, 2, 2)),
        (16, 9, 3, 0.0, (2, 3, 2)),
        (16, 4, 3, -1.0, (8, 4, 0)),
        (16, 8, 3, 1.0, (0, 3, 5)),
        (16, 16, 4, 0.0, (0, 0, 0, 0)),
        (576, 64, 23, 0.0, None),
    ],
)
def test_schedules_add_up(patches, tokens, blocks, inflect, expected):
    found = removals(patches, tokens, blocks, inflect=inflect)
    assert len(found) == blocks and sum(found) == patches - tokens
    assert expected is None or found == expected
    assert set(between(found)) == {block for block, count in enumerate(found) if count}


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match=r"ToMe: 22 tokens asked of 21 patches; it must be 1 \.\. 21"):
        tome(PATCHES, METRIC, tokens=22)
    with pytest.raises(ValueError, match=r"ToMe: 0 tokens asked of 21 patches; it must be 1 \.\. 21"):
        check_budget(21, 0)
    with pytest.raises(ValueError, match=r"metric of shape \(3, 20, 4\) does not fit"):
        tome(PATCHES, METRIC[:, 1:], tokens=4)
    with pytest.raises(ValueError, match=r"ToMe: valid has shape \(3, 20\); it must be \(3, 21\)"):
        tome(PATCHES, METRIC, tokens=4, valid_BP=np.ones((3, 20), bool))
    with pytest.raises(ValueError, match=r"cannot remove 11; it must be 0 \.\. 10"):
        merge_step(bipartite.begin(jnp.asarray(PATCHES)), METRIC, removed=11)
    with pytest.raises(ValueError, match="at most 8; use more blocks or more tokens"):
        removals(16, 2, 1)
    with pytest.raises(ValueError, match="blocks = 0 must be at least 1"):
        removals(16, 2, 0)
    with pytest.raises(ValueError, match=r"inflect = 2.0 must be -1 \.\. 1"):
        removals(16, 2, 3, inflect=2.0)
    with pytest.raises(ValueError, match="order = 'size' is unknown; choose one of raster, index, score"):
        bipartite.pair(METRIC, 1, order="size")


def test_merged_is_the_struct():
    result = tome(PATCHES, METRIC, tokens=8)
    again = merged(result.tokens_BMD, result.position_BM, result.size_BM, result.source_BP)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)
