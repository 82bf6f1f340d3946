"""easy-VQA as a TFDS data set: written as ArrayRecord and read without TensorFlow.

The PyPI package `easy-vqa` (Victor Zhou, MIT) ships 4,000 training and 1,000 test pictures, 64x64 PNG with one shape
each, and 48,248 questions about them. One TFDS example is one picture with all of its questions.
"""

import importlib
import io
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorflow_datasets as tfds

from tokzip_jax.config import DataConfig
from tokzip_jax.data import built
from tokzip_jax.data.built import BuiltSource
from tokzip_jax.data.transforms import check_picture

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLORS = frozenset({"black", "gray", "red", "blue", "green", "yellow", "teal", "brown"})
SKIPPED = "skipped.jsonl"


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `easy_vqa`; splits `train` and `test` are the official ones, in order of image id.

    The package does not say what a picture shows, so the facts of the caption are inferred from its questions and
    answers (`facts`): of the 4,000 training pictures 3,578 get shape and colour, 393 get one of the two ("a circle",
    "a red shape") and 29 get neither ("a shape"). Pixels are never looked at, and nothing is guessed.

    A picture that is missing or cannot be decoded is left out and listed in `skipped.jsonl` in the folder of the data
    set (one line each: split, image_id, file, reason); with `on_error="raise"` it stops the build. The build happens
    in a folder `incomplete.*` that is renamed at the end, so a build that was killed is never taken for a data set.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums to look for beside this file; looking for them would import
    # `importlib_resources`, which TFDS 4.9.10 uses but does not require.
    code_path = None

    def __init__(self, *, on_error: str = "skip", **kwargs: Any):
        self._on_error = on_error
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures of one coloured shape each, with questions about them and a caption.",
            homepage="https://github.com/vzhou842/easy-VQA",
            license="MIT",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "image_id": tfds.features.Text(),
                    "questions": tfds.features.Sequence(tfds.features.Text()),
                    "answers": tfds.features.Sequence(tfds.features.Text()),
                    "types": tfds.features.Sequence(tfds.features.Text()),
                    "caption": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,  # keeps the order of the image ids; Grain does the shuffling
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        package = questions_package()
        return {
            "train": self._generate_examples("train", package.get_train_questions(), package.get_train_image_paths()),
            "test": self._generate_examples("test", package.get_test_questions(), package.get_test_image_paths()),
        }

    def _generate_examples(
        self, split: str, triples: tuple[Sequence[str], Sequence[str], Sequence[int]], paths: Mapping[int, str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image_id in zip(*triples):
            by_image[image_id].append((question, answer))
        for image_id in sorted(by_image.keys() | paths.keys()):
            path = Path(paths.get(image_id, f"{image_id}.png"))
            encoded, reason = check_picture(path)
            if reason:
                self._skip({"split": split, "image_id": str(image_id), "file": path.name, "reason": reason})
                continue
            pairs = by_image[image_id]
            yield image_id, {
                "image": io.BytesIO(encoded),  # bytes: an array would be encoded by TensorFlow
                "image_id": str(image_id),
                "questions": [question for question, _ in pairs],
                "answers": [answer for _, answer in pairs],
                "types": [question_type(answer) for _, answer in pairs],
                "caption": caption(*facts(pairs)),
            }

    def _skip(self, entry: dict[str, str]) -> None:
        if self._on_error == "raise":
            raise ValueError(
                f"data.on_error = 'raise': picture {entry['image_id']} of easy_vqa/{entry['split']} ({entry['file']}) "
                f"cannot be used: {entry['reason']}"
            )
        with (self.data_path / SKIPPED).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def load(cfg: DataConfig, split: str) -> BuiltSource:
    """Open one split, building the data set first where it is not built yet (a few seconds).

    The official splits are "train" and "test". With `cfg.held_out` the last so many pictures of "train" are taken out
    of it and are the split "validation".

    Raises:
        ValueError: no such split, no training picture left, or `cfg.on_error == "raise"` and a picture cannot be used.
        ModuleNotFoundError: neither the data set nor the package that it is built from is there.
    """
    if not cfg.held_out or split not in ("train", "validation"):
        return BuiltSource(*built.read(build(cfg), split))
    encoded, texts = built.read(build(cfg), "train")
    left = len(texts) - cfg.held_out
    if left < 1:
        raise ValueError(f"data.held_out = {cfg.held_out} leaves no training picture of {len(texts)}; give fewer")
    part = slice(left) if split == "train" else slice(left, None)
    return BuiltSource(encoded[part], texts[part])


def build(cfg: DataConfig) -> EasyVqa:
    """The builder, with its data set written; what was left out of it is logged once.

    Raises:
        ValueError: `cfg.on_error == "raise"` and a picture cannot be used, or could not when the data set was built.
        ModuleNotFoundError: neither the data set nor the package that it is built from is there.
    """
    def make() -> EasyVqa:
        return EasyVqa(data_dir=cfg.data_dir or None, on_error=cfg.on_error)

    if not make().data_path.exists():
        questions_package()  # before any file is made
    builder = built.prepare(make)
    skipped = builder.data_path / SKIPPED
    if skipped.exists():
        count = len(skipped.read_text().splitlines())
        if cfg.on_error == "raise":
            raise ValueError(
                f"data.on_error = 'raise': easy_vqa was built without {count} pictures that could not be used, see "
                f"{skipped}; repair them and delete {builder.data_path}, or set data.on_error = 'skip'"
            )
        logging.warning("easy_vqa: %d pictures could not be used and are left out, see %s", count, skipped)
    return builder


def questions_package() -> ModuleType:
    """The PyPI package `easy-vqa`, or one sentence that says how to get it."""
    try:
        return importlib.import_module("easy_vqa")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the data set easy_vqa is not built under data.data_dir, and the package it is built from is missing: "
            "run `pip install easy-vqa==1.0`, or point data.data_dir at a built data set"
        ) from None


def question_type(answer: str) -> str:
    """"yes/no", "shape" or "color", by what the answer is; "other" for an answer that easy-VQA does not have."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color" if answer in COLORS else "other"


def facts(pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Infer the shape and the colour of a picture from its questions and answers.

    A fact is known when it is an answer, when a question takes it for granted ("what color is the circle?"), when a
    yes/no question affirms it ("is there not a circle?" - "no"), or when all the others are denied.

    Args:
        pairs: (question, answer) of one picture.

    Returns:
        (shape, colour), each "" where the questions do not tell.
    """
    known: set[str] = set()
    denied: set[str] = set()
    for question, answer in pairs:
        words = set(re.findall("[a-z]+", question.lower()))
        if answer in ("yes", "no"):
            affirmed = (answer == "yes") != bool(words & {"no", "not"})
            (known if affirmed else denied).update(words & (SHAPES | COLORS))
        else:
            known.update((words | {answer}) & (SHAPES | COLORS))

    def decide(values: frozenset[str]) -> str:
        for candidates in (known & values, values - denied):
            if len(candidates) == 1:
                return next(iter(candidates))
        return ""

    return decide(SHAPES), decide(COLORS)


def caption(shape: str, color: str) -> str:
    """The facts as a phrase: "a red circle", "a red shape", "a circle" or "a shape"."""
    return " ".join(word for word in ("a", color, shape or "shape") if word)
