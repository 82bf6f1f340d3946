"""Where the tokens of pictures stand in a row, and the row without some of them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress.decoder_entry import Choice
from tokzip_jax.layout import Layout
from tokzip_jax.masks import predecessors
from tokzip_jax.types import PAD, VISION, Array, TokenStream

FAR = 2**30  # behind every slot


def first(marked_BT: Array, count: int) -> Array:
    """[B, count] the first marked slots of each row, ascending, then unmarked ones."""
    return jnp.argsort(~marked_BT, axis=1, stable=True)[:, :count]


def at(values: Array, index: Array) -> Array:
    """values [B, T] or [B, T, D] at slots [B, ...]: [B, ...] or [B, ..., D]."""
    return jax.vmap(lambda row, slot: row[slot])(values, index)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of each picture of a row stand.

    Attributes:
        slot: [B, I, V] int32, ascending; 0 where there is no such token.
        valid: [B, I, V] bool, there is one.
    """

    slot: Array
    valid: Array

    @classmethod
    def find(cls, stream: TokenStream, images: int, visual: int) -> "Places":
        """Of rows [B, T] with at most `images` pictures of at most `visual` tokens."""
        number = jnp.arange(1, images + 1, dtype=jnp.int32)[None, :, None]
        mine = (stream.kind == VISION)[:, None] & (stream.segment[:, None] == number)
        index = jnp.arange(mine.shape[-1], dtype=jnp.int32)
        slot = -lax.top_k(jnp.where(mine, -index, -FAR), visual)[0]
        return cls(slot=jnp.where(slot < FAR, slot, 0), valid=slot < FAR)

    @property
    def last(self) -> Array:
        """[B, I] the last slot of each picture; -1 where there is no picture."""
        return jnp.max(jnp.where(self.valid, self.slot, -1), axis=-1)


def shrink(
    x_BTD: Array,
    slots: Layout,
    marks_BTI: Array,
    places: Places,
    choice: Choice,
    *,
    length: int | None,
    compact: bool,
) -> tuple[Array, Layout, Array]:
    """A row without the visual tokens that were not chosen, merged ones behind their picture's kept ones.

    Args:
        x_BTD, slots: states of the slots, and what they are.
        marks_BTI: marks that move with their slots.
        places, choice: the B * I pictures of the rows, and what goes on of them.
        length: slots of the new row (static), enough for what is left; None: tokens stay where they are, those that
            were not chosen as padding, and nothing can be merged.
        compact: renumber the position ids, else they stay as they are (a merged token has its picture's last one).

    Returns:
        States, slots and marks of the new row. Padding stands at its end.
    """
    kept_BIV = choice.kept_GV.reshape(places.valid.shape)
    row = jnp.arange(x_BTD.shape[0])[:, None, None]
    dropped = jnp.zeros(slots.ids.shape, bool).at[row, places.slot].max(places.valid & ~kept_BIV)
    alive = (slots.stream.kind != PAD) & ~dropped
    if length is not None:
        # Twice the slot number, so that merged tokens fit between a picture's last slot and what follows it.
        key = jnp.where(alive, 2 * jnp.arange(alive.shape[1]), FAR)
        everything = (x_BTD, slots, marks_BTI, key)
        if choice.merged_GCD is not None:
            merged = _merged(everything, places, choice)
            everything = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), everything, merged)
        index = jnp.argsort(everything[-1], axis=1, stable=True)[:, :length]
        x_BTD, slots, marks_BTI, key = jax.tree.map(lambda leaf: at(leaf, index), everything)
        alive = key < FAR
    return jnp.where(alive[:, :, None], x_BTD, 0), _relabel(slots, alive, compact), marks_BTI


def _merged(
    everything: tuple[Array, Layout, Array, Array], places: Places, choice: Choice
) -> tuple[Array, Layout, Array, Array]:
    """The merged tokens of all pictures of a row, as slots like the others: [B, I*C]."""
    x_BTD, slots, marks_BTI, _ = everything
    rows, images, _ = places.slot.shape
    count = choice.merged_GCD.shape[1]
    last = jnp.repeat(places.last, count, axis=1)
    real = choice.real_GC.reshape(rows, images * count)
    of = jax.tree.map(lambda leaf: at(leaf, jnp.maximum(last, 0)), slots)
    # They stand for no single visual token, and are no target.
    of = dataclasses.replace(of, visual=jnp.full_like(last, -1), supervised=jnp.zeros_like(real))
    tokens = choice.merged_GCD.reshape(rows, images * count, -1).astype(x_BTD.dtype)
    marks = jnp.zeros((*real.shape, images), marks_BTI.dtype)
    return tokens, of, marks, jnp.where(real, 2 * last + 1, FAR)


def _relabel(slots: Layout, alive: Array, compact: bool) -> Layout:
    """Slots that are gone become padding; order, predecessors and compact positions are those of what is left."""
    stream = slots.stream
    kind = jnp.where(alive, stream.kind, PAD)
    sample = jnp.where(alive, stream.sample, 0)
    compacted, previous = predecessors(kind, stream.thread, sample)
    stream = dataclasses.replace(
        stream,
        kind=kind,
        sample=sample,
        segment=jnp.where(alive, stream.segment, 0),
        position=compacted if compact else stream.position,
        order=jnp.broadcast_to(jnp.arange(kind.shape[1], dtype=jnp.int32), kind.shape),
    )
    return Layout(
        stream=stream,
        ids=jnp.where(alive, slots.ids, 0),
        visual=jnp.where(alive, slots.visual, -1),
        voco=jnp.where(alive, slots.voco, -1),
        previous=previous,
        supervised=slots.supervised & alive,
    )
