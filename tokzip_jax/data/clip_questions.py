"""Questions about a clip: order of appearance, direction of motion, counts over time.

Order questions are asked only where the same frames in reverse would give another answer, and a clip is as likely as
its reverse (`clips.sample`). So whoever sees the frames without their order can at best guess between two answers.

A thing appears in the first frame in which it is seen. No two things of a clip share colour and shape, so a name means
one thing.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

from tokzip_jax.data.actors import Actor, present
from tokzip_jax.data.asking import Pair, Template, singles, yes
from tokzip_jax.data.shapes import PLURALS, Level, phrase

Actors = Sequence[Actor]


def ends(actors: Actors) -> Iterator[tuple[str, Actor]]:
    """ ("first", actor) and ("last", actor), where one thing alone appears so, another one in the reversed clip."""
    forwards = sorted(actors, key=lambda actor: actor.first)
    backwards = sorted(actors, key=lambda actor: -actor.last)
    for word, place, other in (("first", 0, 1), ("last", -1, -2)):
        alone = forwards[place].first != forwards[other].first and backwards[place].last != backwards[other].last
        if alone and forwards[place] is not backwards[place]:
            yield word, forwards[place]


def first_and_last(actors: Actors) -> Iterator[Pair]:
    """ "what appears first?", "what appears last?" """
    for word, actor in ends(actors):
        yield f"what appears {word}?", phrase(actor)


def color_of_end(actors: Actors) -> Iterator[Pair]:
    """ "what color is the object that appears first?", where the reversed clip has another one."""
    back = dict(ends([actor.reversed(0) for actor in actors]))
    for word, actor in ends(actors):
        if back[word].color != actor.color:
            yield f"what color is the object that appears {word}?", actor.color


def shape_of_end(actors: Actors) -> Iterator[Pair]:
    """ "what shape is the object that appears last?", where the reversed clip has another one."""
    back = dict(ends([actor.reversed(0) for actor in actors]))
    for word, actor in ends(actors):
        if back[word].shape != actor.shape:
            yield f"what shape is the object that appears {word}?", actor.shape


def before(actors: Actors) -> Iterator[Pair]:
    """ "does the red circle appear before the blue square?", of two that also vanish in the order they appear in."""
    for one, other in itertools.permutations(actors, 2):
        if (one.first - other.first) * (one.last - other.last) > 0:
            yield f"does the {phrase(one)} appear before the {phrase(other)}?", yes(one.first < other.first)


def course(actor: Actor) -> str:
    """Where a thing moves: "left", "right", "up" or "down"; "" where it rests."""
    (x0, y0), (x1, y1) = actor.path[0], actor.path[-1]
    if x0 != x1:
        return "right" if x1 > x0 else "left"
    return "" if y0 == y1 else "down" if y1 > y0 else "up"


def direction(actors: Actors) -> Iterator[Pair]:
    """ "where does the red circle move?", of what moves."""
    for actor in actors:
        if course(actor):
            yield f"where does the {phrase(actor)} move?", course(actor)


def mover(actors: Actors) -> Iterator[Pair]:
    """ "what moves left?", where one thing alone does."""
    courses = list(map(course, actors))
    for where in singles(courses):
        if where:
            yield f"what moves {where}?", phrase(actors[courses.index(where)])


def count_all(actors: Actors) -> Iterator[Pair]:
    """ "how many objects appear in all?" """
    yield "how many objects appear in all?", str(len(actors))


def count_ends(actors: Actors) -> Iterator[Pair]:
    """ "how many objects are there at the start?", "how many objects are there at the end?" """
    last = max(actor.last for actor in actors)  # some thing is seen in every frame
    for word, frame in (("start", 0), ("end", last)):
        yield f"how many objects are there at the {word}?", str(len(present(actors, frame)))


def count_kind(actors: Actors, level: Level) -> Iterator[Pair]:
    """ "how many circles appear in all?", "how many red objects appear in all?" """
    for color in level.colors:
        yield f"how many {color} objects appear in all?", str(sum(actor.color == color for actor in actors))
    for shape in level.shapes:
        yield f"how many {PLURALS[shape]} appear in all?", str(sum(actor.shape == shape for actor in actors))


@functools.cache
def templates(level: Level) -> tuple[Template, ...]:
    """The forms of questions about pictures of a level."""
    return (
        Template("order", 0.1, first_and_last),
        Template("order", 0.06, color_of_end),
        Template("order", 0.06, shape_of_end),
        Template("order", 0.26, before),
        Template("direction", 0.2, direction),
        Template("direction", 0.1, mover),
        Template("count", 0.04, count_all),
        Template("count", 0.09, count_ends, {"1": 0.5, "3": 1.5, "4": 2.0}),
        Template("count", 0.07, functools.partial(count_kind, level=level), {"2": 1.5, "3": 3.0, "4": 4.0}),
    )
