"""How long a step of each stage takes, so that methods can be compared after equal training time."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from tokzip_jax import recipe, sharding
from tokzip_jax.config import RunConfig
from tokzip_jax.data import clips, pipeline
from tokzip_jax.metrics import say
from tokzip_jax.workdir import Workdir

ROUNDS = 6  # stage after stage in each
STEPS = 4  # timed at a time
WARM = 2  # steps before the first timed one of a program


def measure(stages: Mapping[str, RunConfig], workdir: Workdir, mesh: Mesh) -> dict[str, float]:
    """Seconds of a step of the stages, by name: the median over `ROUNDS` rounds, without compilation.

    They are measured in turns, so that what else the machine does hits all alike.

    Args:
        stages: name -> the config that the stage is part of; what each begins from has to be trained.
        workdir, mesh: of the run.

    Raises:
        FileNotFoundError: a stage's checkpoint to begin from is not there.
    """
    say(f"timing a step of {len(stages)} stages")
    batches: dict[Any, Any] = {}
    runs = [TimedStage(cfg, name, workdir, mesh, batches) for name, cfg in stages.items()]
    for run in runs:
        run.warm_up()
    seconds = [[run.steps(turn) for run in runs] for turn in range(ROUNDS)]
    return {run.name: statistics.median(column) for run, column in zip(runs, zip(*seconds))}


class TimedStage:
    """A stage that takes a few steps whenever it is asked to; what it learns is thrown away.

    Args:
        cfg, name: which.
        workdir, mesh: of the run.
        batches: where stages that read the same data find the batch that they share.
    """

    def __init__(self, cfg: RunConfig, name: str, workdir: Workdir, mesh: Mesh, batches: dict[Any, Any]) -> None:
        self.name, self._mesh = name, mesh
        self._stage = recipe.prepare(cfg, name, mesh, workdir)
        share, shares = sharding.data_share(mesh)
        data = clips.reading(cfg.data, self._stage.cfg.frame_order)
        sizes = {"image_size": cfg.model.vit.image_size, "batch_size": self._stage.cfg.batch_size // shares}
        key = (data, *sizes.values())
        if key not in batches:
            options = {**sizes, "seed": cfg.seed, "process_index": share, "process_count": shares}
            read = pipeline.train_iterator(data, workdir.load_tokenizer(cfg.data), **options)
            batches[key] = sharding.shard_batch(mesh, next(read))
        # One for all: what attention leaves out depends on where the questions of a row begin and end.
        self._batch = batches[key]
        self._state = self._stage.begin()

    def _number(self, turn: int) -> int:
        """A step of each round's share of the stage: under a schedule a step's cost depends on its number."""
        return self._stage.cfg.steps * turn // ROUNDS

    def _run(self, number: int) -> None:
        run_step, given = self._stage.at(number)
        self._state, _ = run_step(self._state, self._batch, self._stage.teacher, sharding.place(self._mesh, given))

    def warm_up(self) -> None:
        """Compile every program that will be timed."""
        for turn in range(ROUNDS):
            for _ in range(WARM if turn == 0 else 1):
                self._run(self._number(turn))
        jax.block_until_ready(self._state)

    def steps(self, turn: int) -> float:
        """Seconds of a step, the mean of `STEPS` ones."""
        begin = time.perf_counter()
        for _ in range(STEPS):
            self._run(self._number(turn))
        jax.block_until_ready(self._state)
        return (time.perf_counter() - begin) / STEPS
