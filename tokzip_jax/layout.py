"""From a row of ids with placeholders to the slots that the language model sees.

An image placeholder becomes M vision slots, a VoCo placeholder k VoCo slots; sizes are static, whatever the rows hold,
so that one program serves every batch. Only integers here; `vlm.splice` moves the vectors.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tokzip_jax.masks import predecessors
from tokzip_jax.types import IMAGE_ID, PAD, PREFIX, TEXT, VISION, VOCO, VOCO_ID, Array, TokenStream


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Slots of a batch; all [B, T'].

    Attributes:
        stream: what every slot is.
        ids: the text id of a slot, 0 where it is not text.
        visual: index into the row's visual tokens, flattened to I*M; -1 elsewhere.
        voco: which VoCo token of its image (0 .. k-1); -1 elsewhere.
        previous: the slot whose output predicts this one, -1 for none.
        supervised: bool, the slot is a target of the loss.
    """

    stream: TokenStream
    ids: Array
    visual: Array
    voco: Array
    previous: Array
    supervised: Array


def slots(text_length: int, *, images: int, visual: int, voco: int) -> int:
    """How many slots T' a row of `text_length` ids may need: each image has a placeholder, and a VoCo one or none."""
    return text_length + images * (max(0, visual - 1) + max(0, voco - 1))


def expand(batch: dict[str, Array], valid_BIM: Array, *, voco: int, voco_count: Array | int) -> Layout:
    """Put slots where the placeholders are.

    A token before the first image of its sample is PREFIX; so is one between an image and its VoCo tokens, and it
    belongs to that image. What follows the first VoCo group is TEXT, also between images. A sample without an image
    is TEXT throughout.

    Args:
        batch: "ids", "thread", "sample" int32 [B, T] and "supervised" bool [B, T], see `data.pipeline`.
        valid_BIM: [B, I, M] bool, which visual tokens of an image are real; the others become padding.
        voco: VoCo slots of an image.
        voco_count: how many of them are used, the others become padding (0 .. voco; a scalar or [B]).

    Returns:
        The layout. Rows with fewer images than I end in padding; either padding side is fine.
    """
    ids, thread, sample = batch["ids"], batch["thread"], batch["sample"]
    rows, length = ids.shape
    images, visual = valid_BIM.shape[1:]
    is_image, is_voco = ids == IMAGE_ID, ids == VOCO_ID
    width = jnp.where(is_image, visual, jnp.where(is_voco, voco, 1))
    end = jnp.cumsum(width, axis=1)
    slot = jnp.arange(slots(length, images=images, visual=visual, voco=voco), dtype=jnp.int32)
    # The token a slot came from: how many tokens end at or before it.
    token = jnp.sum(end[:, None, :] <= slot[None, :, None], axis=-1)
    inside = token < length
    token = jnp.minimum(token, length - 1)

    def of_token(values: Array) -> Array:
        return jnp.take_along_axis(values, token, axis=1)

    offset = slot[None, :] - of_token(end - width)
    image_number = jnp.cumsum(is_image, axis=1)
    from_image, from_voco = of_token(is_image), of_token(is_voco)
    visual_index = (of_token(image_number) - 1) * visual + offset
    flat_valid = valid_BIM.reshape(rows, images * visual)
    picked = jnp.take_along_axis(flat_valid, jnp.clip(visual_index, 0, images * visual - 1), axis=1)
    count = jnp.broadcast_to(jnp.asarray(voco_count, jnp.int32), (rows,))[:, None]
    real = inside & (of_token(sample) > 0) & jnp.where(from_image, picked, ~from_voco | (offset < count))

    before, between = _before_image(is_image, is_voco, sample)
    kind = jnp.where(of_token(before | between), PREFIX, TEXT)
    kind = jnp.where(from_image, VISION, jnp.where(from_voco, VOCO, kind))
    kind = jnp.where(real, kind, PAD).astype(jnp.int32)
    owned = from_image | from_voco | of_token(between)
    thread, sample = of_token(thread), jnp.where(real, of_token(sample), 0)
    position, previous = predecessors(kind, thread, sample)
    stream = TokenStream(
        kind=kind,
        segment=jnp.where(real & owned, of_token(image_number), 0).astype(jnp.int32),
        thread=thread,
        sample=sample,
        position=position,
        order=jnp.broadcast_to(slot, kind.shape),
    )
    return Layout(
        stream=stream,
        ids=jnp.where(real & ~from_image & ~from_voco, of_token(ids), 0),
        visual=jnp.where(kind == VISION, visual_index, -1),
        voco=jnp.where(kind == VOCO, offset, -1),
        previous=previous,
        supervised=real & of_token(batch["supervised"]) & (previous >= 0),
    )


def _before_image(is_image: Array, is_voco: Array, sample: Array) -> tuple[Array, Array]:
    """[B, T] bool: tokens before their sample's first image; tokens between an image and its VoCo placeholder."""
    same = sample[:, None, :] == sample[:, :, None]
    index = jnp.arange(sample.shape[1])
    earlier = same & (index[None, None, :] <= index[None, :, None])
    later = same & ~earlier
    seen_images = jnp.sum(earlier & is_image[:, None, :], axis=-1)
    seen_vocos = jnp.sum(earlier & is_voco[:, None, :], axis=-1)
    coming_images = jnp.any(later & is_image[:, None, :], axis=-1)
    coming_vocos = jnp.any(later & is_voco[:, None, :], axis=-1)
    return (seen_images == 0) & coming_images, (seen_images > seen_vocos) & coming_vocos


