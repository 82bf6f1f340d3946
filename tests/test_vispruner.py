"""VisPruner against a plain loop over lists, and in the corners of its budget."""

import functools

import jax
import jax.numpy as jnp
import merging
import numpy as np
import padded
import pytest

from tokzip_jax.compress.vispruner import check_budget, rounds, vispruner

RNG = np.random.default_rng(0)
PATCHES = RNG.normal(size=(3, 25, 6)).astype(np.float32)
SCORE = RNG.random((3, 25), np.float32)


def loop(patches, score, tokens, important=0.5, step=8):
    """One picture: lists that shrink, as the paper describes it."""
    by_attention = sorted(range(len(patches)), key=lambda i: (-score[i], i))
    first = int(tokens * important)
    chosen, listed = by_attention[:first], by_attention[first:]
    units = [x.astype(float) / (np.linalg.norm(x.astype(float)) or 1.0) for x in patches]
    while len(listed) > tokens - first:
        if tokens == first:
            break
        even, odd = listed[::2], listed[1::2]
        likeness = [max(units[e] @ units[o] for o in odd) for e in even]
        order = sorted(range(len(even)), key=lambda n: (-likeness[n], n))
        listed = [even[n] for n in order[min(step, len(listed) - (tokens - first)) :]] + odd
    return sorted(chosen + (listed if tokens > first else []))


# Several rounds, an odd list, rounds that run out of even places, one token, everything, attention alone, none of it.
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 10, "step": 2},
        {"tokens": 9, "step": 3},
        {"tokens": 2},
        {"tokens": 1},
        {"tokens": 25},
        {"tokens": 8, "important": 1.0},
        {"tokens": 8, "important": 0.0, "step": 4},
    ],
)
def test_equals_the_loop(options):
    result = vispruner(PATCHES, SCORE, **options)
    tokens = options["tokens"]
    assert result.position_BM.shape == (3, tokens) and bool(result.valid_BM.all())
    merging.assert_books(result, 25, dropped=True)
    for row in range(3):
        kept = loop(PATCHES[row], SCORE[row], **options)
        np.testing.assert_array_equal(result.position_BM[row], kept)
        np.testing.assert_array_equal(result.tokens_BMD[row], PATCHES[row, kept])
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(result.source_BP[row]) >= 0), kept)


def test_many_rounds_with_exact_ties():
    """Entries +-1 in four of nine places make all cosines quarters, exactly: ties that every round has to break."""
    rng = np.random.default_rng(1)
    patches = np.zeros((1, 144, 9), np.float32)
    for patch in patches[0]:
        patch[rng.choice(9, 4, replace=False)] = rng.choice([-1.0, 1.0], 4)
    score = rng.random((1, 144), np.float32)
    assert rounds(136, 8, 8) == (8,) * 16 and rounds(544, 32, 8) == (8,) * 64
    found = vispruner(patches, score, tokens=16)
    np.testing.assert_array_equal(found.position_BM[0], loop(patches[0], score[0], tokens=16))


