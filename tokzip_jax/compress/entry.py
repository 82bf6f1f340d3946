"""What an entry of the table of encoder-site methods is: a method, what it reads, its options, the budgets it can keep.

A method's file holds `ENTRIES`, a dict name -> `Encoder`, beside its pure functions; `registry.FILES` lists the file.
"""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokzip_jax.compress.bipartite import Between
from tokzip_jax.types import Array, VisionFeatures, VisualTokens

# Signals that the vision tower does not have: patches behind the projector, and the question's embedded words.
PROJECTED, QUESTION, QUESTION_VALID = "projected_BPD", "question_BTD", "question_valid_BT"
ABOUT_QUESTION = (PROJECTED, QUESTION, QUESTION_VALID)
COMPARE = ("projected", "patches")  # what a method that measures how alike patches are may look at
CLASSES = ("transformation", "similarity", "attention", "query")


class Tower(NamedTuple):
    """What a method may know of the vision tower without reading an array.

    Attributes:
        rows, columns: patches of a picture.
        heads: of its attention.
        blocks: how many run for the features.
        cls: it has a CLS token.
        window: side of the windows that patches attend in; 0 = the whole picture.
    """

    rows: int
    columns: int
    heads: int = 1
    blocks: int = 1
    cls: bool = True
    window: int = 0

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return self.rows * self.columns


class Plan(NamedTuple):
    """What a method wants done before the tower's features are there.

    Attributes:
        grid: side of the grid of a picture that is made smaller first; 0 = as it is.
        between: block number -> what merges tokens between its attention and its MLP.
        removed: block number -> how many tokens that takes away.
        proportional: a merged token counts as often as it has members in the attention of later blocks.
    """

    grid: int = 0
    between: Mapping[int, Between] = {}
    removed: Mapping[int, int] = {}
    proportional: bool = False


def option(
    default: Any,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    share: float = 0.0,
    patches: int = 0,
) -> Any:
    """A field of a method's options.

    Args:
        default: its value where a config says nothing.
        choices: all values of a str.
        low, high, above: the range of a number: from `low` to `high`, or greater than `above`.
        share: it is a part of the budget, which keeps its share of another one; this share of it is published.
        patches: the default is published for so many patches, and means as large a part of others.
    """
    limits = {"choices": choices, "low": low, "high": high, "above": above, "share": share, "patches": patches}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a method that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selecting:
    """What every method that drops patches can be told.

    Attributes:
        restore: share of the tokens that are made of dropped patches (RESTORE; published: 0.5); 0 = none. The method
            also keeps original position ids and adds a bias to the language model's attention: `positions = "raster"`
            and `attention_bias = True` of a config.
    """

    restore: float = option(0.0, low=0.0, high=1.0)


class Ask(NamedTuple):
    """What is asked of a method.

    Attributes:
        tokens: the budget.
        options: an instance of the entry's `options`.
        tower: the vision tower.
        key: for what is random: one key, of which picture n uses the one folded with n, or a key a picture.
    """

    tokens: int
    options: Any
    tower: Tower
    key: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """An entry of the table.

    Attributes:
        function: (features, ask) -> `VisualTokens` with `ask.tokens` slots.
        options: frozen dataclass of its options, fields made by `option`; it inherits from `Selecting` where patches
            are dropped (their source is -1).
        signals: names of `VisionFeatures.signals` that it reads; (options) -> names where they depend on them. Besides
            the tower's there are those of ABOUT_QUESTION, which need a projector that works token by token.
        budget: (tower, tokens, options) raises ValueError for what cannot be, as one sentence.
        plan: (tower, tokens, options) -> what has to be done to the picture or inside the tower.
        cls: it needs a CLS token.
        square: it needs a square grid of patches.
        classes: of the survey (arXiv 2507.20198).
        reads: what it looks at, in words.
        count: how many tokens come out, in words.
        source: where it is published.
    """

    function: Callable[[VisionFeatures, Ask], VisualTokens]
    budget: Callable[[Tower, int, Any], None]
    options: type = NoOptions
    signals: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    plan: Callable[[Tower, int, Any], Plan] | None = None
    cls: bool = False
    square: bool = False
    classes: tuple[str, ...] = ()
    reads: str = "nothing"
    count: str = "the budget"
    source: str = ""

    def read(self, options: Any) -> tuple[str, ...]:
        """The signals that it reads under these options."""
        return self.signals(options) if callable(self.signals) else self.signals

    def prepare(self, ask: Ask) -> Plan:
        """What has to be done before the features are there."""
        return Plan() if self.plan is None else self.plan(ask.tower, ask.tokens, ask.options)

    @property
    def selects(self) -> bool:
        """It drops patches, so that RESTORE can merge them."""
        return issubclass(self.options, Selecting)

    @property
    def question(self) -> bool:
        """Its result depends on the question, and so is good for one question only."""
        return QUESTION in self.read(self.options())


def settings(name: str, entry: Encoder, given: Mapping[str, Any]) -> Any:
    """The options of a config as the entry's own type.

    Raises:
        ValueError: an unknown option, a wrong type or a value out of range, as one sentence that begins with
            "options.NAME" and says what is valid.
    """
    hints = typing.get_type_hints(entry.options)
    limits = {field.name: field.metadata for field in dataclasses.fields(entry.options)}
    for key in given:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]}?" if near else "."
            known = f" It has: {', '.join(hints)}" if hints else " It has none"
            raise ValueError(f"options.{key} is no option of the encoder-site method {name!r}{guess}{known}")
    return entry.options(**{key: _value(key, value, hints[key], limits[key]) for key, value in given.items()})


def _value(key: str, value: Any, kind: type, limits: Mapping[str, Any]) -> Any:
    shown = f"options.{key} = {value!r}"
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{shown} ({type(value).__name__}) must be {kind.__name__}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"{shown} is unknown; choose one of {', '.join(map(repr, limits['choices']))}")
    low, high, above = limits["low"], limits["high"], limits["above"]
    # Written so that a NaN is refused as well.
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"{shown} must lie between {low} and {high}")
    if low is not None and not value >= low:
        raise ValueError(f"{shown} must be at least {low}")
    if above is not None and not value > above:
        raise ValueError(f"{shown} must be above {above}")
    return value


def at_budget(entry: Encoder, given: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """Options of a budget `before` for a budget `after`: parts of the budget keep their share of it."""
    parts = {field.name for field in dataclasses.fields(entry.options) if field.metadata["share"]}
    return {key: round(value * after / before) if key in parts and value else value for key, value in given.items()}


def compared(features: VisionFeatures, options: Any) -> Array:
    """What a method with an option `compare` out of COMPARE compares: [B, P, H]."""
    return features.signals[PROJECTED] if options.compare == "projected" else features.patches_BPD
