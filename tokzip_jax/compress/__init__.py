"""Encoder-site compressors: pure functions of arrays, and one table of them.

The functions in the files beside this one know no model, no Flax and no config, and work on arrays of anybody's forward
pass. `ENCODER` gives those that stand between vision tower and projector one signature, so that a config can name them.
"""

from collections.abc import Callable
from typing import NamedTuple

from tokzip_jax.compress.cdpruner import cdpruner
from tokzip_jax.compress.dart import dart
from tokzip_jax.compress.divprune import divprune
from tokzip_jax.compress.downsample import downsample, resize_positions
from tokzip_jax.compress.folder import folder
from tokzip_jax.compress.holov import holov
from tokzip_jax.compress.mmtok import mmtok
from tokzip_jax.compress.pool import average_pool, nested_pool, nested_pool_by_picture, stride_pool
from tokzip_jax.compress.prumerge import prumerge, prumerge_plus
from tokzip_jax.compress.relevance import question_relevance, question_similarity
from tokzip_jax.compress.restore import restore, restore_bias
from tokzip_jax.compress.scope import scope
from tokzip_jax.compress.select import check_tokens, everything, random, uniform
from tokzip_jax.compress.tome import tome
from tokzip_jax.compress.unshuffle import pixel_unshuffle
from tokzip_jax.compress.visionzip import check_budget, visionzip
from tokzip_jax.compress.visionzip_merged import visionzip_merged
from tokzip_jax.compress.vispruner import vispruner
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

__all__ = [
    "ENCODER",
    "Encoder",
    "average_pool",
    "cdpruner",
    "check",
    "dart",
    "divprune",
    "downsample",
    "everything",
    "folder",
    "holov",
    "mmtok",
    "nested_pool",
    "nested_pool_by_picture",
    "pixel_unshuffle",
    "prumerge",
    "prumerge_plus",
    "question_relevance",
    "question_similarity",
    "random",
    "resize_positions",
    "restore",
    "restore_bias",
    "scope",
    "stride_pool",
    "tome",
    "uniform",
    "visionzip",
    "visionzip_merged",
    "vispruner",
]


class Encoder(NamedTuple):
    """An entry of `ENCODER`.

    Attributes:
        function: function(features, *, tokens, contextual, merge, targets, key) -> `VisualTokens`; `tokens` is the
            whole budget, `contextual` the merged ones among them. An entry ignores what its method has no use for.
        signals: the names of `VisionFeatures.signals` that it reads.
        budget: budget(patches, tokens, contextual) raises ValueError for a budget that cannot be.
    """

    function: Callable[..., VisualTokens]
    signals: tuple[str, ...]
    budget: Callable[[int, int, int], None]


def _visionzip(
    features: VisionFeatures, *, tokens: int, contextual: int, merge: str, targets: str, key: Array | None
) -> VisualTokens:
    return visionzip(
        features.patches_BPD,
        features.cls_BD,
        features.signals["cls_attention_BP"],
        features.signals["keys_BSH"],
        dominant=tokens - contextual,
        contextual=contextual,
        merge=merge,
        targets=targets,
    )


def _random(
    features: VisionFeatures, *, tokens: int, contextual: int, merge: str, targets: str, key: Array | None
) -> VisualTokens:
    if key is None:
        raise ValueError("random: key is None; random selection needs a JAX random key")
    return random(features.patches_BPD, tokens=tokens, key=key)


def _uniform(
    features: VisionFeatures, *, tokens: int, contextual: int, merge: str, targets: str, key: Array | None
) -> VisualTokens:
    return uniform(features.patches_BPD, tokens=tokens)


def _none(
    features: VisionFeatures, *, tokens: int, contextual: int, merge: str, targets: str, key: Array | None
) -> VisualTokens:
    return everything(features.patches_BPD)


def _visionzip_budget(patches: int, tokens: int, contextual: int) -> None:
    if not 1 <= tokens <= patches + 1:
        raise ValueError(
            f"visionzip: {tokens} tokens (the CLS token is one of them) asked of {patches} patches; "
            f"it must be 1 .. {patches + 1}"
        )
    if not 0 <= contextual < tokens:
        raise ValueError(
            f"visionzip: {contextual} contextual of {tokens} tokens leave no place for the CLS token; "
            f"it must be 0 .. {tokens - 1}"
        )
    check_budget(patches, tokens - contextual, contextual)


def _selection_budget(name: str) -> Callable[[int, int, int], None]:
    def budget(patches: int, tokens: int, contextual: int) -> None:
        check_tokens(name, patches, tokens)
        if contextual:
            raise ValueError(f"{name}: {contextual} contextual tokens asked, but it merges nothing; it must be 0")

    return budget


def _none_budget(patches: int, tokens: int, contextual: int) -> None:
    if tokens not in (0, patches) or contextual:
        raise ValueError(
            f"none: {tokens} tokens and {contextual} contextual asked, but all {patches} patches pass; "
            f"tokens must be 0 or {patches}, contextual 0"
        )


ENCODER = {
    "visionzip": Encoder(_visionzip, ("cls_attention_BP", "keys_BSH"), _visionzip_budget),
    "random": Encoder(_random, (), _selection_budget("random")),
    "uniform": Encoder(_uniform, (), _selection_budget("uniform")),
    "none": Encoder(_none, (), _none_budget),
}


def check(name: str, patches: int, tokens: int, contextual: int) -> None:
    """Refuse an unknown encoder-site method, or a budget that it cannot keep, before anything is compiled.

    Args:
        name: a name of `ENCODER`.
        patches: patches of a picture.
        tokens: the whole budget.
        contextual: merged tokens among them.

    Raises:
        ValueError: one sentence with the valid range.
    """
    if name not in ENCODER:
        raise ValueError(f"encoder-site method {name!r} is unknown; choose one of {', '.join(sorted(ENCODER))}")
    ENCODER[name].budget(patches, tokens, contextual)
