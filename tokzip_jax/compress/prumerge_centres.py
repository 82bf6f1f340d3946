"""Which patches become centres in PruMerge and PruMerge+ (`prumerge`), and how many."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.types import Array


def outliers(attention_BP: Array, count: str) -> tuple[Array, Array]:
    """How many centres the pictures want, and the stride of PruMerge+'s grid: both [B] int32.

    Args:
        attention_BP: [B, P].
        count: "sample" or "batch", see the module.
    """
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


def by_attention(attention_BP: Array) -> tuple[Array, Array]:
    """Patches by falling attention (of equal ones the lower first), and the rank of each: both [B, P] int32."""
    order_BP = jnp.argsort(-lax.stop_gradient(attention_BP).astype(jnp.float32), axis=1, stable=True)
    return order_BP.astype(jnp.int32), jnp.argsort(order_BP, axis=1).astype(jnp.int32)


def adaptive_centres(attention_BP: Array, slots: int, count: str) -> tuple[Array, Array]:
    """PruMerge+'s centres [B, slots] and which slots are filled: outliers and a grid, the best `slots` of them."""
    patches = attention_BP.shape[1]
    order_BP, rank_BP = by_attention(attention_BP)
    number = jnp.arange(patches, dtype=jnp.int32)[None]
    wanted, stride = (x[:, None] for x in outliers(attention_BP, count))
    is_top_BP = rank_BP < wanted
    # The last patch is never on the released grid.
    keep_BP = is_top_BP | ((number % stride == 0) & (number < patches - 1))
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
