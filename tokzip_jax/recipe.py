"""How a stage of a recipe begins: its parameters, its optimiser and, for a KL term, its teacher."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokzip_jax import checkpoint, distill, elastic, lora, optim, progressive, sharding, step, vlm
from tokzip_jax.config import LoraConfig, MethodConfig, ModelConfig, RunConfig, StageConfig
from tokzip_jax.metrics import say
from tokzip_jax.paths import flatten
from tokzip_jax.step import TrainState
from tokzip_jax.types import Array, Params
from tokzip_jax.workdir import Workdir

# What an earlier checkpoint need not hold: it is made fresh, and the log says so.
FRESH = ("projector/.*", "voco/.*", "contrast/.*", "lora/.*", "image_newline")
# What the uncompressed model never reads.
UNREAD = ("voco/.*", "contrast/.*")
NO_DELTAS = LoraConfig()


RunStep = Callable[..., tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, ready to train.

    Attributes:
        name, cfg: which.
        program: (method, what a teacher with a budget of its own reads or None) -> a jitted step, the same one for the
            same arguments: (state, batch, teacher, given) -> (state, metrics, among them "learning_rate"); the state is
            donated.
        given: (number of a step, from 0) -> what the program is told of it: "rate", the learning rate; "key", the
            stage's key as raw data; "counts", the VoCo tokens in use, read where `voco_draw` is "turn" (else they are
            drawn in the program). All of it is data, so that stages which differ in learning rate, length or seed
            alone are one program to the compilation cache.
        abstract: the state's shapes and shardings, for restoring.
        begin: makes the state of step 0.
        teacher: frozen parameters for the KL term, or None (no such term, or the model without its LoRA deltas).
        budget: how many tokens student and teacher read in a step, by its number; None without a progressive schedule.
        reads: the methods of student and teacher at such a budget (`progressive.methods`), likewise.
    """

    name: str
    cfg: StageConfig
    program: Callable[..., RunStep]
    given: Callable[[int], dict[str, np.ndarray]]
    abstract: TrainState
    begin: Callable[[], TrainState]
    teacher: Params | None
    budget: Callable[[int], progressive.Budget] | None = None
    reads: Callable[[progressive.Budget], tuple[MethodConfig, MethodConfig | None]] | None = None

    @property
    def run_step(self) -> RunStep:
        """The step of a stage without a progressive schedule."""
        return self.program(self.cfg.method, None)

    def at(self, number: int) -> tuple[RunStep, dict[str, np.ndarray]]:
        """The program of step `number` (from 0), and what to give it; with a progressive schedule the VoCo counts are
        those of [student, teacher], or the student's where the teacher reads the whole picture."""
        if self.budget is None:
            return self.run_step, self.given(number)
        found = self.budget(number)
        student, teacher = self.reads(found)
        counts = found if self.cfg.progressive.site == "voco" else [voco_count(self.cfg, number)] * 2
        given = np.asarray(counts if teacher else counts[0], np.int32)
        return self.program(student, teacher), {**self.given(number), "counts": given}


def initial(cfg: ModelConfig, projector: str, deltas: LoraConfig, key: Array) -> Params:
    """Fresh parameters of the model with one kind of projector, and of its low-rank deltas."""
    params = vlm.init(cfg, projector, key)
    return lora.add(deltas, params, jax.random.fold_in(key, zlib.crc32(b"lora")))


