"""Measure the rows of a run's table, each once: a finished row is kept in the workdir and not measured again."""

import dataclasses
import functools
import json
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokzip_jax import config_io, elastic, flops, lora, recipe, sharding, step
from tokzip_jax.checkpoint import absent, finished, load_params
from tokzip_jax.config import AutoConfig, EvalConfig, MethodConfig, ModelConfig, RowConfig, RunConfig
from tokzip_jax.data import clips, pipeline, sources
from tokzip_jax.evals import scoring, table
from tokzip_jax.metrics import say
from tokzip_jax.paths import flatten
from tokzip_jax.types import Array, Params
from tokzip_jax.workdir import Workdir, write_atomically

FIXED = AutoConfig()  # all questions read the same number of VoCo tokens
MODEL_INPUTS = ("images", "ids", "thread", "sample", "supervised", "tiles")  # the last one only of tiled pictures


# Fields of `EvalConfig` that no row's result depends on, at their defaults.
UNREAD = {name: getattr(EvalConfig(), name) for name in ("order", "pictures", "batch_size")}


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a kept result was measured of: as long as it is the same, the row is not measured again.

    Attributes:
        row, eval: of the config, `UNREAD` fields of the latter at their defaults.
        checkpoint: as in `Runner`.
    """

    row: RowConfig
    eval: EvalConfig
    checkpoint: str

    @classmethod
    def read(cls, stored: dict[str, Any]) -> "Origin | None":
        """Out of a workdir; what came to the config since then has its default. None: something of it is gone."""
        try:
            known = stored.keys() == {field.name for field in dataclasses.fields(cls)}
            return config_io.from_config_dict(stored, cls) if known else None
        except ValueError:
            return None


@functools.lru_cache(maxsize=64)
def _scorer(
    cfg: ModelConfig,
    method: MethodConfig,
    questions: int,
    max_targets: int,
    mesh: Mesh,
    auto: AutoConfig = FIXED,
) -> Callable[..., Any]:
    def score(params: Params, batch: dict[str, Array], visible: Array, count: Array, key: Array) -> Any:
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        # A picture's key is its own: what is drawn for it depends neither on its batch nor on its place there.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["example"])
        options = {"table": visible, "key": keys, "questions": questions, "max_targets": max_targets}
        if auto.ladder:
            return elastic.score_step(cfg, method, params, inputs, auto, **options)
        return step.score_step(cfg, method, params, inputs, voco_count=count, **options)

    # Replicated results can be read on every host.
    return jax.jit(score, out_shardings=NamedSharding(mesh, P()))


@dataclasses.dataclass(frozen=True)
class Runner:
    """Everything that scoring needs.

    Attributes:
        cfg, workdir, mesh: of the run.
        tokenizer: of the run.
        examples: of the split that is measured, without pictures.
        checkpoint: parameters to measure instead of the stages' own; "" = the stages'.
    """

    cfg: RunConfig
    workdir: Workdir
    mesh: Mesh
    tokenizer: object
    examples: list[dict]
    checkpoint: str = ""

    @classmethod
    def create(cls, cfg: RunConfig, workdir: Workdir, mesh: Mesh, checkpoint: str = "") -> "Runner":
        """Open the split that the config names."""
        source = sources.load(cfg.data, cfg.eval.split, tile=cfg.model.vit.image_size)
        count = min(len(source), cfg.eval.limit or len(source))
        examples = [source.text(i) for i in range(count)]
        return cls(cfg, workdir, mesh, workdir.load_tokenizer(cfg.data), examples, checkpoint)

    @functools.cached_property
    def question_tokens(self) -> int:
        """The mean length of a question, rounded: the text length behind the table's FLOPs."""
        texts = [question for example in self.examples for question in example["questions"]]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return round(np.mean([len(line.ids) for line in encoded]))

    def pictures(self, row: RowConfig) -> dict[str, float]:
        """What the ledger has to know of the rows' pictures, means over the questions of the split: "images", and
        "stitched" tokens where tiles are put together."""

        def mean(values: list[int]) -> float:
            found = float(np.average(values, weights=[len(example["types"]) for example in examples]))
            return int(found) if found.is_integer() else found

        if row.frame_order:
            return {"images": clips.frames(clips.reading(self.cfg.data, row.frame_order).scenes)}
        stitched = row.method.packing != "tiles"
        examples = [example for example in self.examples if not stitched or "tiles" in example]
        counts = {"images": mean([example.get("frames", 1) for example in examples])}
        if stitched:
            tokens = [flops.stitched_tokens(self.cfg.model, row.method, example["tiles"]) for example in examples]
            counts["stitched"] = mean(tokens)
        return counts

    def costs(self, row: RowConfig, read: float | None = None, model: ModelConfig | None = None) -> flops.Ledger:
        """What a row costs on paper, of `model` (None: the config's).

        `read` is the mean number of VoCo tokens where questions or pictures pick it. To pick it, a question is read
        once for each number; where questions pick, a picture keeps the largest one.
        """
        rows = {"text_tokens": self.question_tokens, **self.pictures(row)}

        def reading(count: float | None) -> flops.Ledger:
            return flops.ledger(model or self.cfg.model, row.method, read_voco=count, **rows)

        costs = reading(read)
        if not row.auto.ladder:
            return costs
        kept = reading(row.auto.ladder[-1]) if row.auto.per == "question" else costs
        prefill = sum(reading(count).prefill_flops for count in row.auto.ladder)
        return dataclasses.replace(costs, prefill_flops=prefill, kv_bytes=kept.kv_bytes)

    def load(self, row: RowConfig) -> Params:
        """The parameters that a row is about, with the LoRA deltas of its stage attached.

        Raises:
            FileNotFoundError: its stage was not trained to its end, or there is no such checkpoint.
            ValueError: the checkpoint is of another model.
        """
        directory = self.checkpoint or self.workdir.checkpoints(row.stage)
        if not self.checkpoint and finished(directory) is None:
            raise FileNotFoundError(
                f"stage {row.stage!r} has no finished checkpoint in {directory}: run train.py to its end"
            )
        deltas = self.cfg.stages[row.stage].lora
        abstract = flatten(recipe.shapes(self.cfg, row.method.projector, deltas))
        recipe.check_deltas(directory, abstract)
        # Parameters from elsewhere may know no VoCo tokens and no deltas; scoring never reads the contrastive head.
        lacking = absent(directory, abstract, (*recipe.UNREAD, "lora/.*")) if self.checkpoint else []
        wanted = step.nest({path: leaf for path, leaf in abstract.items() if path not in lacking})
        params = load_params(directory, sharding.abstract_like(self.mesh, wanted))
        # What a jitted function only passes on is not copied.
        return jax.jit(functools.partial(lora.attach, cfg=deltas))(params) if "lora" in params else params

    def batches(self, order: str = "") -> Iterator[dict[str, np.ndarray]]:
        """The eval rows; `order` as in `clips.reading`."""
        cfg = self.cfg
        return pipeline.eval_batches(
            clips.reading(cfg.data, order),
            self.tokenizer,
            split=cfg.eval.split,
            image_size=cfg.model.vit.image_size,
            batch_size=cfg.eval.batch_size,
            limit=cfg.eval.limit,
        )

    def score(
        self, params: Params, method: MethodConfig, seed: int, auto: AutoConfig = FIXED, order: str = ""
    ) -> tuple[scoring.Score, float | None]:
        """Accuracy of one method with one set of parameters on the whole split; `order` as in `clips.reading`.

        With a ladder in `auto` every question picks its number of VoCo tokens, and their mean is returned too.
        """
        slots = max([method.voco, *(s.method.voco for s in self.cfg.stages.values() if "voco" in params)])
        if method.voco_start != "embedding":
            slots = method.voco  # of how many parts the first is, matters
        # What can be an argument is one, so that rows which differ in mask, VoCo count or seed share a program.
        static = dataclasses.replace(method, voco=slots, voco_mask="visible", seed=0)
        visible, count = step.mask_table(method), np.int32(method.voco)
        static_auto = dataclasses.replace(auto, threshold=0.0, per=FIXED.per)  # the choice is made out here
        key = jax.random.key(seed)
        asked: list[tuple[int, int]] = []  # (example, question)
        found: list[np.ndarray] = []  # of each, whether it is answered, or with a ladder [2, R]: that, and the change
        for batch in self.batches(order):
            # Every host holds the same rows; each device takes its part.
            inputs = {name: batch[name] for name in (*MODEL_INPUTS, "example") if name in batch}
            inputs = sharding.place(self.mesh, inputs, "data")
            max_targets = batch["supervised"].shape[1]
            questions = batch["question"].shape[1]
            run = _scorer(self.cfg.model, static, questions, max_targets, self.mesh, static_auto)
            result = np.asarray(jax.device_get(run(params, inputs, visible, count, key)))
            real = (batch["example"][:, None] >= 0) & (batch["question"] >= 0)
            examples = np.broadcast_to(batch["example"][:, None], real.shape)
            asked += zip(examples[real].tolist(), batch["question"][real].tolist())
            found.append(result[..., real])
        right, chosen = np.concatenate(found, axis=-1), None
        if auto.ladder:
            right, chosen = elastic.pick(right[0] > 0, right[1], auto, np.array([example for example, _ in asked]))
        tally = scoring.Tally()
        for (example, question), answered in zip(asked, right, strict=True):
            text = self.examples[example]
            tally.add(text["types"][question], text["answers"][question], bool(answered))
        return tally.score(), None if chosen is None else float(np.mean(chosen))

    def prior(self) -> scoring.Score:
        """The question-only prior of the training split."""
        source = sources.load(self.cfg.data, "train")
        train = (source.text(i) for i in range(len(source)))
        return scoring.question_only_prior(train, self.examples)

    def measure(self, name: str, row: RowConfig) -> table.RowResult:
        """One row of the table, without its ratios to the bounds."""
        if not row.stage:
            return _result(name, None, self.prior())
        params = self.load(row)
        results = []
        for seed in range(row.method.seed, row.method.seed + row.seeds):
            score, read = self.score(params, row.method, seed, row.auto, row.frame_order)
            costs = self.costs(row, read)
            result = _result(name, costs, score)
            notes = (_note(row.auto), result.note, _unfilled(costs, score))
            results.append(dataclasses.replace(result, note="; ".join(filter(None, notes))))
        return table.mean_over_seeds(results)

    def cached(self, name: str, *, again: bool = False) -> table.RowResult:
        """`measure` a row of the config, unless the workdir holds its result already; `again` measures it anyway."""
        with self.workdir.hold(f"{self.workdir.eval.relative_to(self.workdir.root)} row {name}"):
            return self._cached(name, again)

    def _cached(self, name: str, again: bool) -> table.RowResult:
        row = self.cfg.rows[name]
        # A name may hold what a file name cannot.
        path = self.workdir.eval / "rows" / f"{urllib.parse.quote(name, safe=' ')}.json"
        origin = Origin(row, dataclasses.replace(self.cfg.eval, **UNREAD), self.checkpoint)
        if path.exists() and not again:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if Origin.read(kept["origin"]) == origin:
                return table.RowResult(**kept["result"])
        result = self.measure(name, row)
        say(f"{name}: accuracy {result.accuracy:.4f}")
        # Every process has taken part in measuring the row, so none of them is still looking for the file.
        if jax.process_index() == 0:
            written = {"origin": dataclasses.asdict(origin), "result": dataclasses.asdict(result)}
            write_atomically(path, json.dumps(written, indent=2))
        return result

    def run(
        self, names: Sequence[str] = (), *, again: bool = False, row: Callable[..., table.RowResult] | None = None
    ) -> list[table.RowResult]:
        """Rows in the table's order, with their ratios to the bounds.

        Args:
            names: which ones; () = all, which also writes the table to the workdir. The two bounds are measured too.
            again: also measure the rows whose result the workdir holds.
            row: row(name, again=...) in the place of `cached`.

        Raises:
            ValueError: a name that is no row.
        """
        cfg, row = self.cfg, row or self.cached
        order = [*cfg.eval.order, *(name for name in cfg.rows if name not in cfg.eval.order)]
        for name in names:
            if name not in order:
                raise ValueError(f"there is no row {name!r}; choose of {', '.join(map(repr, order))}")
        bounds = {cfg.eval.upper, cfg.eval.lower}
        rows = [row(name, again=again) for name in order if not names or name in bounds.union(names)]
        rows = table.with_bounds(rows, upper=cfg.eval.upper, lower=cfg.eval.lower)
        if names:
            return [found for found in rows if found.method in names]
        if jax.process_index() == 0:
            table.write(rows, self.workdir.eval)
        return rows


