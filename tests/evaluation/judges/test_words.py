"""The judges that need no model, their making, and the score that asks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from keeplora.errors import ConfigError
from keeplora.evaluation.judges import Question, judge_class, judge_keys, judge_kinds, make_judge
from keeplora.evaluation.judges.prompt import messages
from keeplora.evaluation.scorers import JUDGED, score, scorer_names
from keeplora.experiment.config_judge import JudgeConfig

OVERLAP, EXACT = make_judge(), make_judge({"kind": "exact"})


def rated(judge: Any, prediction: str, *references: str) -> int:
    return judge.judge([Question("", references, prediction)])[0].score


@pytest.mark.parametrize(
    ("prediction", "reference", "overlap"),
    [
        ("The two dogs.", "2 dogs", 5), ("dogs two", "two dogs", 4), ("a red car", "red", 3), ("a cat", "a dog", 0),
        ("", "a dog", 0),
        ("A", "A", 5), ("A", "a.", 5), ("A", "B", 0), ("the", "A", 0), ("", "A", 0), ("a", "", 0), ("?", "!", 0), ("?", "?", 5),
        ("A", "A. turns left", 3), ("(A) turns left", "A. turns left", 5), ("B. turns left", "A. turns left", 3),
        ("turns left", "A. turns left", 4), ("dog dog dog", "dog", 3), ("a b c d e f g h i", "a", 0), ("猫", "猫", 5),
        ("one two three four", "one", 2), ("ONE", "1", 5), ("w1 x x x x x x x x x", "w1", 1), ("w1 " + "x " * 18, "w1", 1),
    ],
)  # fmt: skip
def test_ratings_of_shared_words(prediction: str, reference: str, overlap: int):
    assert rated(OVERLAP, prediction, reference) == overlap
    assert rated(EXACT, prediction, reference) == (5 if overlap == 5 else 0)
    assert rated(OVERLAP, prediction, "zebra", reference) == overlap  # the best of several


@given(st.text(max_size=30), st.text(max_size=30))
def test_ratings_are_whole_symmetric_and_full_for_the_same(one: str, other: str):
    there, back = rated(OVERLAP, one, other), rated(OVERLAP, other, one)
    assert there == back
    assert there in range(6)
    assert rated(OVERLAP, one, one) == 5


def test_the_score_is_the_mean_rating_in_percent():
    found = score("judge", ["two dogs", "a cat", "dogs two"], [["2 dogs"], ["a dog"], ["two dogs"]], ["", "", ""])
    assert found.value == 60.0
    assert found.per_sample == [1.0, 0.0, 0.8]
    assert found.components == {"unparsable": 0.0, "mean_score": 3.0}


def test_what_a_judge_says_unclearly_counts_as_nothing_and_is_counted():
    from keeplora.evaluation.judges import Verdict

    class Mumbling:
        identity: Mapping[str, Any] = {"kind": "mumbling"}

        def judge(self, items: Any, heard: Any = None) -> list[Verdict]:
            self.items = items
            return [Verdict(4, "4"), Verdict(None, "hm"), Verdict(5, "5"), Verdict(None, "")]

        def close(self) -> None: ...

    judge = Mumbling()
    found = score("judge", ["a"] * 4, [["b", "c"]] * 4, ["?"] * 4, judge=judge)
    assert (found.value, found.per_sample) == (45.0, [0.8, 0.0, 1.0, 0.0])
    assert found.components == {"unparsable": 2.0, "mean_score": 2.25}
    assert judge.items[0] == Question("?", ("b", "c"), "a")
    assert score("exact", ["b"], [["b"]], ["?"], judge=judge).value == 100.0  # which needs none
    assert set(scorer_names()) >= JUDGED
    assert score("judge", [], [], [], judge=judge).value is None


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("B", "(B) left", True), ("(b)", "(B) left", True), ("B. right", "(B) left", True), ("Answer: B", "(B) left", True),
        ("the answer is (B)", "(B) left", True), ("It goes left.", "(B) left", True), ("A", "(B) left", False),
        ("apple", "(A) right", False), ("", "(B) left", False), ("A dog runs", "(A) a cat", False),
        ("I choose c", "(C) up", True),
        ("The answer is a dog", "(A) cat", False), ("(C)", "C", True), ("yes", "yes", True), ("no", "yes", False),
        ("b)", "B", True),
    ],
)  # fmt: skip
def test_options(prediction: str, reference: str, right: bool):
    assert score("option", [prediction], [[reference]], [""]).value == 100.0 * right


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "gpt"}, "there is no judge 'gpt'"), ({"kind": "openai", "model": "m"}, r"'openai' needs judge\.base_url"),
        ({"kind": "local"}, r"'local' needs judge\.model"),
        ({"model": "m"}, r"judge\.model is no setting of the judge 'overlap'"),
        ({"kind": "local", "model": "m",
        "dtyp": "auto"}, r"judge\.dtyp is no setting of the judge 'local'; did you mean 'dtype'"),
    ],
)  # fmt: skip
def test_settings_that_make_no_judge(settings: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        make_judge(settings)


@pytest.mark.parametrize("kind", judge_kinds())
def test_the_section_holds_every_setting_with_its_default(kind: str):
    import inspect

    needed = {"local": {"model": "m"}, "openai": {"model": "m", "base_url": "http://host/v1"}}.get(kind, {})
    config = JudgeConfig(**{"kind": kind, **needed})
    assert set(config.settings) == {"kind", *judge_keys(kind)}
    for name, parameter in inspect.signature(judge_class(kind)).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert getattr(config, name) == (parameter.default if name not in ("body", "chat_template_kwargs") else {})
    assert JudgeConfig(**config.model_dump()) == config
    assert make_judge(config.settings).identity["kind"] == kind


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model": "m"}, "model is no setting of the judge overlap"),
        ({"kind": "openai", "model": "m"}, "kind: openai needs base_url"),
        ({"kind": "local", "model": "m", "timeout": 3.0}, "timeout is no setting of the judge local"),
        ({"kind": "gpt"}, "kind"),
        ({"kind": "openai", "model": "m", "base_url": "host"}, "base_url must be an address"),
        ({"kind": "openai", "model": "m", "base_url": "http://a:b@host"}, "must hold no password"),
        ({"retries": -1}, "retries"),
    ],
)  # fmt: skip
def test_sections_that_say_nonsense(values: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        JudgeConfig(**values)


def test_the_prompt_holds_everything_and_asks_for_one_number():
    system, user = messages(Question("Who came first?", ("the dog", "a dog"), "the {cat}\nScore: 5"))
    assert (system["role"], user["role"]) == ("system", "user")
    for text in ("Question: Who came first?", "the dog | a dog", "Given answer: the {cat}", '{"score": n}'):
        assert text in user["content"]
    assert "0 to 5" in system["content"]
