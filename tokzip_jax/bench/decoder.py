"""What a decoder-site method saves of a prefill: the time beside the FLOPs that it leaves out."""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tokzip_jax import attention, decoder_site, layout, llm, stack
from tokzip_jax.bench.report import Report
from tokzip_jax.bench.timing import CLOCKS, Case, interleave, ratio, rows_of
from tokzip_jax.bench.voco import SMOLLM2_135M, TARGET, TINY, question_ids
from tokzip_jax.bench.weights import random_weights
from tokzip_jax.compress.decoder import DECODER, cuts
from tokzip_jax.config import MethodConfig, ModelConfig, VitConfig
from tokzip_jax.flops import layer_tokens, scheduled_flops
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, Array, Params

FULL = "uncompressed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--methods", nargs="+", choices=DECODER, default=list(DECODER), help="which ones")
    parser.add_argument("--batch", type=int, default=1, help="rows at once")
    parser.add_argument("--grid", type=int, default=24, help="visual tokens of a side: 24 are 576")
    parser.add_argument("--text", type=int, default=64, help="text tokens behind the picture")
    parser.add_argument("--layers", type=int, default=0, help="of the language model; 0 = the shape's own")
    parser.add_argument(
        "--attention",
        choices=attention.IMPLEMENTATIONS,
        default="auto",
        help="of both sides; auto: the fastest one here; einsum: what is computed is what the FLOPs of all pairs count",
    )
    parser.add_argument("--stack", action="store_true", help="scan over stacked layers instead of single blocks")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run(args: argparse.Namespace) -> Report:
    """Prefill with each decoder-site method against the uncompressed one, and the ratio of their FLOPs."""
    cfg = model(args)
    methods = {FULL: MethodConfig()} | {name: method(name, cfg) for name in args.methods}
    schedules = [schedule_row(cfg, name, chosen) for name, chosen in methods.items()]
    shapes = jax.eval_shape(lambda key: llm.init(cfg.llm, key, cfg.param_dtype), jax.random.key(0))
    params = random_weights(shapes)
    blocks = params["layers"] if args.stack else stack.unstack(params["layers"])
    batch = rows(args, cfg.llm.vocab_size)
    side = (args.batch, args.grid**2, cfg.llm.width)
    visual_BVD = jax.random.normal(jax.random.key(3), side, jnp.dtype(cfg.dtype))
    arguments = (params, blocks, batch, visual_BVD)
    programs = {
        name: jax.jit(functools.partial(prefill, cfg, chosen)).lower(*arguments).compile()
        for name, chosen in methods.items()
    }
    cases = {name: Case(functools.partial(program, *arguments)) for name, program in programs.items()}
    seconds = interleave(cases, runs=args.runs, clock=CLOCKS[args.clock])
    names = args.methods
    return Report(
        name="decoder",
        settings={
            "language model": dataclasses.asdict(cfg.llm),
            "batch": args.batch,
            "dtype": args.dtype,
            "tokens": {"BOS": 1, "visual": args.grid**2, "text": args.text},
            "layers run": "as a scan over the stack" if args.stack else "as single blocks",
            "head": "on the last position",
            "attention": cfg.attention,
            "clock": args.clock,
            "runs": {"measured": args.runs, "warm-up": 1},
        },
        tables={
            "schedules": schedules,
            "seconds": rows_of(seconds),
            "uncompressed / method, all query-key pairs (what --attention=einsum does)": [
                ratio_row(cfg, args, methods, seconds, name, causal=False) for name in names
            ],
            "uncompressed / method, causal pairs only (what --attention=blocks comes close to)": [
                ratio_row(cfg, args, methods, seconds, name, causal=True) for name in names
            ],
        },
    )


def model(args: argparse.Namespace) -> ModelConfig:
    """The language model; of the vision tower only the number of patches is read."""
    shape = dataclasses.replace(TINY, layers=5, max_positions=2048) if args.tiny else SMOLLM2_135M
    shape = dataclasses.replace(shape, layers=args.layers or shape.layers)
    vit = VitConfig(image_size=2 * args.grid, patch_size=2)
    return ModelConfig(vit=vit, llm=shape, dtype=args.dtype, param_dtype=args.dtype, attention=args.attention)


