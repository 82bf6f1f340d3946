"""The second turn of a dialogue: answers to a question with the tokens that were chosen for another one.

Rows of two questions are read with what is chosen for the first one (`step.answers`, `turns`), and the second answer
counts; the two do not see each other. Beside it stand the same questions with a choice of their own. A method that does
not look at the question has one number for both.
"""

import dataclasses
import json
import pathlib
from typing import Any, Protocol

import jax
import numpy as np

from tokzip_jax import config_io
from tokzip_jax.evals.shared import SharedRunner
from tokzip_jax.metrics import say
from tokzip_jax.sweep import Line
from tokzip_jax.workdir import write_atomically

CAPTION = (
    "Second turn: accuracy on a question, with tokens chosen for the question before it (kept) and for itself (again). "
    "Methods that need no training."
)


class Work(Protocol):
    """What is read of a `sweep_run.Sweep`."""

    lines: list[Line]
    again: bool

    def runner(self, line: Line) -> SharedRunner:
        """Of a line's model and data."""


def answered(runner: SharedRunner, line: Line, questions: int) -> dict[tuple[int, int], bool]:
    """Which last question of every row with `questions` of them is answered: (example, question) -> right."""
    data = dataclasses.replace(runner.cfg.data, questions=questions)
    runner = dataclasses.replace(runner, cfg=dataclasses.replace(runner.cfg, data=data))
    method, params, found = line.row.method, runner.load(line.row), {}
    for batch in runner.rows():
        if batch["question"].shape[1] < questions:
            continue
        visual = runner.encode(params, method, batch, jax.random.key(method.seed))
        right = runner.read(params, method, batch, visual, turns=True)
        for row in np.flatnonzero((batch["example"] >= 0) & (batch["question"][:, questions - 1] >= 0)):
            key = int(batch["example"][row]), int(batch["question"][row, questions - 1])
            found[key] = bool(right[row, questions - 1])
    return found


def measure(runner: SharedRunner, line: Line) -> dict[str, Any]:
    """A line of the table: "kept", "again" (None for a method that does not look at the question), "questions".

    Raises:
        ValueError: no picture has two questions.
    """
    kept = answered(runner, line, 2)
    if not kept:
        raise ValueError("--second_turn needs pictures with two questions, and this split has none")
    again = None
    if line.alone:
        alone = answered(runner, line, 1)
        again = sum(alone[key] for key in kept) / len(kept)
    return {"kept": sum(kept.values()) / len(kept), "again": again, "questions": len(kept)}


def make(work: Work, folder: pathlib.Path) -> str:
    """The table as text, and `second_turn.json`, where a measured line is kept."""
    path = folder / "second_turn.json"
    known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table = [f"{'method':24}  {'kept %':>7}  {'again %':>7}"]
    for line in work.lines:
        if line.training:
            continue
        row = json.loads(config_io.to_json(line.row))
        if work.again or known.get(line.name, {}).get("row") != row:
            known[line.name] = {**measure(work.runner(line), line), "row": row}
            say(f"{line.name}, second turn: {known[line.name]['kept']:.4f}")
            if jax.process_index() == 0:
                write_atomically(path, json.dumps(known, indent=2) + "\n")
        found = known[line.name]
        again = "-" if found["again"] is None else f"{100 * found['again']:.1f}"
        table.append(f"{line.name:24}  {100 * found['kept']:7.1f}  {again:>7}")
    return "\n".join([*table, "", CAPTION])
