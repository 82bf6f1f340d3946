"""One model for every number k of VoCo tokens: training with k drawn at random, and k chosen by what is asked.

Elastic training inserts another number of VoCo tokens in every step or row; slots that are not used are padding, so
that one program serves all numbers. VoCo-LLaMA (arXiv 2406.12275, table 4) finds that a model trained with 32 tokens
can be read with fewer; here every number is met in training.

A VoCo token sees only those before it, so the cache of k tokens is the first part of the cache of k_max: stage one
runs once, with k_max, and how many tokens to read can be decided in stage two. The decision looks at the model's own
distribution over the first answer token, given the question, at every k of a ladder. It knows no right answer.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import generate, step, voco
from tokzip_jax.config import AutoConfig, MethodConfig, ModelConfig, StageConfig
from tokzip_jax.types import PAD, VOCO, Array, Params
from tokzip_jax.voco import VocoCache

DRAWS = ("turn", "random", "row")
MEASURES = ("kl", "probability")
AGAINST = ("largest", "next")
PER = ("question", "picture")
# Sets this draw apart from everything else that is drawn from a stage's key and a step's number.
SALT = zlib.crc32(b"voco_draw")


def _one_of(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{key} = {value!r} is unknown; choose one of {', '.join(map(repr, names))}")


def check_draw(key: str, stage: StageConfig) -> None:
    """Refuse a draw without anything to draw from; `key` is the stage's dotted place in the config.

    Raises:
        ValueError: naming the key and what is valid.
    """
    _one_of(f"{key}.voco_draw", stage.voco_draw, DRAWS)
    if stage.voco_draw != "turn" and stage.progressive.site:
        raise ValueError(
            f"{key}.voco_draw = {stage.voco_draw!r} goes with no schedule of {key}.progressive, which sets the "
            "numbers; it must be 'turn'"
        )
    if stage.voco_draw != "turn" and not stage.voco_counts:
        raise ValueError(
            f"{key}.voco_draw = {stage.voco_draw!r} has nothing to draw from; name numbers of VoCo tokens up to "
            f"{key}.method.voco = {stage.method.voco} in {key}.voco_counts"
        )
    if any(0 < count < stage.method.voco for count in stage.voco_counts):
        _check_start(f"{key}.voco_counts = {stage.voco_counts} uses", f"{key}.method", stage.method)


def _check_start(uses: str, key: str, method: MethodConfig) -> None:
    """Refuse fewer tokens than parts of a picture: the first ones would start from its upper parts alone."""
    if method.voco_start != "embedding":
        raise ValueError(
            f"{uses} fewer than the {method.voco} VoCo tokens that {key}.voco_start = {method.voco_start!r} starts "
            f"from a part of the picture each: {key}.voco_start must be 'embedding'"
        )


def check_auto(key: str, auto: AutoConfig, method: MethodConfig) -> None:
    """Refuse a ladder that cannot be climbed; `key` is the row's dotted place in the config.

    Raises:
        ValueError: naming the key and what is valid.
    """
    if not auto.ladder:
        if auto != AutoConfig():
            raise ValueError(f"{key}.auto has no ladder: name numbers of VoCo tokens in {key}.auto.ladder")
        return
    if method.voco_mask == "visible":
        raise ValueError(
            f"{key}.auto.ladder is for questions that read VoCo tokens alone: {key}.method.voco_mask = 'visible' lets "
            "them read the picture; use 'voco' or 'prefix_visible'"
        )
    rising = all(low < high for low, high in zip(auto.ladder, auto.ladder[1:]))
    if not rising or auto.ladder[0] < 1 or auto.ladder[-1] != method.voco:
        raise ValueError(
            f"{key}.auto.ladder = {auto.ladder} must rise from at least 1 to {key}.method.voco = {method.voco}"
        )
    if len(auto.ladder) > 1:
        _check_start(f"{key}.auto.ladder = {auto.ladder} reads", f"{key}.method", method)
    if not 0 <= auto.threshold < math.inf:
        raise ValueError(f"{key}.auto.threshold = {auto.threshold} must be >= 0 and finite")
    _one_of(f"{key}.auto.measure", auto.measure, MEASURES)
    _one_of(f"{key}.auto.against", auto.against, AGAINST)
    _one_of(f"{key}.auto.per", auto.per, PER)


def draw(stage: StageConfig, key: Array, number: Array, rows: int) -> Array:
    """VoCo tokens in use in step `number` (from 0), drawn evenly from `stage.voco_counts`; name one twice to favour it.

    Args:
        stage: with `voco_draw` "random" (all rows alike) or "row" (each its own).
        key: the stage's key; the draw follows from it and the step's number alone.
        number: int32 scalar.
        rows: B.

    Returns:
        int32, a scalar or [B].

    Raises:
        ValueError: nothing to draw from, or another kind of draw.
    """
    if stage.voco_draw not in ("random", "row") or not stage.voco_counts:
        raise ValueError(
            f"voco_draw={stage.voco_draw!r} with voco_counts={stage.voco_counts} is no draw; it takes 'random' or "
            "'row' and at least one number"
        )
    key = jax.random.fold_in(jax.random.fold_in(key, SALT), number)
    return jax.random.choice(
        key, jnp.asarray(stage.voco_counts, jnp.int32), shape=() if stage.voco_draw == "random" else (rows,)
    )


def first(cache: VocoCache, count: Array | int) -> VocoCache:
    """The cache that stage one would have given with `count` VoCo tokens: the first ones of a larger cache.

    Exact, because a VoCo token sees only those before it. Text goes on behind the last one that is left.

    Args:
        cache: of one picture a row.
        count: a number or one a row [B], at least 1. With a Python int under the mask "voco" the other slots are cut
            off, and the cache is as small as that number of tokens; else they are marked as unused.

    Raises:
        ValueError: a cache of several pictures, whose later ones would have to move (not seen under jit): take the
            first tokens of each before `voco.join`; a count below 1, or above what the cache holds (an int, and not
            seen under jit).
    """
    if isinstance(count, int) and count < 1:
        raise ValueError(f"count={count} must be >= 1: text that sees no VoCo token sees nothing of the picture")
    if not isinstance(cache.segment, jax.core.Tracer) and cache.segment.max() > 1:
        raise ValueError("the cache holds several pictures: take the first tokens of each one before they are joined")
    is_voco = cache.kind == VOCO
    if isinstance(count, int) and not isinstance(is_voco, jax.core.Tracer):
        held = int(is_voco.sum(axis=1).max())
        if count > held:
            raise ValueError(f"count={count}, but the cache holds {held} VoCo tokens of a picture: give at most that")
    count_B = jnp.broadcast_to(jnp.asarray(count, jnp.int32), cache.kind.shape[:1])
    used = (cache.kind != PAD) & (~is_voco | (jnp.cumsum(is_voco, axis=1) <= count_B[:, None]))
    kept = dataclasses.replace(
        cache,
        kind=jnp.where(used, cache.kind, PAD),
        segment=jnp.where(used, cache.segment, 0),
        position=jnp.where(used, cache.position, 0),
        next_position=jnp.max(jnp.where(used, cache.position + 1, 0), axis=1),
    )
    if not isinstance(count, int) or cache.voco_mask != "voco":
        return kept
    ints = {name: getattr(kept, name)[:, :count] for name in ("kind", "segment", "position")}
    return dataclasses.replace(kept, k=kept.k[:, :, :, :count], v=kept.v[:, :, :, :count], **ints)


def changes(log_probs_RXV: Array, *, measure: str = "kl", against: str = "largest") -> Array:
    """How far each rung of a ladder is from the distribution that it is held against: [R, X] float32, >= 0.

    Args:
        log_probs_RXV: log probabilities of the first answer token of X questions, at R ascending numbers of tokens.
        measure: "kl", KL(reference || rung) in nats, or "probability", the largest difference of one probability.
        against: the reference, the "largest" number or the "next" one. The last rung is its own and changes by 0.
    """
    reference = log_probs_RXV[-1:] if against == "largest" else jnp.concatenate([log_probs_RXV[1:], log_probs_RXV[-1:]])
    return _change(reference, log_probs_RXV, measure)


def _change(reference: Array, rung: Array, measure: str) -> Array:
    if measure == "probability":
        return jnp.max(jnp.abs(jnp.exp(reference) - jnp.exp(rung)), axis=-1)
    # Rounding may leave a sum a little below 0, which no divergence is.
    return jnp.maximum(jnp.sum(jnp.exp(reference) * (reference - rung), axis=-1), 0)


def choose(change_RX: Array, threshold: Array | float) -> Array:
    """[X] the first rung that changes by no more than the threshold.

    A threshold of 0 gives the last rung, unless an earlier one changes nothing at all; an infinite one the first rung.
    A larger threshold never gives a later rung. Held against the "next" number this is climbing: no rung behind the
    one after the chosen has to be read.
    """
    return jnp.argmax(change_RX <= threshold, axis=0)


def ask(
    cfg: ModelConfig,
    params: Params,
    cache: VocoCache,
    ids: Array,
    auto: AutoConfig,
    *,
    max_new: int,
    blocks: tuple[Params, ...] | None = None,
) -> tuple[generate.Prompt, Array]:
    """Stage two with as many VoCo tokens as a question needs; continue with `generate.decode`.

    The questions are read once a rung, all in one batch; stage one is not run again. What is left of the prompt is the
    reading with the chosen number.

    Args:
        cfg, params, cache, ids, max_new, blocks: as in `voco.ask`; the cache of one picture a row, with at least
            `auto.ladder[-1]` VoCo tokens.
        auto: ladder, threshold and measure.

    Returns:
        The prompt of B questions, and the chosen numbers [B] int32.

    Raises:
        ValueError: no ladder, or what `first` and `voco.ask` raise.
    """
    if not auto.ladder:
        raise ValueError("auto.ladder is empty: name the numbers of VoCo tokens to choose from")
    rungs, rows = len(auto.ladder), ids.shape[0]
    ladder = jnp.asarray(auto.ladder, jnp.int32)
    if cache.kind.shape[0] != rows:
        raise ValueError(f"{rows} questions need as many cache rows, not {cache.kind.shape[0]}: use cache.take([...])")
    many = first(cache.take(jnp.tile(jnp.arange(rows), rungs)), jnp.repeat(ladder, rows))
    prompt = voco.ask(cfg, params, many, jnp.tile(ids, (rungs, 1)), max_new=max_new, blocks=blocks)
    log_probs = jax.nn.log_softmax(prompt.logits_BV.astype(jnp.float32)).reshape(rungs, rows, -1)
    rung = choose(changes(log_probs, measure=auto.measure, against=auto.against), auto.threshold)
    picked = rung * rows + jnp.arange(rows)

    def of_rows(leaf: Array) -> Array:
        return leaf[picked]

    def of_heads(leaf: Array) -> Array:
        return jnp.take(leaf, picked, axis=leaf.ndim - 4)  # [L, B, K, S, H], or a tuple of layers without L

    def of_stage(stage: generate.Stage) -> generate.Stage:
        cache = dataclasses.replace(
            stage.cache,
            k=jax.tree.map(of_heads, stage.cache.k),
            v=jax.tree.map(of_heads, stage.cache.v),
            stream=jax.tree.map(of_rows, stage.cache.stream),
        )
        return dataclasses.replace(stage, cache=cache, last=jax.tree.map(of_rows, stage.last))

    stages = tuple(map(of_stage, prompt.stages))
    return dataclasses.replace(prompt, stages=stages, logits_BV=prompt.logits_BV[picked]), ladder[rung]


def score_step(
    cfg: ModelConfig,
    method: MethodConfig,
    params: Params,
    batch: dict[str, Array],
    auto: AutoConfig,
    *,
    table: Array | None = None,
    key: Array | None = None,
    questions: int,
    max_targets: int,
) -> tuple[Array, Array]:
    """`step.score_step` at every rung of a ladder, and what `choose` needs to pick one: ([R, B, questions],) twice.

    The masked pass is run once a rung, from the largest down, so that two distributions are held and not R.

    Args:
        cfg, method, params, batch, table, key, questions, max_targets: as in `step.score_step`.
        auto: ladder, measure and reference; the threshold is not read.

    Returns:
        right, bool: whether the answer would be exact with so many tokens; change, float32, see `changes`.
    """
    options = {"table": table, "key": key, "questions": questions, "max_targets": max_targets}

    def rung(above: tuple[Array, Array], count: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        right, logits = step.answers(cfg, method, params, batch, voco_count=count, **options)
        found = jax.nn.log_softmax(logits.astype(jnp.float32))
        begun, reference = above
        reference = jnp.where(begun, reference, found)
        change = _change(reference, found, auto.measure)
        return (jnp.bool_(True), reference if auto.against == "largest" else found), (right, change)

    start = jnp.zeros((batch["ids"].shape[0], questions, cfg.llm.vocab_size), jnp.float32)
    down = jnp.asarray(auto.ladder[::-1], jnp.int32)
    _, (right, change) = jax.lax.scan(rung, (jnp.bool_(False), start), down)
    return right[::-1], change[::-1]


def pick(
    right_RX: np.ndarray, change_RX: np.ndarray, auto: AutoConfig, picture_X: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `score_step` found at the chosen rung of X questions.

    Args:
        right_RX, change_RX: entries of its results, all of a split: a picture's questions may stand in several rows.
        auto: ladder, threshold, and whether questions or pictures choose.
        picture_X: int, which picture a question is about.

    Returns:
        right [X] bool, and the number of tokens [X].
    """
    rung = np.asarray(choose(change_RX, auto.threshold))
    if auto.per == "picture":
        most = np.zeros(int(np.max(picture_X, initial=0)) + 1, rung.dtype)
        np.maximum.at(most, picture_X, rung)
        rung = most[picture_X]
    return np.take_along_axis(np.asarray(right_RX), rung[None], axis=0)[0], np.asarray(auto.ladder)[rung]
