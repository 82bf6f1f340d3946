"""Matryoshka Query Transformer (arXiv 2405.19315, section 3): the first m of M learned queries, for any m."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress.downsample import positions_matrix
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors.base import (
    Context,
    Projector,
    attention,
    dense,
    init_attention,
    init_dense,
    init_norm,
    norm,
    picture_keys,
    queries,
)
from tokzip_jax.require import require
from tokzip_jax.types import Array, Params, VisualTokens

EPS = 1e-6
KEYS = ("official", "paper")


def sincos(side: int, width: int) -> np.ndarray:
    """[side^2, width] float32 fixed code of a raster: sine and cosine of x, then of y, a quarter of the width each."""
    frequency = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    y, x = np.divmod(np.arange(side * side), side)
    angles = [place[:, None] * frequency for place in (x, y)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def patch_code(grid: int, queries: int, width: int) -> np.ndarray:
    """[grid^2, width] float32: the queries' code, resized from their square to the picture's grid."""
    side = math.isqrt(queries)
    resize = positions_matrix(side, grid)
    code = sincos(side, width).reshape(side, side, width)
    return np.einsum("gh,fw,hwd->gfd", resize, resize, code).reshape(grid * grid, width).astype(np.float32)


def _init(cfg: ModelConfig, key: Array) -> Params:
    width, outer, dtype = cfg.vit.width, cfg.llm.width, cfg.param_dtype
    keys = jax.random.split(key, 3)
    return {
        "query": {"table": 0.02 * jax.random.normal(keys[0], (cfg.projector.queries, width), dtype)},
        "norm1": init_norm(width, dtype),
        "norm2": init_norm(width, dtype),
        "norm3": init_norm(width, dtype),
        "attn": init_attention(keys[1], width, width, cfg.projector.heads, dtype),
        "fc": init_dense(keys[2], (width, outer), dtype, bias=False),
    }


def _count(cfg: ModelConfig, method: MethodConfig, tokens: int) -> int:
    return method.queries or cfg.projector.queries


def drawn_counts(most: int) -> np.ndarray:
    """The numbers of queries that training draws from: even ones up to `most` (1, where that is all there is)."""
    return np.arange(2, most + 1, 2) if most > 1 else np.array([1])


def _apply(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """One cross-attention and a linear map without bias.

    With `mqt_keys` "official" keys are the normalised position codes alone, so that where a query looks does not depend
    on the picture; that is what the published code and weights do. With "paper" the normalised sum of features and
    position codes. Values are the normalised features in both. `draw_budget` takes a count for each picture (the
    published training takes one for each step).
    """
    x, dtype = tokens.tokens_BMD, tokens.tokens_BMD.dtype
    most, width = _count(cfg, method, x.shape[1]), cfg.vit.width
    own = sincos(math.isqrt(cfg.projector.queries), width)[:most]
    asked = params["query"]["table"][:most].astype(dtype) + jnp.asarray(own, dtype)
    code = jnp.asarray(patch_code(cfg.vit.grid, cfg.projector.queries, width), dtype)
    if method.encoder == "none":
        where = code[None]
    else:
        place = tokens.position_BM[:, :, None]
        where = jnp.where(place >= 0, code[jnp.maximum(tokens.position_BM, 0)], 0)  # the CLS token has no place
    where = where if method.mqt_keys == "official" else x + where
    out = attention(
        params["attn"],
        norm(params["norm1"], asked[None], EPS),
        norm(params["norm2"], where, EPS),
        norm(params["norm3"], x, EPS),
        tokens.valid_BM[:, None],
        cfg.attention,
    )
    valid = None
    if method.draw_budget:
        counts = jnp.asarray(drawn_counts(most))
        drawn = jax.vmap(lambda key: jax.random.choice(key, counts))(picture_keys(context.key, x.shape[0]))
        valid = jnp.arange(most)[None] < drawn[:, None]
    return queries(tokens, dense(params["fc"], out), valid)


def _flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    width, count = cfg.vit.width, _count(cfg, method, tokens)
    projections = 2 * 2 * (count + tokens) * width**2
    return projections + 4 * count * tokens * width + 2 * count * width * cfg.llm.width


def _check(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    trained, heads, width = cfg.projector.queries, cfg.projector.heads, cfg.vit.width
    require(
        trained >= 1 and math.isqrt(trained) ** 2 == trained,
        f"model.projector.queries = {trained} must be a square number for mqt, whose queries stand on a grid",
    )
    require(
        0 <= method.queries <= trained,
        f"{key}.queries = {method.queries} must lie between 1 and model.projector.queries = {trained}, or be 0 for all",
    )
    require(
        heads >= 1 and width % heads == 0,
        f"model.projector.heads = {heads} must divide model.vit.width = {width} for mqt, which attends in that width",
    )
    require(width % 4 == 0, f"model.vit.width = {width} must be a multiple of 4 for mqt's position codes")
    require(
        method.mqt_keys in KEYS,
        f"{key}.mqt_keys = {method.mqt_keys!r} is unknown; choose one of {', '.join(map(repr, KEYS))}",
    )


ENTRIES = {
    "mqt": Projector(
        _init,
        _apply,
        _count,
        _flops,
        check=_check,
        options=("queries", "draw_budget", "mqt_keys"),
        classes=("query",),
        outputs="queries",
        source="arXiv 2405.19315",
    )
}
