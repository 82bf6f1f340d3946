"""Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): the step that ToMe and FOLDER are made of.

Tokens at even places look for the most similar token at an odd place; of these pairs the best `removed` merge, into the
odd place, as an average weighted by how many tokens each side already stands for. Every count is a static integer, the
similarities are one [T/2, T/2] product in float32, and what is chosen has no gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.greedy import places
from tokzip_jax.types import Array, VisualTokens

ORDERS = ("raster", "index", "score")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merged:
    """Tokens on their way, some of which stand for several of the S tokens that they were at first.

    Attributes:
        x_BTD: [B, T, D] the tokens.
        size_BT: [B, T] int32, of how many first tokens each is made (a CLS token counts as one).
        place_BT: [B, T] int32, 0 .. S-1, place of the first token that the others were merged into.
        slot_BS: [B, S] int32, for each first token the place of the token it is in now.
    """

    x_BTD: Array
    size_BT: Array
    place_BT: Array
    slot_BS: Array


# What stands between attention and MLP of a block: (tokens, its keys [B, T, H], its CLS row [B, T]) -> fewer tokens.
Between = Callable[[Merged, Array, Array], Merged]


class Pairs(NamedTuple):
    """Which tokens merge; E even places, O odd ones, R removed, U = E - R unmerged even ones, M = T - R left.

    Attributes:
        away_BR, into_BR: the even tokens that leave, by number among the even ones, and the odd ones they join.
        stay_BU: the even tokens that stay.
        order_BM: where in [even that stay, odd] each result is found; None = as they stand there.
        slot_BT: for every token the place of its result.
    """

    away_BR: Array
    into_BR: Array
    stay_BU: Array
    order_BM: Array | None
    slot_BT: Array


def begin(x_BSD: Array) -> Merged:
    """Tokens [B, S, D] of which none has been merged yet."""
    batch, length, _ = x_BSD.shape
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    return Merged(x_BSD, jnp.ones((batch, length), jnp.int32), place, place)


def most(tokens: int, *, protected: bool) -> int:
    """How many of `tokens` one step can remove at most; `protected`: the first one has to stay."""
    return (tokens - int(protected)) // 2


def pair(
    metric_BTH: Array, removed: int, *, protected: bool = False, penalty_BT: Array | None = None, order: str = "index"
) -> Pairs:
    """Match even with odd tokens and choose the pairs that merge.

    Args:
        metric_BTH: [B, T, H] what similarity (cosine) is measured on.
        removed: R, how many merge away, 0 .. (T - protected) // 2.
        protected: the first token (CLS) stays as it is.
        penalty_BT: subtracted from all similarities of an even token: how much it should rather not leave.
        order: "raster", or even tokens before odd ones, those "index" (by place) or "score" (most similar first, as
            ToMe has it for encoders without a CLS token).

    Returns:
        The pairs. Of equal similarities the lower place wins.

    Raises:
        ValueError: R or order out of range.
    """
    batch, length, _ = metric_BTH.shape
    limit = most(length, protected=protected)
    if not 0 <= removed <= limit:
        raise ValueError(f"one step on {length} tokens cannot remove {removed}; it must be 0 .. {limit}")
    if order not in ORDERS:
        raise ValueError(f"order = {order!r} is unknown; choose one of {', '.join(ORDERS)}")
    even, odd = (lax.stop_gradient(metric_BTH[:, start::2]) for start in (0, 1))
    cosine_BEO = ops.cosine(even, odd)
    # The penalty is the source's alone: it says who leaves, never where to.
    best_BE, into_BE = jnp.max(cosine_BEO, axis=2), jnp.argmax(cosine_BEO, axis=2).astype(jnp.int32)
    if penalty_BT is not None:
        best_BE -= lax.stop_gradient(penalty_BT[:, ::2]).astype(jnp.float32)
    if protected:
        best_BE = best_BE.at[:, 0].set(-jnp.inf)
    away_BE = ops.top_mask(best_BE, removed)
    away_BR, stay_BU = ops.partition(away_BE, removed)
    stay_slot_BE = ops.rank(~away_BE)
    if order == "score":
        by_score = jnp.argsort(-best_BE, axis=1, stable=True).astype(jnp.int32)
        stay_BU = by_score[:, removed:]
        stay_slot_BE = jnp.argsort(by_score, axis=1).astype(jnp.int32) - removed
    odd_slot_BO = jnp.broadcast_to(
        stay_BU.shape[1] + jnp.arange(odd.shape[1], dtype=jnp.int32)[None], (batch, odd.shape[1])
    )
    order_BM = None
    if order == "raster":
        place = jnp.concatenate([2 * stay_BU, jnp.broadcast_to(jnp.arange(1, length, 2)[None], odd_slot_BO.shape)], 1)
        order_BM = jnp.argsort(place, axis=1).astype(jnp.int32)
        rank_BT = ops.rank(jnp.ones((batch, length), bool).at[:, ::2].set(~away_BE))
        stay_slot_BE, odd_slot_BO = rank_BT[:, ::2], rank_BT[:, 1::2]
    slot_BE = jnp.where(away_BE, jnp.take_along_axis(odd_slot_BO, into_BE, axis=1), stay_slot_BE)
    slot_BT = jnp.zeros((batch, length), jnp.int32).at[:, ::2].set(slot_BE).at[:, 1::2].set(odd_slot_BO)
    return Pairs(away_BR, jnp.take_along_axis(into_BE, away_BR, axis=1), stay_BU, order_BM, slot_BT)


def pair_valid(
    metric_BTH: Array, count_B1: Array, removed_B1: Array, left: int, *, protected: bool = False, order: str = "index"
) -> Pairs:
    """`pair` for pictures that differ in how many tokens they have: the first ones, behind which padding stands.

    Args:
        metric_BTH: [B, T, H] what similarity is measured on.
        count_B1: [B, 1] int32, 0 .. T, how many tokens exist.
        removed_B1: [B, 1] int32, how many of them merge away, 0 .. (count - protected) // 2.
        left: M, how many slots to return: at least count - removed of every picture, at least T / 2.
        protected: the first token stays as it is.
        order: "raster" or "score", see `pair`; a picture in which nothing merges keeps its order.

    Returns:
        The pairs: first the tokens that are left of those that exist, then as much padding as there is room for.
    """
    batch, length, _ = metric_BTH.shape
    exists_BT = jnp.arange(length)[None] < count_B1
    metric_BTH = lax.stop_gradient(metric_BTH)
    cosine_BEO = jnp.where(exists_BT[:, None, 1::2], ops.cosine(metric_BTH[:, ::2], metric_BTH[:, 1::2]), -jnp.inf)
    best_BE = jnp.where(exists_BT[:, ::2], jnp.max(cosine_BEO, axis=2), -jnp.inf)
    into_BE = jnp.argmax(cosine_BEO, axis=2).astype(jnp.int32)
    if protected:
        best_BE = best_BE.at[:, 0].set(-jnp.inf)
    # Padding ranks behind all even tokens that exist: what is removed is never more than those of them that may go.
    by_score = jnp.argsort(-best_BE, axis=1, stable=True).astype(jnp.int32)
    rank_BE = jnp.argsort(by_score, axis=1).astype(jnp.int32)
    away_BE = rank_BE < removed_B1
    evens = rank_BE.shape[1]
    place_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    key_BT = place_BT
    if order == "score":
        key_BT = key_BT.at[:, ::2].set(rank_BE).at[:, 1::2].set(evens + place_BT[:, 1::2] // 2)
        key_BT = jnp.where(removed_B1 == 0, place_BT, key_BT)
    key_BT = jnp.where(exists_BT, key_BT, length + place_BT)
    key_BT = key_BT.at[:, ::2].set(jnp.where(away_BE, 3 * length, key_BT[:, ::2]))
    by_key = jnp.argsort(key_BT, axis=1, stable=True).astype(jnp.int32)
    slot_BT = jnp.argsort(by_key, axis=1).astype(jnp.int32)
    joined_BE = jnp.take_along_axis(slot_BT[:, 1::2], into_BE, axis=1)
    slot_BT = slot_BT.at[:, ::2].set(jnp.where(away_BE, joined_BE, slot_BT[:, ::2]))
    away_BR = by_score[:, : length - left]
    into_BR = jnp.where(
        jnp.take_along_axis(away_BE, away_BR, axis=1), jnp.take_along_axis(into_BE, away_BR, axis=1), -1
    )
    return Pairs(
        away_BR=away_BR,
        into_BR=into_BR,
        stay_BU=place_BT[:, :evens],  # all of them, for `order_BM` chooses among them
        order_BM=(by_key // 2 + evens * (by_key % 2))[:, :left],
        slot_BT=jnp.minimum(slot_BT, left - 1),
    )


def reduce_valid(
    patches_BPD: Array, metric_BPH: Array, valid_BP: Array, tokens: int, *, spare: bool, protected: bool, order: str
) -> VisualTokens:
    """Merge the valid patches of each picture to at most `tokens`, in steps of up to a half, as if they were alone.

    Args:
        patches_BPD: [B, P, D] features; what stands in the padding is not read.
        metric_BPH: [B, P, H] what similarity is measured on; averaged between two steps as the features are.
        valid_BP: [B, P] bool.
        tokens: M, 1 .. P; with `spare` 2 .. P.
        spare: a step removes up to (t - 1) // 2 of t tokens; else up to t // 2.
        protected: the first valid patch never leaves; only with `spare`.
        order: "raster" or "score", see `pair`.

    Returns:
        `VisualTokens` with tokens in float32, empty slots at the end; a picture that has no more than `tokens` valid
        patches keeps them all, in raster order.
    """
    patches = valid_BP.shape[1]
    count_B1 = jnp.sum(valid_BP, axis=1, keepdims=True, dtype=jnp.int32)
    # Even and odd places are those among the valid patches: these go to the front first.
    front_BP, filled_BP = places(valid_BP, patches)
    x_BPD, metric = (
        jnp.where(filled_BP[:, :, None], ops.gather(x, front_BP), 0)
        for x in (patches_BPD.astype(jnp.float32), metric_BPH)
    )
    state, length = begin(x_BPD), patches
    # With fewer patches every step leaves fewer or as many: the steps that all patches need are enough for any picture.
    while length > tokens:
        left = max(length - most(length, protected=spare), tokens)
        removed_B1 = jnp.maximum(jnp.minimum((count_B1 - int(spare)) // 2, count_B1 - tokens), 0)
        pairs = pair_valid(metric, count_B1, removed_B1, left, protected=protected, order=order)
        metric = mean(pairs, metric, state.size_BT)
        state, count_B1, length = merge(state, pairs), count_B1 - removed_B1, left
    valid_BM = jnp.arange(tokens)[None] < count_B1
    return VisualTokens(
        tokens_BMD=jnp.where(valid_BM[:, :, None], state.x_BTD, 0.0),
        valid_BM=valid_BM,
        position_BM=jnp.where(valid_BM, jnp.take_along_axis(front_BP, state.place_BT, axis=1), -1),
        size_BM=jnp.where(valid_BM, state.size_BT, 0),
        source_BP=jnp.where(valid_BP, jnp.take_along_axis(state.slot_BS, ops.rank(valid_BP), axis=1), -1),
    )


def add_up(pairs: Pairs, x_BTC: Array) -> Array:
    """Sums over each result's members, [B, T, C] -> [B, M, C] float32.

    Only the R tokens that leave are multiplied by a one-hot matrix; the others are copied.
    """
    x = x_BTC.astype(jnp.float32)
    even, odd = x[:, ::2], x[:, 1::2]
    arriving, _ = ops.group_sum(ops.gather(even, pairs.away_BR), pairs.into_BR, odd.shape[1])
    return _arrange(pairs, even, odd + arriving)


def mean(pairs: Pairs, x_BTC: Array, size_BT: Array) -> Array:
    """Averages weighted by size over each result's members, [B, T, C] -> [B, M, C] float32."""
    size = size_BT[:, :, None].astype(jnp.float32)
    return add_up(pairs, x_BTC.astype(jnp.float32) * size) / add_up(pairs, size)


