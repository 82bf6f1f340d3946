"""Tiles of one picture as one picture again, in the raster order of the whole canvas.

LLaVA-NeXT's "spatial_unpad", with three columns of two patches each (overview o, patch of tile number, newline /):

    o o o o   1 1 2 2 3 3 /   1 1 2 2 3 3 /   4 4 5 5 6 6 /   4 4 5 5 6 6 /

Rows and columns that show no picture are left out. "spatial" leaves nothing out and has no newlines: so VisionZip's
released code packs what it keeps of a LLaVA-NeXT picture. It is a sort of the tokens that are there by where they
stand, so sizes are static, and an encoder-site method may have dropped any of them. Behind the canvas come, as there,
tokens without a place (CLS), one tile after the other, and then merged ones, tile after tile.

LLaVA-OneVision's "anyres_max_9" (arXiv 2408.03326) is "spatial_unpad" for larger grids, with a limit: a canvas of more
patches than nine pictures have is resized to about as many, bilinearly and without antialiasing.
"""

import functools

import jax.numpy as jnp
import numpy as np

from tokzip_jax.data.anyres import real_box
from tokzip_jax.types import IMAGE_ID, VOCO_ID, Array, VisualTokens

SHRINKING = "anyres_max_9"
UNPADDING = ("spatial_unpad", SHRINKING)  # those with newlines
PACKINGS = ("tiles", "spatial", *UNPADDING)
FAR = 2**30  # behind every token
MOST_PICTURES = 9  # of "anyres_max_9"
SLACK = 1.1  # a canvas whose sides are too long by no more than this stays as it is


def slots(packing: str, images: int, visual: int, side: int) -> int:
    """Tokens that `stitch` or `shrink` may need for an overview and images - 1 tiles of `visual` tokens, `side` patches
    along a side: so many tiles have no more than (images - 1) * side rows."""
    canvas = (images - 1) * visual
    if packing == SHRINKING:
        canvas = min(canvas, int(MOST_PICTURES * SLACK**2 * side**2))
    return visual + canvas + ((images - 1) * side if packing in UNPADDING else 0)


