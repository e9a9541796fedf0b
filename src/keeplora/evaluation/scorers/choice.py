"""Multiple choice as MVBench is scored with Video-LLaVA in CL-VISTA's evaluation of general ability."""

from __future__ import annotations

import re
from collections.abc import Sequence

from keeplora.evaluation.scorers.base import References, Scored
from keeplora.evaluation.scorers.short import any_of

_LEADING = re.compile(r"\(?\s*([a-z])(?:\s*\)|\s*[.:]|\s*$)")
_NAMED = re.compile(r"(?:answer|option|choice|choose)\s*(?:is|:)?\s*\(?\s*([a-z])(?=\s*(?:[).:,]|$))")
_BRACKETED = re.compile(r"\(\s*([a-z])\s*\)")


def _letter(text: str) -> str:
    """The option that an answer names, as a small letter; "" where it names none."""
    for match in (_LEADING.match(text), _NAMED.search(text), _BRACKETED.search(text)):
        if match:
            return match[1]
    return ""


def _right(prediction: str, reference: str) -> bool:
    said, wanted = (" ".join(text.lower().split()) for text in (prediction, reference))
    letter = _letter(wanted)
    if letter and _letter(said) == letter:
        return True
    content = _LEADING.sub("", wanted, count=1).strip().removesuffix(".")
    return bool(content) and content in said


def option(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """The letter of the right option ("(B) left": "b", "B.", "the answer is B"), or its words within the answer.

    The published script also takes the first letter of any word for an option ("apple" for A); here a letter must stand alone.

    >>> option(["B", "The answer is (b).", "to the left", "apple"], [["(B) left"]] * 3 + [["(A) right"]], [""] * 4).per_sample
    [1.0, 1.0, 1.0, 0.0]
    """
    return any_of(_right, predictions, references)
