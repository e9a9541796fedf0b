"""The rating in a judge's words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keeplora.evaluation.judges.reply import LONGEST, parse_score

FORMS = (
    '{{"score": {n}}}', "{{'score': {n}}}", "{{'pred': 'yes', 'score': {n}}}", '{{"score": "{n}"}}', '{{"Score": {n}.0}}',
    "```json\n{{\"score\": {n}}}\n```", "```\n{{'score': {n}}}\n```", "```python\n{{'score': {n}}}", "Score: {n}", "score={n}",
    "**Score:** {n}", "**Score: {n}**", '"score": {n}', "The score is {n}.", "Rating: {n}/5", "Score: {n} out of 5", "{n}",
    " {n}. ", "**{n}**", "{n}/5", "{n} / 5", "{n} out of 5", "({n})", "```\n{n}\n```",
    "The two answers name 3 and 7 dogs.\nScore: {n}", "<think>Is it 2? Score: 1. Or 9/10?</think>\n\n{{\"score\": {n}}}",
    '{{"rating": {n}}}', '[{{"score": {n}}}]',
    'Here it is: {{"score": {n}, "why": "score: 9 would be too much"}} I hope that helps 100%.',
    '{{"score": {n}, "parts": {{"a": 1}}}}', "Score: {n}\n\nFinal score: {n}", "I rate it.\nRating: {n}, as 2 of 3 facts agree",
)  # fmt: skip
BARE = [form for form in FORMS if form.strip(" .*()`\n") in ("{n}", "{n}/5", "{n} / 5", "{n} out of 5")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", range(6))
def test_a_rating_is_read_in_every_form(form: str, n: int):
    assert parse_score(form.format(n=n)) == n


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "n", ["7", "6", "-1", "3.5", "10", "0.5", "1e400", "nan", "", "five", "4,5", "1.2.3", "9" * 5000]
)
def test_what_is_no_whole_number_from_0_to_5_is_no_rating(form: str, n: str):
    if n or ".0" not in form:  # ".0" is a number
        assert parse_score(form.format(n=n)) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "They agree.", "The man lifts 3 boxes.", "2 dogs, so yes", "4 or 5", "3, maybe 4", "Score: 3-4",
        "Score: 0 to 5",
        "Score: 4/10", "4/10", "Score: 80%", "score between 0 and 5", "Score: 3\nScore: 4", '{"score": 3} {"score": 4}',
        '{"score": 3, "score": 4}', "{'score': 3, 'score': 4}", '{"score": true}', '{"score": null}', '{"score": [4]}',
        '{"score": {"value": 4}}', "{'score': 2 + 2}", "<think>Score: 4", "4th", "4 stars of 10",
        "```json\n```", "{" * 5000, "[" * 5000, "{'score': " + "(" * 5000, "4" + " " * LONGEST + "!", "scored 4 goals", "٤",
        "Score: 4x", "Score: 4.5.", "Score: 3 + 1",
        "underscore: 4", "Score: 4 / 0",
    ],
)  # fmt: skip
def test_prose_and_riddles_hold_none(text: str):
    assert parse_score(text) is None


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_rating_or_none(text: str):
    for said in (text, f"Score: {text}", f'{{"score": {text}}}', json.dumps({"score": text})):
        assert parse_score(said) in (None, 0, 1, 2, 3, 4, 5)


@given(st.one_of(st.integers(), st.floats()), st.sampled_from(["Score: {}", "{}", '{{"score": {}}}', "{}/5"]))
@settings(max_examples=300, deadline=None)
def test_numbers(number: float, form: str):
    wanted = int(number) if number in range(6) else None
    assert parse_score(form.format(number)) == wanted


@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from(["score: {}", "{{'score': {}}}"]))
def test_two_ratings_must_agree(first: int, second: int, form: str):
    said = f"{form.format(first)} and then {form.format(second)}"
    assert parse_score(said) == (first if first == second else None)


@given(
    st.dictionaries(st.text(max_size=7), st.one_of(st.text(max_size=7), st.integers(), st.none()), max_size=4),
    st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_whatever_else_a_dictionary_holds(others: dict[str, object], n: int):
    found = {key: value for key, value in others.items() if key.strip().lower() != "score"} | {"score": n}
    for said in (json.dumps(found), repr(found), f"```json\n{json.dumps(found, indent=1)}\n```"):
        assert parse_score(said) == n
