"""MLLM-DCL's science domain: multiple choice (AI2D, SciVerse, TQA) and questions about maps (MapQA).

The evaluation of MLLM-CL (Zhao et al., arXiv 2506.05453) tells the four sets apart by the names of their pictures. Here
the reference does: multiple choice is answered with one letter, which no answer of MapQA is.
"""

from __future__ import annotations

from collections.abc import Sequence

from keeplora.evaluation.scorers.base import References, Scored, mean_of
from keeplora.evaluation.scorers.short import refuses


def _states(text: str) -> list[str]:
    return [name.strip() for name in text.lower().split(",")]


def _map_answer(prediction: str, reference: str, question: str) -> float:
    if refuses(prediction):
        return 0.0
    if "Which states" in question:
        named, wanted = set(_states(prediction)), _states(reference)
        return sum(name in named for name in wanted) / len(wanted)
    return float(reference.lower() in prediction.lower())


def _answer(prediction: str, reference: str, question: str) -> float:
    wanted = reference.strip().lower()
    if len(wanted) == 1 and wanted.isalpha():
        return float(not refuses(prediction) and prediction.strip().lower() == wanted)
    return _map_answer(prediction, reference, question)


def mapqa(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """ "Which states ..." earns the share of the reference's states that the answer lists; else: is it contained?

    Lists are split at commas; spaces around a name do not count (in the original they do, which loses a state when the
    order differs). States too many cost nothing, as in the original.

    >>> mapqa(["Ohio, Utah"], [["Utah, Iowa"]], ["Which states have the highest value?"]).per_sample
    [0.5]
    """
    return mean_of(
        [
            max(_map_answer(prediction, reference, question) for reference in accepted)
            for prediction, accepted, question in zip(predictions, references, questions, strict=True)
        ]
    )


def multiple_choice_sci(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """A reference of one letter is a choice and must be answered by that letter alone; others are judged by `mapqa`.

    >>> multiple_choice_sci(["b", "B."], [["B"], ["B"]], ["", ""]).per_sample
    [1.0, 0.0]
    """
    return mean_of(
        [
            max(_answer(prediction, reference, question) for reference in accepted)
            for prediction, accepted, question in zip(predictions, references, questions, strict=True)
        ]
    )
