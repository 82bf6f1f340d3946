"""RESTORE (arXiv 2606.01711, ICML 2026): merge what any selector dropped, and correct attention for it.

Half of the budget is spent by any selector; the patches that it dropped are merged into the other half. Anchors are
dropped patches that stand for many (high sum of cosines with all dropped ones) and unlike anything that stands for
more: one product and one top-k, no loop. Every other dropped patch joins its most similar anchor; the mean of a group
stands at its median patch, and the language model keeps the original position of everything.

The second half is a bias on the attention logits of the language model, log(size) + log(2 - mean_f cos(distance *
theta^f)): a token speaks for `size` patches, and what rotary positions take from far tokens is given back.

The released code applies the bias in the pass over the prompt (in decoding the size alone), and in the first layer
takes P / M for the size of every visual token; `restore_bias` takes sizes that are not whole for that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.greedy import check_shape, cleared, everywhere, in_raster_order, places
from tokzip_jax.types import Array, VisualTokens


def check_budget(patches: int, kept: int, tokens: int) -> None:
    """Refuse a budget that leaves no place for merged tokens, or is larger than the picture.

    Args:
        patches: P.
        kept: slots of the selection before (published: tokens // 2).
        tokens: the whole budget.

    Raises:
        ValueError: names the number and its range.
    """
    if not kept < tokens <= patches:
        raise ValueError(
            f"restore: {tokens} tokens asked of {patches} patches, {kept} of them kept by the selection before; "
            f"it must be {kept + 1} .. {patches}"
        )


def anchors(similarity_BPP: Array, free_BP: Array, count: int) -> Array:
    """The `count` free patches of highest representativeness times discriminativeness (all, if fewer): [B, P] bool.

    Representativeness is the sum of cosines with all free patches; discriminativeness is 1 - the highest cosine with
    a patch of higher representativeness (1 for the highest of all).
    """
    standing_BP = jnp.sum(jnp.where(free_BP[:, None, :], similarity_BPP, 0.0), axis=2)
    higher_BPP = (standing_BP[:, None, :] > standing_BP[:, :, None]) & free_BP[:, None, :]
    nearest_BP = jnp.max(jnp.where(higher_BPP, similarity_BPP, -jnp.inf), axis=2)
    unlike_BP = 1.0 - jnp.where(jnp.any(higher_BPP, axis=2), nearest_BP, 0.0)
    return ops.top_mask(jnp.where(free_BP, standing_BP * unlike_BP, -jnp.inf), count) & free_BP


def median_place(member_BAP: Array, size_BA: Array) -> Array:
    """The (lower) median index of each group, [B, A] int32; 0 for an empty group."""
    rank_BAP = jnp.cumsum(member_BAP, axis=2, dtype=jnp.int32) - member_BAP
    middle_BAP = member_BAP & (rank_BAP == ((size_BA - 1) // 2)[..., None])
    index = jnp.arange(member_BAP.shape[2], dtype=jnp.int32)
    return jnp.sum(jnp.where(middle_BAP, index, 0), axis=2, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="tokens")
def restore(
    base: VisualTokens,
    patches_BPD: Array,
    *,
    tokens: int,
    features_BPH: Array | None = None,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """Merge the patches that a selection dropped into the slots that it left over.

    Args:
        base: what any compressor returned for these patches; those with source -1 are merged.
        patches_BPD: [B, P, D] all patches.
        tokens: the whole budget, above the slots of `base`, at most P.
        features_BPH: [B, P, H] what is compared; None: the patches.
        valid_BP: [B, P] bool, False for patches that take no part (they too have source -1); None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order of positions. Merged tokens are means, averaged in float32, in
        the patches' dtype. Slots are empty (not valid) where fewer patches were dropped than there are slots left.
        Of equal scores or cosines the lower index wins.

    Raises:
        ValueError: a budget out of range, or shapes that do not fit.
    """
    batch, patches, width = patches_BPD.shape
    kept = base.tokens_BMD.shape[1]
    check_budget(patches, kept, tokens)
    check_shape("restore", "base.tokens_BMD", base.tokens_BMD.shape, (batch, None, width))
    check_shape("restore", "base.source_BP", base.source_BP.shape, (batch, patches))
    features_BPH = lax.stop_gradient(patches_BPD if features_BPH is None else features_BPH)
    check_shape("restore", "features", features_BPH.shape, (batch, patches, None))
    valid_BP = everywhere(patches_BPD, valid_BP)
    check_shape("restore", "valid", valid_BP.shape, (batch, patches))

    count = tokens - kept
    free_BP = (base.source_BP < 0) & valid_BP
    features_BPH = cleared(features_BPH, valid_BP)
    similarity_BPP = ops.cosine(features_BPH, features_BPH)
    anchor_BP = anchors(similarity_BPP, free_BP, count)
    place_BA, filled_BA = places(anchor_BP, count)
    # A slot is only empty when every free patch is an anchor: then this row is read by nobody.
    toward_BAP = ops.gather(similarity_BPP, place_BA)
    group_BP = jnp.where(anchor_BP, ops.rank(anchor_BP), jnp.argmax(toward_BAP, axis=1).astype(jnp.int32))
    group_BP = jnp.where(free_BP, group_BP, -1)

    total_BAD, size_BA = ops.group_sum(cleared(patches_BPD, free_BP), group_BP, count)
    member_BAP = group_BP[:, None, :] == jnp.arange(count)[None, :, None]
    merged_BAD = total_BAD / jnp.maximum(size_BA, 1)[:, :, None]
    merged = (
        merged_BAD.astype(patches_BPD.dtype),
        filled_BA,
        jnp.where(filled_BA, median_place(member_BAP, size_BA), -1),
        size_BA,
    )
    before = (base.tokens_BMD, base.valid_BM, base.position_BM, base.size_BM)
    parts = (jnp.concatenate(pair, axis=1) for pair in zip(before, merged, strict=True))
    return in_raster_order(VisualTokens(*parts, jnp.where(free_BP, kept + group_BP, base.source_BP)))


def restore_bias(
    query_position_BT: Array,
    key_position_BS: Array,
    key_size_BS: Array,
    *,
    head_dim: int,
    theta: float = 10_000.0,
    offset: float = 2.0,
) -> Array:
    """What to add to the scaled attention logits: log(size of the key) + log(offset - decay(distance)).

    decay(x) is the mean over frequencies f of cos(x theta^(-2f / head_dim)), 1 at distance 0; with offset 2 nothing is
    added for a token of size 1 at its own place. The printed formula leaves open whether the logarithm covers the
    product; the released code's does.

    Args:
        query_position_BT, key_position_BS: [B, T] and [B, S] rotary positions; the original ones, with their gaps.
        key_size_BS: [B, S] how many patches a key speaks for, whole or not; 0 (a token without patches) counts as 1,
            and so does text.
        head_dim: width of a head of the language model.
        theta: base of its rotary frequencies.
        offset: above 1.

    Returns:
        [B, T, S] float32.

    Raises:
        ValueError: an odd or empty head, or an offset that is not above 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"restore_bias: head_dim = {head_dim} must be even and at least 2")
    if not offset > 1:
        raise ValueError(f"restore_bias: offset = {offset} must be above 1, or the logarithm ends at distance 0")
    frequency = jnp.asarray(theta ** (-np.arange(0, head_dim, 2) / head_dim), jnp.float32)

    def turn(position: Array) -> Array:
        angle = position.astype(jnp.float32)[..., None] * frequency
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)

    # cos(a - b) = cos a cos b + sin a sin b: one product instead of a [T, S, frequencies] table.
    query_BTF, key_BSF = turn(query_position_BT), turn(key_position_BS)
    decay_BTS = jnp.einsum("BTF,BSF->BTS", query_BTF, key_BSF, precision=ops.EXACT) / frequency.size
    size_BS = jnp.maximum(key_size_BS.astype(jnp.float32), 1.0)
    return jnp.log(size_BS)[:, None, :] + jnp.log(offset - decay_BTS)
