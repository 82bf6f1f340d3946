"""Pictures of any resolution, as LLaVA-NeXT reads them: the whole picture in small, and beside it its parts.

A picture becomes an overview (resized to the tower's square without keeping its shape) and the tiles of a canvas of
columns x rows such squares, on which it is centred as large as it fits, the rest black. Which grid that is, is chosen
by the size of the picture among those that are allowed; LLaVA-NeXT's are those of `LLAVA_NEXT`, LLaVA-OneVision's
those of `LLAVA_ONEVISION`. Of the canvas' patches, those in the picture's own box are real (`real_box`). Only host code
here; sizes are (width, height).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

Size = tuple[int, int]
Grid = tuple[int, int]  # (columns, rows)

LLAVA_NEXT: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
LLAVA_ONEVISION: tuple[Grid, ...] = tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7))


def choose_grid(size: Size, grids: Sequence[Grid], tile: int) -> Grid:
    """The grid on whose canvas most pixels of a picture survive; of those the one with least black; the first one.

    A picture that is blown up has no more pixels than before.

    Args:
        size: of the picture.
        grids: those allowed.
        tile: side of a tile in pixels.
    """

    def merit(grid: Grid) -> tuple[int, int]:
        canvas = (grid[0] * tile, grid[1] * tile)
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return effective, effective - canvas[0] * canvas[1]

    return max(grids, key=merit)  # the first of equals


def facts(size: Size, grids: Sequence[Grid], tile: int) -> dict[str, Any]:
    """What an example says of its picture: "frames", how many pictures the tower reads, and "tiles", (columns, rows,
    width, height)."""
    grid = choose_grid(size, grids, tile)
    return {"frames": 1 + math.prod(grid), "tiles": (*grid, *size)}


def most_pictures(grids: Sequence[Grid]) -> int:
    """How many pictures the tower reads of one that is cut by the largest grid."""
    return 1 + max(map(math.prod, grids))


def on_canvas(image: np.ndarray, canvas: Size) -> np.ndarray:
    """A picture as large as it fits (Pillow's bicubic, the free side rounded up), centred on black.

    Args:
        image: uint8 [H, W, 3].
        canvas: size of the result in pixels.

    Returns:
        uint8 [canvas height, canvas width, 3]; an odd remainder goes below or to the right.
    """
    height, width = image.shape[:2]
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        size = (canvas[0], min(math.ceil(height * across), canvas[1]))
    else:
        size = (min(math.ceil(width * down), canvas[0]), canvas[1])
    out = np.zeros((canvas[1], canvas[0], 3), np.uint8)
    left, top = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    out[top : top + size[1], left : left + size[0]] = _resize(image, size)
    return out


def cut(image: np.ndarray, grid: Grid, tile: int) -> np.ndarray:
    """A picture as its overview and its tiles, row by row.

    Args:
        image: uint8 [H, W, 3].
        grid: columns and rows of tiles.
        tile: side of the tower's picture in pixels.

    Returns:
        uint8 [1 + columns * rows, tile, tile, 3].
    """
    columns, rows = grid
    canvas = on_canvas(image, (columns * tile, rows * tile))
    tiles = canvas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return np.concatenate([_resize(image, (tile, tile))[None], tiles])


def real_box(size: Size, grid: Grid, side: int, *, minimum: Any = min) -> tuple[Any, Any, Any, Any]:
    """Which patches of the stitched tiles show the picture: (top, bottom, left, right), ends left out.

    The free side has length * scale patches, rounded down, and what is too much is taken off both ends alike: an odd
    remainder leaves one patch more. Of a very long picture nothing may be left. As in transformers, the product is
    exact; LLaVA's float64 can come out just below a whole number, which takes effect where that number is odd (rare).

    Args:
        size: of the picture.
        grid: columns and rows of tiles.
        side: patches along a tile's side.
        minimum: of two integers; `jnp.minimum` where sizes and grids are traced.
    """
    width, height = size
    columns, rows = grid[0] * side, grid[1] * side
    top = (rows - minimum(rows, height * columns // width)) // 2
    left = (columns - minimum(columns, width * rows // height)) // 2
    return top, rows - top, left, columns - left


def stitched_tokens(box: tuple[int, int, int, int]) -> int:
    """Tokens of the un-padded tiles: their patches, and a newline behind each row of them."""
    top, bottom, left, right = box
    return (bottom - top) * (right - left + 1)


def check(tiles: Sequence[Grid], images: int, name: str) -> None:
    """Refuse grids that rows cannot hold; the arguments are `DataConfig`'s.

    Raises:
        ValueError: a grid without a tile, too few places for the largest one, or a data set of videos.
    """
    for grid in tiles:
        if min(grid) < 1:
            raise ValueError(f"data.tiles holds {tuple(grid)}; a grid is (columns, rows), both >= 1")
    if tiles and images < most_pictures(tiles):
        raise ValueError(
            f"data.images = {images} is too small for data.tiles: the overview and the tiles of its largest grid need "
            f"{most_pictures(tiles)}"
        )
    if tiles and name == "clips":
        raise ValueError(f"data.tiles = {tuple(tiles)} must be () for clips, whose frames are not cut into tiles")


def _resize(image: np.ndarray, size: Size) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
