"""Seconds of functions that are run in turn, and the ratios between them."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# "cpu" adds up the time of all threads of this process: on a machine that does other things as well it is steadier than
# the wall's, but it does not see how well the threads share the work.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Case(NamedTuple):
    """Something to be timed.

    Attributes:
        function: called without arguments; what it returns is waited for.
        repeats: calls in a row that make one measurement, for what is too short for the clock; their mean counts.
    """

    function: Callable[[], Any]
    repeats: int = 1


def interleave(
    cases: dict[str, Case], *, runs: int, warmup: int = 1, clock: Callable[[], float] = CLOCKS["wall"]
) -> dict[str, list[float]]:
    """Measure all cases once, then all again: A B A B, so that a machine that slows down slows all of them.

    Args:
        cases: by name.
        runs: rounds that count.
        warmup: rounds before them that do not (the first one compiles).
        clock: seconds.

    Returns:
        For each case the seconds of one call in each round; entry i of all lists is from the same round.

    Raises:
        ValueError: no rounds.
    """
    if runs < 1:
        raise ValueError(f"runs = {runs} must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + runs):
        for name, (function, repeats) in cases.items():
            start = clock()
            for _ in range(repeats):
                jax.block_until_ready(function())
            if number >= warmup:
                seconds[name].append((clock() - start) / repeats)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes, and the quartiles between which the middle half lies (of one value: that value)."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "median": statistics.median(values),
        "quartile_low": low,
        "quartile_high": high,
        "min": min(values),
        "max": max(values),
    }


def rows_of(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One table row a case: its name and `spread`."""
    return [{"what": name, **spread(values)} for name, values in seconds.items()]


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    """How many times as long `over` takes as `under`.

    Returns:
        A table row: `spread` of the ratios round by round (neighbours in time share the machine's load), and "best",
        the ratio of the two minima, which a disturbed machine changes least.
    """
    by_round = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    return {"what": f"{over} / {under}", **spread(by_round), "best": min(seconds[over]) / min(seconds[under])}
