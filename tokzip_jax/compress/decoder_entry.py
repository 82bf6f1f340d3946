"""What an entry of the table of decoder-site methods is: a rule for which visual tokens go on between two layers.

A rule sees pictures, not rows of a model: `Look` holds what it may read of each, `Choice` what it decides. A method's
file holds `ENTRIES`, a dict name -> `Decoder`, beside its pure functions; `decoder.FILES` lists the file.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from tokzip_jax.types import Array


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


OPTIONS = ("scale", "bias", "heads")  # of `Setting`, what a config sets (as `decoder_scale` and so on)


def _no_merging(slots: int, keep: int) -> int:
    return 0


def _all_settings(setting: Setting, heads: int) -> None:
    """Nothing is refused."""


class Decoder(NamedTuple):
    """An entry of `DECODER`.

    Attributes:
        choose: choose(look, setting) -> `Choice`.
        rows: whose attention it reads: "last" (the prompt's last token), "text" (of the prompt's text behind a picture
            those that match it, `sparsevlm.raters`) or "prompt" (every token of the prompt).
        positions: "original" (position ids stay, with gaps) or "compact" (they are renumbered), as released.
        merged: merged(slots, keep) -> how many slots for merged tokens a cut adds.
        options: those of `OPTIONS` that it reads; the others have to stay at their defaults in a config.
        check: check(setting, heads of the model) raises a ValueError that names an option out of range.
        ahead: read the attention of the layer behind the cut instead of the layer before it.
        scaled: `sparsevlm.raters` are chosen by scaled products (paper).
        published: (the first layer that sees fewer tokens, how many) of 32 layers and 576 tokens. SparseVLM's cuts are
            behind the layers 2, 6, 15 (v1 and paper also 19). These two have no numbers but rank-dependent ones: here
            their upper limits.
        classes: of the survey (arXiv 2507.20198).
        count: how many tokens go on, in words.
        source: where it is published.
    """

    choose: Callable[[Look, Setting], Choice]
    rows: str
    positions: str
    merged: Callable[[int, int], int] = _no_merging
    options: tuple[str, ...] = ()
    check: Callable[[Setting, int], None] = _all_settings
    ahead: bool = False
    scaled: bool = False
    published: tuple[tuple[int, int], ...] = ()
    classes: tuple[str, ...] = ("attention",)
    count: str = "the budget"
    source: str = ""


def own_row(look: Look) -> Array:
    """[G, N, V]: the one row that counts for each picture."""
    return jnp.sum(jnp.where(look.counts_GR[:, None, :, None], look.attention_GNRV, 0.0), axis=2)
