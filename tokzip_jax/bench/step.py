"""What a training step costs: with a teacher in a pass of its own, in the student's pass or with a loss of its own, and
with low-rank deltas in place of the weights."""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import layout, lora, recipe, stack, step
from tokzip_jax.bench.report import Report
from tokzip_jax.bench.timing import CLOCKS, Case, interleave, ratio, rows_of
from tokzip_jax.bench.voco import SMOLLM2_135M
from tokzip_jax.bench.weights import random_weights
from tokzip_jax.config import (
    LlmConfig,
    LoraConfig,
    LossConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    VitConfig,
)
from tokzip_jax.types import IMAGE_ID, VOCO_ID, Array, Params

TINY = LlmConfig(vocab_size=32, width=32, heads=2, kv_heads=1, head_dim=16, mlp_dim=64, max_positions=2048)
# Two passes with a gradient are measured one by one and added.
STUDENT, WHOLE, FROZEN, ONE_PASS, JOINT, LORA, LORA_ONE_PASS = (
    "no teacher",
    "no teacher, no VoCo token",
    "frozen teacher, two passes",
    "self-teacher, one pass",
    "both with a loss, one pass",
    "LoRA, no teacher",
    "LoRA, self-teacher, one pass",
)
BOTH = "both with a loss, two passes"
CHUNK = 64  # positions whose logits are there at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--batch", type=int, default=1, help="rows at once")
    parser.add_argument("--grid", type=int, default=24, help="visual tokens of a side: 24 are 576")
    parser.add_argument("--text", type=int, default=447, help="text tokens of a row, BOS among them")
    parser.add_argument("--voco", type=int, default=1, help="VoCo tokens")
    parser.add_argument("--layers", type=int, default=4, help="of the language model that is timed")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA's deltas, beside every matrix of a block")
    parser.add_argument("--remat", choices=("none", *stack.POLICIES), default="none", help="what is computed again")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run(args: argparse.Namespace) -> Report:
    """A training step with and without a teacher and low-rank deltas: FLOPs, seconds and memory."""
    cfg = model(args)
    stages, batch = stages_of(args), rows(args, cfg.llm.vocab_size)
    needed = {name: layer_flops(cfg, stage, batch) for name, stage in stages.items()}
    params = random_weights(shapes(cfg, LoraConfig(**deltas(args))))
    plain, _ = lora.split(params)
    given = {name: params if stage.lora.rank else plain for name, stage in stages.items()}
    teachers = {name: random_weights(shapes(cfg, LoraConfig())) if name == FROZEN else None for name in stages}
    arguments = {name: (given[name], teachers[name], batch) for name in stages}
    programs = {name: lowered(cfg, stage, *arguments[name]).compile() for name, stage in stages.items()}
    cases = {name: Case(functools.partial(program, *arguments[name])) for name, program in programs.items()}
    seconds = interleave(cases, runs=args.runs, clock=CLOCKS[args.clock])
    seconds[BOTH] = [sum(pair) for pair in zip(seconds[STUDENT], seconds[WHOLE], strict=True)]
    memory = {name: program.memory_analysis() for name, program in programs.items()}
    return Report(
        name="step",
        settings={
            "language model": dataclasses.asdict(cfg.llm),
            "batch": args.batch,
            "dtype": args.dtype,
            "tokens": {"visual": args.grid**2, "text": args.text, "VoCo": args.voco},
            "LoRA": deltas(args),
            "remat": args.remat,
            "attention": cfg.attention,
            "supervised": "the second half of the text",
            "clock": args.clock,
            "runs": {"measured": args.runs, "warm-up": 1},
        },
        tables={
            "FLOPs of a layer, forward and backward, by explicit products": flop_rows(args, needed),
            "seconds of loss and gradients": rows_of(seconds),
            "one pass / two passes": [
                ratio(seconds, ONE_PASS, FROZEN),
                ratio(seconds, JOINT, BOTH),
            ],
            "low-rank deltas / the weights": [
                ratio(seconds, LORA, STUDENT),
                ratio(seconds, LORA_ONE_PASS, ONE_PASS),
            ],
            "megabytes": [{"what": name, **megabytes(each)} for name, each in memory.items()],
        },
        sentences=[
            "Expected are the ratios of rows times passes: a backward pass counts as two forward ones, remat 'full' "
            "adds one to what is differentiated, weights that do not train take one from a backward pass; attention's "
            "dependence on the number of keys and the low-rank products are left out.",
            "Megabytes: weights, a frozen teacher's and the batch come in, gradients go out; the peak is all. The "
            "optimizer's state, two numbers for each weight that trains under Adam, is not part of it.",
        ],
    )


def megabytes(found: Any) -> dict[str, float]:
    """What XLA plans for a program."""
    parts = {"arguments": found.argument_size_in_bytes, "results": found.output_size_in_bytes}
    parts["temporaries"] = found.temp_size_in_bytes
    return {name: size / 1e6 for name, size in {**parts, "peak": sum(parts.values())}.items()}


def model(args: argparse.Namespace) -> ModelConfig:
    """The language model that is measured, behind a vision tower too small to matter."""
    llm = TINY if args.tiny else SMOLLM2_135M
    vit = VitConfig(image_size=2 * args.grid, patch_size=2, width=8, layers=2, heads=1, mlp_dim=8)
    llm = dataclasses.replace(llm, layers=args.layers)
    return ModelConfig(vit=vit, llm=llm, dtype=args.dtype, param_dtype=args.dtype, remat=args.remat)


