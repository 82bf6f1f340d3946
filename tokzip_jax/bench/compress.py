"""What every encoder-site method costs beside the vision tower that it follows: milliseconds, share and memory.

Measured are the functions of `tokzip_jax.compress` alone, on arrays of the shapes that a tower hands over. What a tower
spends on handing over a row of scores or keys is in `bench visionzip`. ToMe and FOLDER are the forms that work on a
tower's output; inside a tower they make it cheaper. What is compared is what a config compares where it says nothing:
DivPrune, HoloV and CDPruner look at projected patches, which are wider. Projecting all patches, where only those that
are kept would have been projected, is not in the time.
"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokzip_jax import compress, vit
from tokzip_jax.bench.report import Report
from tokzip_jax.bench.timing import CLOCKS, Case, interleave, ratio, spread
from tokzip_jax.bench.weights import random_weights
from tokzip_jax.compress.prumerge import giant_attention
from tokzip_jax.config import ModelConfig, VitConfig
from tokzip_jax.types import Array, VisualTokens

TINY = VitConfig(image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp_dim=32)
TARGETS = {"one-shot": 0.01, "greedy": 0.05}  # of the encoder's time, on a CPU
TOKENS, TINY_TOKENS = (192, 128, 64), (8, 4)
PROJECTED, TINY_PROJECTED = 4096, 24  # width of a 7B language model
QUESTION = 32  # tokens, for the methods that read one
# What leaves a compiled program for the host on its way: a callback, or a transfer by name.
TO_HOST = re.compile(r'custom_call_target="[^"]*callback[^"]*"|\b(?:infeed|outfeed|send|recv)\(')


class Inputs(NamedTuple):
    """Arrays as a tower of P patches, width D and head width H gives them, and patches behind a projector, of width L;
    merged ones of 4 P smaller patches."""

    patches_BPD: Array
    projected_BPL: Array
    cls_BD: Array
    cls_attention_BP: Array
    keys_BSH: Array
    last_queries_BSD: Array
    last_keys_BSD: Array
    relevance_BP: Array
    text_similarity_BTP: Array
    small_score_BQ: Array
    small_keys_BQH: Array
    key: Array


class Method(NamedTuple):
    """An entry of `METHODS`.

    Attributes:
        function: (inputs x, tokens n) -> `VisualTokens` with n slots.
        kind: "one-shot", or "greedy" for one that chooses in a loop of rounds, each of which waits for the one before.
    """

    function: Callable[[Inputs, int], VisualTokens]
    kind: str = "one-shot"


def _parts(tokens: int) -> dict[str, int]:
    """VisionZip's published split: 54 + 10, 108 + 20, 162 + 30."""
    contextual = 5 * tokens // 32
    return {"dominant": tokens - contextual, "contextual": contextual}


def _prumerge(function: Callable[..., VisualTokens], x: Inputs, n: int) -> VisualTokens:
    attention_BP = giant_attention(x.last_queries_BSD, x.last_keys_BSD)
    neighbours = min(32, x.patches_BPD.shape[1] - 1)
    return function(x.patches_BPD, attention_BP, x.last_keys_BSD, tokens=n, neighbours=neighbours)


