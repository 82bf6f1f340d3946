"""DART (arXiv 2502.11494, EMNLP 2025): keep a few pivots and the patches least like them.

Pivots are the patches whose keys have the largest L1 norm, and tokens of the question if any are given. Pivot after
pivot takes its share of the patches that are still free, those of lowest cosine with it first.

The released code runs behind a layer of the language model, on keys of all heads side by side and on the final norm
of the hidden states, with 4 pivots of the picture and 4 of the question. Here arrays from anywhere serve; in front of
the projector, where there is no question, the picture's pivots stand alone. Two things differ from the code:
    budget  The code gives every pivot floor(tokens / pivots) patches and keeps the picture's pivots besides; here the
            result has exactly `tokens` patches, the first pivots taking one more where the division leaves a rest. The
            code's result for n is that for tokens = 4 + 8 * (n // 8).
    order   The code goes through a Python set of indices, whose order is an accident of hashing; here the picture's
            pivots come first, in raster order, then the question's in the order given.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, Selecting, Tower, option
from tokzip_jax.compress.greedy import check_shape, cleared, everywhere, fill
from tokzip_jax.compress.select import check_tokens
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def check_budget(patches: int, tokens: int, pivots: int = 4) -> None:
    """Refuse a budget outside 1 .. patches, or a number of pivots outside 1 .. tokens.

    Raises:
        ValueError: names the number and its range.
    """
    check_tokens("dart", patches, tokens)
    if not 1 <= pivots <= tokens:
        raise ValueError(f"dart: pivots = {pivots} asked of {tokens} tokens; it must be 1 .. {tokens}")


def shares(tokens: int, pivots: int, questions: int) -> list[int]:
    """How many patches each pivot brings, itself not counted."""
    rest, number = tokens - pivots, pivots + questions
    return [rest // number + (place < rest % number) for place in range(number)]


@functools.partial(jax.jit, static_argnames=("tokens", "pivots"))
def dart(
    patches_BPD: Array,
    keys_BPH: Array,
    *,
    tokens: int,
    pivots: int = 4,
    question_BTH: Array | None = None,
    features_BPH: Array | None = None,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Keep `tokens` patches: pivots, and those least like them.

    Args:
        patches_BPD: [B, P, D] what is kept.
        keys_BPH: [B, P, K] attention keys without the CLS token's; best all heads side by side, since the L1 norm of
            a mean over heads is another score.
        tokens: how many, 1 .. P.
        pivots: patches that are pivots, 1 .. tokens.
        question_BTH: [B, T, H] tokens of the question that are pivots too (the code: the 4 of largest key norm), in
            the space of the features; None: none.
        features_BPH: [B, P, H] what is compared; None: the patches.
        valid_BP: [B, P] bool, False for patches that are never selected; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order. Of equal norms or cosines the lower index wins.

    Raises:
        ValueError: a budget out of range, or shapes that do not fit.
    """
    batch, patches, _ = patches_BPD.shape
    check_budget(patches, tokens, pivots)
    features_BPH = patches_BPD if features_BPH is None else features_BPH
    valid_BP = everywhere(patches_BPD, valid_BP)
    check_shape("dart", "keys", keys_BPH.shape, (batch, patches, None))
    check_shape("dart", "features", features_BPH.shape, (batch, patches, None))
    check_shape("dart", "valid", valid_BP.shape, (batch, patches))

    features_BPH = cleared(features_BPH, valid_BP)
    norm_BP = jnp.sum(jnp.abs(lax.stop_gradient(keys_BPH).astype(jnp.float32)), axis=2)
    chosen_BP = ops.top_mask(jnp.where(valid_BP, norm_BP, ops.MASKED), pivots)
    place_BK, _ = ops.partition(chosen_BP, pivots)
    pivot_BKH = ops.gather(features_BPH, place_BK)
    if question_BTH is not None:
        check_shape("dart", "question", question_BTH.shape, (batch, None, features_BPH.shape[2]))
        pivot_BKH = jnp.concatenate([pivot_BKH, question_BTH.astype(pivot_BKH.dtype)], axis=1)
    cosine_BPK = ops.cosine(lax.stop_gradient(features_BPH), lax.stop_gradient(pivot_BKH))
    for number, share in enumerate(shares(tokens, pivots, pivot_BKH.shape[1] - pivots)):
        unlike_BP = jnp.where(valid_BP, -cosine_BPK[:, :, number], ops.MASKED)
        chosen_BP |= ops.top_mask(jnp.where(chosen_BP, -jnp.inf, unlike_BP), share)
    return fill(patches_BPD, chosen_BP & valid_BP, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See `dart`."""

    pivots: int = option(4, low=1)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    keys_BPD = features.signals["last_keys_BSD"][:, int(ask.tower.cls) :]
    return dart(features.patches_BPD, keys_BPD, tokens=ask.tokens, pivots=ask.options.pivots)


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    check_budget(tower.patches, tokens, options.pivots)


ENTRIES = {
    "dart": Encoder(
        function=_apply,
        budget=_budget,
        options=Options,
        signals=("last_keys_BSD",),
        classes=("similarity",),
        reads="keys of the last block, patches",
        source="arXiv 2502.11494",
    )
}
