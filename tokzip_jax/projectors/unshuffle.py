"""InternVL's projector: pixel unshuffle, layer norm, and two linear layers (arXiv 2404.16821, section 3.1)."""

from tokzip_jax.compress.unshuffle import ORDERS, pixel_unshuffle
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors.base import Context, Projector, init_mlp, init_norm, mlp, mlp_flops, norm, replace
from tokzip_jax.require import require
from tokzip_jax.types import Array, Params, VisualTokens

EPS = 1e-5


def _init(cfg: ModelConfig, key: Array) -> Params:
    wide = cfg.vit.width * cfg.projector.unshuffle**2
    return {"pre_norm": init_norm(wide, cfg.param_dtype), **init_mlp(key, wide, cfg.llm.width, cfg.param_dtype)}


def _apply(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """Norm over the stacked width, linear, exact GELU, linear.

    InternVL's own code defaults to the token order "v1" and sets "v2" in every published config since 1.5, which is the
    default here.
    """
    blocks = pixel_unshuffle(tokens.tokens_BMD, factor=cfg.projector.unshuffle, order=method.unshuffle_order)
    return replace(blocks, mlp(params, norm(params["pre_norm"], blocks.tokens_BMD, EPS)))


def _count(cfg: ModelConfig, method: MethodConfig, tokens: int) -> int:
    return tokens // cfg.projector.unshuffle**2


def _flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    wide = cfg.vit.width * cfg.projector.unshuffle**2
    return mlp_flops(wide, cfg.llm.width, _count(cfg, method, tokens))


def _check(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    grid, factor = cfg.vit.grid, cfg.projector.unshuffle
    require(
        1 <= factor <= grid and grid % factor == 0,
        f"model.projector.unshuffle = {factor} must be a divisor of the {grid} patches of a side (1 .. {grid})",
    )
    require(
        method.unshuffle_order in ORDERS,
        f"{key}.unshuffle_order = {method.unshuffle_order!r} is unknown; choose 'v1' or 'v2'",
    )


ENTRIES = {
    "pixel_unshuffle": Projector(
        _init,
        _apply,
        _count,
        _flops,
        check=_check,
        options=("unshuffle_order",),
        grid=True,
        outputs="the side over model.projector.unshuffle, squared",
        source="arXiv 2404.16821",
    )
}
