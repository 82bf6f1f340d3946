"""VoCo-LLaMA's two-stage inference (arXiv 2406.12275, section 3): compress a picture once, ask about it often.

Stage one runs prefix, vision and VoCo tokens through the language model and keeps the keys and values of those slots
that text may see, which under the official mask are the VoCo tokens alone. Stage two reads any number of questions
from that cache. Both stages together equal one masked pass, because nothing that text reads depends on text.

Positions of the kept slots are a policy. "original": they keep their ids, and text goes on where it would have stood
in one pass. "compact": they are renumbered from 0 and their cached keys are rotated to the new places, so that the
dropped vision tokens use up no context. Rotary attention sees only differences, and VoCo tokens and the text behind
them move alike, so for the VoCo tokens of one picture this equals the masked pass too. Where something else is kept
(the prefix under "prefix_visible", other frames) its distance to the text shrinks by the vision tokens that are gone.
Renumbering without rotating is wrong, and not offered.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from tokzip_jax import generate, layers, llm, vlm
from tokzip_jax.config import LlmConfig, MethodConfig, ModelConfig
from tokzip_jax.layout import text_stream
from tokzip_jax.masks import TABLES, rule
from tokzip_jax.types import PAD, PREFIX, TEXT, VOCO, Array, Params, TokenStream, VisualTokens

POLICIES = ("original", "compact")
FORMAT = "tokzip_jax voco cache 2"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocoCache:
    """What is left of pictures: keys and values of the slots that text may see.

    Attributes:
        k, v: [L, B, K, m, H]; k is rotated to `position`.
        kind, segment, position: [B, m] int32; a slot that is not used is PAD.
        next_position: [B] int32, the id of the first text token.
        voco_mask: a name of `masks.TABLES`, under which it was built and has to be read (static).
    """

    k: Array
    v: Array
    kind: Array
    segment: Array
    position: Array
    next_position: Array
    voco_mask: str = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.k.nbytes + self.v.nbytes

    def take(self, rows: Array | Sequence[int]) -> "VocoCache":
        """The caches of the given rows, repeated as often as they are named: one picture, many questions."""
        rows = jnp.asarray(rows)
        ints = {n: getattr(self, n)[rows] for n in ("kind", "segment", "position", "next_position")}
        return dataclasses.replace(self, k=self.k[:, rows], v=self.v[:, rows], **ints)


def build(
    cfg: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    method: MethodConfig,
    *,
    positions: str = "original",
    voco_count: Array | int | None = None,
    back: Array | None = None,
    visual: VisualTokens | None = None,
) -> VocoCache:
    """Stage one: pictures to their VoCo cache.

    Args:
        cfg, params: the model.
        batch: rows as in `vlm.forward`, one sample each; text behind the VoCo tokens may be there and is not read.
        method: with `voco` >= 1 and a mask under which text does not see vision.
        positions: "original" or "compact", see above.
        voco_count: VoCo tokens in use; None = all slots.
        back: [B], how much further back than usual the tokens before the first picture stand: what lies between them
            and a later frame of a video.
        visual: what `vlm.encode` gave for the pictures, which are not read then.

    Raises:
        ValueError: a mask that would have to keep the vision tokens, no VoCo slots, a method that reads the
            question, a decoder site, an unknown policy, or several samples packed into a row (not seen under jit, where
            the integers are not known).
    """
    if method.voco_mask == "visible" or method.voco < 1:
        raise ValueError(
            f"voco={method.voco} with voco_mask={method.voco_mask!r} leaves nothing to cache: "
            "two-stage inference needs voco >= 1 and the mask 'voco' or 'prefix_visible'"
        )
    if reader := vlm.reads_question(method):
        raise ValueError(
            f"{reader} reads the question, so that a picture's cache would serve that one alone: two-stage inference "
            "needs a method that reads the picture alone"
        )
    _check_policy(positions)
    if method.decoder != "none":
        raise ValueError(f"decoder = {method.decoder!r} chooses by the question, which stage one has not: use 'none'")
    sample = batch["sample"]
    if not isinstance(sample, jax.core.Tracer) and np.asarray(sample).max() > 1:
        raise ValueError("a row holds several samples (batch['sample'] > 1): two-stage inference reads one a row")
    count = method.voco if voco_count is None else voco_count
    key = jax.random.key(method.seed)
    x, slots, _, _ = vlm.embed(cfg, params, batch, method, voco_count=count, key=key, visual=visual)
    stream = _without_text(slots.stream)
    if back is not None:
        ahead = (stream.kind == PREFIX) & (stream.segment == 0)
        stream = dataclasses.replace(stream, position=stream.position - jnp.where(ahead, back[:, None], 0))
    _, kv = llm.run_layers(cfg, params["llm"]["layers"], x, stream, jnp.asarray(TABLES[method.voco_mask]), keep=True)
    prefix = batch["ids"].shape[1] if method.voco_mask == "prefix_visible" else 0
    keep = method.voco * batch["images"].shape[1] + prefix
    cache = _gather(kv["k"], kv["v"], stream, method.voco_mask, min(keep, stream.kind.shape[1]))
    return compact(cfg.llm, cache) if positions == "compact" else cache


def _check_policy(positions: str) -> None:
    if positions not in POLICIES:
        raise ValueError(f"positions={positions!r} is unknown; choose {' or '.join(map(repr, POLICIES))}")


def _without_text(stream: TokenStream) -> TokenStream:
    return dataclasses.replace(stream, kind=jnp.where(stream.kind == TEXT, PAD, stream.kind))


def _gather(k: Array, v: Array, stream: TokenStream, voco_mask: str, keep: int) -> VocoCache:
    """The slots that a text token behind the row would see, in their order, in `keep` static slots."""
    zero = jnp.zeros_like(stream.kind)
    last = zero + 2**30
    reader = TokenStream(kind=zero + TEXT, segment=zero, thread=zero, sample=zero + 1, position=zero, order=last)
    seen = rule(reader, stream, jnp.asarray(TABLES[voco_mask]))
    index = jnp.argsort(~seen, axis=1, stable=True)[:, :keep]

    def of(values: Array) -> Array:
        return jnp.take_along_axis(values, index, axis=1)

    used = of(seen)
    rows = index[None, :, None, :, None]
    real = stream.kind != PAD
    return VocoCache(
        k=jnp.take_along_axis(k, rows, axis=3),
        v=jnp.take_along_axis(v, rows, axis=3),
        kind=jnp.where(used, of(stream.kind), PAD),
        segment=jnp.where(used, of(stream.segment), 0),
        position=jnp.where(used, of(stream.position), 0),
        next_position=jnp.max(jnp.where(real, stream.position + 1, 0), axis=1),
        voco_mask=voco_mask,
    )


def rotate_to(llm_cfg: LlmConfig, cache: VocoCache, position: Array, next_position: Array) -> VocoCache:
    """Move slots to other position ids [B, m] by rotating their keys; values carry no position."""
    angles = layers.rope_angles(position - cache.position, llm_cfg.head_dim, llm_cfg.rope_theta)
    k = jax.vmap(lambda k_layer: layers.rotate(k_layer, angles))(cache.k)
    return dataclasses.replace(cache, k=k, position=position, next_position=next_position)


def compact(llm_cfg: LlmConfig, cache: VocoCache, start: Array | int = 0) -> VocoCache:
    """Renumber the used slots start, start + 1, ... and rotate their keys there; text goes on behind them.

    `start` is a number, or one a row [B].
    """
    used = cache.kind != PAD
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), used.shape[:1])
    position = start[:, None] + jnp.cumsum(used, axis=1, dtype=jnp.int32) - 1
    total = start + jnp.sum(used, axis=1, dtype=jnp.int32)
    return rotate_to(llm_cfg, cache, jnp.where(used, position, 0), total)


def join(
    llm_cfg: LlmConfig, caches: Sequence[VocoCache], *, positions: str = "compact", text_length: int = 0
) -> VocoCache:
    """The frames of a video, each cached alone, as one cache in the order given (time).

    A frame's own positions start at 0; here it is rotated to its place in time. "compact" counts the kept tokens only.
    "original" gives every frame all the positions that it used when it was read (prefix and vision tokens included),
    one frame behind the other. Prefix slots (mask "prefix_visible") are kept of the first frame only.

    Args:
        llm_cfg: the language model's config.
        caches: with the same batch size and mask, one a frame.
        positions: "compact" or "original".
        text_length: tokens that will follow, for the check of the context limit.

    Raises:
        ValueError: no frames, frames of different masks, an unknown policy, or more positions than `max_positions`.
    """
    _check_policy(positions)
    if not caches:
        raise ValueError("no caches to join: give at least one frame")
    masks = sorted({cache.voco_mask for cache in caches})
    if len(masks) > 1:
        raise ValueError(f"the caches to join were built under different masks, {' and '.join(masks)}; use one")
    parts, offset = [], jnp.zeros_like(caches[0].next_position)
    for number, cache in enumerate(caches, start=1):
        kind = cache.kind if number == 1 else jnp.where(cache.kind == PREFIX, PAD, cache.kind)
        part = dataclasses.replace(cache, kind=kind, segment=jnp.where(kind == VOCO, number, 0))
        if positions == "compact":
            part = compact(llm_cfg, part, offset)
        else:
            moved = jnp.where(kind != PAD, part.position + offset[:, None], 0)
            part = rotate_to(llm_cfg, part, moved, part.next_position + offset)
        offset = part.next_position
        parts.append(part)
    check_context(llm_cfg, offset, text_length)
    ints = {n: jnp.concatenate([getattr(p, n) for p in parts], axis=1) for n in ("kind", "segment", "position")}
    k, v = (jnp.concatenate([getattr(p, n) for p in parts], axis=3) for n in ("k", "v"))
    return dataclasses.replace(caches[0], k=k, v=v, next_position=offset, **ints)


def check_context(llm_cfg: LlmConfig, next_position: Array, text_length: int) -> None:
    """Refuse a cache that leaves no room for the text (skipped under jit, where positions are not known).

    Raises:
        ValueError: with the numbers.
    """
    if isinstance(next_position, jax.core.Tracer):
        return
    needed = int(jnp.max(next_position)) + text_length
    if needed > llm_cfg.max_positions:
        raise ValueError(
            f"{needed} positions (cache and {text_length} text tokens) exceed max_positions={llm_cfg.max_positions}: "
            'join fewer frames, or join them with positions="compact"'
        )


def ask(
    cfg: ModelConfig,
    params: Params,
    cache: VocoCache,
    ids: Array,
    *,
    max_new: int,
    blocks: tuple[Params, ...] | None = None,
) -> generate.Prompt:
    """Stage two: read questions into a copy of the cache; continue with `generate.decode`.

    Args:
        cfg, params: the model.
        cache: one row a question (see `VocoCache.take`).
        ids: [B, T] int32 text ids, 0 = padding on either side.
        max_new: free slots left for the answer.
        blocks: the layers out of `stack.unstack`, which `generate.decode` needs and which read a short question faster.

    Raises:
        ValueError: cache and questions of different batch sizes, or past the context limit.
    """
    rows, kept = cache.kind.shape
    if ids.shape[0] != rows:
        raise ValueError(f"{ids.shape[0]} questions need as many cache rows, not {rows}: use cache.take([...])")
    check_context(cfg.llm, cache.next_position, ids.shape[1] + max_new)
    text = text_stream(ids)
    text = dataclasses.replace(text, position=text.position + cache.next_position[:, None])
    zero = jnp.zeros_like(cache.kind)
    order = jnp.broadcast_to(jnp.arange(kept, dtype=jnp.int32), zero.shape)
    kept_stream = TokenStream(
        kind=cache.kind, segment=cache.segment, thread=zero, sample=zero + 1, position=cache.position, order=order
    )
    filled = llm.extend(llm.KvCache(k=cache.k, v=cache.v, stream=kept_stream), ids.shape[1] + max_new)
    x = params["llm"]["embed"]["table"].astype(cfg.dtype)[ids]
    table = jnp.asarray(TABLES[cache.voco_mask])
    return generate.read(cfg, params, x, text, table, cache=filled, offset=kept, blocks=blocks)


def save(path: str | pathlib.Path, cache: VocoCache, llm_cfg: LlmConfig) -> None:
    """Write a cache as a safetensors file that knows which shape of language model it belongs to."""
    tensors = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
    voco_mask = tensors.pop("voco_mask")
    shape = json.dumps(dataclasses.asdict(llm_cfg))
    save_file(tensors, str(path), metadata={"format": FORMAT, "llm": shape, "voco_mask": voco_mask})


def load(path: str | pathlib.Path, llm_cfg: LlmConfig) -> VocoCache:
    """Read a cache back.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file, or one of another language model.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no VoCo cache at {path}")
    try:
        with safe_open(str(path), framework="flax") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a VoCo cache: {error}") from error
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a VoCo cache of this version ({FORMAT!r})")
    theirs, ours = json.loads(found["llm"]), dataclasses.asdict(llm_cfg)
    different = [f"{name} {theirs.get(name)} -> {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
    if different:
        raise ValueError(f"{path} was written by another language model: {', '.join(different)}")
    return VocoCache(**tensors, voco_mask=found["voco_mask"])
