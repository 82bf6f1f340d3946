"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388, ICCV 2025): keep attention outliers, add to each what is like it.

Patches whose CLS attention is an outlier (above Q3 + 1.5 (Q3 - Q1)) become centres; PruMerge+ adds a regular grid of
patches. Each centre takes in the features of its `neighbours` most similar patches (cosine of the keys), weighted by
attention. How many centres there are depends on the picture: they are static slots with `valid`.

    merge    "official": centre + weighted sum of neighbours from among all other patches, and one more token, the
                         weighted sum of all patches that are no centres. The released attention is one head over the
                         full width of the last block's queries and keys (`giant_attention`).
             "paper":    weighted average of the centre and neighbours from among the patches that are no centres; no
                         further token. The paper reads the second-to-last block: give that block's signals.
    count    "sample":   every picture counts its own outliers, as the released code means to for one picture.
             "batch":    released: quartiles of the whole batch and one number for all (rounded down in float64, which
                         loses one for a few P, of one picture too). Pictures then depend on others of a batch.
             "fixed":    the released branch for training: as many centres as there are slots.
    repeats  "official": in PruMerge+ with a fixed count, a grid patch that is an outlier too becomes two centres, and
                         as many of the lowest other patches are forgotten. "none": the grid first, then outliers.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, Tower, option
from tokzip_jax.compress.greedy import check_shape
from tokzip_jax.compress.prumerge_centres import (
    adaptive_centres,
    by_attention,
    fixed_centres,
    outliers,
    valid_fixed_centres,
)
from tokzip_jax.compress.prumerge_merge import take_in
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

MERGES = ("official", "paper")
COUNTS = ("sample", "batch", "fixed")
REPEATS = ("official", "none")


def check_budget(patches: int, tokens: int, *, neighbours: int = 32, merge: str = "official") -> None:
    """Refuse budgets and neighbourhoods that `patches` patches cannot give.

    Args:
        patches: P.
        tokens: all slots; with merge "official" the further token is one of them.
        neighbours: how many patches a centre takes in.
        merge: see the module.

    Raises:
        ValueError: names the number and its range.
    """
    extra = int(merge == "official")
    if not 1 + extra <= tokens <= patches + extra:
        also = " (the further token is one of them)" if extra else ""
        raise ValueError(
            f"PruMerge: {tokens} tokens{also} asked of {patches} patches; it must be {1 + extra} .. {patches + extra}"
        )
    if not 1 <= neighbours <= patches - 1:
        raise ValueError(
            f"PruMerge: neighbours = {neighbours} of each of {patches} patches; it must be 1 .. {patches - 1}"
        )


def giant_attention(queries_BSD: Array, keys_BSD: Array, valid_BP: Array | None = None) -> Array:
    """The released score: softmax attention of the CLS row, all heads as one of the full width.

    Args:
        queries_BSD, keys_BSD: [B, 1+P, D] raw projections of the last block with bias, CLS first; of the queries only
            the first row is read.
        valid_BP: [B, P] bool, False for padding, which gets no attention; None: all.

    Returns:
        [B, P] float32, without the CLS column (rows sum to less than 1).
    """
    query_BD, keys = queries_BSD[:, 0].astype(jnp.float32), keys_BSD.astype(jnp.float32)
    logits_BS = jnp.einsum("BD,BSD->BS", query_BD, keys, precision=ops.EXACT) * keys.shape[-1] ** -0.5
    if valid_BP is not None:
        logits_BS = jnp.where(jnp.pad(valid_BP, ((0, 0), (1, 0)), constant_values=True), logits_BS, -jnp.inf)
    return jax.nn.softmax(logits_BS, axis=1)[:, 1:]


@functools.partial(jax.jit, static_argnames=("tokens", "count", "neighbours", "merge"))
def prumerge(
    patches_BPD: Array,
    attention_BP: Array,
    keys_BSD: Array,
    *,
    tokens: int,
    count: str = "sample",
    neighbours: int = 32,
    merge: str = "official",
    valid_BP: Array | None = None,
) -> VisualTokens:
    """PruMerge.

    Args:
        patches_BPD: [B, P, D] patch features, for LLaVA the output of the second-to-last block.
        attention_BP: [B, P] CLS attention; released: `giant_attention` of the last block.
        keys_BSD: [B, 1+P, H] keys of the same block, CLS first.
        tokens: slots. More centres than fit: those with the lowest attention are not taken.
        count, neighbours, merge: see the module; 32 neighbours are the released number.
        valid_BP: [B, P] bool, see `greedy`: quartiles, grids and neighbourhoods are of valid patches (a centre takes in
            as many as there are), a fixed count is at most their number, and the batch's share of a picture's own
            patches is rounded down exactly, not through float64; None: all.

    Returns:
        `VisualTokens` with M = tokens in the patches' dtype: centres by falling attention, then slots that this picture
        leaves empty (invalid, zero, size 0, position -1), and with merge "official" the further token in the last slot
        (position -1). `source` gives a patch that is no centre to the most similar centre that took it in, else to the
        further token, else to none; its features may have gone to several.

    Raises:
        ValueError: a number out of range, an unknown option, or shapes that do not fit.
    """
    slots = _check(patches_BPD, attention_BP, keys_BSD, tokens, neighbours, merge, count, valid_BP)
    order_BP, _ = by_attention(attention_BP, valid_BP)
    centre_BK = order_BP[:, :slots]
    if count != "fixed":
        valid_BK = jnp.arange(slots)[None] < outliers(attention_BP, count, valid_BP)[0][:, None]
    elif valid_BP is None:
        valid_BK = jnp.ones(centre_BK.shape, bool)
    else:
        valid_BK = jnp.take_along_axis(valid_BP, centre_BK, axis=1)
    return take_in(patches_BPD, attention_BP, keys_BSD, centre_BK, valid_BK, None, neighbours, merge, valid_BP)


