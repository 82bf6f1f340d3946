"""Pooling of the patch grid to a smaller grid."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress import ops
from tokzip_jax.types import Array, VisualTokens

MODES = ("average", "max", "bilinear")
Side = tuple[np.ndarray, np.ndarray]  # what holds along one side of a grid, see `on_grid`


def check_square(name: str, patches: int) -> int:
    """The side of a square patch grid.

    Raises:
        ValueError: the patches are no square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{name}: {patches} patches do not form a square; it must be a square number of them")
    return side


def check_grid(patches: int, grid: int, rows: int) -> int:
    """The side of the square patch grid.

    Raises:
        ValueError: the patches are no square, or `grid` or `rows` is not 1 .. side.
    """
    side = check_square("average_pool", patches)
    for name, count in (("grid", grid), ("rows", rows)):
        if not 1 <= count <= side:
            raise ValueError(f"average_pool: {name} = {count} asked of {side} x {side} patches; it must be 1 .. {side}")
    return side


def bins(side: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last place of each of `grid` bins over `side` places, by PyTorch's AdaptiveAvgPool rule.

    Bin i covers floor(i side / grid) .. ceil((i + 1) side / grid) - 1: neighbours overlap where grid does not divide
    side.
    """
    number = np.arange(grid)
    return number * side // grid, -(-(number + 1) * side // grid) - 1


def means(side: int, grid: int) -> np.ndarray:
    """[grid, side] float32: row i averages bin i of `bins`."""
    first, last = bins(side, grid)
    place = np.arange(side)
    inside = (first[:, None] <= place) & (place <= last[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def placed(tokens_BMD: Array, position_M: np.ndarray, source_P: np.ndarray) -> VisualTokens:
    """`VisualTokens` whose places are the same for all pictures; a size is how many patches name the slot."""
    batch, slots, _ = tokens_BMD.shape

    def rows_of(values: np.ndarray) -> Array:
        return jnp.broadcast_to(values.astype(np.int32)[None], (batch, values.size))

    return VisualTokens(
        tokens_BMD=tokens_BMD,
        valid_BM=jnp.ones((batch, slots), bool),
        position_BM=rows_of(position_M),
        size_BM=rows_of(np.bincount(source_P[source_P >= 0], minlength=slots)),
        source_BP=rows_of(source_P),
    )


def on_grid(down: Side, across: Side) -> tuple[np.ndarray, np.ndarray]:
    """Position [F*G] and source [S*S] of a grid of F rows and G columns out of what holds along its two sides.

    Args:
        down, across: of the rows and of the columns: the place, 0 .. S-1, that each token along that side stands for,
            and the token that each of S places along it went to, or -1.
    """
    (place_F, row_S), (place_G, column_S) = down, across
    position = (place_F[:, None] * len(column_S) + place_G[None, :]).ravel()
    kept = (row_S[:, None] >= 0) & (column_S[None, :] >= 0)
    return position, np.where(kept, row_S[:, None] * len(place_G) + column_S[None, :], -1).ravel()


def weighted(rows_FS: Array, columns_GS: Array, picture_BSSD: Array) -> Array:
    """Weighted sums along both sides, [B, S, S, D] with [F, S] and [G, S] -> [B, F*G, D] float32."""
    batch, _, _, width = picture_BSSD.shape
    half = jnp.einsum("fh,Bhwd->Bfwd", rows_FS, picture_BSSD.astype(jnp.float32), precision=ops.EXACT)
    return jnp.einsum("gw,Bfwd->Bfgd", columns_GS, half, precision=ops.EXACT).reshape(batch, -1, width)


@functools.partial(jax.jit, static_argnames=("grid", "rows"))
def average_pool(patches_BPD: Array, *, grid: int, rows: int = 0) -> VisualTokens:
    """Adaptive average pooling of the square patch grid (AdaptiveAvgPool2d) to rows x grid tokens.

    Args:
        patches_BPD: [B, P, D] in raster order, P a square number.
        grid: columns of the result, 1 .. sqrt(P); by 1 row, with a linear layer behind, it is a baseline of
            VoCo-LLaMA's Table 1.
        rows: rows of the result, likewise; 0 = as many as columns.

    Returns:
        `VisualTokens` with M = rows * grid in raster order, averaged in float32, in the patches' dtype. The position
        is the patch in the middle of the bin (the upper left one of four). Where bins overlap, a patch is averaged
        into several tokens but its `source` is one of them, and `size` counts sources: sizes always sum to P.

    Raises:
        ValueError: P is not a square number, or the grid is impossible.
    """
    batch, patches, width = patches_BPD.shape
    rows = rows or grid
    side = check_grid(patches, grid, rows)
    picture = patches_BPD.reshape(batch, side, side, width)
    tokens = weighted(jnp.asarray(means(side, rows)), jnp.asarray(means(side, grid)), picture)

    def along(count: int) -> Side:
        first, last = bins(side, count)
        return (first + last) // 2, np.arange(side) * count // side

    position, source = on_grid(along(rows), along(grid))
    return placed(tokens.astype(patches_BPD.dtype), position, source)


def pooled_side(side: int, factor: int, mode: str) -> int:
    """Side of the grid that `stride_pool` gives: rounded up for "bilinear", down for the others."""
    return -(-side // factor) if mode == "bilinear" else side // factor


def bilinear_samples(side: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `grid` samples stand along `side` places, [grid] float64, and their weights [grid, side] float32.

    Half-pixel centres without antialiasing (`align_corners=False` in PyTorch): a sample reads its two neighbours only,
    also where the grid shrinks by more than two.
    """
    at = np.maximum((np.arange(grid) + 0.5) * side / grid - 0.5, 0)
    low = np.floor(at).astype(int)
    weights = np.zeros((grid, side), np.float32)
    np.add.at(weights, (np.arange(grid), low), 1 - (at - low))
    np.add.at(weights, (np.arange(grid), np.minimum(low + 1, side - 1)), at - low)
    return at, weights


@functools.partial(jax.jit, static_argnames=("factor", "mode"))
def stride_pool(patches_BPD: Array, *, factor: int, mode: str = "average") -> VisualTokens:
    """Pooling by a factor along both sides, as LLaVA-OneVision does with video frames (arXiv 2408.03326, section 3).

    Args:
        patches_BPD: [B, P, D] in raster order, P a square number; any tokens on a grid, also projected ones (in the
            published code the pooling stands behind the projector).
        factor: kernel and stride, 1 .. sqrt(P).
        mode: "average" or "max", in which rows and columns that fill no whole window are dropped (27 by 2: 13), or
            "bilinear", which samples ceil(side / factor) places a side (27 by 2: 14) without antialiasing. For a
            side that 2 divides, bilinear by 2 is the average; by 4 it reads the middle 2 x 2 of each block alone.

    Returns:
        `VisualTokens` in raster order. Averages and samples are float32 inside. A patch's source is the window that
        holds it (-1 if dropped) or the nearest sample, a position the middle patch of the window (the upper left one
        of four) or the patch nearest to the sample.

    Raises:
        ValueError: P is not a square number, or an unknown mode or impossible factor.
    """
    batch, patches, width = patches_BPD.shape
    side = check_square("stride_pool", patches)
    if mode not in MODES:
        raise ValueError(f"stride_pool: mode = {mode!r} is unknown; choose one of {', '.join(map(repr, MODES))}")
    if not 1 <= factor <= side:
        raise ValueError(f"stride_pool: factor = {factor} asked of {side} x {side} patches; it must be 1 .. {side}")
    grid = pooled_side(side, factor, mode)
    picture = patches_BPD.reshape(batch, side, side, width)
    places = np.arange(side)
    if mode == "bilinear":
        at, weights = bilinear_samples(side, grid)
        tokens = weighted(jnp.asarray(weights), jnp.asarray(weights), picture)
        middle, of = np.ceil(at - 0.5).astype(int), (2 * places + 1) * grid // (2 * side)
    else:
        covered = grid * factor
        windows = picture[:, :covered, :covered].reshape(batch, grid, factor, grid, factor, width)
        average = mode == "average"
        tokens = jnp.mean(windows.astype(jnp.float32), (2, 4)) if average else jnp.max(windows, (2, 4))
        middle = np.arange(grid) * factor + (factor - 1) // 2
        of = np.where(places < covered, places // factor, -1)
    position, source = on_grid((middle, of), (middle, of))
    return placed(tokens.reshape(batch, grid * grid, width).astype(patches_BPD.dtype), position, source)


def nested_grids(side: int) -> tuple[int, ...]:
    """Sides of the nested grids of M3, finest first: halved as long as that is exact, then 1 (24: 24, 12, 6, 3, 1)."""
    grids = [side]
    while grids[-1] % 2 == 0:
        grids.append(grids[-1] // 2)
    return tuple(grids) if grids[-1] == 1 else (*grids, 1)


def _check_level(side: int, level: int) -> None:
    most = len(nested_grids(side)) - 1
    if not 0 <= level <= most:
        raise ValueError(
            f"nested_pool: level = {level} asked of {side} x {side} patches; it must be 0 (all of them) .. {most} (one)"
        )


def nested_pool(patches_BPD: Array, *, level: int) -> VisualTokens:
    """One of the nested grids of Matryoshka Multimodal Models (arXiv 2405.17430, section 3): averages of whole blocks.

    Args:
        patches_BPD: [B, P, D] in raster order, P a square number; in M3 projected tokens.
        level: index into `nested_grids`, 0 = all patches.

    Raises:
        ValueError: P is not a square number, or there is no such level.
    """
    side = check_square("nested_pool", patches_BPD.shape[1])
    _check_level(side, level)
    return stride_pool(patches_BPD, factor=side // nested_grids(side)[level])


@functools.partial(jax.jit, static_argnames="finest")
def nested_pool_by_picture(patches_BPD: Array, level_B: Array, *, finest: int = 0) -> VisualTokens:
    """`nested_pool` at a level of its own for each picture, in one program: slots of the finest grid, most invalid.

    Token (i, j) of a coarser grid stands in slot (i, j) of the finest one; the other slots are not valid.

    Args:
        patches_BPD: [B, P, D] in raster order, P a square number.
        level_B: [B] int, finest .. the last level.
        finest: the finest level that may occur (static).

    Raises:
        ValueError: as `nested_pool`.
    """
    batch, patches, width = patches_BPD.shape
    side = check_square("nested_pool", patches)
    _check_level(side, finest)
    grids = nested_grids(side)[finest:]
    most = grids[0]
    mean = np.zeros((len(grids), most, side), np.float32)
    valid = np.zeros((len(grids), most, most), bool)
    position, size = (np.zeros((len(grids), most, most), np.int32) for _ in range(2))
    source = np.zeros((len(grids), patches), np.int32)
    for number, grid in enumerate(grids):
        mean[number, :grid] = means(side, grid)
        valid[number, :grid, :grid] = True
        block, of = side // grid, np.arange(side) * grid // side
        middle = np.arange(grid) * block + (block - 1) // 2
        position[number, :grid, :grid] = middle[:, None] * side + middle[None, :]
        size[number, :grid, :grid] = block * block
        source[number] = (of[:, None] * most + of[None, :]).ravel()
    index = jnp.asarray(level_B, jnp.int32) - finest
    mine = jnp.asarray(mean)[index]
    picture = patches_BPD.reshape(batch, side, side, width).astype(jnp.float32)
    half = jnp.einsum("Bgh,Bhwd->Bgwd", mine, picture, precision=ops.EXACT)
    tokens = jnp.einsum("Bfw,Bgwd->Bgfd", mine, half, precision=ops.EXACT)

    def of_level(values: np.ndarray) -> Array:
        return jnp.asarray(values.reshape(len(grids), -1))[index]

    return VisualTokens(
        tokens_BMD=tokens.reshape(batch, most * most, width).astype(patches_BPD.dtype),
        valid_BM=of_level(valid),
        position_BM=of_level(position),
        size_BM=of_level(size),
        source_BP=of_level(source),
    )
