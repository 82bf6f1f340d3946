"""Exact-match bookkeeping, and the score that needs no picture.

Accuracies are fractions of 1. Yes/no questions are easy to guess, so every score also exists without them.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

YES_NO = ("yes", "no")  # answers to questions that are left out of `not_yes_no`, whatever their type


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracies over a set of questions, as fractions of 1.

    Attributes:
        accuracy: over all questions.
        by_type: over the questions of each type, types in alphabetical order.
        not_yes_no: over the questions whose right answer is none of `YES_NO`; None where there are none.
        questions: how many questions were counted.
        filled: visual tokens that a question can read, the mean, where that was counted; a method that keeps fewer than
            its budget leaves slots empty.
    """

    accuracy: float
    by_type: dict[str, float]
    not_yes_no: float | None
    questions: int
    filled: float | None = None


class Tally:
    """Counts right answers by question type, and by whether the answer is yes or no.

    >>> tally = Tally()
    >>> tally.add("place", "yes", True)
    >>> tally.add("place", "left", False)
    >>> tally.score().accuracy
    0.5
    >>> tally.score().not_yes_no
    0.0
    """

    def __init__(self) -> None:
        # By (type, whether the right answer is one of `YES_NO`).
        self._right: collections.Counter[tuple[str, bool]] = collections.Counter()
        self._asked: collections.Counter[tuple[str, bool]] = collections.Counter()

    def add(self, question_type: str, answer: str, correct: bool) -> None:
        """Count one question; `answer` is the right one."""
        key = question_type, answer.strip() in YES_NO
        self._asked[key] += 1
        self._right[key] += bool(correct)

    def extend(self, question_types: Sequence[str], answers: Sequence[str], correct: Sequence[bool]) -> None:
        """Count several questions.

        Raises:
            ValueError: the sequences differ in length.
        """
        for question_type, answer, right in zip(question_types, answers, correct, strict=True):
            self.add(question_type, answer, right)

    def score(self) -> Score:
        """Accuracies of what was counted so far.

        Raises:
            ValueError: nothing was counted.
        """
        if not self._asked:
            raise ValueError("no question was scored; an accuracy needs at least one")
        keys = sorted(self._asked)
        return Score(
            accuracy=self._share(keys),
            by_type={name: self._share([key for key in keys if key[0] == name]) for name, _ in keys},
            not_yes_no=self._share([key for key in keys if not key[1]]),
            questions=self._asked.total(),
        )

    def _share(self, keys: Sequence[tuple[str, bool]]) -> float | None:
        asked = sum(self._asked[key] for key in keys)
        return sum(self._right[key] for key in keys) / asked if asked else None


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the two strings are the same but for white space around them (easy-VQA's metric)."""
    return prediction.strip() == answer.strip()


def question_only_prior(
    train_examples: Iterable[Mapping[str, Any]], test_examples: Iterable[Mapping[str, Any]]
) -> Score:
    """What can be scored without seeing a picture: the answer that the question's string has most often in training.

    A question that training never asks gets the most frequent answer of all. Ties go to the alphabetically last
    answer, so that the order of the examples does not matter. On easy-VQA's official split that gives 67.0 % (82.5 %
    yes/no, 23.3 % other), as does taking the answer met first; the alphabetically first one would give 66.9 %.

    Args:
        train_examples, test_examples: examples of `data.sources`; only "questions", "answers" and (test) "types"
            are read.

    Raises:
        ValueError: there is no training question or no test question.
    """
    by_question: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    overall: collections.Counter[str] = collections.Counter()
    for example in train_examples:
        for question, answer in zip(example["questions"], example["answers"], strict=True):
            by_question[question][answer] += 1
            overall[answer] += 1
    if not overall:
        raise ValueError("the training examples hold no question; the question-only prior needs at least one")
    usual = {question: _most_frequent(counts) for question, counts in by_question.items()}
    fallback = _most_frequent(overall)
    tally = Tally()
    for example in test_examples:
        guesses = [usual.get(question, fallback) for question in example["questions"]]
        right = [exact_match(guess, answer) for guess, answer in zip(guesses, example["answers"], strict=True)]
        tally.extend(example["types"], example["answers"], right)
    return tally.score()


def _most_frequent(counts: Mapping[str, int]) -> str:
    return max(counts, key=lambda answer: (counts[answer], answer))