def _note(auto: AutoConfig) -> str:
    """What a row whose questions choose says of itself: the choosing reads each question once a rung."""
    if not auto.ladder:
        return ""
    rungs = ", ".join(map(str, auto.ladder))
    every = " for all questions of a picture" if auto.per == "picture" else ""
    within = f"within {auto.threshold:g} ({auto.measure}) of the {auto.against}"
    return f"means; of {rungs} tokens the fewest {within}{every}"


def _unfilled(costs: flops.Ledger, score: scoring.Score) -> str:
    """What a row says of a method that keeps fewer tokens than its slots, which the costs count."""
    # Both may be means over rows that differ in pictures, added up in another order.
    if score.filled is None or score.filled > costs.visual_tokens * (1 - 1e-9):
        return ""
    return f"{score.filled:.4g} of {costs.visual_tokens:g} slots are filled on average"


def _result(name: str, costs: flops.Ledger | None, score: scoring.Score) -> table.RowResult:
    return table.RowResult(
        method=name,
        visual_tokens=costs.read_tokens if costs else 0,
        accuracy=score.accuracy,
        accuracy_by_type=score.by_type,
        accuracy_not_yes_no=score.not_yes_no,
        kv_bytes=costs.kv_bytes if costs else None,
        prefill_flops=costs.prefill_flops if costs else None,
        note=f"{costs.mean_tokens:.4g} a layer on average" if costs and len(set(costs.layer_tokens)) > 1 else "",
    )
