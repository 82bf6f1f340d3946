"""Which patches become centres in PruMerge and PruMerge+ (`prumerge`), and how many."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.greedy import places
from tokzip_jax.types import Array


def outliers(attention_BP: Array, count: str, valid_BP: Array | None = None) -> tuple[Array, Array]:
    """How many centres the pictures want, and the stride of PruMerge+'s grid: both [B] int32.

    Args:
        attention_BP: [B, P].
        count: "sample" or "batch", see the module. With a mask the batch's share of a picture's own patches is rounded
            down exactly, not through float64.
        valid_BP: [B, P] bool, which patches are counted; None: all.
    """
    if valid_BP is not None:
        return _valid_outliers(attention_BP, count, valid_BP)
    batch, patches = attention_BP.shape
    score = attention_BP.astype(jnp.float32)
    rows = score.reshape(1, -1) if count == "batch" else score
    low, high = jnp.percentile(rows, jnp.array([25.0, 75.0]), axis=1)[..., None]
    number = jnp.sum(rows > high + 1.5 * (high - low), axis=1)
    # Both follow from the number through float64 ratios, so they are tables. No outlier: a grid as for one.
    ratio = np.arange(rows.shape[1] + 1) / rows.shape[1]
    stride = np.maximum((1.0 / np.maximum(ratio, ratio[1])).astype(np.int32) // 3, 1)
    kept = (patches * ratio).astype(np.int32) if count == "batch" else np.arange(patches + 1, dtype=np.int32)
    return tuple(jnp.broadcast_to(jnp.asarray(table)[number], (batch,)) for table in (kept, stride))


def _valid_outliers(attention_BP: Array, count: str, valid_BP: Array) -> tuple[Array, Array]:
    """`outliers` of pictures that differ in how many patches they have."""
    rows = (1, -1) if count == "batch" else attention_BP.shape
    score, counted = attention_BP.astype(jnp.float32).reshape(rows), valid_BP.reshape(rows)
    low, high = jnp.nanpercentile(jnp.where(counted, score, jnp.nan), jnp.array([25.0, 75.0]), axis=1)[..., None]
    number = jnp.sum(counted & (score > high + 1.5 * (high - low)), axis=1, dtype=jnp.int32)
    whole = jnp.sum(counted, axis=1, dtype=jnp.int32)
    # 1 / (number / whole) in float64 falls below its value only where that is an integer: these are a table.
    ratio = np.arange(1, score.shape[1] + 1, dtype=np.float64)
    inverse = jnp.asarray(np.concatenate([[0], 1.0 / (1.0 / ratio)]).astype(np.int32))
    one = jnp.maximum(number, 1)
    stride = jnp.maximum(jnp.where(whole % one == 0, inverse[whole // one], whole // one) // 3, 1)
    kept = jnp.sum(valid_BP, axis=1, dtype=jnp.int32) * number // jnp.maximum(whole, 1) if count == "batch" else number
    return kept, jnp.broadcast_to(stride, kept.shape)


def by_attention(attention_BP: Array, valid_BP: Array | None = None) -> tuple[Array, Array]:
    """Patches by falling attention (of equal ones the lower first), and the rank of each: both [B, P] int32.

    Patches that are not valid come last.
    """
    if valid_BP is not None:
        attention_BP = jnp.where(valid_BP, attention_BP, -jnp.inf)
    order_BP = jnp.argsort(-lax.stop_gradient(attention_BP).astype(jnp.float32), axis=1, stable=True)
    return order_BP.astype(jnp.int32), jnp.argsort(order_BP, axis=1).astype(jnp.int32)


def adaptive_centres(attention_BP: Array, slots: int, count: str, valid_BP: Array | None = None) -> tuple[Array, Array]:
    """PruMerge+'s centres [B, slots] and which slots are filled: outliers and a grid, the best `slots` of them."""
    patches = attention_BP.shape[1]
    order_BP, rank_BP = by_attention(attention_BP, valid_BP)
    number = jnp.arange(patches, dtype=jnp.int32)[None]
    wanted, stride = (x[:, None] for x in outliers(attention_BP, count, valid_BP))
    is_top_BP = rank_BP < wanted
    # The last patch is never on the released grid.
    if valid_BP is None:
        on_grid_BP = (number % stride == 0) & (number < patches - 1)
    else:  # the grid is one of valid patches, as if they stood side by side
        place_BP, last_B1 = ops.rank(valid_BP), jnp.sum(valid_BP, axis=1, keepdims=True, dtype=jnp.int32) - 1
        on_grid_BP = valid_BP & (place_BP % stride == 0) & (place_BP < last_B1)
    keep_BP = is_top_BP | on_grid_BP
    better_BP = ops.rank(jnp.take_along_axis(keep_BP, order_BP, axis=1))  # how many wanted ones are better; by rank
    keep_BP &= jnp.take_along_axis(better_BP, rank_BP, axis=1) < slots
    key_BP = jnp.where(keep_BP, jnp.where(is_top_BP, rank_BP, patches + number), 2 * patches + number)
    centre_BK = jnp.argsort(key_BP, axis=1)[:, :slots].astype(jnp.int32)
    return centre_BK, jnp.take_along_axis(keep_BP, centre_BK, axis=1)