def merge(tokens: Merged, pairs: Pairs) -> Merged:
    """The tokens after one step: averages weighted by size, in the tokens' dtype."""
    place = tokens.place_BT[:, :, None]
    return Merged(
        x_BTD=mean(pairs, tokens.x_BTD, tokens.size_BT).astype(tokens.x_BTD.dtype),
        size_BT=add_up(pairs, tokens.size_BT[:, :, None])[:, :, 0].astype(jnp.int32),
        place_BT=_arrange(pairs, place[:, ::2], place[:, 1::2])[:, :, 0],
        slot_BS=jnp.take_along_axis(pairs.slot_BT, tokens.slot_BS, axis=1),
    )


def finish(tokens: Merged, *, cls: bool) -> VisualTokens:
    """What a projector reads: all slots valid, without the CLS token (which always stands first, alone)."""
    first = int(cls)
    return VisualTokens(
        tokens_BMD=tokens.x_BTD[:, first:],
        valid_BM=jnp.ones(tokens.size_BT[:, first:].shape, bool),
        position_BM=tokens.place_BT[:, first:] - first,
        size_BM=tokens.size_BT[:, first:],
        source_BP=tokens.slot_BS[:, first:] - first,
    )


def _arrange(pairs: Pairs, even_BEC: Array, odd_BOC: Array) -> Array:
    out = jnp.concatenate([ops.gather(even_BEC, pairs.stay_BU), odd_BOC], axis=1)
    return out if pairs.order_BM is None else ops.gather(out, pairs.order_BM)
