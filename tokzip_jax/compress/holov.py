"""HoloV (arXiv 2510.02912, NeurIPS 2025): give every part of the picture its share, then take the attended patches.

The raster is cut into runs of neighbouring patches ("crops" in the paper, though they are rows of the raster rather
than squares). A crop's score is the mean over its patches of 1000 * attention + alpha * variance, where variance is
that of a patch's cosines with the others of its crop, scaled to the crop's mean attention. Crops get slots in
proportion to their scores, the rest of the division going to the highest scores; inside a crop attention decides.

Of the released code, kept as they are: the scaling makes the mean of the variances (1 + alpha) * mean attention, so
that the variance all but cancels out; a patch's cosine with itself enters its variance as 0; a crop of one patch is
scored by its bare attention. It runs with 16 crops and 64 tokens.

    overflow  "official":     a crop whose share is larger than itself keeps all it has, and the slots that it cannot
                              fill stay empty (the code pads with zero vectors, which the language model then reads).
              "redistribute": such slots go to the highest scoring crops with room, one each, until none is left (as
                              in the copy that comes with RESTORE): always exactly the budget.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import COMPARE, PROJECTED, Ask, Encoder, Selecting, Tower, compared, option
from tokzip_jax.compress.greedy import check_shape, everywhere, fill
from tokzip_jax.compress.select import check_tokens
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

OVERFLOW = ("official", "redistribute")
ATTENTION_SCALE = 1e3
EPS = 1e-6


def check_budget(patches: int, tokens: int, crops: int = 16) -> None:
    """Refuse a budget outside 1 .. patches, or a number of crops outside 1 .. patches.

    Raises:
        ValueError: names the number and its range.
    """
    check_tokens("holov", patches, tokens)
    if not 1 <= crops <= patches:
        raise ValueError(f"holov: crops = {crops} asked of {patches} patches; it must be 1 .. {patches}")


def crop_index(patches: int, crops: int) -> np.ndarray:
    """Patches of each crop, [crops, W], -1 behind the shorter ones: the first ones take the rest of the division."""
    parts = np.array_split(np.arange(patches), crops)
    table = np.full((crops, len(parts[0])), -1)
    for number, part in enumerate(parts):
        table[number, : len(part)] = part
    return table


def descending_rank(x: Array) -> Array:
    """Place of each entry of the last axis in descending order; of equal ones the lower index comes first. int32."""
    index = jnp.arange(x.shape[-1])
    mine, other = x[..., :, None], x[..., None, :]
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def crop_scores(features_BCWH: Array, attention_BCW: Array, inside_BCW: Array, alpha: float) -> Array:
    """Scores of the crops, [B, C] float32; 0 for a crop without patches."""
    unit = ops.unit(features_BCWH)
    pairs_BCWV = inside_BCW[..., :, None] & inside_BCW[..., None, :]
    cosine_BCWV = jnp.einsum("BCWH,BCVH->BCWV", unit, unit, precision=ops.EXACT)
    cosine_BCWV = jnp.where(pairs_BCWV & ~jnp.eye(unit.shape[2], dtype=bool), cosine_BCWV, 0.0)
    size_BC = jnp.sum(inside_BCW, axis=2)
    others_BC1 = jnp.maximum(size_BC - 1, 1)[..., None]
    mean_BCW = jnp.sum(cosine_BCWV, axis=3) / others_BC1
    deviation_BCWV = jnp.where(pairs_BCWV, cosine_BCWV - mean_BCW[..., None], 0.0)
    variance_BCW = jnp.sum(deviation_BCWV**2, axis=3) / others_BC1

    def mean(x_BCW: Array) -> Array:
        return jnp.sum(jnp.where(inside_BCW, x_BCW, 0.0), axis=2) / jnp.maximum(size_BC, 1)

    attention_BC, variance_BC = ATTENTION_SCALE * mean(attention_BCW), mean(variance_BCW)
    size_of_attention_BC = ATTENTION_SCALE * mean(jnp.abs(attention_BCW))
    score_BC = attention_BC + alpha * variance_BC * (size_of_attention_BC / (variance_BC + EPS))
    return jnp.where(size_BC == 1, mean(attention_BCW), score_BC)


def shares(score_BC: Array, size_BC: Array, tokens: int, width: int, overflow: str) -> Array:
    """How many patches each crop may keep, [B, C] int32."""
    weight_BC = score_BC / (jnp.sum(score_BC, axis=1, keepdims=True) + EPS)
    share_BC = jnp.floor(weight_BC * tokens).astype(jnp.int32)
    rest_B1 = tokens - jnp.sum(share_BC, axis=1, keepdims=True)
    share_BC = share_BC + (descending_rank(weight_BC) < rest_B1)
    share_BC = jnp.minimum(share_BC, size_BC)

    def hand_out(_: Array, share_BC: Array) -> Array:
        room_BC = share_BC < size_BC
        rank_BC = descending_rank(jnp.where(room_BC, weight_BC, -jnp.inf))
        return share_BC + (room_BC & (rank_BC < tokens - jnp.sum(share_BC, axis=1, keepdims=True)))

    # A round either ends the shortage or gives one slot to every crop with room: after `width` of them none has any.
    return lax.fori_loop(0, width, hand_out, share_BC) if overflow == "redistribute" else share_BC


@functools.partial(jax.jit, static_argnames=("tokens", "crops", "alpha", "overflow"))
def holov(
    patches_BPD: Array,
    attention_BP: Array,
    *,
    tokens: int,
    crops: int = 16,
    alpha: float = 0.09,
    overflow: str = "official",
    features_BPH: Array | None = None,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Keep at most `tokens` patches, spread over the crops of the picture.

    Args:
        patches_BPD: [B, P, D] what is kept, in raster order.
        attention_BP: [B, P] at least 0: attention of the CLS token.
        tokens: slots, 1 .. P.
        crops: runs of patches, 1 .. P.
        alpha: weight of the variance.
        overflow: "official" or "redistribute", see the module.
        features_BPH: [B, P, H] what is compared, in the released code the projected patches; None: the patches.
        valid_BP: [B, P] bool, False for patches that are never selected and count nowhere; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order (the code lists a crop's patches by attention); with
        overflow="official" slots at the end may be empty. Of equal scores the lower index wins.

    Raises:
        ValueError: a budget out of range, an unknown option, or shapes that do not fit.
    """
    batch, patches, _ = patches_BPD.shape
    check_budget(patches, tokens, crops)
    if overflow not in OVERFLOW:
        raise ValueError(f"holov: overflow = {overflow!r} is unknown; choose one of {', '.join(OVERFLOW)}")
    features_BPH = patches_BPD if features_BPH is None else features_BPH
    valid_BP = everywhere(patches_BPD, valid_BP)
    check_shape("holov", "attention", attention_BP.shape, (batch, patches))
    check_shape("holov", "features", features_BPH.shape, (batch, patches, None))
    check_shape("holov", "valid", valid_BP.shape, (batch, patches))
    features_BPH, attention_BP = lax.stop_gradient((features_BPH, attention_BP.astype(jnp.float32)))

    table_CW = crop_index(patches, crops)
    inside_BCW = valid_BP[:, table_CW] & (table_CW >= 0)
    attention_BCW = attention_BP[:, table_CW]
    score_BC = crop_scores(features_BPH[:, table_CW], attention_BCW, inside_BCW, alpha)
    size_BC = jnp.sum(inside_BCW, axis=2, dtype=jnp.int32)
    share_BC = shares(score_BC, size_BC, tokens, table_CW.shape[1], overflow)
    rank_BCW = descending_rank(jnp.where(inside_BCW, attention_BCW, -jnp.inf))
    chosen_BCW = inside_BCW & (rank_BCW < share_BC[..., None])
    chosen_BP = chosen_BCW.reshape(batch, -1)[:, np.flatnonzero(table_CW.ravel() >= 0)]
    return fill(patches_BPD, chosen_BP, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See `holov`; compared are "projected" patches (as released) or the "patches" themselves."""

    crops: int = option(16, low=1, patches=576)
    alpha: float = option(0.09, low=0.0)
    overflow: str = option("official", choices=OVERFLOW)
    compare: str = option("projected", choices=COMPARE)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    return holov(
        features.patches_BPD,
        features.signals["cls_attention_BP"],
        tokens=ask.tokens,
        crops=ask.options.crops,
        alpha=ask.options.alpha,
        overflow=ask.options.overflow,
        features_BPH=compared(features, ask.options),
    )


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    check_budget(tower.patches, tokens, options.crops)


ENTRIES = {
    "holov": Encoder(
        function=_apply,
        budget=_budget,
        options=Options,
        signals=lambda options: ("cls_attention_BP", *((PROJECTED,) if options.compare == "projected" else ())),
        cls=True,
        classes=("attention", "similarity"),
        reads="CLS attention, projected patches",
        count="up to the budget",
        source="arXiv 2510.02912",
    )
}
