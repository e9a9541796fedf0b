"""Judgements on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from keeplora.errors import KeepLoraError
from keeplora.evaluation.judges import CachedJudge, JudgeError, JudgementCache, Question, Verdict, judgement_key


class Counting:
    """Rates by the prediction's length and remembers what it was asked; dies after ``most`` ratings."""

    def __init__(self, most: int = 100, **identity: Any) -> None:
        self.identity = {"kind": "counting", **identity}
        self.asked: list[Question] = []
        self.most = most

    def judge(self, items: Sequence[Question], heard: Any = None) -> list[Verdict]:
        verdicts = []
        for place, item in enumerate(items):
            if len(self.asked) == self.most:
                raise JudgeError("it is gone")
            self.asked.append(item)
            verdicts.append(
                Verdict(len(item.prediction) if len(item.prediction) < 6 else None, f'{item.prediction}\n"é\u2028')
            )
            heard(place, verdicts[-1])
        return verdicts

    def close(self) -> None: ...


def asked(*predictions: str) -> list[Question]:
    return [Question("how?", ("so",), prediction) for prediction in predictions]


def test_nothing_is_asked_twice(tmp_path: Path):
    file, judge, told = tmp_path / "a" / "kept.jsonl", Counting(), []
    items = asked("abc", "a", "abc", "too long a word")
    verdicts = CachedJudge(judge, JudgementCache(file)).judge(
        items, lambda place, verdict: told.append((place, verdict.score))
    )
    assert [verdict.score for verdict in verdicts] == [3, 1, 3, None]
    assert sorted(told) == [(0, 3), (1, 1), (2, 3), (3, None)]
    assert [item.prediction for item in judge.asked] == ["abc", "a", "too long a word"]
    again = Counting()
    assert CachedJudge(again, JudgementCache(file)).judge(items) == verdicts
    assert again.asked == []
    assert CachedJudge(again, JudgementCache(file)).judge([*items, *asked("ab")])[-1].score == 2
    assert [item.prediction for item in again.asked] == ["ab"]
    assert len(file.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("cut", [1, 5, 60, 100])
def test_a_last_line_that_was_cut_is_asked_again_and_hurts_no_other(tmp_path: Path, cut: int):
    file = tmp_path / "kept.jsonl"
    CachedJudge(Counting(), JudgementCache(file)).judge(asked("a", "ab", "abc"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    judge = Counting()
    verdicts = CachedJudge(judge, JudgementCache(file)).judge(asked("a", "ab", "abc", "abcd"))
    assert [verdict.score for verdict in verdicts] == [1, 2, 3, 4]
    assert [item.prediction for item in judge.asked] == (["abcd"] if cut == 1 else ["abc", "abcd"])
    assert len(JudgementCache(file)) == 4


def test_lines_that_are_no_judgements_are_left_out(tmp_path: Path):
    file = tmp_path / "kept.jsonl"
    key = judgement_key({"kind": "counting"}, asked("a")[0])
    rows = [{"key": key, "score": score, "text": ""} for score in (7, -1, 2.5, True, "3")]
    file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in [*rows, 5, {"key": key}]) + b"\xff\n\n")
    cache = JudgementCache(file)
    assert (len(cache), cache.damaged) == (0, 8)
    assert CachedJudge(Counting(), cache).judge(asked("a"))[0].score == 1


def test_what_was_said_before_a_failure_is_on_disk(tmp_path: Path):
    file = tmp_path / "kept.jsonl"
    with pytest.raises(JudgeError, match=r"it is gone\. The 2 judgements so far are kept in .*keeplora resume"):
        CachedJudge(Counting(most=2), JudgementCache(file)).judge(asked("a", "ab", "abc"))
    judge = Counting()
    CachedJudge(judge, JudgementCache(file)).judge(asked("a", "ab", "abc"))
    assert [item.prediction for item in judge.asked] == ["abc"]


def test_a_key_depends_on_everything_that_the_judge_is_asked():
    item = Question("q", ("r", "s"), "p")
    key = judgement_key({"kind": "a", "n": 1}, item)
    assert key == judgement_key({"n": 1, "kind": "a"}, Question("q", ("r", "s"), "p"))
    others = [
        judgement_key({"kind": "a", "n": 2}, item), judgement_key({"kind": "a", "n": 1}, Question("Q", ("r", "s"), "p")),
        judgement_key({"kind": "a", "n": 1}, Question("q", ("s", "r"), "p")),
        judgement_key({"kind": "a", "n": 1}, Question("q", ("r",), "s p")),
        judgement_key({"kind": "a", "n": 1}, Question("q", ("r", "s"), "p ")),
    ]  # fmt: skip
    assert len({key, *others}) == 6


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(KeepLoraError, match="cannot be read"):
        JudgementCache(tmp_path)
