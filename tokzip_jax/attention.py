"""Attention, and the few rows of it that a compressor reads.

`attend` never returns weights. A method that needs scores takes them from `score_rows`, which computes only the rows
asked for, so that fused kernels stay on everywhere else.
"""

import jax
import jax.numpy as jnp

from tokzip_jax import blocks
from tokzip_jax.types import Array

# Large enough to vanish in a float32 softmax, small enough not to overflow when something is added to it.
MASKED = -1e30
# Queries from which on "auto" takes blocks: shorter rows have hardly a block to leave out, and pay for the loop.
LONG = 3 * blocks.BLOCK // 2


def _logits(q_BNTH: Array, k_BKSH: Array) -> Array:
    """[B, K, G, T, S] float32 scaled dot products; G = N // K queries share a key head."""
    batch, heads, length, dim = q_BNTH.shape
    groups = q_BNTH.reshape(batch, k_BKSH.shape[1], heads // k_BKSH.shape[1], length, dim)
    scale = jnp.asarray(dim**-0.5, q_BNTH.dtype)
    return jnp.einsum("BKGTH,BKSH->BKGTS", groups * scale, k_BKSH, preferred_element_type=jnp.float32)


def _softmax(logits_BKGTS: Array, mask_BTS: Array | None, bias: Array | None) -> Array:
    if bias is not None:
        bias = bias[:, None, :] if bias.ndim == 2 else bias
        logits_BKGTS = logits_BKGTS + bias[:, None, None].astype(jnp.float32)
    if mask_BTS is not None:
        logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, MASKED)
    return jax.nn.softmax(logits_BKGTS, axis=-1)


def _einsum(q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array | None, bias: Array | None) -> Array:
    weights = _softmax(_logits(q_BNTH, k_BKSH), mask_BTS, bias).astype(v_BKSH.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKSH).reshape(q_BNTH.shape)


def _fused(implementation: str):
    def run(q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array | None, bias: Array | None) -> Array:
        if bias is not None:
            bias = (bias[:, None, :] if bias.ndim == 2 else bias)[:, None]
        out = jax.nn.dot_product_attention(
            q_BNTH.swapaxes(1, 2),
            k_BKSH.swapaxes(1, 2),
            v_BKSH.swapaxes(1, 2),
            bias=bias,
            mask=None if mask_BTS is None else mask_BTS[:, None],
            implementation=implementation,
        )
        return out.swapaxes(1, 2)

    return run


def _blocks(q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array | None, bias: Array | None) -> Array:
    batch, heads, length, dim = q_BNTH.shape
    if mask_BTS is None:
        mask_BTS = jnp.ones((1, length, k_BKSH.shape[2]), bool)
    groups = q_BNTH.reshape(batch, k_BKSH.shape[1], heads // k_BKSH.shape[1], length, dim)
    return blocks.attend(groups, k_BKSH, v_BKSH, mask_BTS).reshape(q_BNTH.shape)


def _auto(q_BNTH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array | None, bias: Array | None) -> Array:
    """Blocks where they pay: on a CPU, under a mask, which may leave some out, in rows that are long enough."""
    pays = jax.default_backend() == "cpu" and mask_BTS is not None and q_BNTH.shape[2] >= LONG
    run = _blocks if pays and bias is None else _einsum  # blocks know no bias
    return run(q_BNTH, k_BKSH, v_BKSH, mask_BTS, bias)


IMPLEMENTATIONS = {
    "auto": _auto,
    "einsum": _einsum,
    "blocks": _blocks,
    "xla": _fused("xla"),
    "cudnn": _fused("cudnn"),
}
BIASED = ("auto", "einsum", "xla")  # those that take a bias


def attend(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    implementation: str = "auto",
) -> Array:
    """Scaled dot-product attention with grouped heads; softmax in float32.

    Args:
        q_BNTH: [B, N, T, H] queries, head-major: on a CPU one fused kernel, 8-18 % faster than the [B, T, N, H] layout.
        k_BKSH, v_BKSH: [B, K, S, H], K divides N.
        mask: [B, T, S] bool, True = sees, where B and T may be 1; None = everything. A query that sees nothing gets
            something finite: the average, or zeros in blocks.
        bias: added to the scaled logits, [B, S] (log of a token's size) or [B, T, S] (distance); not for "blocks" and
            "cudnn".
        implementation: "einsum" (explicit products), "blocks" (see `blocks.attend`: the fastest for long rows on a
            CPU, with first derivatives in reverse mode only), "auto" (blocks for masked rows of `LONG` and more queries
            without a bias, where the default backend of the process that traces is a CPU; else einsum), "xla" or
            "cudnn" (`jax.nn.dot_product_attention`; cudnn wants a GPU and half precision). On TPU, where the layout of
            the rows is known beforehand, see `splash.attend`.

    Returns:
        [B, N, T, H] in the queries' dtype.

    Raises:
        ValueError: unknown implementation, a bias for one that takes none, or heads that do not divide.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is unknown; choose one of {', '.join(sorted(IMPLEMENTATIONS))}")
    if bias is not None and implementation not in BIASED:
        raise ValueError(f"attention={implementation!r} takes no bias (size, distance); choose {', '.join(BIASED)}")
    if q_BNTH.shape[1] % k_BKSH.shape[1]:
        raise ValueError(f"{q_BNTH.shape[1]} query heads cannot share {k_BKSH.shape[1]} key heads: it must divide them")
    return IMPLEMENTATIONS[implementation](q_BNTH, k_BKSH, v_BKSH, mask, bias)


def score_rows(q_BNRH: Array, k_BKSH: Array, *, mask: Array | None = None, bias: Array | None = None) -> Array:
    """Softmax attention of R chosen queries over all keys: [B, N, R, S] float32.

    `mask` is [B, R, S], `bias` [B, S] or [B, R, S], as in `attend`.
    """
    weights = _softmax(_logits(q_BNRH, k_BKSH), mask, bias)
    batch, _, _, rows, keys = weights.shape
    return weights.reshape(batch, q_BNRH.shape[1], rows, keys)
