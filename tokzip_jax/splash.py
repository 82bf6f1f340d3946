"""Attention on TPU that skips the blocks nobody sees: the rule of `masks.py` as a static mask of splash attention.

Where every row of a batch holds its kinds of tokens at the same places (one image behind BOS, then VoCo tokens, then
text of any length), who sees whom is known before anything runs. `mask` writes it down, `attend` gives it to JAX's
splash attention kernel (`jax.experimental.pallas.ops.tpu.splash_attention`), which runs no block that is empty: not the
half above the diagonal, and under the VoCo mask not text x vision. No [T, T] mask exists on the device; what is kept
are the few different blocks on a border. What differs from row to row is `segment_ids`: padding, and packed samples
of equal layout. Drawn in blocks for 3 blocks of vision with VoCo tokens at their end, and 2 of text (x = runs):

    "visible"  v v v t t      "voco"  v v v t t
          v    x . . . .        v     x . . . .
          v    x x . . .        v     x x . . .
          v    x x x . .        v     x x x . .
          t    x x x x .        t     . . x x .
          t    x x x x x        t     . . x x x

Rows whose layouts differ (several questions of unequal lengths, text-only rows among others) need `attention.attend`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from tokzip_jax.masks import rule
from tokzip_jax.types import PAD, Array, TokenStream

# The kernel works on tiles of 128 lanes.
LANES = 128


class RowMask(splash_attention.splash_attention_mask.Mask):
    """`masks.rule` over one row of tokens, evaluated block by block while the kernel is built.

    Attributes:
        group_T: [T] which kind of token (kind, segment and thread together) stands where.
        relation: [groups, groups, 3] bool, whether a query of one group sees a key of another that stands before it,
            at its place, or behind it.
    """

    def __init__(self, group_T: np.ndarray, relation: np.ndarray):
        self.group_T, self.relation = group_T, relation

    @property
    def shape(self) -> tuple[int, int]:
        """(T, T)."""
        return self.group_T.size, self.group_T.size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """The block of queries and keys at two slices: [queries, keys] bool."""
        query, key = (np.arange(self.group_T.size)[part] for part in index)
        side = np.sign(key[None, :] - query[:, None])
        seen = self.relation[self.group_T[query][:, None], self.group_T[key][None, :], side + 1]
        # A softmax over nothing is not a number. Padding is read by nobody, so that it may see itself.
        return seen | (side == 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowMask) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[bytes, bytes]:
        return self.group_T.tobytes(), self.relation.tobytes()

    def padded(self, length: int) -> "RowMask":
        """The mask of the same row with padding behind it, up to `length` tokens."""
        extra = length - self.group_T.size
        if not extra:
            return self
        nobody = np.pad(self.relation, ((0, 1), (0, 1), (0, 0)))
        return RowMask(np.pad(self.group_T, (0, extra), constant_values=len(self.relation)), nobody)


def mask(
    kind: np.ndarray, table: np.ndarray, *, segment: np.ndarray | None = None, thread: np.ndarray | None = None
) -> RowMask:
    """The static mask of rows that all have one layout.

    Args:
        kind: [T] int, what each token is (`types.KINDS`); where a row has padding in place of some of them, say so
            in the `segment_ids` of `attend`. PAD: padding in every row.
        table: [kinds, kinds] out of `masks.TABLES`.
        segment: [T] int, which image a token belongs to; None = 0, no image.
        thread: [T] int, which question a token belongs to; None = 0, shared.

    Raises:
        ValueError: arrays that are not of one length, or that are not known before the program runs.
    """
    given = {"kind": kind, "segment": segment, "thread": thread}
    for name, values in given.items():
        if isinstance(values, jax.core.Tracer):
            raise ValueError(f"{name} is traced, but a splash mask is static: make it outside jit, from NumPy arrays")
    zero = np.zeros(np.shape(kind), np.int32)
    columns = [zero if values is None else np.asarray(values, np.int32) for values in given.values()]
    if zero.ndim != 1 or any(column.shape != zero.shape for column in columns):
        raise ValueError(f"kind, segment and thread must be [T], not {[column.shape for column in columns]}")
    groups, group_T = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)

    def stream(order: np.ndarray, *shape: int) -> TokenStream:
        kind, segment, thread = (column.reshape(shape) for column in groups.T)
        sample = (kind != PAD).astype(np.int32)
        return TokenStream(kind=kind, segment=segment, thread=thread, sample=sample, position=order, order=order)

    with jax.ensure_compile_time_eval():
        relation = rule(stream(np.int32(1), -1, 1, 1), stream(np.arange(3), 1, -1, 1), np.asarray(table))
        relation = np.asarray(jnp.broadcast_to(relation, (len(groups), len(groups), 3)))
    return RowMask(group_T.reshape(-1).astype(np.int32), relation)


def kernel(
    row_mask: RowMask, heads: int, *, block: int = LANES, interpret: bool = False
) -> splash_attention.splash_attention_kernel.SplashAttentionKernel:
    """The kernel of one row, (q [N, T, H] scaled, k [K, T, H], v [K, T, H], segment ids) -> [N, T, H].

    Args:
        row_mask: of a length that `block` divides.
        heads: query heads.
        block: side of the blocks that are run or skipped, a multiple of 128. Larger ones cost less overhead and skip
            less.
        interpret: run it as plain JAX, for tests without a TPU.
    """
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([row_mask] * heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(names, block)),
        interpret=interpret,
    )


def attend(
    q_BNTH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    row_mask: RowMask,
    *,
    segment_ids: Array | None = None,
    block: int = LANES,
    interpret: bool = False,
) -> Array:
    """Scaled dot-product attention of a row over itself under a static mask; softmax in float32.

    Equals `attention.attend` with the mask of `masks.visibility`, forward and backward, except at padding, where both
    are finite and mean nothing. Under `jax.set_mesh` rows are split over "data" and heads over "model", where they
    divide: a kernel is opaque to XLA, which would gather everything on every device.

    Args:
        q_BNTH: [B, N, T, H] queries, not scaled.
        k_BKTH, v_BKTH: [B, K, T, H], K divides N.
        row_mask: of `mask`, for T tokens.
        segment_ids: [B, T] int32; only tokens of equal number see each other: `TokenStream.sample`, where 0 is
            padding. None: every row is full.
        block, interpret: see `kernel`.

    Returns:
        [B, N, T, H] in the queries' dtype.

    Raises:
        ValueError: shapes that do not fit each other or the mask, or a block that is no multiple of 128.
    """
    batch, heads, length, dim = q_BNTH.shape
    shared = k_BKTH.shape[1]
    if k_BKTH.shape != (batch, shared, length, dim) or v_BKTH.shape != k_BKTH.shape or heads % shared:
        raise ValueError(
            f"queries {q_BNTH.shape}, keys {k_BKTH.shape} and values {v_BKTH.shape} must agree in all but the heads, "
            "of which keys and values have one for every so many queries"
        )
    if row_mask.shape[0] != length:
        raise ValueError(f"a mask of {row_mask.shape[0]} tokens does not fit rows of {length}")
    if block < LANES or block % LANES:
        raise ValueError(f"block = {block} must be a multiple of {LANES}")
    padding = -length % block
    row_mask = row_mask.padded(length + padding)
    segment = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    segment = jnp.pad(segment, ((0, 0), (0, padding)))

    def local(q: Array, k: Array, v: Array, segment: Array) -> Array:
        run = kernel(row_mask, q.shape[1], block=block, interpret=interpret)
        return jax.vmap(run)(q, k, v, splash_attention.SegmentIds(q=segment, kv=segment))

    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q_BNTH * dim**-0.5, k_BKTH, v_BKTH))
    return _over_mesh(local, batch, shared)(q, k, v, segment)[:, :, :length].astype(q_BNTH.dtype)


def _over_mesh(local, batch: int, kv_heads: int):
    """`local` on each device's rows and heads; as it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local
    rows = "data" if batch % mesh.shape["data"] == 0 else None
    heads = "model" if kv_heads % mesh.shape["model"] == 0 else None
    split = P(rows, heads)
    return functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(split, split, split, P(rows)), out_specs=split, check_vma=False
    )(local)
