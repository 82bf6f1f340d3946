"""Does a model that runs in bfloat16 keep the patches that it keeps in float32?

Scores are float32 whatever the model's `dtype` is; but what they are made of is rounded before. Ranks that lie close
together then change places, and some patch goes that would have stayed.
"""

import dataclasses
import pathlib
from typing import Protocol

import jax
import numpy as np

from tokzip_jax import sharding, sweep_columns
from tokzip_jax.evals.shared import Memory, SharedRunner
from tokzip_jax.metrics import say
from tokzip_jax.sweep import Line
from tokzip_jax.types import VisualTokens
from tokzip_jax.workdir import Workdir


class Work(Protocol):
    """What is read of a `sweep_run.Sweep`."""

    workdir: Workdir
    lines: list[Line]
    base: SharedRunner
    again: bool

    def runner(self, line: Line) -> SharedRunner:
        """Of a line's model and data."""


def places(tokens: VisualTokens) -> list[set[int]]:
    """Of each picture the raster places that its tokens stand for."""
    position, valid = np.asarray(tokens.position_BM), np.asarray(tokens.valid_BM)
    return [set(row[real & (row >= 0)].tolist()) for row, real in zip(position, valid)]


def measure(line: Line, runner: SharedRunner, other: SharedRunner) -> float | None:
    """Which share of the places that a method keeps by one runner it keeps by the other one, the mean over pictures.

    Both read the pictures of the same batches; of a method that reads the question each row counts. None where no
    token stands for a place of a picture, say where the CLS token alone is kept.
    """
    shares, method = [], line.row.method
    for batch in runner.rows():
        found = []
        for each in (runner, other):
            tokens = each.encode(each.load(line.row), method, batch, jax.random.key(method.seed))
            found.append(places(jax.device_get(sharding.replicated(each.mesh, tokens))))
        pairs = [pair for pair, example in zip(zip(*found), batch["example"]) if example >= 0 and pair[0]]
        shares += [len(own & others) / len(own) for own, others in pairs]
    return float(np.mean(shares)) if shares else None


def measure_all(work: Work, folder: pathlib.Path, *, missing: bool = True) -> dict[str, dict[str, float | None]]:
    """The column of every encoder-site line, {name: {"bf16_agreement": ...}}; what was measured is kept in
    `bf16.json`, and without `missing` nothing else is in it."""
    lines = {line.name: line for line in work.lines if line.row.method.encoder != "none" and not line.training}
    if missing:
        work.base.rows()  # the pictures are there then
    shared = {name: getattr(work.base.memory, name) for name in ("signals", "images", "batches")}
    memory = Memory(**shared)

    def one(name: str) -> dict[str, float | None]:
        runner = work.runner(lines[name])
        model = dataclasses.replace(runner.cfg.model, dtype="bfloat16")
        half = dataclasses.replace(runner, cfg=dataclasses.replace(runner.cfg, model=model), memory=memory)
        found = measure(lines[name], runner, half)
        say(f"{name}, kept in bfloat16 too: " + ("no places" if found is None else f"{found:.4f}"))
        return {"bf16_agreement": found}

    rows = {name: line.row for name, line in lines.items()}
    return sweep_columns.measured(work.workdir, folder / "bf16.json", rows, one, again=work.again, missing=missing)
