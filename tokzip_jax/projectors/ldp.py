"""The projectors of MobileVLM: LDP (arXiv 2312.16886, section 3.4) and LDPv2 (arXiv 2402.03766, section 3.3)."""

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress.pool import average_pool, on_grid, placed
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors.base import (
    Context,
    Projector,
    dense,
    init_dense,
    init_mlp,
    init_norm,
    mlp,
    mlp_flops,
    norm,
    replace,
)
from tokzip_jax.require import require
from tokzip_jax.types import Array, Params, VisualTokens

EPS = 1e-5
STRIDES = {"block1": 1, "block2": 2}
# MobileNetV3's squeeze: a quarter of the width, in steps of 8, never less than nine tenths of what was asked for.
SQUEEZE, STEP = 4, 8


def squeezed(width: int) -> int:
    """Width of the squeeze-excite bottleneck."""
    wanted = width // SQUEEZE
    rounded = max(STEP, (wanted + STEP // 2) // STEP * STEP)
    return rounded + STEP if rounded < 0.9 * wanted else rounded


def depthwise(kernel_HWD: Array, x_BHWD: Array, stride: int = 1) -> Array:
    """A 3x3 convolution of every channel by itself, zero padding 1: [B, H, W, D] -> [B, ceil(H/stride), ..., D].

    Nine shifted products: they fuse into one loop on every backend, and have a plain gradient.
    """
    height, width = (-(-size // stride) for size in x_BHWD.shape[1:3])
    padded = jnp.pad(x_BHWD, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = jnp.zeros((), x_BHWD.dtype)
    for dy in range(3):
        for dx in range(3):
            rows = slice(dy, dy + (height - 1) * stride + 1, stride)
            columns = slice(dx, dx + (width - 1) * stride + 1, stride)
            total = total + padded[:, rows, columns] * kernel_HWD[dy, dx].astype(x_BHWD.dtype)
    return total


def _init_kernel(key: Array, width: int, dtype: str) -> Array:
    return jax.random.normal(key, (3, 3, width), dtype) / 3


def _init_block(key: Array, width: int, dtype: str) -> Params:
    keys = jax.random.split(key, 4)
    narrow = squeezed(width)
    return {
        "depthwise": {"kernel": _init_kernel(keys[0], width, dtype)},
        "norm1": init_norm(width, dtype),
        "squeeze": init_dense(keys[1], (width, narrow), dtype),
        "excite": init_dense(keys[2], (narrow, width), dtype),
        "point": init_dense(keys[3], (width, width), dtype, bias=False),
        "norm2": init_norm(width, dtype),
    }


def hard_sigmoid(x: Array) -> Array:
    """relu6(x + 3) / 6."""
    return jnp.clip(x + 3, 0, 6) / 6


def block(params: Params, x_BHWD: Array, stride: int) -> Array:
    """MobileNetV3's inverted residual with expansion 1, and layer norms; stride 1 adds its input."""
    x = norm(params["norm1"], depthwise(params["depthwise"]["kernel"], x_BHWD, stride), EPS)
    x = x * hard_sigmoid(x)
    mean = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(x.dtype)
    x = x * hard_sigmoid(dense(params["excite"], jax.nn.relu(dense(params["squeeze"], mean))))
    x = norm(params["norm2"], dense(params["point"], x), EPS)
    return x + x_BHWD if stride == 1 else x


def _init_ldp(cfg: ModelConfig, key: Array) -> Params:
    first, *keys = jax.random.split(key, 1 + len(STRIDES))
    width, dtype = cfg.llm.width, cfg.param_dtype
    blocks = {name: _init_block(k, width, dtype) for name, k in zip(STRIDES, keys, strict=True)}
    return {**init_mlp(first, cfg.vit.width, width, dtype), **blocks}


def _ldp(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """MLP, a block that keeps the grid, a block that halves it (rounded up)."""
    side = cfg.vit.grid
    x = mlp(params, tokens.tokens_BMD)
    x = x.reshape(x.shape[0], side, side, -1)
    for name, stride in STRIDES.items():
        x = block(params[name], x, stride)
    # Output i is centred on place 2 i; the place beside it is told to it as well.
    half = 2 * np.arange(x.shape[1]), np.arange(side) // 2
    position, source = on_grid(half, half)
    return placed(x.reshape(x.shape[0], -1, x.shape[-1]), position, source)


def _ldp_count(cfg: ModelConfig, method: MethodConfig, tokens: int) -> int:
    return (-(-cfg.vit.grid // 2)) ** 2


def _ldp_flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    width = cfg.llm.width
    convolved = tokens + _ldp_count(cfg, method, tokens)
    products = convolved * (2 * 9 * width + 2 * width * width)
    gates = len(STRIDES) * 2 * 2 * width * squeezed(width)
    return mlp_flops(cfg.vit.width, width, tokens) + products + gates


def _init_ldpv2(cfg: ModelConfig, key: Array) -> Params:
    first, second = jax.random.split(key)
    width, dtype = cfg.llm.width, cfg.param_dtype
    peg = {"kernel": _init_kernel(second, width, dtype), "b": jnp.zeros(width, dtype)}
    return {**init_mlp(first, cfg.vit.width, width, dtype), "peg": peg}


def _ldpv2(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """MLP, adaptive average pooling to `pool_grid` a side, and a depthwise convolution added as a position code.

    The published grid is 12, fixed; it repeats tokens where a picture has fewer patches a side, which is refused here.
    """
    pooled = average_pool(mlp(params, tokens.tokens_BMD), grid=method.pool_grid)
    x = pooled.tokens_BMD
    grid = x.reshape(x.shape[0], method.pool_grid, method.pool_grid, -1)
    grid = grid + depthwise(params["peg"]["kernel"], grid) + params["peg"]["b"].astype(x.dtype)
    return replace(pooled, grid.reshape(x.shape))


def _ldpv2_flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    width, grid, side = cfg.llm.width, method.pool_grid, cfg.vit.grid
    pooling = 2 * width * grid * side * (side + grid)
    return mlp_flops(cfg.vit.width, width, tokens) + pooling + 2 * 9 * width * grid**2


def _check_ldpv2(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    grid = cfg.vit.grid
    require(
        1 <= method.pool_grid <= grid,
        f"{key}.pool_grid = {method.pool_grid} must lie between 1 and the {grid} patches of a side (LDPv2's own is 12)",
    )


ENTRIES = {
    "ldp": Projector(
        _init_ldp, _ldp, _ldp_count, _ldp_flops, grid=True, outputs="a quarter of patches", source="arXiv 2312.16886"
    ),
    "ldpv2": Projector(
        _init_ldpv2,
        _ldpv2,
        lambda cfg, method, tokens: method.pool_grid**2,
        _ldpv2_flops,
        check=_check_ldpv2,
        options=("pool_grid",),
        grid=True,
        outputs="pool_grid squared",
        source="arXiv 2402.03766",
    ),
}
