"""Projectors that pool the patch grid, before or after they change its width.

Pooling has no weights, so that all but `avgpool_linear` run on the parameters of `linear` or `mlp2x_gelu`: what was
trained without pooling can be read with it, and the other way round.
"""

import jax
import jax.numpy as jnp

from tokzip_jax.compress.pool import (
    MODES,
    average_pool,
    nested_grids,
    nested_pool,
    nested_pool_by_picture,
    pooled_side,
    stride_pool,
)
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors.base import Context, Projector, dense, mlp, mlp_flops, picture_keys, replace
from tokzip_jax.projectors.plain import init_one_layer, init_two_layers, linear_flops
from tokzip_jax.require import require
from tokzip_jax.types import Params, VisualTokens


def _product_flops(cfg: ModelConfig, grid: int, width: int, rows: int = 0) -> int:
    """FLOPs of pooling all patches to rows x grid tokens as products with a matrix along either side; 0 rows: grid."""
    side = cfg.vit.grid
    return 2 * width * (rows or grid) * side * (side + grid)


def _average_linear(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    pooled = average_pool(tokens.tokens_BMD, grid=method.pool_grid, rows=method.pool_rows)
    return replace(pooled, dense(params["fc"], pooled.tokens_BMD))


def _average_count(cfg: ModelConfig, method: MethodConfig, tokens: int) -> int:
    return (method.pool_rows or method.pool_grid) * method.pool_grid


def _average_flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    pooling = _product_flops(cfg, method.pool_grid, cfg.vit.width, method.pool_rows)
    return linear_flops(cfg, _average_count(cfg, method, tokens)) + pooling


def _check_grid(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    grid = cfg.vit.grid
    for name, count in (("pool_grid", method.pool_grid), ("pool_rows", method.pool_rows or method.pool_grid)):
        require(
            1 <= count <= grid and grid % count == 0,
            f"{key}.{name} = {count} must be a divisor of the {grid} patches of a side (1 .. {grid})",
        )


def _pool_linear(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    pooled = stride_pool(tokens.tokens_BMD, factor=method.factor, mode=method.pool)
    return replace(pooled, dense(params["fc"], pooled.tokens_BMD))


def _pool_mlp(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    pooled = stride_pool(tokens.tokens_BMD, factor=method.factor, mode=method.pool)
    return replace(pooled, mlp(params, pooled.tokens_BMD))


def _mlp_pool(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """LLaVA-OneVision's order: the projector sees every patch, its outputs are pooled."""
    return stride_pool(mlp(params, tokens.tokens_BMD), factor=method.factor, mode=method.pool)


def _stride_count(cfg: ModelConfig, method: MethodConfig, tokens: int) -> int:
    return pooled_side(cfg.vit.grid, method.factor, method.pool) ** 2


def _stride_flops(cfg: ModelConfig, method: MethodConfig, width: int) -> int:
    """FLOPs of the pooling itself: only sampling is written as products."""
    if method.pool != "bilinear":
        return 0
    return _product_flops(cfg, pooled_side(cfg.vit.grid, method.factor, method.pool), width)


def _check_stride(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    grid = cfg.vit.grid
    modes = ", ".join(map(repr, MODES))
    require(method.pool in MODES, f"{key}.pool = {method.pool!r} is unknown; choose one of {modes}")
    require(
        1 <= method.factor <= grid,
        f"{key}.factor = {method.factor} must lie between 1 and the {grid} patches of a side",
    )


def _pool_mlp_flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    count = _stride_count(cfg, method, tokens)
    return mlp_flops(cfg.vit.width, cfg.llm.width, count) + _stride_flops(cfg, method, cfg.vit.width)


def _mlp_pool_flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    return mlp_flops(cfg.vit.width, cfg.llm.width, tokens) + _stride_flops(cfg, method, cfg.llm.width)


def _nested(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """M3's order is LLaVA-OneVision's. Its paper averages the loss over all levels of a picture; here each picture of
    a training step draws one, which is that loss in expectation at the cost of one pass."""
    projected = mlp(params, tokens.tokens_BMD)
    if not method.draw_budget:
        return nested_pool(projected, level=method.level)
    levels = jnp.arange(method.level, len(nested_grids(cfg.vit.grid)))
    keys = picture_keys(context.key, projected.shape[0])
    drawn = jax.vmap(lambda key: jax.random.choice(key, levels))(keys)
    return nested_pool_by_picture(projected, drawn, finest=method.level)


def _nested_count(cfg: ModelConfig, method: MethodConfig, tokens: int) -> int:
    return nested_grids(cfg.vit.grid)[method.level] ** 2


def _nested_flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    grid = nested_grids(cfg.vit.grid)[method.level]
    # A level drawn for each picture is a product with matrices of its own; a fixed one only adds.
    pooling = _product_flops(cfg, grid, cfg.llm.width) if method.draw_budget else 0
    return mlp_flops(cfg.vit.width, cfg.llm.width, tokens) + pooling


def _check_level(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    grids = nested_grids(cfg.vit.grid)
    require(
        0 <= method.level < len(grids),
        f"{key}.level = {method.level} must lie between 0 and {len(grids) - 1}, for grids of side "
        f"{', '.join(map(str, grids))}",
    )


_AFTER_POOLING = Projector(
    init_one_layer,
    _pool_linear,
    _stride_count,
    lambda cfg, method, tokens, text: (
        linear_flops(cfg, _stride_count(cfg, method, tokens)) + _stride_flops(cfg, method, cfg.vit.width)
    ),
    check=_check_stride,
    options=("factor", "pool"),
    weights="linear",
    grid=True,
    outputs="the side over factor, squared",
    source="baseline",
)
ENTRIES = {
    "avgpool_linear": Projector(
        init_one_layer,
        _average_linear,
        _average_count,
        _average_flops,
        check=_check_grid,
        options=("pool_grid", "pool_rows"),
        grid=True,
        outputs="pool_grid squared, or by pool_rows",
        source="baseline",
    ),
    "pool_linear": _AFTER_POOLING,
    "pool_mlp": _AFTER_POOLING._replace(
        init=init_two_layers, apply=_pool_mlp, flops=_pool_mlp_flops, weights="mlp2x_gelu"
    ),
    "mlp_pool": _AFTER_POOLING._replace(
        init=init_two_layers, apply=_mlp_pool, flops=_mlp_pool_flops, weights="mlp2x_gelu", source="arXiv 2408.03326"
    ),
    "nested_pool": Projector(
        init_two_layers,
        _nested,
        _nested_count,
        _nested_flops,
        check=_check_level,
        options=("level", "draw_budget"),
        weights="mlp2x_gelu",
        grid=True,
        outputs="a quarter of the patches a level",
        source="arXiv 2405.17430",
    ),
}
