"""The judges that need no model: how many words an answer shares with the reference.

They are deterministic and know nothing of synonyms: their ratings are not those of a model and do not compare with
published ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from keeplora.evaluation.judges.base import HIGHEST, Heard, Question, Verdict
from keeplora.evaluation.scorers.short import normalise_vqa

_LETTER = re.compile(r"\s*\(?([A-Za-z])(?:[).:]+(?:\s+|$)|\s*$)")


def words(text: str) -> list[str]:
    """The words that are compared: lower case, digits for number words, no punctuation and no articles.

    The letter of a choice stays, whatever is around it; so does a text of nothing but articles.

    >>> words("The  two red-hot dogs."), words("(A) a dog"), words("a")
    (['2', 'red', 'hot', 'dogs'], ['(a)', 'dog'], ['(a)'])
    """
    letter = _LETTER.match(text)
    rest = text[letter.end() :] if letter else text
    kept = normalise_vqa(rest).split() or re.findall(r"\w+", rest.lower())
    return [f"({letter[1].lower()})", *kept] if letter else kept


def token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, each as often as it occurs; 0 where they share none.

    >>> token_f1(["red", "car"], ["car"])
    0.6666666666666666
    """
    shared = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * shared / (len(prediction) + len(reference)) if shared else 0.0


class OverlapJudge:
    """5 for the same `words` in the same order, else 5 · F1 of the words, rounded (halves up) and at most 4.

    The best of several references counts.

    >>> asked = [Question("", ("a red car",), said) for said in ("The red car.", "car red", "a car", "a dog")]
    >>> [verdict.score for verdict in OverlapJudge().judge(asked)]
    [5, 4, 3, 0]
    """

    identity: Mapping[str, Any] = {"kind": "overlap", "version": 1}

    def judge(self, items: Sequence[Question], heard: Heard | None = None) -> list[Verdict]:
        verdicts = [
            Verdict(max(self._rate(item.prediction, reference) for reference in item.references)) for item in items
        ]
        for place, verdict in enumerate(verdicts if heard else ()):
            assert heard is not None
            heard(place, verdict)
        return verdicts

    def close(self) -> None: ...

    def _rate(self, prediction: str, reference: str) -> int:
        said, wanted = words(prediction), words(reference)
        if said == wanted and (said or prediction.strip() == reference.strip()):
            return HIGHEST
        return min(HIGHEST - 1, int(HIGHEST * token_f1(said, wanted) + 0.5))


class ExactJudge(OverlapJudge):
    """5 for the same `words` in the same order as a reference, else 0."""

    identity: Mapping[str, Any] = {"kind": "exact", "version": 1}

    def _rate(self, prediction: str, reference: str) -> int:
        return HIGHEST if super()._rate(prediction, reference) == HIGHEST else 0