@functools.cache
def shrunk_sides(longest: int, side: int) -> np.ndarray:
    """The height to which "anyres_max_9" resizes a canvas, int32 [height, width] for sides of 0 to `longest` patches.

    In float64, as LLaVA-OneVision's own code has it: of a square canvas with five tiles of 27 patches along a side 80
    rows are left and not 81, since the quotient of whole numbers comes out just below one. The width is the height of
    the canvas with its sides exchanged.
    """
    height, width = np.ogrid[: longest + 1.0, : longest + 1.0]
    times = np.sqrt(height * width / (MOST_PICTURES * side**2))
    return np.where(times > SLACK, height // np.maximum(times, SLACK), height).astype(np.int32)


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


def shrink(visual: VisualTokens, tiles_B4: Array, newline_D: Array, *, side: int) -> VisualTokens:
    """The overview's tokens as they are, then the un-padded canvas, resized where it is too large: "anyres_max_9".

    Args:
        visual: [B*I, side^2] tokens of the overview (first of its row's I pictures) and of tiles, row by row and in
            raster order. One that is not valid still counts in the means, but no token takes its place.
        tiles_B4: columns, rows, width and height of each row's picture; zeros where it has none.
        newline_D: the learned embedding.
        side: patches along a tile's side.

    Returns:
        [B, `slots`] tokens. A position is the place in the overview, or in its tile of the patch in which the token's
        centre lies, -1 for a newline. `source_BP` [B, I*P] says which token a patch's centre lies in, and a size is how
        many patches that are.
    """
    batch, patches = tiles_B4.shape[0], side**2
    pictures = visual.valid_BM.shape[0] // batch
    length = slots(SHRINKING, pictures, patches, side) - patches
    columns, rows, width, height = jnp.maximum(tiles_B4, 1).T[:, :, None]
    top, bottom, left, right = real_box((width, height), (columns, rows), side, minimum=jnp.minimum)
    down, across = bottom - top, right - left
    table = jnp.asarray(shrunk_sides((pictures - 1) * side, side))
    lines, places = table[down, across], table[across, down]

    def flat(values: Array) -> Array:
        return values.reshape(batch, pictures * patches, *values.shape[2:])

    def index(y: Array, x: Array) -> Array:
        """Among all patches of a row, of a patch of the un-padded canvas."""
        y, x = y + top, x + left
        place = (1 + y // side * columns + x // side) * patches + y % side * side + x % side
        return jnp.clip(place, 0, pictures * patches - 1)

    def read(values: Array, where: Array) -> Array:
        return jnp.take_along_axis(flat(values), where.reshape(where.shape + (1,) * (values.ndim - 2)), axis=1)

    slot = jnp.arange(length)[None]
    line, place = slot // (places + 1), slot % (places + 1)
    there = (line < lines) & (places > 0) & (tiles_B4[:, :1] > 0)
    newline = there & (place == places)
    (y0, y1, beneath, y), (x0, x1, beside, x) = _between(line, down, lines), _between(place, across, places)
    upper, lower = (
        read(visual.tokens_BMD, index(row, x0)) * (1 - beside) + read(visual.tokens_BMD, index(row, x1)) * beside
        for row in (y0, y1)
    )
    tokens = (upper * (1 - beneath) + lower * beneath).astype(visual.tokens_BMD.dtype)
    centre = index(y, x)
    real = there & ~newline & read(visual.valid_BM, centre)

    # Which token the patches of the tiles went to.
    patch = jnp.arange((pictures - 1) * patches)[None]
    tile, within = patch // patches, patch % patches
    y, x = tile // columns * side + within // side - top, tile % columns * side + within % side - left
    shown = (tile < columns * rows) & (y >= 0) & (y < down) & (x >= 0) & (x < across)
    home = (2 * y + 1) * lines // (2 * jnp.maximum(down, 1)) * (places + 1)
    home = jnp.clip(home + (2 * x + 1) * places // (2 * jnp.maximum(across, 1)), 0, length - 1)
    shown &= flat(visual.valid_BM)[:, patches:] & jnp.take_along_axis(real, home, axis=1)
    sizes = jnp.zeros((batch, length), visual.size_BM.dtype)
    sizes = sizes.at[jnp.arange(batch)[:, None], home].add(shown.astype(sizes.dtype))

    def behind(name: str, values: Array) -> Array:
        """The overview's own values, and those."""
        return jnp.concatenate([flat(getattr(visual, name))[:, :patches], values], axis=1)

    return VisualTokens(
        tokens_BMD=behind("tokens_BMD", jnp.where(newline[:, :, None], newline_D.astype(tokens.dtype), tokens)),
        valid_BM=behind("valid_BM", real | newline),
        position_BM=behind("position_BM", jnp.where(real, read(visual.position_BM, centre), -1)),
        size_BM=behind("size_BM", sizes),
        source_BP=behind("source_BP", jnp.where(shown, home + patches, -1)),
    )


def _between(at: Array, count: Array, target: Array) -> tuple[Array, Array, Array, Array]:
    """Where on an axis of `count` places lie those of an axis of `target`, with half-pixel centres.

    Returns:
        The places before and behind it, the share of the one behind [B, slots, 1], and the place that it lies in.
    """
    exact = jnp.maximum((at + 0.5) * (count / jnp.maximum(target, 1).astype(jnp.float32)) - 0.5, 0)
    first = jnp.minimum(exact.astype(jnp.int32), count - 1)
    nearest = (2 * at + 1) * count // (2 * jnp.maximum(target, 1))
    return first, jnp.minimum(first + 1, count - 1), (exact - first)[:, :, None], jnp.clip(nearest, 0, count - 1)


def one_placeholder(batch: dict[str, Array]) -> dict[str, Array]:
    """Rows [B, T] without the placeholders of all pictures but the first, and what stands between those of one."""
    ids = batch["ids"]
    is_image, is_voco = ids == IMAGE_ID, ids == VOCO_ID
    number, vocos = jnp.cumsum(is_image, axis=1), jnp.cumsum(is_voco, axis=1)
    between = (number > vocos) & (vocos < vocos[:, -1:])
    gone = (number > 1) & (is_image | is_voco | between)
    return {**batch, "ids": jnp.where(gone, 0, ids), "sample": jnp.where(gone, 0, batch["sample"])}
