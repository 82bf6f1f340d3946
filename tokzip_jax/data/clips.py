"""The data set `clips`: short drawn videos of shapes that come, move and go, with questions about what happened.

An example is a function of (`ScenesConfig.seed`, split, index) and the number of frames, as in `scenes`. A clip is as
likely as the same clip backwards, colours and background included, so the frames alone do not tell which way time went.

`ScenesConfig.frame_order` says what a reader gets of it, without other files:

* "true": all frames in the order of time;
* "shuffled": all frames in an order drawn for the example from the seed, each order equally likely. A question about
  order can then be answered no better than by a guess between two answers (see `clip_questions`); direction likewise;
* "middle": the middle frame alone, frame `frames // 2`.

Stages and rows of a run may each read in an order of their own (`reading`).

Facts: JSON, a list of {"shape", "color", "size", "depth", "first", "path"}, see `actors.Actor`, always in true time.
"order" says which frames a reader gets. The caption is that of the frame that comes first, in the form of `scenes`; the
contrastive stage looks at the first picture of a row. It has at most twice as many tokens as the `difficulty` allows
actors: 8 (easy), 12 (medium) or 14 (hard). Question types are "order", "direction" and "count"; "yes" and "no" answer
about a fifth of them.
"""

import dataclasses
from typing import Any

import numpy as np

from tokzip_jax.config import DataConfig, ScenesConfig
from tokzip_jax.data import actors, built, drawn, shapes
from tokzip_jax.data.asking import ask
from tokzip_jax.data.clip_questions import templates
from tokzip_jax.data.scenes import some

ORDERS = ("true", "shuffled", "middle")
STREAM, SHUFFLE = 2, 3  # of the random numbers: of the clips, and of the orders in which "shuffled" reads them


class Clips(drawn.Drawn):
    """Builder of the data set `clips`; splits `train`, `validation` and `test`.

    The frames of a clip are stored as one picture, one below the other.
    """

    READ_LATER = ("frame_order", "captions")
    DESCRIPTION = "Drawn videos of shapes that come, move and go, with questions about them, a caption and the facts."

    def example(self, split: str, index: int) -> dict[str, Any]:
        """See `example`; "image" is [frames * size, size, 3]."""
        made = example(self.settings, split, index)
        return {**made, "image": made["image"].reshape(-1, *made["image"].shape[2:])}


class ClipSource(built.BuiltSource):
    """A split of `clips`; `image(i)` is uint8 [F, S, S, 3], the frames that are read in the order they are read in."""

    def image(self, index: int) -> np.ndarray:
        """The frames of example `index`."""
        strip = super().image(index)
        side = strip.shape[1]
        return strip.reshape(-1, side, side, 3)[self.text(index)["order"]]


def load(cfg: DataConfig, split: str) -> ClipSource:
    """Open one split, drawing the data set first where that was not done yet; "facts" and "order" are in every example.

    Raises:
        ValueError: no such split.
    """
    builder = built.prepare(lambda: Clips(data_dir=cfg.data_dir or None, settings=cfg.scenes))
    encoded, texts = built.read(builder, split, ("facts",))
    for index, text in enumerate(texts):
        text["order"] = frame_order(cfg.scenes, split, index)
        text["frames"] = len(text["order"])
        text["caption"] = shapes.caption(actors.present(actors.from_json(text["facts"]), text["order"][0]))
    return ClipSource(encoded, texts)


def reading(cfg: DataConfig, order: str) -> DataConfig:
    """The data as a stage or a row reads it, with no more places for pictures than that takes.

    Args:
        cfg: of the run.
        order: one of `ORDERS`, or "" for what `cfg.scenes.frame_order` says; the questions are the same in all.
    """
    if not order:
        return cfg
    images = 1 if order == "middle" else cfg.images
    return dataclasses.replace(cfg, images=images, scenes=dataclasses.replace(cfg.scenes, frame_order=order))


def frames(settings: ScenesConfig) -> int:
    """How many frames of each clip a reader gets."""
    return 1 if settings.frame_order == "middle" else settings.frames


def frame_order(settings: ScenesConfig, split: str, index: int) -> list[int]:
    """Which frames a reader of example `index` gets, and in which order.

    Raises:
        ValueError: an unknown `settings.frame_order`.
    """
    if settings.frame_order == "true":
        return list(range(settings.frames))
    if settings.frame_order == "middle":
        return [settings.frames // 2]
    if settings.frame_order == "shuffled":
        rng = shapes.generator(settings.seed, SHUFFLE, drawn.SPLITS.index(split), index)
        return rng.permutation(settings.frames).tolist()
    choices = ", ".join(map(repr, ORDERS))
    raise ValueError(f"data.scenes.frame_order = {settings.frame_order!r} is unknown; choose one of {choices}")


def example(settings: ScenesConfig, split: str, index: int) -> dict[str, Any]:
    """Example `index` of a split: the features of the data set, "image" as uint8 [frames, size, size, 3]."""
    level = shapes.LEVELS[settings.difficulty]
    rng = shapes.generator(settings.seed, STREAM, drawn.SPLITS.index(split), index)
    cast = sample(rng, settings.frames, level)
    asked = ask(rng, templates(level), cast, settings.questions)
    questions, answers, kinds = map(list, zip(*asked))
    return {
        "image": film(rng, cast, settings, level),
        "image_id": f"{split}-{index}",
        "questions": questions,
        "answers": answers,
        "types": kinds,
        "caption": shapes.caption(actors.present(cast, 0)),
        "facts": actors.to_json(cast),
    }


def sample(rng: np.random.Generator, frames: int, level: shapes.Level) -> list[actors.Actor]:
    """A clip; no two of its things share colour and shape. At the end a coin decides whether it runs backwards."""
    count = int(rng.integers(level.actors[0], level.actors[1] + 1))
    colors = some(rng, level.colors, 3, 4)
    names = some(rng, level.shapes, 2, 3)
    kinds = [(name, color) for name in names for color in colors]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))[:count]]
    cast = actors.stage(rng, kinds, frames, level)
    return [actor.reversed(frames) for actor in cast] if rng.integers(2) else cast


def film(
    rng: np.random.Generator, cast: list[actors.Actor], settings: ScenesConfig, level: shapes.Level
) -> np.ndarray:
    """Draw a clip on one background, uint8 [frames, size, size, 3]; backwards it is the same frames in reverse."""
    paints = dict(zip(cast, shapes.paint(rng, [actor.color for actor in cast], level)))
    background = shapes.ground(rng, settings.size, level)
    frames = []
    for frame in range(settings.frames):
        seen = [actor for actor in cast if actor.first <= frame <= actor.last]
        things = [actor.at(frame) for actor in seen]
        frames.append(shapes.draw(things, [paints[actor] for actor in seen], background))
    return np.stack(frames)
