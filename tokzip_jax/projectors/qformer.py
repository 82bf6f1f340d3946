"""Q-Former: learned queries that read a picture through cross-attention.

BLIP-2's form (arXiv 2301.12597, section 3.1) sees the picture alone; InstructBLIP's (arXiv 2305.06500, section 2.3)
lets the queries attend to the words of the question too.
"""

import jax
import jax.numpy as jnp

from tokzip_jax import layers, stack
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
    queries,
)
from tokzip_jax.require import require
from tokzip_jax.types import Array, Params, VisualTokens

EPS = 1e-12  # of the norms inside, which are BERT's
VISION_EPS = 1e-5  # of the norm over the picture's features
INIT = 0.02  # standard deviation of BERT's embeddings, and of the queries


def init_reader(cfg: ModelConfig, key: Array, *, question: bool) -> Params:
    """Parameters of `read`, and the norm over the picture's features."""
    size, dtype = cfg.projector, cfg.param_dtype
    query_key, words_key, position_key, layers_key = jax.random.split(key, 4)

    def table(key: Array, rows: int) -> Params:
        return {"table": INIT * jax.random.normal(key, (rows, size.width), dtype)}

    def init_block(key: Array) -> Params:
        keys = jax.random.split(key, size.cross_every)
        return {str(j): _init_layer(cfg, k, cross=j == 0, question=question) for j, k in enumerate(keys)}

    params = {
        "pre_norm": init_norm(cfg.vit.width, dtype),
        "query": table(query_key, size.queries),
        "norm": init_norm(size.width, dtype),
        "layers": stack.init(init_block, layers_key, size.layers // size.cross_every),
    }
    if question:
        words = {"words": table(words_key, cfg.llm.vocab_size), "positions": table(position_key, size.text_length)}
        params |= words
    return params


def _mlp(cfg: ModelConfig) -> layers.Mlp:
    return layers.Mlp(cfg.projector.width, cfg.projector.mlp_dim, "gelu", cfg.param_dtype)


def _init_layer(cfg: ModelConfig, key: Array, *, cross: bool, question: bool) -> Params:
    size, dtype = cfg.projector, cfg.param_dtype
    keys = jax.random.split(key, 4)
    x = jnp.zeros((1, 1, size.width), dtype)
    params = {
        "attn": init_attention(keys[0], size.width, size.width, size.heads, dtype),
        "norm1": init_norm(size.width, dtype),
        "mlp": layers.init(_mlp(cfg), keys[1], x),
        "norm3": init_norm(size.width, dtype),
    }
    if cross:
        params["cross"] = init_attention(keys[2], size.width, cfg.vit.width, size.heads, dtype)
        params["norm2"] = init_norm(size.width, dtype)
    if question:
        params["text_mlp"] = layers.init(_mlp(cfg), keys[3], x)
        params["norm4"] = init_norm(size.width, dtype)
    return params


def read(
    cfg: ModelConfig,
    params: Params,
    picture_BSC: Array,
    valid_BS: Array | None = None,
    question: tuple[Array, Array] | None = None,
) -> Array:
    """What the queries have read after all layers.

    Every layer: self-attention of queries and words, on every `cross_every`-th layer (the first one included)
    cross-attention of the queries to the picture, and a feed-forward of their own for queries and for words; each is
    added and then normalised, as in BERT. Queries have no positions. There is no dropout.

    Args:
        cfg: its `projector` sizes it.
        params: from `init_reader`.
        picture_BSC: [B, S, C] features of pictures, already normalised.
        valid_BS: [B, S] bool, which of them are real; None = all.
        question: ids and validity [B, T], T up to `cfg.projector.text_length`; None = no words.

    Returns:
        [B, Q, W].
    """
    batch, dtype = picture_BSC.shape[0], picture_BSC.dtype
    table = params["query"]["table"].astype(dtype)
    x = norm(params["norm"], jnp.broadcast_to(table[None], (batch, *table.shape)), EPS)
    text, mask = None, None
    if question is not None:
        ids, real = question
        words = params["words"]["table"].astype(dtype)[ids]
        words = words + params["positions"]["table"][: ids.shape[1]].astype(dtype)[None]
        text = norm(params["norm"], words, EPS)
        mask = jnp.concatenate([jnp.ones((batch, table.shape[0]), bool), real], axis=1)[:, None]
    seen = None if valid_BS is None else valid_BS[:, None]

    def body(carry: tuple[Array, Array | None], block: Params, _: None) -> tuple[tuple[Array, Array | None], None]:
        for j in range(cfg.projector.cross_every):
            carry = _layer(cfg, block[str(j)], *carry, mask, picture_BSC, seen)
        return carry, None

    blocks = cfg.projector.layers // cfg.projector.cross_every
    (x, _), _ = stack.run(body, (x, text), params["layers"], 0, blocks, remat=cfg.remat)
    return x


def _layer(
    cfg: ModelConfig,
    params: Params,
    x_BQD: Array,
    text_BTD: Array | None,
    mask: Array | None,
    picture_BSC: Array,
    seen: Array | None,
) -> tuple[Array, Array | None]:
    both = x_BQD if text_BTD is None else jnp.concatenate([x_BQD, text_BTD], axis=1)
    mixed = attention(params["attn"], both, both, both, mask, cfg.attention)
    both = norm(params["norm1"], both + mixed, EPS)
    x_BQD, rest = both[:, : x_BQD.shape[1]], both[:, x_BQD.shape[1] :]
    if "cross" in params:
        mixed = attention(params["cross"], x_BQD, picture_BSC, picture_BSC, seen, cfg.attention)
        x_BQD = norm(params["norm2"], x_BQD + mixed, EPS)
    x_BQD = norm(params["norm3"], x_BQD + layers.apply(_mlp(cfg), params["mlp"], x_BQD), EPS)
    if text_BTD is not None:
        rest = norm(params["norm4"], rest + layers.apply(_mlp(cfg), params["text_mlp"], rest), EPS)
        return x_BQD, rest
    return x_BQD, None


def reader_flops(cfg: ModelConfig, tokens: int, text: int) -> int:
    """FLOPs of `read` over `tokens` features of a picture and `text` words."""
    size = cfg.projector
    queries, both, crossed = size.queries, size.queries + text, size.layers // size.cross_every
    attn = 4 * 2 * both * size.width**2 + 4 * both**2 * size.width
    cross = 2 * 2 * queries * size.width**2 + 2 * 2 * tokens * cfg.vit.width * size.width
    cross += 4 * queries * tokens * size.width
    return size.layers * (attn + 2 * 2 * both * size.width * size.mlp_dim) + crossed * cross


def check_reader(key: str, cfg: ModelConfig, method: MethodConfig) -> None:
    """Refuse sizes of `model.projector` that no Q-Former can have."""
    size = cfg.projector
    for name in ("queries", "width", "layers", "heads", "mlp_dim", "cross_every", "text_length"):
        value = getattr(size, name)
        require(value >= 1, f"model.projector.{name} = {value} must be >= 1")
    require(
        size.width % size.heads == 0,
        f"model.projector.heads = {size.heads} must divide model.projector.width = {size.width}",
    )
    require(
        size.layers % size.cross_every == 0,
        f"model.projector.cross_every = {size.cross_every} must divide model.projector.layers = {size.layers}",
    )


def _init(cfg: ModelConfig, key: Array, *, question: bool) -> Params:
    reader, last = jax.random.split(key)
    fc = init_dense(last, (cfg.projector.width, cfg.llm.width), cfg.param_dtype)
    return {**init_reader(cfg, reader, question=question), "fc": fc}


def _apply(
    cfg: ModelConfig, method: MethodConfig, params: Params, tokens: VisualTokens, context: Context
) -> VisualTokens:
    """Norm over the features, queries, linear layer to the language model's width.

    The picture's CLS token is read in front of its patches, as in BLIP-2; behind an encoder site the tokens that it
    passed on are read and nothing else.
    """
    picture, valid = tokens.tokens_BMD, tokens.valid_BM
    if method.encoder == "none":
        picture, valid = jnp.concatenate([context.cls_BD[:, None], picture], axis=1), None
    picture = norm(params["pre_norm"], picture, VISION_EPS)
    return queries(tokens, dense(params["fc"], read(cfg, params, picture, valid, context.question)))


def _flops(cfg: ModelConfig, method: MethodConfig, tokens: int, text: int) -> int:
    picture = tokens + (method.encoder == "none")
    return reader_flops(cfg, picture, text) + 2 * cfg.projector.queries * cfg.projector.width * cfg.llm.width


_BLIP2 = Projector(
    lambda cfg, key: _init(cfg, key, question=False),
    _apply,
    lambda cfg, method, tokens: cfg.projector.queries,
    lambda cfg, method, tokens, text: _flops(cfg, method, tokens, 0),
    check=check_reader,
    classes=("query",),
    outputs="model.projector.queries",
    source="arXiv 2301.12597",
)
ENTRIES = {
    "qformer": _BLIP2,
    "instructblip": _BLIP2._replace(
        init=lambda cfg, key: _init(cfg, key, question=True),
        flops=lambda cfg, method, tokens, text: _flops(cfg, method, tokens, min(text, cfg.projector.text_length)),
        question=True,
        source="arXiv 2305.06500",
    ),
}
