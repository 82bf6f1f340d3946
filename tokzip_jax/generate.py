"""Reading a prompt into a KV cache, and continuing it on the device."""

import dataclasses

import jax
import jax.numpy as jnp

from tokzip_jax import decoder_site, llm, vlm
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.llm import KvCache
from tokzip_jax.masks import TABLES
from tokzip_jax.types import PAD, TEXT, Array, Params, TokenStream, VisualTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stage:
    """What a run of layers remembers of a prompt.

    Attributes:
        cache: keys and values of these layers, of the prompt and of the free slots behind it.
        last: stream [B, 1] of each row's last token as these layers saw it.
        lo, hi: layer numbers (static).
    """

    cache: KvCache
    last: TokenStream
    lo: int = dataclasses.field(metadata={"static": True})
    hi: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """A read prompt, ready to be continued.

    Attributes:
        stages: the runs of layers that saw the same tokens: one, or one more for every cut of a decoder site, whose
            caches are the shorter the later they come.
        logits_BV: [B, V] for the token after each row's last one.
        free: unused slots at the end of every cache (static).
    """

    stages: tuple[Stage, ...]
    logits_BV: Array
    free: int = dataclasses.field(metadata={"static": True})


def _last_slot(stream: TokenStream) -> Array:
    """[B, 1] index of each row's last real slot."""
    index = jnp.arange(stream.kind.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(stream.kind != PAD, index, 0), axis=1, keepdims=True)


def read(
    cfg: ModelConfig,
    params: Params,
    x_BTD: Array,
    stream: TokenStream,
    table: Array,
    *,
    cache: KvCache,
    offset: int,
    blocks: tuple[Params, ...] | None = None,
) -> Prompt:
    """Run a prompt's embeddings into a cache from slot `offset` on; the head runs on the last position only.

    `blocks` are the layers out of `stack.unstack`, if they are at hand for decoding: a scan over the stack copies every
    block's weights, which for a short prompt is a tenth of the time.
    """
    cache, stream = llm.write_stream(cache, stream, offset)
    blocks = params["llm"]["layers"] if blocks is None else blocks
    hidden, kv = llm.run_layers(cfg, blocks, x_BTD, stream, table, cache=cache, offset=offset, keep=True)
    stage = Stage(cache=dataclasses.replace(cache, **kv), last=_last(stream), lo=0, hi=cfg.llm.layers)
    free = cache.stream.kind.shape[1] - offset - x_BTD.shape[1]
    return Prompt(stages=(stage,), logits_BV=_last_logits(cfg, params, hidden, stream), free=free)


def _last(stream: TokenStream) -> TokenStream:
    """The stream [B, 1] of each row's last token."""
    last = _last_slot(stream)
    return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, last, axis=1), stream)


def _last_logits(cfg: ModelConfig, params: Params, hidden_BTD: Array, stream: TokenStream) -> Array:
    """[B, V] of each row's last token."""
    final = jnp.take_along_axis(hidden_BTD, _last_slot(stream)[:, :, None], axis=1)
    return llm.logits(cfg, params["llm"], final)[:, 0]


