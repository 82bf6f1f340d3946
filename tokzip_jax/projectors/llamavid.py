"""LLaMA-VID: one token for what the question asks of a picture, and content tokens (arXiv 2311.17043, section 3.1)."""

import dataclasses

import jax
import jax.numpy as jnp

from tokzip_jax.compress.pool import stride_pool
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors.base import (
    Context,
    Projector,
    dense,
    init_dense,
    init_mlp,
    mlp,
    mlp_flops,
    norm,
)
from tokzip_jax.projectors.qformer import VISION_EPS, check_reader, init_reader, read, reader_flops
from tokzip_jax.require import require
from tokzip_jax.types import Array, Params, VisualTokens


def _init(cfg: ModelConfig, key: Array) -> Params:
    keys = jax.random.split(key, 5)
    dtype, inner = cfg.param_dtype, cfg.vit.width
    return {
        **init_reader(cfg, keys[0], question=True),
        **init_mlp(keys[1], inner, cfg.llm.width, dtype),
        "read": init_dense(keys[2], (cfg.projector.width, inner), dtype),
        "key": init_dense(keys[3], (inner, inner), dtype),
        "value": init_dense(keys[4], (inner, cfg.llm.width), dtype),
    }


def text_queries(cfg: ModelConfig, params: Params, picture_BSC: Array, question: tuple[Array, Array]) -> Array:
    """What a Q-Former with the question's words makes of CLS and patches, in the vision tower's width: [B, Q, C]."""
    hidden = read(cfg, params, norm(params["pre_norm"], picture_BSC, VISION_EPS), None, question)
    return dense(params["read"], hidden)


def context_token(params: Params, queries_BQC: Array, patches_BPC: Array) -> Array:
    """The patches that the queries look at, mean over queries, in the language model's width: [B, 1, D].

    Keys are projected, values are the raw features; the published code averages over the queries before it projects.
    """
    keys = dense(params["key"], patches_BPC).astype(jnp.float32)
    scale = patches_BPC.shape[2] ** -0.5
    scores = jnp.einsum("BQC,BPC->BQP", queries_BQC.astype(jnp.float32) * scale, keys)
    weights = jnp.mean(jax.nn.softmax(scores, axis=-1), axis=1, keepdims=True).astype(patches_BPC.dtype)
    return dense(params["value"], weights @ patches_BPC)


def _apply(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """[context token, content tokens]; the content is pooled before it is projected."""
    patches = tokens.tokens_BMD
    picture = jnp.concatenate([context.cls_BD[:, None], patches], axis=1)
    first = context_token(params, text_queries(cfg, params, picture, context.question), patches)
    content = tokens
    if method.content_grid:
        content = stride_pool(patches, factor=cfg.vit.grid // method.content_grid)
    batch = patches.shape[0]

    def behind(value: int, rest: Array) -> Array:
        return jnp.concatenate([jnp.full((batch, 1), value, rest.dtype), rest], axis=1)

    return dataclasses.replace(
        content,
        tokens_BMD=jnp.concatenate([first, mlp(params, content.tokens_BMD)], axis=1),
        valid_BM=behind(True, content.valid_BM),
        position_BM=behind(-1, content.position_BM),
        size_BM=behind(0, content.size_BM),
        source_BP=jnp.where(content.source_BP >= 0, content.source_BP + 1, -1),
    )


def _content(method: MethodConfig, tokens: int) -> int:
    return method.content_grid**2 or tokens


def _flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    inner, outer, size = cfg.vit.width, cfg.llm.width, cfg.projector
    looking = 2 * size.queries * size.width * inner + 2 * tokens * inner**2 + 2 * size.queries * tokens * inner
    context = looking + 2 * tokens * inner + 2 * inner * outer
    words = min(text, size.text_length)
    return reader_flops(cfg, tokens + 1, words) + context + mlp_flops(inner, outer, _content(method, tokens))


def _check(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    check_reader(key, cfg, method)
    grid, content = cfg.vit.grid, method.content_grid
    require(
        content == 0 or (1 <= content <= grid and grid % content == 0),
        f"{key}.content_grid = {content} must be a divisor of the {grid} patches of a side (1 .. {grid}), "
        "or 0 for every patch",
    )


ENTRIES = {
    "llamavid": Projector(
        _init,
        _apply,
        lambda cfg, method, tokens: 1 + _content(method, tokens),
        _flops,
        check=_check,
        options=("content_grid",),
        grid=True,
        question=True,
        classes=("transformation", "query"),
        outputs="1 + content_grid squared",
        source="arXiv 2311.17043",
    )
}
