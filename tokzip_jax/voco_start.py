"""What VoCo tokens start from: a learned embedding (the paper), or also the patches of a part of the picture.

In the first layer the keys and values of a VoCo token are made from what it starts from alone. With an embedding that
is the same for every picture, the first layer of the cache holds nothing about it. With a mean of projected patches the
tokens begin as average pooling with a grid of k parts, and the layers go on from there.

A mean knows what is in a part and not where. So the patches may also be pooled in the finer cells of a grid over the
picture, each cell with a matrix of its own: that is pixel unshuffle and a linear layer, on pooled patches. The matrices
are what is added to the mean, and zero at first, when the tokens begin as "pooled" ones do.

The parts are those of all k tokens: with fewer of them in use, the first ones would stand for the upper parts alone.
"""

import math

import jax.numpy as jnp

from tokzip_jax.types import Array, VisualTokens

STARTS = ("embedding", "pooled", "cells")


def parts(count: int) -> tuple[int, int]:
    """Rows and columns of `count` parts of a picture, as near to a square as can be, rows <= columns: 8 is (2, 4)."""
    rows = next(side for side in range(math.isqrt(count), 0, -1) if count % side == 0)
    return rows, count // rows


def pooled(visual: VisualTokens, count: int, *, grid: int) -> Array:
    """The mean of the tokens that stand in each of `count` parts, weighted by the patches that they speak for.

    Args:
        visual: [B, M] tokens of pictures of grid * grid patches. Those without a place belong to no part.
        count: k, in raster order of the parts (`parts`).
        grid: patches along a side.

    Returns:
        [B, k, D] in the tokens' dtype, averaged in float32; zeros for a part without a token.
    """
    return _means(visual, _index(visual, parts(count), grid), count).astype(visual.tokens_BMD.dtype)


def from_cells(visual: VisualTokens, count: int, weights_CDD: Array, *, grid: int) -> Array:
    """`pooled`, and on top of it the mean of each cell of a part, times that cell's matrix.

    Args:
        visual, count, grid: as in `pooled`.
        weights_CDD: [inputs, outputs] for each cell of a square grid over the picture, in raster order. A cell that
            two parts share gives each of them the mean of its tokens there.

    Returns:
        As `pooled`.
    """
    cells, width, _ = weights_CDD.shape
    side = math.isqrt(cells)
    part_BM = _index(visual, parts(count), grid)
    both_BM = part_BM * cells + _index(visual, (side, side), grid)
    cell_BkCD = _means(visual, both_BM, count * cells).reshape(-1, count, cells, width)
    start_BkD = _means(visual, part_BM, count) + jnp.einsum("BkCD,CDE->BkE", cell_BkCD, weights_CDD.astype(jnp.float32))
    return start_BkD.astype(visual.tokens_BMD.dtype)


def flops(start: str, count: int, visual: int, width: int, cells: int) -> int:
    """FLOPs of what `count` VoCo tokens of a picture start from, beside their embeddings.

    Args:
        start: one of `STARTS`.
        count: VoCo tokens.
        visual: visual tokens of a picture, [visual, width].
        width: of the language model.
        cells: along a picture's side.
    """
    if start == "embedding":
        return 0
    means = 2 * count * visual * width
    return means + (cells**2 * (means + 2 * count * width**2) if start == "cells" else 0)


def _index(visual: VisualTokens, shape: tuple[int, int], grid: int) -> Array:
    """[B, M] which field of a grid of `shape` over the picture a token stands in, in raster order."""
    rows, columns = shape
    down, across = visual.position_BM // grid, visual.position_BM % grid
    return down * rows // grid * columns + across * columns // grid


def _means(visual: VisualTokens, index_BM: Array, count: int) -> Array:
    """[B, count, D] float32, the means of the tokens of each index, by their sizes; zeros where there is none."""
    real_BM = visual.valid_BM & (visual.position_BM >= 0)
    member_BkM = (index_BM[:, None] == jnp.arange(count)[None, :, None]) & real_BM[:, None]
    weight_BkM = jnp.where(member_BkM, visual.size_BM[:, None], 0).astype(jnp.float32)
    total_BkD = jnp.einsum("BkM,BMD->BkD", weight_BkM, visual.tokens_BMD.astype(jnp.float32))
    return total_BkD / jnp.maximum(weight_BkM.sum(axis=2), 1.0)[:, :, None]
