"""Attention over rows with pictures: explicit products, JAX's own and blocks, under each mask, also with gradients."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokzip_jax import blocks, layout, masks
from tokzip_jax.attention import attend
from tokzip_jax.bench.report import Report
from tokzip_jax.bench.timing import CLOCKS, Case, interleave, ratio, rows_of
from tokzip_jax.types import IMAGE_ID, VOCO_ID, Array

IMPLEMENTATIONS = ("einsum", "xla", "blocks")
TABLES = ("visible", "voco")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--batch", type=int, default=8, help="rows at once")
    parser.add_argument("--pictures", type=int, default=1, help="of a row")
    parser.add_argument("--visual", type=int, default=64, help="visual tokens of a picture")
    parser.add_argument("--voco", type=int, default=1, help="VoCo tokens of a picture")
    parser.add_argument("--text", type=int, default=100, help="text tokens of a row")
    parser.add_argument("--question", type=int, default=15, help="of them, those of one question and its answer")
    parser.add_argument("--heads", type=int, default=6, help="of queries, keys and values")
    parser.add_argument("--head-dim", type=int, default=16, help="width of a head")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run(args: argparse.Namespace) -> Report:
    """Attention over rows with pictures, by each implementation."""
    if args.tiny:
        args.batch, args.visual, args.text, args.heads, args.head_dim = 1, 16, 16, 1, 4
    found = {table: mask(args, table) for table in TABLES}
    length = found["voco"].shape[1]
    shape = (args.batch, args.heads, length, args.head_dim)
    heads = [jax.random.normal(jax.random.key(number), shape, args.dtype) for number in range(3)]
    cases = {
        f"{what}, {table}, {name}": Case(functools.partial(program(name, what == "gradient"), seen, *heads))
        for what in ("forward", "gradient")
        for table, seen in found.items()
        for name in IMPLEMENTATIONS
    }
    seconds = interleave(cases, runs=args.runs, clock=CLOCKS[args.clock])
    others = [name for name in cases if not name.endswith("blocks")]
    return Report(
        name="attention",
        settings={
            "rows": shape,
            "dtype": args.dtype,
            "pictures": {"of a row": args.pictures, "visual tokens": args.visual, "VoCo tokens": args.voco},
            "text": {"tokens": args.text, "of a question": args.question},
            "clock": args.clock,
            "runs": {"measured": args.runs, "warm-up": 1},
        },
        tables={
            "what there is to see": [share(table, seen) for table, seen in found.items()],
            "seconds": rows_of(seconds),
            "other / blocks": [ratio(seconds, name, f"{name.rpartition(' ')[0]} blocks") for name in others],
        },
    )


def mask(args: argparse.Namespace, table: str) -> Array:
    """[B, T, T] of rows of BOS, pictures with their VoCo tokens, and questions that do not see one another."""
    ids = jnp.array([1, *[IMAGE_ID, VOCO_ID] * args.pictures, *[4] * args.text])
    start = len(ids) - args.text
    thread = jnp.where(jnp.arange(len(ids)) < start, 0, 1 + (jnp.arange(len(ids)) - start) // args.question)
    batch = {"ids": ids, "thread": thread, "sample": jnp.ones_like(ids), "supervised": jnp.zeros_like(ids, bool)}
    batch = {name: jnp.broadcast_to(values, (args.batch, len(ids))) for name, values in batch.items()}
    valid = jnp.ones((args.batch, args.pictures, args.visual), bool)
    stream = layout.expand(batch, valid, voco=args.voco, voco_count=args.voco).stream
    return masks.visibility(stream, stream, masks.TABLES[table])


def program(implementation: str, gradient: bool) -> Callable[..., Any]:
    """(mask, q, k, v) -> the mixed heads, or the gradients of the sum of their squares."""

    def mix(seen: Array, *heads: Array) -> Array:
        return attend(*heads, mask=seen, implementation=implementation)

    def total(seen: Array, *heads: Array) -> Array:
        return jnp.sum(mix(seen, *heads).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(total, argnums=(1, 2, 3)) if gradient else mix)


def share(table: str, seen: Array) -> dict[str, Any]:
    """What part of all pairs is seen, and what part of all blocks is computed."""
    size = blocks.side(seen.shape[1], blocks.BLOCK)
    padding = -seen.shape[1] % size
    rows, _, count = blocks.blocks(jnp.pad(seen, ((0, 0), (0, padding), (0, padding))), size, size)
    return {
        "mask": table,
        "side of a block": size,
        "pairs seen": float(jnp.mean(seen)),
        "blocks computed": int(count) / rows.size,
    }
