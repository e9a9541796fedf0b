"""Short answers: equal, contained, or equal after normalisation.

`contains`, `contains_lower` and `exact_stripped` follow the evaluation of MLLM-CL (Zhao et al., arXiv 2506.05453), rule
for rule, so that its domains' scores can stand beside published ones. There an answer with "Unanswerable" in it earns
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from keeplora.evaluation.scorers.base import References, Scored, mean_of


def refuses(prediction: str) -> bool:
    """Whether MLLM-CL's evaluation counts the answer as none at all."""
    return "Unanswerable" in prediction


def any_of(rule: Callable[[str, str], bool], predictions: Sequence[str], references: References) -> Scored:
    """Percent of the predictions for which ``rule(prediction, reference)`` holds for at least one reference."""
    return mean_of(
        [float(any(rule(p, r) for r in accepted)) for p, accepted in zip(predictions, references, strict=True)]
    )


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def exact_ignoring_case(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """Equal but for case and outer whitespace: UCIT's own rule.

    >>> exact_ignoring_case(["Blue", "blue."], [["blue"], ["blue"]], ["", ""]).value
    50.0
    """
    return any_of(lambda p, r: p.strip().casefold() == r.strip().casefold(), predictions, references)


def exact(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """Equal but for case, outer whitespace and one full stop at the end.

    UCIT's own evaluation counts an answer that ends in a full stop as wrong: `exact_ignoring_case`.

    >>> exact(["Blue."], [["blue"]], [""]).value
    100.0
    """
    return any_of(lambda p, r: _bare(p) == _bare(r), predictions, references)


def _contained(prediction: str, reference: str) -> bool:
    if refuses(prediction):
        return False
    found, wanted = prediction.lower(), reference.lower()
    if " " in wanted:
        return wanted in found
    wanted = wanted.replace(".", "")
    if not wanted:
        return not found
    if " " not in found:
        return wanted in found
    return any(form in found for form in (f" {wanted}", f"{wanted} ", f"{wanted}.", f"{wanted},"))


def contains(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """The reference occurs in the answer, case ignored (MLLM-DCL: remote sensing, driving).

    A reference of several words must occur as it stands. A reference of one word loses its full stops (so "0.5" is
    looked for as "05", as in the original) and must touch a space, full stop or comma where the answer has several
    words; within an answer of one word it may lie anywhere.

    >>> contains(["It is no.", "unknown"], [["no"], ["no"]], ["", ""]).per_sample
    [1.0, 1.0]
    >>> contains(["the snowman"], [["now"]], [""]).per_sample  # "now" touches letters alone
    [0.0]
    """
    return any_of(_contained, predictions, references)


def contains_lower(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """The lowercased reference occurs in the lowercased answer, wherever (MLLM-DCL: medicine).

    >>> contains_lower(["The Liver cells"], [["liver"]], [""]).value
    100.0
    """
    return any_of(lambda p, r: not refuses(p) and r.lower() in p.lower(), predictions, references)


def _stripped(text: str) -> str:
    return text.lower().replace(" ", "").replace(".", "")


def exact_stripped(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """Equal after lowercasing and removing spaces and full stops (MLLM-DCL: finance).

    The original strips the prediction alone; its references have neither spaces nor full stops.

    >>> exact_stripped([" B. "], [["B"]], [""]).value
    100.0
    """
    return any_of(lambda p, r: not refuses(p) and _stripped(p) == _stripped(r), predictions, references)


_UP_TO_TEN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {word: str(i) for i, word in enumerate(_UP_TO_TEN)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
#: VQAv2 asks ten people each question.
VOTES = 10


def normalise_vqa(text: str) -> str:
    """VQAv2's normalisation: lower case, no punctuation, no articles, digits for number words up to ten.

    Apostrophes are dropped instead of being restored from a list of contractions: "dont" and "don't" are one.

    >>> normalise_vqa("The  two, red-hot Dogs don't.")
    '2 red hot dogs dont'
    >>> normalise_vqa("1,000.5")
    '1000.5'
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("'", "").replace("’", ""))
    text = re.sub(r"\.(?!\d)", "", text)
    words = re.sub(r"[^\w.:%$]|_", " ", text).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def vqa(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """Equal after `normalise_vqa`; with ten references or more they are votes, counted as VQAv2 does.

    Of votes: the mean over leaving one vote out of min(1, equal votes among the others / 3).

    >>> vqa(["two"], [["2"] * 3 + ["3"] * 7], [""]).per_sample  # 3 times 2/3 and 7 times 1
    [0.9]
    """
    earned = []
    for prediction, accepted in zip(predictions, references, strict=True):
        said = normalise_vqa(prediction)
        equal = [normalise_vqa(reference) == said for reference in accepted]
        if len(equal) < VOTES:
            earned.append(float(any(equal)))
        else:
            agreed = sum(equal)
            earned.append(sum(min(1.0, (agreed - own) / 3) for own in equal) / len(equal))
    return mean_of(earned)
