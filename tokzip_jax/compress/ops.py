"""Array primitives that the compressors share.

Everything here is a pure function of arrays with static sizes: it works under `jit`, `vmap` and `grad`, treats the
batch elements independently, and reads scores and keys in float32 whatever dtype they come in. Selection never sorts
more than one row of patches, and patches always come back in raster order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tokzip_jax.types import Array, VisualTokens

# Selection must not depend on a backend's habit of multiplying float32 in bfloat16 (TPU) or TF32 (GPU).
EXACT = lax.Precision.HIGHEST
MASKED = -1e30


def top_mask(score_BP: Array, k: int) -> Array:
    """Mark the k highest scores of each row; of equal scores the one with the lower index wins.

    Args:
        score_BP: [B, P] any float dtype. A NaN ranks below everything; -0.0 equals 0.0.
        k: how many, 0 .. P.

    Returns:
        [B, P] bool with exactly k True in every row.
    """
    score = score_BP.astype(jnp.float32)
    score = jnp.where(jnp.isnan(score), -jnp.inf, jnp.where(score == 0, 0.0, score))
    if k == 0:
        return jnp.zeros(score.shape, bool)
    # `top_k` lists equal values by index, so that its last entry is the border: no scatter, no P x P comparison.
    values, indices = lax.top_k(score, k)
    worst, border = values[:, -1:], indices[:, -1:]
    return (score > worst) | ((score == worst) & (jnp.arange(score.shape[1])[None] <= border))


def partition(chosen_BP: Array, k: int) -> tuple[Array, Array]:
    """Indices of the chosen and of the other patches, both ascending.

    Args:
        chosen_BP: [B, P] bool with exactly k True in every row.
        k: that number.

    Returns:
        [B, k] and [B, P - k] int32.
    """
    patches = chosen_BP.shape[1]
    index = jnp.arange(patches, dtype=jnp.int32)[None]
    order = jnp.sort(jnp.where(chosen_BP, index, index + patches), axis=1)
    return order[:, :k], order[:, k:] - patches


def rank(chosen_BP: Array) -> Array:
    """How many True stand before each place of the row: for a True, its number among them. [B, P] int32."""
    return jnp.cumsum(chosen_BP, axis=1, dtype=jnp.int32) - chosen_BP


def source(chosen_BP: Array, first: int = 0) -> Array:
    """`VisualTokens.source_BP` of a selection: slots from `first` on in raster order, -1 for the others."""
    return jnp.where(chosen_BP, first + rank(chosen_BP), -1)


def gather(x_BPD: Array, index_BM: Array) -> Array:
    """Rows of x: [B, P, D] and [B, M] in 0 .. P-1 -> [B, M, D]."""
    # Indices come from this file and are in range: a bounds check would cost as much as the gather.
    return jnp.take_along_axis(x_BPD, index_BM[:, :, None], axis=1, mode="promise_in_bounds")


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """The middle places of `count` equal parts of 0 .. length-1: ascending, distinct for count <= length."""
    return (2 * np.arange(count) + 1) * length // (2 * max(count, 1))


def unit(x_BPH: Array) -> Array:
    """L2-normalised rows in float32; a zero row stays zero (and has a finite gradient)."""
    x = x_BPH.astype(jnp.float32)
    # Dividing by the largest entry first keeps the squares of tiny and of huge rows inside float32.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest == 0, 1.0, largest)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(squares == 0, 1.0, squares))


def cosine(a_BPH: Array, b_BMH: Array) -> Array:
    """Cosine similarity of all rows of a with all rows of b, float32: [B, P, M]; 0 where one is a zero row."""
    return jnp.einsum("BPH,BMH->BPM", unit(a_BPH), unit(b_BMH), precision=EXACT)


def group_sum(x_BPD: Array, group_BP: Array, groups: int) -> tuple[Array, Array]:
    """Sum of the rows of each group, as one product with a one-hot matrix.

    Args:
        x_BPD: [B, P, D] any float dtype.
        group_BP: [B, P] int, 0 .. groups-1, or -1 for a row of no group.
        groups: number of groups.

    Returns:
        [B, groups, D] float32 sums (0 for an empty group) and [B, groups] int32 counts.
    """
    member_BMP = group_BP[:, None, :] == jnp.arange(groups)[None, :, None]
    total = jnp.einsum("BMP,BPD->BMD", member_BMP.astype(jnp.float32), x_BPD.astype(jnp.float32), precision=EXACT)
    return total, jnp.sum(member_BMP, axis=2, dtype=jnp.int32)


def keep(patches_BPD: Array, chosen_BP: Array, k: int) -> VisualTokens:
    """The result of a plain selection: the k chosen patches in raster order, the others dropped."""
    index, _ = partition(chosen_BP, k)
    return VisualTokens(
        tokens_BMD=gather(patches_BPD, index),
        valid_BM=jnp.ones(index.shape, bool),
        position_BM=index,
        size_BM=jnp.ones(index.shape, jnp.int32),
        source_BP=source(chosen_BP),
    )


def received_attention(
    q_BNSH: Array,
    k_BKSH: Array,
    *,
    scale: float | None = None,
    segment_BS: Array | None = None,
    block: int = 128,
) -> Array:
    """How much attention each token receives: the score of encoders without a CLS token.

    Mean over heads and over the queries that may see the token of their softmax weight for it (VisionZip, section 3.1
    of arXiv 2412.04467, for SigLIP-like towers). Accumulated over blocks of queries: the S x S matrix never exists.

    Args:
        q_BNSH: [B, N, S, H] queries, before scaling.
        k_BKSH: [B, K, S, H] keys, K divides N.
        scale: of the dot products; None = H**-0.5.
        segment_BS: [B, S] int; tokens of equal number see one another, 0 is padding, which neither sees nor is
            seen and scores 0. None: all see all. The scores of one segment sum to 1.
        block: queries at once; the temporaries are [B, N, block, S] float32.

    Returns:
        [B, S] float32.

    Raises:
        ValueError: shapes that do not fit, or a block below 1.
    """
    batch, heads, length, dim = q_BNSH.shape
    shared = k_BKSH.shape[1]
    if k_BKSH.shape != (batch, shared, length, dim) or heads % shared:
        raise ValueError(
            f"queries {q_BNSH.shape} and keys {k_BKSH.shape} must agree in all but the heads, which must divide"
        )
    if block < 1:
        raise ValueError(f"block = {block} must be at least 1")
    block = min(block, length)
    padding = -length % block
    segment = jnp.ones((batch, length), jnp.int32) if segment_BS is None else segment_BS.astype(jnp.int32)
    queries = q_BNSH.astype(jnp.float32) * (dim**-0.5 if scale is None else scale)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
    queries = queries.reshape(batch, shared, heads // shared, length + padding, dim)
    query_segment = jnp.pad(segment, ((0, 0), (0, padding)))
    keys = k_BKSH.astype(jnp.float32)

    def add_block(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        total_BS, seen_BS = carry
        rows = lax.dynamic_slice_in_dim(queries, start, block, axis=3)
        row_segment = lax.dynamic_slice_in_dim(query_segment, start, block, axis=1)
        sees_BTS = (row_segment[:, :, None] == segment[:, None, :]) & (segment[:, None, :] != 0)
        sees = sees_BTS[:, None, None]
        logits = jnp.einsum("BKGTH,BKSH->BKGTS", rows, keys, precision=EXACT)
        weights = jnp.where(sees, jax.nn.softmax(jnp.where(sees, logits, MASKED), axis=-1), 0.0)
        total_BS += jnp.sum(weights, axis=(1, 2, 3))
        return (total_BS, seen_BS + jnp.sum(sees_BTS, axis=1, dtype=jnp.float32)), None

    empty = jnp.zeros((batch, length), jnp.float32)
    starts = jnp.arange(0, length + padding, block)
    (total_BS, seen_BS), _ = lax.scan(add_block, (empty, empty), starts)
    return total_BS / (heads * jnp.maximum(seen_BS, 1.0))
