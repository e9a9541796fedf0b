"""Multiple choice and map questions, worked by hand."""

from __future__ import annotations

import pytest

from keeplora.evaluation.scorers import score

STATES = "Which states have a value above 10?"


@pytest.mark.parametrize(
    ("prediction", "reference", "question", "value"),
    [
        # one letter is a choice, whatever the question says
        ("B", "b", "", 1.0), (" b\n", "B", "", 1.0), ("B.", "B", "", 0.0), ("The answer is B", "B", "", 0.0),
        ("B", "B", "Which states of matter?", 1.0), ("A, B", "B", "Which states of matter?", 0.0),
        # a number of one digit is no choice: it is looked for in the answer
        ("about 7 percent", "7", "What is the value?", 1.0),
        ("Yes, it is", "yes", "Is Ohio higher?", 1.0), ("no", "yes", "Is Ohio higher?", 0.0),
        ("Unanswerable yes", "yes", "", 0.0), ("Unanswerable", "U", "", 0.0),
        # lists of states
        ("Ohio,Utah", "Utah,Ohio", STATES, 1.0), ("Ohio, Utah", "Utah, Ohio", STATES, 1.0),
        ("ohio", "Ohio,Utah,Iowa,Maine", STATES, 0.25), ("Ohio,Utah,Texas", "Ohio,Utah", STATES, 1.0),
        ("Virginia", "West Virginia", STATES, 0.0), ("West Virginia", "Virginia,Ohio", STATES, 0.0),
        ("Unanswerable, Ohio", "Ohio", STATES, 0.0),
        # the words are matched as they stand: in lower case it is an ordinary question
        ("Ohio", "Ohio,Utah", "which states?", 0.0),
    ],
)  # fmt: skip
def test_science(prediction: str, reference: str, question: str, value: float) -> None:
    assert score("multiple-choice-sci", [prediction], [[reference]], [question]).per_sample == [value]


def test_mapqa_knows_no_choices() -> None:
    # "b" lies within "Ab": contained, though as a choice it would be wrong.
    assert score("mapqa", ["Ab"], [["B"]], [""]).per_sample == [1.0]
    assert score("mapqa", ["Ohio,Iowa"], [["Ohio,Utah"]], [STATES]).per_sample == [0.5]


def test_partial_credit_enters_the_mean() -> None:
    scored = score(
        "multiple-choice-sci", ["a", "c", "Ohio"], [["A"], ["B"], ["Ohio,Utah,Iowa,Maine"]], ["", "", STATES]
    )
    assert scored.value == pytest.approx(100 * (1 + 0 + 0.25) / 3)