def question(batch: dict[str, Array], length: int) -> tuple[Array, Array]:
    """What is asked in every row: the last `length` ids of its first question, and which of them are real.

    The text of thread 1 (or 0, where a row is one thread) behind the row's first image and before its first target. Of
    a conversation that is its first question: a picture has one set of tokens in a row. Rows hold one sample each.

    Args:
        batch: see `expand`.
        length: the most ids; a longer question loses its beginning, as in LLaMA-VID.

    Returns:
        [B, T] int32, on the left, 0 behind the end, and [B, T] bool, with T = min(length, the row's length).
    """
    ids, thread = batch["ids"], batch["thread"]
    here = (batch["sample"] > 0) & (thread <= 1)
    seen = jnp.cumsum(ids == IMAGE_ID, axis=1) > 0
    asked = here & seen & (ids > 0) & (jnp.cumsum(batch["supervised"] & here, axis=1) == 0)
    count = jnp.sum(asked, axis=1, keepdims=True)
    length = min(length, ids.shape[1])
    order = jnp.argsort(~asked, axis=1, stable=True)
    index = jnp.maximum(count - length, 0) + jnp.arange(length)[None]
    valid = index < count
    place = jnp.take_along_axis(order, jnp.minimum(index, ids.shape[1] - 1), axis=1)
    return jnp.where(valid, jnp.take_along_axis(ids, place, axis=1), 0), valid


def compact_positions(stream: TokenStream) -> TokenStream:
    """Positions as if pictures took no room: VoCo tokens and text are numbered one behind the other, for mask "voco".

    Rotary attention sees differences only. So the tokens of a picture keep their distances to its VoCo tokens, which
    alone read them, and lie on ids below those (from -1 downwards for the first picture); text and all VoCo tokens
    stand where `voco.compact` puts them in a cache. For one picture nothing changes but the origin. For several it is
    what a training has to use whose model will read frames out of caches with compact positions: by the original ids
    text stands a whole picture's tokens away from every frame but the last.

    What comes before the first picture of a sample keeps its distance to that one; later ones stand further off by
    the VoCo tokens and the text between, as `video.append` has it too.
    """
    kind, segment, order = stream.kind, stream.segment, stream.order
    thread, sample = stream.thread, stream.sample
    chain = (sample[:, None, :] == sample[:, :, None]) & (
        (thread[:, None, :] == 0) | (thread[:, None, :] == thread[:, :, None])
    )
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(chain & (segment[:, None, :] > 0), segment[:, None, :], none), axis=-1)
    picture = jnp.where(segment > 0, segment, first)
    # Text: what went before it. A part of a picture: what went before that picture's VoCo tokens.
    passed = jnp.where(
        (kind == TEXT)[:, :, None], order[:, None, :] < order[:, :, None], segment[:, None, :] <= picture[:, :, None]
    )
    unseen = (kind == VISION) | (kind == PREFIX)
    gone = jnp.sum(chain & passed & unseen[:, None, :], axis=-1, dtype=jnp.int32)
    return dataclasses.replace(stream, position=jnp.where(kind == PAD, 0, stream.position - gone))


def raster_positions(slots: Layout, place_BV: Array, patches: int) -> TokenStream:
    """Positions as if no picture had been compressed: a visual token has the id of the patch whose place it takes.

    What follows a picture stands behind all of its patches, whether they are there or not. A token without a place
    (CLS) has its picture's first id. Order stays what it was: it is not read off position ids.

    Args:
        slots: as `expand` made them.
        place_BV: [B, I*M] raster index of every visual token, -1 for none.
        patches: of a whole picture.
    """
    stream = slots.stream
    kind, segment, order, thread, sample = (
        getattr(stream, name) for name in ("kind", "segment", "order", "thread", "sample")
    )
    vision = kind == VISION
    before = (sample[:, None, :] == sample[:, :, None]) & (order[:, None, :] < order[:, :, None]) & vision[:, None, :]
    before &= (thread[:, None, :] == 0) | (thread[:, None, :] == thread[:, :, None])
    same = segment[:, None, :] == segment[:, :, None]
    first = vision & ~jnp.any(before & same, axis=-1)  # of its picture
    passed = before & first[:, None, :] & ~(vision[:, :, None] & same)
    pictures, tokens = (jnp.sum(part, axis=-1, dtype=jnp.int32) for part in (passed, before))
    place = jnp.take_along_axis(place_BV, jnp.maximum(slots.visual, 0), axis=1)
    own = jnp.where(vision, jnp.maximum(place, 0), 0)
    position = stream.position - tokens + pictures * patches + own
    return dataclasses.replace(stream, position=jnp.where(kind == PAD, 0, position))


def text_stream(ids: Array, *, thread: int | Array = 0) -> TokenStream:
    """The stream of plain text rows [B, T] (0 = padding), positions and order from 0: what stage two reads."""
    kind = jnp.where(ids > 0, TEXT, PAD).astype(jnp.int32)
    zeros = jnp.zeros_like(kind)
    thread = zeros + thread
    sample = jnp.where(ids > 0, 1, 0)
    position, _ = predecessors(kind, thread, sample)
    order = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), kind.shape)
    return TokenStream(kind=kind, segment=zeros, thread=thread, sample=sample, position=position, order=order)
