"""Pooling and unshuffling of the patch grid: plain loops, the struct that goes with the tokens, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax.compress import pool, unshuffle

RNG = np.random.default_rng(0)
PICTURE = RNG.standard_normal((2, 7, 7, 3)).astype(np.float32)
FLAT = PICTURE.reshape(2, 49, 3)


def looped_pool(picture, factor, mode):
    """One picture [S, S, D], token by token."""
    side = len(picture)
    if mode != "bilinear":
        grid = side // factor
        windows = [
            picture[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].reshape(factor**2, -1)
            for i in range(grid)
            for j in range(grid)
        ]
        return np.array([w.mean(axis=0) if mode == "average" else w.max(axis=0) for w in windows])
    grid = -(-side // factor)

    def sample(line, i):
        at = max((i + 0.5) * side / grid - 0.5, 0.0)
        low = int(at)
        high = min(low + 1, side - 1)
        return (1 - (at - low)) * line[low] + (at - low) * line[high]

    return np.array([sample([sample(row, j) for row in picture], i) for i in range(grid) for j in range(grid)])


@pytest.mark.parametrize("mode", pool.MODES)
@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_stride_pool_equals_the_loop(mode, factor):
    found = pool.stride_pool(FLAT, factor=factor, mode=mode)
    grid = pool.pooled_side(7, factor, mode)
    assert found.tokens_BMD.shape == (2, grid**2, 3) and bool(found.valid_BM.all())
    for row in range(2):
        np.testing.assert_allclose(found.tokens_BMD[row], looped_pool(PICTURE[row], factor, mode), atol=1e-6)
        source, position = np.asarray(found.source_BP[row]), np.asarray(found.position_BM[row])
        np.testing.assert_array_equal(found.size_BM[row], np.bincount(source[source >= 0], minlength=grid**2))
        # A token stands on a patch that is its own, and a patch goes to a token that reads it.
        np.testing.assert_array_equal(source[position], np.arange(grid**2))
        for patch, slot in enumerate(source):
            for place, number in zip(divmod(patch, 7), divmod(slot, grid)):
                if mode == "bilinear":
                    assert abs((number + 0.5) * 7 / grid - 0.5 - place) <= 7 / grid / 2 + 1e-9
                else:
                    assert slot < 0 or place // factor == number
    dropped = 0 if mode == "bilinear" else 49 - (7 // factor * factor) ** 2
    assert np.sum(np.asarray(found.source_BP[0]) == -1) == dropped


def test_pooling_is_float32_inside_and_keeps_the_dtype():
    half = jnp.asarray(FLAT, jnp.bfloat16)
    for mode in pool.MODES:
        found = pool.stride_pool(half, factor=2, mode=mode).tokens_BMD
        exact = pool.stride_pool(half.astype(jnp.float32), factor=2, mode=mode).tokens_BMD
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_nested_grids():
    assert pool.nested_grids(24) == (24, 12, 6, 3, 1)  # the 576, 144, 36, 9 and 1 tokens of M3
    assert pool.nested_grids(16) == (16, 8, 4, 2, 1)
    assert pool.nested_grids(27) == (27, 1)
    assert pool.nested_grids(1) == (1,)


SIX = RNG.standard_normal((4, 36, 3)).astype(np.float32)


def test_nested_levels_are_pools_of_one_another():
    levels = [pool.nested_pool(SIX, level=level) for level in range(3)]
    np.testing.assert_array_equal(levels[0].tokens_BMD, SIX)
    for level, factor in ((1, 2), (2, 6)):
        for row in range(4):
            loop = looped_pool(SIX[row].reshape(6, 6, 3), factor, "average")
            np.testing.assert_allclose(levels[level].tokens_BMD[row], loop, atol=1e-6)
    np.testing.assert_allclose(levels[2].tokens_BMD[:, 0], levels[1].tokens_BMD.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("finest", [0, 1])
def test_a_level_for_each_picture_is_that_level(finest):
    drawn = np.array([1, 2, finest, 2])
    found = pool.nested_pool_by_picture(SIX, drawn, finest=finest)
    most = pool.nested_grids(6)[finest]
    assert found.tokens_BMD.shape == (4, most**2, 3)
    for row, level in enumerate(drawn):
        alone = pool.nested_pool(SIX[row : row + 1], level=int(level))
        valid = np.asarray(found.valid_BM[row])
        grid = pool.nested_grids(6)[level]
        np.testing.assert_array_equal(np.argwhere(valid.reshape(most, most)), list(np.ndindex(grid, grid)))
        for name in ("tokens_BMD", "position_BM", "size_BM"):
            np.testing.assert_allclose(getattr(found, name)[row][valid], getattr(alone, name)[0], atol=1e-6)
        # Slots are counted on the finest grid.
        slots = np.flatnonzero(valid)
        np.testing.assert_array_equal(found.source_BP[row], slots[np.asarray(alone.source_BP[0])])


@pytest.mark.parametrize("order", unshuffle.ORDERS)
@pytest.mark.parametrize(("height", "width", "factor"), [(4, 4, 2), (6, 3, 3), (2, 6, 2), (3, 3, 1)])
def test_unshuffle_equals_the_loop(order, height, width, factor):
    patches = RNG.standard_normal((2, height * width, 3)).astype(np.float32)
    square = None if height == width else height
    found = unshuffle.pixel_unshuffle(patches, factor=factor, order=order, height=square)
    down, across = height // factor, width // factor
    slots = [(i, j) for i in range(down) for j in range(across)]
    if order == "v1":
        slots = [(i, j) for j in range(across) for i in range(down)]
    for slot, (i, j) in enumerate(slots):
        inside = [(i * factor + dy) * width + j * factor + dx for dy in range(factor) for dx in range(factor)]
        for row in range(2):
            np.testing.assert_array_equal(found.tokens_BMD[row, slot], patches[row][inside].ravel())
        assert np.all(np.asarray(found.source_BP[0])[inside] == slot)
        assert int(found.position_BM[0, slot]) in inside
        assert int(found.position_BM[0, slot]) == inside[(factor - 1) // 2 * (factor + 1)]
    assert np.all(np.asarray(found.size_BM) == factor**2) and bool(found.valid_BM.all())


def test_one_picture_is_not_another():
    """Every function, compiled and not, with the first picture replaced."""
    other = FLAT.copy()
    other[0] = 7 * FLAT[1] + 1
    functions = [lambda x, mode=mode: pool.stride_pool(x, factor=2, mode=mode) for mode in pool.MODES]
    functions += [
        lambda x: unshuffle.pixel_unshuffle(x, factor=7),
        lambda x: pool.nested_pool_by_picture(x, jnp.array([1, 0])),
    ]
    for function in functions:
        first, second = function(FLAT), function(other)
        with jax.disable_jit():
            eager = function(FLAT)
        for a, b, c in zip(jax.tree.leaves(first), jax.tree.leaves(second), jax.tree.leaves(eager)):
            np.testing.assert_array_equal(a[1], b[1])
            np.testing.assert_allclose(a, c, atol=1e-6)
        assert np.any(first.tokens_BMD[0] != second.tokens_BMD[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool.stride_pool(FLAT[:, :48], factor=2), "stride_pool: 48 patches do not form a square"),
        (lambda: pool.stride_pool(FLAT, factor=8), r"factor = 8 asked of 7 x 7 patches; it must be 1 \.\. 7"),
        (lambda: pool.stride_pool(FLAT, factor=0), r"factor = 0 asked of 7 x 7 patches; it must be 1 \.\. 7"),
        (lambda: pool.stride_pool(FLAT, factor=2, mode="mean"), "mode = 'mean' is unknown; choose one of 'average'"),
        (lambda: pool.nested_pool(SIX, level=3), r"level = 3 asked of 6 x 6 patches; it must be 0 .* \.\. 2"),
        (lambda: pool.nested_pool_by_picture(SIX, np.zeros(4, int), finest=-1), "level = -1 asked of 6 x 6"),
        (lambda: unshuffle.pixel_unshuffle(FLAT, factor=2), "factor = 2 must be a divisor of both sides of the 7 x 7"),
        (lambda: unshuffle.pixel_unshuffle(FLAT, factor=7, order="v3"), "order = 'v3' is unknown; choose 'v1' or 'v2'"),
        (lambda: unshuffle.pixel_unshuffle(FLAT, factor=1, height=5), "height = 5 must be a divisor of the 49"),
        (lambda: unshuffle.pixel_unshuffle(FLAT[:, :48], factor=2), "48 patches do not form a square"),
    ],
)
def test_refusals_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
