"""Selection by CLS attention alone: what any cleverer rule that reads it has to beat.

Keeping the patches that the CLS token attends to least is the control of VoCo-LLaMA (arXiv 2406.12275): what is worth
reading loses most of all then, and random selection lies between the two, if the attention says anything at all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokzip_jax.compress.entry import Ask, Encoder, Selecting, option
from tokzip_jax.compress.greedy import check_shape
from tokzip_jax.compress.select import best, check_tokens, selection_budget
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

ORDERS = ("highest", "lowest")


@functools.partial(jax.jit, static_argnames=("tokens", "order"))
def cls_attention(
    patches_BPD: Array,
    cls_attention_BP: Array,
    *,
    tokens: int,
    order: str = "highest",
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Keep the patches that the CLS token attends to most, or least.

    Args:
        patches_BPD: [B, P, D].
        cls_attention_BP: [B, P] softmax attention of the CLS token, sum or mean over heads.
        tokens: how many to keep, 1 .. P.
        order: "highest" or "lowest".
        valid_BP: [B, P] bool, see `greedy`; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order. Of equal scores the lower index wins.

    Raises:
        ValueError: tokens out of range, an unknown order, or scores or a mask of another shape.
    """
    batch, patches, _ = patches_BPD.shape
    check_tokens("cls_attention", patches, tokens)
    if order not in ORDERS:
        raise ValueError(f"cls_attention: order = {order!r} is unknown; choose one of {', '.join(ORDERS)}")
    check_shape("cls_attention", "score", cls_attention_BP.shape, (batch, patches))
    score_BP = cls_attention_BP.astype(jnp.float32)
    score_BP = score_BP if order == "highest" else -score_BP
    return best("cls_attention", patches_BPD, score_BP, valid_BP, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See `cls_attention`."""

    order: str = option("highest", choices=ORDERS)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    attention_BP = features.signals["cls_attention_BP"]
    return cls_attention(features.patches_BPD, attention_BP, tokens=ask.tokens, order=ask.options.order)


ENTRIES = {
    "cls_attention": Encoder(
        function=_apply,
        budget=selection_budget("cls_attention"),
        options=Options,
        signals=("cls_attention_BP",),
        cls=True,
        classes=("attention",),
        reads="CLS attention",
        source="baseline",
    )
}
