"""The second turn of a dialogue: answers to a question with the tokens that were chosen for another one.

Rows of two questions are read with what is chosen for the first one (`step.answers`, `turns`), and the second answer
counts; the two do not see each other. Beside it stand the same questions with a choice of their own. A method that does
not look at the question has one number for both. What was trained is read of its first seed.
"""

import dataclasses
import pathlib
from typing import Any, Protocol

import jax
import numpy as np

from tokzip_jax import sweep_columns
from tokzip_jax.evals.shared import SharedRunner
from tokzip_jax.metrics import say
from tokzip_jax.sweep import Line
from tokzip_jax.workdir import Workdir

FILE = "second_turn.json"


class Work(Protocol):
    """What is read of a `sweep_run.Sweep`."""

    workdir: Workdir
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
    """Of a line: "kept", "again" (None for a method that does not look at the question), "questions"."""
    kept = answered(runner, line, 2)
    again = None
    if line.alone:
        alone = answered(runner, line, 1)
        again = sum(alone[key] for key in kept) / len(kept)
    return {"kept": sum(kept.values()) / len(kept), "again": again, "questions": len(kept)}


def check(runner: SharedRunner) -> None:
    """Refuse a split that has no second turns.

    Raises:
        ValueError: no picture has two questions.
    """
    if not any(len(example["questions"]) > 1 for example in runner.examples):
        raise ValueError("--second_turn needs pictures with two questions, and this split has none")


def measure_all(work: Work, folder: pathlib.Path, *, missing: bool = True) -> dict[str, dict[str, float | None]]:
    """The columns of every line, {name: {"second_kept": ..., "second_again": ...}}; what was measured is kept in
    `second_turn.json`, and without `missing` nothing else is in it."""
    if not missing and not (folder / FILE).exists():
        return {}
    runners = {line.name: work.runner(line) for line in work.lines}
    read = {line.name: dataclasses.replace(line, row=runners[line.name].cfg.rows[line.name]) for line in work.lines}

    def one(name: str) -> dict[str, Any]:
        found = measure(runners[name], read[name])
        say(f"{name}, second turn: {found['kept']:.4f}")
        return found

    rows = {name: line.row for name, line in read.items()}
    path, again = folder / FILE, work.again
    known = sweep_columns.measured(work.workdir, path, rows, one, again=again, missing=missing)
    names = {"second_kept": "kept", "second_again": "again"}
    return {line: {key: values[name] for key, name in names.items()} for line, values in known.items()}
