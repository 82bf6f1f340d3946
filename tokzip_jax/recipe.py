"""How a stage of a recipe begins: its parameters, its optimiser and, for a KL term, its teacher."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh

from tokzip_jax import checkpoint, optim, sharding, step, vlm
from tokzip_jax.config import RunConfig, StageConfig
from tokzip_jax.paths import flatten
from tokzip_jax.step import TrainState
from tokzip_jax.types import Array, Params
from tokzip_jax.workdir import Workdir

# What an earlier checkpoint need not hold: it is made fresh, and the log says so.
FRESH = ("projector/.*", "voco/.*", "contrast/.*")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, ready to train.

    Attributes:
        name, cfg: which.
        run_step: jitted (state, batch, teacher, VoCo count) -> (state, metrics); the state is donated.
        abstract: the state's shapes and shardings, for restoring.
        begin: makes the state of step 0.
        teacher: frozen parameters for the KL term, or None.
        schedule: learning rate of a step.
    """

    name: str
    cfg: StageConfig
    run_step: Callable[..., tuple[TrainState, dict[str, Array]]]
    abstract: TrainState
    begin: Callable[[], TrainState]
    teacher: Params | None
    schedule: optax.Schedule


def _source(workdir: Workdir, cfg: RunConfig, origin: str) -> str:
    return workdir.checkpoints(origin) if origin in cfg.stages else origin


def _initial_params(cfg: RunConfig, stage: StageConfig, mesh: Mesh, workdir: Workdir, key: Array) -> Params:
    fresh = sharding.sharded_init(lambda key: vlm.init(cfg.model, stage.method.projector, key), mesh, key)
    if not stage.init_from:
        return fresh
    params = checkpoint.load_params(_source(workdir, cfg, stage.init_from), fresh, fresh=FRESH)
    new = sorted(path for path, leaf in flatten(params).items() if leaf is flatten(fresh)[path])
    if new:
        logging.info("not in %s and made fresh: %s", stage.init_from, ", ".join(new))
    return params


def _teacher(cfg: RunConfig, stage: StageConfig, mesh: Mesh, workdir: Workdir) -> Params | None:
    if stage.loss.kl == 0:
        return None
    projector = cfg.stages[stage.init_from].method.projector if stage.init_from in cfg.stages else "mlp2x_gelu"
    abstract = jax.eval_shape(lambda key: vlm.init(cfg.model, projector, key), jax.random.key(0))
    params = sharding.abstract_like(mesh, abstract)
    return checkpoint.load_params(_source(workdir, cfg, stage.init_from), params)


def prepare(cfg: RunConfig, name: str, mesh: Mesh, workdir: Workdir) -> Stage:
    """Everything of a stage but its data.

    Raises:
        ValueError: a train pattern without a parameter, or a checkpoint of another model to start from.
    """
    stage = cfg.stages[name]
    # One key a stage, whatever the order in which stages run.
    key = jax.random.fold_in(jax.random.key(cfg.seed), sum(map(ord, name)))
    init_key, step_key = jax.random.split(key)
    shapes = jax.eval_shape(lambda key: vlm.init(cfg.model, stage.method.projector, key), init_key)
    tx, schedule = optim.make_optimizer(stage.optim, stage.steps, shapes, stage.train)

    def state(params: Params) -> TrainState:
        trained, _ = step.partition(params, stage.train)
        return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(trained))

    abstract = sharding.abstract_like(mesh, jax.eval_shape(state, shapes))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def begin() -> TrainState:
        params = _initial_params(cfg, stage, mesh, workdir, init_key)
        return jax.jit(state, out_shardings=shardings, donate_argnums=0)(params)

    def run_step(current: TrainState, batch: dict[str, Array], teacher: Params | None, voco_count: Array) -> Any:
        return step.train_step(
            cfg.model,
            stage,
            tx,
            current,
            batch,
            teacher=teacher,
            voco_count=voco_count,
            key=step_key,
            max_targets=cfg.data.targets or cfg.data.text_length,
        )

    jitted = jax.jit(run_step, donate_argnums=0, out_shardings=(shardings, None))
    return Stage(name, stage, jitted, abstract, begin, _teacher(cfg, stage, mesh, workdir), schedule)


def voco_count(stage: StageConfig, number: int) -> int:
    """VoCo tokens in use in step `number` (from 0): the stage's counts in turn."""
    return stage.voco_counts[number % len(stage.voco_counts)] if stage.voco_counts else stage.method.voco
