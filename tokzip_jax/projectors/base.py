"""What an entry of `PROJECTORS` is, and the pieces that several projectors are made of."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokzip_jax import layers
from tokzip_jax.attention import attend
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.types import Array, Params, VisualTokens


class Context(NamedTuple):
    """What a projector may read beside the visual tokens of the pictures.

    Attributes:
        cls_BD: [B, D] the CLS token of the feature layer.
        key: for a budget that is drawn: one key, of which picture n uses the one folded with n, or B keys.
        question: ids and validity [B, T] of the question about each picture (None unless the projector reads it).
    """

    cls_BD: Array
    key: Array
    question: tuple[Array, Array] | None = None


class Projector(NamedTuple):
    """An entry of `PROJECTORS`.

    Attributes:
        init: (model config, key) -> parameters.
        apply: (model config, method config, parameters, visual tokens, context) -> visual tokens.
        count: (model config, method config, tokens that come in) -> tokens that go out.
        flops: (model config, method config, tokens that come in, tokens of the question) -> FLOPs for one picture, of
            products with weights, of attention, and of pooling where it is a product.
        check: (dotted place of the method in the config, model config, method config) raises ValueError for settings
            that cannot work, as one sentence.
        options: the fields of `MethodConfig` that it reads; the other projectors' options have to stay at their
            defaults.
        weights: whose parameters it runs on, if not its own: pooling has none, so that weights trained without pooling
            can be read with it.
        grid: it needs all patches of the raster, so that nothing may be selected before it.
        question: it reads the question, and so gives tokens for one question a row.
        classes: of the survey (arXiv 2507.20198); none where it compresses nothing.
        outputs: how many tokens come out, in words.
        source: where it is published.
    """

    init: Callable[[ModelConfig, Array], Params]
    apply: Callable[[ModelConfig, MethodConfig, Params, VisualTokens, Context], VisualTokens]
    count: Callable[[ModelConfig, MethodConfig, int], int]
    flops: Callable[[ModelConfig, MethodConfig, int, int], int]
    check: Callable[[str, ModelConfig, MethodConfig], None] = lambda key, model, method: None
    options: tuple[str, ...] = ()
    weights: str = ""
    grid: bool = False
    question: bool = False
    classes: tuple[str, ...] = ("transformation",)
    outputs: str = "all patches"
    source: str = ""


def replace(tokens: VisualTokens, tokens_BMD: Array) -> VisualTokens:
    """The same tokens with other values."""
    return VisualTokens(**{**vars(tokens), "tokens_BMD": tokens_BMD})


def queries(tokens: VisualTokens, tokens_BMD: Array, valid_BM: Array | None = None) -> VisualTokens:
    """The outputs of learned queries, which stand for no place and no patch: position -1, size 0, every source -1."""
    batch, slots, _ = tokens_BMD.shape
    return VisualTokens(
        tokens_BMD=tokens_BMD,
        valid_BM=jnp.ones((batch, slots), bool) if valid_BM is None else valid_BM,
        position_BM=jnp.full((batch, slots), -1, jnp.int32),
        size_BM=jnp.zeros((batch, slots), jnp.int32),
        source_BP=jnp.full_like(tokens.source_BP, -1),
    )


def init_dense(key: Array, shape: tuple[int, ...], param_dtype: str, *, fan_in: int = 1, bias: bool = True) -> Params:
    """Parameters of a linear layer, see `layers.Linear`."""
    module = layers.Linear(shape, fan_in=fan_in, bias=bias, param_dtype=param_dtype)
    return layers.init(module, key, jnp.zeros((1, 1, *shape[:fan_in]), param_dtype))


def dense(params: Params, x: Array, fan_in: int = 1) -> Array:
    """Run a linear layer of whatever shape its parameters have."""
    w = params["w"]
    return layers.apply(layers.Linear(w.shape, fan_in=fan_in, bias="b" in params, param_dtype=w.dtype), params, x)


def init_norm(width: int, param_dtype: str) -> Params:
    """Parameters of a `layers.LayerNorm`."""
    return {"scale": jnp.ones(width, param_dtype), "bias": jnp.zeros(width, param_dtype)}


def norm(params: Params, x: Array, eps: float) -> Array:
    """Layer normalisation over the last axis."""
    return layers.apply(layers.LayerNorm(eps, params["scale"].dtype), params, x)


def init_mlp(key: Array, inner: int, outer: int, param_dtype: str) -> Params:
    """Parameters of `mlp`."""
    first, second = jax.random.split(key)
    return {
        "fc1": init_dense(first, (inner, outer), param_dtype),
        "fc2": init_dense(second, (outer, outer), param_dtype),
    }


def mlp(params: Params, x: Array) -> Array:
    """Two linear layers with an exact GELU between them, LLaVA-1.5's projector."""
    return dense(params["fc2"], layers.gelu(dense(params["fc1"], x)))


def mlp_flops(inner: int, outer: int, tokens: int) -> int:
    """FLOPs of `mlp`."""
    return tokens * 2 * outer * (inner + outer)


def init_attention(key: Array, width: int, kv_width: int, heads: int, param_dtype: str) -> Params:
    """Parameters of `attention`, all projections with biases."""
    shapes = {"q": width, "k": kv_width, "v": kv_width}
    *keys, last = jax.random.split(key, 4)
    split = (heads, width // heads)
    params = {n: init_dense(k, (shapes[n], *split), param_dtype) for n, k in zip(shapes, keys, strict=True)}
    return {**params, "o": init_dense(last, (*split, width), param_dtype, fan_in=2)}


def attention(
    params: Params, x_BTD: Array, keys_BSD: Array, values_BSD: Array, mask: Array | None, implementation: str
) -> Array:
    """Multi-head attention of x to other tokens; `mask` [B, 1 or T, S] is True where a key is seen.

    x or keys may be one row for the whole batch, which is then projected once.
    """
    batch = values_BSD.shape[0]
    parts = {"q": x_BTD, "k": keys_BSD, "v": values_BSD}
    heads = {name: dense(params[name], part).swapaxes(1, 2) for name, part in parts.items()}
    heads = {name: jnp.broadcast_to(part, (batch, *part.shape[1:])) for name, part in heads.items()}
    mixed = attend(heads["q"], heads["k"], heads["v"], mask=mask, implementation=implementation)
    return dense(params["o"], mixed.swapaxes(1, 2), fan_in=2)


def picture_keys(key: Array, pictures: int) -> Array:
    """[pictures] keys for what a projector draws, apart from what the encoder site drew with the same keys."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold(key, jnp.arange(pictures)) if key.ndim == 0 else key
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
