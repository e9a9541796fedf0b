"""The judge behind an address, against a real server on this machine that misbehaves on demand."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keeplora.errors import ConfigError
from keeplora.evaluation.judges import Judge, JudgeError, JudgementCache, Question, Verdict, endpoint, make_judge
from tests.evaluation.judges.fake_server import KEY, FakeServer, Misdeed, says

RIGHT, WRONG = Question("How many dogs?", ("two",), "two"), Question("How many cats?", ("two",), "three")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def judge_of(server: FakeServer, cache: Path | None = None, **settings: object) -> Judge:
    given = {"kind": "openai", "model": "judge-30b", "base_url": server.url, "retries": 3, "timeout": 5.0, **settings}
    return make_judge(given, cache)


def many(count: int) -> list[Question]:
    return [Question(f"What is shown in clip {n}?", ("a dog",), "a dog" if n % 2 else "a cat") for n in range(count)]


def test_it_speaks_the_protocol(server: FakeServer):
    judge = judge_of(server, base_url=f"{server.url}/", body={"seed": 7, "max_tokens": None})
    assert judge.judge([RIGHT, WRONG]) == [Verdict(5, '{"score": 5}'), Verdict(1, '{"score": 1}')]
    headers, body = server.requests[0]
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers
    assert {key: body[key] for key in ("model", "temperature", "seed")} == {
        "model": "judge-30b",
        "temperature": 0,
        "seed": 7,
    }
    assert "max_tokens" not in body
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    "misdeed",
    [
        Misdeed(500), Misdeed(503, b"<html>"), Misdeed(429, b'{"error": {"message": "slow down"}}'), Misdeed(hang_up=True),
        Misdeed(body=b"{not json"), Misdeed(body=b"{}"), Misdeed(body=b'{"choices": []}'), Misdeed(body=b"[]"),
        Misdeed(body=b'{"choices": [{"message": {"content": 4}}]}'), Misdeed(body=b'{"choices": ["4"]}'),
        Misdeed(body=says("")), Misdeed(body=says(None)), Misdeed(body=says('{"score": 5}'), cut=9), Misdeed(body=b"\xff"),
        Misdeed(429, headers={"Retry-After": "soon"}), Misdeed(body=b"[" * 5000),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again(server: FakeServer, misdeed: Misdeed):
    server.misdeeds = [misdeed, misdeed]
    assert judge_of(server).judge([RIGHT])[0].score == 5
    assert len(server.requests) == 3


def test_a_server_that_does_not_answer_in_time_is_asked_again(server: FakeServer):
    server.misdeeds = [Misdeed(delay=1.0)]
    started = time.monotonic()
    assert judge_of(server, timeout=0.2).judge([RIGHT])[0].score == 5
    assert time.monotonic() - started < 0.9
    server.misdeeds = [Misdeed(delay=1.0)]
    with pytest.raises(JudgeError, match=r"no answer within 0\.2 s"):
        judge_of(server, timeout=0.2, retries=0).judge([RIGHT])


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_everyone_waits_as_long_as_the_server_asks(server: FakeServer, form: str):
    # A date has whole seconds: two ahead is at least one.
    value = "0.4" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.misdeeds = [Misdeed(429, headers={"Retry-After": value})]
    verdicts = judge_of(server, concurrency=1).judge(many(2))
    assert [verdict.score for verdict in verdicts] == [1, 5]
    assert server.times[1] - server.times[0] >= (0.4 if form == "seconds" else 0.9)


def test_others_wait_too(server: FakeServer):
    server.misdeeds = [Misdeed(429, headers={"Retry-After": "0.5"})]
    judge_of(server, concurrency=2).judge(many(6))
    later = [when - server.times[0] for when in server.times[1:]]
    assert sum(when >= 0.45 for when in later) >= 4  # all but what was under way already: one, or two on a busy machine


def test_a_wait_that_is_too_long_is_told(server: FakeServer):
    server.misdeeds = [Misdeed(429, b'{"error": {"message": "quota"}}', headers={"Retry-After": "86400"})]
    with pytest.raises(JudgeError, match=r"status 429 \(quota\); it asks to wait for 86,400 s, longer than max_wait"):
        judge_of(server).judge([RIGHT])
    assert len(server.requests) == 1


def test_pauses_double_with_jitter(server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 1.0)
    for attempt, most in enumerate((1, 2, 4, 8, 16, 32, 60, 60)):
        pauses = [endpoint.pause_after(attempt) for _ in range(50)]
        assert all(most / 2 <= pause <= most for pause in pauses)
        assert max(pauses) - min(pauses) > most / 4
    taken: list[int] = []
    monkeypatch.setattr(endpoint, "pause_after", lambda attempt: taken.append(attempt) or 0.05)
    server.misdeeds = [Misdeed(500)] * 3
    judge_of(server).judge([RIGHT])
    assert taken == [0, 1, 2]
    assert server.times[3] - server.times[0] >= 0.15


def test_an_answer_that_stays_empty_is_unparsable(server: FakeServer):
    server.always = lambda question: Misdeed(body=says(None)) if "cats" in question else None
    assert judge_of(server).judge([RIGHT, WRONG]) == [Verdict(5, '{"score": 5}'), Verdict(None, "")]
    assert len(server.requests) == 1 + 4


def test_words_without_a_rating_are_not_asked_for_again(server: FakeServer):
    server.answer = lambda question: "They agree."
    assert judge_of(server).judge([RIGHT]) == [Verdict(None, "They agree.")]
    assert len(server.requests) == 1


def test_the_form_in_parts_is_read(server: FakeServer):
    server.misdeeds = [Misdeed(body=says([{"type": "text", "text": "Score: "}, {"type": "text", "text": "3"}]))]
    assert judge_of(server).judge([RIGHT]) == [Verdict(3, "Score: 3")]


@pytest.mark.parametrize(
    ("misdeed", "told"),
    [
        (Misdeed(400, b'{"error": {"message": "too many tokens"}}'), r"status 400 \(too many tokens\)$"),
        (Misdeed(404, b'{"error": "no model judge-30b"}'), r"404 \(no model judge-30b\); check base_url"),
        (Misdeed(403), "status 403; it wants a key: name its variable as api_key_env"),
        (Misdeed(301, headers={"Location": "http://127.0.0.1:9/v1"}), "status 301: it lies at another address"),
        (Misdeed(200, b"x" * (5 << 20)), "the answer is longer than"),
    ],
)
def test_what_does_not_pass_ends_the_judging(server: FakeServer, misdeed: Misdeed, told: str):
    server.always = lambda question: misdeed
    with pytest.raises(JudgeError, match=told):
        judge_of(server, retries=0 if misdeed.status == 200 else 3).judge([RIGHT])
    assert len(server.requests) == 1


def test_nobody_there(server: FakeServer):
    with pytest.raises(
        JudgeError, match=r"'judge-30b' at http://127\.0\.0\.1:9/v1/chat/completions cannot be asked .*no connection"
    ):
        judge_of(server, base_url="http://127.0.0.1:9/v1", retries=1).judge([RIGHT])


def test_after_a_failure_the_judgements_are_kept_and_only_the_rest_is_asked(server: FakeServer, tmp_path: Path):
    file = tmp_path / "run" / "judgements.jsonl"
    asked = many(20)
    down = [True]
    server.always = lambda question: Misdeed(500) if down[0] and "clip 12?" in question else None
    with pytest.raises(JudgeError) as raised:
        judge_of(server, file, concurrency=2, retries=1).judge(asked)
    told = str(raised.value)
    kept = len(file.read_text().splitlines())
    assert 11 <= kept < 20
    assert "status 500 (after 2 attempts)" in told
    assert told.endswith(
        f"The {kept} judgements so far are kept in {file}: mend that and go on with `keeplora resume`, which asks only for "
        "the rest"
    )
    down[0] = False
    server.requests.clear()
    verdicts = judge_of(server, file).judge(asked)
    assert [verdict.score for verdict in verdicts] == [1, 5] * 10
    assert len(server.requests) == 20 - kept
    server.requests.clear()
    assert judge_of(server, file).judge(asked) == verdicts
    assert server.requests == []


def test_no_more_at_once_than_allowed_but_as_many(server: FakeServer):
    server.slow = 0.05
    verdicts = judge_of(server, concurrency=3).judge(many(12))
    assert [verdict.score for verdict in verdicts] == [1, 5] * 6
    assert server.busiest == 3


def test_the_key_is_sent_and_never_told(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.key = KEY
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = judge_of(server, tmp_path / "kept.jsonl", api_key_env="JUDGE_KEY")
    assert judge.judge([RIGHT])[0].score == 5
    assert KEY not in json.dumps(dict(judge.identity)) + (tmp_path / "kept.jsonl").read_text()
    server.key = "another"
    with pytest.raises(
        JudgeError, match=r"Incorrect API key provided: Bearer \*\*\*\); the key in JUDGE_KEY is refused"
    ) as raised:
        judge_of(server, api_key_env="JUDGE_KEY").judge([WRONG])
    seen, error = [], raised.value
    while error is not None:
        seen.append(str(error))
        error = error.__cause__ or error.__context__
    assert KEY not in "".join(seen)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="names the environment variable JUDGE_KEY, which is not set"):
        judge_of(server, api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="the key in JUDGE_KEY holds blanks"):
        judge_of(server, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://here/v1", "http://me:secret@host/v1", "https://host/v1?key=secret"]
)
def test_addresses_that_cannot_be_used(url: str):
    with pytest.raises(ConfigError, match=r"judge\.base_url") as raised:
        make_judge({"kind": "openai", "model": "m", "base_url": url})
    assert "secret" not in str(raised.value)


def test_the_address_is_not_the_judge_but_what_is_asked_is(server: FakeServer):
    first, moved = judge_of(server).identity, judge_of(server, base_url="https://elsewhere/v1", timeout=9.0).identity
    assert first == moved
    for change in ({"model": "judge-7b"}, {"max_tokens": 9}, {"body": {"seed": 1}}):
        assert judge_of(server, **change).identity != first


def test_letters_that_utf8_cannot_hold(server: FakeServer):
    odd = Question("Was steht da?", ("schön 猫",), "sch\ud800ön")
    assert judge_of(server).judge([odd])[0].score == 1
    assert "Given answer: sch\ufffdön" in server.questions[0]
    assert "schön 猫" in server.questions[0]


def test_a_cache_of_another_judge_says_nothing(server: FakeServer, tmp_path: Path):
    cache = JudgementCache(tmp_path / "kept.jsonl")
    judge_of(server, tmp_path / "kept.jsonl").judge([RIGHT])
    judge_of(server, tmp_path / "kept.jsonl", model="judge-7b").judge([RIGHT])
    assert len(server.requests) == 2
    assert len(cache) == 0
    assert len(JudgementCache(tmp_path / "kept.jsonl")) == 2
