"""One stage of a recipe, trained to its end: the loop over steps, with its metrics and checkpoints."""

import math

import jax
from jax.sharding import Mesh

from tokzip_jax import entry, environment, recipe, sharding
from tokzip_jax.checkpoint import Checkpointer
from tokzip_jax.config import RunConfig
from tokzip_jax.data import clips, pipeline
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
        clips.reading(cfg.data, stage.cfg.frame_order),
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


def train_all(study: Study, writer: MetricWriter) -> None:
    """Train every stage of a run, or of a study, that is not finished yet.

    A learning rate of a search at which the loss is not finite is left out of it.

    Raises:
        NotFinite: of any other training.
    """
    for cfg, name in study.trainings():
        try:
            train_stage(cfg, name, study.mesh, study.workdir, writer)
        except entry.NotFinite as error:
            if not study.give_up(name):
                raise
            say(f"{error}\nthe study goes on without this learning rate")


def _not_finite(stage: str, number: int, key: str, value: float, latest: int | None) -> str:
    kept = "there is no checkpoint yet" if latest is None else f"the last good checkpoint is step {latest}"
    return (
        f"stage {stage!r}, step {number}: {key} is {value}; its metrics are in metrics.jsonl and {kept}: start again "
        "in a new workdir with a lower learning rate, or look at the data of that step"
    )
