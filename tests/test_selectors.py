"""What every selector owes, whatever its rule: exact budgets, real patches, independence, one answer in every mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax.compress.cdpruner import cdpruner
from tokzip_jax.compress.cls_attention import cls_attention
from tokzip_jax.compress.dart import dart
from tokzip_jax.compress.divprune import divprune
from tokzip_jax.compress.greedy import fill, greedy, in_raster_order
from tokzip_jax.compress.holov import holov
from tokzip_jax.compress.mmtok import mmtok
from tokzip_jax.compress.relevance import question_relevance, question_similarity
from tokzip_jax.compress.scope import scope
from tokzip_jax.compress.select import random, uniform
from tokzip_jax.types import VisualTokens

PATCHES, WIDTH = 20, 6
# (function, names of what it reads besides the patches, options)
SELECTORS = {
    "uniform": (uniform, (), {}),
    "cls_attention": (cls_attention, ("saliency",), {}),
    "divprune": (divprune, (), {}),
    "scope": (scope, ("saliency",), {}),
    "holov": (holov, ("saliency",), {"crops": 3, "overflow": "redistribute"}),
    "cdpruner": (cdpruner, ("relevance",), {}),
    "mmtok": (mmtok, ("text",), {}),
    "dart": (dart, ("keys",), {"pivots": 2}),
}
COMPARING = [name for name in SELECTORS if name not in ("uniform", "cls_attention")]
EVERY = pytest.mark.parametrize("name", SELECTORS)


def draw(seed=0, batch=3, patches=PATCHES):
    rng = np.random.default_rng(seed)
    return {
        "patches": rng.standard_normal((batch, patches, WIDTH)).astype(np.float32),
        "saliency": rng.random((batch, patches), np.float32),
        "relevance": rng.standard_normal((batch, patches)).astype(np.float32),
        "keys": rng.standard_normal((batch, patches, 5)).astype(np.float32),
        "text": np.tanh(rng.standard_normal((batch, 4, patches))).astype(np.float32),
    }


def run(name, inputs, tokens, **more):
    function, reads, options = SELECTORS[name]
    options = {"pivots": 1} if name == "dart" and tokens == 1 else options
    return function(inputs["patches"], *(inputs[read] for read in reads), tokens=tokens, **options, **more)


def columns(inputs, index):
    """The inputs of one picture, patches `index` alone."""
    return {name: (x[:, :, index] if name == "text" else x[:, index]) for name, x in inputs.items()}


@EVERY
@pytest.mark.parametrize("tokens", [1, 7, PATCHES])
def test_exact_budget_of_different_patches_in_raster_order(name, tokens):
    inputs = draw()
    result = run(name, inputs, tokens)
    assert result.tokens_BMD.shape == (3, tokens, WIDTH)
    assert result.position_BM.dtype == result.size_BM.dtype == result.source_BP.dtype == jnp.int32
    assert bool(result.valid_BM.all()) and np.all(result.size_BM == 1)
    for row in range(3):
        position, source = np.asarray(result.position_BM[row]), np.asarray(result.source_BP[row])
        assert position.min() >= 0 and position.max() < PATCHES and np.all(np.diff(position) > 0)
        np.testing.assert_array_equal(result.tokens_BMD[row], inputs["patches"][row, position])
        np.testing.assert_array_equal(source[position], np.arange(tokens))
        assert (source >= 0).sum() == tokens


@EVERY
def test_padding_is_never_selected_and_counts_nowhere(name):
    inputs, valid = draw(seed=1), np.random.default_rng(2).random((3, PATCHES)) < 0.6
    valid[2] = np.arange(PATCHES) < 4
    result = run(name, inputs, 7, valid_BP=valid)

    def marks(name, x):
        return valid[:, None] if name == "text" else valid.reshape(valid.shape + (1,) * (x.ndim - 2))

    for paint in (50.0, np.nan):
        loud = {name: np.where(marks(name, x), x, np.float32(paint)) for name, x in inputs.items()}
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(run(name, loud, 7, valid_BP=valid)), strict=True):
            np.testing.assert_array_equal(a, b)
    for row in range(3):
        filled = min(7, valid[row].sum())
        np.testing.assert_array_equal(result.valid_BM[row], np.arange(7) < filled)
        assert valid[row][np.asarray(result.position_BM[row, :filled])].all()
        assert np.all(result.position_BM[row, filled:] == -1) and np.all(result.size_BM[row, filled:] == 0)
        assert not np.any(result.tokens_BMD[row, filled:]) and np.all(result.source_BP[row, ~valid[row]] == -1)


def test_chance_draws_no_padding():
    """Every valid patch now and then, no other one ever; and what chance alone draws where all are valid."""
    patches, valid = draw()["patches"], np.tile(np.arange(PATCHES) % 4 > 0, (3, 1))
    valid[2] = np.arange(PATCHES) < 5
    seen = np.zeros((3, PATCHES), int)
    for seed in range(60):
        result = random(patches, tokens=7, key=jax.random.key(seed), valid_BP=valid)
        np.testing.assert_array_equal(result.valid_BM.sum(axis=1), [7, 7, 5])
        seen += np.asarray(result.source_BP) >= 0
    np.testing.assert_array_equal(seen > 0, valid)
    key = jax.random.key(3)
    for found, expected in zip(
        jax.tree.leaves(random(patches, tokens=7, key=key, valid_BP=np.ones((3, PATCHES), bool))),
        jax.tree.leaves(random(patches, tokens=7, key=key)),
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "holov"])  # its crops are made of places
def test_a_picture_with_padding_is_the_smaller_picture(name):
    inputs, valid = draw(seed=3), np.arange(PATCHES) % 3 != 1
    index = np.flatnonzero(valid)
    masked = run(name, inputs, 7, valid_BP=np.tile(valid, (3, 1)))
    small = run(name, columns(inputs, index), 7)
    np.testing.assert_array_equal(masked.position_BM, index[np.asarray(small.position_BM)])


@EVERY
def test_a_picture_does_not_feel_its_neighbours(name):
    inputs, others = draw(seed=0), draw(seed=4)
    mixed = {key: np.concatenate([inputs[key][:1], 30 * others[key][1:]]) for key in inputs}
    for a, b in zip(jax.tree.leaves(run(name, mixed, 7)), jax.tree.leaves(run(name, inputs, 7)), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@EVERY
def test_jit_eager_and_vmap_agree(name):
    inputs = draw(batch=2, patches=6)  # small, because eager JAX goes operation by operation
    jitted = run(name, inputs, 2)
    with jax.disable_jit():
        eager = run(name, {key: jnp.asarray(x) for key, x in inputs.items()}, 2)

    def one(row):
        return jax.tree.map(lambda x: x[0], run(name, {key: x[None] for key, x in row.items()}, 2))

    for other in (eager, jax.jit(jax.vmap(one))(inputs)):
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@EVERY
def test_gradient_goes_through_the_kept_patches_alone(name):
    inputs = draw()
    inputs["patches"][:, 5] = 0.0
    weight = np.random.default_rng(5).standard_normal((3, 7, WIDTH)).astype(np.float32)
    found, result = jax.grad(lambda x: (lambda r: (jnp.sum(weight * r.tokens_BMD), r))(run(name, x, 7)), has_aux=True)(
        inputs
    )
    expected = np.zeros_like(inputs["patches"])
    for row in range(3):
        expected[row, np.asarray(result.position_BM[row])] = weight[row]
    np.testing.assert_array_equal(found["patches"], expected)
    for key in SELECTORS[name][1]:
        assert not np.any(found[key])


@EVERY
def test_bfloat16_chooses_in_float32_and_returns_bfloat16(name):
    half = {key: jnp.asarray(x, jnp.bfloat16) for key, x in draw().items()}
    result = run(name, half, 7)
    full = run(name, {key: x.astype(jnp.float32) for key, x in half.items()}, 7)
    assert result.tokens_BMD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.source_BP, full.source_BP)


@pytest.mark.parametrize("name", [name for name in COMPARING if name != "mmtok"])
def test_what_is_compared_need_not_be_what_is_kept(name):
    inputs, other = draw(), draw(seed=6)["patches"]
    result = run(name, inputs, 7, features_BPH=other)
    expected = run(name, {**inputs, "patches": other}, 7)
    np.testing.assert_array_equal(result.position_BM, expected.position_BM)
    np.testing.assert_array_equal(
        result.tokens_BMD, np.take_along_axis(inputs["patches"], np.asarray(result.position_BM)[:, :, None], axis=1)
    )


@EVERY
@pytest.mark.parametrize("tokens", [0, 21])
def test_impossible_budget_is_one_sentence(name, tokens):
    with pytest.raises(ValueError, match=rf"{name}: {tokens} tokens asked of 20 patches; it must be 1 \.\. 20"):
        run(name, draw(), tokens)


@EVERY
def test_arrays_that_do_not_fit_are_named(name):
    inputs = draw()
    with pytest.raises(ValueError, match=rf"{name}: valid has shape \(3, 19\); it must be \(3, 20\)"):
        run(name, inputs, 7, valid_BP=np.ones((3, 19), bool))
    if name in COMPARING:
        with pytest.raises(ValueError, match=rf"{name}: features has shape \(3, 19, 6\); it must be \(3, 20, any\)"):
            run(name, inputs, 7, features_BPH=inputs["patches"][:, 1:])
    for read in SELECTORS[name][1]:
        short = inputs[read][..., 1:] if read == "text" else inputs[read][:, 1:]
        with pytest.raises(ValueError, match=rf"{name}: .* has shape .*; it must be"):
            run(name, {**inputs, read: short}, 7)


@EVERY
def test_equal_patches_are_chosen_once_each(name):
    inputs = draw()
    inputs["patches"][:] = inputs["patches"][:, :1]
    result = run(name, inputs, 7)
    assert np.all(np.diff(result.position_BM, axis=1) > 0) and bool(result.valid_BM.all())


def test_greedy_takes_the_lower_index_of_equal_gains_and_padding_last():
    valid = np.array([[True, False, True, True]])
    gain = jnp.array([[1.0, 9.0, 2.0, 2.0]])
    order, chosen = greedy(4, valid, (), lambda state: gain, lambda state, pick, number: state)
    np.testing.assert_array_equal(order, [[2, 3, 0, 1]])
    assert chosen.all()


def test_slots_that_stay_empty_stand_at_the_end():
    patches = np.arange(8, dtype=np.float32).reshape(1, 4, 2)
    result = fill(patches, np.array([[False, True, False, True]]), 3)
    np.testing.assert_array_equal(result.tokens_BMD[0], [[2, 3], [6, 7], [0, 0]])
    np.testing.assert_array_equal(result.valid_BM, [[True, True, False]])
    np.testing.assert_array_equal(result.position_BM, [[1, 3, -1]])
    np.testing.assert_array_equal(result.source_BP, [[-1, 0, -1, 1]])


def test_raster_order_moves_slots_and_sources_together():
    tokens = VisualTokens(
        tokens_BMD=jnp.arange(5.0).reshape(1, 5, 1),
        valid_BM=jnp.array([[True, False, True, True, True]]),
        position_BM=jnp.array([[-1, -1, 3, 0, 2]]),
        size_BM=jnp.array([[0, 0, 2, 1, 1]]),
        source_BP=jnp.array([[3, -1, 4, 2, 2]]),
    )
    result = in_raster_order(tokens)
    np.testing.assert_array_equal(result.tokens_BMD[0, :, 0], [0, 3, 4, 2, 1])
    np.testing.assert_array_equal(result.position_BM, [[-1, 0, 2, 3, -1]])
    np.testing.assert_array_equal(result.valid_BM, [[True, True, True, True, False]])
    np.testing.assert_array_equal(result.size_BM, [[0, 1, 1, 2, 0]])
    np.testing.assert_array_equal(result.source_BP, [[1, -1, 2, 3, 3]])


def test_relevance_is_the_mean_cosine_with_the_words_that_count():
    rng = np.random.default_rng(0)
    patches, words = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 3, 4))
    valid = np.array([[True, False, True], [False, False, False]])
    norm = np.linalg.norm
    cosine = np.array([[[w @ p / norm(w) / norm(p) for p in patches[b]] for w in words[b]] for b in range(2)])
    np.testing.assert_allclose(question_similarity(patches, words), cosine, atol=1e-6)
    found = question_relevance(patches, words, valid)
    np.testing.assert_allclose(found[0], (cosine[0, 0] + cosine[0, 2]) / 2, atol=1e-6)
    np.testing.assert_array_equal(found[1], np.zeros(5))
    np.testing.assert_allclose(question_relevance(patches, words), cosine.mean(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match=r"question has shape \(2, 3, 3\); it must be \(2, any, 4\)"):
        question_similarity(patches, words[:, :, 1:])
    with pytest.raises(ValueError, match="text_valid has shape"):
        question_relevance(patches, words, valid[:, 1:])


def test_one_compilation_serves_all_pictures():
    traces = []

    @jax.jit
    def step(inputs):
        traces.append(1)
        return run("divprune", inputs, 7)

    for seed in range(3):
        step(draw(seed=seed))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(scope, combine="max"), r"scope: combine = 'max' is unknown; choose one of multiply, add"),
        (functools.partial(holov, overflow="drop"), r"holov: overflow = 'drop' .* official, redistribute"),
        (functools.partial(holov, crops=21), r"holov: crops = 21 asked of 20 patches; it must be 1 \.\. 20"),
        (functools.partial(holov, crops=0), r"holov: crops = 0 .* 1 \.\. 20"),
        (functools.partial(cdpruner, sign="minus"), r"cdpruner: sign = 'minus' .* official, plain"),
    ],
)
def test_unknown_options_are_named(call, message):
    inputs = draw()
    with pytest.raises(ValueError, match=message):
        call(inputs["patches"], inputs["saliency"], tokens=7)


@pytest.mark.parametrize("pivots", [0, 8])
def test_impossible_pivots_are_named(pivots):
    inputs = draw()
    with pytest.raises(ValueError, match=rf"dart: pivots = {pivots} asked of 7 tokens; it must be 1 \.\. 7"):
        dart(inputs["patches"], inputs["keys"], tokens=7, pivots=pivots)


@pytest.mark.parametrize("option", ["text_temperature", "vision_temperature"])
def test_temperatures_must_be_above_zero(option):
    inputs = draw()
    with pytest.raises(ValueError, match=rf"mmtok: {option} = 0.0 must be above 0"):
        mmtok(inputs["patches"], inputs["text"], tokens=7, **{option: 0.0})
