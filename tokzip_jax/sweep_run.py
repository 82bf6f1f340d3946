"""Measure the rows of a sweep, training what has to be trained; every piece is kept in the workdir and done once."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokzip_jax import generate, layout, plots, plots_sweep, second_turn, sharding, sweep, voco
from tokzip_jax.bench.timing import Case, interleave, spread
from tokzip_jax.checkpoint import finished
from tokzip_jax.config import MethodConfig, ModelConfig, RunConfig
from tokzip_jax.evals import shared, table
from tokzip_jax.evals.runner import Runner
from tokzip_jax.evals.shared import Memory, SharedRunner
from tokzip_jax.metrics import MetricWriter, say
from tokzip_jax.study import POLL, Study, rates
from tokzip_jax.sweep import Line, Refused
from tokzip_jax.training import train_all
from tokzip_jax.types import Array, Params, VisualTokens
from tokzip_jax.workdir import Workdir, write_atomically

FOLDER = "methods"  # under eval/
ROUNDS = 5  # of the timing
KEPT_PICTURES = 3  # of the figure of kept tokens
CAPTION = (
    "accuracy: exact match, per cent; % of full = x / {upper}; retention = (x - {lower}) / ({upper} - {lower}).\n"
    "prefill: FLOPs of the language model from a picture's visual tokens to the first token of an answer; prefill ms: "
    "the same measured, the median of {rounds} runs of a batch of {batch} questions divided by {batch}; methods that "
    "give equally many tokens share the program and the number. VoCo's rows are the run's own, read from their cache.\n"
    "Decoder-site methods keep half of the visual tokens; their count is what the last cut leaves."
)
EQUAL = "equal time: trained for as many steps as take the time of stage {name!r}; VoCo's rows were not."


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep in a workdir.

    Attributes:
        cfg, workdir, mesh: of the run.
        lines: its rows.
        base: runner of the run's own rows.
        again: also measure what the workdir holds.
        timed: prefills that were timed by this sweep.
    """

    cfg: RunConfig
    workdir: Workdir
    mesh: Mesh
    lines: list[Line]
    base: SharedRunner
    again: bool = False
    timed: set[str] = dataclasses.field(default_factory=set)

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
        return cls(cfg, workdir, mesh, lines, base, again)

    def runner(self, line: Line) -> SharedRunner:
        """Of a line's model and data; pictures and features are shared."""
        cfg = sweep.run_config(self.cfg, [line])
        return dataclasses.replace(self.base, cfg=cfg, workdir=_part(self.workdir))

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

    def trained(self, lines: Sequence[Line]) -> list[table.RowResult]:
        """The rows of one stage, which is trained at the study's learning rates and seeds where it was not yet."""
        cfg, stage = sweep.run_config(self.cfg, lines), lines[0].row.stage
        part = _part(self.workdir, stage)
        split, limit = cfg.study.split, cfg.study.limit
        tested = dataclasses.replace(self.base, cfg=cfg, workdir=part)
        readers: dict[tuple[str, int], Runner] = {(cfg.eval.split, cfg.eval.limit): tested}
        if len(rates(cfg, stage)) > 1 and (split, limit) not in readers:
            measured = dataclasses.replace(cfg.eval, split=split, limit=limit)
            readers[split, limit] = SharedRunner.create(dataclasses.replace(cfg, eval=measured), part, self.mesh)
        study = Study(cfg, part, self.mesh, readers)
        with MetricWriter(self.workdir.root) as writer:
            train_all(study, writer)
        rows = [study.row(line.name, again=self.again) for line in lines]
        study.write_record()
        notes = ["; ".join(filter(None, (row.note, _note(line)))) for row, line in zip(rows, lines)]
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
        while left:
            # What another process is at comes last: by then it may be done, and is read.
            for stage, found in [*left.items()]:
                with self.workdir.hold(f"sweep {stage}", wait=False) as mine:
                    if mine:
                        say(f"stage {stage}")
                        done |= dict(zip([line.name for line in found], self.trained(found)))
                        del left[stage]
                        yield self.in_order(done)
            if left:
                time.sleep(POLL)

    def in_order(self, done: dict[str, table.RowResult]) -> list[table.RowResult]:
        """Bounds and rows with their ratios and prefill times."""
        cfg = self.cfg
        upper = cfg.rows[cfg.eval.upper].method
        lines = {line.name: line for line in self.lines if line.name in done}
        bounds, own = self.bounds(), self.own()
        # What a question that picks its own number of tokens takes is no single time.
        untimed = [*bounds[:-1], *(row for row in own if cfg.rows[row.method].auto.ladder)]
        own = [row for row in own if row not in untimed]
        methods = [(cfg.model, upper), *((cfg.model, cfg.rows[row.method].method) for row in own)]
        times = self.prefill([*methods, *((line.model, line.row.method) for line in lines.values())])
        rows = [bounds[-1], *own, *(done[name] for name in lines)]
        rows = [dataclasses.replace(row, prefill_ms=ms) for row, ms in zip(rows, times, strict=True)]
        return table.with_bounds([*untimed, *rows], upper=cfg.eval.upper, lower=cfg.eval.lower)

    def prefill(self, methods: Sequence[tuple[ModelConfig, MethodConfig]]) -> list[float]:
        """Milliseconds a question, the median of runs in turns; kept in the workdir, measured where one is missing."""
        with self.workdir.hold("times of prefills"):
            return self._prefill(methods)

    def _prefill(self, methods: Sequence[tuple[ModelConfig, MethodConfig]]) -> list[float]:
        path = _part(self.workdir).eval / "prefill.json"
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        wanted = {_program(model, method): method for model, method in methods}
        if any(name not in kept or (self.again and name not in self.timed) for name in wanted):
            kept |= self._time(wanted)
            self.timed.update(wanted)
            if jax.process_index() == 0:
                write_atomically(path, json.dumps(kept, indent=2) + "\n")
        return [kept[_program(model, method)] for model, method in methods]

    def _time(self, wanted: dict[str, MethodConfig]) -> dict[str, float]:
        say(f"timing {len(wanted)} prefills")
        cfg = dataclasses.replace(self.cfg, data=dataclasses.replace(self.cfg.data, questions=1))
        runner = dataclasses.replace(self.base, cfg=cfg)
        row = cfg.rows[cfg.eval.upper]
        params, batch = runner.load(row), runner.rows()[0]
        everything = runner.encode(params, row.method, batch, jax.random.key(0))
        asked = (batch["sample"] > 0) & ~batch["supervised"]
        prompt = {name: np.where(asked, batch[name], 0) for name in shared.TEXT}
        prompt = sharding.place(self.mesh, prompt, "data")
        cases = {}
        for name, method in wanted.items():
            if method.voco_mask != "visible":
                cases[name] = Case(self._from_cache(params, batch, method))
                continue
            tokens = _slots(everything, int(name.split()[0]))
            run = functools.partial(_first_logits, cfg.model, shared.reading(method))
            cases[name] = Case(functools.partial(run, shared.language_model(params), prompt, tokens))
        shared.side_by_side(self.mesh, lambda case: jax.block_until_ready(case.function()), cases.values())  # compiles
        seconds = interleave(cases, runs=ROUNDS)
        return {name: 1000 * spread(values)["median"] / len(batch["example"]) for name, values in seconds.items()}

    def _from_cache(self, params: Params, batch: dict[str, np.ndarray], method: MethodConfig) -> Callable[[], Array]:
        """Stage two of VoCo tokens: the questions of a batch, read from the cache of its pictures."""
        model, images = self.cfg.model, self.base.memory.images[np.maximum(batch["example"], 0)]
        given = {**{name: batch[name] for name in shared.TEXT}, "images": images}
        ids, asked = layout.question(given, batch["ids"].shape[1])
        ids = ids[:, : int(asked.sum(axis=1).max())]
        given = sharding.place(self.mesh, given, "data")
        build = functools.partial(voco.build, model, method=method, positions="compact")
        cache = jax.jit(lambda params, batch: build(params, batch))(params, given)
        return functools.partial(_first_logits_of_cache, model, shared.language_model(params), cache, ids)


