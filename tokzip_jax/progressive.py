"""Compression that grows over a stage: how many tokens student and teacher read in a step.

Token consistency distillation of EPIC (arXiv 2510.00515): one model is student and teacher, the student leaves out a
share of the tokens drawn from an interval that moves upwards, the teacher leaves out less by a lead that widens. In the
paper the largest share grows from 5 to 90 %, the lead from 5 to 30 %, and the loss is 0.3 CE + 0.7 KL. The code's
interval moves from 10 to 26 .. 74 %, its lead is full (30 %) after two fifths of the training, and the loss is between
0.6 CE + 0.4 KL and half of each, at temperature 2. There tokens leave inside of the language model, by the schedules of
decoder-site methods; here it is for two other places:

    site "encoder": of a picture's patches, rounded to the nearest of a few budgets, for every budget of student and
        teacher is a program of its own (n budgets: at most n (n + 1) / 2, compiled when first met);
    site "voco": of the VoCo slots, at least one in use; the counts are arguments of one program.
"""

import dataclasses
import zlib
from typing import NamedTuple

import numpy as np

from tokzip_jax import compress, encoder_site
from tokzip_jax.config import MethodConfig, ModelConfig, ProgressiveConfig, StageConfig

SITES = ("", "encoder", "voco")


class Budget(NamedTuple):
    """Tokens of a picture in one step: visual ones (site "encoder") or VoCo tokens (site "voco").

    Attributes:
        student: of the student.
        teacher: of the teacher; 0 = it reads the whole picture, as a frozen one does at site "voco".
    """

    student: int
    teacher: int


def ratios(cfg: ProgressiveConfig, progress: float, lot: float) -> tuple[float, float]:
    """The shares of tokens that student and teacher leave out.

    Args:
        cfg: the schedule.
        progress: share of the stage that is done, 0 .. 1.
        lot: where in the interval of this step the student's ratio lies, 0 .. 1.
    """
    low = cfg.low + (cfg.final_low - cfg.low) * progress
    high = cfg.high + (cfg.final_high - cfg.high) * progress
    lead = cfg.lead + (cfg.final_lead - cfg.lead) * (min(1.0, progress / cfg.lead_by) if cfg.lead_by else 1.0)
    student = low + (high - low) * lot
    return student, max(0.0, student - lead)


def budget(stage: StageConfig, model: ModelConfig, number: int, seed: int, name: str) -> Budget:
    """What a stage with a schedule reads in step `number` (from 0).

    Args:
        stage, model: the configs.
        number: of the step.
        seed, name: of the run and of the stage; the draw depends on these and the step alone, so that a run that was
            resumed draws the same, on every host.
    """
    cfg = stage.progressive
    lot = np.random.default_rng((seed, zlib.crc32(name.encode()), number)).random()
    whole = model.vit.patches if cfg.site == "encoder" else stage.method.voco
    kept = [max(1, round((1 - ratio) * whole)) for ratio in ratios(cfg, number / stage.steps, lot)]
    if cfg.site == "encoder":
        # Of two that are equally near, the larger one.
        kept = [min(cfg.budgets, key=lambda size, wanted=wanted: (abs(size - wanted), -size)) for wanted in kept]
    # Where nobody asks the teacher, its budget makes no program of its own.
    if stage.loss.kl == 0:
        return Budget(kept[0], kept[0])
    return Budget(kept[0], 0) if cfg.site == "voco" and stage.loss.teacher == "frozen" else Budget(*kept)


def methods(stage: StageConfig, found: Budget) -> tuple[MethodConfig, MethodConfig | None]:
    """The methods of student and teacher: of site "encoder" each with its tokens, of site "voco" the stage's own; None
    for a teacher that reads the whole picture."""
    if stage.progressive.site != "encoder":
        return stage.method, stage.method if found.teacher else None
    student, teacher = (_with_tokens(stage.method, tokens) for tokens in found)
    return student, teacher


def all_methods(stage: StageConfig) -> list[MethodConfig]:
    """The methods of all budgets, of site "encoder"."""
    return [_with_tokens(stage.method, tokens) for tokens in stage.progressive.budgets]


def _with_tokens(method: MethodConfig, tokens: int) -> MethodConfig:
    """The method at another budget; options that are parts of it keep their share."""
    options = compress.scaled(method.encoder, method.options, method.tokens, tokens)
    return dataclasses.replace(method, tokens=tokens, options=options)


def check(key: str, stage: StageConfig, model: ModelConfig) -> None:
    """Refuse a schedule that cannot be.

    Args:
        key: the stage's dotted place in the config.
        stage, model: the configs.

    Raises:
        ValueError: one sentence with the key and its valid range.
    """
    cfg, method = stage.progressive, stage.method
    key = f"{key}.progressive"
    if cfg.site not in SITES:
        raise ValueError(f"{key}.site = {cfg.site!r} is unknown; choose one of '', 'encoder', 'voco'")
    if not cfg.site:
        if cfg != ProgressiveConfig():
            raise ValueError(f"{key} has no site: set {key}.site to 'encoder' or 'voco'")
        return
    for name in ("low", "high", "final_low", "final_high", "lead", "final_lead", "lead_by"):
        value = getattr(cfg, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{key}.{name} = {value} must lie between 0 and 1")
    for low, high in (("low", "high"), ("final_low", "final_high")):
        if getattr(cfg, low) > getattr(cfg, high):
            raise ValueError(f"{key}.{low} = {getattr(cfg, low)} must be at most {key}.{high} = {getattr(cfg, high)}")
    if stage.voco_counts and cfg.site == "voco":
        raise ValueError(f"{key}.site = 'voco' chooses what voco_counts = {stage.voco_counts} does; that must be ()")
    if cfg.site == "voco":
        if method.voco < 2 or cfg.budgets:
            raise ValueError(
                f"{key}.site = 'voco' needs method.voco >= 2 (it is {method.voco}) and takes no budgets (they are "
                f"{cfg.budgets})"
            )
        return
    if method.encoder == "none" or not cfg.budgets:
        raise ValueError(
            f"{key}.site = 'encoder' needs method.encoder (it is {method.encoder!r}) and the numbers of tokens in "
            f"{key}.budgets (they are {cfg.budgets})"
        )
    for tokens in cfg.budgets:
        if tokens < 1:
            raise ValueError(f"{key}.budgets: {tokens} tokens must be at least 1")
        encoder_site.check(f"{key}.budgets", model, _with_tokens(method, tokens))
