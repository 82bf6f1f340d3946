"""Shrinking against Pillow, position embeddings against a plain loop, and both through a tower."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tokzip_jax import vit
from tokzip_jax.compress.downsample import check_side, downsample, resize_positions, small_places
from tokzip_jax.config import VitConfig

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("height", "width", "side"), [(48, 48, 24), (50, 37, 16)])
def test_uint8_pictures_are_shrunk_as_pillow_does_it(height, width, side):
    image = RNG.integers(0, 256, (2, height, width, 3), np.uint8)
    found = np.asarray(downsample(image, side=side))
    assert found.dtype == np.uint8 and found.shape == (2, side, side, 3)
    expected = np.stack([np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in image])
    # Pillow works with weights of 22 bits: a sum that lies on a half may fall to the other side.
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and np.mean(difference == 0) > 0.999


def test_float_pictures_agree_with_jax():
    image = RNG.random((1, 40, 40, 2)).astype(np.float32)
    found = downsample(image, side=12)
    expected = jax.image.resize(image, (1, 12, 12, 2), "cubic", antialias=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_same_side_is_the_same_picture():
    image = RNG.integers(0, 256, (1, 12, 12, 3), np.uint8)
    np.testing.assert_array_equal(downsample(image, side=12), image)


def cubic(x, a=-0.75):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def positions_loop(table, grid):
    """Sixteen taps a place, places beyond the border read the border."""
    old = table.shape[0]
    out = np.zeros((grid, grid, table.shape[2]))
    for i in range(grid):
        for j in range(grid):
            y, x = ((n + 0.5) * old / grid - 0.5 for n in (i, j))
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    v, u = math.floor(y) + dy, math.floor(x) + dx
                    weight = cubic(y - v) * cubic(x - u)
                    out[i, j] += weight * table[min(max(v, 0), old - 1), min(max(u, 0), old - 1)]
    return out


@pytest.mark.parametrize("grid", [3, 4, 9])
def test_positions_equal_the_loop(grid):
    positions = RNG.standard_normal((1 + 36, 5)).astype(np.float32)
    found = resize_positions(positions, grid=grid)
    np.testing.assert_array_equal(found[0], positions[0])
    expected = positions_loop(positions[1:].reshape(6, 6, 5).astype(np.float64), grid)
    np.testing.assert_allclose(found[1:], expected.reshape(-1, 5), atol=1e-5)


def test_positions_of_the_same_grid_and_without_a_prefix():
    positions = RNG.standard_normal((36, 5)).astype(np.float32)
    np.testing.assert_allclose(resize_positions(positions, grid=6, prefix=0), positions, atol=1e-6)
    np.testing.assert_allclose(resize_positions(np.ones((37, 2)), grid=4), 1.0, atol=1e-6)
    assert resize_positions(jnp.ones((37, 2), jnp.bfloat16), grid=4).dtype == jnp.bfloat16


def test_a_tower_reads_the_smaller_picture_with_resized_positions():
    cfg = VitConfig(image_size=12, patch_size=2, width=4, layers=1, heads=1, mlp_dim=4)
    norm = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    params = {
        "patch": {"kernel": RNG.standard_normal((2, 2, 3, 4)).astype(np.float32)},
        "cls": np.ones(4, np.float32),
        "pos": RNG.standard_normal((37, 4)).astype(np.float32),
        "pre_norm": norm,
    }
    small = dataclasses.replace(cfg, image_size=8)
    assert check_side(cfg.image_size, small.image_size, cfg.patch_size) == small.grid == 4
    flat = jnp.full((1, 12, 12, 3), 100, jnp.uint8)
    resized = {**params, "pos": resize_positions(params["pos"], grid=small.grid)}
    found = vit.embed(small, resized, vit.normalise(downsample(flat, side=8)))
    assert found.shape == (1, 1 + small.patches, 4)
    # A picture of one colour looks the same at any size: only the positions of the patches may differ.
    same = vit.embed(cfg, {**params, "pos": jnp.zeros_like(params["pos"])}, vit.normalise(flat))
    unplaced = {**resized, "pos": jnp.zeros_like(resized["pos"])}
    np.testing.assert_allclose(
        vit.embed(small, unplaced, vit.normalise(downsample(flat, side=8)))[0, 1], same[0, 1], atol=1e-5
    )


def test_small_places_are_the_middles():
    np.testing.assert_array_equal(small_places(6, 3), [0, 2, 4, 12, 14, 16, 24, 26, 28])
    np.testing.assert_array_equal(small_places(6, 2), [7, 10, 25, 28])
    np.testing.assert_array_equal(small_places(4, 4), np.arange(16))
    for small in (0, 7):
        with pytest.raises(ValueError, match=rf"a grid of {small} made of one of 6; it must be 1 \.\. 6"):
            small_places(6, small)


@pytest.mark.parametrize("side", [0, 7, 350])
def test_impossible_sides_are_one_sentence(side):
    with pytest.raises(ValueError, match=rf"side = {side} .* multiple of the patch \(14\), 14 \.\. 336"):
        check_side(336, side, 14)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"side = 13 asked of 12 x 14 pixels; it must be 1 \.\. 12"):
        downsample(np.zeros((1, 12, 14, 3)), side=13)
    with pytest.raises(ValueError, match=r"36 rows with 1 in front leave 35; it must be a square number"):
        resize_positions(np.zeros((36, 2)), grid=3)
    with pytest.raises(ValueError, match=r"grid = 0 must be at least 1"):
        resize_positions(np.zeros((37, 2)), grid=0)
