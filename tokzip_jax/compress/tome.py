"""ToMe (arXiv 2210.09461, ICLR 2023): merge a few similar tokens in every block, between attention and MLP.

What is similar is measured on the block's keys (mean over heads); a merged token is the average of its members, and
later blocks may count it as often in their attention as it has members ("proportional attention", section 3: the log
of the size is added to the key's logits).

    in a tower      `between(removals(...))` for `vit.features`, or `merge_step` in somebody else's block.
    on an output    `tome`: the same merging on finished features, step by step down to a budget.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress import bipartite
from tokzip_jax.compress.bipartite import Between, Merged
from tokzip_jax.compress.entry import Ask, Encoder, NoOptions, Plan, Tower, option
from tokzip_jax.compress.greedy import check_shape
from tokzip_jax.compress.select import everything
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def check_budget(patches: int, tokens: int) -> None:
    """Refuse a number of tokens that `patches` patches cannot be merged to.

    Raises:
        ValueError: names the number and its range.
    """
    if not 1 <= tokens <= patches:
        raise ValueError(f"ToMe: {tokens} tokens asked of {patches} patches; it must be 1 .. {patches}")


def removals(patches: int, tokens: int, blocks: int, *, inflect: float = 0.0) -> tuple[int, ...]:
    """How many tokens each block has to remove so that `tokens` of `patches` are left behind the last one.

    Args:
        patches: P of a tower with a CLS token, which is never merged.
        tokens: patches left, 1 .. P.
        blocks: how many blocks share the work, 1 or more.
        inflect: 0 removes equally many in each (the paper's default), -1 falls in a line to nothing in the last block
            (its decreasing schedule, faster), 1 rises in a line from nothing.

    Raises:
        ValueError: an argument out of range, or a block that would have to merge more than half of what it sees.
    """
    check_budget(patches, tokens)
    if blocks < 1:
        raise ValueError(f"ToMe: blocks = {blocks} must be at least 1")
    if not -1.0 <= inflect <= 1.0:
        raise ValueError(f"ToMe: inflect = {inflect} must be -1 .. 1")
    share = 1.0 + inflect * np.linspace(-1.0, 1.0, blocks) if blocks > 1 else np.ones(1)
    # Rounding the running total keeps the sum exact.
    total = np.rint((patches - tokens) * np.cumsum(share) / np.sum(share)).astype(int)
    counts = tuple(int(count) for count in np.diff(total, prepend=0))
    left = 1 + patches
    for block, count in enumerate(counts):
        limit = bipartite.most(left, protected=True)
        if count > limit:
            raise ValueError(
                f"ToMe: {tokens} of {patches} patches after {blocks} blocks would remove {count} of {left} tokens in "
                f"block {block}, but a block can merge at most {limit}; use more blocks or more tokens"
            )
        left -= count
    return counts


def merge_step(
    tokens: Merged, keys_BTH: Array, cls_attention_BT: Array | None = None, *, removed: int, cls: bool = True
) -> Merged:
    """ToMe's step inside a block, on the residual stream behind its attention.

    Args:
        tokens: T tokens (`bipartite.begin` for the first block).
        keys_BTH: [B, T, H] this block's keys, mean over heads.
        cls_attention_BT: not read; every function between attention and MLP is given it.
        removed: how many of the T leave, 0 .. (T - cls) // 2.
        cls: the first token is a CLS token, which stays.

    Returns:
        T - removed tokens: first the even ones that stay (by place; without a CLS token by similarity, as released),
        then the odd ones.

    Raises:
        ValueError: too many removed.
    """
    order = "index" if cls else "score"
    return bipartite.merge(tokens, bipartite.pair(keys_BTH, removed, protected=cls, order=order))


def between(counts: Sequence[int]) -> dict[int, Between]:
    """Block number -> what merges there, for `vit.features`; `counts` as of `removals`."""
    return {block: functools.partial(merge_step, removed=count) for block, count in enumerate(counts) if count}


def merged(tokens_BMD: Array, position_BM: Array, size_BM: Array, source_BP: Array) -> VisualTokens:
    """`VisualTokens` of a tower that merged on its way; the arrays are `patches_BPD` and signals of `vit.features`."""
    return VisualTokens(tokens_BMD, jnp.ones(position_BM.shape, bool), position_BM, size_BM, source_BP)


@functools.partial(jax.jit, static_argnames="tokens")
def tome(patches_BPD: Array, metric_BPH: Array, *, tokens: int, valid_BP: Array | None = None) -> VisualTokens:
    """Merge finished features to `tokens`, in steps of at most a half.

    Not in the paper, which merges in every block with that block's keys; for towers that cannot be opened. Between two
    steps the metric is averaged as the features are.

    Args:
        patches_BPD: [B, P, D] features, no CLS token.
        metric_BPH: [B, P, H] what similarity is measured on, such as keys.
        tokens: 1 .. P.
        valid_BP: [B, P] bool, see `greedy`: even and odd are places among the valid patches, and each picture takes the
            steps that its own number of them needs; None: all.

    Returns:
        `VisualTokens` with M = tokens in ToMe's own order (not raster, but where nothing had to merge); a token stands
        at the place of the patch that the others were merged into. Sizes sum to P, or the number of valid patches.

    Raises:
        ValueError: budget out of range, or shapes that do not fit.
    """
    check_budget(patches_BPD.shape[1], tokens)
    if metric_BPH.shape[:2] != patches_BPD.shape[:2]:
        raise ValueError(f"ToMe: metric of shape {metric_BPH.shape} does not fit patches {patches_BPD.shape}")
    if valid_BP is not None:
        check_shape("ToMe", "valid", valid_BP.shape, patches_BPD.shape[:2])
        result = bipartite.reduce_valid(
            patches_BPD, metric_BPH, valid_BP, tokens, spare=False, protected=False, order="score"
        )
        return dataclasses.replace(result, tokens_BMD=result.tokens_BMD.astype(patches_BPD.dtype))
    state, metric = bipartite.begin(patches_BPD.astype(jnp.float32)), metric_BPH
    while state.x_BTD.shape[1] > tokens:
        length = state.x_BTD.shape[1]
        pairs = bipartite.pair(metric, min(bipartite.most(length, protected=False), length - tokens), order="score")
        metric = bipartite.mean(pairs, metric, state.size_BT)
        state = bipartite.merge(state, pairs)
    result = bipartite.finish(state, cls=False)
    return dataclasses.replace(result, tokens_BMD=result.tokens_BMD.astype(patches_BPD.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """See `removals`; proportional attention as in section 3 of the paper."""

    inflect: float = option(0.0, low=-1.0, high=1.0)
    proportional: bool = option(True)


def inside(features: VisionFeatures, ask: Ask) -> VisualTokens:
    """What a tower in which tokens merged hands over (also FOLDER's); all patches, where nothing had to be removed."""
    if "position_BM" not in features.signals:
        return everything(features.patches_BPD)
    books = (features.signals[name] for name in ("position_BM", "size_BM", "source_BP"))
    return merged(features.patches_BPD, *books)


def _plan(tower: Tower, tokens: int, options: Options) -> Plan:
    counts = removals(tower.patches, tokens, tower.blocks, inflect=options.inflect)
    return Plan(between=between(counts), removed=dict(enumerate(counts)), proportional=options.proportional)


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    removals(tower.patches, tokens, tower.blocks, inflect=options.inflect)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    return tome(features.patches_BPD, features.signals["keys_BSH"][:, int(ask.tower.cls) :], tokens=ask.tokens)


def _features_budget(tower: Tower, tokens: int, options: NoOptions) -> None:
    check_budget(tower.patches, tokens)


ENTRIES = {
    "tome": Encoder(
        function=inside,
        budget=_budget,
        options=Options,
        plan=_plan,
        cls=True,
        classes=("similarity",),
        reads="keys inside every block",
        source="arXiv 2210.09461",
    ),
    "tome_features": Encoder(
        function=_apply,
        budget=_features_budget,
        signals=("keys_BSH",),
        classes=("similarity",),
        reads="keys, patches",
        source="arXiv 2210.09461",
    ),
}
