"""What a judge is asked and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from keeplora.errors import KeepLoraError

#: The highest rating; the lowest is 0.
HIGHEST = 5


class JudgeError(KeepLoraError):
    """A judge that cannot be asked, or no longer answers; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Question:
    """One answer to be judged.

    Attributes:
        question: what was asked.
        references: the accepted answers, at least one.
        prediction: what the model answered.
    """

    question: str
    references: tuple[str, ...]
    prediction: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said of one answer.

    Attributes:
        score: 0 (no match) to 5 (the same meaning); None where the judge's words hold no such number.
        text: the judge's words as they came.
    """

    score: int | None
    text: str = ""

    @property
    def unparsable(self) -> bool:
        """Whether the words hold no rating; it then counts as 0."""
        return self.score is None

    @property
    def points(self) -> int:
        """The rating that counts, 0 to 5."""
        return self.score or 0


#: Told each verdict as soon as there is one: ``heard(position in the questions, verdict)``, in the thread that asked.
Heard = Callable[[int, Verdict], object]


class Judge(Protocol):
    """Rates answers from 0 to 5.

    Attributes:
        identity: what its ratings depend on, as JSON; judgements of different identities are never mixed.
    """

    identity: Mapping[str, Any]

    def judge(self, items: Sequence[Question], heard: Heard | None = None) -> list[Verdict]:
        """The verdicts, in the order of ``items``.

        Raises:
            JudgeError: it cannot be asked; what it said until then went to ``heard``.
        """
        ...

    def close(self) -> None:
        """Let go of models and connections; the judge may be asked again."""
        ...


def whole_text(text: str) -> str:
    """``text`` as UTF-8 can hold it: halves of surrogate pairs, which a tokenizer may produce, become U+FFFD."""
    return _HALF.sub("\ufffd", text)


_HALF = re.compile("[\ud800-\udfff]")


def identity_text(identity: Mapping[str, Any]) -> str:
    """``identity`` as text that is the same on every machine."""
    return json.dumps(identity, sort_keys=True, allow_nan=False)
