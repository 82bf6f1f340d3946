"""Decoder-site compression: runs of layers, and between two of them fewer visual tokens.

    layers 0 .. K1-1 over all tokens | a cut | layers K1 .. K2-1 over what is left | a cut | ...

At a cut, a rule of `compress.decoder.DECODER` reads a few rows of one layer's attention (that layer runs by itself, all
others keep their fused attention) and says which visual tokens of each picture go on. They are gathered into a shorter
row of static length. A budget counts the tokens of one picture (the released codes know one picture a row); text is
never dropped, and a row without a picture passes as it is. Under form "mask" the tokens stay where they are and become
padding, which nobody sees: the same result at full cost, to check the other form against.

Who is asked: tokens of the picture's own sample that stand before its first supervised one, so that a choice never
looks at the answer, and scoring an answer chooses as decoding it does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokzip_jax import layout, llm
from tokzip_jax.compress import decoder, sparsevlm
from tokzip_jax.compress.decoder import DECODER, Step
from tokzip_jax.compress.decoder_entry import OPTIONS, Choice, Look, Setting
from tokzip_jax.config import LlmConfig, MethodConfig, ModelConfig
from tokzip_jax.layout import Layout
from tokzip_jax.pictures import FAR, Places, at, first, shrink
from tokzip_jax.types import PAD, TEXT, VISION, Array, Params, TokenStream

FORMS = ("gather", "mask")
POSITIONS = ("official", "original", "compact")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """A run of layers over one row of tokens.

    Attributes:
        stream: [B, T] the tokens that these layers saw.
        k, v: their keys and values, [hi - lo, B, K, T, H] or tuples of hi - lo arrays; None where none were kept.
        lo, hi: layer numbers (static).
    """

    stream: TokenStream
    k: Array | tuple[Array, ...] | None
    v: Array | tuple[Array, ...] | None
    lo: int = dataclasses.field(metadata={"static": True})
    hi: int = dataclasses.field(metadata={"static": True})


def check(method: MethodConfig, visual: int, llm_cfg: LlmConfig) -> tuple[Step, ...]:
    """The schedule of a method, () where it has none, refused where it cannot be.

    Args:
        method: what becomes of pictures.
        visual: visual tokens of a picture that enter the language model.
        llm_cfg: the language model.

    Raises:
        ValueError: one sentence naming the field of `MethodConfig`.
    """
    for name, known in (("decoder_form", FORMS), ("decoder_positions", POSITIONS)):
        if getattr(method, name) not in known:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"{name} = {getattr(method, name)!r} is unknown; choose one of {choices}")
    if method.decoder == "none":
        if method.decoder_layers or method.decoder_keep:
            raise ValueError(
                f"decoder_layers = {method.decoder_layers} and decoder_keep = {method.decoder_keep} need a decoder, "
                f"one of {', '.join(map(repr, DECODER))}; with decoder = 'none' both must be empty"
            )
        _check_options(method, ())
        return ()
    steps = decoder.steps(method.decoder, visual, method.decoder_layers, method.decoder_keep, depth=llm_cfg.layers)
    if method.voco_mask != "visible":
        raise ValueError(
            f"decoder = {method.decoder!r} drops vision tokens that text reads, but under voco_mask = "
            f"{method.voco_mask!r} text reads none; use decoder = 'none', or voco_mask = 'visible'"
        )
    if method.packing != "tiles":
        raise ValueError(
            f"decoder = {method.decoder!r} has a budget a tile; packing = {method.packing!r} must be 'tiles'"
        )
    if method.decoder_form == "mask" and any(step.merged for step in steps):
        raise ValueError(
            f"decoder_form = 'mask' adds no tokens, but decoder = {method.decoder!r} merges some; use 'gather'"
        )
    _check_options(method, DECODER[method.decoder].options)
    DECODER[method.decoder].check(_setting(method, llm_cfg, steps[-1].keep), llm_cfg.heads)
    return steps


def _check_options(method: MethodConfig, read: tuple[str, ...]) -> None:
    """Refuse an option that is set and not read."""
    unread = [name for name in OPTIONS if name not in read]
    unread += ["form", "positions"] if method.decoder == "none" else []
    for key in (f"decoder_{name}" for name in unread):
        value, default = getattr(method, key), getattr(MethodConfig, key)
        if value != default:
            raise ValueError(
                f"{key} = {value!r} is nothing that decoder = {method.decoder!r} reads; leave it at {default!r}"
            )


def _setting(method: MethodConfig, llm_cfg: LlmConfig, keep: int) -> Setting:
    chosen = {name: getattr(method, f"decoder_{name}") for name in OPTIONS}
    return Setting(keep=keep, head_dim=llm_cfg.head_dim, theta=llm_cfg.rope_theta, **chosen)


def cuts(method: MethodConfig) -> tuple[int, ...]:
    """Layer numbers at which a stack that trains under this schedule is best stored split (`stack.split`).

    A run that covers a group of the stack scans it as it is, and the layer whose attention is read runs by itself.
    """
    if method.decoder == "none" or DECODER[method.decoder].ahead:
        return method.decoder_layers
    return tuple(sorted({cut for layer in method.decoder_layers for cut in (layer - 1, layer)} - {0}))


def run(
    cfg: ModelConfig,
    blocks: Params | tuple[Params, ...],
    x_BTD: Array,
    slots: Layout,
    table: Array,
    method: MethodConfig,
    *,
    images: int,
    visual: int,
    keep: bool = False,
) -> tuple[Array, Layout, tuple[Run, ...]]:
    """All layers over whole rows, with the method's cuts between them.

    Args:
        cfg, blocks, table: as in `llm.run_layers`.
        x_BTD: [B, T', D] embeddings of the slots, as `layout.expand` made them.
        slots: what they are.
        method: its decoder site.
        images, visual: the most pictures of a row, and token slots of one of them (static).
        keep: return the keys and values of every run.

    Returns:
        Hidden states [B, T'', D] of the slots that are left, what these are, and the runs of layers.

    Raises:
        ValueError: see `check`; several questions in a row, whose choices would differ (not seen under jit).
    """
    # A cut that keeps everything is none.
    steps = [step for step in check(method, visual, cfg.llm) if step.keep < step.before or step.merged]
    thread = slots.stream.thread
    if steps and not isinstance(thread, jax.core.Tracer) and np.asarray(thread).max() > 1:
        raise ValueError(
            f"a row holds several questions (batch['thread'] > 1), but decoder = {method.decoder!r} chooses by one "
            "question: pack one a row (data.questions = 1)"
        )
    text_length = slots.ids.shape[1] - layout.slots(0, images=images, visual=visual, voco=method.voco)
    marks_BTI = _marks(method, x_BTD, slots, Places.find(slots.stream, images, visual), text_length) if steps else None
    runs, lo = [], 0
    for step in steps:
        stream, rule = slots.stream, DECODER[method.decoder]
        most = {"last": images, "text": text_length, "prompt": stream.kind.shape[1]}[rule.rows]
        rows_BR = first(jnp.any(marks_BTI, axis=-1), most)
        x_BTD, kv, scores = _scored(
            cfg, blocks, x_BTD, stream, table, lo, step.layer, rows_BR, ahead=rule.ahead, keep=keep
        )
        runs.append(Run(stream, kv.get("k"), kv.get("v"), lo, step.layer))
        places = Places.find(stream, images, step.before)
        choice = _choose(cfg, method, step, scores, rows_BR, marks_BTI, places, x_BTD, stream.position)
        length = layout.slots(text_length, images=images, visual=step.after, voco=method.voco)
        policy = rule.positions if method.decoder_positions == "official" else method.decoder_positions
        x_BTD, slots, marks_BTI = shrink(
            x_BTD,
            slots,
            marks_BTI,
            places,
            choice,
            length=length if method.decoder_form == "gather" else None,
            compact=policy == "compact",
        )
        lo = step.layer
    x_BTD, out = llm.run_layers(cfg, blocks, x_BTD, slots.stream, table, lo=lo, keep=keep)
    runs.append(Run(slots.stream, out.get("k"), out.get("v"), lo, cfg.llm.layers))
    return x_BTD, slots, tuple(runs)


def _marks(method: MethodConfig, x_BTD: Array, slots: Layout, places: Places, text_length: int) -> Array:
    """[B, T, I] bool: the slots that have a say about each picture, settled once, on the input embeddings."""
    stream, rule = slots.stream, DECODER[method.decoder]
    index = jnp.arange(stream.kind.shape[1], dtype=jnp.int32)[None, :, None]
    sample_BI = at(stream.sample, places.slot[:, :, 0])
    mine = (stream.sample[:, :, None] == sample_BI[:, None]) & (stream.kind != PAD)[:, :, None]
    mine &= (places.last >= 0)[:, None]
    answer = jnp.min(jnp.where(mine & slots.supervised[:, :, None], index, FAR), axis=1, keepdims=True)
    prompt = mine & (index < answer)
    if rule.rows == "prompt":
        return prompt
    if rule.rows == "last":
        # No vision token, which could itself be dropped; a prompt ends with its question.
        words = prompt & (stream.kind != VISION)[:, :, None]
        return words & (index == jnp.max(jnp.where(words, index, -1), axis=1, keepdims=True))
    behind = prompt & (stream.kind == TEXT)[:, :, None] & (index > places.last[:, None])
    text_BR = first(jnp.any(behind, axis=-1), text_length)
    words_BRD = at(x_BTD, text_BR)
    rows = jnp.arange(x_BTD.shape[0])[:, None]

    def of_picture(slot_BV: Array, valid_BV: Array, behind_BT: Array) -> Array:
        words_BR = at(behind_BT, text_BR)
        found = sparsevlm.raters(at(x_BTD, slot_BV), valid_BV, words_BRD, words_BR, scaled=rule.scaled)
        return jnp.zeros_like(behind_BT).at[rows, text_BR].set(found)

    return jax.vmap(of_picture, in_axes=(1, 1, 2), out_axes=2)(places.slot, places.valid, behind)


def _scored(
    cfg: ModelConfig,
    blocks: Params | tuple[Params, ...],
    x_BTD: Array,
    stream: TokenStream,
    table: Array,
    lo: int,
    hi: int,
    rows_BR: Array,
    *,
    ahead: bool,
    keep: bool,
) -> tuple[Array, dict[str, Array], Array]:
    """Layers lo .. hi-1, their keys and values, and the scores [B, N, R, T] of layer hi-1 (or hi, `ahead`)."""
    parts = []
    for begin, end in [(lo, hi)] if ahead else [(lo, hi - 1), (hi - 1, hi)]:
        if begin < end:
            rows = rows_BR if end == hi and not ahead else None
            x_BTD, out = llm.run_layers(cfg, blocks, x_BTD, stream, table, lo=begin, hi=end, keep=keep, rows=rows)
            parts.append(out)
    if ahead:
        # Of this layer only the norm, queries and keys are read; XLA removes the rest.
        _, out = llm.run_layers(cfg, blocks, x_BTD, stream, table, lo=hi, hi=hi + 1, rows=rows_BR)
    kv = {}
    for name in ("k", "v") if keep else ():
        found = [part[name] for part in parts]
        kv[name] = sum(found, ()) if isinstance(blocks, tuple) else jnp.concatenate(found)
    return x_BTD, kv, out["scores"][0]


def _choose(
    cfg: ModelConfig,
    method: MethodConfig,
    step: Step,
    scores_BNRT: Array,
    rows_BR: Array,
    marks_BTI: Array,
    places: Places,
    x_BTD: Array,
    position_BT: Array,
) -> Choice:
    """The rule's decision for the B * I pictures of all rows."""

    def look_at(scores_NRT: Array, rows_R: Array, marks_TI: Array, slot_IV: Array, x_TD: Array, position_T: Array):
        attention = jnp.moveaxis(scores_NRT[:, :, slot_IV], 2, 0)
        offset = position_T[rows_R][None, :, None] - position_T[slot_IV][:, None, :]
        return attention, marks_TI[rows_R].T, x_TD[slot_IV], offset

    seen = jax.vmap(look_at)(scores_BNRT, rows_BR, marks_BTI, places.slot, x_BTD, position_BT)
    attention, counts, tokens, offset = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in seen)
    look = Look(lax.stop_gradient(attention), counts, tokens, places.valid.reshape(-1, step.before), offset)
    return DECODER[method.decoder].choose(look, _setting(method, cfg.llm, step.keep))
