"""SparseVLM (arXiv 2410.04417, ICML 2025): text tokens that look at the picture rate its tokens.

Which text tokens rate is settled once, on the input embeddings (`raters`). After each of a few layers the visual tokens
are scored by the attention that the raters pay them in that layer (`rate`), the best stay, and a part of the others is
clustered and comes back as a few merged tokens (`recycle`). Three versions were released:

    v1    how many stay follows the rank of the raters' attention (`attention_rank`, `adaptive_keep`).
    v1.5  how many stay is a fixed schedule.
    +     attention is divided by what rotary positions alone would give (`gravity`), only the heads that look at the
          picture most are averaged (`busy_heads`), nothing is merged.

Paper and released code differ, and both are here: the paper scales the raters' logits by 1/sqrt(D) (`scaled`), the
code does not; the paper deletes lambda (V - rank) tokens (`paper_keep`), the code keeps int(scale rank + bias): they
are "sparsevlm_paper" in `decoder.DECODER`. The code adds noise of 1e-6 to the densities of the clustering; here ties
go to the lower index unless noise is given.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.compress.decoder_entry import Choice, Decoder, Look, Setting
from tokzip_jax.compress.fastv import best
from tokzip_jax.compress.singular import singular_values
from tokzip_jax.types import Array


@functools.partial(jax.jit, static_argnames="scaled")
def raters(vision_BVD: Array, valid_BV: Array, text_BTD: Array, asks_BT: Array, *, scaled: bool = False) -> Array:
    """The text tokens that rate: those that the picture matches better than the average text token.

    Args:
        vision_BVD: [B, V, D] input embeddings of the visual tokens.
        valid_BV: [B, V] bool, real ones.
        text_BTD: [B, T, D] input embeddings of text.
        asks_BT: [B, T] bool, the prompt's text behind the picture.
        scaled: divide the logits by sqrt(D) (paper) instead of not (official).

    Returns:
        [B, T] bool. Where no token is above the average (a single one never is), all that ask rate; the released code
        would average nothing there.
    """
    logits_BVT = jnp.einsum(
        "BVD,BTD->BVT", vision_BVD.astype(jnp.float32), text_BTD.astype(jnp.float32), precision=ops.EXACT
    )
    if scaled:
        logits_BVT = logits_BVT / math.sqrt(vision_BVD.shape[-1])
    weight_BVT = jax.nn.softmax(jnp.where(asks_BT[:, None], logits_BVT, ops.MASKED), axis=-1)
    match_BT = jnp.sum(jnp.where(valid_BV[:, :, None], weight_BVT, 0.0), axis=1)
    match_BT = jnp.where(asks_BT, match_BT / jnp.maximum(jnp.sum(valid_BV, axis=1, keepdims=True), 1), 0.0)
    mean = jnp.sum(match_BT, axis=1, keepdims=True) / jnp.maximum(jnp.sum(asks_BT, axis=1, keepdims=True), 1)
    found_BT = asks_BT & (match_BT > mean)
    return jnp.where(jnp.any(found_BT, axis=1, keepdims=True), found_BT, asks_BT)


def rate(attention_BRV: Array, rater_BR: Array) -> Array:
    """Scores [B, V]: mean of the head-mean attention [B, R, V] over the rows [B, R] that rate (0 without any)."""
    total_BV = jnp.sum(jnp.where(rater_BR[:, :, None], attention_BRV.astype(jnp.float32), 0.0), axis=1)
    return total_BV / jnp.maximum(jnp.sum(rater_BR, axis=1, keepdims=True), 1)


def attention_rank(attention_BRV: Array, rater_BR: Array, valid_BV: Array) -> Array:
    """Numerical rank [B] int32 of the raters' attention over the real visual tokens (v1).

    Singular values count above max(raters, tokens) * eps * the largest, as in `torch.linalg.matrix_rank`.
    """
    used = rater_BR[:, :, None] & valid_BV[:, None, :]
    values_BR = singular_values(jnp.where(used, attention_BRV.astype(jnp.float32), 0.0))
    size_B = jnp.maximum(jnp.sum(rater_BR, axis=1), jnp.sum(valid_BV, axis=1))
    least_B = values_BR[:, 0] * size_B * jnp.finfo(jnp.float32).eps
    return jnp.sum(values_BR > least_B[:, None], axis=1, dtype=jnp.int32)


def adaptive_keep(rank_B: Array, count_B: Array, *, scale: float, bias: float) -> Array:
    """How many of `count` tokens v1 keeps: int(scale rank + bias), never all of them. [B] int32.

    Published settings (scale, bias) at 576 tokens: (13.5, 0) for 192, (9, 6) for 128, (0.8, 0) for 64 on average.
    """
    wanted_B = jnp.floor(rank_B.astype(jnp.float32) * scale + bias).astype(jnp.int32)
    return jnp.clip(wanted_B, 0, jnp.maximum(count_B - 1, 0))


def paper_keep(rank_B: Array, count_B: Array, *, scale: float) -> Array:
    """How many tokens the paper's rule leaves: it deletes int(scale (count - rank)) (section 3.3). [B] int32."""
    gone_B = jnp.floor(scale * (count_B - rank_B).astype(jnp.float32)).astype(jnp.int32)
    return jnp.clip(count_B - gone_B, 0, count_B)


