"""The data set `scenes`: drawn pictures of several coloured shapes, with a caption and questions about them.

An example is a function of (`ScenesConfig.seed`, split, index) alone: other settings of the sizes of the splits, other
processes or another order give the same one, and the splits draw from streams of their own. The scene does not depend
on the picture's size either.

Facts: JSON, a list of {"shape", "color", "x", "y", "size", "depth"}, see `shapes.Thing`. Captions name every thing in a
fixed order with two words each, so with one token a word a caption has at most twice as many tokens as the
`difficulty` allows things (`shapes.LEVELS`): 6 (easy), 12 (medium) or 16 (hard). Questions are those of
`scene_questions`, types "color", "shape", "count", "exists", "compare" and "relation"; "yes" and "no" answer
less than a third of them.

Colours alone tell most pictures of a batch apart, so that a contrastive loss on whole captions never comes to learn
shapes. With `captions="partial"` every second caption, "circle star", says nothing else.

With the default `scenes` settings, `DataConfig(name="scenes", vocab_size=512, text_length=104, targets=24,
caption_length=12)` holds each picture with all of its questions in one row.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from tokzip_jax.config import DataConfig, ScenesConfig
from tokzip_jax.data import built, drawn, shapes
from tokzip_jax.data.asking import ask
from tokzip_jax.data.scene_questions import templates

STREAM = 1  # of the random numbers, another one than that of `clips`


class Scenes(drawn.Drawn):
    """Builder of the data set `scenes`; splits `train`, `validation` and `test`."""

    READ_LATER = ("frames", "frame_order")
    DESCRIPTION = "Drawn pictures of several coloured shapes, with questions about them, a caption and the facts."

    def example(self, split: str, index: int) -> dict[str, Any]:
        """See `example`."""
        return example(self.settings, split, index)


def load(cfg: DataConfig, split: str) -> built.BuiltSource:
    """Open one split, drawing the data set first where that was not done yet; "facts" is in every example.

    Raises:
        ValueError: no such split.
    """
    builder = built.prepare(lambda: Scenes(data_dir=cfg.data_dir or None, settings=cfg.scenes))
    return built.BuiltSource(*built.read(builder, split, ("facts",)))


def example(settings: ScenesConfig, split: str, index: int) -> dict[str, Any]:
    """Example `index` of a split: the features of the data set, "image" as uint8 [size, size, 3]."""
    level = shapes.LEVELS[settings.difficulty]
    rng = shapes.generator(settings.seed, STREAM, drawn.SPLITS.index(split), index)
    things = sample(rng, level)
    asked = ask(rng, templates(level), things, settings.questions)
    paints = shapes.paint(rng, [thing.color for thing in things], level)
    image = shapes.draw(things, paints, shapes.ground(rng, settings.size, level))
    questions, answers, kinds = map(list, zip(*asked))
    return {
        "image": image,
        "image_id": f"{split}-{index}",
        "questions": questions,
        "answers": answers,
        "types": kinds,
        "caption": shapes.caption(things, colors=settings.captions == "full" or index % 2 == 1),
        "facts": json.dumps([dataclasses.asdict(thing) for thing in things]),
    }


def sample(rng: np.random.Generator, level: shapes.Level) -> list[shapes.Thing]:
    """A scene. Its things share a few colours and shapes, so that there is something to count and to confuse."""
    count = int(rng.integers(level.things[0], level.things[1] + 1))
    colors = some(rng, level.colors, 3, 5)
    names = some(rng, level.shapes, 2, 4)
    kinds = [(names[rng.integers(len(names))], colors[rng.integers(len(colors))]) for _ in range(count)]
    return shapes.place(rng, kinds, level)


def some(rng: np.random.Generator, values: tuple[str, ...], least: int, most: int) -> list[str]:
    """Between `least` and `most` different values."""
    return [values[i] for i in rng.permutation(len(values))[: rng.integers(least, most + 1)]]
