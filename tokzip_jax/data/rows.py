"""Token rows: what of which example stands in which row, planned and tokenised once, before training."""

import dataclasses
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tokzip_jax.config import DataConfig
from tokzip_jax.data.tokenizer import BOS_ID, EOS_ID
from tokzip_jax.types import IMAGE_ID, VOCO_ID

PICTURE = (IMAGE_ID, VOCO_ID)


@dataclasses.dataclass(frozen=True)
class Rows:
    """All rows of a split, without padding: row r is `ids[start[r] : start[r + 1]]`.

    Attributes:
        ids: int32 [tokens], with the placeholders of `types`.
        thread: int32 [tokens], 0 shared, 1.. the question within the row.
        supervised: bool [tokens], targets of the loss.
        start: int64 [rows + 1].
        example: int32 [rows], index of the example in its source.
        first: int32 [rows], index within the example of the row's first question (its thread 1).
        count: int32 [rows], how many questions the row holds.
        captions: int32 [examples, C], 0 = pad.
        text_length: tokens of a padded row.
    """

    ids: np.ndarray
    thread: np.ndarray
    supervised: np.ndarray
    start: np.ndarray
    example: np.ndarray
    first: np.ndarray
    count: np.ndarray
    captions: np.ndarray
    text_length: int

    def __len__(self) -> int:
        return len(self.example)

    @property
    def most_targets(self) -> int:
        """Supervised tokens of the row that has the most of them."""
        total = np.concatenate([[0], np.cumsum(self.supervised)])
        return int(np.max(total[self.start[1:]] - total[self.start[:-1]], initial=0))

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, padded on the right: "ids", "thread", "sample", "supervised" [T] and "captions" [C]."""
        span = slice(self.start[index], self.start[index + 1])
        length = span.stop - span.start
        row = {
            "ids": np.zeros(self.text_length, np.int32),
            "thread": np.zeros(self.text_length, np.int32),
            "sample": np.zeros(self.text_length, np.int32),
            "supervised": np.zeros(self.text_length, bool),
            "captions": self.captions[self.example[index]],
        }
        row["ids"][:length] = self.ids[span]
        row["thread"][:length] = self.thread[span]
        row["sample"][:length] = 1
        row["supervised"][:length] = self.supervised[span]
        return row

    def limited(self, examples: int) -> "Rows":
        """The rows of the first `examples` examples."""
        rows = int(np.searchsorted(self.example, examples))
        return dataclasses.replace(
            self,
            start=self.start[: rows + 1],
            example=self.example[:rows],
            first=self.first[:rows],
            count=self.count[:rows],
        )


class RowWriter:
    """Collects rows one after the other; four bytes a token and integer."""

    def __init__(self, text_length: int):
        self._text_length = text_length
        self._ids, self._thread, self._supervised = array("i"), array("i"), array("b")
        self._start, self._plan = array("q"), array("i")

    def open(self, example: int, first: int = 0) -> None:
        """Begin a row of `example`, whose first question is number `first`."""
        self._start.append(len(self._ids))
        self._plan.extend((example, first, 0))

    def question(self) -> int:
        """Count one more question in the open row; its thread."""
        self._plan[-1] += 1
        return self._plan[-1]

    def add(self, ids: Sequence[int], supervised: Sequence[bool], thread: int = 0) -> None:
        """Append tokens to the open row."""
        self._ids.extend(ids)
        self._supervised.extend(supervised)
        self._thread.extend([thread] * len(ids))

    def truncate(self) -> bool:
        """Cut what the open row has too many on the right; whether there was anything to cut."""
        end = self._start[-1] + self._text_length
        too_long = len(self._ids) > end
        for tokens in (self._ids, self._thread, self._supervised):
            del tokens[end:]
        return too_long

    def rows(self, captions: np.ndarray) -> Rows:
        """Everything written so far, with the captions [examples, C] of the examples."""
        example, first, count = np.array(self._plan, np.int32).reshape(-1, 3).T
        return Rows(
            ids=np.array(self._ids, np.int32),
            thread=np.array(self._thread, np.int32),
            supervised=np.array(self._supervised, bool),
            start=np.array([*self._start, len(self._ids)], np.int64),
            example=example,
            first=first,
            count=count,
            captions=captions,
            text_length=self._text_length,
        )


def question_rows(texts: Sequence[dict[str, Any]], tokenizer: Tokenizer, cfg: DataConfig) -> Rows:
    """Pack the questions of each picture into as few rows as hold them, in their order; none is lost or repeated.

    A row is [BOS][IMAGE][VOCO], with [IMAGE][VOCO] once for every frame of a video, then for every question its tokens,
    the answer's and EOS, a thread each. A picture without questions has no row.

    Args:
        texts: "image_id", "questions", "answers" and "caption" of every example, and "frames" where it is not 1.
        tokenizer: anything with BOS and EOS at ids 1 and 2.
        cfg: reads `text_length`, `images`, `questions`, `describe`, `caption_length`.

    Raises:
        ValueError: a question that does not fit into a row of its own, a caption longer than `caption_length`, or more
            frames than `images`.
    """
    if cfg.describe:
        texts = [_described(text, cfg.describe) for text in texts]
    questions = iter(_encode(tokenizer, [question for text in texts for question in text["questions"]]))
    answers = iter(_encode(tokenizer, [answer for text in texts for answer in text["answers"]]))
    writer = RowWriter(cfg.text_length)
    for example, text in enumerate(texts):
        frames = text.get("frames", 1)
        if frames > cfg.images:
            raise ValueError(
                f"data.images = {cfg.images} is too small for example {text['image_id']}, which has {frames} pictures"
            )
        prefix = (BOS_ID, *PICTURE * frames)
        room = cfg.text_length - len(prefix)
        left, thread = 0, 0  # no room, so that the first question opens a row
        for number, question, answer in zip(range(len(text["questions"])), questions, answers):
            length = len(question) + len(answer) + 1
            if length > room:
                raise ValueError(
                    f"data.text_length = {cfg.text_length} is too short for question {number} of picture "
                    f"{text['image_id']}, which needs {length + len(prefix)}"
                )
            if length > left or thread == cfg.questions > 0:
                writer.open(example, number)
                writer.add(prefix, [False] * len(prefix))
                left = room
            left -= length
            thread = writer.question()
            target = [False] * len(question) + [True] * (len(answer) + 1)
            writer.add([*question, *answer, EOS_ID], target, thread)
    return writer.rows(_captions(texts, tokenizer, cfg.caption_length))


def _described(text: dict[str, Any], question: str) -> dict[str, Any]:
    """The example with its caption as the answer of a first question."""
    asked, answers = [question, *text["questions"]], [text["caption"], *text["answers"]]
    return {**text, "questions": asked, "answers": answers}


def _captions(texts: Sequence[dict[str, Any]], tokenizer: Tokenizer, length: int) -> np.ndarray:
    out = np.zeros((len(texts), length), np.int32)
    for row, text, ids in zip(out, texts, _encode(tokenizer, [text["caption"] for text in texts])):
        if len(ids) > length:
            raise ValueError(
                f"data.caption_length = {length} is too short for the caption of picture {text['image_id']}, "
                f"which needs {len(ids)}"
            )
        row[: len(ids)] = ids
    return out


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    encoded = tokenizer.encode_batch(distinct, add_special_tokens=False)
    ids = {text: encoding.ids for text, encoding in zip(distinct, encoded)}
    return [ids[text] for text in texts]