def shapes(cfg: RunConfig, projector: str, deltas: LoraConfig = NO_DELTAS) -> Params:
    """The parameters that `initial` makes, as `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf, _shapes(cfg.model, projector, deltas))  # a tree of the caller's own


@functools.lru_cache(maxsize=64)
def _shapes(cfg: ModelConfig, projector: str, deltas: LoraConfig) -> Params:
    return jax.eval_shape(lambda key: initial(cfg, projector, deltas, key), jax.random.key(0))


def check_deltas(source: str, abstract: Params) -> None:
    """Refuse a checkpoint with low-rank deltas that are not those of `abstract`; one without any is fine.

    Raises:
        ValueError: it holds others, which would be left out silently.
    """
    stored, wanted = (
        {path for path in paths if path.startswith("lora/")}
        for paths in (checkpoint.stored_paths(source), flatten(abstract))
    )
    if stored and stored != wanted:
        odd = min(stored ^ wanted)
        raise ValueError(
            f"checkpoint {source} holds LoRA deltas of other matrices ({odd} is {'there' if odd in stored else 'here'} "
            "only): give the rank and paths that they were trained with, or a checkpoint with them merged (lora.export)"
        )


def check(cfg: RunConfig) -> None:
    """What can be known about all stages before the first one starts: their patterns, and checkpoints from elsewhere.

    Raises:
        ValueError: a train pattern without a parameter, or a checkpoint of another model to start from.
        FileNotFoundError: no checkpoint to start from.
    """
    for name, stage in cfg.stages.items():
        try:
            abstract = shapes(cfg, stage.method.projector, stage.lora)
        except ValueError as error:
            raise ValueError(f"stages.{name}.{error}") from None
        try:
            optim.make_optimizer(stage.optim, 0.0, abstract, stage.train)
        except ValueError as error:
            raise ValueError(f"stages.{name}.train: {error}") from None
        trained, _ = step.partition(abstract, stage.train)
        # A teacher under a schedule may read VoCo tokens.
        unread = ("contrast/.*",) if stage.progressive.site else UNREAD
        # Deltas of VoCo and text tokens are none of the twin's, whose text is of another kind.
        shared = distill.shares_a_pass(stage.loss, stage.progressive.site)
        if shared and stage.lora.kinds and set(stage.lora.kinds) <= {"voco", "text"}:
            unread = (*unread, "lora/.*")
        distill.check_anchor(f"stages.{name}", stage.loss, flatten(trained), unread)
        if stage.init_from and stage.init_from not in cfg.stages:
            try:
                checkpoint.absent(stage.init_from, abstract, FRESH)
                check_deltas(stage.init_from, abstract)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"stages.{name}.init_from: {error}") from None


def _source(workdir: Workdir, cfg: RunConfig, origin: str) -> str:
    return workdir.checkpoints(origin) if origin in cfg.stages else origin


def _initial_params(cfg: RunConfig, stage: StageConfig, mesh: Mesh, workdir: Workdir, key: Array) -> Params:
    def init(key: Array) -> Params:
        return initial(cfg.model, stage.method.projector, stage.lora, key)

    if not stage.init_from:
        return sharding.sharded_init(init, mesh, key)
    source = _source(workdir, cfg, stage.init_from)
    abstract = sharding.abstract_like(mesh, shapes(cfg, stage.method.projector, stage.lora))
    new = checkpoint.absent(source, abstract, FRESH)
    if not new:
        return checkpoint.load_params(source, abstract)
    # Only what the checkpoint lacks is made: a second whole model might not fit.
    say(f"not in {stage.init_from} and made fresh: {', '.join(new)}")

    def lacking(key: Array) -> Params:
        made = flatten(init(key))
        return step.nest({path: made[path] for path in new})

    drawn = sharding.sharded_init(lacking, mesh, key)
    found = checkpoint.load_params(source, step.nest({p: v for p, v in flatten(abstract).items() if p not in new}))
    return step.merge(found, drawn)


def _teacher(cfg: RunConfig, stage: StageConfig, mesh: Mesh, workdir: Workdir) -> Params | None:
    """Frozen parameters for the KL term; None = there is no such term, or the model without its deltas teaches."""
    if stage.loss.kl == 0 or stage.loss.teacher != "frozen":
        return None
    projector = cfg.stages[stage.init_from].method.projector if stage.init_from in cfg.stages else "mlp2x_gelu"
    source = _source(workdir, cfg, stage.init_from)
    abstract = flatten(sharding.abstract_like(mesh, shapes(cfg, projector, stage.lora)))
    # It reads the picture and no VoCo token: a converted LLaVA, which knows none, will do.
    lacking = checkpoint.absent(source, abstract, (*UNREAD, "lora/.*"))
    moves = any(_matches(stage.train, path) and not _matches((*UNREAD, "lora/.*"), path) for path in abstract)
    fresh = all(path in lacking for path in abstract if path.startswith("lora/"))
    if stage.lora.rank and fresh and not moves and projector == stage.method.projector:
        return None  # what it reads never changes
    return checkpoint.load_params(source, step.nest({p: leaf for p, leaf in abstract.items() if p not in lacking}))


def _matches(patterns: Iterable[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _state(stage: StageConfig, params: Params) -> TrainState:
    trained, _ = step.partition(params, stage.train)
    tx = optim.make_optimizer(stage.optim, 0.0, params, stage.train)
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(trained))


def _abstract(mesh: Mesh, stage: StageConfig, params: Params) -> TrainState:
    return sharding.abstract_like(mesh, jax.eval_shape(functools.partial(_state, stage), params))


def _places(abstract: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _of_any_length(stage: StageConfig) -> StageConfig:
    """A stage without what its program is told step by step: rate, length and seed, and where it began."""
    optim = dataclasses.replace(stage.optim, learning_rate=0.0, warmup_steps=0, final_fraction=0.0)
    return dataclasses.replace(stage, init_from="", steps=1, seed=0, drawn_as="", optim=optim)


@functools.lru_cache(maxsize=8)
def _program(
    model: ModelConfig, stage: StageConfig, targets: int, mesh: Mesh, method: MethodConfig, reads: MethodConfig | None
) -> RunStep:
    """The jitted step of stages that are `_of_any_length` the same: a study traces and compiles it once."""
    params = _shapes(model, stage.method.projector, stage.lora)
    changed = dataclasses.replace(stage, method=method)

    def run_step(
        current: TrainState, batch: dict[str, Array], teacher: Params | None, given: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        key, counts = jax.random.wrap_key_data(given["key"]), given["counts"]
        if stage.voco_draw != "turn":
            # Out of the step's number, like all that is random here: a run that was resumed draws the same.
            counts = elastic.draw(stage, key, current.step, batch["ids"].shape[0])
        following, metrics = step.train_step(
            model,
            changed,
            optim.make_optimizer(stage.optim, given["rate"], params, stage.train),
            current,
            batch,
            teacher=teacher,
            reads=reads,
            voco_count=counts if reads is None else counts[0],
            teacher_count=0 if reads is None else counts[1],
            key=key,
            max_targets=targets,
        )
        if site := stage.progressive.site:
            if site == "voco":
                read = jnp.float32(counts).reshape(-1)
            else:
                read = [jnp.float32(progressive.tokens_of(site, one, model)) for one in (method, reads) if one]
            metrics |= dict(zip(("student_tokens", "teacher_tokens"), read))
        return following, {**metrics, "learning_rate": given["rate"]}

    return jax.jit(run_step, donate_argnums=0, out_shardings=(_places(_abstract(mesh, stage, params)), None))


def prepare(cfg: RunConfig, name: str, mesh: Mesh, workdir: Workdir) -> Stage:
    """Everything of a stage but its data.

    Raises:
        ValueError: a train pattern without a parameter, or a checkpoint of another model to start from.
    """
    stage = cfg.stages[name]
    drawn_as = stage.drawn_as or name

    def keys() -> Array:
        """The stage's keys for its first parameters and for its steps, whatever the order in which stages run."""
        key = jax.random.key(cfg.seed + stage.seed)
        return jax.random.split(jax.random.fold_in(key, zlib.crc32(drawn_as.encode())))

    params = shapes(cfg, stage.method.projector, stage.lora)
    rates = np.asarray(jax.vmap(optim.make_schedule(stage.optim, stage.steps))(jnp.arange(stage.steps)), np.float32)
    key = np.asarray(jax.random.key_data(keys()[1]))

    def given(number: int) -> dict[str, np.ndarray]:
        return {"rate": rates[number], "key": key, "counts": np.int32(voco_count(stage, number))}

    abstract = _abstract(mesh, stage, params)

    def begin() -> TrainState:
        params = _initial_params(cfg, stage, mesh, workdir, keys()[0])
        begun = functools.partial(_state, stage)
        return jax.jit(begun, out_shardings=_places(abstract), donate_argnums=0)(params)

    targets = cfg.data.targets or cfg.data.text_length
    # Held, so that none is traced again where a schedule has more of them than `_program` keeps.
    program = functools.cache(functools.partial(_program, cfg.model, _of_any_length(stage), targets, mesh))
    budget = reads = None
    if stage.progressive.site:
        budget = functools.partial(progressive.budget, stage, cfg.model, seed=cfg.seed + stage.seed, name=drawn_as)
        reads = functools.partial(progressive.methods, stage, cfg.model)
    return Stage(name, stage, program, given, abstract, begin, _teacher(cfg, stage, mesh, workdir), budget, reads)


def voco_count(stage: StageConfig, number: int) -> int:
    """VoCo tokens in use in step `number` (from 0): the stage's counts in turn."""
    return stage.voco_counts[number % len(stage.voco_counts)] if stage.voco_counts else stage.method.voco
