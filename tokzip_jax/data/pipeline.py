"""From a data set to batches: Grain for training (shuffled, sharded, resumable), a plain generator for evaluation."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import grain
import numpy as np
from absl import flags
from tokenizers import Tokenizer

from tokzip_jax.config import DataConfig
from tokzip_jax.data import anyres, sources
from tokzip_jax.data.rows import Rows
from tokzip_jax.data.transforms import fit_image

Batch = dict[str, np.ndarray]


def train_iterator(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of the split "train", in another order every epoch.

    The order depends on the data and `seed` alone. Every epoch is one permutation of the rows, dealt out to the
    processes, so that no two of them see the same row within an epoch. A batch holds "images" uint8 [B, I, S, S, 3],
    "ids", "thread", "sample" int32 [B, T], "supervised" bool [B, T] and "captions" int32 [B, C]; with `cfg.tiles` also
    "tiles" int32 [B, 4], the columns and rows that each row's picture is cut into, and its width and height.

    Args:
        cfg: the data set; `cfg.workers` processes decode pictures, with 0 a thread of this one does.
        tokenizer: used here and now only; the rows are tokenised before the first batch.
        image_size: side in pixels.
        batch_size: rows of this process.
        seed: of the shuffle.
        process_index: which share of the rows is this process's.
        process_count: how many processes share them.

    Returns:
        An iterator with `get_state` and `set_state` (a state belongs to the same `cfg.workers` and batch size).

    Raises:
        ValueError: a row with more targets than `cfg.targets`, fewer rows than processes, or what
            `sources.load` and the rows raise.
    """
    source = sources.load(cfg, "train", tile=image_size)
    rows = source.rows(tokenizer, cfg)
    if cfg.targets and rows.most_targets > cfg.targets:
        raise ValueError(
            f"data.targets = {cfg.targets} would leave out targets of the fullest row, which has {rows.most_targets}; "
            f"give at least that, or 0 for data.text_length = {cfg.text_length}"
        )
    if len(rows) < process_count:
        raise ValueError(f"{cfg.name}/train has {len(rows)} rows, fewer than the {process_count} processes")
    make = partial(make_row, source, rows, images=cfg.images, image_size=image_size, tiled=bool(cfg.tiles))
    dataset = grain.MapDataset.range(len(rows)).seed(seed).shuffle()[process_index::process_count]
    dataset = dataset.map(make).repeat().batch(batch_size, drop_remainder=True)
    # Few, since the unit is a batch: Grain's own 500 would hold gigabytes of pictures.
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if cfg.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own; outside an absl program their defaults do
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=cfg.workers, per_worker_buffer_size=2))
    return iter(iterable)


def eval_batches(
    cfg: DataConfig, tokenizer: Tokenizer, *, split: str, image_size: int, batch_size: int, limit: int = 0
) -> Iterator[Batch]:
    """The rows of a split in order, every question once; see `train_iterator` for the arrays.

    Two more say what is what: "example" int32 [B], the index of the picture in its source (-1: a filler row at the
    end of the last batch, a copy of its last row without targets), and "question" int32 [B, Q], the index within the
    example of the question in thread 1, 2, ... (-1: none).

    Args:
        cfg: the data set.
        tokenizer: of the run.
        split: its name.
        image_size: side in pixels.
        batch_size: rows.
        limit: examples to read, from the first; 0 = all.

    Raises:
        ValueError: there are no rows, or what `sources.load` and the rows raise; before the first batch.
    """
    source = sources.load(cfg, split, tile=image_size)
    rows = source.rows(tokenizer, dataclasses.replace(cfg, describe=""))
    if limit:
        rows = rows.limited(limit)
    if not len(rows):
        raise ValueError(f"{cfg.name}/{split} has no questions")
    make = partial(make_row, source, rows, images=cfg.images, image_size=image_size, tiled=bool(cfg.tiles))
    return _in_order(make, rows, batch_size)


def _in_order(make: "partial[Batch]", rows: Rows, batch_size: int) -> Iterator[Batch]:
    threads = np.arange(max(1, rows.count.max()))  # rows of conversations count no questions
    for first in range(0, len(rows), batch_size):
        numbers = np.arange(first, first + batch_size)
        real = numbers < len(rows)
        numbers = np.minimum(numbers, len(rows) - 1)
        made = [make(number) for number in numbers]
        batch = {key: np.stack([row[key] for row in made]) for key in made[0]}
        batch["supervised"] &= real[:, None]
        batch["example"] = np.where(real, rows.example[numbers], -1).astype(np.int32)
        asked = real[:, None] & (threads < rows.count[numbers][:, None])
        batch["question"] = np.where(asked, rows.first[numbers][:, None] + threads, -1).astype(np.int32)
        yield batch


def make_row(
    source: sources.Source, rows: Rows, index: int, *, images: int, image_size: int, tiled: bool = False
) -> Batch:
    """One row of a batch: its tokens, and its pictures in the first of the `images` places (zeros elsewhere).

    With `tiled` these are the overview and the tiles of its picture, and "tiles" says which (zeros without a picture).
    """
    row, example = rows.row(index), int(rows.example[index])
    row["images"] = np.zeros((images, image_size, image_size, 3), np.uint8)
    picture = source.image(example)
    if tiled:
        row["tiles"] = np.zeros(4, np.int32)
    if picture is not None and tiled:
        row["tiles"][:] = source.text(example)["tiles"]
        frames = anyres.cut(picture, tuple(row["tiles"][:2].tolist()), image_size)
        row["images"][: len(frames)] = frames
    elif picture is not None:
        frames = picture if picture.ndim == 4 else picture[None]
        row["images"][: len(frames)] = [fit_image(frame, image_size) for frame in frames]
    return row