def deltas(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `LoraConfig`: deltas beside every matrix of a block."""
    return {"rank": args.rank, "paths": (r"llm/layers/\d+/(attn/[qkvo]|mlp/(gate|up|down))/w",)}


def stages_of(args: argparse.Namespace) -> dict[str, StageConfig]:
    """A stage for each case."""
    plain = LossConfig(chunk=CHUNK)
    own, low_rank = dataclasses.replace(plain, kl=1.0, teacher="self"), LoraConfig(**deltas(args))
    voco = MethodConfig(voco=args.voco, voco_mask="voco")
    stage = StageConfig(train=("llm/.*", "projector/.*"), method=voco, loss=plain, optim=OptimConfig(clip_norm=0.0))
    stages = {
        STUDENT: stage,
        WHOLE: dataclasses.replace(stage, method=MethodConfig()),
        FROZEN: dataclasses.replace(stage, loss=dataclasses.replace(plain, kl=1.0)),
        ONE_PASS: dataclasses.replace(stage, loss=own),
        JOINT: dataclasses.replace(stage, loss=dataclasses.replace(own, teacher_ce=1.0)),
        LORA: stage,
        LORA_ONE_PASS: dataclasses.replace(stage, loss=own),
    }
    for name in (LORA, LORA_ONE_PASS):
        stages[name] = dataclasses.replace(stages[name], train=("lora/.*",), lora=low_rank)
    return stages


def rows(args: argparse.Namespace, vocabulary: int) -> dict[str, Array]:
    """Rows of BOS, a picture, its VoCo tokens and text, of which the second half is supervised."""
    rng = np.random.default_rng(0)
    length, size = args.text + 2, 2 * args.grid
    ids = rng.integers(4, vocabulary, (args.batch, length), np.int32)
    ids[:, :3] = (1, IMAGE_ID, VOCO_ID)
    return {
        "images": jnp.asarray(rng.integers(0, 256, (args.batch, 1, size, size, 3), np.uint8)),
        "ids": jnp.asarray(ids),
        "thread": jnp.zeros((args.batch, length), jnp.int32),
        "sample": jnp.ones((args.batch, length), jnp.int32),
        "supervised": jnp.broadcast_to(jnp.arange(length) >= length - args.text // 2, (args.batch, length)),
    }


def shapes(cfg: ModelConfig, low_rank: LoraConfig) -> Params:
    """The parameters' shapes, those of low-rank deltas among them where there are any."""
    make = functools.partial(recipe.initial, cfg, "mlp2x_gelu", low_rank)
    return jax.eval_shape(make, jax.random.key(0))


def lowered(cfg: ModelConfig, stage: StageConfig, params: Any, teacher: Any, batch: dict[str, Array]) -> Any:
    """Loss and gradients of a stage, traced over (parameters, a frozen teacher's or None, batch)."""
    count, targets = jnp.int32(stage.method.voco), (batch["ids"].shape[1] - 2) // 2

    @jax.jit
    def program(params: Params, teacher: Params | None, batch: dict[str, Array]) -> Any:
        options = {"voco_count": count, "key": jax.random.key(0), "max_targets": targets}
        return step.gradients(cfg, stage, params, batch, teacher=teacher, **options)

    return program.lower(params, teacher, batch)


def layer_flops(cfg: ModelConfig, stage: StageConfig, batch: dict[str, Array]) -> float:
    """What one layer adds, by XLA's count of the program before it is compiled (whose products may have no count).

    The body of a loop counts once, so the layers are put in loops of one, two of them minus one, and attention is that
    of explicit products: blocks are gone through in a loop of unknown length.
    """
    cfg = dataclasses.replace(cfg, attention="einsum")
    frozen = stage.loss.kl > 0 and stage.loss.teacher == "frozen"

    def count(layers: int) -> float:
        deep = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=layers))
        params = shapes(deep, stage.lora)
        split = functools.partial(stack.split, cuts=range(1, layers))
        for part in (params, *filter(None, [params.get("lora")])):
            part["llm"]["layers"] = jax.eval_shape(split, part["llm"]["layers"]["0"])
        teacher = lora.split(params)[0] if frozen else None
        return lowered(deep, stage, params, teacher, batch).cost_analysis()["flops"]

    return count(2) - count(1)


def flop_rows(args: argparse.Namespace, needed: dict[str, float]) -> list[dict[str, Any]]:
    """XLA's counts, and beside their ratios those that follow from the number of rows alone."""
    once, often = 1, 4 if args.remat == "full" else 3
    text, whole = args.text + 2, layout.slots(args.text + 2, images=1, visual=args.grid**2, voco=0)
    student = layout.slots(args.text + 2, images=1, visual=args.grid**2, voco=args.voco)
    expected = {
        STUDENT: often * student,
        WHOLE: often * whole,
        FROZEN: often * student + once * whole,
        ONE_PASS: often * student + once * text,
        JOINT: often * (student + text),
        # No gradient of the weights: a backward pass counts as one forward pass.
        LORA: (often - 1) * student,
        LORA_ONE_PASS: (often - 1) * student + once * text,
    }
    counts = {name: (needed[name], float(expected[name])) for name in needed}
    counts[BOTH] = tuple(sum(pair) for pair in zip(counts[STUDENT], counts[WHOLE], strict=True))
    against = {ONE_PASS: FROZEN, JOINT: BOTH}
    return [
        {
            "what": name,
            "FLOPs": flops,
            "over no teacher": flops / needed[STUDENT],
            "expected": rows / expected[STUDENT],
            "saved by one pass": 1 - flops / counts[against.get(name, name)][0],
            "expected to be saved": 1 - rows / counts[against.get(name, name)][1],
        }
        for name, (flops, rows) in counts.items()
    ]
