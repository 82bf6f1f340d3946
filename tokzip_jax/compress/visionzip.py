"""VisionZip (arXiv 2412.04467, CVPR 2025): keep the dominant patches, merge the rest into contextual tokens.

Dominant tokens are the CLS token and the patches that it attends to most. Of the remaining patches, in raster order,
a few become targets; every other one joins the target whose key is most alike (cosine), and each target with its
members becomes one contextual token. No text is used, and every picture of a batch is treated on its own.

The released code does not do all that the paper says. Both are here; "official" is the default, because published
numbers come from it:

    merge    "official": target + mean of its members, up to twice the norm of a patch; a target alone stays as it is.
             "paper":    average of the target and its members.
    targets  "official": places 0, step, 2 step, ... of the remaining list with step = max(1, R // m), so that the
                         end of the picture never holds a target.
             "even":     the middles of m equal parts of the list.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, Selecting, Tower, option
from tokzip_jax.compress.greedy import check_shape, fill, places
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

MERGES = ("official", "paper")
TARGETS = ("official", "even")


def check_budget(patches: int, dominant: int, contextual: int, *, cls: bool = True) -> None:
    """Refuse budgets that a picture of `patches` patches cannot fill.

    Args:
        patches: P.
        dominant: dominant tokens; with a CLS token it counts as one of them.
        contextual: merged tokens.
        cls: whether the encoder has a CLS token.

    Raises:
        ValueError: names the number and its range.
    """
    least, most = int(cls), patches + int(cls)
    if not least <= dominant <= most:
        counted = "dominant tokens (the CLS token is one of them)" if cls else "dominant tokens"
        raise ValueError(f"VisionZip: {dominant} {counted} asked of {patches} patches; it must be {least} .. {most}")
    if not 0 <= contextual <= most - dominant:
        raise ValueError(
            f"VisionZip: {contextual} contextual tokens asked of the {most - dominant} patches that {dominant} "
            f"dominant tokens leave; it must be 0 .. {most - dominant}"
        )
    if dominant + contextual == 0:
        raise ValueError(f"VisionZip: dominant + contextual is 0; it must be 1 .. {most}")


def target_places(rest: int, contextual: int, targets: str) -> np.ndarray:
    """Places of the targets in the list of `rest` remaining patches, ascending; static."""
    if targets == "even":
        return ops.evenly_spaced(rest, contextual)
    return np.arange(contextual) * max(1, rest // max(contextual, 1))


def valid_target_places(rest_B1: Array, contextual: int, targets: str) -> Array:
    """`target_places` of pictures [B, 1] that differ in how many patches remain, [B, contextual] int32.

    Where fewer remain than there are targets, each is a target, and what comes behind them has no meaning.
    """
    number = jnp.arange(contextual, dtype=jnp.int32)[None]
    if targets == "even":
        middle_BM = (2 * number + 1) * rest_B1 // (2 * contextual)  # as `ops.evenly_spaced`
        return jnp.where(rest_B1 < contextual, number, middle_BM)
    return number * jnp.maximum(1, rest_B1 // contextual)


@functools.partial(jax.jit, static_argnames=("dominant", "contextual", "merge", "targets"))
def visionzip(
    patches_BPD: Array,
    cls_BD: Array | None,
    cls_attention_BP: Array,
    keys_BSH: Array,
    *,
    dominant: int,
    contextual: int,
    merge: str = "official",
    targets: str = "official",
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Compress P patches (and the CLS token) to dominant + contextual tokens.

    Args:
        patches_BPD: [B, P, D] patch features, for CLIP the output of the second-to-last block.
        cls_BD: [B, D] CLS feature of the same layer, or None for an encoder without one.
        cls_attention_BP: [B, P] score of each patch: softmax attention that the CLS token pays it in that block, sum
            or mean over heads. Without a CLS token: `ops.received_attention`.
        keys_BSH: [B, 1+P, H] key projection of that block (bias included, unscaled), mean over heads, CLS first;
            [B, P, H] without a CLS token.
        dominant: dominant tokens, the CLS token included: 1 .. P+1 (1 = the CLS token alone). Without a CLS token:
            patches, 0 .. P.
        contextual: contextual tokens, 0 .. what the dominant ones leave.
        merge: "official" or "paper", see the module.
        targets: "official" or "even", see the module.
        valid_BP: [B, P] bool, see `greedy`: a picture with fewer valid patches fills the dominant slots first; None:
            all.

    Returns:
        `VisualTokens` with M = dominant + contextual in the patches' dtype: CLS, dominant patches in
        raster order, contextual tokens in target order (they stand at their target's place). Sizes are 0 for CLS, 1
        for a dominant patch, 1 + members for a contextual token. Patches go nowhere (-1) only if contextual is 0.
        Of equal scores or similarities the lower index wins; a zero key is alike (0) to everything.

    Raises:
        ValueError: a budget out of range, an unknown option, or shapes that do not fit.
    """
    batch, patches, _ = patches_BPD.shape
    prefix = 0 if cls_BD is None else 1
    check_budget(patches, dominant, contextual, cls=bool(prefix))
    _check_arguments(batch, patches, prefix, cls_attention_BP, keys_BSH, merge, targets)

    if valid_BP is not None:
        check_shape("VisionZip", "valid", valid_BP.shape, (batch, patches))
        keys_BPH = keys_BSH[:, prefix:]
        return _of_valid(
            patches_BPD, cls_BD, cls_attention_BP, keys_BPH, valid_BP, dominant, contextual, merge, targets
        )
    kept = dominant - prefix
    chosen_BP = ops.top_mask(cls_attention_BP, kept)
    kept_BK, rest_BR = ops.partition(chosen_BP, kept)
    # Parts of the result as (tokens, positions, sizes), in the order of the slots.
    parts = [(ops.gather(patches_BPD, kept_BK), kept_BK, jnp.ones_like(kept_BK))]
    source_BP = ops.source(chosen_BP, first=prefix)
    if cls_BD is not None:
        nowhere = jnp.full((batch, 1), -1, jnp.int32)
        parts.insert(0, (cls_BD[:, None].astype(patches_BPD.dtype), nowhere, jnp.zeros_like(nowhere)))
    if contextual:
        places = target_places(patches - kept, contextual, targets)
        target_BM = rest_BR[:, places]
        slot_BP, is_target_BP = _assign(keys_BSH[:, prefix:], chosen_BP, target_BM, places)
        member_BP = jnp.where(chosen_BP | is_target_BP, -1, slot_BP)
        merged, count_BM = _merge(patches_BPD, target_BM, member_BP, merge)
        parts.append((merged, target_BM, 1 + count_BM))
        source_BP = jnp.where(chosen_BP, source_BP, dominant + slot_BP)
    tokens_BMD, position_BM, size_BM = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return VisualTokens(tokens_BMD, jnp.ones(position_BM.shape, bool), position_BM, size_BM, source_BP)


