"""FastV (arXiv 2403.06764, ECCV 2024): behind a few layers, drop the visual tokens that get little attention.

At the input of layer K the softmax attention of layer K-1 is read, averaged over heads, and the tokens with the highest
weights stay, in raster order and at their original position ids.

The released code does not do what the paper says. Both are here:

    `fastv`        official: the weights of one row, the last token of the prompt.
    `fastv_paper`  paper: the average attention that a token receives from all tokens behind it.
"""

import functools

import jax
import jax.numpy as jnp

from tokzip_jax.compress import ops
from tokzip_jax.compress.decoder_entry import Choice, Decoder, Look, Setting, own_row
from tokzip_jax.types import Array


def best(score_BV: Array, valid_BV: Array, keep: int) -> Array:
    """Mark the `keep` highest scores among the valid tokens (all of them where there are fewer): [B, V] bool."""
    return ops.top_mask(jnp.where(valid_BV, score_BV, -jnp.inf), keep) & valid_BV


@functools.partial(jax.jit, static_argnames="keep")
def fastv(attention_BNV: Array, valid_BV: Array, *, keep: int) -> Array:
    """Official FastV: which visual tokens stay.

    Args:
        attention_BNV: [B, N, V] softmax weights of the prompt's last token for every visual token, head by head.
        valid_BV: [B, V] bool, real tokens.
        keep: how many stay, 0 .. V.

    Returns:
        [B, V] bool; of equal scores the lower index wins.
    """
    return best(jnp.mean(attention_BNV.astype(jnp.float32), axis=1), valid_BV, keep)


@functools.partial(jax.jit, static_argnames="keep")
def fastv_paper(attention_BNRV: Array, behind_BRV: Array, valid_BV: Array, *, keep: int) -> Array:
    """FastV as its section 3.2 defines importance: which visual tokens stay.

    Args:
        attention_BNRV: [B, N, R, V] softmax weights of R queries.
        behind_BRV: [B, R, V] bool, the query stands behind the token (and so may see it) and counts.
        valid_BV, keep: as in `fastv`.

    Returns:
        [B, V] bool. The score is the mean over heads and over the queries that count; 0 where there is none.
    """
    weight_BRV = jnp.mean(attention_BNRV.astype(jnp.float32), axis=1)
    total_BV = jnp.sum(jnp.where(behind_BRV, weight_BRV, 0.0), axis=1)
    return best(total_BV / jnp.maximum(jnp.sum(behind_BRV, axis=1), 1), valid_BV, keep)


def _fastv(look: Look, setting: Setting) -> Choice:
    return Choice(fastv(own_row(look), look.valid_GV, keep=setting.keep))


def _fastv_paper(look: Look, setting: Setting) -> Choice:
    behind = look.counts_GR[:, :, None] & (look.offset_GRV > 0)
    return Choice(fastv_paper(look.attention_GNRV, behind, look.valid_GV, keep=setting.keep))


_SHARED = {"source": "arXiv 2403.06764", "published": ((2, 288),)}
ENTRIES = {
    "fastv": Decoder(_fastv, "last", "original", **_SHARED),
    "fastv_paper": Decoder(_fastv_paper, "prompt", "original", **_SHARED),
}
