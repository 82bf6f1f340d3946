"""Things that come, move and go: what a clip is made of."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from tokzip_jax.data.shapes import REACH, Level, Thing, are_apart, draw_size, shown

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
LEAST, MOST = 0.25, 0.5  # how far a thing moves, in sides of the picture
RESTING = 0.3  # share of the things that stay where they are
STAYING = 0.6  # most likely that a thing is there from the start, or to the end; every clip has a value of its own


@dataclasses.dataclass(frozen=True)
class Actor:
    """A thing of a clip.

    Attributes:
        shape, color, size, depth: as those of a `Thing`.
        first: the first frame in which it is seen.
        path: its centre (x, y) in that frame and the following ones, as long as it is seen.
    """

    shape: str
    color: str
    size: float
    depth: int
    first: int
    path: tuple[tuple[float, float], ...]

    @property
    def last(self) -> int:
        """The last frame in which it is seen."""
        return self.first + len(self.path) - 1

    def at(self, frame: int) -> Thing:
        """What it is in one of the frames in which it is seen."""
        x, y = self.path[frame - self.first]
        return Thing(self.shape, self.color, x, y, self.size, self.depth)

    def reversed(self, frames: int) -> "Actor":
        """The same in a clip of `frames` frames that runs backwards."""
        return dataclasses.replace(self, first=frames - 1 - self.last, path=self.path[::-1])


def present(actors: Sequence[Actor], frame: int) -> list[Thing]:
    """What a frame shows."""
    return [actor.at(frame) for actor in actors if actor.first <= frame <= actor.last]


def to_json(actors: Sequence[Actor]) -> str:
    """The facts of a clip as JSON."""
    return json.dumps([dataclasses.asdict(actor) for actor in actors])


def from_json(text: str) -> list[Actor]:
    """The inverse of `to_json`."""
    return [Actor(**{**entry, "path": tuple(map(tuple, entry["path"]))}) for entry in json.loads(text)]


def stage(
    rng: np.random.Generator, kinds: Sequence[tuple[str, str]], frames: int, level: Level
) -> list[Actor]:
    """Things of the given (shape, colour), each seen in a run of at least two frames.

    Drawn again until every frame shows something, and enough of each thing in it. Things that move do so in a straight
    line along one axis, at one speed.
    """
    while True:
        actors: list[Actor] = []
        staying = rng.uniform(0, STAYING)
        for shape, color in kinds:
            for _ in range(20):
                actor = _actor(rng, shape, color, len(actors), _span(rng, frames, staying), level)
                if all(_clear(actor, other, level) for other in actors):
                    actors.append(actor)
                    break
        views = [present(actors, frame) for frame in range(frames)]
        if len(actors) == len(kinds) and all(view and min(shown(view)) >= level.shown for view in views):
            return actors


def _span(rng: np.random.Generator, frames: int, staying: float) -> tuple[int, int]:
    """First and last frame of a thing; with probability `staying` each it is there at the start, and at the end."""
    first, last = sorted(int(frame) for frame in rng.permutation(frames)[:2])
    return 0 if rng.random() < staying else first, frames - 1 if rng.random() < staying else last


def _actor(
    rng: np.random.Generator, shape: str, color: str, depth: int, span: tuple[int, int], level: Level
) -> Actor:
    size = draw_size(rng, level)
    margin = REACH[shape] * size
    far = 0.0 if rng.random() < RESTING else rng.uniform(LEAST, min(MOST, 1 - 2 * margin))
    move = far * np.array(MOVES[rng.integers(len(MOVES))])
    start = rng.uniform(margin - np.minimum(move, 0), 1 - margin - np.maximum(move, 0))
    first, last = span
    path = start + move * np.linspace(0, 1, last - first + 1)[:, None]
    return Actor(shape, color, size, depth, first, tuple((round(x, 3), round(y, 3)) for x, y in path.tolist()))


def _clear(one: Actor, other: Actor, level: Level) -> bool:
    """Whether two things are far enough from each other in every frame that shows both."""
    both = range(max(one.first, other.first), min(one.last, other.last) + 1)
    return all(are_apart(one.at(frame), other.at(frame), level) for frame in both)
