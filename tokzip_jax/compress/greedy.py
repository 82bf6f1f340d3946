"""What the selectors share: a greedy loop that stays on the device, and slots that a picture may leave empty.

A selector may be told which patches exist (`valid_BP`): the others, say the padding of a picture that is not square,
are never selected, count nowhere, and a picture with fewer patches than the budget leaves its last slots empty.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.types import Array, VisualTokens


def check_shape(method: str, name: str, found: tuple[int, ...], needed: tuple[int | None, ...]) -> None:
    """Refuse an array that does not belong to the patches; None in `needed` stands for any length.

    Raises:
        ValueError: names the array, its shape and the shape that would be right.
    """
    fits = len(found) == len(needed) and all(want in (None, got) for got, want in zip(found, needed, strict=True))
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in needed)
        raise ValueError(f"{method}: {name} has shape {tuple(found)}; it must be ({wanted}) to go with the patches")


def greedy(
    tokens: int,
    valid_BP: Array,
    state: Any,
    gain: Callable[[Any], Array],
    update: Callable[[Any, Array, Array], Any],
) -> tuple[Array, Array]:
    """Choose `tokens` patches one after the other, always the one of highest gain; of equal ones the lower index.

    Args:
        tokens: how many, 1 .. P.
        valid_BP: [B, P] bool; the others come last, by index, and only if there are not enough valid ones.
        state: whatever the method keeps between two choices (arrays of fixed shapes).
        gain: gain(state) -> [B, P] float32, above -1e30 and finite or +inf; what it says of chosen patches is ignored.
        update: update(state, chosen index [B] int32, number of the choice) -> state.

    Returns:
        [B, tokens] int32 in the order of choice, all different, and [B, P] bool.
    """
    batch, patches = valid_BP.shape
    index = jnp.arange(patches, dtype=jnp.int32)[None]

    def choose(number: Array, carry: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        state, chosen_BP, order_BM = carry
        score_BP = jnp.where(chosen_BP, -jnp.inf, jnp.where(valid_BP, gain(state), ops.MASKED))
        pick_B = jnp.argmax(score_BP, axis=1).astype(jnp.int32)
        order_BM = lax.dynamic_update_slice_in_dim(order_BM, pick_B[:, None], number, axis=1)
        return update(state, pick_B, number), chosen_BP | (index == pick_B[:, None]), order_BM

    start = (state, jnp.zeros((batch, patches), bool), jnp.zeros((batch, tokens), jnp.int32))
    _, chosen_BP, order_BM = lax.fori_loop(0, tokens, choose, start)
    return order_BM, chosen_BP


def row(matrix_BPK: Array, pick_B: Array) -> Array:
    """Row pick_B of every picture's matrix: [B, P, K] and [B] -> [B, K]."""
    return ops.gather(matrix_BPK, pick_B[:, None])[:, 0]


def places(chosen_BP: Array, slots: int) -> tuple[Array, Array]:
    """Indices of the chosen patches, ascending, in the first of `slots` slots.

    Args:
        chosen_BP: [B, P] bool with at most `slots` True in a row.
        slots: 0 .. P.

    Returns:
        [B, slots] int32 (0 in an empty slot) and [B, slots] bool, whether the slot is filled.
    """
    patches = chosen_BP.shape[1]
    index = jnp.arange(patches, dtype=jnp.int32)[None]
    order_BM = jnp.sort(jnp.where(chosen_BP, index, patches), axis=1)[:, :slots]
    filled_BM = order_BM < patches
    return jnp.where(filled_BM, order_BM, 0), filled_BM


def fill(patches_BPD: Array, chosen_BP: Array, slots: int) -> VisualTokens:
    """The result of a selection of at most `slots` patches: raster order, empty slots at the end.

    An empty slot is not valid and holds zeros, position -1 and size 0.
    """
    place_BM, filled_BM = places(chosen_BP, slots)
    return VisualTokens(
        tokens_BMD=jnp.where(filled_BM[:, :, None], ops.gather(patches_BPD, place_BM), 0),
        valid_BM=filled_BM,
        position_BM=jnp.where(filled_BM, place_BM, -1),
        size_BM=filled_BM.astype(jnp.int32),
        source_BP=ops.source(chosen_BP),
    )


def everywhere(patches_BPD: Array, valid_BP: Array | None) -> Array:
    """`valid_BP`, or all True where there is none: [B, P] bool."""
    return jnp.ones(patches_BPD.shape[:2], bool) if valid_BP is None else valid_BP


def cleared(x: Array, valid_BP: Array) -> Array:
    """`x` [B, P, ...] with zeros where a patch does not exist: padding may hold anything, and 0 times NaN is NaN."""
    return jnp.where(valid_BP.reshape(valid_BP.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def in_raster_order(result: VisualTokens) -> VisualTokens:
    """The same tokens, their slots sorted by position: CLS (-1) first, empty slots last."""
    last = jnp.iinfo(jnp.int32).max
    order_BM = jnp.argsort(jnp.where(result.valid_BM, result.position_BM, last), axis=1, stable=True)
    moved_BM = jnp.argsort(order_BM, axis=1)  # old slot -> new slot
    source_BP = jnp.take_along_axis(moved_BM, jnp.maximum(result.source_BP, 0), axis=1)

    def sort(x_BM: Array) -> Array:
        return jnp.take_along_axis(x_BM, order_BM, axis=1)

    return VisualTokens(
        tokens_BMD=ops.gather(result.tokens_BMD, order_BM),
        valid_BM=sort(result.valid_BM),
        position_BM=sort(result.position_BM),
        size_BM=sort(result.size_BM),
        source_BP=jnp.where(result.source_BP < 0, -1, source_BP).astype(jnp.int32),
    )
