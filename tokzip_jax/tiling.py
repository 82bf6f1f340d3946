"""Tiles of one picture as one picture again, in the raster order of the whole canvas.

LLaVA-NeXT's "spatial_unpad", with three columns of two patches each (overview o, patch of tile number, newline /):

    o o o o   1 1 2 2 3 3 /   1 1 2 2 3 3 /   4 4 5 5 6 6 /   4 4 5 5 6 6 /

Rows and columns that show no picture are left out. "spatial" leaves nothing out and has no newlines: so VisionZip's
released code packs what it keeps of a LLaVA-NeXT picture. It is a sort of the tokens that are there by where they
stand, so sizes are static, and an encoder-site method may have dropped any of them. Behind the canvas come, as there,
tokens without a place (CLS), one tile after the other, and then merged ones, tile after tile.
"""

import jax.numpy as jnp

from tokzip_jax.data.anyres import real_box
from tokzip_jax.types import IMAGE_ID, VOCO_ID, Array, VisualTokens

PACKINGS = ("tiles", "spatial", "spatial_unpad")
FAR = 2**30  # behind every token


def slots(packing: str, images: int, visual: int, side: int) -> int:
    """Tokens that `stitch` may need for an overview and images - 1 tiles of `visual` tokens, `side` patches along a
    side: so many tiles have no more than (images - 1) * side rows."""
    return images * visual + ((images - 1) * side if packing == "spatial_unpad" else 0)


def stitch(
    visual: VisualTokens, tiles_B4: Array, newline_D: Array | None, *, side: int, merged: int = 0
) -> VisualTokens:
    """The overview's tokens as they are, then those of the tiles in raster order.

    Args:
        visual: [B*I, M] tokens of the overview (first of its row's I pictures) and of tiles, row by row; `position_BM`
            is the place in a tile of side * side patches.
        tiles_B4: columns, rows, width and height of each row's picture; zeros where it has none.
        newline_D: the learned embedding, for "spatial_unpad"; None for "spatial".
        side: patches along a tile's side.
        merged: so many of the M tokens, the last ones, are merged ones.

    Returns:
        [B, `slots`] tokens, real ones first. A position is the place in the overview or tile, -1 for a
        newline. `source_BP` is [B, I*P]: slots of the patches of the overview and of every tile.
    """
    batch, most = tiles_B4.shape[0], visual.valid_BM.shape[0] // tiles_B4.shape[0] - 1
    columns, rows, width, height = jnp.maximum(tiles_B4, 1).T[:, :, None, None]
    box = (0, rows * side, 0, columns * side)
    if newline_D is not None:
        box = real_box((width, height), (columns, rows), side, minimum=jnp.minimum)
    place, valid = (x.reshape(batch, most + 1, -1) for x in (visual.position_BM, visual.valid_BM))
    stride = most * side + 1  # of the widest row and its newline
    tile, slot = jnp.arange(most + 1)[None, :, None] - 1, jnp.arange(place.shape[2])
    row, column = tile // columns * side + place // side, tile % columns * side + place % side
    seen = (row >= box[0]) & (row < box[1]) & (column >= box[2]) & (column < box[3]) | (place < 0)
    key = most * side * stride + tile * slot.size + slot  # behind the canvas
    key = jnp.where(place < 0, key, jnp.where(slot < slot.size - merged, row * stride + column, key + place.size))
    key = jnp.where(tile < 0, slot - slot.size, key)
    key = jnp.where(valid & ((tile < 0) | (tile < columns * rows) & seen), key, FAR).reshape(batch, -1)
    if newline_D is not None:
        line = jnp.arange(most * side)
        ends = jnp.where((line >= box[0][:, 0]) & (line < box[1][:, 0]), line * stride + stride - 1, FAR)
        key = jnp.concatenate([key, ends], axis=1)
    order = jnp.argsort(key, axis=1, stable=True)
    valid = jnp.take_along_axis(key, order, axis=1) < FAR

    def sort(values: Array, newline: Array | int) -> Array:
        values = values.reshape(batch, -1, *values.shape[2:])
        added = (batch, key.shape[1] - values.shape[1], *values.shape[2:])
        values = jnp.concatenate([values, jnp.broadcast_to(newline, added).astype(values.dtype)], axis=1)
        return jnp.take_along_axis(values, order.reshape(order.shape + (1,) * (values.ndim - 2)), axis=1)

    source = visual.source_BP.reshape(batch, most + 1, -1)
    old = (source + jnp.arange(most + 1)[None, :, None] * slot.size).reshape(batch, -1)
    moved = jnp.take_along_axis(jnp.argsort(order, axis=1), jnp.maximum(old, 0), axis=1)
    there = (source.reshape(batch, -1) >= 0) & jnp.take_along_axis(valid, moved, axis=1)
    return VisualTokens(
        tokens_BMD=sort(visual.tokens_BMD, 0 if newline_D is None else newline_D),
        valid_BM=valid,
        position_BM=jnp.where(valid, sort(visual.position_BM, -1), -1),
        size_BM=jnp.where(valid, sort(visual.size_BM, 0), 0),
        source_BP=jnp.where(there, moved, -1),
    )


def one_placeholder(batch: dict[str, Array]) -> dict[str, Array]:
    """Rows [B, T] without the placeholders of all pictures but the first, and what stands between those of one."""
    ids = batch["ids"]
    is_image, is_voco = ids == IMAGE_ID, ids == VOCO_ID
    number, vocos = jnp.cumsum(is_image, axis=1), jnp.cumsum(is_voco, axis=1)
    between = (number > vocos) & (vocos < vocos[:, -1:])
    gone = (number > 1) & (is_image | is_voco | between)
    return {**batch, "ids": jnp.where(gone, 0, ids), "sample": jnp.where(gone, 0, batch["sample"])}
