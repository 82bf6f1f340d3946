"""Measure the rows of a run's table, each once: a finished row is kept in the workdir and not measured again."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokzip_jax import checkpoint, config_io, flops, sharding, step, vlm
from tokzip_jax.config import MethodConfig, ModelConfig, RowConfig, RunConfig
from tokzip_jax.data import pipeline, sources
from tokzip_jax.evals import scoring, table
from tokzip_jax.types import Array, Params
from tokzip_jax.workdir import Workdir, write_atomically

MODEL_INPUTS = ("images", "ids", "thread", "sample", "supervised")


def load_stage(cfg: RunConfig, workdir: Workdir, mesh: Mesh, stage: str) -> Params:
    """The parameters that a stage ended with.

    Raises:
        FileNotFoundError: the stage was not trained to its end.
    """
    directory = workdir.checkpoints(stage)
    if checkpoint.finished(directory) is None:
        raise FileNotFoundError(f"stage {stage!r} has no finished checkpoint in {directory}: run train.py to its end")
    projector = cfg.stages[stage].method.projector
    abstract = jax.eval_shape(lambda key: vlm.init(cfg.model, projector, key), jax.random.key(0))
    return checkpoint.load_params(directory, sharding.abstract_like(mesh, abstract))


@functools.lru_cache(maxsize=64)
def _scorer(
    cfg: ModelConfig, method: MethodConfig, questions: int, max_targets: int, mesh: Mesh
) -> Callable[..., Array]:
    # Replicated results can be read on every host.
    return jax.jit(
        lambda params, batch, visible, count, key: step.score_step(
            cfg,
            method,
            params,
            batch,
            table=visible,
            voco_count=count,
            key=key,
            questions=questions,
            max_targets=max_targets,
        ),
        out_shardings=NamedSharding(mesh, P()),
    )


@dataclasses.dataclass(frozen=True)
class Runner:
    """Everything that scoring needs.

    Attributes:
        cfg, workdir, mesh: of the run.
        tokenizer: of the run.
        examples: of the split that is measured, without pictures.
    """

    cfg: RunConfig
    workdir: Workdir
    mesh: Mesh
    tokenizer: object
    examples: list[dict]

    @classmethod
    def create(cls, cfg: RunConfig, workdir: Workdir, mesh: Mesh) -> "Runner":
        """Open the split that the config names."""
        source = sources.load(cfg.data, cfg.eval.split)
        count = min(len(source), cfg.eval.limit or len(source))
        examples = [source.text(i) for i in range(count)]
        return cls(cfg, workdir, mesh, workdir.load_tokenizer(cfg.data), examples)

    @functools.cached_property
    def question_tokens(self) -> int:
        """The mean length of a question, rounded: the text length behind the table's FLOPs."""
        texts = [question for example in self.examples for question in example["questions"]]
        return round(np.mean([len(line.ids) for line in self.tokenizer.encode_batch(texts)]))

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The eval rows."""
        cfg = self.cfg
        return pipeline.eval_batches(
            cfg.data,
            self.tokenizer,
            split=cfg.eval.split,
            image_size=cfg.model.vit.image_size,
            batch_size=cfg.eval.batch_size,
            limit=cfg.eval.limit,
        )

    def score(self, params: Params, method: MethodConfig, seed: int) -> scoring.Score:
        """Accuracy of one method with one set of parameters on the whole split."""
        slots = max([method.voco, *(s.method.voco for s in self.cfg.stages.values())])
        # What can be an argument is one, so that rows which differ in mask, VoCo count or seed share a program.
        static = dataclasses.replace(method, voco=slots, voco_mask="visible", seed=0)
        visible, count = step.mask_table(method), jnp.int32(method.voco)
        key = jax.random.key(seed)
        tally = scoring.Tally()
        for batch in self.batches():
            # Every host holds the same rows; each device takes its part.
            inputs = jax.device_put({n: batch[n] for n in MODEL_INPUTS}, NamedSharding(self.mesh, P("data")))
            max_targets = batch["supervised"].shape[1]
            run = _scorer(self.cfg.model, static, batch["question"].shape[1], max_targets, self.mesh)
            right = np.asarray(run(params, inputs, visible, count, key))
            for row, example in enumerate(batch["example"]):
                for thread, question in enumerate(batch["question"][row]):
                    if example >= 0 and question >= 0:
                        tally.add(self.examples[example]["types"][question], bool(right[row, thread]))
        return tally.score()

    def prior(self) -> scoring.Score:
        """The question-only prior of the training split."""
        source = sources.load(self.cfg.data, "train")
        train = (source.text(i) for i in range(len(source)))
        return scoring.question_only_prior(train, self.examples)

    def measure(self, name: str, row: RowConfig) -> table.RowResult:
        """One row of the table, without its ratios to the bounds."""
        if not row.stage:
            return _result(name, None, self.prior())
        params = load_stage(self.cfg, self.workdir, self.mesh, row.stage)
        costs = flops.ledger(self.cfg.model, row.method, text_tokens=self.question_tokens)
        seeds = range(row.method.seed, row.method.seed + row.seeds)
        results = [_result(name, costs, self.score(params, row.method, seed)) for seed in seeds]
        return table.mean_over_seeds(results)

    def cached(self, name: str, row: RowConfig) -> table.RowResult:
        """`measure`, unless the workdir holds the row already."""
        path = self.workdir.eval / "rows" / f"{name}.json"
        origin = {"row": json.loads(config_io.to_json(row)), "eval": json.loads(config_io.to_json(self.cfg.eval))}
        for free in ("order", "pictures", "batch_size"):
            origin["eval"].pop(free)
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["origin"] == origin:
                return table.RowResult(**kept["result"])
        result = self.measure(name, row)
        logging.info("%s: accuracy %.4f", name, result.accuracy)
        write_atomically(path, json.dumps({"origin": origin, "result": dataclasses.asdict(result)}, indent=2))
        return result

    def run(self) -> list[table.RowResult]:
        """All rows, in the table's order, with their ratios; also written to the workdir."""
        cfg = self.cfg
        names = [*cfg.eval.order, *(name for name in cfg.rows if name not in cfg.eval.order)]
        rows = [self.cached(name, cfg.rows[name]) for name in names]
        rows = table.with_bounds(rows, upper=cfg.eval.upper, lower=cfg.eval.lower)
        if jax.process_index() == 0:
            table.write(rows, pathlib.Path(self.workdir.eval))
        return rows


def _result(name: str, costs: flops.Ledger | None, score: scoring.Score) -> table.RowResult:
    return table.RowResult(
        method=name,
        visual_tokens=costs.read_tokens if costs else 0,
        accuracy=score.accuracy,
        accuracy_by_type=score.by_type,
        accuracy_not_yes_no=score.not_yes_no,
        kv_bytes=costs.kv_bytes if costs else None,
        prefill_flops=costs.prefill_flops if costs else None,
    )
