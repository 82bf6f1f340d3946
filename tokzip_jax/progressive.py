"""Compression that grows over a stage: how many tokens student and teacher read in a step.

Token consistency distillation of EPIC (arXiv 2510.00515): one model is student and teacher, the student leaves out a
share of the tokens drawn from an interval that moves upwards, the teacher leaves out less by a lead that widens. In the
paper the largest share grows from 5 to 90 %, the lead from 5 to 30 %, and the loss is 0.3 CE + 0.7 KL. The code's
interval moves from 10 to 26 .. 74 %, its lead is full (30 %) after two fifths of the training, and the loss is between
0.6 CE + 0.4 KL and half of each, at temperature 2. There tokens leave inside of the language model, by the schedules of
decoder-site methods; here any site may be the one that shrinks:

    site "encoder": what passes of a picture's patches;
    site "projector": what a projector makes of them, by the option of its own that sets their number;
    site "decoder": what the last cut leaves of the tokens that enter the language model. Earlier cuts keep the shape of
        the stage's own schedule: where that leaves the share s of all tokens, a budget leaves a power of s, the same
        power at all cuts;
    site "voco": the VoCo slots in use, at least one.

Of the first three a step's share is rounded to the nearest of a few budgets, for every budget of student and teacher is
a program of its own (n budgets: at most n (n + 1) / 2, compiled when first met). VoCo counts are arguments of one
program.
"""

import dataclasses
import functools
import itertools
import math
import zlib
from typing import NamedTuple

import numpy as np

from tokzip_jax import compress, decoder_site, encoder_site, projectors, vlm
from tokzip_jax.config import MethodConfig, ModelConfig, ProgressiveConfig, StageConfig

SITES = ("", "encoder", "projector", "decoder", "voco")


