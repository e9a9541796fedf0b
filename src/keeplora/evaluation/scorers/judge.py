"""Answers rated from 0 to 5 by a judge (CL-VISTA, general video benchmarks)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from keeplora.evaluation.judges import HIGHEST, Judge, Question, make_judge
from keeplora.evaluation.scorers.base import References, Scored


def judge(
    predictions: Sequence[str], references: References, questions: Sequence[str], judge: Judge | None = None
) -> Scored:
    """The mean rating times 20, as CL-VISTA reports it: 0 to 100; a judge's words without a rating count as 0.

    Per item: rating / 5. Components: "unparsable", how many answers the judge's words hold no rating for (a count, not
    percent), and "mean_score", 0 to 5.

    Args:
        judge: None: `keeplora.evaluation.judges.words.OverlapJudge`, which needs no model and does not compare with
            published numbers.

    >>> judge(["two dogs", "a cat"], [["2 dogs"], ["a dog"]], ["", ""]).value
    50.0
    """
    asked = [
        Question(question, tuple(accepted), prediction)
        for prediction, accepted, question in zip(predictions, references, questions, strict=True)
    ]
    verdicts = (judge or make_judge()).judge(asked)
    mean = fmean(verdict.points for verdict in verdicts)
    told = {"unparsable": float(sum(verdict.unparsable for verdict in verdicts)), "mean_score": mean}
    return Scored(mean * 100 / HIGHEST, [verdict.points / HIGHEST for verdict in verdicts], told)
