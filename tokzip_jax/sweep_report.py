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
from tokzip_jax.compress.decoder import DECODER
from tokzip_jax.config import RunConfig
from tokzip_jax.evals import shared, table
from tokzip_jax.evals.shared import Memory, SharedRunner
from tokzip_jax.sweep import Line, Refused
from tokzip_jax.sweep_times import ROUNDS, Prefills
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
    "tokens not counted, and `tokens` is how many enter the language model.\n"
    "Methods whose number of tokens follows from the picture have fixed slots, which all costs count; a note says how "
    "many of them are filled."
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
    prefills: Prefills


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
        # Rows of earlier sweeps may share a program with one that was timed since.
        times = work.prefills.known()
        merged = [dataclasses.replace(row, prefill_ms=times.get(row.method, row.prefill_ms)) for row in (*first, *rest)]
        merged = table.with_bounds(merged, **bounds)
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
    """`figures/methods.png`, and `figures/methods_kept.png` of the table's selecting methods at the second largest
    budget."""
    figures, cfg = work.workdir.figures, work.cfg
    shown, budget = min(cfg.eval.pictures, KEPT_PICTURES), sorted(set(budgets))[-2:][0]
    named = {row.method for row in rows}
    free = [name for name in sweep.free_names() if name not in DECODER and f"{name} {budget}" in named]
    drawn = _kept(work, free, budget, shown) if free and shown else None
    if jax.process_index() != 0:
        return
    bounds = [name for name, row in cfg.rows.items() if name in (cfg.eval.lower, cfg.eval.upper) or not row.stage]
    plots_sweep.flops_figure(rows, figures / "methods.png", lines=bounds)
    if drawn:
        plots.kept_tokens_figure(*drawn, figures / "methods_kept.png")


def _kept(work: Work, names: list[str], budget: int, pictures: int) -> tuple[np.ndarray, list[list[plots.KeptPanel]]]:
    """The first pictures of the split, [N, H, W, 3], and of each a panel for every training-free method.

    They are looked at anew, and they alone: what the table's methods read of the tower, those of the sweep may not.
    """
    cfg = dataclasses.replace(work.cfg, eval=dataclasses.replace(work.cfg.eval, limit=pictures))
    lines, _ = sweep.plan(cfg, names, (budget,))
    signals = set().union(*(shared.tower_signals(line.model, line.row.method) for line in lines))
    opened = SharedRunner.create(cfg, work.workdir, work.mesh)
    base = dataclasses.replace(opened, memory=Memory(tuple(sorted(signals))))
    panels: list[list[plots.KeptPanel]] = [[] for _ in base.examples]
    for line in lines:
        runner, method = dataclasses.replace(base, cfg=sweep.run_config(cfg, [line])), line.row.method
        params, seen = runner.load(line.row), set()
        for batch in runner.rows():
            tokens = runner.encode(params, method, batch, jax.random.key(method.seed))
            tokens = jax.device_get(sharding.replicated(work.mesh, tokens))
            for row, example in enumerate(batch["example"]):
                if example >= 0 and example not in seen:  # of several questions the first one
                    seen.add(example)
                    panels[example].append(plots.kept_panel(line.method, tokens, row))
    return base.memory.images[:, 0], panels