def gravity(offset: Array, *, head_dim: int, theta: float) -> Array:
    """What rotary positions alone make of a dot product ("+"): a query and a key of ones, `offset` positions apart.

    2 / sqrt(H) * sum over frequencies of cos(offset * frequency); it falls with the distance, and may reach 0.
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return 2.0 / math.sqrt(head_dim) * jnp.sum(jnp.cos(offset.astype(jnp.float32)[..., None] * frequency), axis=-1)


def busy_heads(attention_BNRV: Array, rater_BR: Array, valid_BV: Array, *, heads: int) -> Array:
    """Mean [B, R, V] over the `heads` heads whose raters look at the picture most ("+"; the code has 14 for 32)."""
    used = rater_BR[:, None, :, None] & valid_BV[:, None, None, :]
    mass_BN = jnp.sum(jnp.where(used, attention_BNRV, 0.0), axis=(2, 3))
    chosen_BN = ops.top_mask(mass_BN, heads)
    return jnp.sum(jnp.where(chosen_BN[:, :, None, None], attention_BNRV, 0.0), axis=1) / heads


def select(score_BV: Array, valid_BV: Array, count_B: Array, *, most: int) -> Array:
    """Mark the `count` highest scores among the valid tokens, at most `most` (static): [B, V] bool."""
    score = jnp.where(valid_BV, score_BV, -jnp.inf)
    index_BM = lax.top_k(score, most)[1] if most else jnp.zeros((score.shape[0], 0), jnp.int32)
    row = jnp.arange(score.shape[0])[:, None]
    inside = jnp.arange(most)[None] < count_B[:, None]
    return jnp.zeros(score.shape, bool).at[row, index_BM].set(inside) & valid_BV


def recycled(deleted: int) -> tuple[int, int]:
    """How many of `deleted` tokens are recycled, and into how many merged ones: (0, 0) where none is deleted."""
    some = 3 * deleted // 10 + 1 if deleted else 0
    return some, some // 10 + 1 if some else 0


@functools.partial(jax.jit, static_argnames="most")
def recycle(
    x_BVD: Array, score_BV: Array, deleted_BV: Array, *, most: int, noise_BR: Array | None = None
) -> tuple[Array, Array]:
    """Merged tokens out of the best of the deleted ones.

    Args:
        x_BVD: [B, V, D] states of the visual tokens behind the layer.
        score_BV: [B, V] float.
        deleted_BV: [B, V] bool.
        most: static; no picture deletes more.
        noise_BR: [B, R] with R = recycled(most)[0], see `cluster`; the token with the highest score is the first.

    Returns:
        [B, C, D] with C = recycled(most)[1], in the dtype of x, and which of them are real [B, C] bool.
    """
    slots, clusters = recycled(most)
    if not slots:
        return jnp.zeros((x_BVD.shape[0], 0, x_BVD.shape[2]), x_BVD.dtype), jnp.zeros((x_BVD.shape[0], 0), bool)
    index_BR = lax.top_k(jnp.where(deleted_BV, score_BV, -jnp.inf), slots)[1]
    gone_B = jnp.sum(deleted_BV, axis=1, dtype=jnp.int32)
    some_B = jnp.where(gone_B > 0, 3 * gone_B // 10 + 1, 0)
    count_B = jnp.where(gone_B > 0, some_B // 10 + 1, 0)
    valid_BR = jnp.arange(slots)[None] < some_B[:, None]
    return cluster(ops.gather(x_BVD, index_BR), valid_BR, count_B, clusters=clusters, noise_BR=noise_BR)


@functools.partial(jax.jit, static_argnames="clusters")
def cluster(
    x_BRD: Array, valid_BR: Array, count_B: Array, *, clusters: int, noise_BR: Array | None = None
) -> tuple[Array, Array]:
    """Density-peak clustering (DPC-kNN), each cluster averaged.

    Distances are divided by sqrt(D). The density of a token is exp(-mean of the c smallest squared distances, its own
    included); delta is the distance to the nearest denser token (for the densest, the largest distance of all). The c
    tokens with the highest density * delta are centres, every other token joins the nearest one.

    Args:
        x_BRD: [B, R, D] tokens.
        valid_BR: [B, R] bool, real ones, of which there are at least `count`.
        count_B: [B] int32, c.
        clusters: C, the most that c may be.
        noise_BR: [B, R], of which 1e-6 is added to the densities; None = none.

    Returns:
        [B, C, D] means in centre order (highest first), in the dtype of x, and which of them are real [B, C] bool.
    """
    tokens = x_BRD.shape[1]
    distance_BRR = _distances(lax.stop_gradient(x_BRD), valid_BR)
    pair_BRR = valid_BR[:, :, None] & valid_BR[:, None, :]
    near_BRC = -lax.top_k(-jnp.where(pair_BRR, distance_BRR**2, jnp.inf), clusters)[0]
    counted = jnp.arange(clusters)[None] < count_B[:, None]
    spread_BR = jnp.sum(jnp.where(counted[:, None] & jnp.isfinite(near_BRC), near_BRC, 0.0), axis=-1)
    density_BR = jnp.exp(-spread_BR / jnp.maximum(count_B, 1)[:, None])
    if noise_BR is not None:
        density_BR += 1e-6 * noise_BR

    mine, theirs = density_BR[:, :, None], density_BR[:, None, :]
    lower = jnp.arange(tokens)[None, :] < jnp.arange(tokens)[:, None]
    denser_BRR = pair_BRR & ((theirs > mine) | ((theirs == mine) & lower))
    largest_B = jnp.max(jnp.where(pair_BRR, distance_BRR, 0.0), axis=(1, 2))
    delta_BR = jnp.min(jnp.where(denser_BRR, distance_BRR, largest_B[:, None, None]), axis=-1)
    peak_BR = jnp.where(valid_BR, density_BR * delta_BR, -1.0)
    centre_BC = lax.top_k(peak_BR, clusters)[1]

    to_centre_BRC = jnp.take_along_axis(distance_BRR, centre_BC[:, None, :], axis=2)
    nearest_BR = jnp.argmin(jnp.where(counted[:, None], to_centre_BRC, jnp.inf), axis=-1)
    is_BRC = (centre_BC[:, None, :] == jnp.arange(tokens)[None, :, None]) & counted[:, None]
    group_BR = jnp.where(jnp.any(is_BRC, axis=-1), jnp.argmax(is_BRC, axis=-1), nearest_BR)
    total_BCD, members_BC = ops.group_sum(x_BRD, jnp.where(valid_BR, group_BR, -1), clusters)
    # The released code's 1e-6 shrinks every merged token by that share.
    return (total_BCD / (members_BC[:, :, None] + 1e-6)).astype(x_BRD.dtype), counted


def _distances(x_BRD: Array, valid_BR: Array) -> Array:
    """[B, R, R] Euclidean distances divided by sqrt(D)."""
    x = jnp.where(valid_BR[:, :, None], x_BRD.astype(jnp.float32), 0.0)
    # Distances do not change, and less is lost where the tokens have much in common.
    middle = jnp.sum(x, axis=1, keepdims=True) / jnp.maximum(jnp.sum(valid_BR, axis=1), 1)[:, None, None]
    x = x - middle
    square_BR = jnp.sum(x * x, axis=-1)
    product_BRR = jnp.einsum("BRD,BQD->BRQ", x, x, precision=ops.EXACT)
    squared = square_BR[:, :, None] + square_BR[:, None, :] - 2 * product_BRR
    apart = ~jnp.eye(x.shape[1], dtype=bool)
    return jnp.sqrt(jnp.where(apart, jnp.maximum(squared, 0.0), 0.0) / x.shape[2])


def _merge(look: Look, score_GV: Array, kept_GV: Array, most: int) -> Choice:
    merged = recycle(look.tokens_GVD, score_GV, look.valid_GV & ~kept_GV, most=most)
    return Choice(kept_GV, *merged)


def _sparsevlm(look: Look, setting: Setting) -> Choice:
    score = rate(jnp.mean(look.attention_GNRV, axis=1), look.counts_GR)
    kept = best(score, look.valid_GV, setting.keep)
    return _merge(look, score, kept, kept.shape[1] - setting.keep)


def _by_rank(look: Look, setting: Setting, counted: Callable[[Array, Array], Array]) -> Choice:
    """SparseVLM with a count of each picture's own: counted(rank, real tokens), both [G]."""
    weights = jnp.mean(look.attention_GNRV, axis=1)
    rank = attention_rank(weights, look.counts_GR, look.valid_GV)
    count = counted(rank, jnp.sum(look.valid_GV, axis=1, dtype=jnp.int32))
    score = rate(weights, look.counts_GR)
    kept = select(score, look.valid_GV, count, most=setting.keep)
    return _merge(look, score, kept, kept.shape[1])


