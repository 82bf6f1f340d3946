"""What checks are made of: one sentence with the key, its value and its valid range."""

import math
from collections.abc import Iterable
from typing import Any


def require(ok: bool, message: str) -> None:
    """Raise ValueError with a message unless `ok`."""
    if not ok:
        raise ValueError(message)


def one_of(key: str, value: Any, names: Iterable[str]) -> None:
    """A value out of a few names."""
    names = list(names)
    choices = ", ".join(repr(name) for name in names)
    require(value in names, f"{key} = {value!r} is unknown; choose one of {choices or '(there is none)'}")


def at_least(key: str, value: float, least: float) -> None:
    """A finite number that is not smaller than `least`."""
    require(least <= value < math.inf, f"{key} = {value} must be >= {least} and finite")


def within(key: str, value: float, low: float, high: float) -> None:
    """A number from `low` to `high`."""
    require(low <= value <= high, f"{key} = {value} must lie between {low} and {high}")
