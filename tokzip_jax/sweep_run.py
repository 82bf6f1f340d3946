"""Measure the rows of a sweep, training what has to be trained; every piece is kept in the workdir and done once."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from tokzip_jax import agreement, second_turn, sweep, sweep_report
from tokzip_jax.checkpoint import finished
from tokzip_jax.config import RunConfig
from tokzip_jax.data import sources
from tokzip_jax.evals import shared, table
from tokzip_jax.evals.runner import Runner
from tokzip_jax.evals.shared import Memory, SharedRunner
from tokzip_jax.metrics import MetricWriter, say
from tokzip_jax.study import Study, rates
from tokzip_jax.sweep import Line
from tokzip_jax.sweep_report import part
from tokzip_jax.sweep_times import Prefills
from tokzip_jax.training import train_all
from tokzip_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep in a workdir.

    Attributes:
        cfg, workdir, mesh: of the run.
        lines: its rows.
        base: runner of the run's own rows.
        prefills: times the questions' prefills.
        again: also measure what the workdir holds.
    """

    cfg: RunConfig
    workdir: Workdir
    mesh: Mesh
    lines: list[Line]
    base: SharedRunner
    prefills: Prefills
    again: bool = False

    @classmethod
    def create(cls, cfg: RunConfig, workdir: Workdir, mesh: Mesh, lines: list[Line], *, again: bool = False) -> "Sweep":
        """Open the run's split.

        Raises:
            FileNotFoundError: the stage of the upper bound was not trained to its end.
        """
        origin = cfg.rows[cfg.eval.upper].stage
        if finished(workdir.checkpoints(origin)) is None:
            raise FileNotFoundError(
                f"stage {origin!r} has no finished checkpoint in {workdir.checkpoints(origin)}: run train.py to its end"
            )
        signals = set().union(*(shared.tower_signals(line.model, line.row.method) for line in lines))
        opened = SharedRunner.create(cfg, workdir, mesh)
        base = dataclasses.replace(opened, memory=Memory(tuple(sorted(signals))))
        prefills = Prefills(cfg, part(workdir), mesh, base, again)
        return cls(cfg, workdir, mesh, _without_padding(lines, base), base, prefills, again)

    def runner(self, line: Line) -> SharedRunner:
        """Of a line's model and data; pictures and features are shared. What was trained is read of its first seed."""
        if line.training:
            found = self.study([line]).first_reader()
            full = {name: getattr(self.cfg.data, name) for name in ("text_length", "targets")}
            data = dataclasses.replace(found.cfg.data, **full)  # rows of several questions are asked for too
            return dataclasses.replace(found, cfg=dataclasses.replace(found.cfg, data=data))
        cfg = sweep.run_config(self.cfg, [line])
        return dataclasses.replace(self.base, cfg=cfg, workdir=part(self.workdir))

    def bounds(self) -> list[table.RowResult]:
        """The run's own rows that others are compared with: the prior, the lower and the upper bound."""
        cfg = self.cfg
        names = [name for name, row in cfg.rows.items() if not row.stage]
        return [self.base.cached(name, again=self.again) for name in (*names, cfg.eval.lower, cfg.eval.upper)]

    def own(self) -> list[table.RowResult]:
        """The run's own rows of VoCo tokens, out of its table; none where train.py has not come to its end."""
        path = self.workdir.eval / "summary.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        rows = {row["method"]: table.RowResult(**row) for row in found}
        voco = [name for name, row in self.cfg.rows.items() if row.stage and row.method.voco_mask != "visible"]
        # Of another length than the sweep's trainings at equal time.
        lengthless = {"accuracy_equal_time": None, "spread_equal_time": None}
        return [dataclasses.replace(rows[n], **lengthless) for n in voco if n in rows and n != self.cfg.eval.lower]

    def free(self, line: Line) -> table.RowResult:
        """A row that needs no training; the run's own result where it has the same row."""
        own = next((name for name, row in self.cfg.rows.items() if row == line.row), "")
        if own and not line.alone:
            return dataclasses.replace(self.base.cached(own, again=self.again), method=line.name)
        return self.runner(line).cached(line.name, again=self.again)

    def study(self, lines: Sequence[Line]) -> Study:
        """The trainings of the lines of one stage, at the study's learning rates and seeds."""
        cfg, stage = sweep.run_config(self.cfg, lines), lines[0].row.stage
        folder = part(self.workdir, stage)
        split, limit = cfg.study.split, cfg.study.limit
        tested = dataclasses.replace(self.base, cfg=cfg, workdir=folder)
        readers: dict[tuple[str, int], Runner] = {(cfg.eval.split, cfg.eval.limit): tested}
        if len(rates(cfg, stage)) > 1 and (split, limit) not in readers:
            measured = dataclasses.replace(cfg.eval, split=split, limit=limit)
            readers[split, limit] = SharedRunner.create(dataclasses.replace(cfg, eval=measured), folder, self.mesh)
        # The stage that says how long trainings take has rows as full as the run's.
        reference = dataclasses.replace(cfg, data=dataclasses.replace(self.cfg.data, held_out=cfg.data.held_out))
        return Study(cfg, folder, self.mesh, readers, {cfg.study.equal_time: reference})

    def trained(self, lines: Sequence[Line]) -> list[table.RowResult]:
        """The rows of one stage, which is trained where it was not yet."""
        study = self.study(lines)
        with MetricWriter(self.workdir.root) as writer:
            train_all(study, writer)
        rows = [study.row(line.name, again=self.again) for line in lines]
        study.write_record()
        notes = ["; ".join(filter(None, (row.note, self._note(line)))) for row, line in zip(rows, lines)]
        return [dataclasses.replace(row, note=note) for row, note in zip(rows, notes)]

    def rows(self) -> Iterator[list[table.RowResult]]:
        """The rows, after everything without training and after each training: what there is by then."""
        free = [line for line in self.lines if not line.training]
        if free:
            # What all of them need is there before they begin, and not made by each.
            self.bounds()
        done = dict(zip([line.name for line in free], shared.side_by_side(self.mesh, self.free, free)))
        if done:
            yield self.in_order(done)
        left: dict[str, list[Line]] = {}
        for line in self.lines:
            if line.training:
                left.setdefault(line.row.stage, []).append(line)
        # What another process has done by its turn is read.
        pieces = {f"sweep {stage}": stage for stage in left}
        for piece in self.workdir.in_turn(pieces):
            say(f"stage {pieces[piece]}")
            found = left[pieces[piece]]
            done |= dict(zip([line.name for line in found], self.trained(found)))
            yield self.in_order(done)

    def in_order(self, done: dict[str, table.RowResult]) -> list[table.RowResult]:
        """Bounds and rows with their ratios and prefill times."""
        cfg = self.cfg
        lines = {line.name: line for line in self.lines if line.name in done}
        bounds, own = [list(map(self._costed, rows)) for rows in (self.bounds(), self.own())]
        # What a question that picks its own number of tokens takes is no single time.
        untimed = [*bounds[:-1], *(row for row in own if cfg.rows[row.method].auto.ladder)]
        own = [row for row in own if row not in untimed]
        rows = [bounds[-1], *own, *(self._costed(done[name], line) for name, line in lines.items())]
        read = {row.method: (cfg.model, cfg.rows[row.method].method) for row in (bounds[-1], *own)}
        times = self.prefills.milliseconds(read | {name: (line.model, line.row.method) for name, line in lines.items()})
        rows = [dataclasses.replace(row, prefill_ms=times[row.method]) for row in rows]
        return table.with_bounds([*untimed, *rows], upper=cfg.eval.upper, lower=cfg.eval.lower)

    def _costed(self, row: table.RowResult, line: Line | None = None) -> table.RowResult:
        """A row, of a line or of the run's own, with what the ledger says besides."""
        given = line.row if line else self.cfg.rows[row.method]
        if not given.stage:
            return row
        read = row.visual_tokens if given.auto.ladder else None
        costs = self.base.costs(given, read, line.model if line else None)
        return dataclasses.replace(
            row,
            layer_tokens=costs.mean_tokens if costs.picture_flops is None else costs.read_tokens,
            picture_flops=costs.vit_flops + costs.projector_flops + (costs.picture_flops or 0),
            decode_flops=costs.decode_flops,
        )

    def _note(self, line: Line) -> str:
        method = line.row.method
        notes = [f"{method.pool} pooling"] if method.factor else []
        notes += ["one training for all budgets"] if line.training.method.draw_budget else []
        if line.alone:
            packed = self.base.rows()
            asked = sum(int(np.sum(batch["question"] >= 0)) for batch in packed)
            rows = sum(int(np.sum(batch["example"] >= 0)) for batch in packed)
            notes += [f"trained with one question a row, where others have {asked / rows:.1f}"]
        return "; ".join(notes)


