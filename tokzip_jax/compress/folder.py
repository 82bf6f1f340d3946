"""FOLDER (arXiv 2501.02430, ICCV 2025): merge most tokens at once near the end of the encoder, by folding.

A fold is a step of bipartite matching (see `bipartite`) that removes up to half of the tokens; folds repeat until the
budget is met, on averages of the metric. Two forms were released, and both are here:

    in a block  `fold`, in the feature layer's block (second to last), between attention and MLP, on that block's keys;
                tokens that the CLS token attends to are kept from leaving by a penalty.
    simple      `folder`, on any features, without attention; the authors recommend this one.

Where the released code does something of its own:

    scale       the simple form multiplies a token by 1 + log(size), except after a single fold of about N/3 .. N/2
                tokens. "official": just so. "always": without the exception. "none": plain averages, as the paper says.
    protect     the first token never leaves, even where it is no CLS token (released default).
The released fold in a block fails on fewer than 40 tokens and never hands sizes to attention; here it works for any
number, and proportional attention is the tower's own switch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokzip_jax.compress import bipartite
from tokzip_jax.compress.bipartite import Between, Merged
from tokzip_jax.compress.entry import Ask, Encoder, Plan, Tower, option
from tokzip_jax.compress.greedy import check_shape
from tokzip_jax.compress.tome import inside
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

SCALES = ("official", "always", "none")
PENALTY = 500.0  # 100 x the alpha = 5 of the released encoder


def check_budget(patches: int, tokens: int, *, simple: bool = False) -> None:
    """Refuse a number of tokens that `patches` patches cannot be folded to.

    Args:
        patches, tokens: P and M.
        simple: the simple form, which ends at two tokens; in a block the CLS token is the second one.

    Raises:
        ValueError: names the number and its range.
    """
    least = min(2, patches) if simple else 1
    if not least <= tokens <= patches:
        raise ValueError(f"FOLDER: {tokens} tokens asked of {patches} patches; it must be {least} .. {patches}")


def folds(length: int, removed: int) -> tuple[int, ...]:
    """How many tokens each fold removes, out of `length`: as many as it can ((t - 1) // 2), until `removed` are gone.

    Raises:
        ValueError: `removed` is not 0 .. length - 2 (0 for a single token).
    """
    limit = max(length - 2, 0)
    if not 0 <= removed <= limit:
        raise ValueError(f"FOLDER: folding {length} tokens cannot remove {removed}; it must be 0 .. {limit}")
    counts = []
    while removed:
        counts.append(min(bipartite.most(length, protected=True), removed))
        length, removed = length - counts[-1], removed - counts[-1]
    return tuple(counts)


def fold(tokens: Merged, keys_BTH: Array, cls_attention_BT: Array, *, removed: int, penalty: float = PENALTY) -> Merged:
    """FOLDER inside a block, on the residual stream behind its attention.

    Args:
        tokens: T tokens, CLS first.
        keys_BTH: [B, T, H] this block's keys, mean over heads.
        cls_attention_BT: [B, T] its softmax attention of the CLS row (its own column included), mean over heads.
        removed: how many patches have to go in all, 0 .. T - 2.
        penalty: this many times a token's attention is subtracted from its similarities, so that what CLS attends to
            stays; 0 looks at similarity alone. (Turbo and the released matcher for other models use 30.)

    Returns:
        T - removed tokens: CLS, even ones that stay, odd ones. Between two folds sizes and keys are averaged by size,
        attention by member, as released.

    Raises:
        ValueError: too many removed.
    """
    metric, attention = keys_BTH, cls_attention_BT.astype(jnp.float32)
    ones = jnp.ones((*attention.shape, 1), jnp.float32)
    for count in folds(tokens.x_BTD.shape[1], removed):
        pairs = bipartite.pair(metric, count, protected=True, penalty_BT=penalty * attention)
        metric = bipartite.mean(pairs, metric, tokens.size_BT)
        members = bipartite.add_up(pairs, ones[:, : attention.shape[1]])
        attention = (bipartite.add_up(pairs, attention[:, :, None]) / members)[:, :, 0]
        tokens = bipartite.merge(tokens, pairs)
    return tokens


def between(patches: int, tokens: int, block: int, *, penalty: float = PENALTY) -> dict[int, Between]:
    """What `vit.features` has to be given to fold P patches to `tokens` in one block.

    Args:
        patches, tokens: P and M.
        block: its number; released: the one whose output the language model reads (`cfg.feature_blocks - 1`).
        penalty: see `fold`.

    Raises:
        ValueError: budget out of range.
    """
    check_budget(patches, tokens)
    return {block: functools.partial(fold, removed=patches - tokens, penalty=penalty)}


@functools.partial(jax.jit, static_argnames=("tokens", "scale", "protect"))
def folder(
    patches_BPD: Array,
    metric_BPH: Array | None = None,
    *,
    tokens: int,
    scale: str = "official",
    protect: bool = True,
    valid_BP: Array | None = None,
) -> VisualTokens:
    """The simple form, on finished features.

    Args:
        patches_BPD: [B, P, D].
        metric_BPH: [B, P, H] what similarity is measured on; None = the features.
        tokens: 2 .. P (1 for a single patch).
        scale: "official", "always" or "none", see the module.
        protect: the first token stays as it is.
        valid_BP: [B, P] bool, see `greedy`: even, odd and first are places among the valid patches, and each picture
            takes the folds, and the scale, that its own number of them needs; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order; a token stands at the place of the patch that the others were
        merged into. Sizes sum to P, or the number of valid patches.

    Raises:
        ValueError: budget out of range, unknown scale, or shapes that do not fit.
    """
    patches = patches_BPD.shape[1]
    check_budget(patches, tokens, simple=True)
    if scale not in SCALES:
        raise ValueError(f"FOLDER: scale = {scale!r} is unknown; choose one of {', '.join(SCALES)}")
    metric = patches_BPD if metric_BPH is None else metric_BPH
    if metric.shape[:2] != patches_BPD.shape[:2]:
        raise ValueError(f"FOLDER: metric of shape {metric.shape} does not fit patches {patches_BPD.shape}")
    if valid_BP is not None:
        check_shape("FOLDER", "valid", valid_BP.shape, patches_BPD.shape[:2])
        result = bipartite.reduce_valid(
            patches_BPD, metric, valid_BP, tokens, spare=True, protected=protect, order="raster"
        )
        factor = _valid_factor(result.size_BM, valid_BP, tokens, scale)
        return dataclasses.replace(result, tokens_BMD=(result.tokens_BMD * factor).astype(patches_BPD.dtype))
    state, counts = bipartite.begin(patches_BPD.astype(jnp.float32)), folds(patches, patches - tokens)
    for count in counts:
        pairs = bipartite.pair(metric, count, protected=protect, order="raster")
        metric = bipartite.mean(pairs, metric, state.size_BT)
        state = bipartite.merge(state, pairs)
    result = bipartite.finish(state, cls=False)
    # Released: one fold is scaled only while what it removes is less than half of what it leaves.
    if scale == "always" or (scale == "official" and (len(counts) != 1 or counts[0] < tokens // 2)):
        factor = 1.0 + jnp.log(result.size_BM.astype(jnp.float32))[:, :, None]
    else:
        factor = 1.0
    return dataclasses.replace(result, tokens_BMD=(result.tokens_BMD * factor).astype(patches_BPD.dtype))


def _valid_factor(size_BM: Array, valid_BP: Array, tokens: int, scale: str) -> Array | float:
    """What tokens are multiplied by, [B, M, 1] float32; the released exception goes by a picture's own folds."""
    if scale == "none":
        return 1.0
    factor_BM = 1.0 + jnp.log(jnp.maximum(size_BM, 1).astype(jnp.float32))
    if scale == "official":
        count_B1 = jnp.sum(valid_BP, axis=1, keepdims=True, dtype=jnp.int32)
        removed_B1 = count_B1 - tokens
        one_fold_B1 = (removed_B1 > 0) & (removed_B1 <= (count_B1 - 1) // 2)
        factor_BM = jnp.where(one_fold_B1 & (removed_B1 >= tokens // 2), 1.0, factor_BM)
    return factor_BM[:, :, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The simple form's, see `folder`."""

    scale: str = option("official", choices=SCALES)
    protect: bool = option(True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """See `fold`."""

    penalty: float = option(PENALTY, low=0.0)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    return folder(features.patches_BPD, tokens=ask.tokens, scale=ask.options.scale, protect=ask.options.protect)


def _plan(tower: Tower, tokens: int, options: BlockOptions) -> Plan:
    block = tower.blocks - 1
    steps = between(tower.patches, tokens, block, penalty=options.penalty)
    return Plan(between=steps, removed={block: tower.patches - tokens})


def _budget(tower: Tower, tokens: int, options: Options) -> None:
    check_budget(tower.patches, tokens, simple=True)


def _block_budget(tower: Tower, tokens: int, options: BlockOptions) -> None:
    check_budget(tower.patches, tokens)


ENTRIES = {
    "folder": Encoder(
        function=_apply,
        budget=_budget,
        options=Options,
        classes=("similarity",),
        reads="patches",
        source="arXiv 2501.02430",
    ),
    "folder_block": Encoder(
        function=inside,
        budget=_block_budget,
        options=BlockOptions,
        plan=_plan,
        cls=True,
        classes=("similarity", "attention"),
        reads="keys and CLS attention inside a block",
        source="arXiv 2501.02430",
    ),
}
