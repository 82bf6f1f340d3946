"""MMTok (arXiv 2508.18264, ICLR 2026): keep patches that cover both the question and the picture.

Every token of the question and every patch spreads weight 1 over the patches (softmax of cosines); a set of patches
covers it as well as its best member does. The next patch is the one that adds most to
mean over text of the cover + alpha * mean over patches of the cover.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import ABOUT_QUESTION, Ask, Encoder, Selecting, option
from tokzip_jax.compress.greedy import check_shape, everywhere, fill, greedy, row
from tokzip_jax.compress.relevance import question_similarity
from tokzip_jax.compress.select import check_tokens, selection_budget
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def spread(cosine_BRP: Array, temperature: float, row_valid_BR: Array, valid_BP: Array) -> Array:
    """What each row of cosines gives each patch, divided by the number of rows: [B, P, R] float32, 0 for padding."""
    logits_BPR = jnp.where(valid_BP[:, :, None], cosine_BRP.swapaxes(1, 2) / temperature, ops.MASKED)
    real_BPR = row_valid_BR[:, None, :] & valid_BP[:, :, None]
    weight_BPR = jnp.where(real_BPR, jax.nn.softmax(logits_BPR, axis=1), 0.0)
    return weight_BPR / jnp.maximum(jnp.sum(row_valid_BR, axis=1), 1)[:, None, None]


def covering(weight_BPR: Array, valid_BP: Array, tokens: int) -> tuple[Array, Array]:
    """The greedy choice: [B, tokens] int32 in its order, and the chosen patches [B, P] bool; O(P R) a choice."""

    def gain(cover_BR: Array) -> Array:
        return jnp.sum(jnp.maximum(weight_BPR - cover_BR[:, None, :], 0.0), axis=2)

    def update(cover_BR: Array, pick_B: Array, number: Array) -> Array:
        return jnp.maximum(cover_BR, row(weight_BPR, pick_B))

    return greedy(tokens, valid_BP, jnp.zeros_like(weight_BPR[:, 0]), gain, update)


@functools.partial(jax.jit, static_argnames=("tokens", "alpha", "text_temperature", "vision_temperature"))
def mmtok(
    patches_BPD: Array,
    text_similarity_BTP: Array,
    *,
    tokens: int,
    text_valid_BT: Array | None = None,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
    features_BPH: Array | None = None,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Keep `tokens` patches that cover question and picture.

    Args:
        patches_BPD: [B, P, D] what is kept.
        text_similarity_BTP: [B, T, P] cosine of each token of the question with each projected patch
            (`relevance.question_similarity`); the released code first drops words without content and the beginning of
            the sequence. T = 0 covers the picture alone.
        tokens: how many, 1 .. P.
        text_valid_BT: [B, T] bool, False for padding; None: all.
        alpha: weight of the picture against the question.
        text_temperature, vision_temperature: of the two softmaxes, above 0.
        features_BPH: [B, P, H] what patches are compared by, in the released code the features before the projector;
            None: the patches.
        valid_BP: [B, P] bool, see `greedy`; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order. Of equal gains the lower index wins.

    Raises:
        ValueError: a budget or temperature out of range, or shapes that do not fit.
    """
    batch, patches, _ = patches_BPD.shape
    check_tokens("mmtok", patches, tokens)
    for name, value in (("text_temperature", text_temperature), ("vision_temperature", vision_temperature)):
        if not value > 0:
            raise ValueError(f"mmtok: {name} = {value} must be above 0")
    features_BPH = patches_BPD if features_BPH is None else features_BPH
    valid_BP = everywhere(patches_BPD, valid_BP)
    check_shape("mmtok", "text_similarity", text_similarity_BTP.shape, (batch, None, patches))
    if text_valid_BT is None:
        text_valid_BT = jnp.ones(text_similarity_BTP.shape[:2], bool)
    check_shape("mmtok", "text_valid", text_valid_BT.shape, text_similarity_BTP.shape[:2])
    check_shape("mmtok", "features", features_BPH.shape, (batch, patches, None))
    check_shape("mmtok", "valid", valid_BP.shape, (batch, patches))
    features_BPH, text_BTP = jax.lax.stop_gradient((features_BPH, text_similarity_BTP.astype(jnp.float32)))
    vision_BPP = ops.cosine(features_BPH, features_BPH)
    weights = (
        spread(text_BTP, text_temperature, text_valid_BT, valid_BP),
        alpha * spread(vision_BPP, vision_temperature, valid_BP, valid_BP),
    )
    _, chosen_BP = covering(jnp.concatenate(weights, axis=2), valid_BP, tokens)
    return fill(patches_BPD, chosen_BP & valid_BP, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See `mmtok`."""

    alpha: float = option(0.5, low=0.0)
    text_temperature: float = option(0.02, above=0.0)
    vision_temperature: float = option(0.2, above=0.0)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    projected_BPD, question_BTD, valid_BT = (features.signals[name] for name in ABOUT_QUESTION)
    return mmtok(
        features.patches_BPD,
        question_similarity(projected_BPD, question_BTD),
        tokens=ask.tokens,
        text_valid_BT=valid_BT,
        alpha=ask.options.alpha,
        text_temperature=ask.options.text_temperature,
        vision_temperature=ask.options.vision_temperature,
    )


ENTRIES = {
    "mmtok": Encoder(
        function=_apply,
        budget=selection_budget("mmtok"),
        options=Options,
        signals=ABOUT_QUESTION,
        classes=("similarity", "query"),
        reads="question, projected patches, patches",
        source="arXiv 2508.18264",
    )
}