METHODS = {
    "visionzip": Method(
        lambda x, n: compress.visionzip(x.patches_BPD, x.cls_BD, x.cls_attention_BP, x.keys_BSH, **_parts(n))
    ),
    "visionzip_merged": Method(
        lambda x, n: compress.visionzip_merged(x.patches_BPD, x.small_score_BQ, x.small_keys_BQH, **_parts(n))
    ),
    "prumerge": Method(functools.partial(_prumerge, compress.prumerge)),
    "prumerge_plus": Method(functools.partial(_prumerge, compress.prumerge_plus)),
    "folder": Method(lambda x, n: compress.folder(x.patches_BPD, tokens=n)),
    "tome_features": Method(lambda x, n: compress.tome(x.patches_BPD, x.keys_BSH[:, 1:], tokens=n)),
    "vispruner": Method(lambda x, n: compress.vispruner(x.patches_BPD, x.cls_attention_BP, tokens=n), "greedy"),
    "cls_attention": Method(lambda x, n: compress.cls_attention(x.patches_BPD, x.cls_attention_BP, tokens=n)),
    "holov": Method(
        lambda x, n: compress.holov(
            x.patches_BPD,
            x.cls_attention_BP,
            tokens=n,
            crops=min(16, x.patches_BPD.shape[1]),
            features_BPH=x.projected_BPL,
        )
    ),
    "dart": Method(lambda x, n: compress.dart(x.patches_BPD, x.last_keys_BSD[:, 1:], tokens=n, pivots=min(4, n))),
    "divprune": Method(lambda x, n: compress.divprune(x.patches_BPD, tokens=n, features_BPH=x.projected_BPL), "greedy"),
    "scope": Method(lambda x, n: compress.scope(x.patches_BPD, x.cls_attention_BP, tokens=n), "greedy"),
    "cdpruner": Method(
        lambda x, n: compress.cdpruner(x.patches_BPD, x.relevance_BP, tokens=n, features_BPH=x.projected_BPL), "greedy"
    ),
    "mmtok": Method(lambda x, n: compress.mmtok(x.patches_BPD, x.text_similarity_BTP, tokens=n), "greedy"),
    "random": Method(lambda x, n: compress.random(x.patches_BPD, tokens=n, key=x.key)),
    "uniform": Method(lambda x, n: compress.uniform(x.patches_BPD, tokens=n)),
    "uniform + restore": Method(
        lambda x, n: compress.restore(compress.uniform(x.patches_BPD, tokens=n // 2), x.patches_BPD, tokens=n)
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which ones")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"tokens kept (None: {TOKENS}; tiny {TINY_TOKENS})")
    parser.add_argument(
        "--batch", nargs="+", type=int, help="pictures at once (None: 1 and 16 on a CPU, 1 and 64 elsewhere; tiny 1)"
    )
    parser.add_argument(
        "--projected",
        type=int,
        help=f"width of projected patches, which some methods compare (None: {PROJECTED}; tiny {TINY_PROJECTED})",
    )
    parser.add_argument("--layers", type=int, default=0, help="blocks of the tower; 0 = the shape's own")
    parser.add_argument("--repeats", type=int, default=5, help="compressions that make one measurement")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run(args: argparse.Namespace) -> Report:
    """Every encoder-site method beside the encoder: milliseconds, share, bytes."""
    shape = TINY if args.tiny else VitConfig()
    shape = dataclasses.replace(shape, layers=args.layers or shape.layers)
    cfg = ModelConfig(vit=shape, dtype=args.dtype, param_dtype=args.dtype)
    on_cpu = jax.default_backend() == "cpu"
    batches = args.batch or ([1] if args.tiny else [1, 16 if on_cpu else 64])
    tokens = args.tokens or (TINY_TOKENS if args.tiny else TOKENS)
    projected = args.projected or (TINY_PROJECTED if args.tiny else PROJECTED)
    params = random_weights(jax.eval_shape(lambda key: vit.init(shape, key, cfg.param_dtype), jax.random.key(0)))
    tables = {}
    for batch in batches:
        tables |= measure(cfg, params, args, inputs(cfg, batch, projected), tokens, targets=on_cpu)
    return Report(
        name="compress",
        settings={
            "vision tower": dataclasses.asdict(shape),
            "blocks run": shape.feature_blocks,
            "patches": shape.patches,
            "width of projected patches": projected,
            "dtype": args.dtype,
            "tokens of a question": QUESTION,
            "targets on a CPU": TARGETS,
            "clock": args.clock,
            "runs": {"measured": args.runs, "calls of a method in each": args.repeats, "warm-up": 1},
        },
        tables=tables,
        sentences=["Shares are of the encoder's time in the same round; target is what the share should not exceed."],
    )


def measure(
    cfg: ModelConfig, params: Any, args: argparse.Namespace, found: Inputs, tokens: list[int], *, targets: bool
) -> dict[str, list[dict[str, Any]]]:
    """Two tables: the encoder for as many pictures, timed once a round, and all methods, timed in turn with it."""
    batch = len(found.patches_BPD)
    side = (batch, cfg.vit.image_size, cfg.vit.image_size, 3)
    pixels = jax.random.normal(jax.random.key(1), side, jnp.dtype(cfg.dtype))

    def encode(params: Any, pixels: Array) -> tuple[Array, Array]:
        features, _ = vit.features(cfg, params, pixels)
        return features.patches_BPD, features.cls_BD

    # Everything is traced before anything is compiled: a budget that cannot be is refused at once.
    traced = {
        (name, count): jax.jit(METHODS[name].function, static_argnums=1).lower(found, count)
        for name in args.methods
        for count in tokens
    }
    encoder = jax.jit(encode).lower(params, pixels).compile()
    programs = {case: lowered.compile() for case, lowered in traced.items()}
    cases = {"encoder": Case(functools.partial(encoder, params, pixels))}
    for case, program in programs.items():
        cases[case] = Case(functools.partial(program, found), args.repeats)
    seconds = interleave(cases, runs=args.runs, clock=CLOCKS[args.clock])
    rows = []
    for (name, count), program in programs.items():
        kind = METHODS[name].kind
        share = ratio(seconds, (name, count), "encoder")
        rows.append(
            {
                "method": name,
                "kind": kind,
                "tokens": count,
                **_milliseconds(seconds[name, count]),
                "share": share["median"],
                "share of best": share["best"],
                **({"target": TARGETS[kind]} if targets else {}),
                **_bytes(program),
                "host calls": len(TO_HOST.findall(program.as_text())),
            }
        )
    return {
        f"encoder, batch {batch}": [{"what": "encoder", **_milliseconds(seconds["encoder"]), **_bytes(encoder)}],
        f"methods, batch {batch}": rows,
    }


def inputs(cfg: ModelConfig, batch: int, projected: int = PROJECTED) -> Inputs:
    """Random arrays of the shapes that the tower of `cfg`, and a projector to that width, give for `batch` pictures."""
    patches, width, head = cfg.vit.patches, cfg.vit.width, cfg.vit.width // cfg.vit.heads
    keys = iter(jax.random.split(jax.random.key(2), len(Inputs._fields)))

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), (batch, *shape), jnp.dtype(cfg.dtype))

    def scores(length: int) -> Array:
        return jax.nn.softmax(jax.random.normal(next(keys), (batch, length)), axis=1)

    return Inputs(
        patches_BPD=normal(patches, width),
        projected_BPL=normal(patches, projected),
        cls_BD=normal(width),
        cls_attention_BP=scores(patches),
        keys_BSH=normal(1 + patches, head),
        last_queries_BSD=normal(1 + patches, width),
        last_keys_BSD=normal(1 + patches, width),
        relevance_BP=scores(patches),
        text_similarity_BTP=jnp.tanh(normal(QUESTION, patches)).astype(jnp.float32),
        small_score_BQ=scores(4 * patches),
        small_keys_BQH=normal(4 * patches, head),
        key=next(keys),
    )


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    named = spread([1e3 * value for value in seconds])
    return {"ms" if name == "median" else f"ms {name.replace('_', ' ')}": value for name, value in named.items()}


def _bytes(program: Any) -> dict[str, int]:
    """What a program holds beside its arguments: temporaries at their peak, and results."""
    found = program.memory_analysis()
    return {"extra bytes": found.temp_size_in_bytes, "result bytes": found.output_size_in_bytes}
