"""VisionZip for encoders that merge patches (the released Qwen2.5-VL version of arXiv 2412.04467).

Such an encoder has no CLS token and hands on one token for each group of patches (2 x 2). The score of a group is the
attention that its patches receive in the last block, its key the mean of their rotated keys; from there on it is
VisionZip: dominant groups are kept, of the others a few become targets and the rest joins the target whose key is most
alike. A merged token takes the place of its target: what is kept stays in raster order, at its original positions.
"""

import functools

import jax
import jax.numpy as jnp

from tokzip_jax.compress.greedy import check_shape, in_raster_order
from tokzip_jax.compress.visionzip import check_budget as check_visionzip
from tokzip_jax.compress.visionzip import visionzip
from tokzip_jax.types import Array, VisualTokens


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
