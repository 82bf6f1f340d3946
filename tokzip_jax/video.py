"""Videos of any length as VoCo tokens: one frame at a time into a cache of fixed size (VoCo-LLaMA, section 3.3).

Every frame is compressed alone and its VoCo keys and values are put behind those of the frames before it; the frame's
vision tokens are gone before the next one comes. The paper does not say which positions frames have. Here a frame's
VoCo tokens follow those of the frame before it without a gap (`voco.join` with "compact", where a thousand frames of
one token take a thousand positions and not a thousand pictures), and the frame's own tokens lie in front of them, at
their usual distances.

A training that is to fit this puts the frames of a video in one row under the mask "voco" with
`MethodConfig.positions = "compact"`. Then one masked pass over the row and these caches are the same model, with or
without tokens in front of the first frame (`layout.compact_positions`). By the "original" ids the two differ: text
would stand all of a picture's tokens away from every frame but the last one. Frames that were cached without knowing
their place (`voco.build`, then `voco.join`) are the same too, but where there is a prefix: each of them was then read
with the prefix next to it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import voco
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.types import PAD, VOCO, Array, Params
from tokzip_jax.voco import VocoCache


def empty(cfg: ModelConfig, method: MethodConfig, *, frames: int, rows: int = 1, text_length: int = 0) -> VocoCache:
    """A cache with room for so many frames, and no frame in it.

    Args:
        cfg: the model.
        method: `voco` tokens a frame, under the mask "voco".
        frames: the most frames of a video.
        rows: videos.
        text_length: tokens of the longest question and its answer, for the check of the context limit.

    Raises:
        ValueError: another mask, no VoCo tokens or no frames, or more positions than the context has.
    """
    if method.voco_mask != "voco" or method.voco < 1:
        raise ValueError(
            f"voco={method.voco} with voco_mask={method.voco_mask!r}: frames are streamed with voco >= 1 under the "
            "mask 'voco'; with 'prefix_visible' join the frames' caches instead (voco.join)"
        )
    most = (cfg.llm.max_positions - text_length) // method.voco
    if not 1 <= frames <= most:
        raise ValueError(
            f"frames={frames} must lie between 1 and {most}: with {method.voco} tokens a frame and {text_length} text "
            f"tokens more would exceed max_positions={cfg.llm.max_positions}"
        )
    slots = frames * method.voco
    shape = (cfg.llm.layers, rows, cfg.llm.kv_heads, slots, cfg.llm.head_dim)
    # No buffer twice: all of them are given away when a frame is appended.
    kind, segment, position = (jnp.full((rows, slots), fill, jnp.int32) for fill in (PAD, 0, 0))
    return VocoCache(
        k=jnp.zeros(shape, cfg.dtype),
        v=jnp.zeros(shape, cfg.dtype),
        kind=kind,
        segment=segment,
        position=position,
        next_position=jnp.zeros(rows, jnp.int32),
        voco_mask=method.voco_mask,
    )


def append(
    cfg: ModelConfig,
    params: Params,
    cache: VocoCache,
    batch: dict[str, Array],
    method: MethodConfig,
    number: Array | int,
) -> VocoCache:
    """Compress one frame of every video and put it behind the frames before it.

    Pure, and the same program for every frame; under jit, donate `cache`, or each frame copies all of it (`Builder`
    does).

    Args:
        cfg, params: the model.
        cache: from `empty`, with the frames 0 .. number - 1.
        batch: rows as in `vlm.forward`, each with one image and its VoCo placeholder, the same tokens before them in
            every frame. A row of padding is a video that has ended; text is not read.
        method: as given to `empty`.
        number: which frame this is. Beyond the room of the cache the last frame would be written over.

    Raises:
        ValueError: more than one image a row, and what `voco.build` raises.
    """
    if batch["images"].shape[1] != 1:
        raise ValueError(f"a frame at a time: batch['images'] holds {batch['images'].shape[1]} images a row, not 1")
    # The frame is read where a picture by itself is, so that its values are the same at any time; its keys are turned.
    part = voco.build(cfg, params, batch, method, back=cache.next_position)
    part = voco.compact(cfg.llm, part, cache.next_position)
    part = dataclasses.replace(part, segment=jnp.where(part.kind == VOCO, number + 1, 0))

    def write(name: str, axis: int) -> Array:
        old, new = getattr(cache, name), getattr(part, name)
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), number * method.voco, axis)

    return dataclasses.replace(
        cache,
        k=write("k", 3),
        v=write("v", 3),
        **{name: write(name, 1) for name in ("kind", "segment", "position")},
        next_position=part.next_position,
    )


_append = functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)(append)


class Builder:
    """Takes the frames of a batch of videos as they come; `cache` is what to ask.

    >>> builder = Builder(cfg, params, method, frames=1000, text_length=32)  # doctest: +SKIP
    >>> for batch in frames:  # doctest: +SKIP
    ...     builder.add(batch)
    >>> prompt = voco.ask(cfg, params, builder.cache, ids, max_new=16)  # doctest: +SKIP

    Attributes:
        cache: of the frames so far; the next `add` takes its memory, so keep no other name for it.
        number: how many frames are in it.
        frames: how many there is room for.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        method: MethodConfig,
        *,
        frames: int,
        rows: int = 1,
        text_length: int = 0,
    ) -> None:
        """Arguments and errors as in `empty`."""
        self._cfg, self._params, self._method = cfg, params, method
        self.cache = empty(cfg, method, frames=frames, rows=rows, text_length=text_length)
        self.number, self.frames = 0, frames

    def add(self, batch: dict[str, Array]) -> None:
        """Append one frame of every video, see `append`.

        Raises:
            ValueError: the cache is full.
        """
        if self.number == self.frames:
            raise ValueError(f"the cache is full: it was made for frames={self.frames}; make one for more of them")
        number = np.int32(self.number)
        self.cache = _append(self._cfg, self._params, self.cache, batch, self._method, number)
        self.number += 1
