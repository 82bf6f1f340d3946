"""CDPruner (arXiv 2506.10967, NeurIPS 2025): keep patches that differ, the relevant ones first.

The patches are items of a determinantal point process with kernel L_ij = r_i cos(i, j) r_j, r the relevance for the
question scaled to 0 .. 1. The next patch is the one that multiplies the determinant most (greedy MAP by an
incremental Cholesky factor, Chen et al. 2018).

Where the released code goes another way:
    sign    "official": r grows as the given relevance falls (the code negates CLIP's mean image-text cosine).
            "plain":    r grows with the given relevance, for a score in which more means more relevant.
    scaling over each picture alone, where the code takes minimum and maximum over the whole batch. A relevance that is
            the same for all patches gives r = 1 (a DPP without condition), where the code divides by zero.
    rank    when the features' rank is used up, determinants are 0 and the code divides by them (NaN, repeated
            choices). Here patches that the chosen ones explain entirely follow last, the most relevant first.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import ABOUT_QUESTION, COMPARE, Ask, Encoder, Selecting, compared, option
from tokzip_jax.compress.greedy import check_shape, everywhere, fill, greedy, row
from tokzip_jax.compress.relevance import question_relevance
from tokzip_jax.compress.select import check_tokens, selection_budget
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

SIGNS = ("official", "plain")
# What is left of a patch's own r * r below this fraction is rounding of the subtractions before.
EXPLAINED = 1e-5


def scale(relevance_BP: Array, valid_BP: Array, sign: str) -> Array:
    """Relevance scaled to 0 .. 1 (plus the code's 1e-6) over the valid patches of each picture: [B, P] float32."""
    value_BP = relevance_BP.astype(jnp.float32) * (-1.0 if sign == "official" else 1.0)
    low_B1 = jnp.min(jnp.where(valid_BP, value_BP, jnp.inf), axis=1, keepdims=True)
    high_B1 = jnp.max(jnp.where(valid_BP, value_BP, -jnp.inf), axis=1, keepdims=True)
    span_B1 = high_B1 - low_B1
    scaled_BP = (value_BP - low_B1 + 1e-6) / jnp.where(span_B1 > 0, span_B1, 1.0)
    return jnp.where(valid_BP, jnp.where(span_B1 > 0, scaled_BP, 1.0), 0.0)


def determinantal(features_BPH: Array, r_BP: Array, valid_BP: Array, tokens: int) -> tuple[Array, Array]:
    """The greedy choice: [B, tokens] int32 in its order, and the chosen patches [B, P] bool.

    A choice costs one row of the kernel, O(P H), and one product with the Cholesky rows so far, O(P tokens).
    """
    item_BPH = ops.unit(lax.stop_gradient(features_BPH)) * r_BP[:, :, None]
    own_BP = jnp.sum(item_BPH * item_BPH, axis=2)

    def gain(state: tuple[Array, Array]) -> Array:
        left_BP, _ = state
        return jnp.where(left_BP > EXPLAINED * own_BP, left_BP, -1.0 / jnp.maximum(r_BP * r_BP, 1e-20))

    def update(state: tuple[Array, Array], pick_B: Array, number: Array) -> tuple[Array, Array]:
        left_BP, factor_BMP = state
        pick_B1 = pick_B[:, None]
        left_B1 = jnp.take_along_axis(left_BP, pick_B1, axis=1)
        new_B1 = left_B1 > EXPLAINED * jnp.take_along_axis(own_BP, pick_B1, axis=1)
        kernel_BP = jnp.einsum("BPH,BH->BP", item_BPH, row(item_BPH, pick_B), precision=ops.EXACT)
        column_BM = jnp.take_along_axis(factor_BMP, pick_B1[:, :, None], axis=2)[:, :, 0]
        explained_BP = jnp.einsum("BM,BMP->BP", column_BM, factor_BMP, precision=ops.EXACT)
        next_BP = jnp.where(new_B1, (kernel_BP - explained_BP) / jnp.sqrt(jnp.where(new_B1, left_B1, 1.0)), 0.0)
        factor_BMP = lax.dynamic_update_slice_in_dim(factor_BMP, next_BP[:, None], number, axis=1)
        return left_BP - next_BP * next_BP, factor_BMP

    batch, patches = r_BP.shape
    start = (own_BP, jnp.zeros((batch, tokens, patches), jnp.float32))
    return greedy(tokens, valid_BP, start, gain, update)


@functools.partial(jax.jit, static_argnames=("tokens", "sign"))
def cdpruner(
    patches_BPD: Array,
    relevance_BP: Array,
    *,
    tokens: int,
    sign: str = "official",
    features_BPH: Array | None = None,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Keep `tokens` patches by a determinantal point process that is conditioned on the question.

    Args:
        patches_BPD: [B, P, D] what is kept.
        relevance_BP: [B, P] of each patch for the question: the published method takes the mean cosine of CLIP's
            projected patches and CLIP's embedding of the question; `relevance.question_relevance` of projected
            patches and question embeddings stands in for it inside one model (take sign="plain" then).
        tokens: how many, 1 .. P.
        sign: "official" or "plain", see the module.
        features_BPH: [B, P, H] what is compared, in the released code the projected patches; None: the patches.
        valid_BP: [B, P] bool, see `greedy`; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order. Of equal gains the lower index wins.

    Raises:
        ValueError: a budget out of range, an unknown option, or shapes that do not fit.
    """
    batch, patches, _ = patches_BPD.shape
    check_tokens("cdpruner", patches, tokens)
    if sign not in SIGNS:
        raise ValueError(f"cdpruner: sign = {sign!r} is unknown; choose one of {', '.join(SIGNS)}")
    features_BPH = patches_BPD if features_BPH is None else features_BPH
    valid_BP = everywhere(patches_BPD, valid_BP)
    check_shape("cdpruner", "relevance", relevance_BP.shape, (batch, patches))
    check_shape("cdpruner", "features", features_BPH.shape, (batch, patches, None))
    check_shape("cdpruner", "valid", valid_BP.shape, (batch, patches))
    r_BP = scale(lax.stop_gradient(relevance_BP), valid_BP, sign)
    _, chosen_BP = determinantal(features_BPH, r_BP, valid_BP, tokens)
    return fill(patches_BPD, chosen_BP & valid_BP, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See the module; "plain" because our relevance grows with what the question and a patch have in common."""

    sign: str = option("plain", choices=SIGNS)
    compare: str = option("projected", choices=COMPARE)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    projected_BPD, question_BTD, valid_BT = (features.signals[name] for name in ABOUT_QUESTION)
    relevance_BP = question_relevance(projected_BPD, question_BTD, valid_BT)
    compare, sign = compared(features, ask.options), ask.options.sign
    return cdpruner(features.patches_BPD, relevance_BP, tokens=ask.tokens, sign=sign, features_BPH=compare)


ENTRIES = {
    "cdpruner": Encoder(
        function=_apply,
        budget=selection_budget("cdpruner"),
        options=Options,
        signals=ABOUT_QUESTION,
        classes=("similarity", "query"),
        reads="question, projected patches",
        source="arXiv 2506.10967",
    )
}
