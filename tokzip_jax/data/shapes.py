"""Coloured shapes on a square picture: what they are, how they are placed, painted and drawn.

Places and sizes are fractions of the picture's side, x to the right and y downwards, so that one scene can be drawn at
any size. A shape's `size` is the diameter of its circle; the other outlines are scaled so that of two shapes whose
sizes differ by a factor of 1.25 (`scene_questions.BIGGER`) the larger one also has the larger area.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "diamond": "diamonds",
    "cross": "crosses",
    "star": "stars",
}
SHAPES = tuple(PLURALS)
COLORS = {
    "red": (214, 32, 36),
    "orange": (247, 138, 20),
    "yellow": (244, 222, 36),
    "green": (28, 150, 56),
    "cyan": (52, 208, 220),
    "blue": (38, 70, 214),
    "purple": (146, 46, 178),
    "black": (24, 24, 26),
}
DETAIL = 4  # a picture is drawn this many times finer and averaged down
ALONE = 1.25  # the `Level.apart` at which two things do not touch
GRID = 128  # side of the picture on which hidden parts are counted


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape in a picture.

    Attributes:
        shape, color: of `SHAPES` and `COLORS`.
        x, y: its centre of mass.
        size: diameter of its circle.
        depth: 0 is furthest behind; no two things of a picture share one.
    """

    shape: str
    color: str
    x: float
    y: float
    size: float
    depth: int


@dataclasses.dataclass(frozen=True)
class Level:
    """How hard the pictures of one `difficulty` are.

    Attributes:
        shapes, colors: what things are drawn and asked about, of `SHAPES` and `COLORS`.
        things: least and most things of a scene.
        actors: least and most things of a clip.
        sizes: of the things; each is drawn up to 3 % smaller or larger.
        apart: least distance of two centres, in sums of their radii; two things of one colour stay `ALONE` apart.
        shown: least share of a thing that is not hidden by others.
        ground: darkest and lightest gray of the background.
        textures: of the background, see `ground`.
        contrast: of a texture, in 256ths.
        jitter: most that a channel of a thing's colour is off, in 256ths.
    """

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    things: tuple[int, int]
    actors: tuple[int, int]
    sizes: tuple[float, ...]
    apart: float
    shown: float
    ground: tuple[int, int]
    textures: tuple[str, ...]
    contrast: int
    jitter: int


ALL = (SHAPES, tuple(COLORS))
FEW = (("circle", "square", "triangle", "cross"), ("red", "yellow", "green", "blue", "black"))
BUSY = ("gradient", "stripes", "checks")
LEVELS = {
    "easy": Level(*FEW, (1, 3), (2, 3), (0.24, 0.33, 0.44), ALONE, 1.0, (222, 236), ("plain",), 0, 0),
    "medium": Level(*ALL, (3, 6), (2, 6), (0.17, 0.23, 0.31), 0.8, 0.75, (205, 236), ("plain", *BUSY), 12, 10),
    "hard": Level(*ALL, (5, 8), (3, 7), (0.14, 0.19, 0.26), 0.7, 0.6, (175, 236), BUSY, 26, 16),
}


def _outlines() -> dict[str, np.ndarray]:
    """Corners [n, 2] of each shape around its centre, for a size of 2."""

    def ring(corners: int, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
        angles = [2 * math.pi * (i + turn) / corners for i in range(corners)]
        return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]

    spikes, notches = ring(5, 1.2), ring(5, 0.6, 0.5)
    arm = 0.38
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
    corners = {
        "circle": ring(40, 1.0),
        "square": ring(4, 0.88 * math.sqrt(2), 0.5),
        "triangle": [(0.0, -1.25), (1.1, 0.65), (-1.1, 0.65)],
        "diamond": ring(4, 1.12),
        "cross": [(cos * x - sin * y, sin * x + cos * y) for cos, sin in turns for x, y in quarter],
        "star": [point for pair in zip(spikes, notches) for point in pair],
    }
    return {shape: np.array(points) for shape, points in corners.items()}


OUTLINES = _outlines()
REACH = {shape: float(np.abs(points).max()) / 2 for shape, points in OUTLINES.items()}  # of a size of 1


def generator(seed: int, *path: int) -> np.random.Generator:
    """The random numbers of one place in a data set: the same in whatever order and process places are visited."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=path))


def place(rng: np.random.Generator, kinds: Sequence[tuple[str, str]], level: Level) -> list[Thing]:
    """Things of the given (shape, colour) at free places; the list is in order of depth.

    Sizes and places are drawn again until no two things are too close and enough of each is shown.
    """
    while True:
        things: list[Thing] = []
        for shape, color in kinds:
            size = draw_size(rng, level)
            margin = REACH[shape] * size
            for _ in range(20):
                x, y = (round(float(v), 3) for v in rng.uniform(margin, 1 - margin, 2))
                thing = Thing(shape, color, x, y, size, len(things))
                if all(are_apart(thing, other, level) for other in things):
                    things.append(thing)
                    break
        if len(things) == len(kinds) and min(shown(things)) >= level.shown:
            return things


def draw_size(rng: np.random.Generator, level: Level) -> float:
    """One of the level's sizes, up to 3 % smaller or larger."""
    return round(level.sizes[rng.integers(len(level.sizes))] * float(rng.uniform(0.97, 1.03)), 3)


