"""Short answers, each rule on cases worked by hand."""

from __future__ import annotations

import pytest

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.evaluation.scorers import SCORERS, Scored, score, scorer_names


def earned(name: str, prediction: str, *references: str, question: str = "") -> float:
    (value,) = score(name, [prediction], [list(references)], [question]).per_sample
    return value


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("Blue", "blue", 1), (" blue. ", "blue", 1), ("blue", "Blue.", 1), ("blue .", "blue", 1),
        ("dark blue", "blue", 0), ("blue!", "blue", 0), ("blue..", "blue", 0), ("3.5", "35", 0), ("", "blue", 0),
        ("STRASSE", "straße", 1), (".", "", 1),
    ],
)  # fmt: skip
def test_exact(prediction: str, reference: str, right: int) -> None:
    assert earned("exact", prediction, reference) == right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        # several words: as it stands, case ignored
        ("It is a Residential Area.", "residential area", 1), ("residential  area", "residential area", 0),
        ("residential area", "residential area.", 0),
        # one word in an answer of several: it touches a space, a full stop or a comma
        ("the answer is no", "No", 1), ("no, it is", "no", 1), ("not now.", "now", 1), ("a snowman", "now", 0),
        ("a nova there", "no", 1), ("snow there", "no", 0), ("yes no", "no.", 1), ("it is (no)", "no", 0),
        ("a white casino.", "no", 1),
        # one word in an answer of one word: anywhere
        ("snowman", "now", 1), ("12m", "12", 1), ("yes", "no", 0),
        # full stops leave the reference of one word, not the answer
        ("0.5", "0.5", 0), ("05", "0.5", 1),
        # what the original counts as no answer
        ("Unanswerable no", "no", 0), ("unanswerable no", "no", 1),
        ("anything at all", ".", 0), ("", ".", 1),
    ],
)  # fmt: skip
def test_contains(prediction: str, reference: str, right: int) -> None:
    assert earned("contains", prediction, reference) == right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("The LIVER is shown", "liver", 1), ("delivery", "liver", 1), ("live r", "liver", 0), ("0.5 mm", "0.5", 1),
        ("Unanswerable", "a", 0),
    ],
)  # fmt: skip
def test_contains_lower(prediction: str, reference: str, right: int) -> None:
    assert earned("contains-lower", prediction, reference) == right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("B", "b", 1), (" B. ", "B", 1), ("b . . .", "B", 1), ("B C", "BC", 1), ("AB", "B", 0), ("B,", "B", 0),
        ("Unanswerable", "unanswerable", 0),
    ],
)  # fmt: skip
def test_exact_stripped(prediction: str, reference: str, right: int) -> None:
    assert earned("exact-stripped", prediction, reference) == right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("The two dogs", "2 dogs", 1), ("don't", "dont", 1), ("red, white!", "red white", 1), ("1,000", "1000", 1),
        ("3.5", "3.5", 1), ("3.5", "35", 0), ("yes.", "yes", 1), ("a cat", "cat", 1), ("an owl", "owl", 1), ("cats", "cat", 0),
        ("ten", "10", 1), ("none", "0", 1), ("eleven", "11", 0), ("half-past", "half past", 1), ("7:30", "730", 0),
    ],
)  # fmt: skip
def test_vqa_normalisation(prediction: str, reference: str, right: int) -> None:
    assert earned("vqa", prediction, reference) == right


@pytest.mark.parametrize(
    ("agree", "expected"),
    # Of ten votes, n agree: leaving out one of these leaves n - 1 (n times), leaving out another leaves n (10 - n times).
    [(0, 0.0), (1, 9 / 30), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1.0), (10, 1.0)],
)
def test_vqa_votes(agree: int, expected: float) -> None:
    assert earned("vqa", "Yes.", *["yes"] * agree, *["no"] * (10 - agree)) == pytest.approx(expected)


def test_vqa_of_fewer_than_ten_references_takes_any() -> None:
    assert earned("vqa", "yes", "yes", *["no"] * 8) == 1.0


@pytest.mark.parametrize(
    "name", ["exact", "contains", "contains-lower", "exact-stripped", "multiple-choice-sci", "mapqa"]
)
def test_the_best_reference_counts(name: str) -> None:
    assert earned(name, "dog", "cat", "dog") == 1.0
    assert earned(name, "dog", "cat", "bird") == 0.0


def test_value_is_the_mean_in_percent() -> None:
    scored = score("exact", ["a", "b", "c", "d"], [["a"], ["x"], ["c"], ["d"]], [""] * 4)
    assert scored == Scored(75.0, [1.0, 0.0, 1.0, 1.0])


def test_every_name_resolves_and_scores() -> None:
    assert scorer_names() == sorted(SCORERS)
    for name in set(scorer_names()) - {"caption"}:
        scored = score(name, ["one dog runs", "two cats"], [["one dog runs"], ["two cats"]], ["", ""])
        assert scored.missing is None
        assert scored.value is not None
        assert scored.value >= 100.0
        assert all(0.0 <= value <= 1.0 for value in scored.per_sample), name


def test_unknown_names_and_bad_lists() -> None:
    with pytest.raises(ConfigError, match="no scorer 'exakt'; did you mean 'exact'"):
        score("exakt", [], [], [])
    with pytest.raises(KeepLoraError, match="2 predictions, 1 lists of references and 2 questions"):
        score("exact", ["a", "b"], [["a"]], ["", ""])
    with pytest.raises(KeepLoraError, match="item 1 needs a list of at least one reference"):
        score("exact", ["a", "b"], [["a"], []], ["", ""])
    with pytest.raises(KeepLoraError, match="item 0 needs a list of at least one reference, not 'a'"):
        score("exact", ["a"], ["a"], [""])


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_no_items_have_no_score(name: str) -> None:
    assert score(name, [], [], []) == Scored(None, [], missing=f"{name}: there are no answers to score")


def test_ucit_s_exact_match_ignores_case_alone():
    from keeplora.evaluation.scorers import score

    found = score("exact-ignoring-case", ["BLUE", " blue ", "blue.", "a blue"], [["blue"]] * 4, [""] * 4)
    assert found.per_sample == [1.0, 1.0, 0.0, 0.0]
    assert found.value == 50.0
