"""What a question costs from a VoCo cache, beside reading the whole picture too; and what a scan costs a decoder."""

import argparse
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import attention, generate, llm, stack, voco
from tokzip_jax.bench.report import Report
from tokzip_jax.bench.timing import CLOCKS, Case, interleave, ratio, rows_of, spread
from tokzip_jax.bench.weights import random_weights
from tokzip_jax.config import LlmConfig, ModelConfig
from tokzip_jax.flops import llm_flops
from tokzip_jax.layout import text_stream
from tokzip_jax.masks import TABLES
from tokzip_jax.types import TEXT, VISION, VOCO, Array, Params, TokenStream

# SmolLM2-135M (arXiv 2502.02737).
SMOLLM2_135M = LlmConfig(
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    rope_theta=1e5,
    max_positions=8192,
    tied_head=True,
)
TINY = LlmConfig(
    vocab_size=32, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=32, max_positions=64, tied_head=True
)
TARGET = 1.3  # time ratio over FLOP ratio


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--batch", type=int, default=1, help="rows at once")
    parser.add_argument("--visual", type=int, default=576, help="visual tokens of the full prefill")
    parser.add_argument("--text", type=int, default=64, help="text tokens of the question")
    parser.add_argument("--voco", type=int, default=1, help="VoCo tokens in the cache")
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded a run")
    parser.add_argument(
        "--attention",
        choices=attention.IMPLEMENTATIONS,
        default="auto",
        help="of both sides; auto: the fastest one here; einsum: what is computed is what the FLOPs of all pairs count",
    )
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run(args: argparse.Namespace) -> Report:
    """Stage two against the full prefill, and unstacked decoding against a scan."""
    shape = TINY if args.tiny else SMOLLM2_135M
    cfg = ModelConfig(llm=shape, dtype=args.dtype, param_dtype=args.dtype, attention=args.attention)
    shapes = jax.eval_shape(lambda key: llm.init(cfg.llm, key, cfg.param_dtype), jax.random.key(0))
    params = {"llm": random_weights(shapes)}
    blocks = stack.unstack(params["llm"]["layers"])
    clock = CLOCKS[args.clock]
    seconds = interleave(_reading(cfg, params, blocks, args), runs=args.runs, clock=clock)
    decoding = interleave(_decoding(cfg, params, blocks, args), runs=args.runs, clock=clock)
    per_second = {name: [args.decode * args.batch / s for s in values] for name, values in decoding.items()}
    times = ratio(seconds, "full prefill", "stage two")
    return Report(
        name="voco",
        settings={
            "language model": dataclasses.asdict(cfg.llm),
            "batch": args.batch,
            "dtype": args.dtype,
            "tokens": {"visual": args.visual, "text": args.text, "VoCo": args.voco, "decoded": args.decode},
            "head": "on the last position",
            "attention": cfg.attention,
            "clock": args.clock,
            "runs": {"measured": args.runs, "warm-up": 1},
        },
        tables={
            "seconds": rows_of(seconds),
            "reading, what a scan costs": [
                ratio(seconds, "full prefill, scan", "full prefill"),
                ratio(seconds, "stage two, scan", "stage two"),
            ],
            "full prefill / stage two": flop_rows(cfg.llm, args, times),
            "decoded tokens a second": [{"what": name, **spread(values)} for name, values in per_second.items()],
            "decoding, seconds": [ratio(decoding, "scan over the stack", "unstacked blocks")],
        },
    )


def flop_rows(cfg: LlmConfig, args: argparse.Namespace, times: dict[str, Any]) -> list[dict[str, Any]]:
    """The FLOP ratio beside the time ratio, and how far the time falls short of it (the target: at most 1.3)."""
    rows = []
    for causal, what in (
        (False, "all query-key pairs (what --attention=einsum does)"),
        (True, "causal pairs only (what --attention=blocks comes close to)"),
    ):
        full = llm_flops(cfg, args.visual + args.text, causal=causal)
        short = llm_flops(cfg, args.text, past=args.voco, causal=causal)
        rows.append(
            {
                "FLOPs counted": what,
                "full": full,
                "stage two": short,
                "FLOP ratio": full / short,
                "time ratio": times["median"],
                "FLOP / time": full / short / times["median"],
                "FLOP / best time": full / short / times["best"],
                "target": TARGET,
            }
        )
    return rows


def question_ids(vocabulary: int, batch: int, length: int) -> Array:
    """[batch, length] int32 text ids without special ones."""
    return jnp.asarray(np.random.default_rng(2).integers(4, vocabulary, (batch, length)), jnp.int32)