def prefill(
    cfg: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    method: MethodConfig,
    *,
    max_new: int,
    table: Array | None = None,
    voco_count: Array | int | None = None,
    key: Array | None = None,
    visual: VisualTokens | None = None,
) -> Prompt:
    """Read prompts (pictures, VoCo tokens and text) in one pass, leaving room for `max_new` tokens.

    Rows may have different lengths and either padding side; each row holds one thread. Arguments as in `forward`. A
    decoder site drops tokens here, once: what is written later finds what each layer kept.
    """
    key = jax.random.key(method.seed) if key is None else key
    table = jnp.asarray(TABLES[method.voco_mask]) if table is None else table
    count = method.voco if voco_count is None else voco_count
    x, slots, visual, _ = vlm.embed(cfg, params, batch, method, voco_count=count, key=key, visual=visual)
    if method.decoder == "none":
        cache = llm.empty_cache(cfg, x.shape[0], x.shape[1] + max_new, sizes=method.attention_bias)
        return read(cfg, params, x, slots.stream, table, cache=cache, offset=0)
    sizes = {"images": visual.valid_BM.shape[0] // x.shape[0], "visual": visual.valid_BM.shape[1]}
    hidden, slots, runs = decoder_site.run(cfg, params["llm"]["layers"], x, slots, table, method, **sizes, keep=True)
    stages = []
    for run in runs:
        cache = llm.extend(KvCache(k=run.k, v=run.v, stream=run.stream), max_new)
        stages.append(Stage(cache=cache, last=_last(run.stream), lo=run.lo, hi=run.hi))
    logits_BV = _last_logits(cfg, params, hidden, slots.stream)
    return Prompt(stages=tuple(stages), logits_BV=logits_BV, free=max_new)


def _choose(logits_BV: Array, temperature: float, key: Array | None) -> Array:
    """The next tokens [B], greedy or drawn."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1).astype(jnp.int32)


def decode(
    cfg: ModelConfig,
    params: Params,
    blocks: tuple[Params, ...],
    prompt: Prompt,
    *,
    max_new: int,
    eos_id: int,
    table: Array,
    temperature: float = 0.0,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """Continue prompts on the device, one token a step, until every row has ended.

    Args:
        cfg, params: the model.
        blocks: its layers out of `stack.unstack(params["llm"]["layers"])`, made once: a loop over single blocks does
            not copy their weights at every step, as a scan over the stack would.
        prompt: from `prefill`, `read` or `voco.ask`, made with room for `max_new` tokens or more.
        max_new: the most tokens written a row.
        eos_id: ends a row; it is written too.
        table: who sees whom.
        temperature: 0 = greedy; otherwise the softmax temperature of sampling, with `key`.

    Returns:
        tokens [B, max_new] int32 (0 behind the end), and how many of them are real [B].

    Raises:
        ValueError: no room in the cache, or sampling without a key.
    """
    rows = prompt.logits_BV.shape[0]
    if not 1 <= max_new <= prompt.free:
        raise ValueError(
            f"max_new={max_new} does not fit the {prompt.free} free slots behind the prompt; it must lie between 1 and "
            f"{prompt.free}, which is the max_new that the prompt was read with"
        )
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature={temperature} needs a value >= 0, and a key where it is above 0")

    def choose(logits_BV: Array, step: Array) -> Array:
        return _choose(logits_BV, temperature, None if key is None else jax.random.fold_in(key, step))

    def one_more(carry):
        step, token, ended, tokens, caches = carry
        kind = jnp.where(ended, PAD, TEXT).astype(jnp.int32)[:, None]
        x = params["llm"]["embed"]["table"].astype(cfg.dtype)[token[:, None]]
        written = []
        for stage, cache in zip(prompt.stages, caches, strict=True):
            position = stage.last.position + step
            new = dataclasses.replace(stage.last, kind=kind, segment=jnp.zeros_like(kind), position=position)
            at = cache.stream.kind.shape[1] - prompt.free + step - 1
            cache, new = llm.write_stream(cache, new, at)
            part = {"lo": stage.lo, "hi": stage.hi}
            x, kv = llm.run_layers(cfg, blocks, x, new, table, cache=cache, offset=at, keep=True, **part)
            written.append(dataclasses.replace(cache, **kv))
        token = jnp.where(ended, 0, choose(llm.logits(cfg, params["llm"], x)[:, 0], step))
        tokens = tokens.at[:, step].set(token)
        return step + 1, token, ended | (token == eos_id), tokens, tuple(written)

    first = choose(prompt.logits_BV, jnp.int32(0))
    tokens = jnp.zeros((rows, max_new), jnp.int32).at[:, 0].set(first)
    caches = tuple(dataclasses.replace(s.cache, k=tuple(s.cache.k), v=tuple(s.cache.v)) for s in prompt.stages)
    carry = (jnp.int32(1), first, first == eos_id, tokens, caches)
    _, _, _, tokens, _ = jax.lax.while_loop(lambda c: (c[0] < max_new) & ~jnp.all(c[2]), one_more, carry)
    # Vocabulary id 0 is padding and may be chosen by an untrained model; count up to the first end instead.
    ends = tokens == eos_id
    length = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, max_new)
    return tokens, length.astype(jnp.int32)
