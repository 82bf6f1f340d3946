"""The data sets by name."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from tokzip_jax.config import DataConfig
from tokzip_jax.data import clips, easy_vqa, llava_json, scenes
from tokzip_jax.data.rows import Rows


class Source(Protocol):
    """A split with random access.

    `source[i]` is {"image": uint8 [H, W, 3], [F, H, W, 3] or None, "image_id": str, "questions": list[str],
    "answers": list[str], "types": list[str], "caption": str}. An example of F pictures (the frames of a video, in
    time order) also says "frames": F; drawn data sets add "facts": JSON, what the pictures show.
    """

    def __len__(self) -> int:
        """How many examples."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index`."""

    def text(self, index: int) -> dict[str, Any]:
        """Example `index` without its picture."""

    def image(self, index: int) -> np.ndarray | None:
        """The picture of example `index`, uint8 [H, W, 3], or its frames [F, H, W, 3]; None where it has none."""

    def rows(self, tokenizer: Tokenizer, cfg: DataConfig) -> Rows:
        """The rows of all examples, in order."""


SOURCES: dict[str, Callable[[DataConfig, str], Source]] = {
    "easy_vqa": easy_vqa.load,
    "llava_json": llava_json.load,
    "llava_json_system_first": partial(llava_json.load, voco_layout=False),
    "scenes": scenes.load,
    "clips": clips.load,
}


def load(cfg: DataConfig, split: str) -> Source:
    """Open a split of `cfg.name`; see `Source` for what it holds.

    Raises:
        ValueError: an unknown data set or split.
        FileNotFoundError, ModuleNotFoundError: its files are not there.
    """
    if cfg.name not in SOURCES:
        raise ValueError(f"data.name = {cfg.name!r} is unknown; choose one of {', '.join(sorted(SOURCES))}")
    return SOURCES[cfg.name](cfg, split)


def has_validation(cfg: DataConfig) -> bool:
    """Whether there is a split "validation" to choose settings on."""
    return cfg.name in ("scenes", "clips") or cfg.held_out > 0


def texts(source: Source) -> list[str]:
    """Every question, answer and caption of a source: what its tokenizer is trained on."""
    out = []
    for index in range(len(source)):
        example = source.text(index)
        out += [*example["questions"], *example["answers"], example["caption"]]
    return out