def _part(workdir: Workdir, stage: str = "") -> Workdir:
    """The run's workdir with a folder for the results of the sweep, or for those of one of its stages."""
    return Workdir(workdir.root, f"{FOLDER}/{stage}" if stage else FOLDER)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_logits(
    cfg: ModelConfig, method: MethodConfig, params: Params, batch: dict[str, Array], visual: VisualTokens
) -> Array:
    return generate.prefill(cfg, params, batch, method, max_new=1, visual=visual).logits_BV


@functools.partial(jax.jit, static_argnums=0)
def _first_logits_of_cache(cfg: ModelConfig, params: Params, cache: voco.VocoCache, ids_BT: Array) -> Array:
    return voco.ask(cfg, params, cache, ids_BT, max_new=1).logits_BV


def _slots(tokens: VisualTokens, count: int) -> VisualTokens:
    """The first `count` of a picture's tokens, or zeros behind them: the time does not depend on which they are."""
    if count > tokens.valid_BM.shape[1]:
        return dataclasses.replace(shared.pad(tokens, count), valid_BM=np.ones((len(tokens.valid_BM), count), bool))
    names = ("tokens_BMD", "valid_BM", "position_BM", "size_BM")
    return dataclasses.replace(tokens, **{name: getattr(tokens, name)[:, :count] for name in names})


