"""The results of a run as one table: for the terminal, as Markdown, and as `eval/summary.json`."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from tokzip_jax.evals.retention import percent_of_full, retention

DASH = "-"
SUMMARY_KEYS = (
    "method",
    "visual_tokens",
    "accuracy",
    "accuracy_by_type",
    "accuracy_not_yes_no",
    "percent_of_full",
    "retention",
    "kv_bytes",
    "prefill_flops",
)
# What a sweep of methods adds.
SWEEP_KEYS = (
    "layer_tokens",
    "picture_flops",
    "decode_flops",
    "prefill_ms",
    "second_kept",
    "second_again",
    "bf16_agreement",
)
# What a study adds.
STUDY_KEYS = (
    "note",
    "seeds",
    "spread",
    "learning_rate",
    "train_seconds",
    "accuracy_equal_time",
    "spread_equal_time",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowResult:
    """One line of the table. None means that there is no such number, and shows as a dash.

    Attributes:
        method: the row's name.
        visual_tokens: tokens of all pictures of a row that the question can read (`flops.Ledger.read_tokens`); a mean
            where rows differ in pictures, or every question picks its own number.
        accuracy, accuracy_by_type, accuracy_not_yes_no: fractions of 1, see `scoring.Score`.
        kv_bytes: bytes that these pictures keep in the KV cache while questions about it are answered.
        prefill_flops: FLOPs of the language model from a question to the first token of its answer.
        percent_of_full, retention: ratios, see `retention.py`; `with_bounds` fills them in.
        layer_tokens: visual tokens that a layer of the language model works on, the mean of the layers; where VoCo
            tokens stand for them, those.
        picture_flops: FLOPs of a picture before any question: vision tower, projector, VoCo's stage one.
        decode_flops: FLOPs of the language model for the second token of an answer.
        prefill_ms: measured milliseconds of a prefill, a question's share of a batch.
        second_kept, second_again: accuracy on the second question of a row with what was chosen for the first one, and
            with what is chosen for itself (`second_turn`).
        bf16_agreement: share of the kept places that a model in bfloat16 keeps too (`agreement`).
        note: a remark, shown in a last column.
        seeds: over how many seeds the accuracies are means.
        spread: half the range of `accuracy` over those seeds.
        learning_rate, train_seconds: of a row that a study trained: the rate that was chosen, and what its steps take.
        accuracy_equal_time, spread_equal_time: as above, of trainings that take as long as one another.
    """

    method: str
    visual_tokens: float | None
    accuracy: float
    accuracy_by_type: dict[str, float]
    accuracy_not_yes_no: float | None
    kv_bytes: float | None = None
    prefill_flops: float | None = None
    percent_of_full: float | None = None
    retention: float | None = None
    layer_tokens: float | None = None
    picture_flops: float | None = None
    decode_flops: float | None = None
    prefill_ms: float | None = None
    second_kept: float | None = None
    second_again: float | None = None
    bf16_agreement: float | None = None
    note: str = ""
    seeds: int = 1
    spread: float | None = None
    learning_rate: float | None = None
    train_seconds: float | None = None
    accuracy_equal_time: float | None = None
    spread_equal_time: float | None = None


def with_bounds(rows: Sequence[RowResult], *, upper: str, lower: str) -> list[RowResult]:
    """The rows with `percent_of_full` and `retention` against the rows named `upper` and `lower`.

    Raises:
        ValueError: there is no row of one of the two names.
    """
    accuracy = {row.method: row.accuracy for row in rows}
    for bound in (upper, lower):
        if bound not in accuracy:
            raise ValueError(f"the bound {bound!r} is no row of the table; the rows are {', '.join(accuracy)}")
    top, bottom = accuracy[upper], accuracy[lower]
    return [
        dataclasses.replace(
            row,
            percent_of_full=percent_of_full(row.accuracy, top),
            retention=retention(row.accuracy, lower=bottom, upper=top),
        )
        for row in rows
    ]


def mean_over_seeds(rows: Sequence[RowResult]) -> RowResult:
    """One row out of the rows of several seeds: mean accuracies and costs, `spread` = half the accuracies' range.

    Raises:
        ValueError: no row at all, or rows that do not tell of the same method and question types.
    """
    if not rows:
        raise ValueError("a mean over seeds needs at least one row")
    first = rows[0]
    if any((row.method, set(row.accuracy_by_type)) != (first.method, set(first.accuracy_by_type)) for row in rows):
        raise ValueError(f"rows of several seeds must share method and question types; {first.method!r} do not")
    scores = [row.accuracy for row in rows]
    types = {name: [row.accuracy_by_type[name] for row in rows] for name in first.accuracy_by_type}
    without = [row.accuracy_not_yes_no for row in rows if row.accuracy_not_yes_no is not None]
    costs = {name: [getattr(row, name) for row in rows] for name in ("visual_tokens", "kv_bytes", "prefill_flops")}
    # Equal ones stay as they are: a whole number remains one.
    means = {name: math.fsum(values) / len(rows) for name, values in costs.items() if len(set(values)) > 1}
    return dataclasses.replace(
        first,
        **means,
        accuracy=math.fsum(scores) / len(rows),
        accuracy_by_type={name: math.fsum(values) / len(rows) for name, values in types.items()},
        accuracy_not_yes_no=math.fsum(without) / len(without) if without else None,
        seeds=len(rows),
        spread=(max(scores) - min(scores)) / 2 if len(rows) > 1 else None,
    )


def text_table(rows: Sequence[RowResult]) -> str:
    """The table for a terminal: first and last column to the left, numbers to the right."""
    lines = [_header(rows), *_body(rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    noted = any(row.note for row in rows)

    def line(cells: Sequence[str]) -> str:
        out = [cell.rjust(width) for cell, width in zip(cells, widths)]
        out[0] = cells[0].ljust(widths[0])
        if noted:
            out[-1] = cells[-1]
        return "  ".join(out).rstrip()

    return "\n".join([line(lines[0]), line(["-" * width for width in widths]), *map(line, lines[1:])])


def markdown_table(rows: Sequence[RowResult]) -> str:
    """The table as Markdown; a bar inside a cell is escaped."""
    header, noted = _header(rows), any(row.note for row in rows)
    rule = ["---", *["---:"] * (len(header) - 1 - noted), *["---"] * noted]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [header, *_body(rows)]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [escaped[0], rule, *escaped[1:]])


def summary(rows: Sequence[RowResult]) -> list[dict[str, Any]]:
    """What `eval/summary.json` holds: per row the keys of `SUMMARY_KEYS`, None where the table shows a dash.

    A table with a measured prefill also has those of `SWEEP_KEYS`, one with a row that a study trained those of
    `STUDY_KEYS`.
    """
    keys = SUMMARY_KEYS + SWEEP_KEYS * any(row.prefill_ms is not None for row in rows)
    keys += STUDY_KEYS * any(row.train_seconds is not None for row in rows)
    return [{key: getattr(row, key) for key in keys} for row in rows]


def write(rows: Sequence[RowResult], directory: str | os.PathLike[str]) -> None:
    """Write `summary.json`, `table.md` and `table.txt` into a directory, made where it is missing.

    A file appears whole or not at all, so that a run which is killed here leaves no half table.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "summary.json": json.dumps(summary(rows), indent=2, allow_nan=False),
        "table.md": markdown_table(rows),
        "table.txt": text_table(rows),
    }
    for name, text in texts.items():
        partial = directory / f"{name}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(directory / name)


