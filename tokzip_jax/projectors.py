"""What stands between the vision tower and the language model: plain projectors and projectors that compress.

Every projector is a function (parameters, `VisualTokens` of the encoder site) -> `VisualTokens` of the language
model's width. Average-pool + linear is the baseline of VoCo-LLaMA's Table 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from tokzip_jax import layers
from tokzip_jax.compress.pool import average_pool
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.types import Array, Params, VisualTokens


class Projector(NamedTuple):
    """An entry of `PROJECTORS`.

    Attributes:
        init: (model config, key) -> parameters.
        apply: (model config, method config, parameters, visual tokens) -> visual tokens.
        count: (method config, tokens that come in) -> tokens that go out.
    """

    init: Callable[[ModelConfig, Array], Params]
    apply: Callable[[ModelConfig, MethodConfig, Params, VisualTokens], VisualTokens]
    count: Callable[[MethodConfig, int], int]


def _dense(width: int, out: int, param_dtype: str) -> layers.Linear:
    return layers.Linear((width, out), bias=True, param_dtype=param_dtype)


def _init_dense(cfg: ModelConfig, key: Array, width: int) -> Params:
    module = _dense(width, cfg.llm.width, cfg.param_dtype)
    return layers.init(module, key, jax.numpy.zeros((1, 1, width), cfg.param_dtype))


def _apply_dense(params: Params, x_BTD: Array) -> Array:
    return layers.apply(_dense(*params["w"].shape, str(params["w"].dtype)), params, x_BTD)


def _replace(tokens: VisualTokens, tokens_BMD: Array) -> VisualTokens:
    return VisualTokens(**{**vars(tokens), "tokens_BMD": tokens_BMD})


def _init_mlp(cfg: ModelConfig, key: Array) -> Params:
    first, second = jax.random.split(key)
    return {"fc1": _init_dense(cfg, first, cfg.vit.width), "fc2": _init_dense(cfg, second, cfg.llm.width)}


def _apply_mlp(cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens) -> VisualTokens:
    hidden = layers.gelu(_apply_dense(params["fc1"], tokens.tokens_BMD))
    return _replace(tokens, _apply_dense(params["fc2"], hidden))


def _init_linear(cfg: ModelConfig, key: Array) -> Params:
    return {"fc": _init_dense(cfg, key, cfg.vit.width)}


def _apply_linear(cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens) -> VisualTokens:
    return _replace(tokens, _apply_dense(params["fc"], tokens.tokens_BMD))


def _apply_pooled(cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens) -> VisualTokens:
    return _apply_linear(cfg, method, params, average_pool(tokens.tokens_BMD, grid=method.pool_grid))


PROJECTORS = {
    "mlp2x_gelu": Projector(_init_mlp, _apply_mlp, lambda method, tokens: tokens),
    "linear": Projector(_init_linear, _apply_linear, lambda method, tokens: tokens),
    "avgpool_linear": Projector(_init_linear, _apply_pooled, lambda method, tokens: method.pool_grid**2),
}
