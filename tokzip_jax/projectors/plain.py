"""Projectors that compress nothing: one token in, one token out."""

from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors.base import Context, Projector, dense, init_dense, init_mlp, mlp, mlp_flops, replace
from tokzip_jax.types import Array, Params, VisualTokens


def init_two_layers(cfg: ModelConfig, key: Array) -> Params:
    """fc1, fc2."""
    return init_mlp(key, cfg.vit.width, cfg.llm.width, cfg.param_dtype)


def init_one_layer(cfg: ModelConfig, key: Array) -> Params:
    """fc."""
    return {"fc": init_dense(key, (cfg.vit.width, cfg.llm.width), cfg.param_dtype)}


def linear_flops(cfg: ModelConfig, tokens: int) -> int:
    """FLOPs of the one linear layer."""
    return tokens * 2 * cfg.vit.width * cfg.llm.width


def _mlp(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    return replace(tokens, mlp(params, tokens.tokens_BMD))


def _linear(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    return replace(tokens, dense(params["fc"], tokens.tokens_BMD))


def _same(cfg: ModelConfig, method: MethodConfig, tokens: int) -> int:
    return tokens


ENTRIES = {
    "mlp2x_gelu": Projector(
        init_two_layers,
        _mlp,
        _same,
        lambda cfg, method, tokens, text: mlp_flops(cfg.vit.width, cfg.llm.width, tokens),
        classes=(),
        source="arXiv 2310.03744",
    ),
    "linear": Projector(
        init_one_layer,
        _linear,
        _same,
        lambda cfg, method, tokens, text: linear_flops(cfg, tokens),
        classes=(),
        source="arXiv 2304.08485",
    ),
}
