"""Drawing questions so that their wording alone does not tell the answer.

A template lists every question of its form that the facts answer without doubt. A question is drawn in three steps:
a template by its weight, then an answer among those that the template can have here, then a question with that
answer. So "yes" and "no" are equally frequent whatever the scenes look like, and rare counts are asked for where they
occur.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Pair = tuple[str, str]  # a question and its answer


@dataclasses.dataclass(frozen=True)
class Template:
    """Questions of one form.

    Attributes:
        kind: the question type they are counted under.
        weight: how often the form is chosen, relative to the others.
        pairs: the facts -> every question of this form with its answer; none twice.
        favour: how often an answer is chosen, relative to the others; 1 where it is not named.
    """

    kind: str
    weight: float
    pairs: Callable[[Any], Iterable[Pair]]
    favour: Mapping[str, float] = dataclasses.field(default_factory=dict)


def ask(
    rng: np.random.Generator, templates: Sequence[Template], facts: Any, count: int
) -> list[tuple[str, str, str]]:
    """Draw different questions about one example.

    Args:
        rng: where the choice comes from.
        templates: the forms of questions.
        facts: what the templates read.
        count: how many questions; there are fewer where the templates have fewer.

    Returns:
        (question, answer, kind) of each.
    """
    pools: list[dict[str, list[str]]] = []
    for template in templates:
        pool: dict[str, list[str]] = {}
        for question, answer in template.pairs(facts):
            pool.setdefault(answer, []).append(question)
        pools.append(pool)
    out = []
    while len(out) < count and any(pools):
        number = _choose(rng, [template.weight if pool else 0.0 for template, pool in zip(templates, pools)])
        template, pool = templates[number], pools[number]
        answers = list(pool)
        answer = answers[_choose(rng, [template.favour.get(answer, 1.0) for answer in answers])]
        questions = pool[answer]
        out.append((questions.pop(int(rng.integers(len(questions)))), answer, template.kind))
        if not questions:
            del pool[answer]
    return out


def _choose(rng: np.random.Generator, weights: Sequence[float]) -> int:
    """An index with a probability proportional to its weight; never one of weight 0."""
    point = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight)  # a rounding error past the end


def yes(truth: bool) -> str:
    """ "yes" or "no"."""
    return "yes" if truth else "no"


def singles(values: Iterable[str]) -> list[str]:
    """The values that occur exactly once, in their order."""
    seen = list(values)
    return [value for value in seen if seen.count(value) == 1]
