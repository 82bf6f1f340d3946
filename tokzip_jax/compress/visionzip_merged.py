"""VisionZip for encoders that merge patches (the released Qwen2.5-VL version of arXiv 2412.04467).

Such an encoder has no CLS token and hands on one token for each group of patches (2 x 2). The score of a group is the
attention that its patches receive in the last block, its key the mean of their rotated keys; from there on it is
VisionZip: dominant groups are kept, of the others a few become targets and the rest joins the target whose key is most
alike. A merged token takes the place of its target: what is kept stays in raster order, at its original positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, Tower, option
from tokzip_jax.compress.greedy import check_shape, in_raster_order
from tokzip_jax.compress.visionzip import MERGES, TARGETS, visionzip
from tokzip_jax.compress.visionzip import check_budget as check_visionzip
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def check_budget(groups: int, dominant: int, contextual: int) -> None:
    """Refuse budgets that a picture of `groups` merged patches cannot fill.

    Raises:
        ValueError: names the number and its range.
    """
    check_visionzip(groups, dominant, contextual, cls=False)


def merged_budget(groups: int, dominant: float = 0.65, contextual: float = 0.05) -> tuple[int, int]:
    """Shares of a picture as numbers, by the released rule: both rounded down, at least one contextual token.

    The released code keeps 65 % + 5 %; its notes also give 45 % + 5 %.

    Raises:
        ValueError: shares that are negative or make more than the picture.
    """
    if dominant < 0 or contextual < 0 or dominant + contextual > 1:
        raise ValueError(
            f"visionzip_merged: shares {dominant} and {contextual} must be at least 0 and at most 1 together"
        )
    return int(dominant * groups), max(int(contextual * groups), 1)


@functools.partial(jax.jit, static_argnames=("dominant", "contextual", "merge", "targets"))
def visionzip_merged(
    tokens_BGD: Array,
    score_BP: Array,
    keys_BPH: Array,
    *,
    dominant: int,
    contextual: int,
    place_G: Array | None = None,
    merge: str = "official",
    targets: str = "official",
) -> VisualTokens:
    """Compress G merged patches to dominant + contextual tokens.

    Args:
        tokens_BGD: [B, G, D] merged patches in raster order.
        score_BP: [B, P] attention that each patch receives in the last block of the encoder, mean or sum over heads
            and queries (`ops.received_attention`, with pictures or frames as segments). P is a multiple of G, and
            P / G neighbours make a group.
        keys_BPH: [B, P, H] keys of that block, rotated, mean over heads; patches as in `score_BP`.
        dominant: groups kept as they are, 0 .. G.
        contextual: merged tokens, 0 .. G - dominant.
        place_G: [G] int, the raster place of each group of `score_BP` and `keys_BPH`, for an encoder that goes window
            by window; None: they are in raster order too.
        merge, targets: as in `visionzip`.

    Returns:
        `VisualTokens` with M = dominant + contextual in raster order. Everything counts in groups: positions 0 .. G-1,
        sizes 1 (dominant) or 1 + members, `source_BP` of shape [B, G].

    Raises:
        ValueError: a budget out of range, an unknown option, or shapes that do not fit.
    """
    batch, groups, _ = tokens_BGD.shape
    check_budget(groups, dominant, contextual)
    patches = score_BP.shape[-1]
    if not patches or patches % groups:
        raise ValueError(
            f"visionzip_merged: {patches} patches cannot make {groups} equal groups; it must be a multiple of {groups}"
        )
    check_shape("visionzip_merged", "score", score_BP.shape, (batch, patches))
    check_shape("visionzip_merged", "keys", keys_BPH.shape, (batch, patches, None))

    def grouped(x: Array) -> Array:
        mean = jnp.mean(x.astype(jnp.float32).reshape(batch, groups, patches // groups, *x.shape[2:]), axis=2)
        return mean if place_G is None else mean[:, jnp.argsort(place_G)]

    if place_G is not None:
        check_shape("visionzip_merged", "place", place_G.shape, (groups,))
    result = visionzip(
        tokens_BGD,
        None,
        grouped(score_BP),
        grouped(keys_BPH),
        dominant=dominant,
        contextual=contextual,
        merge=merge,
        targets=targets,
    )
    return in_raster_order(result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """See the module; a group is `side` x `side` patches, `contextual` of the budget's tokens are merged ones."""

    side: int = option(2, low=1)
    contextual: int = option(0, low=0, share=10 / 64)
    merge: str = option("official", choices=MERGES)
    targets: str = option("official", choices=TARGETS)


def group_of(rows: int, columns: int, side: int) -> np.ndarray:
    """The group of every patch, raster order on both sides: [P]."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return row // side * (columns // side) + column // side


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    """On a tower that does not merge patches itself: a group's token is the average of its patches.

    The released score is that of a block in which all patches see one another; so it is here in a tower of windows too.
    Within windows of a group's size every group would receive as much as every other one.
    """
    tower, options = ask.tower, ask.options
    group_P = group_of(tower.rows, tower.columns, options.side)
    by_group_P = np.argsort(group_P, kind="stable")
    batch, patches, width = features.patches_BPD.shape

    def heads(name: str) -> Array:
        x_BPD = features.signals[name][:, int(tower.cls) :]
        return x_BPD.reshape(batch, patches, tower.heads, -1).swapaxes(1, 2)

    queries, keys = heads("last_queries_BSD"), heads("last_keys_BSD")
    score_BP = ops.received_attention(queries, keys)
    keys_BPH = jnp.mean(keys.astype(jnp.float32), axis=1)
    grouped = features.patches_BPD[:, by_group_P].astype(jnp.float32)
    tokens_BGD = jnp.mean(grouped.reshape(batch, -1, options.side**2, width), axis=2).astype(features.patches_BPD.dtype)
    result = visionzip_merged(
        tokens_BGD,
        score_BP[:, by_group_P],
        keys_BPH[:, by_group_P],
        dominant=ask.tokens - options.contextual,
        contextual=options.contextual,
        merge=options.merge,
        targets=options.targets,
    )
    # In patches again: a group stands at its first one.
    first_G = jnp.asarray(by_group_P[:: options.side**2].astype(np.int32))
    return dataclasses.replace(
        result,
        position_BM=first_G[result.position_BM],
        size_BM=result.size_BM * options.side**2,
        source_BP=result.source_BP[:, group_P],
    )


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    side = options.side
    if tower.rows % side or tower.columns % side:
        raise ValueError(
            f"visionzip_merged: groups of {side} x {side} patches do not fill a grid of {tower.rows} x "
            f"{tower.columns}; options.side must divide both"
        )
    groups = tower.patches // side**2
    if not 1 <= tokens <= groups:
        raise ValueError(f"visionzip_merged: {tokens} tokens asked of {groups} groups; it must be 1 .. {groups}")
    if options.contextual > tokens:
        raise ValueError(
            f"visionzip_merged: {options.contextual} contextual of {tokens} tokens; options.contextual must be 0 .. "
            f"{tokens}"
        )
    check_budget(groups, tokens - options.contextual, options.contextual)


ENTRIES = {
    "visionzip_merged": Encoder(
        function=_apply,
        budget=_budget,
        options=Options,
        signals=("last_queries_BSD", "last_keys_BSD"),
        classes=("attention", "similarity"),
        reads="attention that patches would receive in the last block, keys",
        source="arXiv 2412.04467",
    )
}