def fixed_centres(attention_BP: Array, slots: int, repeats: str) -> tuple[Array, Array | None]:
    """PruMerge+'s centres with a fixed count, and with official repeats the list of patches to be taken in."""
    batch, patches = attention_BP.shape
    places = ops.evenly_spaced(patches, slots // 2).astype(np.int32)
    top = slots - len(places)
    grid_BG = jnp.broadcast_to(places[None], (batch, len(places)))
    on_grid_BP = jnp.broadcast_to(np.isin(np.arange(patches), places)[None], (batch, patches))
    if repeats == "none":
        order_BP, _ = by_attention(jnp.where(on_grid_BP, -jnp.inf, attention_BP))
        return jnp.concatenate([order_BP[:, :top], grid_BG], axis=1), None
    order_BP, rank_BP = by_attention(attention_BP)
    centre_BK = jnp.concatenate([order_BP[:, :top], grid_BG], axis=1)
    # A list of P in all: for every centre that repeats another one, the lowest of the other patches is left out.
    other_BP = jnp.where((rank_BP < top) | on_grid_BP, -1, jnp.arange(patches, dtype=jnp.int32)[None])
    return centre_BK, jnp.concatenate([centre_BK, jnp.sort(other_BP, axis=1)[:, slots:]], axis=1)


def valid_fixed_centres(
    attention_BP: Array, slots: int, repeats: str, valid_BP: Array
) -> tuple[Array, Array, Array | None, Array]:
    """`fixed_centres` of pictures that differ in how many patches they have.

    A picture with n < slots patches has n centres: it is what n slots would give.

    Returns:
        Centres [B, slots] and which slots are filled; the list [B, P] of patches to be taken in, or None for all in
        raster order, and which entries of it exist.
    """
    patches = attention_BP.shape[1]
    count_B1 = jnp.sum(valid_BP, axis=1, keepdims=True, dtype=jnp.int32)
    centres_B1 = jnp.minimum(count_B1, slots)
    grid_B1 = centres_B1 // 2
    top_B1 = centres_B1 - grid_B1
    number = jnp.arange(slots, dtype=jnp.int32)[None]
    filled_BK = number < centres_B1
    # Slots behind the outliers are the middles of equal parts of the valid patches, as `ops.evenly_spaced`.
    middle_BK = (2 * (number - top_B1) + 1) * count_B1 // jnp.maximum(2 * grid_B1, 1)
    is_grid_BK = filled_BK & (number >= top_B1)
    grid_BK = jnp.take_along_axis(places(valid_BP, patches)[0], jnp.where(is_grid_BK, middle_BK, 0), axis=1)
    index = jnp.arange(patches, dtype=jnp.int32)[None]
    on_grid_BP = jnp.any((grid_BK[:, :, None] == index[:, None]) & is_grid_BK[:, :, None], axis=1)
    others_first_BP = valid_BP & ~on_grid_BP if repeats == "none" else valid_BP
    order_BP, rank_BP = by_attention(attention_BP, others_first_BP)
    centre_BK = jnp.where(is_grid_BK, grid_BK, order_BP[:, :slots])
    if repeats == "none":
        return centre_BK, filled_BK, None, valid_BP
    # The list has as many entries as there are valid patches: as in `fixed_centres` the lowest others are left out.
    other_BP = jnp.where((rank_BP < top_B1) | on_grid_BP | ~valid_BP, -1, index)
    listed_BC = jnp.concatenate([filled_BK, index[:, slots:] >= patches - count_B1 + centres_B1], axis=1)
    candidate_BC = jnp.concatenate([centre_BK, jnp.sort(other_BP, axis=1)[:, slots:]], axis=1)
    return centre_BK, filled_BK, jnp.where(listed_BC, candidate_BC, 0), listed_BC