def with_unit(value: float | None, unit: str) -> str:
    """A number to three digits with a decimal prefix: 524288 and "B" give "524 kB"; a dash for None."""
    if value is None:
        return DASH
    value = float(f"{value:.3g}")  # before the prefix is chosen: 999,999 reads "1 M", not "1000 k"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def token_count(value: float | None) -> str:
    """A number of tokens: whole ones as they are, a mean to two places, a dash for None."""
    if value is None:
        return DASH
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def _with_spread(value: float | None, spread: float | None) -> str:
    return _percent(value) + ("" if spread is None else f" ±{100 * spread:.1f}")


def _types(rows: Sequence[RowResult]) -> list[str]:
    return sorted({name for row in rows for name in row.accuracy_by_type})


def _columns(rows: Sequence[RowResult]) -> dict[str, Callable[[RowResult], str]]:
    columns: dict[str, Callable[[RowResult], str]] = {
        "method": lambda row: row.method,
        "tokens": lambda row: token_count(row.visual_tokens),
        "accuracy %": lambda row: _with_spread(row.accuracy, row.spread),
    }
    for name in _types(rows):
        columns[name] = lambda row, name=name: _percent(row.accuracy_by_type.get(name))
    columns |= {
        "not yes/no": lambda row: _percent(row.accuracy_not_yes_no),
        "% of full": lambda row: _percent(row.percent_of_full),
        "retention %": lambda row: _percent(row.retention),
        "KV cache": lambda row: with_unit(row.kv_bytes, "B"),
        "prefill": lambda row: with_unit(row.prefill_flops, "FLOP"),
    }
    if any(row.prefill_ms is not None for row in rows):
        columns |= {
            "prefill ms": lambda row: DASH if row.prefill_ms is None else f"{row.prefill_ms:.3g}",
            "a layer": lambda row: DASH if row.layer_tokens is None else f"{row.layer_tokens:.4g}",
            "picture": lambda row: with_unit(row.picture_flops, "FLOP"),
            "decode": lambda row: with_unit(row.decode_flops, "FLOP"),
        }
    if any(row.second_kept is not None for row in rows):
        columns |= {
            "2nd turn %": lambda row: _percent(row.second_kept),
            "chosen again %": lambda row: _percent(row.second_again),
        }
    if any(row.bf16_agreement is not None for row in rows):
        columns["bf16 %"] = lambda row: _percent(row.bf16_agreement)
    if any(row.train_seconds is not None for row in rows):
        columns |= {
            "lr": lambda row: DASH if row.learning_rate is None else f"{row.learning_rate:g}",
            "train s": lambda row: DASH if row.train_seconds is None else f"{row.train_seconds:.0f}",
        }
    if any(row.accuracy_equal_time is not None for row in rows):
        columns["equal time %"] = lambda row: _with_spread(row.accuracy_equal_time, row.spread_equal_time)
    if any(row.note for row in rows):
        columns["note"] = lambda row: row.note
    return columns


def _header(rows: Sequence[RowResult]) -> list[str]:
    return list(_columns(rows))


def _body(rows: Sequence[RowResult]) -> list[list[str]]:
    columns = _columns(rows)
    return [[cell(row) for cell in columns.values()] for row in rows]
