"""What a sweep writes: its table, which earlier sweeps of the workdir have a part in, its caption and two figures."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from tokzip_jax import plots, plots_sweep, sharding, sweep
from tokzip_jax.config import RunConfig
from tokzip_jax.evals import table
from tokzip_jax.evals.shared import SharedRunner
from tokzip_jax.sweep import Line, Refused
from tokzip_jax.sweep_times import ROUNDS
from tokzip_jax.workdir import Workdir, write_atomically

FOLDER = "methods"  # under eval/
KEPT_PICTURES = 3  # of the figure of kept tokens
CAPTION = (
    "accuracy: exact match, per cent; % of full = x / {upper}; retention = (x - {lower}) / ({upper} - {lower}).\n"
    "prefill: FLOPs of the language model from a picture's visual tokens to the first token of an answer; prefill ms: "
    "the same measured, the median of {rounds} runs of a batch of {batch} questions divided by {batch}; methods that "
    "give equally many tokens share the program and the number. VoCo's rows are the run's own, read from their cache.\n"
    "a layer: visual tokens that a layer works on, the mean of the layers; picture: FLOPs before any question (tower, "
    "projector, VoCo's stage one); decode: FLOPs of the language model for the second token of an answer.\n"
    "Decoder-site methods keep half of the visual tokens: the number in their name is what the last cut keeps, merged "
    "tokens not counted, and `tokens` is how many enter the language model."
)
SECOND = (
    "2nd turn: accuracy on a question with the tokens that were chosen for the question before it; chosen again: with "
    "those chosen for itself."
)
BF16 = "bf16: of the places that a method keeps, the share that it keeps where the model runs in bfloat16."
EQUAL = "equal time: trained for as many steps as take the time of stage {name!r}; VoCo's rows were not."


class Work(Protocol):
    """What is read of a `sweep_run.Sweep`."""

    cfg: RunConfig
    workdir: Workdir
    mesh: Mesh
    lines: list[Line]
    base: SharedRunner

    def runner(self, line: Line) -> SharedRunner:
        """Of a line's model and data."""


def part(workdir: Workdir, stage: str = "") -> Workdir:
    """The run's workdir with a folder for the results of the sweep, or for those of one of its stages."""
    return Workdir(workdir.root, f"{FOLDER}/{stage}" if stage else FOLDER)


def write(work: Work, rows: list[table.RowResult], refused: list[Refused]) -> list[table.RowResult]:
    """Write the table with what earlier sweeps wrote; all its rows."""
    folder, names = part(work.workdir).eval, sweep.named(work.cfg, ["all"])
    with work.workdir.hold("table of methods"):
        known = {row.method for row in rows}
        earlier = [row for row in _read(folder / "summary.json") if row["method"] not in known]
        merged = [*rows, *(table.RowResult(**row) for row in earlier if row["method"].split()[0] in names)]
        first = [row for row in merged if row.method.split()[0] not in names]
        rest = [row for row in merged if row not in first]
        rest = sorted(rest, key=lambda row: (names.index(row.method.split()[0]), int(row.method.split()[1])))
        bounds = {"upper": work.cfg.eval.upper, "lower": work.cfg.eval.lower}
        merged = table.with_bounds([*first, *rest], **bounds)
        asked = {(line.method, line.tokens) for line in refused} | {(line.method, line.tokens) for line in work.lines}
        old = [line for line in _read(folder / "refused.json") if (line["method"], line["tokens"]) not in asked]
        if jax.process_index() == 0:
            table.write(merged, folder)
            found: list[dict[str, Any]] = [*old, *(dataclasses.asdict(line) for line in refused)]
            write_atomically(folder / "refused.json", json.dumps(found, indent=2) + "\n")
    return merged


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def caption(work: Work, rows: list[table.RowResult]) -> str:
    """What the columns of the table mean."""
    cfg = work.cfg
    bounds = {"upper": cfg.eval.upper, "lower": cfg.eval.lower}
    text = CAPTION.format(**bounds, rounds=ROUNDS, batch=len(work.base.rows()[0]["example"]))
    if any(row.accuracy_equal_time is not None for row in rows):
        text += "\n" + EQUAL.format(name=sweep.template(cfg))
    text += "\n" + SECOND if any(row.second_kept is not None for row in rows) else ""
    return text + ("\n" + BF16 if any(row.bf16_agreement is not None for row in rows) else "")


def draw(work: Work, rows: list[table.RowResult], budgets: Sequence[int]) -> None:
    """`figures/methods.png`, and `figures/methods_kept.png` of the selecting methods at the second largest budget."""
    figures, cfg = work.workdir.figures, work.cfg
    budget = sorted(set(budgets))[-2:][0]
    chosen = [line for line in work.lines if line.tokens == budget and line.row.method.encoder != "none"]
    panels, pictures = [], cfg.eval.pictures
    for line in chosen if pictures else []:
        runner = work.runner(line)
        batch = runner.rows()[0]
        tokens = runner.encode(runner.load(line.row), line.row.method, batch, jax.random.key(line.row.method.seed))
        panels.append((line.method, jax.device_get(sharding.replicated(work.mesh, tokens)), batch["example"]))
    if jax.process_index() != 0:
        return
    bounds = [name for name, row in cfg.rows.items() if name in (cfg.eval.lower, cfg.eval.upper) or not row.stage]
    plots_sweep.flops_figure(rows, figures / "methods.png", lines=bounds)
    if panels:
        shown = range(min(pictures, KEPT_PICTURES, len(work.base.memory.images), len(set(panels[0][2]))))
        columns = [
            [plots.kept_panel(name, tokens, int(np.argmax(examples == example))) for name, tokens, examples in panels]
            for example in shown
        ]
        plots.kept_tokens_figure(work.base.memory.images[list(shown), 0], columns, figures / "methods_kept.png")
