"""Attention in blocks: only those where somebody sees somebody are computed, and no [T, S] weights are ever held.

A row is cut into blocks of queries and of keys. Which of them a mask leaves anything of is known only when the program
runs, for rows hold their pictures and questions wherever they like; so the blocks in which some row of the batch sees
anything are put in a list, and a loop goes through it, adding up a softmax whose maximum and sum are corrected as it
goes (arXiv 2205.14135, algorithm 1; the backward pass, which makes the weights anew, is its algorithm 4). Under a
causal mask that leaves half of the blocks, under the VoCo mask also out text x vision and one picture x another, and
between questions what is not their own. Rows of one batch that are laid out differently save less.

On a CPU long rows are faster under any mask: the weights of a block stay in its cache, where those of a whole row go
through memory for every step of a softmax. A device with wide kernels wants few large products instead: on TPU see
`splash`, on GPU cudnn. The loop has no forward-mode derivative and no second one; explicit products do.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.types import Array

# The most queries and keys of a block: few enough for its weights to stay in a CPU's cache, enough to pay for a round.
BLOCK = 64
MULTIPLE = 8  # of vector lanes
NOTHING = -1e30  # a maximum over nothing
TINY = 1e-30


def attend(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array, block: int = BLOCK) -> Array:
    """Scaled dot-product attention under a mask; softmax in float32. Gradients, in reverse mode, are for q, k and v.

    Args:
        q_BKGTH: queries, not scaled; G of them share a key head.
        k_BKSH, v_BKSH: keys and values.
        mask_BTS: bool, True = sees; B and T may be 1, for all rows and all queries.
        block: the most queries and keys of a block.

    Returns:
        [B, K, G, T, H] in the queries' dtype; zeros for a query that sees nothing.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    batch, kv_heads, _, length, dim = q_BKGTH.shape
    width = k_BKSH.shape[2]
    if not k_BKSH.shape == v_BKSH.shape == (batch, kv_heads, width, dim):
        raise ValueError(f"queries {q_BKGTH.shape} do not fit keys {k_BKSH.shape} and values {v_BKSH.shape}")
    if mask_BTS.shape not in [(n, t, width) for n in (1, batch) for t in (1, length)]:
        raise ValueError(f"mask {mask_BTS.shape} must be [{batch} or 1, {length} or 1, {width}]")
    seen = jnp.broadcast_to(mask_BTS, (mask_BTS.shape[0], length, width))
    return _attend(q_BKGTH, k_BKSH, v_BKSH, seen, block)


def blocks(mask_BTS: Array, queries: int, keys: int) -> tuple[Array, Array, Array]:
    """The blocks of some row's query and key that sees it: numbers along T and along S [all], and how many count.

    T and S must be multiples of `queries` and `keys`. What stands behind the blocks that count is 0.
    """
    batch, length, width = mask_BTS.shape
    split = mask_BTS.reshape(batch, length // queries, queries, width // keys, keys)
    seen = jnp.any(split, axis=(0, 2, 4))
    (flat,) = jnp.nonzero(seen.reshape(-1), size=seen.size, fill_value=0)
    return flat // seen.shape[1], flat % seen.shape[1], jnp.sum(seen, dtype=jnp.int32)


def side(length: int, block: int) -> int:
    """Of blocks as equal as can be, none longer than `block` rounded up to whole lanes."""
    count = max(1, math.ceil(length / block))
    return max(1, math.ceil(length / count / MULTIPLE)) * MULTIPLE


def _scale(q: Array) -> np.ndarray:
    """Of the queries, rounded as they are."""
    return np.asarray(q.shape[-1] ** -0.5, q.dtype)


def _pad(x: Array, axis: int, size: int) -> Array:
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, width)


def _part(x: Array, number: Array, size: int, axis: int = -2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis % x.ndim)


def _put(x: Array, part: Array, number: Array, axis: int = -2) -> Array:
    axis %= x.ndim
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * part.shape[axis], axis)


