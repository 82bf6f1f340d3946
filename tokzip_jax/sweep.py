"""Every method at every budget: the rows of a sweep, made from a run's config, and what cannot be with the reason.

Training-free methods are read with the parameters of the stage that the row `eval.upper` reads. A projector is trained
from that stage's checkpoint, the vision tower frozen, as the run trains its own compressors (`template`).
"""

import dataclasses
from collections.abc import Sequence

from tokzip_jax import method_check, sweep_methods, vlm
from tokzip_jax.compress import ENCODER
from tokzip_jax.compress.decoder import DECODER
from tokzip_jax.config import (
    DataConfig,
    LossConfig,
    MethodConfig,
    ModelConfig,
    ProgressiveConfig,
    RowConfig,
    RunConfig,
    StageConfig,
)
from tokzip_jax.data import sources
from tokzip_jax.projectors import PROJECTORS
from tokzip_jax.sweep_methods import VARIANTS, upper_method

RANDOM_SEEDS = 3
BUDGETS = (1, 4, 9, 16)


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of a sweep.

    Attributes:
        method: its name.
        row: how it is measured.
        model: the run's model, for a projector with sizes of its own another one.
        data: the run's; `questions` is 1 for a method that needs one question a row.
        training: the stage that has to be trained for it; None = none.
    """

    method: str
    row: RowConfig
    model: ModelConfig
    data: DataConfig
    training: StageConfig | None = None

    @property
    def alone(self) -> bool:
        """Rows hold one question each: what becomes of the picture follows from it."""
        return self.row.method.decoder != "none" or bool(vlm.reads_question(self.row.method))

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture: that enter the language model, or that a decoder site leaves."""
        method = self.row.method
        return method.decoder_keep[-1] if method.decoder_keep else vlm.visual_slots(self.model, method)

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.method} {self.tokens}"


@dataclasses.dataclass(frozen=True)
class Refused:
    """A budget that a method cannot meet, and why, in a sentence."""

    method: str
    tokens: int
    reason: str

    def __str__(self) -> str:
        return f"{self.method} {self.tokens}: {self.reason}"


def free_names() -> list[str]:
    """Methods that need no training."""
    return [*(name for name in ENCODER if name != "none"), *VARIANTS, *DECODER]


def trained_names(cfg: RunConfig) -> list[str]:
    """Projectors that a run would have to train; its own one is the upper bound."""
    return [name for name in PROJECTORS if name != upper_method(cfg).projector]


def named(cfg: RunConfig, asked: Sequence[str]) -> list[str]:
    """Names of methods: "free", "all", or some of them as they are, each once.

    Raises:
        ValueError: a name that is no method.
    """
    free, every = free_names(), [*free_names(), *trained_names(cfg)]
    names: list[str] = []
    for name in asked:
        if name not in ("free", "all", *every):
            raise ValueError(f"--methods holds {name!r}; choose of 'all', 'free', {', '.join(map(repr, every))}")
        names += {"free": free, "all": every}.get(name, [name])
    return list(dict.fromkeys(names))