def _sparsevlm_v1(look: Look, setting: Setting) -> Choice:
    return _by_rank(look, setting, functools.partial(adaptive_keep, scale=setting.scale, bias=setting.bias))


def _sparsevlm_paper(look: Look, setting: Setting) -> Choice:
    return _by_rank(look, setting, functools.partial(paper_keep, scale=setting.scale))


def _sparsevlm_plus(look: Look, setting: Setting) -> Choice:
    pull = gravity(look.offset_GRV, head_dim=setting.head_dim, theta=setting.theta)
    weights = look.attention_GNRV / pull[:, None]
    weights = busy_heads(weights, look.counts_GR, look.valid_GV, heads=setting.heads)
    return Choice(best(rate(weights, look.counts_GR), look.valid_GV, setting.keep))


def _check_v1(setting: Setting, heads: int) -> None:
    """Refuse settings under which nothing could ever be kept."""
    scale, bias = setting.scale, setting.bias
    if not (0 <= scale < math.inf and 0 <= bias < math.inf and scale + bias > 0):
        raise ValueError(
            f"decoder_scale = {scale} and decoder_bias = {bias} must be >= 0 and finite, and one of them above 0"
        )


def _check_paper(setting: Setting, heads: int) -> None:
    if not 0 <= setting.scale <= 1:
        raise ValueError(
            f"decoder_scale = {setting.scale} must lie between 0 and 1: decoder = 'sparsevlm_paper' deletes that share "
            "of the tokens beyond the rank"
        )


