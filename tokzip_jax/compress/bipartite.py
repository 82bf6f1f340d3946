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
