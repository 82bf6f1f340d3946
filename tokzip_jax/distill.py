"""The text terms of a stage's loss: which passes they need, and what each of them reads.

    loss.teacher   its parameters         what it reads                                  its pass
    "frozen"       those of `init_from`   the whole picture, no VoCo token               its own
    "self"         the model's, now       the student's visual tokens, no VoCo token     the student's (`onepass`)

A progressive schedule gives a teacher a budget of its own for the student's compressor, and a pass of its own; but not
a frozen one over VoCo tokens or behind a projector, which its checkpoint need not have been trained to read: it reads
the whole picture, or the largest budget where its projector is the student's and knows no whole.
Weights mix the terms: `ce` and `kl` of the student, `teacher_ce` of the text that reads the student's visual tokens
without VoCo tokens, with gradient. That one is a self-teacher's anchor: a KL alone is zero, too, where teacher and
student agree on nonsense. A frozen teacher needs none. The student's own cross entropy is a weaker anchor, and the one
that EPIC has (arXiv 2510.00515). VoCo-LLaMA's code has `ce` alone, its paper (arXiv 2406.12275) `kl`.
"""

import dataclasses
import re
from collections.abc import Iterable

import jax

from tokzip_jax import llm, losses, onepass, progressive, projectors, vlm
from tokzip_jax.config import LossConfig, MethodConfig, ModelConfig, StageConfig
from tokzip_jax.types import Array, Params

TEACHERS = ("frozen", "self")
# A method's settings for the uncompressed model, which need not know VoCo tokens.
PLAIN = {
    "encoder": "none",
    "voco": 0,
    "voco_mask": "visible",
    "level": 0,
    "queries": 0,
    "draw_budget": False,
    "positions": "original",
    "decoder": "none",
    "decoder_layers": (),
    "decoder_keep": (),
}


def check(key: str, stage: StageConfig) -> None:
    """Refuse a loss that cannot be, as far as the config alone says it.

    Args:
        key: the stage's dotted place in the config.
        stage: the stage.

    Raises:
        ValueError: one sentence with the key and what would be right.
    """
    loss, method = stage.loss, stage.method
    if loss.teacher not in TEACHERS:
        raise ValueError(f"{key}.loss.teacher = {loss.teacher!r} is unknown; choose one of 'frozen', 'self'")
    if loss.kl > 0 and loss.teacher == "frozen" and not stage.init_from:
        raise ValueError(
            f"{key}.loss.kl = {loss.kl} needs a teacher: set {key}.init_from to the stage to distil from, or "
            f"{key}.loss.teacher = 'self'"
        )
    if loss.teacher == "self" and loss.kl + loss.teacher_ce == 0:
        raise ValueError(f"{key}.loss.teacher = 'self' teaches nothing: {key}.loss.kl must be above 0")
    if loss.teacher_ce > 0 and stage.progressive.site:
        raise ValueError(
            f"{key}.loss.teacher_ce = {loss.teacher_ce} reads all visual tokens of the step, and a teacher under "
            f"{key}.progressive fewer: it must be 0, or {key}.progressive.site = ''"
        )
    if not shares_a_pass(loss, stage.progressive.site):
        return
    if method.decoder != "none":
        raise ValueError(
            f"{key}.loss: a teacher's text in the student's pass reads the same visual tokens in every layer; "
            f"{key}.method.decoder = {method.decoder!r} must be 'none'"
        )
    if method.voco_mask == "visible":
        reads = "loss.teacher = 'self'" if loss.teacher_ce == 0 else f"loss.teacher_ce = {loss.teacher_ce}"
        raise ValueError(
            f"{key}.{reads} needs a student that reads VoCo tokens in place of the picture: "
            f"{key}.method.voco_mask = 'visible' must be 'voco' or 'prefix_visible'"
        )


def check_anchor(key: str, loss: LossConfig, trained: Iterable[str], unread: tuple[str, ...]) -> None:
    """Refuse a self-teacher that nothing holds.

    Args:
        key: the stage's dotted place in the config.
        loss: its loss.
        trained: the slash paths that train.
        unread: patterns of the paths that the teacher does not read; if only such train, it is a frozen one.

    Raises:
        ValueError: one sentence.
    """
    if loss.teacher != "self" or loss.kl == 0 or loss.ce + loss.teacher_ce > 0:
        return
    moving = sorted(path for path in trained if not any(re.fullmatch(pattern, path) for pattern in unread))
    if moving:
        raise ValueError(
            f"{key}.loss.teacher = 'self' with kl alone has no anchor, for the teacher trains as well ({moving[0]}): "
            f"set {key}.loss.teacher_ce or {key}.loss.ce above 0, or let {key}.train name only what it does not read"
        )


