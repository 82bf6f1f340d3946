"""Decoder-site compressors in one table: rules that say, between two layers, which visual tokens go on.

A rule sees pictures, not rows of a model: `Look` holds what it may read of each, `Choice` what it decides.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from tokzip_jax.compress import fastv, pyramiddrop, sparsevlm
from tokzip_jax.types import Array

DEPTH = 32  # layers of the models that schedules are published for


class Look(NamedTuple):
    """What a rule reads of G pictures.

    Attributes:
        attention_GNRV: [G, N, R, V] float32, softmax attention of R rows over the visual tokens, head by head.
        counts_GR: [G, R] bool, the rows that have a say about the picture.
        tokens_GVD: [G, V, D] states of the visual tokens at the cut.
        valid_GV: [G, V] bool, the real ones; the others are empty slots.
        offset_GRV: [G, R, V] int32, position id of the row less that of the token.
    """

    attention_GNRV: Array
    counts_GR: Array
    tokens_GVD: Array
    valid_GV: Array
    offset_GRV: Array


class Choice(NamedTuple):
    """What goes on.

    Attributes:
        kept_GV: [G, V] bool.
        merged_GCD: [G, C, D] tokens that are put behind the kept ones; None = none.
        real_GC: [G, C] bool, which of them are real; None = none.
    """

    kept_GV: Array
    merged_GCD: Array | None = None
    real_GC: Array | None = None


class Setting(NamedTuple):
    """Static settings of a rule: `keep` tokens; `scale` and `bias` of SparseVLM's v1, `scale` of its paper's rule; of
    "+" its `heads`, `head_dim` and `theta`."""

    keep: int
    scale: float = 0.0
    bias: float = 0.0
    heads: int = 0
    head_dim: int = 0
    theta: float = 0.0


def _no_merging(slots: int, keep: int) -> int:
    return 0


class Decoder(NamedTuple):
    """An entry of `DECODER`.

    Attributes:
        choose: choose(look, setting) -> `Choice`.
        rows: whose attention it reads: "last" (the prompt's last token), "text" (of the prompt's text behind a picture
            those that match it, `sparsevlm.raters`) or "prompt" (every token of the prompt).
        positions: "original" (position ids stay, with gaps) or "compact" (they are renumbered), as released.
        merged: merged(slots, keep) -> how many slots for merged tokens a cut adds.
        ahead: read the attention of the layer behind the cut instead of the layer before it.
        scaled: `sparsevlm.raters` are chosen by scaled products (paper).
        published: (the first layer that sees fewer tokens, how many) of 32 layers and 576 tokens. SparseVLM's cuts are
            behind the layers 2, 6, 15 (v1 and paper also 19). These two have no numbers but rank-dependent ones: here
            their upper limits.
        classes: of the survey (arXiv 2507.20198).
        count: how many tokens go on, in words.
        source: where it is published.
        file: of `tokzip_jax/compress/` that holds its arithmetic.
    """

    choose: Callable[[Look, Setting], Choice]
    rows: str
    positions: str
    merged: Callable[[int, int], int] = _no_merging
    ahead: bool = False
    scaled: bool = False
    published: tuple[tuple[int, int], ...] = ()
    classes: tuple[str, ...] = ("attention",)
    count: str = "the budget"
    source: str = ""
    file: str = ""


def _own_row(look: Look) -> Array:
    """[G, N, V]: the one row that counts for each picture."""
    return jnp.sum(jnp.where(look.counts_GR[:, None, :, None], look.attention_GNRV, 0.0), axis=2)


def _fastv(look: Look, setting: Setting) -> Choice:
    return Choice(fastv.fastv(_own_row(look), look.valid_GV, keep=setting.keep))


def _fastv_paper(look: Look, setting: Setting) -> Choice:
    behind = look.counts_GR[:, :, None] & (look.offset_GRV > 0)
    return Choice(fastv.fastv_paper(look.attention_GNRV, behind, look.valid_GV, keep=setting.keep))


def _pyramiddrop(look: Look, setting: Setting) -> Choice:
    return Choice(pyramiddrop.pyramiddrop(_own_row(look), look.valid_GV, keep=setting.keep))


def _merge(look: Look, score_GV: Array, kept_GV: Array, most: int) -> Choice:
    merged = sparsevlm.recycle(look.tokens_GVD, score_GV, look.valid_GV & ~kept_GV, most=most)
    return Choice(kept_GV, *merged)


def _sparsevlm(look: Look, setting: Setting) -> Choice:
    score = sparsevlm.rate(jnp.mean(look.attention_GNRV, axis=1), look.counts_GR)
    kept = fastv.best(score, look.valid_GV, setting.keep)
    return _merge(look, score, kept, kept.shape[1] - setting.keep)


def _by_rank(look: Look, setting: Setting, counted: Callable[[Array, Array], Array]) -> Choice:
    """SparseVLM with a count of each picture's own: counted(rank, real tokens), both [G]."""
    weights = jnp.mean(look.attention_GNRV, axis=1)
    rank = sparsevlm.attention_rank(weights, look.counts_GR, look.valid_GV)
    count = counted(rank, jnp.sum(look.valid_GV, axis=1, dtype=jnp.int32))
    score = sparsevlm.rate(weights, look.counts_GR)
    kept = sparsevlm.select(score, look.valid_GV, count, most=setting.keep)
    return _merge(look, score, kept, kept.shape[1])


def _sparsevlm_v1(look: Look, setting: Setting) -> Choice:
    return _by_rank(look, setting, functools.partial(sparsevlm.adaptive_keep, scale=setting.scale, bias=setting.bias))


