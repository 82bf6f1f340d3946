"""A LLaMA-shaped decoder (arXiv 2302.13971): grouped heads, rotary positions, SwiGLU, a KV cache of plain arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokzip_jax import layers, stack
from tokzip_jax.attention import attend, score_rows
from tokzip_jax.compress.restore import restore_bias
from tokzip_jax.config import LlmConfig, ModelConfig
from tokzip_jax.masks import visibility
from tokzip_jax.sharding import constrain
from tokzip_jax.types import PAD, Array, Params, TokenStream


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KvCache:
    """Keys and values of every layer, rotated, and what stands in each slot.

    Attributes:
        k, v: [L, B, K, S, H] stacked, or tuples of L arrays [B, K, S, H] (for decoding).
        stream: [B, S]; an unused slot is PAD. `order` is the slot number.
    """

    k: Any
    v: Any
    stream: TokenStream


def modules_of(cfg: LlmConfig, param_dtype: Any) -> dict[str, Any]:
    """The parts of one block, by the names of their parameters."""
    return {
        "norm1": layers.RMSNorm(cfg.norm_eps, param_dtype),
        "attn": layers.Attention(cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, param_dtype=param_dtype),
        "norm2": layers.RMSNorm(cfg.norm_eps, param_dtype),
        "mlp": layers.SwiGlu(cfg.width, cfg.mlp_dim, param_dtype),
    }


def run_block(
    modules: dict[str, Any], block: Params, x_BTD: Array, kind_BT: Array, mix: layers.Mix
) -> tuple[Array, Any]:
    """One layer: ([B, T, D], what `mix` returned beside the mixed heads); the kinds say where low-rank deltas reach."""
    x_BTD = constrain(x_BTD, "data", None, None)
    gate_BT = layers.delta_gate(block, kind_BT)
    normed = layers.apply(modules["norm1"], block["norm1"], x_BTD)
    mixed, out = layers.apply(modules["attn"], block["attn"], normed, mix, gate_BT)
    x_BTD = x_BTD + mixed
    normed = layers.apply(modules["norm2"], block["norm2"], x_BTD)
    return x_BTD + layers.apply(modules["mlp"], block["mlp"], normed, gate_BT), out


def init(cfg: LlmConfig, key: Array, param_dtype: Any = jnp.float32, cuts: tuple[int, ...] = ()) -> Params:
    """Fresh parameters; `cuts` are the layer numbers at which the stack is stored split."""
    modules = modules_of(cfg, param_dtype)
    x = jnp.zeros((1, 1, cfg.width), param_dtype)
    arguments = {"attn": (x, lambda q, k, v: (q, None))}

    def init_block(key: Array) -> Params:
        keys = jax.random.split(key, len(modules))
        return {n: layers.init(m, k, *arguments.get(n, (x,))) for (n, m), k in zip(modules.items(), keys, strict=True)}

    embed_key, layers_key, head_key = jax.random.split(key, 3)
    scale = cfg.width**-0.5
    params = {
        "embed": {"table": scale * jax.random.normal(embed_key, (cfg.vocab_size, cfg.width), param_dtype)},
        "layers": stack.init(init_block, layers_key, cfg.layers, cuts),
        "norm": {"scale": jnp.ones(cfg.width, param_dtype)},
    }
    if not cfg.tied_head:
        # [D, V]: at one position this reads the table in the order it lies in memory.
        params["head"] = {"w": scale * jax.random.normal(head_key, (cfg.width, cfg.vocab_size), param_dtype)}
    return params


def logits(cfg: ModelConfig, params: Params, x_BTD: Array) -> Array:
    """Final norm and head: [B, T, D] -> [B, T, V] in `logits_dtype`. Call it on the positions that are read, only."""
    x = layers.apply(layers.RMSNorm(cfg.llm.norm_eps), params["norm"], x_BTD)
    dtype = jnp.dtype(cfg.logits_dtype)
    if cfg.llm.tied_head:
        table = params["embed"]["table"].astype(x.dtype)
        return jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=dtype)
    return jnp.einsum("BTD,DV->BTV", x, params["head"]["w"].astype(x.dtype), preferred_element_type=dtype)


def run_layers(
    cfg: ModelConfig,
    blocks: Params | tuple[Params, ...],
    x_BTD: Array,
    stream: TokenStream,
    table: Array,
    *,
    cache: KvCache | None = None,
    offset: int | Array = 0,
    lo: int = 0,
    hi: int | None = None,
    keep: bool = False,
    rows: Array | None = None,
    attention: Callable[[Array, Array, Array], Array] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """Run layers lo .. hi-1 over a row of tokens.

    Args:
        cfg, blocks: the model's config and `params["layers"]` (groups, or a tuple from `stack.unstack`). Low-rank
            deltas in them (`lora.attach`) reach the token kinds that they were made for;
            `layers.without_deltas(blocks)` switches them off.
        x_BTD: [B, T, D] embeddings.
        stream: [B, T] what they are. With a cache, `order` must already be the slots they are written to. With sizes in
            it, `restore_bias` is added to all attention logits.
        table: [kinds, kinds] out of `masks.TABLES`.
        cache: keys and values of these layers that came before; the new ones are written at `offset`. Its stream
            must already describe the new tokens (see `write_stream`).
        offset: first slot written. A Python int lets attention stop at the last used slot.
        lo, hi: static layer numbers (hi None: all).
        keep: return the keys and values of every layer.
        rows: [B, R] slots of this row whose attention weights are returned.
        attention: (q [B, N, T, H], k, v [B, K, T, H]) -> [B, N, T, H] in place of `cfg.attention`, knowing by itself
            what `table` says of this row: `splash.attend` with a static mask. Then no [B, T, T] mask is made.

    Returns:
        [B, T, D], and what was asked for, stacked over the layers (tuples where `blocks` is one): "k", "v"
        [L, B, K, S, H] if `keep`, and "scores" [L, B, N, R, S] float32 for `rows`.

    Raises:
        ValueError: an `attention` of its own together with a cache, `rows` or sizes.
    """
    if attention is not None and (cache is not None or rows is not None or stream.size is not None):
        raise ValueError("attention= is for whole rows: it goes with neither a cache nor rows= nor stream.size")
    hi = cfg.llm.layers if hi is None else hi
    modules = modules_of(cfg.llm, cfg.param_dtype)
    angles = layers.rope_angles(stream.position, cfg.llm.head_dim, cfg.llm.rope_theta)
    # With a static offset nothing behind the new tokens is used yet, so it is not even read.
    used = slice(None, offset + x_BTD.shape[1] if isinstance(offset, int) else None)
    seen = stream if cache is None else jax.tree.map(lambda leaf: leaf[:, used], cache.stream)
    mask = visibility(stream, seen, table) if attention is None else None
    bias = None
    if stream.size is not None:
        turning = {"head_dim": cfg.llm.head_dim, "theta": cfg.llm.rope_theta}
        bias = restore_bias(stream.position, seen.position, seen.size, **turning)

    def body(x: Array, block: Params, past: tuple[Array, Array] | None) -> tuple[Array, dict[str, Array]]:
        def mix(q: Array, k: Array, v: Array) -> tuple[Array, dict[str, Array]]:
            q, k = layers.rotate(q, angles), layers.rotate(k, angles)
            if past is not None:
                k = jax.lax.dynamic_update_slice_in_dim(past[0], k.astype(past[0].dtype), offset, axis=2)
                v = jax.lax.dynamic_update_slice_in_dim(past[1], v.astype(past[1].dtype), offset, axis=2)
            read_k, read_v = k[:, :, used].astype(q.dtype), v[:, :, used].astype(q.dtype)
            out = {"k": k, "v": v} if keep else {}
            if rows is not None:
                q_rows = jnp.take_along_axis(q, rows[:, None, :, None], axis=2)
                seen_rows = jnp.take_along_axis(mask, rows[:, :, None], axis=1)
                weighed = None if bias is None else jnp.take_along_axis(bias, rows[:, :, None], axis=1)
                out["scores"] = score_rows(q_rows, read_k, mask=seen_rows, bias=weighed)
            if attention is not None:
                return attention(q, read_k, read_v), out
            return attend(q, read_k, read_v, mask=mask, bias=bias, implementation=cfg.attention), out

        return run_block(modules, block, x, stream.kind, mix)

    past = None
    if cache is not None:
        past = tuple(zip(cache.k, cache.v, strict=True)) if isinstance(blocks, tuple) else (cache.k, cache.v)
    x, out = stack.run(body, x_BTD, blocks, lo, hi, inputs=past, remat=cfg.remat)
    if isinstance(blocks, tuple):
        out = {name: tuple(layer[name] for layer in out) for name in out[0]}
    return x, out


def empty_cache(cfg: ModelConfig, batch: int, slots: int, dtype: Any = None, *, sizes: bool = False) -> KvCache:
    """A cache of `slots` unused slots for `batch` rows; with `sizes` its stream has room for them."""
    shape = (cfg.llm.layers, batch, cfg.llm.kv_heads, slots, cfg.llm.head_dim)
    zeros = jnp.zeros((batch, slots), jnp.int32)
    order = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), zeros.shape)
    stream = TokenStream(
        kind=zeros + PAD,
        segment=zeros,
        thread=zeros,
        sample=zeros,
        position=zeros,
        order=order,
        size=zeros if sizes else None,
    )
    dtype = dtype or cfg.dtype
    return KvCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), stream=stream)


def extend(cache: KvCache, slots: int) -> KvCache:
    """A stacked cache with `slots` more unused slots behind it."""
    batch, length = cache.stream.kind.shape

    def pad(leaf: Array, axis: int) -> Array:
        width = [(0, 0)] * leaf.ndim
        width[axis] = (0, slots)
        return jnp.pad(leaf, width)

    stream = jax.tree.map(lambda leaf: pad(leaf, 1), cache.stream)
    order = jnp.broadcast_to(jnp.arange(length + slots, dtype=jnp.int32), (batch, length + slots))
    stream = dataclasses.replace(stream, order=order)
    return KvCache(k=pad(cache.k, 3), v=pad(cache.v, 3), stream=stream)


def write_stream(cache: KvCache, new: TokenStream, offset: int | Array) -> tuple[KvCache, TokenStream]:
    """Describe new tokens in the cache's slots from `offset` on; returns both, the new tokens' order set to slots."""
    order = offset + jnp.broadcast_to(jnp.arange(new.kind.shape[1], dtype=jnp.int32), new.kind.shape)
    new = dataclasses.replace(new, order=order)
    stream = jax.tree.map(
        lambda old, part: jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), offset, axis=1),
        cache.stream,
        new,
    )
    return dataclasses.replace(cache, stream=stream), new
