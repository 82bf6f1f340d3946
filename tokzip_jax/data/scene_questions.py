"""Questions about a scene: colour, shape, count, existence, comparison and spatial relation.

Every question has one answer that follows from the facts with a margin: a named thing is the only one of its name, two
sizes differ by `BIGGER`, two places by `GAP`, and a thing in a named region stands at least `MARGIN` away from its
border, as does every other thing on the other side of it. What the facts leave open is not asked.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

from tokzip_jax.data.asking import Pair, Template, singles, yes
from tokzip_jax.data.shapes import COLORS, PLURALS, Level, Thing, phrase

Things = Sequence[Thing]

BIGGER = 1.25  # least ratio of two sizes that are compared
GAP = 0.08  # least difference of two coordinates that are compared
MARGIN = 0.04  # least distance from the border of a region
REGIONS = (
    ("top left", "top middle", "top right"),
    ("middle left", "center", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)
# Along which axis, and whether the smaller coordinate is meant.
ENDS = {"leftmost": ("x", True), "rightmost": ("x", False), "topmost": ("y", True), "bottommost": ("y", False)}
RELATIONS = {"left of": ("x", True), "right of": ("x", False), "above": ("y", True), "below": ("y", False)}


def named(things: Things) -> list[Thing]:
    """The things that colour and shape together single out."""
    names = singles(map(phrase, things))
    return [thing for thing in things if phrase(thing) in names]


def pointed(things: Things) -> Iterator[tuple[str, Thing]]:
    """ ("object in the top left", thing) and ("leftmost object", thing) wherever one thing alone is meant."""
    for row, column in itertools.product(range(3), repeat=2):
        near = [thing for thing in things if _within(thing, row, column, -MARGIN)]
        if len(near) == 1 and _within(near[0], row, column, MARGIN):
            yield f"object in the {REGIONS[row][column]}", near[0]
    for word, (axis, least) in ENDS.items():
        first, second = sorted(things, key=lambda thing: getattr(thing, axis), reverse=not least)[:2]
        if abs(getattr(first, axis) - getattr(second, axis)) >= GAP:
            yield f"{word} object", first


def _within(thing: Thing, row: int, column: int, margin: float) -> bool:
    """Whether a thing stands in a region, at least `margin` from the border (a negative one: at most outside)."""
    return all(
        (cell == 0 or at >= cell / 3 + margin) and (cell == 2 or at <= (cell + 1) / 3 - margin)
        for cell, at in ((row, thing.y), (column, thing.x))
    )


def color_of_shape(things: Things) -> Iterator[Pair]:
    """ "what color is the circle?" """
    for shape in singles(thing.shape for thing in things):
        yield f"what color is the {shape}?", next(thing.color for thing in things if thing.shape == shape)


def shape_of_color(things: Things) -> Iterator[Pair]:
    """ "what shape is the red object?" """
    for color in singles(thing.color for thing in things):
        yield f"what shape is the {color} object?", next(thing.shape for thing in things if thing.color == color)


def color_there(things: Things) -> Iterator[Pair]:
    """ "what color is the object in the top left?", "what color is the leftmost object?" """
    for words, thing in pointed(things):
        yield f"what color is the {words}?", thing.color


def shape_there(things: Things) -> Iterator[Pair]:
    """ "what shape is the object in the center?", "what shape is the topmost object?" """
    for words, thing in pointed(things):
        yield f"what shape is the {words}?", thing.shape


def count_all(things: Things) -> Iterator[Pair]:
    """ "how many objects are there?" """
    yield "how many objects are there?", str(len(things))


def count_kind(things: Things, level: Level) -> Iterator[Pair]:
    """ "how many red objects are there?", "how many circles are there?" """
    for color in level.colors:
        yield f"how many {color} objects are there?", str(sum(thing.color == color for thing in things))
    for shape in level.shapes:
        yield f"how many {PLURALS[shape]} are there?", str(sum(thing.shape == shape for thing in things))


def exists_kind(things: Things, level: Level) -> Iterator[Pair]:
    """ "is there a red object?", "is there a circle?" """
    for color in level.colors:
        yield f"is there {_a(color)} object?", yes(any(thing.color == color for thing in things))
    for shape in level.shapes:
        yield f"is there {_a(shape)}?", yes(any(thing.shape == shape for thing in things))


def exists_pair(things: Things) -> Iterator[Pair]:
    """ "is there a red circle?", of colours and shapes that are there, where not all of their pairs are."""
    present = {phrase(thing) for thing in things}
    colors = dict.fromkeys(thing.color for thing in things)
    pairs = list(itertools.product(colors, dict.fromkeys(thing.shape for thing in things)))
    if len(pairs) > len(present):
        for color, shape in pairs:
            yield f"is there {_a(color)} {shape}?", yes(f"{color} {shape}" in present)


def more(things: Things) -> Iterator[Pair]:
    """ "are there more circles than squares?", of kinds that are there, and not equally many of both."""
    for key, plural in (("shape", PLURALS), ("color", {color: f"{color} objects" for color in COLORS})):
        values = [getattr(thing, key) for thing in things]
        for one, other in itertools.permutations(dict.fromkeys(values), 2):
            difference = values.count(one) - values.count(other)
            if difference:
                yield f"are there more {plural[one]} than {plural[other]}?", yes(difference > 0)


def bigger(things: Things) -> Iterator[Pair]:
    """ "is the red circle bigger than the blue square?" """
    for one, other in itertools.permutations(named(things), 2):
        if max(one.size, other.size) >= BIGGER * min(one.size, other.size):
            yield f"is the {phrase(one)} bigger than the {phrase(other)}?", yes(one.size > other.size)


def extreme(things: Things) -> Iterator[Pair]:
    """ "what color is the biggest object?", "what shape is the smallest object?" """
    ordered = sorted(things, key=lambda thing: thing.size)
    for word, (end, inner) in {"smallest": ordered[:2], "biggest": ordered[:-3:-1]}.items():
        if max(end.size, inner.size) >= BIGGER * min(end.size, inner.size):
            yield f"what color is the {word} object?", end.color
            yield f"what shape is the {word} object?", end.shape


def related(things: Things) -> Iterator[Pair]:
    """ "is the red circle above the blue square?" """
    for one, other in itertools.permutations(named(things), 2):
        for words, (axis, least) in RELATIONS.items():
            difference = getattr(one, axis) - getattr(other, axis)
            if abs(difference) >= GAP:
                yield f"is the {phrase(one)} {words} the {phrase(other)}?", yes((difference < 0) == least)


def neighbour(things: Things) -> Iterator[Pair]:
    """ "what is left of the red circle?", where that is one thing and every other one is clearly on the other side."""
    for thing in named(things):
        for words, (axis, least) in RELATIONS.items():
            apart = [(getattr(other, axis) - getattr(thing, axis), other) for other in things if other is not thing]
            there = [other for difference, other in apart if (difference < 0) == least]
            if len(there) == 1 and all(abs(difference) >= GAP for difference, _ in apart):
                yield f"what is {words} the {phrase(thing)}?", phrase(there[0])


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


# The weights leave about a quarter of the questions to "yes" and "no"; counts of two and more are rarer than their
# share of the questions, which `favour` makes up for.
COUNTS = {"0": 0.8, "1": 1.0, "2": 1.6, "3": 3.0, "4": 4.0, "5": 5.0, "6": 5.0}


@functools.cache
def templates(level: Level) -> tuple[Template, ...]:
    """The forms of questions about pictures of a level."""
    return (
        Template("color", 0.08, color_of_shape),
        Template("color", 0.12, color_there),
        Template("shape", 0.08, shape_of_color),
        Template("shape", 0.12, shape_there),
        Template("count", 0.05, count_all),
        Template("count", 0.14, functools.partial(count_kind, level=level), COUNTS),
        Template("exists", 0.05, functools.partial(exists_kind, level=level)),
        Template("exists", 0.08, exists_pair),
        Template("compare", 0.05, more),
        Template("compare", 0.03, bigger),
        Template("compare", 0.06, extreme),
        Template("relation", 0.06, related),
        Template("relation", 0.08, neighbour),
    )
