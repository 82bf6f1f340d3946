"""Instruction data in LLaVA's JSON format: `llava.json` beside a folder `images/`.

The JSON is a list of {"id", "image" (left out for a text-only entry), "conversations": [{"from": "human" | "gpt",
"value"}, ...]}. There is one split, "train".
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tqdm import tqdm

from tokzip_jax.config import DataConfig
from tokzip_jax.data import anyres
from tokzip_jax.data.rows import Rows, RowWriter
from tokzip_jax.data.tokenizer import BOS_ID, EOS_ID
from tokzip_jax.data.transforms import check_picture
from tokzip_jax.types import IMAGE_ID, VOCO_ID

JSON_NAME, IMAGES_NAME, SKIPPED, CHECKED = "llava.json", "images", "skipped.jsonl", "checked.txt"
MARKER = "<image>"
CHUNK = 1024  # conversations that are tokenised at once
_decoded: set[str] = set()  # lines of `checked.txt` that this process found to be so

# The system sentence of Vicuna v1; VoCo-LLaMA puts in `of the image` where there is one.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant{}. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class LlavaSource:
    """Conversations, and the pictures that they are about.

    Attributes:
        voco_layout: the picture and its VoCo tokens come first and the system sentence after them (VoCo-LLaMA); else
            the system sentence is first and the picture stands in its message (LLaVA-1.5).
    """

    def __init__(
        self,
        entries: list[dict[str, Any]],
        folder: Path,
        *,
        voco_layout: bool,
        facts: Mapping[str, dict[str, Any]] | None = None,
    ):
        self._entries = entries
        self._folder = folder
        self._facts = facts or {}  # of pictures that are cut into tiles, by file name
        self.voco_layout = voco_layout

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image(index), **self.text(index)}

    def text(self, index: int) -> dict[str, Any]:
        """The example without its picture; a turn is a question of type "open", and there is no caption."""
        turns = self._turns(index)
        return {
            "image_id": str(self._entries[index].get("id", index)),
            "questions": [question.replace(MARKER, "").strip() for question, _ in turns],
            "answers": [answer for _, answer in turns],
            "types": ["open"] * len(turns),
            "caption": "",
            **self._facts.get(self._entries[index].get("image"), {}),
        }

    def image(self, index: int) -> np.ndarray | None:
        """The picture, uint8 [H, W, 3], or None.

        Raises:
            ValueError: it cannot be decoded any more; when the data set was opened it could (see `load`).
        """
        name = self._entries[index].get("image")
        if name is None:
            return None
        path = self._folder / name
        try:
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} cannot be decoded ({error}); repair it or take its entry out") from None

    def tiled(self, grids: Sequence[anyres.Grid], tile: int) -> "LlavaSource":
        """The same examples, those with a picture with its `anyres.facts`."""
        names = list(dict.fromkeys(entry["image"] for entry in self._entries if entry.get("image") is not None))
        with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = list(pool.map(lambda name: _size(self._folder / name), names))
        facts = {name: anyres.facts(size, grids, tile) for name, size in zip(names, sizes)}
        return LlavaSource(self._entries, self._folder, voco_layout=self.voco_layout, facts=facts)

    def rows(self, tokenizer: Tokenizer, cfg: DataConfig) -> Rows:
        """One row a conversation: one sample, one thread (0), targets the answers and their EOS.

        A row longer than `cfg.text_length` loses its right end, as in LLaVA; how many did is logged once. Texts are
        tokenised between special tokens: at the picture, at its VoCo tokens, and at the EOS of every answer. Of a
        picture in tiles the placeholders are repeated, once for each that the tower reads. In the
        VoCo layout of a row with a picture, every newline of questions and answers is deleted (as VoCo-LLaMA does).
        """
        writer = RowWriter(cfg.text_length)
        cut = 0
        for first in range(0, len(self), CHUNK):
            chunk = {index: self._pieces(index) for index in range(first, min(first + CHUNK, len(self)))}
            texts = [piece[0] for pieces in chunk.values() for piece in pieces if isinstance(piece, tuple)]
            encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
            for index, pieces in chunk.items():
                writer.open(index)
                for piece in pieces:
                    if isinstance(piece, int):
                        writer.add([piece], [piece == EOS_ID])
                    else:
                        encoding = next(encoded)
                        writer.add(encoding.ids, [end > piece[1] for _, end in encoding.offsets])
                cut += writer.truncate()
        if cut:
            logging.warning("%d of %d conversations are cut at data.text_length = %d", cut, len(self), cfg.text_length)
        return writer.rows(np.zeros((len(self), cfg.caption_length), np.int32))

    def _pieces(self, index: int) -> list[int | tuple[str, int]]:
        """A conversation as special ids and (text, where its answer begins)."""
        turns = self._turns(index)
        name = self._entries[index].get("image")
        with_image, pictures = name is not None, self._facts.get(name, {}).get("frames", 1)
        voco_first = with_image and self.voco_layout
        marked = [number for number, (question, _) in enumerate(turns) if MARKER in question]
        home = marked[0] if marked else 0  # LLaVA-1.5: the turn that the picture stands in
        lead = SYSTEM.format(" of the image" if voco_first else "") + " USER: "
        pieces: list[int | tuple[str, int]] = [BOS_ID]
        if voco_first:
            pieces += [IMAGE_ID, _plain("\n"), VOCO_ID] * pictures
            lead = "\n" + lead
        for number, (question, answer) in enumerate(turns):
            question = question.replace(MARKER, "").strip()
            if voco_first:
                question, answer = question.replace("\n", ""), answer.replace("\n", "")
            elif with_image and number == home:
                pieces += [_plain(lead), *(IMAGE_ID, VOCO_ID) * pictures]
                lead = "\n"
            prompt = f"{lead}{question} ASSISTANT: "
            pieces += [(prompt + answer, len(prompt)), EOS_ID]
            lead = "USER: "
        return pieces

    def _turns(self, index: int) -> list[tuple[str, str]]:
        """(question, answer) pairs; what stands before the first question or after the last answer is left out."""
        messages = self._entries[index]["conversations"]
        messages = messages[1:] if messages[0]["from"] != "human" else messages
        pairs = list(zip(messages[::2], messages[1::2]))
        return [(human["value"], gpt["value"]) for human, gpt in pairs]


def load(cfg: DataConfig, split: str, *, voco_layout: bool = True) -> LlavaSource:
    """Open `cfg.data_dir`; entries whose picture is missing or broken are left out and listed in `skipped.jsonl`.

    Raises:
        FileNotFoundError: `llava.json` or `images/` is not there.
        ValueError: another split than "train", no tokenizer given, an entry that is no conversation, or
            `cfg.on_error == "raise"` and a picture is missing or broken.
    """
    if split != "train":
        raise ValueError(f"{cfg.name} has no split {split!r}; the only one is 'train'")
    if not cfg.tokenizer:
        raise ValueError(f"data.tokenizer is empty; {cfg.name} needs the tokenizer.json of its language model")
    folder = Path(cfg.data_dir).expanduser()
    for path, what in ((folder / JSON_NAME, "conversations"), (folder / IMAGES_NAME, "pictures")):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; {cfg.name} looks for its {what} there (data.data_dir)")
    try:
        entries = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / JSON_NAME} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{folder / JSON_NAME} must hold a list of conversations, not a {type(entries).__name__}")
    for index, entry in enumerate(entries):
        _check(entry, index, folder / JSON_NAME)
    return LlavaSource(_with_pictures(entries, folder, cfg.on_error), folder / IMAGES_NAME, voco_layout=voco_layout)


def _check(entry: Any, index: int, path: Path) -> None:
    """Raise unless an entry has alternating human and gpt messages with at least one answer."""
    try:
        senders = [message["from"] for message in entry["conversations"] if isinstance(message["value"], str)]
        senders = senders[1:] if senders[0] != "human" else senders
        good = len(senders) > 1 and all(who == ("human", "gpt")[i % 2] for i, who in enumerate(senders))
        good = good and isinstance(entry.get("image", ""), str | None)
    except (KeyError, TypeError, IndexError, AttributeError):
        good = False
    if not good:
        raise ValueError(
            f"{path}: entry {index} must be {{'image': file name or absent, 'conversations': [...]}} with messages "
            "{'from', 'value'} that alternate between 'human' and 'gpt' and hold an answer"
        )


def _with_pictures(entries: list[dict[str, Any]], folder: Path, on_error: str) -> list[dict[str, Any]]:
    """The entries whose picture can be decoded, or that need none."""
    names = list(dict.fromkeys(entry["image"] for entry in entries if entry.get("image") is not None))
    reasons = _check_pictures(names, folder)
    if reasons and on_error == "raise":
        name = next(name for name in names if name in reasons)
        raise ValueError(
            f"data.on_error = 'raise': the picture {folder / IMAGES_NAME / name} cannot be used: {reasons[name]}"
        )
    kept, lines = [], []
    for index, entry in enumerate(entries):
        name = entry.get("image")
        if name not in reasons:
            kept.append(entry)
            continue
        skipped = {"split": "train", "image_id": str(entry.get("id", index)), "file": name, "reason": reasons[name]}
        lines.append(json.dumps(skipped) + "\n")
    if lines:
        where = f"see {folder / SKIPPED}"
        try:
            (folder / SKIPPED).write_text("".join(lines), encoding="utf-8")
        except OSError as error:  # data is often mounted read-only; the run can go on without the list
            where = f"the first is {lines[0].strip()} (no list of them: {error})"
        logging.warning("%d of %d entries are left out for their picture, %s", len(lines), len(entries), where)
    return kept


def _check_pictures(names: list[str], folder: Path) -> dict[str, str]:
    """{name: why it cannot be used} of the pictures that cannot be.

    Every picture is decoded once, which for an instruction mix takes a while (some milliseconds each, on all cores),
    and then remembered in `checked.txt` in the folder, by name, size and time; where that cannot be written, in this
    process only.
    """
    marks = {name: _mark(folder / IMAGES_NAME / name) for name in names}
    lines = {name: f"{name}\t{mark}" for name, mark in marks.items() if mark}
    good = set(_decoded)
    if (folder / CHECKED).is_file():
        good.update((folder / CHECKED).read_text(encoding="utf-8").splitlines())
    unknown = [name for name in lines if lines[name] not in good]
    reasons = {name: "the file is missing" for name in names if not marks[name]}
    if not unknown:
        return reasons
    paths = [folder / IMAGES_NAME / name for name in unknown]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda path: check_picture(path)[1], paths)
        found = list(tqdm(found, "checking pictures", len(paths), disable=len(paths) < CHUNK))
    reasons.update((name, reason) for name, reason in zip(unknown, found) if reason)
    good = {lines[name] for name in lines if name not in reasons}
    _decoded.update(good)
    beside = folder / f"{CHECKED}.{os.getpid()}"
    with contextlib.suppress(OSError):
        beside.write_text("".join(f"{line}\n" for line in sorted(good)), encoding="utf-8")
        beside.replace(folder / CHECKED)
    return reasons


def _size(path: Path) -> anyres.Size:
    """Width and height of a picture, out of its header."""
    with Image.open(path) as picture:
        return picture.size


def _mark(path: Path) -> str:
    """Size and time of a file, "" where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}\t{found.st_mtime_ns}"


def _plain(text: str) -> tuple[str, int]:
    """A text without an answer."""
    return text, len(text)
