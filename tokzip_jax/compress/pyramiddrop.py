"""PyramidDrop (arXiv 2410.17247, CVPR 2025): fewer visual tokens stage by stage.

The layers are cut into stages; at each cut a part of the visual tokens goes. Tokens are ranked by the attention that
the last token of the instruction would pay them in the layer behind the cut (its norm, queries and keys, one row), mean
over heads; the others move up, so that position ids have no gaps. The default of the released code for 32 layers cuts
before layers 8, 16 and 24 and leaves 50, 25 and 12.5 % of the tokens that entered.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tokzip_jax.compress.decoder_entry import Choice, Decoder, Look, Setting, own_row
from tokzip_jax.compress.fastv import best
from tokzip_jax.types import Array

RATIOS = (0.5, 0.25, 0.125)


def schedule(visual: int, ratios: Sequence[float] = RATIOS) -> tuple[int, ...]:
    """Tokens left behind each cut: int(visual * ratio), of the tokens that entered the model (official)."""
    return tuple(int(visual * ratio) for ratio in ratios)


@functools.partial(jax.jit, static_argnames="keep")
def pyramiddrop(attention_BNV: Array, valid_BV: Array, *, keep: int) -> Array:
    """Which visual tokens stay at one cut.

    Args:
        attention_BNV: [B, N, V] softmax weights of the last instruction token in the layer behind the cut.
        valid_BV: [B, V] bool, real tokens.
        keep: how many stay, 0 .. V.

    Returns:
        [B, V] bool; of equal scores the lower index wins.
    """
    return best(jnp.mean(attention_BNV.astype(jnp.float32), axis=1), valid_BV, keep)


def _pyramiddrop(look: Look, setting: Setting) -> Choice:
    return Choice(pyramiddrop(own_row(look), look.valid_GV, keep=setting.keep))


ENTRIES = {
    "pyramiddrop": Decoder(
        _pyramiddrop,
        "last",
        "compact",
        ahead=True,
        published=((8, 288), (16, 144), (24, 72)),
        source="arXiv 2410.17247",
    )
}
