"""Train the stages of a recipe, then measure its table.

    python train.py --config=configs/quickstart.py --workdir=DIR [--config.stages.base.steps=100 ...]

The same command again goes on where a killed run was. Everything is written to DIR: `config.json`, `environment.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/`, `eval/`, `figures/`. On several hosts every one runs this command, and
DIR is on a file system that they share. On one machine the command may be given several times at once, say once for
each of its devices: of the trainings and rows of a study each process takes those that no other one has taken.
"""

import jax
from absl import flags
from ml_collections import config_flags

from tokzip_jax import entry, environment, recipe, report
from tokzip_jax.config import RunConfig
from tokzip_jax.config_io import from_config_dict
from tokzip_jax.data import sources, tokenizer
from tokzip_jax.evals.runner import Runner
from tokzip_jax.metrics import MetricWriter, say
from tokzip_jax.study import Study
from tokzip_jax.training import train_all
from tokzip_jax.workdir import Workdir


def run(cfg: RunConfig, workdir: Workdir) -> None:
    """A whole run: every stage, then every row."""
    mesh = entry.start(cfg)
    recipe.check(cfg)
    sources.load(cfg.data, "train")
    if cfg.rows:
        sources.load(cfg.data, cfg.eval.split)
    if len(cfg.study.learning_rates) > 1 and cfg.study.stages:
        sources.load(cfg.data, cfg.study.split)
    with workdir.hold("config and tokenizer"):
        workdir.open(cfg)
        tokenizer.check(workdir.load_tokenizer(cfg.data), cfg.model.llm.vocab_size)
    workdir.append_json("environment.json", environment.describe(cfg.seed))
    say(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})")
    with jax.set_mesh(mesh), MetricWriter(workdir.root) as writer:
        train_all(Study(cfg, workdir, mesh), writer)
        if cfg.rows:
            with workdir.hold("report"):
                say(report.make(Runner.create(cfg, workdir, mesh)))


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, "A file of configs/.", lock_config=False, accept_new_attributes=True
    )
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the same one again resumes.")
    flags.mark_flags_as_required(["config", "workdir"])
    entry.main(lambda: run(from_config_dict(CONFIG.value), Workdir(WORKDIR.value)))
