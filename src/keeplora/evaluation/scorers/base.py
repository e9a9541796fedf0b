"""What every scorer returns, and the arithmetic that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

#: Accepted answers, one list per item.
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Scored:
    """The score of a set of generated answers.

    Attributes:
        value: percent, 0 to 100 (CIDEr, and means with CIDEr in them, may exceed it); None where it cannot be computed
            here: ``missing`` then says why. Never a mean over fewer parts than the name promises.
        per_sample: one value in 0..1 per item: right (1), wrong (0) or partly.
        components: the parts of ``value`` by name, in percent (those of "judge": a count and a mean rating). Names with
            "-plain" at their end were computed on plain tokens and are not the numbers that the literature reports under
            the bare name.
        missing: one sentence, or None.
    """

    value: float | None
    per_sample: list[float]
    components: dict[str, float] = field(default_factory=dict)
    missing: str | None = None


class Scorer(Protocol):
    def __call__(self, predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored: ...


def mean_of(per_sample: list[float]) -> Scored:
    """The mean of what each item earned, in percent.

    >>> mean_of([1.0, 0.0, 0.5]).value
    50.0
    """
    return Scored(100.0 * fmean(per_sample), per_sample)
