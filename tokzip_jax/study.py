"""A study: stages trained at several learning rates, seeds and lengths, so that a table compares methods and not luck.

The stages that `StudyConfig.stages` names are each trained at every learning rate with the first seed; the one whose
rows answer the validation split best is kept, and trained with the other seeds. With `equal_time` every stage is also
trained for as many steps as take the time of that stage. All start from the same checkpoint, which is trained once.

Every training is a stage of its own with a checkpoint of its own, and every measured row is kept in the workdir, so a
study that was killed goes on where it was. Several processes may work in one workdir: each takes the trainings that no
other one has taken, and they wait for one another only where one has to know what the others found.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tokzip_jax import sharding, step_times
from tokzip_jax.checkpoint import finished
from tokzip_jax.config import RowConfig, RunConfig, StageConfig
from tokzip_jax.config_check import deciding, stage_order
from tokzip_jax.evals import table
from tokzip_jax.evals.runner import Runner
from tokzip_jax.locks import POLL
from tokzip_jax.workdir import Workdir, write_atomically

TIMES = "step_times.json"
RECORD = "study.json"
DIVERGED = "diverged.json"
EDGE = "the best rate is at the edge of those tried"
SAME = 0.1  # lengths of trainings that differ by no more than this share take equally long: so exact is no timing


@dataclasses.dataclass(frozen=True)
class Variant:
    """One training of a studied stage.

    Attributes:
        stage: its name in the config.
        rate: learning rate.
        seed: added to the run's.
        steps: how many, where that differs from the stage's own (equal time); 0 = the stage's own.
    """

    stage: str
    rate: float
    seed: int
    steps: int = 0

    @property
    def name(self) -> str:
        """What the training and its checkpoints are called."""
        return f"{self.stage}-lr{self.rate:g}-seed{self.seed}" + (f"-steps{self.steps}" if self.steps else "")

    def config(self, stage: StageConfig) -> StageConfig:
        """The stage as it is trained here; a warm-up that is longer than the training ends with it."""
        steps = self.steps or stage.steps
        optim = dataclasses.replace(
            stage.optim, learning_rate=self.rate, warmup_steps=min(stage.optim.warmup_steps, steps)
        )
        # Trainings of one seed draw the same first parameters, whatever their rate and length.
        drawn = stage.drawn_as or self.stage
        return dataclasses.replace(stage, steps=steps, seed=stage.seed + self.seed, drawn_as=drawn, optim=optim)


def rates(cfg: RunConfig, stage: str) -> tuple[float, ...]:
    """The learning rates that a stage is tried at."""
    return cfg.study.learning_rates or (cfg.stages[stage].optim.learning_rate,)


def with_variant(cfg: RunConfig, variant: Variant, split: str = "", limit: int = 0) -> RunConfig:
    """The config with a stage for a variant, and the rows of its stage read from it.

    Args:
        cfg: of the study.
        variant: what is trained.
        split, limit: what the rows are measured on; "" = as `eval` says.
    """
    rows = {
        row_name(name, variant, split): dataclasses.replace(row, stage=variant.name)
        for name, row in cfg.rows.items()
        if row.stage == variant.stage
    }
    measured = dataclasses.replace(cfg.eval, split=split, limit=limit) if split else cfg.eval
    return dataclasses.replace(
        cfg,
        stages={**cfg.stages, variant.name: variant.config(cfg.stages[variant.stage])},
        rows={**cfg.rows, **rows},
        eval=measured,
    )


def row_name(name: str, variant: Variant, split: str = "") -> str:
    """What the row `name` of a variant is called among the measured ones."""
    return f"{name} {variant.name}{f' {split}' if split else ''}"


@dataclasses.dataclass
class Study:
    """A study in a workdir.

    Attributes:
        cfg, workdir, mesh: of the run.
        readers: the runner of each split and limit; made when first asked for.
        timed_in: configs of stages whose step is not timed as part of `cfg`.
    """

    cfg: RunConfig
    workdir: Workdir
    mesh: Mesh
    readers: dict[tuple[str, int], Runner] = dataclasses.field(default_factory=dict)
    timed_in: Mapping[str, RunConfig] = dataclasses.field(default_factory=dict)

    def trainings(self) -> Iterator[tuple[RunConfig, str]]:
        """What has to be trained, in order: (config, its stage). Train each one before asking for the next, which may
        depend on it; what is finished already is not in it.

        Yields:
            The study's config with the stage in it, and the name of the stage.
        """
        cfg = self.cfg
        # A stage that only says how long a training takes is none of this study.
        once = [name for name in stage_order(cfg) if name not in (*cfg.study.stages, cfg.study.equal_time)]
        origins = {stage.init_from for stage in cfg.stages.values()}
        for name in once:
            if name in origins:
                yield from self._shared({name: cfg})
        # Where there is one rate, nothing has to be chosen before the other seeds are trained.
        several = [name for name in cfg.study.stages if len(rates(cfg, name)) > 1]
        yield from self._all([variant for name in several for variant in self.searched(name)])
        for variants in (self.repeated, *([self.timed] if cfg.study.equal_time else [])):
            yield from self._all([variant for name in cfg.study.stages for variant in variants(name)])
        # From these nothing begins: no process has to wait for one, and all are shared out.
        yield from self._shared({name: cfg for name in once if name not in origins})

    def _all(self, variants: list[Variant]) -> Iterator[tuple[RunConfig, str]]:
        """Those variants that are not trained yet; each is measured by the process that has trained it."""
        named = {variant.name: variant for variant in variants}
        for cfg, name in self._shared({name: with_variant(self.cfg, variant) for name, variant in named.items()}):
            yield cfg, name
            if name not in self.diverged():
                self._measure(named[name])

    def _shared(self, wanted: dict[str, RunConfig]) -> Iterator[tuple[RunConfig, str]]:
        """The trainings that no other process in this workdir has taken; ends when all of them are finished.

        Raises:
            RuntimeError: the caller asks for the next one and has not trained the last one.
        """
        while left := [name for name in wanted if self._unfinished(name)]:
            idle = True
            for name in left:
                with self.workdir.hold(f"training {name}", wait=False) as mine:
                    if mine and self._unfinished(name):
                        idle = False
                        yield wanted[name], name
                        if self._unfinished(name):
                            raise RuntimeError(f"training {name!r} must be finished before the next one is asked for")
            if idle:
                time.sleep(POLL)

    def _unfinished(self, name: str) -> bool:
        return finished(self.workdir.checkpoints(name)) is None and name not in self.diverged()

    def _measure(self, variant: Variant) -> None:
        """Measure the rows of a variant that will be read, while other processes train."""
        if len(rates(self.cfg, variant.stage)) > 1 and variant in self.searched(variant.stage):
            self.validated(variant)
        else:
            for name, _ in self._rows_of(variant.stage):
                self.measured(name, variant)

    def diverged(self) -> list[str]:
        """Trainings of a search whose loss was not finite: the search goes on without them."""
        path = self.workdir.eval / DIVERGED
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def give_up(self, name: str) -> bool:
        """Note that a training diverged; False = it was none of a search, and nothing can replace it."""
        studied = self.cfg.study.stages
        tried = [v.name for stage in studied if len(rates(self.cfg, stage)) > 1 for v in self.searched(stage)]
        if name not in tried:
            return False
        with self.workdir.hold(DIVERGED):
            names = [*self.diverged(), name]
            sharding.wait_for_all("every process has read which trainings diverged")
            if jax.process_index() == 0:
                write_atomically(self.workdir.eval / DIVERGED, json.dumps(names) + "\n")
        sharding.wait_for_all("the diverged training is noted")
        return True

    def searched(self, stage: str) -> list[Variant]:
        """The trainings that a stage's learning rate is chosen from."""
        return [Variant(stage, rate, self.cfg.study.seeds[0]) for rate in rates(self.cfg, stage)]

    def repeated(self, stage: str) -> list[Variant]:
        """The trainings with every seed at the chosen learning rate, the first seed's among them."""
        return [Variant(stage, self.rate(stage), seed) for seed in self.cfg.study.seeds]

    def timed(self, stage: str) -> list[Variant]:
        """The trainings that take as long as the one of `study.equal_time`.

        No others are made where the repeated ones take that long already, as those of that stage itself do.
        """
        reference, times = self.cfg.study.equal_time, self.step_times()
        steps = max(1, round(self.cfg.stages[reference].steps * times[reference] / times[stage]))
        if abs(steps / self.cfg.stages[stage].steps - 1) <= SAME:
            return self.repeated(stage)
        return [dataclasses.replace(variant, steps=steps) for variant in self.repeated(stage)]

    def rate(self, stage: str) -> float:
        """The learning rate of the most accurate training on the validation split; the first one of equals.

        Raises:
            ValueError: every rate diverged.
        """
        tried = self.searched(stage)
        if len(tried) == 1:
            return tried[0].rate
        gone = self.diverged()
        left = [variant for variant in tried if variant.name not in gone]
        if not left:
            raise ValueError(
                f"stage {stage!r} diverged at every rate of study.learning_rates = {self.cfg.study.learning_rates}: "
                "start again in a new workdir with lower ones"
            )
        return max(left, key=self.validated).rate

    def validated(self, variant: Variant) -> float:
        """Mean accuracy of a variant's rows on the validation split.

        Left out are rows that choose their number of tokens, which follow from the others, and rows that are read in
        another way than the stage trained: what a training did to the model that reads all tokens is not what it was
        for, and shuffled frames say nothing of how well it has learned.
        """
        study = self.cfg.study
        names = deciding(self.cfg, variant.stage)
        scores = [self.measured(name, variant, study.split, study.limit).accuracy for name in names]
        return math.fsum(scores) / len(scores)

    def measured(
        self, name: str, variant: Variant, split: str = "", limit: int = 0, *, again: bool = False
    ) -> table.RowResult:
        """A row of a variant, measured once; `again` measures it anyway."""
        cfg = with_variant(self.cfg, variant, split, limit)
        found = self._reader(cfg).cached(row_name(name, variant, split), again=again)
        return dataclasses.replace(found, method=name)

    def first_reader(self) -> Runner:
        """A runner of the table's rows, those of studied stages read from the first seed's training."""
        return self._reader(self.first())

    def _reader(self, cfg: RunConfig) -> Runner:
        """A runner of a config; the examples of its split are read once."""
        key = (cfg.eval.split, cfg.eval.limit)
        if key not in self.readers:
            self.readers[key] = Runner.create(cfg, self.workdir, self.mesh)
        return dataclasses.replace(self.readers[key], cfg=cfg)

    def _rows_of(self, stage: str) -> list[tuple[str, RowConfig]]:
        return [(name, row) for name, row in self.cfg.rows.items() if row.stage == stage]

    def row(self, name: str, *, again: bool = False) -> table.RowResult:
        """A row of the table; of a studied stage the mean over the seeds, with what `StudyConfig` adds to it."""
        cfg, stage = self.cfg, self.cfg.rows[name].stage
        if stage not in cfg.study.stages:
            return self._reader(cfg).cached(name, again=again)
        seconds = self.step_times()[stage] * cfg.stages[stage].steps
        more = {"learning_rate": self.rate(stage), "train_seconds": seconds}
        if cfg.study.equal_time:
            equal = self._mean(name, self.timed(stage), again)
            more |= {"accuracy_equal_time": equal.accuracy, "spread_equal_time": equal.spread}
        mean = self._mean(name, self.repeated(stage), again)
        tried = rates(cfg, stage)
        if len(tried) > 2 and self.rate(stage) in (min(tried), max(tried)):
            more["note"] = f"{mean.note}; {EDGE}" if mean.note else EDGE
        return dataclasses.replace(mean, **more)

    def _mean(self, name: str, variants: list[Variant], again: bool) -> table.RowResult:
        return table.mean_over_seeds([self.measured(name, variant, again=again) for variant in variants])

    def first(self) -> RunConfig:
        """The config with the rows of studied stages read from the first seed's training: for figures."""
        cfg = self.cfg
        for stage in cfg.study.stages:
            variant = self.repeated(stage)[0]
            stages = {**cfg.stages, variant.name: variant.config(cfg.stages[stage])}
            moved = {name: dataclasses.replace(row, stage=variant.name) for name, row in self._rows_of(stage)}
            cfg = dataclasses.replace(cfg, stages=stages, rows={**cfg.rows, **moved})
        return cfg

    def record(self) -> dict[str, Any]:
        """What `study.json` holds: the seconds of a step, and every training with its settings and accuracies."""
        out = []
        for stage in self.cfg.study.stages:
            searched, repeated = self.searched(stage), self.repeated(stage)
            timed = self.timed(stage) if self.cfg.study.equal_time else []
            for variant in dict.fromkeys([*searched, *repeated, *timed]):
                entry = {**dataclasses.asdict(variant), "steps": variant.steps or self.cfg.stages[stage].steps}
                if variant.name in self.diverged():
                    entry["diverged"] = True
                elif variant in searched and len(searched) > 1:
                    entry["validation"] = self.validated(variant)
                if variant in repeated or variant in timed:
                    entry["test"] = {name: self.measured(name, variant).accuracy for name, _ in self._rows_of(stage)}
                out.append(entry)
        return {"seconds_per_step": self.step_times(), "trainings": out}

    def write_record(self) -> None:
        """`eval/study.json`; every process takes part, process 0 writes."""
        text = json.dumps(self.record(), indent=2) + "\n"
        if jax.process_index() == 0:
            write_atomically(self.workdir.eval / RECORD, text)

    def step_times(self) -> dict[str, float]:
        """Seconds of a step of every studied stage and of that of `study.equal_time` (see `step_times`); measured once
        and kept in the workdir."""
        path = self.workdir.eval / TIMES
        with self.workdir.hold(TIMES):
            if not path.exists():
                study = self.cfg.study
                names = [*dict.fromkeys([*study.stages, *filter(None, [study.equal_time])])]
                stages = {name: self.timed_in.get(name, self.cfg) for name in names}
                times = step_times.measure(stages, self.workdir, self.mesh)
                if jax.process_index() == 0:
                    write_atomically(path, json.dumps(times, indent=2) + "\n")
                # Lengths of trainings follow from these: every process has to read the same ones.
                sharding.wait_for_all("the times of the steps are written")
        return json.loads(path.read_text(encoding="utf-8"))
