"""The baseline in front of everything: a smaller picture (arXiv 2510.07143).

A picture of side s gives (s / patch)^2 patches, so that shrinking it is the plainest way to fewer tokens, and it makes
the encoder cheaper too. What a tower of ours (`vit`) needs for it:

    small = dataclasses.replace(cfg.vit, image_size=side)                       # the grid follows
    params = {**params, "pos": resize_positions(params["pos"], grid=small.grid)}  # one row a patch, and CLS
    features = vit.features(dataclasses.replace(cfg, vit=small), params, normalise(downsample(images, side=side)))

The positions are resized once, not at every step; a tower with rotary positions needs the first line alone. All
tokens of the small picture are valid; `small_places` says where in the large grid each of them stands.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, NoOptions, Plan, Tower
from tokzip_jax.compress.pool import bins
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def check_side(image: int, side: int, patch: int) -> int:
    """The grid of a picture of `image` pixels that is shrunk to `side`.

    Raises:
        ValueError: `side` is no multiple of the patch, or not patch .. image.
    """
    if not patch <= side <= image or side % patch:
        raise ValueError(
            f"downsample: side = {side} asked of a picture of {image} pixels; it must be a multiple of the patch "
            f"({patch}), {patch} .. {image // patch * patch}"
        )
    return side // patch


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def shrink_matrix(length: int, target: int) -> np.ndarray:
    """Bicubic resampling as Pillow does it, [target, length] float64: half-pixel centres, a = -0.5, the kernel widened
    by the factor of shrinking (antialias), cut off at the border and normalised."""
    scale = length / target
    support = max(scale, 1.0)
    centre = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    weight = _cubic((np.arange(length)[None] - centre) / support, -0.5)
    return weight / weight.sum(axis=1, keepdims=True)


def positions_matrix(length: int, target: int) -> np.ndarray:
    """Bicubic interpolation as PyTorch does it, [target, length] float64: half-pixel centres, a = -0.75, four taps
    whatever the factor (no antialias), the border repeated."""
    centre = (np.arange(target) + 0.5) * (length / target) - 0.5
    matrix = np.zeros((target, length))
    for tap in range(-1, 3):
        place = np.floor(centre) + tap
        weight = _cubic(centre - place, -0.75)
        np.add.at(matrix, (np.arange(target), np.clip(place, 0, length - 1).astype(int)), weight)
    return matrix


def small_places(grid: int, small: int) -> np.ndarray:
    """Raster index, in a grid x grid picture, of the middle of each token of its small x small version: [small^2].

    Raises:
        ValueError: `small` is not 1 .. grid.
    """
    if not 1 <= small <= grid:
        raise ValueError(f"downsample: a grid of {small} made of one of {grid}; it must be 1 .. {grid}")
    first, last = bins(grid, small)
    middle = (first + last) // 2
    return (middle[:, None] * grid + middle[None, :]).ravel().astype(np.int32)


@functools.partial(jax.jit, static_argnames="side")
def downsample(images_BHWC: Array, *, side: int) -> Array:
    """Shrink pictures to side x side with Pillow's bicubic filter (aspect is not kept; pad to a square before).

    Args:
        images_BHWC: [B, H, W, C] uint8 or any float dtype.
        side: 1 .. min(H, W).

    Returns:
        [B, side, side, C] of the same dtype. uint8 is rounded and clipped after each of the two passes, as Pillow
        does; floats may overshoot their range a little, and are computed in float32.

    Raises:
        ValueError: a side out of range.
    """
    _, height, width, _ = images_BHWC.shape
    if not 1 <= side <= min(height, width):
        raise ValueError(
            f"downsample: side = {side} asked of {height} x {width} pixels; it must be 1 .. {min(height, width)}"
        )

    def settle(x: Array) -> Array:
        # Pillow rounds half up; the sums are above -0.5 only after clipping.
        whole = images_BHWC.dtype == jnp.uint8
        return jnp.floor(jnp.clip(x, 0.0, 255.0) + 0.5) if whole else x

    along_w = jnp.asarray(shrink_matrix(width, side), jnp.float32)
    along_h = jnp.asarray(shrink_matrix(height, side), jnp.float32)
    x = settle(jnp.einsum("vw,BhwC->BhvC", along_w, images_BHWC.astype(jnp.float32), precision=ops.EXACT))
    x = settle(jnp.einsum("uh,BhvC->BuvC", along_h, x, precision=ops.EXACT))
    return x.astype(images_BHWC.dtype)


@functools.partial(jax.jit, static_argnames=("grid", "prefix"))
def resize_positions(position_SD: Array, *, grid: int, prefix: int = 1) -> Array:
    """Learned position embeddings of a square grid for another grid, the way CLIP towers are usually resized.

    Args:
        position_SD: [prefix + G * G, D] one row a token, raster order behind the prefix.
        grid: side of the new grid, at least 1.
        prefix: rows in front that belong to no patch (1: the CLS token); they stay.

    Returns:
        [prefix + grid * grid, D] of the same dtype, interpolated in float32. The same grid gives the same rows.

    Raises:
        ValueError: the rows behind the prefix are no square, or a grid below 1.
    """
    rows, width = position_SD.shape
    old = math.isqrt(max(rows - prefix, 0))
    if old < 1 or old * old != rows - prefix:
        raise ValueError(
            f"resize_positions: {rows} rows with {prefix} in front leave {rows - prefix}; it must be a square number"
        )
    if grid < 1:
        raise ValueError(f"resize_positions: grid = {grid} must be at least 1")
    along = jnp.asarray(positions_matrix(old, grid), jnp.float32)
    table = position_SD[prefix:].astype(jnp.float32).reshape(old, old, width)
    table = jnp.einsum("gh,hwD->gwD", along, table, precision=ops.EXACT)
    table = jnp.einsum("fw,gwD->gfD", along, table, precision=ops.EXACT).reshape(grid * grid, width)
    return jnp.concatenate([position_SD[:prefix], table.astype(position_SD.dtype)])


def small_sources(grid: int, small: int) -> np.ndarray:
    """For every patch of a grid x grid picture the nearest token of its small version, row by row: [grid^2]."""
    first, last = bins(grid, small)
    middle = (first + last) // 2
    nearest = np.argmin(np.abs(np.arange(grid)[:, None] - middle[None]), axis=1)
    return (nearest[:, None] * small + nearest[None, :]).ravel().astype(np.int32)


def _plan(tower: Tower, tokens: int, options: NoOptions) -> Plan:
    return Plan(grid=math.isqrt(tokens))


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    batch, tokens, _ = features.patches_BPD.shape
    grid, small = ask.tower.rows, math.isqrt(tokens)
    source_P = small_sources(grid, small)

    def every(x: np.ndarray) -> Array:
        return jnp.broadcast_to(jnp.asarray(x, jnp.int32)[None], (batch, len(x)))

    return VisualTokens(
        tokens_BMD=features.patches_BPD,
        valid_BM=jnp.ones((batch, tokens), bool),
        position_BM=every(small_places(grid, small)),
        size_BM=every(np.bincount(source_P, minlength=tokens)),
        source_BP=every(source_P),
    )


def _budget(tower: Tower, tokens: int, options: NoOptions) -> None:
    small = math.isqrt(max(tokens, 0))
    if small**2 != tokens or not 1 <= small <= tower.rows:
        raise ValueError(
            f"downsample: {tokens} tokens are no smaller square grid; tokens must be the square of 1 .. {tower.rows}"
        )
    if tower.window and small % tower.window:
        raise ValueError(
            f"downsample: {tokens} tokens make {small} x {small} patches, which windows of {tower.window} do not fill; "
            f"the side must be a multiple of {tower.window}"
        )


ENTRIES = {
    "downsample": Encoder(
        function=_apply,
        budget=_budget,
        plan=_plan,
        square=True,
        classes=("transformation",),
        reads="the picture",
        source="arXiv 2510.07143",
    )
}