def _without_padding(lines: list[Line], base: SharedRunner) -> list[Line]:
    """Lines whose training has one question a row, with rows no longer than the longest question needs.

    The padding would be most of a step, and make it as slow as one with many questions.
    """
    if not any(line.training and line.alone for line in lines):
        return lines
    data, longest = dataclasses.replace(base.cfg.data, questions=1), 0
    for split in {"train", base.cfg.eval.split, *(["validation"] if sources.has_validation(data) else [])}:
        rows = sources.load(data, split, tile=base.cfg.model.vit.image_size).rows(base.tokenizer, data)
        longest = max(longest, int(np.max(np.diff(rows.start))))

    def shorter(line: Line) -> Line:
        length = min(line.data.text_length, longest)
        targets = min(line.data.targets, length)
        return dataclasses.replace(line, data=dataclasses.replace(line.data, text_length=length, targets=targets))

    return [shorter(line) if line.training and line.alone else line for line in lines]


def make(
    cfg: RunConfig,
    workdir: Workdir,
    mesh: Mesh,
    asked: Sequence[str],
    budgets: Sequence[int],
    *,
    held_out: int = 0,
    steps: int = 0,
    again: bool = False,
    second: bool = False,
    bf16: bool = False,
) -> str:
    """A whole sweep: its table as text; `eval/methods/` and two figures.

    The table also has the rows of earlier sweeps in this workdir, so that `all` can be asked for in pieces.

    Args:
        cfg, workdir, mesh: of the run; call this with the mesh set.
        asked, budgets, held_out, steps: see `sweep.plan`.
        again: also measure what the workdir holds already.
        second: also the accuracy of second turns, see `second_turn`.
        bf16: also whether a model in bfloat16 keeps the same places, see `agreement`.

    Raises:
        ValueError: as `sweep.plan`; `second`, and no picture has two questions.
        FileNotFoundError: the stage of the upper bound was not trained to its end.
    """
    start = time.perf_counter()
    lines, refused = sweep.plan(cfg, asked, budgets, held_out=held_out, steps=steps)
    work = Sweep.create(cfg, workdir, mesh, lines, again=again)
    if second:
        second_turn.check(work.base)
    stages = {line.row.stage for line in lines if line.training}
    say(f"{len(lines)} rows, of which {len(stages)} stages have to be trained; {len(refused)} budgets that cannot be")
    for rows in work.rows():
        written = sweep_report.write(work, rows, refused)
    for measure_all, asked_for in ((second_turn.measure_all, second), (agreement.measure_all, bf16)):
        columns = measure_all(work, part(workdir).eval, missing=asked_for)
        rows = [dataclasses.replace(row, **columns.get(row.method, {})) for row in rows]
        written = sweep_report.write(work, rows, refused)
    with workdir.hold("table of methods"):
        sweep_report.draw(work, written, budgets)
    text = f"{table.text_table(written)}\n\n{sweep_report.caption(work, written)}"
    if refused:
        text += "\n\nBudgets that cannot be:\n" + "\n".join(map(str, refused))
    taken = time.perf_counter() - start
    return f"{text}\n{taken:.0f} s; written to {part(workdir).eval} and {workdir.figures}"
