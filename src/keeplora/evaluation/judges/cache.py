"""Judgements on disk: asked once, kept as they come, and never asked again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.evaluation.judges.base import HIGHEST, Heard, Judge, JudgeError, Question, Verdict, identity_text
from keeplora.files import read_regular
from keeplora.json_text import MAX_BYTES, parse_json


def judgement_key(identity: Mapping[str, Any], item: Question) -> str:
    """Hex SHA-256 of all that a judgement depends on: the judge (its prompt's version is part of it) and what it is asked."""
    told = json.dumps([identity_text(identity), item.question, list(item.references), item.prediction])
    return hashlib.sha256(told.encode()).hexdigest()


class JudgementCache:
    """A file of judgements, one line of JSON each, only ever added to.

    Every line is on its way to the disk before the next judgement is asked for. A last line that a crash cut short is left
    out, and so is any other line that is no judgement: it is asked again.

    Args:
        path: made with its folder at the first judgement.

    Attributes:
        damaged: lines that could not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._known: dict[str, Verdict] = {}
        try:
            data = read_regular(self.path, MAX_BYTES)
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise KeepLoraError(
                f"{self.path}: cannot be read ({error.strerror or error}); mend it or move it away"
            ) from error
        for line in data.splitlines():
            found = _read(line)
            if found is None:
                self.damaged += bool(line.strip())
            else:
                self._known[found[0]] = found[1]
        self._torn = bool(data) and not data.endswith(b"\n")

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Verdict | None:
        return self._known.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a judgement, unless there is one under that key."""
        if key in self._known:
            return
        line = json.dumps({"key": key, "score": verdict.score, "text": verdict.text}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: a crash, or a second run beside this one, cannot mix two lines.
        with open(self.path, "ab", buffering=0) as handle:
            handle.write((b"\n" if self._torn else b"") + line.encode())
        self._torn = False
        self._known[key] = verdict


def _read(line: bytes) -> tuple[str, Verdict] | None:
    try:
        row = parse_json(line.decode("utf-8"))
        key, score, text = row["key"], row["score"], row["text"]
    except (ValueError, KeyError, TypeError):
        return None
    fits = isinstance(key, str) and isinstance(text, str) and type(score) in (int, type(None))
    return (key, Verdict(score, text)) if fits and (score is None or 0 <= score <= HIGHEST) else None


class CachedJudge:
    """A judge whose judgements are kept in ``cache``; what is known there, or asked twice at once, is asked once."""

    def __init__(self, judge: Judge, cache: JudgementCache) -> None:
        self.inner, self.cache = judge, cache
        self.identity: Mapping[str, Any] = judge.identity

    def judge(self, items: Sequence[Question], heard: Heard | None = None) -> list[Verdict]:
        verdicts: list[Verdict] = [Verdict(None)] * len(items)
        waiting: dict[str, list[int]] = {}

        def tell(place: int, verdict: Verdict) -> None:
            verdicts[place] = verdict
            if heard is not None:
                heard(place, verdict)

        for place, item in enumerate(items):
            key = judgement_key(self.identity, item)
            if (known := self.cache.get(key)) is not None:
                tell(place, known)
            else:
                waiting.setdefault(key, []).append(place)
        order = list(waiting)

        def keep(number: int, verdict: Verdict) -> None:
            self.cache.put(order[number], verdict)
            for place in waiting[order[number]]:
                tell(place, verdict)

        if order:
            try:
                self.inner.judge([items[waiting[key][0]] for key in order], keep)
            except JudgeError as error:
                raise JudgeError(
                    f"{error}. The {len(self.cache):,} judgements so far are kept in {self.cache.path}: mend that and go on with "
                    "`keeplora resume`, which asks only for the rest"
                ) from error
        return verdicts

    def close(self) -> None:
        self.inner.close()
