"""One training step and one scoring step.

`train_step` calls `gradients`, and that differentiates `loss_terms`: nothing else stands between entry and loss.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tokzip_jax import distill, llm, lora, losses, vlm
from tokzip_jax.config import MethodConfig, ModelConfig, StageConfig
from tokzip_jax.masks import TABLES
from tokzip_jax.paths import flatten, nest
from tokzip_jax.types import Array, Params, VisualTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training needs to go on.

    Attributes:
        step: int32 scalar, steps done.
        params: the whole model; frozen parts pass through unchanged.
        opt_state: of the trained parameters only.
    """

    step: Array
    params: Params
    opt_state: Any


def partition(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """Split into the parameters that train (path fully matches one of the patterns) and the frozen ones."""
    flat = flatten(params)
    trained = {p: leaf for p, leaf in flat.items() if any(re.fullmatch(pattern, p) for pattern in patterns)}
    return nest(trained), nest({p: leaf for p, leaf in flat.items() if p not in trained})


def merge(first: Params, second: Params) -> Params:
    """Join two disjoint trees."""
    return nest({**flatten(first), **flatten(second)})


def caption_embedding(params: Params, captions: Array) -> Array:
    """The text side of the contrastive loss: mean token embedding of a caption [B, C], projected to [B, E]."""
    real = (captions > 0)[:, :, None]
    total = jnp.sum(jnp.where(real, params["llm"]["embed"]["table"][captions], 0), axis=1)
    return (total / jnp.maximum(jnp.sum(real, axis=1), 1)) @ params["contrast"]["text"]["w"]


def loss_terms(
    cfg: ModelConfig,
    stage: StageConfig,
    params: Params,
    batch: dict[str, Array],
    *,
    teacher: Params | None,
    reads: MethodConfig | None = None,
    voco_count: Array,
    teacher_count: Array | int = 0,
    key: Array,
    max_targets: int,
) -> dict[str, Array]:
    """Every term of a stage's loss on one batch: sums over tokens (see `distill.token_terms`), means ("contrast").

    What no term needs is not run: a stage with the contrastive term alone stops behind the vision tower.
    """
    wanted = stage.loss
    if wanted.kl > 0 and wanted.teacher == "frozen" and teacher is None and stage.lora.rank:
        teacher, _ = lora.split(params)  # without its deltas the model is what it was at the beginning
    elif teacher is not None:
        teacher = lora.attach(teacher, stage.lora)
    params = lora.attach(params, stage.lora)
    if wanted.ce + wanted.kl + wanted.teacher_ce == 0:
        text = vlm.question(cfg, batch, stage.method)
        _, summary = vlm.encode(cfg, params, batch["images"], stage.method, key, summary=True, text=text)
        return {"contrast": contrast_term(params, batch, summary)}
    terms, summary = distill.token_terms(
        cfg,
        stage,
        params,
        batch,
        teacher=teacher,
        reads=reads,
        voco_count=voco_count,
        teacher_count=teacher_count,
        key=key,
        max_targets=max_targets,
    )
    return terms | ({"contrast": contrast_term(params, batch, summary)} if wanted.contrast > 0 else {})


def contrast_term(params: Params, batch: dict[str, Array], summary_BD: Array) -> Array:
    """The contrastive loss between the CLS summary [B*I, D] of each row's first picture and its caption."""
    rows, images = batch["images"].shape[:2]
    first_BD = summary_BD.reshape(rows, images, -1)[:, 0]
    contrast = params["contrast"]
    text = caption_embedding(params, batch["captions"])
    return losses.contrastive(first_BD @ contrast["image"]["w"], text, contrast["scale"])


def total_loss(stage: StageConfig, terms: dict[str, Array], count: Array, parts: int) -> Array:
    """The weighted sum: token terms over the supervised positions of the whole step, the contrastive one over parts."""
    loss = jnp.zeros((), jnp.float32)
    if "ce" in terms:
        loss += stage.loss.ce * terms["ce"] / count
    if "kl" in terms:
        loss += stage.loss.kl * terms["kl"] / count
    if stage.loss.teacher_ce > 0:
        loss += stage.loss.teacher_ce * terms["teacher_ce"] / count
    if "contrast" in terms:
        loss += stage.loss.contrast * terms["contrast"] / parts
    return loss


def gradients(
    cfg: ModelConfig,
    stage: StageConfig,
    params: Params,
    batch: dict[str, Array],
    *,
    teacher: Params | None,
    reads: MethodConfig | None = None,
    voco_count: Array,
    teacher_count: Array | int = 0,
    key: Array,
    max_targets: int,
) -> tuple[Params, dict[str, Array]]:
    """Gradients of the trained parameters and the metrics of one step, in `optim.accumulate` parts.

    Token terms are divided by the supervised positions of the whole batch, so that parts of different fullness give the
    same gradient as the batch in one piece. The contrastive loss compares the pictures of a part with one another.
    """
    trained, frozen = partition(params, stage.train)
    parts = stage.optim.accumulate
    count = jnp.maximum(jnp.sum(batch["supervised"] & (batch["sample"] > 0)), 1).astype(jnp.float32)
    # One a row, so that every row keeps its own in whichever part it comes to lie.
    batch = {**batch, "voco_count": jnp.broadcast_to(voco_count, batch["ids"].shape[:1])}

    def loss_fn(trained: Params, part: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        terms = loss_terms(
            cfg,
            stage,
            merge(trained, frozen),
            part,
            teacher=teacher,
            reads=reads,
            voco_count=part["voco_count"],
            teacher_count=teacher_count,
            key=key,
            max_targets=max_targets,
        )
        loss = total_loss(stage, terms, count, parts)
        return loss, {"loss": loss, **terms}

    grad = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        grads, metrics = grad(trained, batch, key)
    else:
        # Every part takes rows from everywhere, so that a batch sharded over devices stays where it is.
        cut = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, parts)
        shapes = jax.eval_shape(grad, trained, jax.tree.map(lambda leaf: leaf[0], cut), key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(sums: Any, part: tuple[dict[str, Array], Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, grad(trained, *part)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, (cut, keys))
    means = {"loss": metrics["loss"], "tokens": count}
    means |= {n: metrics[n] / count for n in ("ce", "kl", "teacher_ce") if n in metrics}
    if "correct" in metrics:
        means["accuracy"] = metrics["correct"] / count
    if "contrast" in metrics:
        means["contrast"] = metrics["contrast"] / parts
    return grads, means


def train_step(
    cfg: ModelConfig,
    stage: StageConfig,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: dict[str, Array],
    *,
    teacher: Params | None = None,
    reads: MethodConfig | None = None,
    voco_count: Array,
    teacher_count: Array | int = 0,
    key: Array,
    max_targets: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of a stage. Everything but `state`, `batch`, `teacher`, `voco_count` and `key` is static under jit.

    Args:
        cfg, stage, tx: model, stage, and an optimiser over the trained parameters.
        state: where the training stands.
        batch: rows, see `data.pipeline`.
        teacher: frozen parameters for the KL term; None with LoRA: the model without its deltas.
        reads, teacher_count: the method and VoCo tokens of a teacher with a budget of its own (static, int32 scalar).
        voco_count: VoCo tokens in use in this step, an int32 scalar, or [B] for every row its own.
        key: the stage's random key; folded with the step number here.
        max_targets: the most supervised positions of a row.

    Returns:
        The next state, and float32 metrics "loss", "grad_norm", "tokens" (supervised ones), and of the terms that are
        on "ce", "kl", "teacher_ce", "contrast", "accuracy".
    """
    grads, metrics = gradients(
        cfg,
        stage,
        state.params,
        batch,
        teacher=teacher,
        reads=reads,
        voco_count=voco_count,
        teacher_count=teacher_count,
        key=jax.random.fold_in(key, state.step),
        max_targets=max_targets,
    )
    trained, frozen = partition(state.params, stage.train)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    params = merge(optax.apply_updates(trained, updates), frozen)
    metrics["grad_norm"] = optax.tree.norm(grads)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def score_step(
    cfg: ModelConfig, method: MethodConfig, params: Params, batch: dict[str, Array], **options: Any
) -> Array:
    """Which questions would be answered exactly, [B, questions] bool; arguments as in `answers`."""
    return answers(cfg, method, params, batch, **options)[0]


def answers(
    cfg: ModelConfig,
    method: MethodConfig,
    params: Params,
    batch: dict[str, Array],
    *,
    table: Array | None = None,
    voco_count: Array | None = None,
    key: Array | None = None,
    questions: int,
    max_targets: int,
    visual: VisualTokens | None = None,
    turns: bool = False,
) -> tuple[Array, Array]:
    """Which questions a greedy decode would answer exactly, without decoding, and how each answer would begin.

    A greedy decode writes the given answer exactly when, with that answer as input, the arg-max at each of its
    positions is the next of its tokens (its end included). So one pass scores all questions packed into a row.

    Args:
        cfg, method, params, batch: the model and eval rows, see `data.pipeline`.
        table, voco_count, key, visual: as in `vlm.forward`.
        questions: the most questions of a row; question q is thread q.
        max_targets: the most supervised positions of a row.
        turns: what reads the question chooses by the first one of a row, and the others have to do with its choice.

    Returns:
        [B, questions] bool, False where there is no such question; and [B, questions, V] the logits of every answer's
        first token, read behind its question, which has seen nothing of the answer (without meaning where there is no
        such question).

    Raises:
        ValueError: several questions a row, and a decoder site that chooses by one.
    """
    if method.decoder != "none" and questions > 1 and not turns:
        raise ValueError(
            f"{questions} questions a row, but decoder = {method.decoder!r} chooses by one: data.questions must be 1"
        )
    out = vlm.forward(cfg, params, batch, method, table=table, voco_count=voco_count, key=key, visual=visual)
    read, label, valid = losses.targets(out.layout, max_targets)
    logits = llm.logits(cfg, params["llm"], losses.pick(out.hidden_BTD, read))
    hit = jnp.argmax(logits, axis=-1) == label
    index = jnp.argsort(~out.layout.supervised, axis=1, stable=True)[:, : label.shape[1]]
    thread = jnp.take_along_axis(out.layout.stream.thread, index, axis=1)
    of_question = valid[:, :, None] & (thread[:, :, None] == jnp.arange(1, questions + 1)[None, None])
    right = jnp.any(of_question, axis=1) & ~jnp.any(of_question & ~hit[:, :, None], axis=1)
    first = jnp.argmax(of_question, axis=1)
    return right, jnp.take_along_axis(logits, first[:, :, None], axis=1)


def mask_table(method: MethodConfig) -> Array:
    """The visibility table of a method, as an argument for a jitted step."""
    return jnp.asarray(TABLES[method.voco_mask])
