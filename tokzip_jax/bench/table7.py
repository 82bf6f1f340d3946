"""VoCo-LLaMA's table 7 at 7B, on paper: no weights are made."""

import argparse
import dataclasses
import math

import jax

from tokzip_jax import flops, llm
from tokzip_jax.bench.report import Report
from tokzip_jax.config import LlmConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--text", type=int, default=64, help="text tokens of the question")


def run(args: argparse.Namespace) -> Report:
    """Cache bytes and FLOPs of the table's three settings, ours beside the printed ones."""
    cfg = LlmConfig()
    per_token = flops.kv_bytes_per_token(cfg, "bfloat16")
    rows, needed = [], []
    for setting in flops.VOCO_TABLE_7:
        length = setting.text_tokens(cfg)
        needed.append("none" if length is None else f"{length:.0f}")
        rows.append(
            {
                "in the cache": setting.name,
                "cache MB": setting.past * per_token / 1e6,
                f"TFLOPs at {args.text} text tokens": setting.flops(cfg, args.text) / 1e12,
                "printed TFLOPs": setting.printed / 1e12,
                "text tokens that would give them": needed[-1],
            }
        )
    shapes = jax.eval_shape(lambda key: llm.init(cfg, key), jax.random.key(0))
    return Report(
        name="table7",
        settings={
            "language model": dataclasses.asdict(cfg),
            "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
            "cache dtype": "bfloat16",
            "cache bytes of one VoCo token": per_token,
            "text tokens": args.text,
        },
        tables={"table 7 of arXiv 2406.12275": rows},
        sentences=[f"No single text length gives all three printed figures: they would need {', '.join(needed)}."],
    )
