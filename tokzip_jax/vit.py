"""A CLIP-shaped vision transformer (arXiv 2103.00020) that gives features and the few signals a compressor asks for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import layers, stack
from tokzip_jax.attention import attend, score_rows
from tokzip_jax.compress.bipartite import Between, Merged, begin, finish
from tokzip_jax.compress.entry import Tower
from tokzip_jax.config import ModelConfig, VitConfig
from tokzip_jax.sharding import constrain
from tokzip_jax.types import Array, Params, VisionFeatures

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Signals of the feature layer's block, and of the last block.
FEATURE_SIGNALS = ("cls_attention_BP", "keys_BSH")
LAST_SIGNALS = ("last_queries_BSD", "last_keys_BSD")
# Read by what merges tokens inside a block: softmax attention of the CLS row, its own column too, mean over heads.
CLS_ROW = "cls_row_BS"


def normalise(images: Array, dtype: Any = jnp.float32) -> Array:
    """uint8 pictures [..., H, W, 3] to CLIP's normalised values."""
    pixels = images.astype(jnp.float32) / 255.0
    shape = (1,) * (images.ndim - 1) + (3,)
    return ((pixels - jnp.asarray(MEAN).reshape(shape)) / jnp.asarray(STD).reshape(shape)).astype(dtype)


def tower(cfg: VitConfig) -> Tower:
    """What an encoder-site method may know of this tower."""
    return Tower(rows=cfg.grid, columns=cfg.grid, heads=cfg.heads, blocks=cfg.feature_blocks, window=cfg.window)


def cuts(cfg: VitConfig) -> tuple[int, ...]:
    """Where the stack is stored split: behind the last block that the features need."""
    return (cfg.feature_blocks,) if 0 < cfg.feature_blocks < cfg.layers else ()


def _modules(cfg: VitConfig, param_dtype: Any) -> dict[str, Any]:
    return {
        "norm1": layers.LayerNorm(cfg.norm_eps, param_dtype),
        "attn": layers.Attention(
            cfg.width, cfg.heads, cfg.heads, cfg.width // cfg.heads, bias=True, param_dtype=param_dtype
        ),
        "norm2": layers.LayerNorm(cfg.norm_eps, param_dtype),
        "mlp": layers.Mlp(cfg.width, cfg.mlp_dim, cfg.activation, param_dtype),
    }


def init(cfg: VitConfig, key: Array, param_dtype: Any = jnp.float32) -> Params:
    """Fresh parameters; see the module's names in `sharding.RULES`."""
    modules = _modules(cfg, param_dtype)
    x = jnp.zeros((1, 1, cfg.width), param_dtype)
    arguments = {"attn": (x, lambda q, k, v: (q, None))}

    def init_block(key: Array) -> Params:
        keys = jax.random.split(key, len(modules))
        return {n: layers.init(m, k, *arguments.get(n, (x,))) for (n, m), k in zip(modules.items(), keys, strict=True)}

    patch_key, cls_key, pos_key, layers_key = jax.random.split(key, 4)
    norm = {"scale": jnp.ones(cfg.width, param_dtype), "bias": jnp.zeros(cfg.width, param_dtype)}
    patch_shape = (cfg.patch_size, cfg.patch_size, 3, cfg.width)
    scale = (3 * cfg.patch_size**2) ** -0.5
    return {
        "patch": {"kernel": scale * jax.random.normal(patch_key, patch_shape, param_dtype)},
        "cls": cfg.width**-0.5 * jax.random.normal(cls_key, (cfg.width,), param_dtype),
        "pos": 0.02 * jax.random.normal(pos_key, (1 + cfg.patches, cfg.width), param_dtype),
        "pre_norm": norm,
        "layers": stack.init(init_block, layers_key, cfg.layers, cuts(cfg)),
        "post_norm": norm,
    }


