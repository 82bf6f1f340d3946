"""Train the stages of a recipe, then measure its table.

    python train.py --config=configs/quickstart.py --workdir=DIR [--config.stages.base.steps=100 ...]

The same command again goes on where a killed run was. Everything is written to DIR: `config.json`, `environment.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/`, `eval/`, `figures/`. On several hosts every one runs this command, and
DIR is on a file system that they share.
"""

import math

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from tokzip_jax import entry, environment, recipe, report, sharding
from tokzip_jax.checkpoint import Checkpointer
from tokzip_jax.config import RunConfig
from tokzip_jax.config_io import from_config_dict
from tokzip_jax.data import pipeline, sources
from tokzip_jax.evals.runner import Runner
from tokzip_jax.metrics import MetricWriter, Pending, Progress, say
from tokzip_jax.study import Study
from tokzip_jax.workdir import Workdir


def train_stage(cfg: RunConfig, name: str, mesh: Mesh, workdir: Workdir, writer: MetricWriter) -> None:
    """Train one stage to its end, from its latest checkpoint if there is one.

    Raises:
        NotFinite: after the metrics are written; the last good checkpoint is kept.
    """
    stage = recipe.prepare(cfg, name, mesh, workdir)
    steps = stage.cfg.steps
    share, shares = sharding.data_share(mesh)
    data = pipeline.train_iterator(
        cfg.data,
        workdir.load_tokenizer(cfg.data),
        image_size=cfg.model.vit.image_size,
        batch_size=stage.cfg.batch_size // shares,
        seed=cfg.seed + stage.cfg.seed,
        process_index=share,
        process_count=shares,
    )
    info = {"stage": name, **environment.versions()}
    with Checkpointer(workdir.checkpoints(name), info=info) as saved:
        done, state = (0, stage.begin()) if saved.latest is None else saved.restore(stage.abstract, data)
        writer.rewind(name, done)
        with Progress(name, done, steps) as progress:

            def arrived(number: int, metrics: dict[str, float]) -> None:
                broken = [key for key in ("loss", "grad_norm") if not math.isfinite(metrics[key])]
                if number % cfg.log_every == 0 or number == steps or broken:
                    writer.write(name, number, {**metrics, **progress.rates()})
                if broken:
                    raise entry.NotFinite(_not_finite(name, number, broken[0], metrics[broken[0]], saved.latest))
                progress.update(number, metrics)

            pending = Pending(arrived)
            for number in range(done, steps):
                batch = sharding.shard_batch(mesh, next(data))
                run_step, given = stage.at(number)
                given = sharding.place(mesh, given)
                # All that a step reads is in place by now; a transfer by accident would make the host wait.
                with jax.transfer_guard("disallow"):
                    state, metrics = run_step(state, batch, stage.teacher, given)
                pending.push(number + 1, metrics)
                if (number + 1) % cfg.checkpoint_every == 0 or number + 1 == steps:
                    pending.flush()  # nothing is saved before its loss was seen to be finite
                    saved.save(number + 1, state, data)
        saved.finish(steps)


def _not_finite(stage: str, number: int, key: str, value: float, latest: int | None) -> str:
    kept = "there is no checkpoint yet" if latest is None else f"the last good checkpoint is step {latest}"
    return (
        f"stage {stage!r}, step {number}: {key} is {value}; its metrics are in metrics.jsonl and {kept}: start again "
        "in a new workdir with a lower learning rate, or look at the data of that step"
    )


def run(cfg: RunConfig, workdir: Workdir) -> None:
    """A whole run: every stage, then every row."""
    mesh = entry.start(cfg)
    recipe.check(cfg)
    sources.load(cfg.data, "train")
    workdir.open(cfg)
    workdir.append_json("environment.json", environment.describe(cfg.seed))
    say(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
    with jax.set_mesh(mesh), MetricWriter(workdir.root) as writer:
        for cfg_of_stage, name in Study(cfg, workdir, mesh).trainings():
            train_stage(cfg_of_stage, name, mesh, workdir, writer)
        if cfg.rows:
            say(report.make(Runner.create(cfg, workdir, mesh)))


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, "A file of configs/.", lock_config=False, accept_new_attributes=True
    )
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same one again resumes.")
    flags.mark_flags_as_required(["config", "workdir"])
    entry.main(lambda: run(from_config_dict(CONFIG.value), Workdir(WORKDIR.value)))