def plan(
    cfg: RunConfig, asked: Sequence[str], budgets: Sequence[int], *, held_out: int = 0, steps: int = 0
) -> tuple[list[Line], list[Refused]]:
    """The rows of a sweep, method by method, and the budgets that cannot be.

    Args:
        cfg: of the run.
        asked: see `named`.
        budgets: visual tokens of a picture. Decoder-site methods keep half of all tokens, whatever is asked.
        held_out: training pictures that the trainings of the sweep leave out, so that their learning rates can be
            chosen on them; for a run whose data have no validation split (see `DataConfig.held_out`).
        steps: how long the trainings of the sweep are; 0 = as long as the run's own (see `template`).

    Raises:
        ValueError: an unknown name, a budget below 1, no budget that one of the methods can meet, no stage that a
            projector's recipe could be taken from, a negative number of steps, or pictures to hold out where there is
            a validation split.
    """
    names = named(cfg, asked)
    if not names or not budgets or min(budgets) < 1:
        raise ValueError(f"--methods={','.join(asked)} and --budgets={budgets}: give at least one each, budgets >= 1")
    if not cfg.rows:
        raise ValueError("the config has no rows: eval.upper says which stage's parameters the methods are read with")
    if held_out < 0 or (held_out and (cfg.data.name != "easy_vqa" or sources.has_validation(cfg.data))):
        raise ValueError(
            f"--held_out={held_out} must be 0 for these data, or above for easy_vqa where the config holds out none"
        )
    if steps < 0:
        raise ValueError(f"--steps={steps} must be 0, for trainings as long as the run's own, or above")
    if any(name in PROJECTORS for name in names):
        template(cfg)
    budgets = sorted(set(budgets))
    lines: list[Line] = []
    refused: list[Refused] = []
    for name in names:
        half = max(1, cfg.model.vit.patches // 2)
        for tokens in [half] if name in DECODER else budgets:
            try:
                lines.append(_line(cfg, name, tokens, budgets, held_out, steps))
            except ValueError as error:
                # The place in the config and the method itself say its name; here it stands in front already.
                reason = str(error).removeprefix(f"{name}: ").removeprefix(f"{name}: ")
                refused.append(Refused(name, tokens, reason))
    if not lines:
        raise ValueError(f"no method can meet its budget: {'; '.join(map(str, refused))}")
    return lines, refused


def _line(cfg: RunConfig, name: str, tokens: int, budgets: Sequence[int], held_out: int, steps: int) -> Line:
    data = cfg.data
    if name in PROJECTORS:
        found = sweep_methods.projector(cfg.model, name, tokens, budgets)
        # Trainings on other pictures, or of another length, are other ones.
        suffix = found.suffix + f"-heldout{held_out}" * bool(held_out) + f"-for{steps}" * bool(steps)
        data = dataclasses.replace(data, held_out=held_out or data.held_out)
        row = RowConfig(stage=name + suffix, method=found.method)
        line = Line(name, row, found.model, data, _training(cfg, found.trained, steps))
    else:
        make = sweep_methods.decoder if name in DECODER else sweep_methods.encoder
        row = RowConfig(
            stage=cfg.rows[cfg.eval.upper].stage,
            method=make(cfg, name, tokens),
            seeds=RANDOM_SEEDS if name == "random" else 1,
        )
        line = Line(name, row, cfg.model, data)
    if line.alone:
        line = dataclasses.replace(line, data=dataclasses.replace(line.data, questions=1))
    method_check.check(name, line.row.method, line.model)
    method_check.fits(name, line.row.method, run_config(cfg, [line]))
    return line


def run_config(cfg: RunConfig, lines: Sequence[Line]) -> RunConfig:
    """The run's config with the rows of lines that agree on model and data, and with what trains for them.

    Of the run's stages only that of the upper bound is left, which is finished: where it came from does not matter.
    """
    first, origin = lines[0], cfg.rows[cfg.eval.upper].stage
    stages = {origin: dataclasses.replace(cfg.stages[origin], init_from="")}
    trained = {line.row.stage: line.training for line in lines if line.training}
    if trained:
        # Not the study's own `equal_time`: a stage with VoCo tokens, twice as long, would double the work of a sweep.
        name = template(cfg)
        # For its steps, as many as those of the others, and the time of one.
        stages[name] = dataclasses.replace(cfg.stages[name], steps=next(iter(lines)).training.steps)
        rates = _rates(cfg, first.data)
        study = dataclasses.replace(cfg.study, stages=tuple(trained), learning_rates=rates, equal_time=name)
    else:
        study = dataclasses.replace(cfg.study, stages=(), equal_time="")
    return dataclasses.replace(
        cfg,
        model=first.model,
        data=first.data,
        stages=stages | trained,
        rows={line.name: line.row for line in lines},
        study=study,
    )


def _rates(cfg: RunConfig, data: DataConfig) -> tuple[float, ...]:
    """The study's learning rates; of a run without a study the recipe's, half and double of it.

    Where no split could choose among them, the recipe's alone.
    """
    peak = cfg.stages[template(cfg)].optim.learning_rate
    return cfg.study.learning_rates or ((peak / 2, peak, peak * 2) if sources.has_validation(data) else ())


def template(cfg: RunConfig) -> str:
    """The name of the run's stage whose recipe the trained methods take: one that begins where the upper bound was
    read, with a projector of its own or with VoCo tokens that text sees alone.

    Raises:
        ValueError: there is none.
    """
    origin, own = cfg.rows[cfg.eval.upper].stage, upper_method(cfg).projector
    stages = {name: stage.method for name, stage in sorted(cfg.stages.items()) if stage.init_from == origin}
    for fits in (lambda m: m.projector != own, lambda m: m.voco_mask != "visible"):
        for name, method in stages.items():
            if fits(method):
                return name
    raise ValueError(
        f"no stage begins from {origin!r} with another projector or a VoCo mask, so that there is no recipe to train "
        "projectors by; add such a stage, or ask for --methods=free"
    )


def _training(cfg: RunConfig, method: MethodConfig, steps: int) -> StageConfig:
    """Same steps (or those asked for), batch and optimiser as the template; projector and language model train."""
    recipe = cfg.stages[template(cfg)]
    return dataclasses.replace(
        recipe,
        steps=steps or recipe.steps,
        train=("projector/.*", "llm/.*"),
        method=method,
        voco_counts=(),
        token_dropout=0.0,
        loss=LossConfig(chunk=recipe.loss.chunk),
        progressive=ProgressiveConfig(),
    )
