from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from picture_files import encode

from keeplora.data import split_validation
from keeplora.data.conversations import (
    Conversation,
    ConversationSet,
    ConversationTask,
    Turn,
    asked,
    check_turns,
    with_prompt,
)
from keeplora.data.pictures import PictureError
from keeplora.data.sets import HeldBytes
from keeplora.errors import DataError


def about(seed: int, name: str, question: str = "What is it?", answer: str = "a cat", kind: str = "") -> Conversation:
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    return Conversation(name, turns, (HeldBytes(encode(seed)),), f"{name} of a.json", (answer,), kind)


def test_question_and_prompt_are_those_of_the_last_exchange():
    turns = (
        Turn("system", "Be brief."), Turn("user", "<image>\nWhat?"), Turn("assistant", "cat"),
        Turn("user", "Where <image>?"), Turn("assistant", "left"),
    )  # fmt: skip
    told = Conversation("a", turns, (), "a", ("left",))
    assert told.question == "Where ?"
    assert told.prompt_turns == turns[:-1]


def test_a_set_gives_pictures_names_and_kinds():
    kept = ConversationSet([about(1, "a", kind="count"), about(2, "b", kind="colour"), about(3, "c", kind="count")])
    assert len(kept) == 3
    assert kept.keys == ["a", "b", "c"]
    assert kept.labels == [1, 0, 1]
    assert [picture.size for picture in kept.pictures(0)] == [(12, 10)]
    assert kept.where(1) == "b of a.json"
    assert kept.subset([2, 0]).keys == ["c", "a"]


def test_an_unreadable_picture_is_named():
    broken = replace(about(1, "a"), pictures=(HeldBytes(b"no picture"),))
    with pytest.raises(PictureError, match=r"a of a\.json: not a picture"):
        ConversationSet([broken]).pictures(0)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "z"}, {"references": ("a dog",)}, {"pictures": (HeldBytes(encode(9)),)}, {"kind": "k"},
        {"turns": (Turn("user", "<image>\nWhat is that?"), Turn("assistant", "a cat"))},
        {"turns": (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "a dog"))},
    ],
)  # fmt: skip
def test_the_fingerprint_depends_on_everything_that_counts(change: dict[str, Any]):
    one = about(1, "a")
    assert ConversationSet([one]).fingerprint == ConversationSet([replace(one, where="elsewhere")]).fingerprint
    assert ConversationSet([one]).fingerprint != ConversationSet([replace(one, **change)]).fingerprint


def test_the_tasks_fingerprint_depends_on_how_answers_are_judged():
    train, test = ConversationSet([about(1, "a")]), ConversationSet([about(2, "b")])
    task = ConversationTask("t", train, test)
    assert task.kind == "generation"
    others = [
        ConversationTask("t", train, test, scorer="caption"), ConversationTask("t", train, test, max_new_tokens=9),
        ConversationTask("t", train, test, prompt="x"), ConversationTask("t", test, train),
        ConversationTask("t", train, test, validation=test),
    ]  # fmt: skip
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert ConversationTask("other name", train, test).fingerprint == task.fingerprint


def test_questions_about_one_picture_stay_on_one_side():
    kept = ConversationSet([about(n // 2, str(n), f"Question {n}?") for n in range(20)])
    train, validation = split_validation(kept, 0.3, seed=1)
    sides = [{s.digest(i) for i in range(len(s))} for s in (train, validation)]
    assert (len(train), len(validation)) == (14, 6)
    assert not sides[0] & sides[1]
    assert split_validation(kept.subset(range(19, -1, -1)), 0.3, seed=1)[1].keys == validation.keys[::-1]


def test_text_only_conversations_differ_by_what_they_say():
    one = replace(about(1, "a"), pictures=())
    kept = ConversationSet([one, replace(one, key="b"), replace(one, turns=(Turn("user", "Why?"), one.turns[1]))])
    assert kept.digest(0) == kept.digest(1) != kept.digest(2)
    assert kept.pictures(0) == []


def test_asked_puts_pictures_first_unless_their_place_is_marked():
    assert asked(" What? ", 2) == (Turn("user", "<image>\n<image>\nWhat?"),)
    assert asked("Is <image> like <image>?", 2)[0].text == "Is <image> like <image>?"
    assert asked("Why?", 0, "Be brief.")[0].text == "Why?\nBe brief."
    for question, pictures, message in (
        ("Is <image> like it?", 2, "the question: 1 '<image>' in the text but 2 picture"),
        ("Is <image> big?", 0, "1 '<image>' in the text but 0 picture"),
        ("", 1, "is empty"),
        ("<video> what?", 0, r"1 '<video>' in the text but 0 video\(s\)"),
    ):
        with pytest.raises(DataError, match=message):
            asked(question, pictures)


def test_a_prompt_is_added_once():
    once = with_prompt(Turn("user", "How many?"), " Answer with a number.")
    assert once.text == "How many? Answer with a number."
    assert with_prompt(once, "Answer with a number.") == once
    assert with_prompt(Turn("assistant", "3"), "Answer with a number.").text == "3"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("assistant: hello", "turn 1 is the assistant's, but must be the user's"),
        ("user: a|user: b", "turn 2 is the user's, but must be the assistant's"),
        ("user: a|system: b", "turn 2 is the system's"),
        ("system: a|assistant: b", "turn 1 is the assistant's"),
        ("user: a|assistant: <image>", "'<image>' is in a turn of the assistant"),
        ("user: a <video>", r"1 '<video>' in the text but 0 video\(s\)"),
        ("user: <image>", "a turn of the user is empty"),
        ("user: a|assistant:  ", "a turn of the assistant is empty"),
    ],
)
def test_turns_that_no_template_writes_are_refused(turns: str, message: str):
    said = [Turn(*turn.split(": ", 1)) for turn in turns.split("|")]
    with pytest.raises(DataError, match=f"a.json, entry 3: .*{message}"):
        check_turns(said, turns.count("<image>"), "a.json, entry 3")