class Budget(NamedTuple):
    """Tokens of a picture in one step: VoCo tokens (site "voco") or visual ones (all others).

    Attributes:
        student: of the student.
        teacher: of the teacher; 0 = it reads the whole picture, as a frozen one does at sites "voco" and "projector",
            whose checkpoint need not have been trained with such tokens.
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
    whole = _whole(cfg.site, stage.method, model)
    kept = [max(1, round((1 - ratio) * whole)) for ratio in ratios(cfg, number / stage.steps, lot)]
    if cfg.site != "voco":
        # Of two that are equally near, the larger one.
        kept = [min(cfg.budgets, key=lambda size, wanted=wanted: (abs(size - wanted), -size)) for wanted in kept]
    # Where nobody asks the teacher, its budget makes no program of its own.
    if stage.loss.kl == 0:
        return Budget(kept[0], kept[0])
    unknown = cfg.site in ("projector", "voco") and stage.loss.teacher == "frozen"
    return Budget(kept[0], 0) if unknown else Budget(*kept)


def _whole(site: str, method: MethodConfig, model: ModelConfig) -> int:
    """The tokens of which a ratio is left out."""
    if site == "voco":
        return method.voco
    return vlm.visual_slots(model, method) if site == "decoder" else model.vit.patches


def methods(stage: StageConfig, model: ModelConfig, found: Budget) -> tuple[MethodConfig, MethodConfig | None]:
    """The methods of student and teacher, each at its budget; None for a teacher that reads the whole picture.

    VoCo counts change no method: of site "voco" both are the stage's own.
    """
    student, teacher = (at_budget(stage, model, tokens) if tokens else None for tokens in found)
    return student, teacher


def all_methods(stage: StageConfig, model: ModelConfig) -> list[MethodConfig]:
    """The methods of all budgets; none of site "voco"."""
    return [at_budget(stage, model, tokens) for tokens in stage.progressive.budgets]


def at_budget(stage: StageConfig, model: ModelConfig, tokens: int) -> MethodConfig:
    """The stage's method with so many tokens at the site that shrinks.

    Raises:
        ValueError: a projector that makes no such number.
    """
    method = stage.method
    if stage.progressive.site == "encoder":
        # Options that are parts of the budget keep their share.
        options = compress.scaled(method.encoder, method.options, method.tokens, tokens)
        return dataclasses.replace(method, tokens=tokens, options=options)
    if stage.progressive.site == "projector":
        return _projected(method, model, tokens)
    if stage.progressive.site == "decoder":
        whole = vlm.visual_slots(model, method)
        power = math.log(tokens / whole) / math.log(method.decoder_keep[-1] / whole)
        keep = tuple(round(whole * (kept / whole) ** power) for kept in method.decoder_keep)
        return dataclasses.replace(method, decoder_keep=keep)
    return method


def tokens_of(site: str, method: MethodConfig, model: ModelConfig) -> int:
    """The budget that a method of `at_budget` has, of another site than "voco"."""
    if site == "projector":
        return vlm.visual_slots(model, method)
    return method.tokens if site == "encoder" else method.decoder_keep[-1]


@functools.lru_cache(maxsize=256)
def _projected(method: MethodConfig, model: ModelConfig, tokens: int) -> MethodConfig:
    """A projector with the setting of its own that makes `tokens`, the one it has if that does; its parameters are the
    same ones."""
    tried = projectors.settings(method.projector, model.vit.grid, model.projector.queries)
    if "pool_rows" in projectors.PROJECTORS[method.projector].options:
        sides = range(1, model.vit.grid + 1)
        tried = [{**square, "pool_rows": 0} for square in tried]
        tried += [{"pool_rows": down, "pool_grid": across} for down, across in itertools.combinations(sides, 2)]
    if not tried:
        able = [name for name in projectors.PROJECTORS if projectors.settings(name, 1, 1)]
        raise ValueError(
            f"the projector {method.projector!r} has no option that sets how many tokens it makes; choose one of "
            f"{', '.join(map(repr, able))}"
        )
    made, wrong = {vlm.visual_slots(model, method): method}, ""
    for changes in tried:
        changed = dataclasses.replace(method, **changes)
        try:
            projectors.check(method.projector, model, changed)
        except ValueError as error:
            wrong = str(error)
            continue
        made.setdefault(vlm.visual_slots(model, changed), changed)
    if tokens not in made:
        if wrong and len(made) == 1:
            raise ValueError(wrong)
        known = ", ".join(map(str, sorted(made)))
        raise ValueError(f"the projector {method.projector!r} cannot make {tokens} tokens, but {known}")
    return made[tokens]


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
        raise ValueError(f"{key}.site = {cfg.site!r} is unknown; choose one of {', '.join(map(repr, SITES))}")
    if not cfg.site:
        if cfg != ProgressiveConfig():
            raise ValueError(f"{key} has no site: set {key}.site to one of {', '.join(map(repr, SITES[1:]))}")
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
        if method.voco_start != "embedding":
            raise ValueError(
                f"{key}.site = 'voco' uses fewer than the {method.voco} tokens that method.voco_start = "
                f"{method.voco_start!r} starts from a part of the picture each; it must be 'embedding'"
            )
        return
    named = method.projector if cfg.site == "projector" else getattr(method, cfg.site)
    if named == "none" or not cfg.budgets:
        raise ValueError(
            f"{key}.site = {cfg.site!r} needs method.{cfg.site} (it is {named!r}) and the numbers of tokens in "
            f"{key}.budgets (they are {cfg.budgets})"
        )
    if cfg.site == "projector" and method.draw_budget:
        raise ValueError(f"{key}.site = 'projector' chooses what method.draw_budget = True draws; that must be False")
    if cfg.site == "decoder":
        _check_shape(key, stage, model)
    for tokens in cfg.budgets:
        if tokens < 1:
            raise ValueError(f"{key}.budgets: {tokens} tokens must be at least 1")
        try:
            made = at_budget(stage, model, tokens)
        except ValueError as error:
            raise ValueError(f"{key}.budgets: {error}") from None
        if cfg.site == "encoder":
            encoder_site.check(f"{key}.budgets", model, made)
        if cfg.site == "decoder":
            try:
                decoder_site.check(made, vlm.visual_slots(model, made), model.llm)
            except ValueError as error:
                raise ValueError(f"{key}.budgets: {tokens} tokens: {error}") from None


def _check_shape(key: str, stage: StageConfig, model: ModelConfig) -> None:
    """The stage's own schedule gives the others their shape: it has to drop something."""
    whole = vlm.visual_slots(model, stage.method)
    if stage.method.decoder_keep[-1] >= whole:
        raise ValueError(
            f"{key}.site = 'decoder' scales method.decoder_keep = {stage.method.decoder_keep}, of which the last cut "
            f"must leave fewer than the {whole} tokens that enter"
        )
    if not 1 <= min(stage.progressive.budgets) <= max(stage.progressive.budgets) <= whole:
        raise ValueError(f"{key}.budgets = {stage.progressive.budgets} must lie between 1 and {whole} tokens")
