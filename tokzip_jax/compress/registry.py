"""The table of encoder-site methods: `ENCODER`, name -> `Encoder`, made of the `ENTRIES` of the files listed here."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tokzip_jax import listing
from tokzip_jax.compress.entry import Ask, Encoder, NoOptions, Selecting, Tower, at_budget, option, settings
from tokzip_jax.compress.restore import check_budget as check_restore
from tokzip_jax.compress.restore import restore
from tokzip_jax.types import VisionFeatures, VisualTokens

__all__ = [
    "ENCODER",
    "FILES",
    "FILE_OF",
    "Ask",
    "Encoder",
    "NoOptions",
    "Selecting",
    "Tower",
    "apply",
    "check",
    "option",
    "options",
    "scaled",
    "table",
]

# A new method is one more line here.
FILES = (
    "select",  # none, random, uniform
    "downsample",
    "cls_attention",
    "visionzip",
    "visionzip_merged",
    "vispruner",
    "prumerge",
    "holov",
    "scope",
    "tome",
    "folder",
    "divprune",
    "dart",
    "cdpruner",
    "mmtok",
)
ENCODER: dict[str, Encoder]
FILE_OF: dict[str, str]  # name -> the file that it stands in
ENCODER, FILE_OF = listing.entries("tokzip_jax.compress", FILES)


def options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of a config as the method's own type; errors as in `entry.settings`."""
    return settings(name, ENCODER[name], given)


def scaled(name: str, given: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """Options of a budget `before` for a budget `after`, see `entry.at_budget`."""
    return at_budget(ENCODER[name], given, before, after)


def _kept(tokens: int, options: Any) -> int:
    """How many of `tokens` a selection has to itself; published: half of them, rounded down."""
    share = getattr(options, "restore", 0.0)
    return math.floor(tokens * (1 - share) + 1e-9) if share else tokens


def check(name: str, tower: Tower, tokens: int, options: Any) -> None:
    """Refuse what cannot work with a vision tower, before anything is compiled.

    Args:
        name: a name of `ENCODER`.
        tower: what the tower is.
        tokens: the whole budget.
        options: of the method (`options`).

    Raises:
        ValueError: an unknown method, a tower without what it needs, or an impossible budget: one sentence with what
            would be valid.
    """
    if name not in ENCODER:
        raise ValueError(f"encoder-site method {name!r} is unknown; choose one of {', '.join(sorted(ENCODER))}")
    entry = ENCODER[name]
    if entry.cls and not tower.cls:
        without = ", ".join(sorted(other for other, known in ENCODER.items() if not known.cls))
        raise ValueError(f"{name} needs a CLS token, and the vision tower has none; these need none: {without}")
    if entry.square and tower.rows != tower.columns:
        raise ValueError(
            f"{name} needs a square grid of patches, and the vision tower's is {tower.rows} x {tower.columns}"
        )
    kept = _kept(tokens, options)
    if kept != tokens:
        check_restore(tower.patches, kept, tokens)
        if not kept:
            raise ValueError(
                f"{name}: options.restore = {options.restore} of {tokens} tokens leaves none to the selection; "
                f"it must be at most {1 - 1 / tokens:g}"
            )
    entry.budget(tower, kept, options)


def apply(name: str, features: VisionFeatures, ask: Ask) -> VisualTokens:
    """A method's result on the features of the tower, with the signals that it reads.

    Raises:
        ValueError: as in the method's function.
    """
    kept = _kept(ask.tokens, ask.options)
    result = ENCODER[name].function(features, ask._replace(tokens=kept))
    return result if kept == ask.tokens else restore(result, features.patches_BPD, tokens=ask.tokens)


def table() -> str:
    """All methods of the encoder site as a Markdown table: name, class of the survey, what is read, what comes out."""
    lines = [
        "| method | class | reads | needs | tokens out | options | good for other questions | source |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in ENCODER.items():
        needs = [word for word, needed in (("CLS", entry.cls), ("square grid", entry.square)) if needed]
        cells = (
            f"[{name}]({FILE_OF[name]})",
            ", ".join(entry.classes) or "-",
            entry.reads,
            ", ".join(needs) or "-",
            entry.count,
            ", ".join(field.name for field in dataclasses.fields(entry.options)) or "-",
            "no" if entry.question else "yes",
            entry.source or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
