"""Facts about drawn scenes, as labels that a linear read-out can be asked for (`probe.linear_readouts`).

The largest thing is the one that no other one comes near (`scene_questions.BIGGER`); of a picture without one nothing
is asked about it. A place is that of the centre of mass, in thirds of the picture.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np

from tokzip_jax.data.scene_questions import BIGGER
from tokzip_jax.data.shapes import Level, Thing

NOT_ASKED = -1
DATA_SETS = ("scenes",)  # those whose examples have such facts


def check(name: str) -> None:
    """Refuse a data set that says nothing about its pictures.

    Raises:
        ValueError: with the data sets that do.
    """
    if name not in DATA_SETS:
        known = ", ".join(map(repr, DATA_SETS))
        raise ValueError(f"data.name = {name!r} has no facts about the things in a picture; data sets that do: {known}")


def things(facts: str) -> list[Thing]:
    """The things of a scene, from the "facts" of its example."""
    return [Thing(**thing) for thing in json.loads(facts)]


def largest(scene: Sequence[Thing]) -> Thing | None:
    """The thing that is larger than every other one by a factor of `BIGGER`; None where there is none."""
    first, *others = sorted(scene, key=lambda thing: -thing.size)
    return None if others and first.size < BIGGER * others[0].size else first


def labels(scenes: Sequence[Sequence[Thing]], level: Level) -> dict[str, np.ndarray]:
    """Facts by name: int [B, Q] labels 0 .. C - 1 of Q questions about each scene, `NOT_ASKED` where there is none.

    "number of things"; "color", "shape", "column" and "row of the largest"; "which colors are there": one question,
    no or yes, for every colour of the level.
    """
    big = [largest(scene) for scene in scenes]

    def of_largest(label: Callable[[Thing], int]) -> np.ndarray:
        return np.array([[NOT_ASKED if thing is None else label(thing)] for thing in big])

    return {
        "number of things": np.array([[len(scene) - level.things[0]] for scene in scenes]),
        "color of the largest": of_largest(lambda thing: level.colors.index(thing.color)),
        "shape of the largest": of_largest(lambda thing: level.shapes.index(thing.shape)),
        "column of the largest": of_largest(lambda thing: _third(thing.x)),
        "row of the largest": of_largest(lambda thing: _third(thing.y)),
        "which colors are there": np.array(
            [[int(color in {thing.color for thing in scene}) for color in level.colors] for scene in scenes]
        ),
    }


def _third(place: float) -> int:
    return min(int(3 * place), 2)
