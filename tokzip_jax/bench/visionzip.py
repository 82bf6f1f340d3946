"""What VisionZip costs beside the vision tower that it follows: time and temporaries."""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tokzip_jax import compress, vit
from tokzip_jax.bench.report import Report
from tokzip_jax.bench.timing import CLOCKS, Case, interleave, ratio, rows_of
from tokzip_jax.bench.weights import random_weights
from tokzip_jax.config import ModelConfig, VitConfig
from tokzip_jax.types import VisionFeatures, VisualTokens

TINY = VitConfig(image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp_dim=32)
TARGET = 0.01  # compress alone over encoder alone
SENTENCE = (
    "For comparison: the official PyTorch encoder with VisionZip takes about 1.28 times as long as the same encoder "
    "with fused attention, because its attention returns all weights of all blocks."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--tokens", type=int, default=64, help="visual tokens kept")
    parser.add_argument("--contextual", type=int, default=10, help="merged ones among them")
    parser.add_argument("--repeats", type=int, default=20, help="compressions that make one measurement")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run(args: argparse.Namespace) -> Report:
    """Encoder alone, VisionZip alone on its features, and both as one program."""
    shape = TINY if args.tiny else VitConfig()
    cfg = ModelConfig(vit=shape, dtype=args.dtype, param_dtype=args.dtype)
    options = compress.options("visionzip", {"contextual": args.contextual})
    compress.check("visionzip", vit.tower(shape), args.tokens, options)
    entry, ask = compress.ENCODER["visionzip"], compress.Ask(args.tokens, options, vit.tower(shape))

    def encode(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, _ = vit.features(cfg, params, pixels)
        return found.patches_BPD, found.cls_BD

    def squeeze(found: VisionFeatures) -> VisualTokens:
        return entry.function(found, ask)

    def both(params: Any, pixels: jax.Array) -> VisualTokens:
        return squeeze(vit.features(cfg, params, pixels, signals=entry.signals)[0])

    params = random_weights(jax.eval_shape(lambda key: vit.init(shape, key, cfg.param_dtype), jax.random.key(0)))
    side = (args.batch, shape.image_size, shape.image_size, 3)
    pixels = jax.random.normal(jax.random.key(1), side, jnp.dtype(cfg.dtype))
    programs = {
        "encoder": jax.jit(encode).lower(params, pixels).compile(),
        "encoder + VisionZip": jax.jit(both).lower(params, pixels).compile(),
    }
    found = jax.jit(lambda p, x: vit.features(cfg, p, x, signals=entry.signals)[0])(params, pixels)
    alone = jax.jit(squeeze)
    seconds = interleave(
        {
            "encoder": Case(lambda: programs["encoder"](params, pixels)),
            "encoder + VisionZip": Case(lambda: programs["encoder + VisionZip"](params, pixels)),
            "VisionZip": Case(lambda: alone(found), args.repeats),
        },
        runs=args.runs,
        clock=CLOCKS[args.clock],
    )
    return Report(
        name="visionzip",
        settings={
            "vision tower": dataclasses.asdict(shape),
            "blocks run": shape.feature_blocks,
            "batch": args.batch,
            "dtype": args.dtype,
            "patches": shape.patches,
            "tokens kept": {"all": args.tokens, "merged": args.contextual},
            "clock": args.clock,
            "runs": {"measured": args.runs, "of VisionZip alone": args.runs * args.repeats, "warm-up": 1},
        },
        tables={
            "seconds": rows_of(seconds),
            f"ratios (target of the first: at most {TARGET})": [
                ratio(seconds, "VisionZip", "encoder"),
                ratio(seconds, "encoder + VisionZip", "encoder"),
            ],
            "bytes": memory(programs, found, args.tokens),
        },
        sentences=[SENTENCE],
    )


def memory(programs: dict[str, Any], found: VisionFeatures, tokens: int) -> list[dict[str, Any]]:
    """Temporaries and results of both programs, and beside their difference what VisionZip has to hold.

    The features are the encoder's result, but a temporary of the compressed program; so results are counted too.
    """
    rows = []
    for name, program in programs.items():
        found_bytes = program.memory_analysis()
        temporary, result = found_bytes.temp_size_in_bytes, found_bytes.output_size_in_bytes
        rows.append({"what": name, "temporaries": temporary, "results": result, "together": temporary + result})
    more = {key: rows[1][key] - rows[0][key] for key in ("temporaries", "results", "together")}
    rows.append({"what": "difference", **more})
    scores = sum(signal.nbytes for signal in found.signals.values())
    gathered = found.patches_BPD.nbytes // found.patches_BPD.shape[1] * tokens
    rows.append({"what": "score rows + kept tokens", "temporaries": scores, "results": gathered})
    rows[-1]["together"] = scores + gathered
    return rows
