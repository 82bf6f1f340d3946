"""Pixel unshuffle: blocks of neighbouring patches become one wider token, and nothing is lost."""

import functools

import jax
import numpy as np

from tokzip_jax.compress.pool import check_square, placed
from tokzip_jax.types import Array, VisualTokens

ORDERS = ("v1", "v2")


@functools.partial(jax.jit, static_argnames=("factor", "order", "height"))
def pixel_unshuffle(
    patches_BPD: Array, *, factor: int, order: str = "v2", height: int | None = None
) -> VisualTokens:
    """Stack factor x factor neighbours along the width (InternVL 1.5, arXiv 2404.16821, section 3.1).

    Token (i, j) holds patch (i factor + dy, j factor + dx) at channels (dy factor + dx) D .. + D - 1: the place in the
    block is the slow index, the channel the fast one. (PyTorch's PixelUnshuffle has them the other way round, and does
    not go with InternVL's weights.)

    Args:
        patches_BPD: [B, P, D] in raster order.
        factor: side of a block, a divisor of both sides of the grid.
        order: "v2" (InternVL 1.5 and later), tokens in raster order; "v1" (before), the same tokens column by column,
            which is what the first published code gives.
        height: rows of the grid; None = the grid is square.

    Returns:
        `VisualTokens` with M = P / factor^2 tokens of width factor^2 D. The position is the block's middle patch (the
        upper left one of four).

    Raises:
        ValueError: an unknown order, no such grid, or a factor that does not divide it.
    """
    batch, patches, width = patches_BPD.shape
    rows = check_square("pixel_unshuffle", patches) if height is None else height
    if order not in ORDERS:
        raise ValueError(f"pixel_unshuffle: order = {order!r} is unknown; choose 'v1' or 'v2'")
    if rows < 1 or patches % rows:
        raise ValueError(f"pixel_unshuffle: height = {rows} must be a divisor of the {patches} patches")
    columns = patches // rows
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(
            f"pixel_unshuffle: factor = {factor} must be a divisor of both sides of the {rows} x {columns} patches"
        )
    down, across = rows // factor, columns // factor
    blocks = patches_BPD.reshape(batch, down, factor, across, factor, width)
    blocks = blocks.transpose((0, 1, 3, 2, 4, 5) if order == "v2" else (0, 3, 1, 2, 4, 5))
    tokens = blocks.reshape(batch, down * across, factor * factor * width)

    y, x = np.divmod(np.arange(patches), columns)
    i, j = y // factor, x // factor
    source = i * across + j if order == "v2" else j * down + i
    i, j = np.divmod(np.arange(down * across), across)
    middle = (i * factor + (factor - 1) // 2) * columns + j * factor + (factor - 1) // 2
    if order == "v1":
        middle = middle.reshape(down, across).T.ravel()
    return placed(tokens, middle, source)
