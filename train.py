"""Train the stages of a recipe, then measure its table.

    python train.py --config=configs/quickstart.py --workdir=DIR [--config.stages.base.steps=100 ...]

The same command again goes on where a killed run was. Everything is written to DIR: `config.json`, `environment.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/`, `eval/`, `figures/`.
"""

import math
import sys

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from tokzip_jax import environment, recipe, report, sharding
from tokzip_jax.checkpoint import Checkpointer, finished
from tokzip_jax.config import RunConfig
from tokzip_jax.config_check import stage_order, validate
from tokzip_jax.config_io import from_config_dict
from tokzip_jax.data import pipeline
from tokzip_jax.metrics import MetricWriter, Pending, Progress
from tokzip_jax.workdir import Workdir

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same one again resumes.")
flags.mark_flags_as_required(["config", "workdir"])


class NotFinite(Exception):
    """The loss is NaN or infinite."""


def train_stage(cfg: RunConfig, name: str, mesh: Mesh, workdir: Workdir, writer: MetricWriter) -> None:
    """Train one stage to its end, from its latest checkpoint if there is one.

    Raises:
        NotFinite: after the metrics are written; the last good checkpoint is kept.
    """
    stage = recipe.prepare(cfg, name, mesh, workdir)
    steps, hosts = stage.cfg.steps, jax.process_count()
    data = pipeline.train_iterator(
        cfg.data,
        workdir.load_tokenizer(cfg.data),
        image_size=cfg.model.vit.image_size,
        batch_size=stage.cfg.batch_size // hosts,
        seed=cfg.seed,
        process_index=jax.process_index(),
        process_count=hosts,
    )
    info = {"stage": name, **environment.versions()}
    with Checkpointer(workdir.checkpoints(name), every=cfg.checkpoint_every, info=info) as saved:
        done, state = (0, stage.begin()) if saved.latest is None else saved.restore(stage.abstract, data)
        writer.rewind(name, done)
        with Progress(name, done, steps) as progress:

            def arrived(number: int, metrics: dict[str, float]) -> None:
                if number % cfg.log_every == 0 or number == steps or not math.isfinite(metrics["loss"]):
                    rate = float(stage.schedule(number - 1))
                    writer.write(name, number, {**metrics, "learning_rate": rate, **progress.rates()})
                if not math.isfinite(metrics["loss"]):
                    raise NotFinite(
                        f"stage {name!r}, step {number}: the loss is {metrics['loss']}; its metrics are in "
                        f"metrics.jsonl and the last good checkpoint is step {saved.latest}: resume with a lower "
                        f"learning rate in a new workdir, or look at the data of that step"
                    )
                progress.update(number, metrics)

            pending = Pending(arrived)
            for number in range(done, steps):
                batch = sharding.shard_batch(mesh, next(data))
                count = jax.device_put(np.int32(recipe.voco_count(stage.cfg, number)))
                state, metrics = stage.run_step(state, batch, stage.teacher, count)
                pending.push(number + 1, metrics)
                if (number + 1) % cfg.checkpoint_every == 0 or number + 1 == steps:
                    pending.flush()  # nothing is saved before its loss was seen to be finite
                    saved.save(number + 1, state, data, force=True)
        saved.finish(steps)


def run(cfg: RunConfig, workdir: Workdir) -> None:
    """A whole run: every stage, then every row."""
    validate(cfg)
    environment.require_platform(cfg.platform)
    mesh = sharding.make_mesh(cfg.mesh)
    for name, stage in cfg.stages.items():
        sharding.check_batch(mesh, stage.batch_size, f"stages.{name}.batch_size")
    sharding.check_batch(mesh, cfg.eval.batch_size, "eval.batch_size")
    environment.setup_compile_cache(cfg.compile_cache)
    pipeline.check(cfg.data)
    workdir.open(cfg)
    workdir.append_json("environment.json", environment.describe(cfg.seed))
    print(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})", flush=True)
    with jax.set_mesh(mesh), MetricWriter(workdir.root) as writer:
        for name in stage_order(cfg):
            if finished(workdir.checkpoints(name)) is None:
                train_stage(cfg, name, mesh, workdir, writer)
        if cfg.rows:
            print(report.make(cfg, workdir, mesh), flush=True)


def main(argv: list[str]) -> None:
    """The command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    sharding.initialize_distributed()
    try:
        run(from_config_dict(CONFIG.value), Workdir(WORKDIR.value))
    except (ValueError, FileNotFoundError, ModuleNotFoundError, NotFinite) as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
