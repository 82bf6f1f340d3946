"""A data set that a TFDS builder wrote as ArrayRecord, opened in memory."""

import io
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tokenizers import Tokenizer

from tokzip_jax.config import DataConfig
from tokzip_jax.data import anyres
from tokzip_jax.data.rows import Rows, question_rows

LISTS = ("questions", "answers", "types")
Builder = TypeVar("Builder", bound=tfds.core.GeneratorBasedBuilder)


class BuiltSource:
    """One split in memory (encoded pictures and texts); pictures are decoded when asked for.

    `source[i]` is an example as `sources.load` describes it, `source.text(i)` the same without its picture, and
    `source.image(i)` only the picture.
    """

    def __init__(self, encoded: list[bytes], texts: list[dict[str, Any]]):
        self._encoded = encoded
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image(index), **self.text(index)}

    def text(self, index: int) -> dict[str, Any]:
        """The example without its picture."""
        return self._texts[index]

    def image(self, index: int) -> np.ndarray:
        """The picture, uint8 [H, W, 3]."""
        return np.asarray(Image.open(io.BytesIO(self._encoded[index])).convert("RGB"))

    def tiled(self, grids: Sequence[anyres.Grid], tile: int) -> "BuiltSource":
        """The same examples with `anyres.facts` of their pictures."""
        sizes = [Image.open(io.BytesIO(encoded)).size for encoded in self._encoded]
        found = [anyres.facts(size, grids, tile) for size in sizes]
        return type(self)(self._encoded, [text | more for text, more in zip(self._texts, found)])

    def rows(self, tokenizer: Tokenizer, cfg: DataConfig) -> Rows:
        """Rows of packed questions, see `rows.question_rows`."""
        return question_rows([self.text(i) for i in range(len(self))], tokenizer, cfg)


def prepare(make: Callable[[], Builder]) -> Builder:
    """A builder from `make`, its data set written where it was not yet."""
    builder = make()
    if builder.data_path.exists():
        return builder
    try:
        builder.download_and_prepare()
    except OSError:
        # Another process may have finished the same folder in the meantime; then its result is as good as ours.
        builder = make()
        if not builder.data_path.exists():
            raise
    return builder


def read(
    builder: tfds.core.GeneratorBasedBuilder, split: str, keys: Sequence[str] = ()
) -> tuple[list[bytes], list[dict[str, Any]]]:
    """All encoded pictures and texts of a split.

    Args:
        builder: of a data set that is written.
        split: its name.
        keys: text features to read beside "image_id", "caption" and `LISTS`.

    Raises:
        ValueError: no such split.
    """
    if split not in builder.info.splits:
        choices = ", ".join(sorted(builder.info.splits))
        raise ValueError(f"{builder.name} has no split {split!r}; choose one of {choices}")
    encoded, texts = [], []
    for record in builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}):
        encoded.append(record["image"])
        texts.append(
            {
                "image_id": record["image_id"].decode(),
                **{key: [text.decode() for text in record[key]] for key in LISTS},
                **{key: record[key].decode() for key in ("caption", *keys)},
            }
        )
    return encoded, texts