def _of_valid(
    patches_BPD: Array,
    cls_BD: Array | None,
    score_BP: Array,
    keys_BPH: Array,
    valid_BP: Array,
    dominant: int,
    contextual: int,
    merge: str,
    targets: str,
) -> VisualTokens:
    """The result for pictures with padding: how many patches remain beside the dominant ones is the picture's own."""
    batch, patches, _ = patches_BPD.shape
    prefix = 0 if cls_BD is None else 1
    # Groups are sums over all patches: whatever stands in the padding, NaN among it, must not come near them.
    patches_BPD = jnp.where(valid_BP[:, :, None], patches_BPD, 0)
    chosen_BP = ops.top_mask(jnp.where(valid_BP, score_BP, -jnp.inf), dominant - prefix) & valid_BP
    kept = fill(patches_BPD, chosen_BP, dominant - prefix)
    parts = [(kept.tokens_BMD, kept.valid_BM, kept.position_BM, kept.size_BM)]
    source_BP = ops.source(chosen_BP, first=prefix)
    if cls_BD is not None:
        nowhere = jnp.full((batch, 1), -1, jnp.int32)
        cls = cls_BD[:, None].astype(patches_BPD.dtype)
        parts.insert(0, (cls, jnp.ones((batch, 1), bool), nowhere, jnp.zeros_like(nowhere)))
    if contextual:
        rest_BP = valid_BP & ~chosen_BP
        rest_B1 = jnp.sum(rest_BP, axis=1, keepdims=True, dtype=jnp.int32)
        place_BM = valid_target_places(rest_B1, contextual, targets)
        filled_BM = place_BM < rest_B1
        target_BM = jnp.take_along_axis(places(rest_BP, patches)[0], jnp.where(filled_BM, place_BM, 0), axis=1)
        own_BPM = (jnp.arange(patches)[None, :, None] == target_BM[:, None]) & filled_BM[:, None]
        similarity_BPM = ops.cosine(keys_BPH, ops.gather(keys_BPH, target_BM))
        # A target is likest to itself, of equal keys too.
        likeness_BPM = jnp.where(own_BPM, jnp.inf, jnp.where(filled_BM[:, None], similarity_BPM, -jnp.inf))
        slot_BP = jnp.argmax(likeness_BPM, axis=2).astype(jnp.int32)
        member_BP = jnp.where(rest_BP & ~jnp.any(own_BPM, axis=2), slot_BP, -1)
        merged, count_BM = _merge(patches_BPD, target_BM, member_BP, merge)
        merged = jnp.where(filled_BM[:, :, None], merged, 0)
        position_BM, size_BM = jnp.where(filled_BM, target_BM, -1), jnp.where(filled_BM, 1 + count_BM, 0)
        parts.append((merged, filled_BM, position_BM, size_BM))
        source_BP = jnp.where(rest_BP, dominant + slot_BP, source_BP)
    return VisualTokens(*(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True)), source_BP)


