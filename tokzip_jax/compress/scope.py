"""SCOPE (arXiv 2510.24214, NeurIPS 2025): keep salient patches that cover the picture.

A set of patches covers patch i as well as its best member does: with max(0, cosine). The next patch j is the one of
highest gain sum_i max(0, cos(i, j) - cover_i), times its saliency to the power alpha. No text is read.

The released code reads features and attention of the second-to-last block (saliency: the CLS row summed over heads)
and can add gain and saliency instead ("add").
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, Selecting, option
from tokzip_jax.compress.greedy import check_shape, cleared, everywhere, fill, greedy, row
from tokzip_jax.compress.select import check_tokens, selection_budget
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

COMBINE = ("multiply", "add")


def covering(
    similarity_BPP: Array, weight_BP: Array, valid_BP: Array, tokens: int, combine: str
) -> tuple[Array, Array]:
    """The greedy choice: [B, tokens] int32 in its order, and the chosen patches [B, P] bool.

    A choice costs O(P * P) additions on one product of all pairs that is made once.
    """

    def gain(cover_BP: Array) -> Array:
        gain_BP = jnp.sum(jnp.maximum(similarity_BPP - cover_BP[:, None, :], 0.0), axis=2)
        return gain_BP * weight_BP if combine == "multiply" else gain_BP + weight_BP

    def update(cover_BP: Array, pick_B: Array, number: Array) -> Array:
        return jnp.maximum(cover_BP, row(similarity_BPP, pick_B))

    # A patch that does not exist needs no cover.
    return greedy(tokens, valid_BP, jnp.where(valid_BP, 0.0, jnp.inf), gain, update)


@functools.partial(jax.jit, static_argnames=("tokens", "alpha", "combine"))
def scope(
    patches_BPD: Array,
    saliency_BP: Array,
    *,
    tokens: int,
    alpha: float = 1.0,
    combine: str = "multiply",
    features_BPH: Array | None = None,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Keep `tokens` patches by saliency and coverage.

    Args:
        patches_BPD: [B, P, D] what is kept.
        saliency_BP: [B, P] at least 0, for CLIP the attention of the CLS token, summed over heads.
        tokens: how many, 1 .. P.
        alpha: exponent of the saliency; 0 leaves coverage alone.
        combine: "multiply" (gain times saliency, the default of the released code) or "add".
        features_BPH: [B, P, H] what is compared; None: the patches.
        valid_BP: [B, P] bool, see `greedy`; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order. Of equal gains the lower index wins.

    Raises:
        ValueError: a budget out of range, an unknown option, or shapes that do not fit.
    """
    batch, patches, _ = patches_BPD.shape
    check_tokens("scope", patches, tokens)
    if combine not in COMBINE:
        raise ValueError(f"scope: combine = {combine!r} is unknown; choose one of {', '.join(COMBINE)}")
    features_BPH = patches_BPD if features_BPH is None else features_BPH
    valid_BP = everywhere(patches_BPD, valid_BP)
    check_shape("scope", "saliency", saliency_BP.shape, (batch, patches))
    check_shape("scope", "features", features_BPH.shape, (batch, patches, None))
    check_shape("scope", "valid", valid_BP.shape, (batch, patches))
    features_BPH = cleared(jax.lax.stop_gradient(features_BPH), valid_BP)
    weight_BP = jax.lax.stop_gradient(saliency_BP).astype(jnp.float32) ** alpha
    similarity_BPP = ops.cosine(features_BPH, features_BPH)
    _, chosen_BP = covering(similarity_BPP, weight_BP, valid_BP, tokens, combine)
    return fill(patches_BPD, chosen_BP & valid_BP, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See `scope`."""

    alpha: float = option(1.0, low=0.0)
    combine: str = option("multiply", choices=COMBINE)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    saliency_BP, options = features.signals["cls_attention_BP"], ask.options
    return scope(features.patches_BPD, saliency_BP, tokens=ask.tokens, alpha=options.alpha, combine=options.combine)


ENTRIES = {
    "scope": Encoder(
        function=_apply,
        budget=selection_budget("scope"),
        options=Options,
        signals=("cls_attention_BP",),
        cls=True,
        classes=("attention", "similarity"),
        reads="CLS attention, patches",
        source="arXiv 2510.24214",
    )
}