def _padded(q: Array, k: Array, v: Array, mask: Array, block: int) -> tuple[Array, Array, Array, Array, int, int]:
    """Scaled queries, keys, values and mask in whole blocks, and the sides of a block."""
    queries, keys = side(q.shape[-2], block), side(k.shape[-2], block)
    q = _pad(q * _scale(q), -2, queries)
    k, v = (_pad(x, -2, keys) for x in (k, v))
    return q, k, v, _pad(_pad(mask, 1, queries), 2, keys), queries, keys


def _logits(q: Array, k: Array, mask: Array, i: Array, j: Array, queries: int, keys: int) -> tuple[Array, Array]:
    """Of one block: [B, K, G, queries, keys] float32, and who sees whom [B, 1, 1, queries, keys]."""
    logits = jnp.einsum(
        "BKGTH,BKSH->BKGTS", _part(q, i, queries), _part(k, j, keys), preferred_element_type=jnp.float32
    )
    return logits, _part(_part(mask, i, queries, 1), j, keys, 2)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, mask: Array, block: int) -> Array:
    return _forward(q, k, v, mask, block)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array, block: int) -> tuple[Array, tuple[Array, ...]]:
    length, dtype = q.shape[-2], q.dtype
    inputs = q, k, v, mask
    q, k, v, mask, queries, keys = _padded(*inputs, block)
    rows, columns, count = blocks(mask, queries, keys)

    def add(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, most, total = state
        i, j = rows[number], columns[number]
        logits, seen = _logits(q, k, mask, i, j, queries, keys)
        before = _part(most, i, queries, -1)
        now = jnp.maximum(before, jnp.max(jnp.where(seen, logits, NOTHING), axis=-1))
        weights = jnp.where(seen, jnp.exp(logits - now[..., None]), 0)
        shrunk = jnp.exp(before - now)
        mixed = jnp.einsum(
            "BKGTS,BKSH->BKGTH", weights.astype(v.dtype), _part(v, j, keys), preferred_element_type=jnp.float32
        )
        out = _put(out, _part(out, i, queries) * shrunk[..., None] + mixed, i)
        total = _put(total, _part(total, i, queries, -1) * shrunk + jnp.sum(weights, axis=-1), i, -1)
        return out, _put(most, now, i, -1), total

    each = q.shape[:-1]
    start = tuple(jnp.full(*part, jnp.float32) for part in ((q.shape, 0), (each, NOTHING), (each, 0)))
    out, most, total = jax.lax.fori_loop(0, count, add, start)
    out = (out / jnp.maximum(total, TINY)[..., None])[..., :length, :].astype(dtype)
    return out, (*inputs, out, most + jnp.log(jnp.maximum(total, TINY)))


def _backward(block: int, kept: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, out, normaliser = kept
    inputs = q, k, v
    # What a query's weights pay together, so that each block of the softmax's gradient is of its own.
    paid = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    q, k, v, mask, queries, keys = _padded(*inputs, mask, block)
    rows, columns, count = blocks(mask, queries, keys)
    gradient, paid = _pad(gradient, -2, queries), _pad(paid, -1, queries)

    def add(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = state
        i, j = rows[number], columns[number]
        logits, seen = _logits(q, k, mask, i, j, queries, keys)
        weights = jnp.where(seen, jnp.exp(logits - _part(normaliser, i, queries, -1)[..., None]), 0)
        of_out = _part(gradient, i, queries)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        of_weights = product("BKGTH,BKSH->BKGTS", of_out, _part(v, j, keys))
        of_logits = (weights * (of_weights - _part(paid, i, queries, -1)[..., None])).astype(q.dtype)
        more_v = product("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), of_out)
        more_k = product("BKGTS,BKGTH->BKSH", of_logits, _part(q, i, queries))
        more_q = product("BKGTS,BKSH->BKGTH", of_logits, _part(k, j, keys))
        return (
            _put(dq, _part(dq, i, queries) + more_q, i),
            _put(dk, _part(dk, j, keys) + more_k, j),
            _put(dv, _part(dv, j, keys) + more_v, j),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, count, add, start)
    found = dq * float(_scale(q)), dk, dv
    return *(d[..., : x.shape[-2], :].astype(x.dtype) for d, x in zip(found, inputs, strict=True)), None


_attend.defvjp(_forward, _backward)
