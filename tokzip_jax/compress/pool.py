"""Pooling of the patch grid to a smaller grid."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress import ops
from tokzip_jax.types import Array, VisualTokens


def check_grid(patches: int, grid: int) -> int:
    """The side of the square patch grid.

    Raises:
        ValueError: the patches are no square, or `grid` is not 1 .. side.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"average_pool: {patches} patches do not form a square; it must be a square number of them")
    if not 1 <= grid <= side:
        raise ValueError(f"average_pool: grid = {grid} asked of {side} x {side} patches; it must be 1 .. {side}")
    return side


def bins(side: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last place of each of `grid` bins over `side` places, by PyTorch's AdaptiveAvgPool rule.

    Bin i covers floor(i side / grid) .. ceil((i + 1) side / grid) - 1: neighbours overlap where grid does not divide
    side.
    """
    number = np.arange(grid)
    return number * side // grid, -(-(number + 1) * side // grid) - 1


@functools.partial(jax.jit, static_argnames="grid")
def average_pool(patches_BPD: Array, *, grid: int) -> VisualTokens:
    """Adaptive average pooling of the square patch grid (AdaptiveAvgPool2d) to grid x grid tokens.

    Args:
        patches_BPD: [B, P, D] in raster order, P a square number.
        grid: side of the result, 1 .. sqrt(P). 1 with a linear layer behind is a baseline of VoCo-LLaMA's Table 1.

    Returns:
        `VisualTokens` with M = grid * grid in raster order, averaged in float32, in the patches' dtype. The position
        is the patch in the middle of the bin (the upper left one of four). Where bins overlap, a patch is averaged
        into several tokens but its `source` is one of them, and `size` counts sources: sizes always sum to P.

    Raises:
        ValueError: P is not a square number, or the grid is impossible.
    """
    batch, patches, width = patches_BPD.shape
    side = check_grid(patches, grid)
    first, last = bins(side, grid)
    place = np.arange(side)
    inside = (first[:, None] <= place) & (place <= last[:, None])
    mean = jnp.asarray(inside / inside.sum(1, keepdims=True), jnp.float32)
    picture = patches_BPD.astype(jnp.float32).reshape(batch, side, side, width)
    rows = jnp.einsum("gh,Bhwd->Bgwd", mean, picture, precision=ops.EXACT)
    tokens = jnp.einsum("fw,Bgwd->Bgfd", mean, rows, precision=ops.EXACT)

    middle, of = (first + last) // 2, place * grid // side
    position = (middle[:, None] * side + middle[None, :]).ravel()
    source = (of[:, None] * grid + of[None, :]).ravel()

    def rows_of(values: np.ndarray) -> Array:
        return jnp.broadcast_to(values.astype(np.int32)[None], (batch, values.size))

    return VisualTokens(
        tokens_BMD=tokens.reshape(batch, grid * grid, width).astype(patches_BPD.dtype),
        valid_BM=jnp.ones((batch, grid * grid), bool),
        position_BM=rows_of(position),
        size_BM=rows_of(np.bincount(source, minlength=grid * grid)),
        source_BP=rows_of(source),
    )