def test_a_duplicate_goes_before_what_is_alone():
    # By attention the list is 0 .. 5; 0 is the double of 1, and 3 is 2 turned round.
    patches = np.array([[[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]], np.float32)
    score = np.linspace(1.0, 0.5, 6, dtype=np.float32)[None]
    result = vispruner(patches, score, tokens=5, important=0.0)
    np.testing.assert_array_equal(result.position_BM, [[1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(result.source_BP, [[-1, 0, 1, 2, 3, 4]])


def test_ties_take_what_stands_first():
    result = vispruner(np.zeros((1, 9, 2), np.float32), np.ones((1, 9), np.float32), tokens=4, step=2)
    np.testing.assert_array_equal(result.position_BM[0], loop(np.zeros((9, 2)), np.ones(9), tokens=4, step=2))


def test_jit_eager_vmap_and_neighbours():
    run = functools.partial(vispruner, tokens=10, step=2)
    jitted = run(PATCHES, SCORE)
    with jax.disable_jit():
        eager = run(jnp.asarray(PATCHES[:1]), jnp.asarray(SCORE[:1]))
    single = jax.vmap(lambda x, s: jax.tree.map(lambda y: y[0], run(x[None], s[None])))(PATCHES, SCORE)
    turned = jax.tree.map(lambda y: y[::-1], run(PATCHES[::-1], SCORE[::-1]))
    for other in (eager, single, turned):
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(other)):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a[: len(b)], b)


@pytest.mark.parametrize("layout", padded.LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{"tokens": 6, "step": 2}, {"tokens": 7, "step": 3, "important": 0.0}, {"tokens": 7, "important": 1.0}],
)
def test_a_picture_with_padding_is_the_smaller_picture(layout, options):
    valid = padded.masks((20, 9, 15), 25, layout)
    padded.assert_as_alone(functools.partial(vispruner, **options), (PATCHES, SCORE), valid)


@pytest.mark.parametrize("important", [0.5, 1.0])
def test_fewer_patches_than_tokens_are_all_kept(important):
    valid = padded.masks((9, 4, 0), 25, "scattered")
    result = vispruner(PATCHES, SCORE, tokens=10, step=2, important=important, valid_BP=valid)
    np.testing.assert_array_equal(np.asarray(result.source_BP) >= 0, valid)
    np.testing.assert_array_equal(result.valid_BM, np.arange(10)[None] < [[9], [4], [0]])
    np.testing.assert_array_equal(result.size_BM, result.valid_BM)
    merging.assert_books(result, 25, dropped=True)
    np.testing.assert_array_equal(result.tokens_BMD[0, :9], PATCHES[0, valid[0]])


def test_padding_counts_nowhere():
    run = functools.partial(vispruner, tokens=10, step=2)
    padded.assert_padding_counts_nowhere(run, (PATCHES, SCORE), padded.masks((20, 13, 6), 25, "scattered"))


def test_gradient_goes_to_kept_patches_alone():
    patches = PATCHES.copy()
    patches[:, 3] = 0.0
    loss = jax.jit(jax.grad(lambda x, s: jnp.sum(vispruner(x, s, tokens=10, step=2).tokens_BMD), argnums=(0, 1)))
    by_patches, by_score = loss(patches, SCORE)
    kept = np.asarray(vispruner(patches, SCORE, tokens=10, step=2).source_BP) >= 0
    np.testing.assert_array_equal(by_patches, np.repeat(kept[:, :, None], 6, axis=2))
    assert not np.any(by_score)


def test_bfloat16_is_chosen_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (PATCHES, SCORE)]
    low = vispruner(*half, tokens=10, step=2)
    high = vispruner(*(x.astype(jnp.float32) for x in half), tokens=10, step=2)
    assert low.tokens_BMD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low.source_BP, high.source_BP)


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match=r"VisPruner: 26 tokens asked of 25 patches; it must be 1 \.\. 25"):
        vispruner(PATCHES, SCORE, tokens=26)
    with pytest.raises(ValueError, match=r"0 tokens .* must be 1 \.\. 25"):
        check_budget(25, 0)
    with pytest.raises(ValueError, match=r"important = 1.5, a share of the tokens, must be 0 \.\. 1"):
        check_budget(25, 4, important=1.5)
    with pytest.raises(ValueError, match="step = 0 must be at least 1"):
        vispruner(PATCHES, SCORE, tokens=4, step=0)
    with pytest.raises(ValueError, match=r"scores have shape \(3, 24\); 25 patches need \(3, 25\)"):
        vispruner(PATCHES, SCORE[:, 1:], tokens=4)
    for tokens in (4, 25):
        with pytest.raises(ValueError, match=r"VisPruner: valid has shape \(3, 24\); it must be \(3, 25\)"):
            vispruner(PATCHES, SCORE, tokens=tokens, valid_BP=np.ones((3, 24), bool))