def _sparsevlm_paper(look: Look, setting: Setting) -> Choice:
    return _by_rank(look, setting, functools.partial(sparsevlm.paper_keep, scale=setting.scale))


def _sparsevlm_plus(look: Look, setting: Setting) -> Choice:
    pull = sparsevlm.gravity(look.offset_GRV, head_dim=setting.head_dim, theta=setting.theta)
    weights = look.attention_GNRV / pull[:, None]
    weights = sparsevlm.busy_heads(weights, look.counts_GR, look.valid_GV, heads=setting.heads)
    return Choice(fastv.best(sparsevlm.rate(weights, look.counts_GR), look.valid_GV, setting.keep))


_FASTV = {"source": "arXiv 2403.06764", "file": "fastv", "published": ((2, 288),)}
_SPARSEVLM = {"classes": ("attention", "query"), "source": "arXiv 2410.04417", "file": "sparsevlm"}
_AND_MERGED = "the budget, and merged ones"
_BY_RANK = {
    "rows": "text",
    "positions": "compact",
    "merged": lambda slots, keep: sparsevlm.recycled(slots)[1],
    "published": ((3, 300), (7, 200), (16, 110), (20, 110)),
    "count": "by rank, up to the budget, and merged ones",
    **_SPARSEVLM,
}
DECODER = {
    "fastv": Decoder(_fastv, "last", "original", **_FASTV),
    "fastv_paper": Decoder(_fastv_paper, "prompt", "original", **_FASTV),
    "pyramiddrop": Decoder(
        _pyramiddrop,
        "last",
        "compact",
        ahead=True,
        published=((8, 288), (16, 144), (24, 72)),
        source="arXiv 2410.17247",
        file="pyramiddrop",
    ),
    "sparsevlm": Decoder(
        _sparsevlm,
        "text",
        "compact",
        lambda slots, keep: sparsevlm.recycled(slots - keep)[1],
        published=((3, 300), (7, 200), (16, 110)),
        count=_AND_MERGED,
        **_SPARSEVLM,
    ),
    "sparsevlm_v1": Decoder(_sparsevlm_v1, **_BY_RANK),
    "sparsevlm_paper": Decoder(_sparsevlm_paper, scaled=True, **_BY_RANK),
    "sparsevlm_plus": Decoder(
        _sparsevlm_plus, "text", "original", published=((3, 300), (7, 200), (16, 118)), **_SPARSEVLM
    ),
}


def cuts(name: str, depth: int) -> dict[int, int]:
    """The published schedule of a method in proportion to `depth` layers: first layer with fewer tokens -> how many of
    576; of cuts that fall together the last one."""
    return {
        min(max(1, round(depth * layer / DEPTH)), depth - 1): count for layer, count in DECODER[name].published
    }


class Step(NamedTuple):
    """One cut, before layer `layer`: of a picture's `before` token slots `keep` stay, `merged` may be added, `after`
    go on."""

    layer: int
    keep: int
    before: int
    merged: int
    after: int


def steps(name: str, visual: int, layers: tuple[int, ...], keep: tuple[int, ...], *, depth: int) -> tuple[Step, ...]:
    """A checked schedule.

    Args:
        name: of `DECODER`.
        visual: token slots of a picture that enter the first layer.
        layers: the cuts, each the number of the first layer that sees fewer tokens.
        keep: tokens of a picture that stay at each cut, merged ones not counted.
        depth: layers of the model.

    Raises:
        ValueError: an unknown name or an impossible schedule, as one sentence naming `decoder`, `decoder_layers` or
            `decoder_keep`.
    """
    if name not in DECODER:
        raise ValueError(f"decoder = {name!r} is unknown; choose one of {', '.join(map(repr, ('none', *DECODER)))}")
    if not layers or len(layers) != len(keep):
        raise ValueError(
            f"decoder_keep = {keep} must name one number of tokens for each layer of decoder_layers = {layers}, and "
            "there must be at least one"
        )
    if any(not 1 <= layer < depth for layer in layers) or any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"decoder_layers = {layers} must increase strictly and lie between 1 and {depth - 1}")
    found, slots = [], visual
    for layer, kept in zip(layers, keep, strict=True):
        if not 1 <= kept <= slots:
            raise ValueError(
                f"decoder_keep = {keep} asks for {kept} tokens at layer {layer}, where {slots} arrive; it must lie "
                f"between 1 and {slots}"
            )
        merged = DECODER[name].merged(slots, kept)
        # Merged tokens come of deleted ones, so that there are never more than arrived.
        after = min(slots, kept + merged)
        found.append(Step(layer, kept, slots, merged, after))
        slots = after
    return tuple(found)


def check_rank(name: str, scale: float, bias: float) -> None:
    """Refuse settings of v1 under which nothing could ever be kept, and of the paper's rule what is no share.

    Raises:
        ValueError: naming `decoder_scale` (and `decoder_bias`).
    """
    if name == "sparsevlm_paper":
        if not 0 <= scale <= 1:
            raise ValueError(
                f"decoder_scale = {scale} must lie between 0 and 1: decoder = 'sparsevlm_paper' deletes that share of "
                "the tokens beyond the rank"
            )
        return
    if not (0 <= scale < math.inf and 0 <= bias < math.inf and scale + bias > 0):
        raise ValueError(
            f"decoder_scale = {scale} and decoder_bias = {bias} must be >= 0 and finite, and one of them above 0"
        )