def shares_a_pass(loss: LossConfig, site: str) -> bool:
    """Whether a teacher's text stands in the student's pass; `site` is that of the progressive schedule."""
    return loss.teacher_ce > 0 or (loss.kl > 0 and loss.teacher == "self" and not site)


def head(cfg: ModelConfig, params: Params) -> losses.Head:
    """Final norm and output head as one function."""
    return lambda hidden: llm.logits(cfg, params["llm"], hidden)


def token_terms(
    cfg: ModelConfig,
    stage: StageConfig,
    params: Params,
    batch: dict[str, Array],
    *,
    teacher: Params | None,
    reads: MethodConfig | None,
    voco_count: Array,
    teacher_count: Array | int,
    key: Array,
    max_targets: int,
) -> tuple[dict[str, Array], Array | None]:
    """Sums over the supervised positions: "ce", "correct", "count", and of what is wanted "kl" and "teacher_ce".

    Args:
        cfg, stage, params, batch, voco_count, key, max_targets: as in `step.train_step`.
        teacher: parameters of a frozen teacher; the model's own do not come in here.
        reads: what a teacher with a budget of its own makes of a picture, of its own `teacher_count` VoCo tokens.
        teacher_count: VoCo tokens in use.

    Returns:
        The sums ("teacher_ce" also without a weight where the teacher shares the pass: how well it still reads), and
        the CLS summary [B*I, D] where a contrastive term wants it.
    """
    wanted = stage.loss
    options = {"voco_count": voco_count, "key": key, "token_dropout": stage.token_dropout}
    options["summary"] = wanted.contrast > 0
    site = stage.progressive.site
    twin = None
    if shares_a_pass(wanted, site):
        out, twin = onepass.forward(cfg, params, batch, stage.method, joint=wanted.teacher_ce > 0, **options)
    else:
        out = vlm.forward(cfg, params, batch, stage.method, **options)
    read, label, valid = losses.targets(out.layout, max_targets)

    def taught(reading: vlm.Forward) -> Array:
        return losses.pick(reading.hidden_BTD, losses.targets(reading.layout, label.shape[1])[0])

    other, own = None, wanted.teacher == "self"
    if wanted.kl > 0 and own and twin is not None:
        other = (taught(twin), head(cfg, params if wanted.teacher_ce > 0 else jax.lax.stop_gradient(params)))
    elif wanted.kl > 0:
        weights = jax.lax.stop_gradient(params) if own else teacher
        other = (taught(_second_pass(cfg, stage, weights, batch, reads, teacher_count, key)), head(cfg, weights))
    terms = losses.token_losses(
        losses.pick(out.hidden_BTD, read),
        label,
        valid,
        head(cfg, params),
        teacher=other,
        teacher_ce=own and twin is not None,
        temperature=wanted.temperature,
        chunk=wanted.chunk,
    )
    if twin is not None and "teacher_ce" not in terms:
        alone = losses.token_losses(taught(twin), label, valid, head(cfg, params), chunk=wanted.chunk)
        terms["teacher_ce"] = alone["ce"]
    return terms, out.summary_BD


def _second_pass(
    cfg: ModelConfig,
    stage: StageConfig,
    weights: Params,
    batch: dict[str, Array],
    reads: MethodConfig | None,
    count: Array | int,
    key: Array,
) -> vlm.Forward:
    (projector,) = weights["projector"]
    if reads is None:
        whole, count = stage.method, 0
        if stage.progressive.site == "projector":
            whole = progressive.at_budget(stage, cfg, max(stage.progressive.budgets))
        reads = dataclasses.replace(whole, **PLAIN, projector=projector)
    elif projectors.weights_name(reads.projector) != projector:
        reads = dataclasses.replace(reads, projector=projector)
    return vlm.forward(cfg, weights, batch, reads, voco_count=count, key=key)