def _program(model: ModelConfig, method: MethodConfig) -> str:
    """What a prefill depends on: the visual tokens that enter, and the decoder site; or the VoCo tokens in a cache."""
    if method.voco_mask != "visible":
        return f"{method.voco} VoCo tokens, {method.voco_mask}"
    count = sweep.vlm.visual_slots(model, dataclasses.replace(method, **shared.NO_DECODER))
    cuts = f" {method.decoder} {method.decoder_layers} {method.decoder_keep}" if method.decoder != "none" else ""
    return f"{count} tokens{cuts}{' biased' if method.attention_bias else ''}"


def _note(line: Line) -> str:
    method = line.row.method
    notes = [f"{method.pool} pooling"] if method.factor else []
    notes += ["one training for all budgets"] if line.training and line.training.method.draw_budget else []
    notes += ["trained with one question a row"] if line.alone else []
    return "; ".join(notes)


def make(
    cfg: RunConfig,
    workdir: Workdir,
    mesh: Mesh,
    asked: Sequence[str],
    budgets: Sequence[int],
    *,
    again: bool = False,
    second: bool = False,
) -> str:
    """A whole sweep: its table as text; `eval/methods/` and two figures.

    Args:
        cfg, workdir, mesh: of the run; call this with the mesh set.
        asked, budgets: see `sweep.plan`.
        again: also measure what the workdir holds already.
        second: also the table of second turns, see `second_turn`.

    Raises:
        ValueError: as `sweep.plan`.
        FileNotFoundError: the stage of the upper bound was not trained to its end.
    """
    start = time.perf_counter()
    lines, refused = sweep.plan(cfg, asked, budgets)
    work = Sweep.create(cfg, workdir, mesh, lines, again=again)
    text = ""
    for rows in work.rows():
        with workdir.hold("table of methods"):
            text = _write(work, rows, refused)
    with workdir.hold("table of methods"):
        draw(work, rows, budgets)
    if second:
        text += f"\n\n{second_turn.make(work, _part(workdir).eval)}"
    taken = time.perf_counter() - start
    return f"{text}\n{taken:.0f} s; written to {_part(workdir).eval} and {workdir.figures}"


def _write(work: Sweep, rows: list[table.RowResult], refused: list[Refused]) -> str:
    cfg, folder = work.cfg, _part(work.workdir).eval
    caption = CAPTION.format(
        upper=cfg.eval.upper, lower=cfg.eval.lower, rounds=ROUNDS, batch=len(work.base.rows()[0]["example"])
    )
    if any(line.training for line in work.lines):
        caption += "\n" + EQUAL.format(name=sweep.template(cfg))
    cannot = "\n".join(f"{line.method} {line.tokens}: {line.reason}" for line in refused)
    if jax.process_index() == 0:
        table.write(rows, folder)
        found: list[dict[str, Any]] = [dataclasses.asdict(line) for line in refused]
        write_atomically(folder / "refused.json", json.dumps(found, indent=2) + "\n")
    return f"{table.text_table(rows)}\n\n{caption}" + (f"\n\nBudgets that cannot be:\n{cannot}" if cannot else "")


def draw(work: Sweep, rows: list[table.RowResult], budgets: Sequence[int]) -> None:
    """`figures/methods.png`, and `figures/methods_kept.png` of the selecting methods at the second largest budget."""
    figures, cfg = work.workdir.figures, work.cfg
    budget = sorted(set(budgets))[-2:][0]
    chosen = [line for line in work.lines if line.tokens == budget and line.row.method.encoder != "none"]
    panels, pictures = [], cfg.eval.pictures
    for line in chosen if pictures else []:
        runner = work.runner(line)
        batch = runner.rows()[0]
        tokens = runner.encode(runner.load(line.row), line.row.method, batch, jax.random.key(line.row.method.seed))
        panels.append((line.method, jax.device_get(_replicated(tokens, work.mesh)), batch["example"]))
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


def _replicated(tokens: VisualTokens, mesh: Mesh) -> VisualTokens:
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=everywhere)(tokens)
