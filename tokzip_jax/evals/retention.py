"""How much of the uncompressed model's score a compressed one keeps.

Both measures are ratios (1 = everything is kept). Where the span that a measure divides by is under five points it
says more about noise than about the method, so there is no value (None, a dash in tables).
"""

from collections.abc import Sequence

SMALLEST_SPAN = 0.05  # five points, for scores that are fractions of 1


def percent_of_full(score: float, upper: float, *, smallest: float = SMALLEST_SPAN) -> float | None:
    """score / upper, the measure of VisionZip's tables; None where `upper` is under `smallest`."""
    return score / upper if upper >= smallest else None


def retention(score: float, *, lower: float, upper: float, smallest: float = SMALLEST_SPAN) -> float | None:
    """(score - lower) / (upper - lower), VoCo-LLaMA's compression retention rate (arXiv 2406.12275, section 4.1).

    Args:
        score, lower, upper: scores in one unit; `upper` of the model without compression, `lower` of the same
            weights under the compressing mask without having been trained for it.
        smallest: the smallest span `upper - lower` that still means something, in that unit.

    Returns:
        The ratio (below 0 where the score is under the lower bound, above 1 where it beats the upper one), or None.
    """
    return (score - lower) / (upper - lower) if upper - lower >= smallest else None


def mean_retention(
    scores: Sequence[float], *, lower: Sequence[float], upper: Sequence[float], smallest: float = SMALLEST_SPAN
) -> float | None:
    """The plain mean of `retention` over benchmarks (last column of VoCo-LLaMA's tables 1 and 2).

    Benchmarks without a value are left out; None where none has one.

    Raises:
        ValueError: the three sequences differ in length.
    """
    if not len(scores) == len(lower) == len(upper):
        raise ValueError(f"{len(scores)} scores need as many bounds, not {len(lower)} lower and {len(upper)} upper")
    each = [retention(s, lower=lo, upper=up, smallest=smallest) for s, lo, up in zip(scores, lower, upper)]
    known = [value for value in each if value is not None]
    return sum(known) / len(known) if known else None