def _assign(keys_BPH: Array, chosen_BP: Array, target_BM: Array, places: np.ndarray) -> tuple[Array, Array]:
    """The target that each patch goes to (a target goes to itself), and which patches are targets: both [B, P].

    What it says of the chosen patches has no meaning. All patches are compared rather than the remaining ones alone:
    the product is tiny and no list of features has to be gathered.
    """
    similarity_BPM = ops.cosine(keys_BPH, ops.gather(keys_BPH, target_BM))
    nearest_BP = jnp.argmax(similarity_BPM, axis=2).astype(jnp.int32)
    own = np.full(chosen_BP.shape[1], -1, np.int32)  # place in the remaining list -> number of the target, or -1
    own[places] = np.arange(len(places))
    own_BP = jnp.where(chosen_BP, -1, jnp.asarray(own)[ops.rank(~chosen_BP)])
    return jnp.where(own_BP >= 0, own_BP, nearest_BP), own_BP >= 0


def _merge(patches_BPD: Array, target_BM: Array, member_BP: Array, merge: str) -> tuple[Array, Array]:
    """Contextual tokens [B, m, D] in the patches' dtype, and how many members each has besides its target [B, m]."""
    total_BMD, count_BM = ops.group_sum(patches_BPD, member_BP, target_BM.shape[1])
    target_BMD = ops.gather(patches_BPD, target_BM).astype(jnp.float32)
    count = count_BM[:, :, None].astype(jnp.float32)
    if merge == "paper":
        merged = (target_BMD + total_BMD) / (1.0 + count)
    else:
        merged = target_BMD + total_BMD / jnp.maximum(count, 1.0)
    return merged.astype(patches_BPD.dtype), count_BM


def _check_arguments(
    batch: int, patches: int, prefix: int, score: Array, keys: Array, merge: str, targets: str
) -> None:
    for name, value, known in (("merge", merge, MERGES), ("targets", targets, TARGETS)):
        if value not in known:
            raise ValueError(f"VisionZip: {name} = {value!r} is unknown; choose one of {', '.join(known)}")
    if score.shape != (batch, patches):
        raise ValueError(f"VisionZip: scores have shape {score.shape}; {patches} patches need {(batch, patches)}")
    if keys.shape[:2] != (batch, prefix + patches):
        kind = "with its CLS row first" if prefix else "without a CLS row"
        raise ValueError(
            f"VisionZip: keys have shape {keys.shape}; {patches} patches {kind} need "
            f"({batch}, {prefix + patches}, head width)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """See the module; `contextual` of the budget's tokens are merged ones, the others dominant (CLS among them)."""

    contextual: int = option(0, low=0, share=10 / 64)
    merge: str = option("official", choices=MERGES)
    targets: str = option("official", choices=TARGETS)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    return visionzip(
        features.patches_BPD,
        features.cls_BD,
        features.signals["cls_attention_BP"],
        features.signals["keys_BSH"],
        dominant=ask.tokens - ask.options.contextual,
        contextual=ask.options.contextual,
        merge=ask.options.merge,
        targets=ask.options.targets,
    )


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    contextual, patches = options.contextual, tower.patches
    if options.restore and contextual:
        raise ValueError(
            f"visionzip: options.contextual = {contextual} leaves no patch to options.restore = {options.restore}; one "
            "of them must be 0"
        )
    if not 1 <= tokens <= patches + 1:
        raise ValueError(
            f"visionzip: {tokens} tokens (the CLS token is one of them) asked of {patches} patches; "
            f"it must be 1 .. {patches + 1}"
        )
    if contextual >= tokens:
        raise ValueError(
            f"visionzip: {contextual} contextual of {tokens} tokens leave no place for the CLS token; "
            f"options.contextual must be 0 .. {tokens - 1}"
        )
    check_budget(patches, tokens - contextual, contextual)


ENTRIES = {
    "visionzip": Encoder(
        function=_apply,
        budget=_budget,
        options=Options,
        signals=("cls_attention_BP", "keys_BSH"),
        cls=True,
        classes=("attention", "similarity"),
        reads="CLS attention, keys",
        source="arXiv 2412.04467",
    )
}