def are_apart(one: Thing, other: Thing, level: Level) -> bool:
    """Whether two things are as far from each other as the level asks for; those of one colour would melt together."""
    apart = ALONE if one.color == other.color else level.apart
    return math.hypot(one.x - other.x, one.y - other.y) >= apart * (one.size + other.size) / 2


def shown(things: Sequence[Thing]) -> list[float]:
    """The share of each thing that no nearer thing hides, counted on a grid of `GRID` x `GRID`."""
    together, alone = Image.new("L", (GRID, GRID)), []
    for number, thing in sorted(enumerate(things, 1), key=lambda pair: pair[1].depth):
        corners = _corners(thing, GRID)
        ImageDraw.Draw(together).polygon(corners, fill=number)
        single = Image.new("L", (GRID, GRID))
        ImageDraw.Draw(single).polygon(corners, fill=number)
        alone.append((number, single.histogram()[number]))
    left = together.histogram()
    return [left[number] / whole for number, whole in sorted(alone)]


def paint(rng: np.random.Generator, colors: Sequence[str], level: Level) -> list[tuple[int, int, int]]:
    """The colours of things as they are drawn: by name, each channel a little off."""
    base = np.array([COLORS[color] for color in colors])
    return [tuple(rgb) for rgb in np.clip(base + rng.integers(-level.jitter, level.jitter + 1, base.shape), 0, 255)]


def ground(rng: np.random.Generator, side: int, level: Level) -> np.ndarray:
    """A background: a light gray with a tint, plain, or with a gradient, stripes or checks of low contrast.

    Returns:
        uint8 [side, side, 3].
    """
    gray = rng.integers(*level.ground) + rng.integers(-6, 7, 3)
    texture = level.textures[rng.integers(len(level.textures))]
    angle, period = rng.uniform(0, 2 * math.pi), rng.uniform(0.12, 0.3)
    y, x = np.mgrid[:side, :side] / side - 0.5
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    waves = {
        "plain": np.zeros_like(x),
        "gradient": along,
        "stripes": np.floor(along / period) % 2 - 0.5,
        "checks": (np.floor(along / period) + np.floor(across / period)) % 2 - 0.5,
    }
    return np.clip(np.rint(gray + level.contrast * waves[texture][:, :, None]), 0, 255).astype(np.uint8)


def draw(things: Sequence[Thing], paints: Sequence[tuple[int, int, int]], background: np.ndarray) -> np.ndarray:
    """Draw things, the furthest first, with smooth edges.

    Args:
        things: what to draw.
        paints: their colours.
        background: uint8 [S, S, 3], left as it is.

    Returns:
        uint8 [S, S, 3].
    """
    side = len(background) * DETAIL
    canvas = Image.fromarray(background).resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for thing, rgb in sorted(zip(things, paints), key=lambda pair: pair[0].depth):
        pen.polygon(_corners(thing, side), fill=tuple(int(channel) for channel in rgb))
    return np.asarray(canvas.reduce(DETAIL))


def cover(things: Sequence[Thing], side: int) -> np.ndarray:
    """How much of each pixel of a picture things cover: float32 [side, side], 0 to 1."""
    canvas = Image.new("L", (side * DETAIL, side * DETAIL))
    pen = ImageDraw.Draw(canvas)
    for thing in things:
        pen.polygon(_corners(thing, side * DETAIL), fill=255)
    return np.asarray(canvas.reduce(DETAIL), np.float32) / 255


def _corners(thing: Thing, side: int) -> list[tuple[float, float]]:
    """The outline in pixels of a picture of `side`; the centre of pixel 0 is at 0."""
    points = (OUTLINES[thing.shape] * (thing.size / 2) + (thing.x, thing.y)) * side - 0.5
    return list(map(tuple, points.tolist()))


def caption(things: Sequence[Thing], *, colors: bool = True) -> str:
    """What is there as "red circle blue star": two words a thing, in the order of `COLORS`, then of `SHAPES`.

    Without colours "circle star", in the order of `SHAPES`.
    """
    if not colors:
        return " ".join(sorted((thing.shape for thing in things), key=SHAPES.index))
    order = list(COLORS)
    ordered = sorted(things, key=lambda thing: (order.index(thing.color), SHAPES.index(thing.shape)))
    return " ".join(phrase(thing) for thing in ordered)


def phrase(thing: Thing) -> str:
    """ "red circle"."""
    return f"{thing.color} {thing.shape}"