@functools.partial(jax.jit, static_argnames=("tokens", "count", "neighbours", "merge", "repeats"))
def prumerge_plus(
    patches_BPD: Array,
    attention_BP: Array,
    keys_BSD: Array,
    *,
    tokens: int,
    count: str = "sample",
    neighbours: int = 32,
    merge: str = "official",
    repeats: str = "official",
    valid_BP: Array | None = None,
) -> VisualTokens:
    """PruMerge+: the outliers and a regular grid of patches.

    The grid's stride is a third of P / outliers, rounded down twice; with a fixed count half of the centres (rounded
    down) stand in the middles of as many equal parts of the raster. Above P / 6 outliers the stride is 1 and every
    patch is on the grid (released; above P / 3 the released code stops).

    Args:
        tokens: slots. More centres than fit, which a low stride makes likely: those with the lowest attention are not
            taken, which means grid patches before outliers.
        repeats: see the module; read only if the count is fixed.
        patches_BPD, attention_BP, keys_BSD, count, neighbours, merge, valid_BP: as in `prumerge`; a picture with fewer
            valid patches than slots has as many centres, the grid's half of them.

    Returns:
        As `prumerge`; outliers by falling attention, then the grid in raster order. A repeated centre's `source` is its
        first slot, the second one has size 0.

    Raises:
        ValueError: a number out of range, an unknown option, or shapes that do not fit.
    """
    slots = _check(patches_BPD, attention_BP, keys_BSD, tokens, neighbours, merge, count, valid_BP)
    if repeats not in REPEATS:
        raise ValueError(f"PruMerge+: repeats = {repeats!r} is unknown; choose one of {', '.join(REPEATS)}")
    candidate_BC, exists_BC = None, valid_BP
    if count != "fixed":
        centre_BK, valid_BK = adaptive_centres(attention_BP, slots, count, valid_BP)
    elif valid_BP is None:
        centre_BK, candidate_BC = fixed_centres(attention_BP, slots, repeats)
        valid_BK = jnp.ones(centre_BK.shape, bool)
    else:
        centre_BK, valid_BK, candidate_BC, exists_BC = valid_fixed_centres(attention_BP, slots, repeats, valid_BP)
    centres = (centre_BK, valid_BK, candidate_BC)
    return take_in(patches_BPD, attention_BP, keys_BSD, *centres, neighbours, merge, exists_BC)


def _check(
    patches_BPD: Array,
    attention: Array,
    keys: Array,
    tokens: int,
    neighbours: int,
    merge: str,
    count: str,
    valid_BP: Array | None,
) -> int:
    """Slots for centres; ValueError for what does not fit."""
    batch, patches, _ = patches_BPD.shape
    for name, value, known in (("merge", merge, MERGES), ("count", count, COUNTS)):
        if value not in known:
            raise ValueError(f"PruMerge: {name} = {value!r} is unknown; choose one of {', '.join(known)}")
    check_budget(patches, tokens, neighbours=neighbours, merge=merge)
    if valid_BP is not None:
        check_shape("PruMerge", "valid", valid_BP.shape, (batch, patches))
    if attention.shape != (batch, patches):
        raise ValueError(f"PruMerge: scores have shape {attention.shape}; {patches} patches need {(batch, patches)}")
    if keys.shape[:2] != (batch, 1 + patches):
        raise ValueError(
            f"PruMerge: keys have shape {keys.shape}; {patches} patches with their CLS row first need "
            f"({batch}, {1 + patches}, head width)"
        )
    return tokens - int(merge == "official")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """See the module; merge "paper" reads the features' own block, "official" the last one."""

    count: str = option("sample", choices=COUNTS)
    neighbours: int = option(32, low=1, patches=576)
    merge: str = option("official", choices=MERGES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlusOptions(Options):
    """PruMerge+'s."""

    repeats: str = option("official", choices=REPEATS)


def _signals(options: Options) -> tuple[str, ...]:
    return ("cls_attention_BP", "keys_BSH") if options.merge == "paper" else ("last_queries_BSD", "last_keys_BSD")


def _applied(function: Callable[..., VisualTokens]) -> Callable[[VisionFeatures, Ask], VisualTokens]:
    def apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
        first, keys_BSD = (features.signals[name] for name in _signals(ask.options))
        attention_BP = first if ask.options.merge == "paper" else giant_attention(first, keys_BSD)
        options = dataclasses.asdict(ask.options)
        return function(features.patches_BPD, attention_BP, keys_BSD, tokens=ask.tokens, **options)

    return apply


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    check_budget(tower.patches, tokens, neighbours=options.neighbours, merge=options.merge)


_COMMON = {
    "budget": _budget,
    "signals": _signals,
    "cls": True,
    "classes": ("attention", "similarity"),
    "reads": "CLS attention of the last block, keys",
    "count": "adaptive, up to the budget",
    "source": "arXiv 2403.15388",
}
ENTRIES = {
    "prumerge": Encoder(function=_applied(prumerge), options=Options, **_COMMON),
    "prumerge_plus": Encoder(function=_applied(prumerge_plus), options=PlusOptions, **_COMMON),
}