def window_mask(cfg: VitConfig, place_BT: Array | None = None) -> Array | None:
    """Who sees whom [1, 1+P, 1+P] (True = sees) in a tower with windows; None where everything sees everything.

    With `place_BT`, the places (0 = CLS) of merged tokens, [B, T, T]: such a token is in the window of its place, the
    token that the others were merged into, wherever these stood.

    A patch sees the patches of its own window and nothing else, the CLS token sees everything. So what a patch says is
    about its own surroundings: without windows a small tower writes what a simple picture shows into every one of its
    patches, and then it does not matter which of them are kept. (Windows without a CLS token: Qwen2.5-VL, arXiv
    2502.13923, section 2.1.1.)
    """
    if not cfg.window:
        return None
    row, column = np.divmod(np.arange(cfg.patches), cfg.grid)
    number = np.concatenate([[-1], row // cfg.window * cfg.grid + column // cfg.window])[None]
    if place_BT is not None:
        number = jnp.asarray(number[0])[place_BT]
    return (number[:, :, None] == number[:, None]) | (number == -1)[:, :, None]


def embed(cfg: VitConfig, params: Params, pixels_BHWC: Array) -> Array:
    """Patches, CLS token, positions and the pre-layernorm: [B, H, W, 3] -> [B, 1+P, D]."""
    batch, side, dtype = pixels_BHWC.shape[0], cfg.patch_size, pixels_BHWC.dtype
    cut = pixels_BHWC.reshape(batch, cfg.grid, side, cfg.grid, side, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["patch"]["kernel"].astype(dtype).reshape(-1, cfg.width)
    patches = cut.reshape(batch, cfg.patches, -1) @ kernel
    cls = jnp.broadcast_to(params["cls"].astype(dtype)[None, None], (batch, 1, cfg.width))
    x = jnp.concatenate([cls, patches], axis=1) + params["pos"].astype(dtype)[None]
    return layers.apply(layers.LayerNorm(cfg.norm_eps), params["pre_norm"], x)


def _read(name: str, q: Array, k: Array, bias_BS: Array | None) -> Array:
    """A signal of a block out of its queries and keys [B, N, S, H]."""
    if name == CLS_ROW:
        return jnp.mean(score_rows(q[:, :, :1], k, bias=bias_BS)[:, :, 0], axis=1)
    if name == "cls_attention_BP":
        return jnp.sum(score_rows(q[:, :, :1], k, bias=bias_BS)[:, :, 0, 1:], axis=1)
    if name == "keys_BSH":
        return jnp.mean(k.astype(jnp.float32), axis=1).astype(k.dtype)
    heads = q if name == "last_queries_BSD" else k
    return heads.swapaxes(1, 2).reshape(k.shape[0], k.shape[2], -1)


def _attention(
    cfg: ModelConfig,
    block: Params,
    x_BSD: Array,
    signals: tuple[str, ...],
    bias_BS: Array | None,
    place_BS: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """The first half of a block: x + attention, and what was read off it."""
    modules = _modules(cfg.vit, cfg.param_dtype)
    window = window_mask(cfg.vit, place_BS)

    def mix(q: Array, k: Array, v: Array) -> tuple[Array, dict[str, Array]]:
        read = {name: _read(name, q, k, bias_BS) for name in signals}
        return attend(q, k, v, mask=window, bias=bias_BS, implementation=cfg.attention), read

    x = constrain(x_BSD, "data", None, None)
    mixed, read = layers.apply(modules["attn"], block["attn"], layers.apply(modules["norm1"], block["norm1"], x), mix)
    return x + mixed, read


def _mlp(cfg: ModelConfig, block: Params, x_BSD: Array) -> Array:
    """The second half: x + MLP."""
    modules = _modules(cfg.vit, cfg.param_dtype)
    return x_BSD + layers.apply(modules["mlp"], block["mlp"], layers.apply(modules["norm2"], block["norm2"], x_BSD))


def run_blocks(
    cfg: ModelConfig,
    params: Params,
    x_BSD: Array,
    lo: int,
    hi: int,
    signals: tuple[str, ...] = (),
    bias_BS: Array | None = None,
    place_BS: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Blocks lo .. hi-1; the asked-for signals are those of block hi-1. `bias_BS` is added to every key's logits, and
    `place_BS` says where merged tokens stand, see `window_mask`.

    Every block writes its signals over the last one's in the loop's carry: a CLS row and a mean of the keys cost next
    to nothing, and so one scan serves, with no block's weights copied out of the stack.
    """

    def body(carry: tuple[Array, Any], block: Params, _: None) -> tuple[tuple[Array, Any], None]:
        x, read = _attention(cfg, block, carry[0], signals, bias_BS, place_BS)
        return (_mlp(cfg, block, x), read), None

    batch, length = x_BSD.shape[:2]
    shapes = {
        "cls_attention_BP": ((batch, length - 1), jnp.float32),
        "keys_BSH": ((batch, length, cfg.vit.width // cfg.vit.heads), x_BSD.dtype),
        "last_queries_BSD": ((batch, length, cfg.vit.width), x_BSD.dtype),
        "last_keys_BSD": ((batch, length, cfg.vit.width), x_BSD.dtype),
    }
    empty = {name: jnp.zeros(*shapes[name]) for name in signals}
    (x, read), _ = stack.run(body, (x_BSD, empty), params["layers"], lo, hi, remat=cfg.remat)
    return x, read


def _merge_block(
    cfg: ModelConfig,
    params: Params,
    tokens: Merged,
    number: int,
    merge: Between,
    signals: tuple[str, ...],
    bias_BS: Array | None,
    place_BS: Array | None,
) -> tuple[Merged, dict[str, Array]]:
    """One block with `merge` between its halves."""
    reads = tuple({*signals, CLS_ROW, "keys_BSH"})

    # The number of tokens changes, so that they cannot be the loop's carry: they leave as the output of its one turn.
    def body(carry: tuple[()], block: Params, _: None) -> tuple[tuple[()], Any]:
        x, read = _attention(cfg, block, tokens.x_BTD, reads, bias_BS, place_BS)
        merged = merge(dataclasses.replace(tokens, x_BTD=x), read["keys_BSH"], read[CLS_ROW])
        merged = dataclasses.replace(merged, x_BTD=_mlp(cfg, block, merged.x_BTD))
        return carry, (merged, {name: read[name] for name in signals})

    _, out = stack.run(body, (), params["layers"], number, number + 1, remat=cfg.remat)
    return jax.tree.map(lambda leaf: leaf[0], out)


def _run(
    cfg: ModelConfig,
    params: Params,
    tokens: Merged,
    lo: int,
    hi: int,
    signals: tuple[str, ...],
    between: Mapping[int, Between],
    proportional: bool,
) -> tuple[Merged, dict[str, Array]]:
    """Blocks lo .. hi-1: scans over the blocks between those in which tokens merge."""

    def about() -> tuple[Array | None, Array | None]:
        """Bias and places of the tokens; None while nothing has merged."""
        if tokens.x_BTD.shape[1] == tokens.slot_BS.shape[1]:
            return None, None
        return jnp.log(tokens.size_BT.astype(jnp.float32)) if proportional else None, tokens.place_BT

    read: dict[str, Array] = {}
    stops = [number for number in sorted(between) if lo <= number < hi]
    for start, number in zip([lo, *(stop + 1 for stop in stops)], [*stops, hi]):
        if start < number or not stops:
            x, read = run_blocks(cfg, params, tokens.x_BTD, start, number, signals if number == hi else (), *about())
            tokens = dataclasses.replace(tokens, x_BTD=x)
        if number < hi:
            here = signals if number == hi - 1 else ()
            tokens, read = _merge_block(cfg, params, tokens, number, between[number], here, *about())
    return tokens, read


def features(
    cfg: ModelConfig,
    params: Params,
    pixels_BHWC: Array,
    *,
    signals: tuple[str, ...] = (),
    summary: bool = False,
    between: Mapping[int, Between] | None = None,
    proportional: bool = False,
) -> tuple[VisionFeatures, Array | None]:
    """Features of the feature layer; blocks after the last one needed are not run.

    Args:
        cfg, params: the model's config, and the parameters under "vit".
        pixels_BHWC: [B, H, W, 3] normalised pictures.
        signals: names out of FEATURE_SIGNALS and LAST_SIGNALS.
        summary: also run the rest of the tower and return the CLS token behind the post-layernorm.
        between: block number -> what merges tokens between its attention and its MLP (`tome.between`,
            `folder.between`); the numbers of tokens are static, and each such block is compiled on its own.
        proportional: merged tokens count as often as they have members in the attention of the blocks behind (ToMe).

    Returns:
        The features, and the summary [B, D] (None unless asked for). With `between`, P patches are M merged tokens, and
        the signals "position_BM", "size_BM" and "source_BP" say what became of the patches, as in `VisualTokens`
        (`tome.merged`). A signal of a block that merges is of its tokens before it did.

    Raises:
        ValueError: unknown signal, pictures of another size, or a block behind the features in `between`.
    """
    unknown = set(signals) - set(FEATURE_SIGNALS) - set(LAST_SIGNALS)
    if unknown:
        raise ValueError(f"unknown vision signals {sorted(unknown)}; there are {FEATURE_SIGNALS + LAST_SIGNALS}")
    if pixels_BHWC.shape[1:] != (cfg.vit.image_size, cfg.vit.image_size, 3):
        side = cfg.vit.image_size
        raise ValueError(f"pictures of shape {pixels_BHWC.shape[1:]} do not fit a tower for {(side, side, 3)}")
    between, blocks = between or {}, cfg.vit.feature_blocks
    wrong = [number for number in between if not 0 <= number < blocks]
    if wrong:
        raise ValueError(
            f"between: block {wrong[0]} is not among those before the features; it must be 0 .. {blocks - 1}"
        )
    # With the last block's output as features, both kinds of signals come from the one run.
    whole = blocks == cfg.vit.layers
    first = tuple(name for name in signals if whole or name in FEATURE_SIGNALS)
    last = tuple(name for name in signals if name not in first)
    state = begin(embed(cfg.vit, params, pixels_BHWC))
    state, read = _run(cfg, params, state, 0, blocks, first, between, proportional)
    x = result = state.x_BTD
    if between:
        done = finish(state, cls=True)
        read = {**read, "position_BM": done.position_BM, "size_BM": done.size_BM, "source_BP": done.source_BP}
    if last or summary:
        state, read_last = _run(cfg, params, state, blocks, cfg.vit.layers, last, {}, proportional)
        x, read = state.x_BTD, {**read, **read_last}
    pooled = layers.apply(layers.LayerNorm(cfg.vit.norm_eps), params["post_norm"], x[:, 0]) if summary else None
    return VisionFeatures(patches_BPD=result[:, 1:], cls_BD=result[:, 0], signals=read), pooled
