"""VisPruner (arXiv 2412.01818, ICCV 2025): what the CLS token looks at, and of the rest what is unlike the rest.

A part of the budget goes to the patches with the highest CLS attention. The others, best first, form a list from which
duplicates are taken a few at a time until the rest of the budget is left: even places look for the most similar odd
place, and the up to `step` even ones with the best match are dropped. Nothing is merged; kept patches stay as they are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, Selecting, Tower, option
from tokzip_jax.compress.greedy import check_shape, fill
from tokzip_jax.compress.select import best
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def check_budget(patches: int, tokens: int, *, important: float = 0.5, step: int = 8) -> None:
    """Refuse a budget that `patches` patches cannot give, and options out of range.

    Raises:
        ValueError: names the number and its range.
    """
    if not 1 <= tokens <= patches:
        raise ValueError(f"VisPruner: {tokens} tokens asked of {patches} patches; it must be 1 .. {patches}")
    if not 0.0 <= important <= 1.0:
        raise ValueError(f"VisPruner: important = {important}, a share of the tokens, must be 0 .. 1")
    if step < 1:
        raise ValueError(f"VisPruner: step = {step} must be at least 1")


def rounds(rest: int, diverse: int, step: int) -> tuple[int, ...]:
    """How many each round drops from a list of `rest` until `diverse` are left; a round can drop even places only."""
    counts = []
    while rest > diverse:
        counts.append(min(step, rest - diverse, (rest + 1) // 2))
        rest -= counts[-1]
    return tuple(counts)


@functools.partial(jax.jit, static_argnames=("tokens", "important", "step"))
def vispruner(
    patches_BPD: Array,
    cls_attention_BP: Array,
    *,
    tokens: int,
    important: float = 0.5,
    step: int = 8,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Keep `tokens` patches.

    Args:
        patches_BPD: [B, P, D] patch features, for CLIP the output of the second-to-last block.
        cls_attention_BP: [B, P] softmax attention of the CLS token in that block, sum or mean over heads.
        tokens: 1 .. P.
        important: share of them chosen by attention, rounded down.
        step: how many duplicates a round drops at most.
        valid_BP: [B, P] bool, see `greedy`: the list is of the valid patches alone; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order, sizes 1; the other patches are dropped. Of equal scores the one
        that stands first wins: by attention the lower patch, by similarity the one earlier in the list. With
        important = 1 only attention counts.

    Raises:
        ValueError: a number out of range, or scores or a mask of another shape.
    """
    batch, patches, _ = patches_BPD.shape
    check_budget(patches, tokens, important=important, step=step)
    if cls_attention_BP.shape != (batch, patches):
        raise ValueError(
            f"VisPruner: scores have shape {cls_attention_BP.shape}; {patches} patches need {(batch, patches)}"
        )
    first = int(tokens * important)
    counts = rounds(patches - first, tokens - first, step)
    score_BP = lax.stop_gradient(cls_attention_BP).astype(jnp.float32)
    if tokens == first or not counts:
        return best("VisPruner", patches_BPD, score_BP, valid_BP, tokens)
    if valid_BP is not None:
        check_shape("VisPruner", "valid", valid_BP.shape, (batch, patches))
        score_BP = jnp.where(valid_BP, score_BP, -jnp.inf)
    chosen_BP = ops.top_mask(score_BP, first)
    # Place in the list by attention; what is not in the list any more has none.
    by_score = jnp.argsort(-jnp.where(jnp.isnan(score_BP), -jnp.inf, score_BP), axis=1, stable=True)
    place_BP = jnp.where(chosen_BP, patches, jnp.argsort(by_score, axis=1) - first).astype(jnp.int32)
    features_BPD = lax.stop_gradient(patches_BPD)
    similarity_BPP = ops.cosine(features_BPD, features_BPD)
    run = functools.partial(_round, similarity_BPP)
    if valid_BP is None:
        place_BP, _ = lax.scan(run, place_BP, jnp.asarray(np.array(counts, np.int32)))
        return ops.keep(patches_BPD, chosen_BP | (place_BP < patches), tokens)

    def count_and_run(place_BP: Array, _: None) -> tuple[Array, None]:
        listed_B1 = jnp.sum(place_BP < patches, axis=1, keepdims=True, dtype=jnp.int32)
        most_B1 = jnp.minimum(jnp.minimum(step, listed_B1 - (tokens - first)), (listed_B1 + 1) // 2)
        return run(place_BP, jnp.maximum(most_B1, 0))

    # A shorter list is done no later than that of all patches; a round that drops nothing changes no membership.
    place_BP, _ = lax.scan(count_and_run, jnp.where(valid_BP, place_BP, patches), None, length=len(counts))
    return fill(patches_BPD, (chosen_BP & valid_BP) | (place_BP < patches), tokens)


def _round(similarity_BPP: Array, place_BP: Array, count: Array) -> tuple[Array, None]:
    """One round: [B, P] places in the list -> places in the list that `count` fewer patches make; P = none.

    `count` is one for all pictures, or [B, 1].

    All P x P similarities are looked at through a mask, which a compiler fuses into one pass over them; the list itself
    is never gathered.
    """
    gone = place_BP.shape[1]
    listed_BP = place_BP < gone
    even_BP, odd_BP = listed_BP & (place_BP % 2 == 0), listed_BP & (place_BP % 2 == 1)
    best_BP = jnp.max(jnp.where(odd_BP[:, None, :], similarity_BPP, -jnp.inf), axis=2)
    # The new list: even ones by falling similarity without the first `count`, then the odd ones as they stood.
    key_BP = jnp.where(even_BP, -best_BP, jnp.inf)
    order_BP = jnp.lexsort((place_BP, key_BP), axis=1)
    rank_BP = jnp.argsort(order_BP, axis=1).astype(jnp.int32)
    stays = jnp.sum(even_BP, axis=1, keepdims=True, dtype=jnp.int32) - count
    place_BP = jnp.where(even_BP, rank_BP - count, jnp.where(odd_BP, stays + place_BP // 2, gone))
    return jnp.where(place_BP < 0, gone, place_BP), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See `vispruner`."""

    important: float = option(0.5, low=0.0, high=1.0)
    step: int = option(8, low=1)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    attention_BP = features.signals["cls_attention_BP"]
    important, step = ask.options.important, ask.options.step
    return vispruner(features.patches_BPD, attention_BP, tokens=ask.tokens, important=important, step=step)


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    check_budget(tower.patches, tokens, important=options.important, step=options.step)


ENTRIES = {
    "vispruner": Encoder(
        function=_apply,
        budget=_budget,
        options=Options,
        signals=("cls_attention_BP",),
        cls=True,
        classes=("attention", "similarity"),
        reads="CLS attention, patches",
        source="arXiv 2412.01818",
    )
}