def _row(kinds: list[int], batch: int) -> TokenStream:
    kind = jnp.broadcast_to(jnp.asarray(kinds, jnp.int32), (batch, len(kinds)))
    order = jnp.broadcast_to(jnp.arange(len(kinds), dtype=jnp.int32), kind.shape)
    segment = jnp.where((kind == VISION) | (kind == VOCO), 1, 0)
    zero = jnp.zeros_like(kind)
    return TokenStream(kind=kind, segment=segment, thread=zero, sample=zero + 1, position=order, order=order)


def _reading(cfg: ModelConfig, params: Params, blocks: tuple[Params, ...], args: argparse.Namespace) -> dict[str, Case]:
    """Both ways of reading a question, up to the logits of the answer's first token and a cache to continue from.

    Each over blocks of their own, as they are kept for decoding, and over the stack.
    """
    ids = question_ids(cfg.llm.vocab_size, args.batch, args.text)
    visual = jax.random.normal(jax.random.key(3), (args.batch, args.visual, cfg.llm.width), jnp.dtype(cfg.dtype))
    stream = _row([VISION] * args.visual + [TEXT] * args.text, args.batch)

    @jax.jit
    def full(params: Params, visual: Array, ids: Array, blocks: Any) -> generate.Prompt:
        text = params["llm"]["embed"]["table"].astype(cfg.dtype)[ids]
        x = jnp.concatenate([visual, text], axis=1)
        cache = llm.empty_cache(cfg, args.batch, x.shape[1])
        table = jnp.asarray(TABLES["visible"])
        return generate.read(cfg, params, x, stream, table, cache=cache, offset=0, blocks=blocks)

    shape = (cfg.llm.layers, args.batch, cfg.llm.kv_heads, args.voco, cfg.llm.head_dim)
    kept = jax.random.normal(jax.random.key(4), shape, jnp.dtype(cfg.dtype))
    row = _row([VOCO] * args.voco, args.batch)
    cache = voco.VocoCache(
        k=kept,
        v=kept,
        kind=row.kind,
        segment=row.segment,
        position=row.position + args.visual,
        next_position=jnp.full(args.batch, args.visual + args.voco, jnp.int32),
        voco_mask="voco",
    )
    ask = jax.jit(partial(voco.ask, cfg, max_new=0))
    return {
        "full prefill": Case(lambda: full(params, visual, ids, blocks)),
        "stage two": Case(lambda: ask(params, cache, ids, blocks=blocks)),
        "full prefill, scan": Case(lambda: full(params, visual, ids, None)),
        "stage two, scan": Case(lambda: ask(params, cache, ids)),
    }


def _decoding(
    cfg: ModelConfig, params: Params, blocks: tuple[Params, ...], args: argparse.Namespace
) -> dict[str, Case]:
    """The same greedy loop over blocks of their own and over the stack."""
    table = jnp.asarray(TABLES["visible"])
    slots = args.text + args.decode

    @jax.jit
    def decode(params: Params, blocks: Any, cache: llm.KvCache) -> Array:
        def one_more(step: Array, carry: tuple[Array, llm.KvCache]) -> tuple[Array, llm.KvCache]:
            token, cache = carry
            new = text_stream(jnp.ones((args.batch, 1), jnp.int32))
            new = dataclasses.replace(new, position=new.position + args.text + step)
            cache, new = llm.write_stream(cache, new, args.text + step)
            x = params["llm"]["embed"]["table"].astype(cfg.dtype)[token[:, None]]
            x, kv = llm.run_layers(cfg, blocks, x, new, table, cache=cache, offset=args.text + step, keep=True)
            token = jnp.argmax(llm.logits(cfg, params["llm"], x)[:, 0], axis=-1).astype(jnp.int32)
            return token, dataclasses.replace(cache, **kv)

        return jax.lax.fori_loop(0, args.decode, one_more, (jnp.ones(args.batch, jnp.int32), cache))[0]

    cache = llm.empty_cache(cfg, args.batch, slots)
    cache, _ = llm.write_stream(cache, text_stream(question_ids(cfg.llm.vocab_size, args.batch, args.text)), 0)
    apart = dataclasses.replace(cache, k=tuple(cache.k), v=tuple(cache.v))
    return {
        "unstacked blocks": Case(lambda: decode(params, blocks, apart)),
        "scan over the stack": Case(lambda: decode(params, params["llm"]["layers"], cache)),
    }
