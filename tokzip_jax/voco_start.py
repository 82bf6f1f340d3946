"""What VoCo tokens start from: a learned embedding (the paper), or also the pooled patches of a part of the picture.

In the first layer the keys and values of a VoCo token are made from what it starts from alone. With an embedding that
is the same for every picture, the first layer of the cache holds nothing about it. With a mean of projected patches the
tokens begin as average pooling with a grid of k cells, and the layers go on from there.
"""

import math

import jax.numpy as jnp

from tokzip_jax.types import Array, VisualTokens

STARTS = ("embedding", "pooled")


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
    rows, columns = parts(count)
    down, across = visual.position_BM // grid, visual.position_BM % grid
    part_BM = down * rows // grid * columns + across * columns // grid
    real_BM = visual.valid_BM & (visual.position_BM >= 0)
    member_BkM = (part_BM[:, None] == jnp.arange(count)[None, :, None]) & real_BM[:, None]
    weight_BkM = jnp.where(member_BkM, visual.size_BM[:, None], 0).astype(jnp.float32)
    total_BkD = jnp.einsum("BkM,BMD->BkD", weight_BkM, visual.tokens_BMD.astype(jnp.float32))
    mean_BkD = total_BkD / jnp.maximum(weight_BkM.sum(axis=2), 1.0)[:, :, None]
    return mean_BkD.astype(visual.tokens_BMD.dtype)