def _check_plus(setting: Setting, heads: int) -> None:
    if not 1 <= setting.heads <= heads:
        raise ValueError(f"decoder_heads = {setting.heads} must lie between 1 and the model's {heads} heads")


_SHARED = {"rows": "text", "classes": ("attention", "query"), "source": "arXiv 2410.04417"}
_BY_RANK = {
    "positions": "compact",
    "merged": lambda slots, keep: recycled(slots)[1],
    "published": ((3, 300), (7, 200), (16, 110), (20, 110)),
    "count": "by rank, up to the budget, and merged ones",
    **_SHARED,
}
ENTRIES = {
    "sparsevlm": Decoder(
        _sparsevlm,
        positions="compact",
        merged=lambda slots, keep: recycled(slots - keep)[1],
        published=((3, 300), (7, 200), (16, 110)),
        count="the budget, and merged ones",
        **_SHARED,
    ),
    "sparsevlm_v1": Decoder(_sparsevlm_v1, options=("scale", "bias"), check=_check_v1, **_BY_RANK),
    "sparsevlm_paper": Decoder(_sparsevlm_paper, scaled=True, options=("scale",), check=_check_paper, **_BY_RANK),
    "sparsevlm_plus": Decoder(
        _sparsevlm_plus,
        positions="original",
        options=("heads",),
        check=_check_plus,
        published=((3, 300), (7, 200), (16, 118)),
        **_SHARED,
    ),
}
