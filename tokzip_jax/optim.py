"""AdamW or Muon with linear warm-up, cosine decay, clipping and freezing by parameter path.

Accumulation is not here: `step.gradients` sums the parts of a batch, weighted by their supervised tokens, which a mean
over micro-batches (`optax.MultiSteps`) would get wrong.
"""

import re
from collections.abc import Sequence
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers as Axes
from optax.contrib import muon

from tokzip_jax.config import OptimConfig
from tokzip_jax.paths import first_match, flatten, map_with_path

# Whether AdamW decays a parameter: matrices yes; norms, biases, scalars, embeddings with a
# meaning of their own and the contrastive head no.
DECAY: tuple[tuple[str, bool], ...] = (
    (r"lora/.*", True),  # both factors are matrices
    (r"(.*/)?(pre_|post_)?norm\d?/(scale|bias)", False),
    (r".*/b", False),
    (r"vit/(cls|pos)", False),
    (r"voco/table|image_newline", False),
    (r"projector/[^/]+/(query|words|positions)/table", False),
    (r"projector/[^/]+/(peg|block\d/depthwise)/kernel", True),
    (r"contrast/.*", False),
    (r"vit/patch/kernel", True),
    (r"llm/embed/table", True),
    (r".*/w", True),
)

# The axes (inputs, outputs) of the matrices that Muon turns; what is left of their axes is a stack of matrices. All
# other parameters get AdamW, as its author advises for embeddings, heads and vectors.
_STACK = r"(vit|llm|projector/[^/]+)/layers/\d+/(\d+/)?"
MUON: tuple[tuple[str, Axes | None], ...] = (
    (_STACK + r"(attn|cross)/[qkv]/w", Axes(1, (2, 3))),
    (_STACK + r"(attn|cross)/o/w", Axes((1, 2), 3)),
    (_STACK + r"(text_)?mlp/(up|gate|down)/w", Axes(1, 2)),
    (r"voco/cells/w", Axes(1, 2)),
    (r"projector/[^/]+/attn/[qkv]/w", Axes(0, (1, 2))),
    (r"projector/[^/]+/attn/o/w", Axes((0, 1), 2)),
    (r"projector/.*/w", Axes(0, 1)),
    (r".*", None),
)
MOMENTUM = 0.95  # Muon's
RMS = 0.2  # of Muon's updates, about that of AdamW's: one learning rate and weight decay serve both (arXiv 2502.16982)


def make_schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of optimiser step n (from 0): linear from 0 to the peak, then half a cosine.

    The cosine ends at `final_fraction` of the peak at step `steps`; later steps stay there.
    """
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    parts, borders = [], []
    if warmup:
        parts.append(optax.linear_schedule(0.0, peak, warmup))
        borders.append(warmup)
    if steps > warmup:
        parts.append(optax.cosine_decay_schedule(peak, steps - warmup, alpha=cfg.final_fraction))
    return optax.join_schedules(parts, borders[: len(parts) - 1])


def trained(params: Any, patterns: Sequence[str]) -> Any:
    """A tree of bools: which parameters train, i.e. have a path that one of the patterns matches whole.

    Args:
        params: parameters or their `ShapeDtypeStruct`s.
        patterns: regular expressions over slash paths, e.g. ("projector/.*", "voco/.*").

    Raises:
        ValueError: a pattern that matches no parameter, which would silently train less than asked for.
    """
    paths = list(flatten(params))
    for pattern in patterns:
        if not any(_matches((pattern,), path) for path in paths):
            roots = sorted({path.split("/")[0] for path in paths})
            raise ValueError(
                f"train pattern {pattern!r} matches no parameter; a pattern has to match a whole path "
                f"such as {paths[-1]!r}, and paths begin with {', '.join(roots)}"
            )
    return map_with_path(lambda path, _: _matches(patterns, path), params)


def make_optimizer(
    cfg: OptimConfig, rate: Any, params: Any, train_patterns: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of one stage.

    Only trained parameters count in the clipped norm and get Adam moments; the updates of frozen ones are zero. The
    transformation takes the whole tree or any part of it (such as the trained parameters alone).

    Args:
        cfg: the stage's `optim`; `clip_norm` 0 = no clipping.
        rate: learning rate of this step, a number or a traced scalar: nothing of the state depends on it, so that one
            program serves every schedule.
        params: all parameters or their `ShapeDtypeStruct`s, for their paths.
        train_patterns: the stage's `train`.

    Raises:
        ValueError: a train pattern without a parameter, or a parameter that `DECAY` does not cover.
    """
    trained(params, train_patterns)
    _decayed(params)  # every path is covered, also the frozen ones
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    method = _muon(cfg, rate) if cfg.method == "muon" else _adamw(cfg, rate)

    def labels(tree: Any) -> Any:
        return map_with_path(lambda path, _: "train" if _matches(train_patterns, path) else "freeze", tree)

    return optax.partition({"train": optax.chain(clip, method), "freeze": optax.set_to_zero()}, labels)


def _adamw(cfg: OptimConfig, rate: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=_decayed)


def _muon(cfg: OptimConfig, rate: Any) -> optax.GradientTransformation:
    turned = muon(
        rate,
        beta=MOMENTUM,
        weight_decay=cfg.weight_decay,
        consistent_rms=RMS,
        muon_weight_dimension_numbers=lambda tree: map_with_path(lambda path, _: matrix_axes(path), tree),
    )
    # Optax's own way for the rest takes no decay mask, so what is no matrix does not come to it.
    groups = {"muon": turned, "adamw": _adamw(cfg, rate)}
    return optax.partition(groups, lambda tree: map_with_path(lambda path, _: _group(path), tree))


def matrix_axes(path: str) -> Axes | None:
    """Which axes of a parameter are the inputs and outputs of a matrix for Muon; None: AdamW trains it."""
    return first_match(MUON, path, name="Muon")


def _group(path: str) -> str:
    return "adamw" if matrix_axes(path) is None else "muon"


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _decayed(params: Any) -> Any:
    return map_with_path(lambda path, _: first_match(DECAY, path, name="weight-decay"), params)