def method(name: str, cfg: ModelConfig) -> MethodConfig:
    """A method with its published schedule, in proportion to this model's layers and visual tokens."""
    schedule = cuts(name, cfg.llm.layers)
    keep = tuple(max(1, count * cfg.vit.patches // 576) for count in schedule.values())
    heads = min(MethodConfig.decoder_heads, cfg.llm.heads)
    more = {"sparsevlm_plus": {"decoder_heads": heads}, "sparsevlm_paper": {"decoder_scale": 0.5}}.get(name, {})
    return MethodConfig(decoder=name, decoder_layers=tuple(schedule), decoder_keep=keep, **more)


def rows(args: argparse.Namespace, vocabulary: int) -> dict[str, Array]:
    """Rows of BOS, a picture and a question, none of it an answer."""
    ids = question_ids(vocabulary, args.batch, args.text)
    ids = jnp.concatenate([jnp.broadcast_to(jnp.array([[1, IMAGE_ID]]), (args.batch, 2)), ids], axis=1)
    zero = jnp.zeros_like(ids)
    return {"ids": ids, "thread": zero, "sample": zero + 1, "supervised": zero > 0}


def prefill(
    cfg: ModelConfig,
    chosen: MethodConfig,
    params: Params,
    blocks: Params | tuple[Params, ...],
    batch: dict[str, Array],
    visual_BVD: Array,
) -> tuple[Array, Any]:
    """From projected visual tokens [B, V, D] to the logits [B, vocabulary] of the answer's first token and the keys and
    values of every run of layers."""
    visual = visual_BVD.shape[1]
    valid = jnp.ones((visual_BVD.shape[0], 1, visual), bool)
    slots = layout.expand(batch, valid, voco=0, voco_count=0)
    text = params["embed"]["table"].astype(cfg.dtype)[slots.ids]
    picture = jnp.take_along_axis(visual_BVD, jnp.maximum(slots.visual, 0)[:, :, None], axis=1)
    x = jnp.where(slots.visual[:, :, None] >= 0, picture, text)
    table = jnp.asarray(TABLES["visible"])
    x, slots, runs = decoder_site.run(cfg, blocks, x, slots, table, chosen, images=1, visual=visual, keep=True)
    last = jnp.max(jnp.where(slots.stream.kind > 0, slots.stream.order, 0), axis=1)
    final = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return llm.logits(cfg, params, final)[:, 0], [(run.k, run.v) for run in runs]


def schedule_row(cfg: ModelConfig, name: str, chosen: MethodConfig) -> dict[str, Any]:
    """Where a method cuts, and the visual tokens that are left."""
    by_layer = layer_tokens(cfg, chosen)
    return {
        "method": name,
        "cuts before layers": " ".join(map(str, chosen.decoder_layers)) or "-",
        "tokens kept": " ".join(map(str, chosen.decoder_keep)) or "-",
        "tokens at the end": by_layer[-1],
        "mean of the layers": sum(by_layer) / len(by_layer),
    }


def ratio_row(
    cfg: ModelConfig,
    args: argparse.Namespace,
    methods: dict[str, MethodConfig],
    seconds: dict[str, list[float]],
    name: str,
    *,
    causal: bool,
) -> dict[str, Any]:
    """The FLOP ratio beside the time ratio, and how far the time falls short of it (the target: at most 1.3)."""

    def count(chosen: MethodConfig) -> float:
        new = [1 + visual + args.text for visual in layer_tokens(cfg, chosen)]
        return args.batch * scheduled_flops(cfg.llm, new, causal=causal)

    times = ratio(seconds, FULL, name)
    full, short = count(methods[FULL]), count(methods[name])
    return {
        "method": name,
        "GFLOPs": short / 1e9,
        "FLOP ratio": full / short,
        "time ratio": times["median"],
        "quartile_low": times["quartile_low"],
        "quartile_high": times["quartile_high"],
        "FLOP / time": full / short / times["median"],
        "FLOP / best time": full / short / times["best"],
        "target": TARGET,
    }
