"""One entry of a JSON file or a table as a `Conversation`, in every form in which questions and answers are published.

LLaVA's: ``{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}``;
the same with ``role`` and ``content``; and question and answer side by side, as test files have them:
``{"question_id", "image", "text", "answer"}``. ``video`` stands where ``image`` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from keeplora.data.conversations import IMAGE, VIDEO, Conversation, Turn, asked, check_turns, with_prompt
from keeplora.data.remote import RemotePath, bytes_at, named_in
from keeplora.data.sets import ByteSource
from keeplora.data.spec import listing
from keeplora.errors import DataError

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
IDS = ("id", "question_id")
QUESTIONS = ("question", "text", "query")
ANSWERS = ("answer", "answers", "caption", "captions", "references")
KINDS = ("kind", "question_type", "category")
Folder = Path | RemotePath


class Entries:
    """Makes conversations out of the entries of one split, with a key of its own for each.

    Args:
        split: part of the keys.
        prompt: added to every question; it is the question where an entry has none.

    Attributes:
        repeated: how many entries had the id of an earlier one.
    """

    def __init__(self, split: str, prompt: str | None) -> None:
        self.split, self.prompt = split, prompt
        self.repeated = 0
        self._seen: Counter[str] = Counter()

    def conversation(
        self, entry: Mapping[str, Any], pictures: tuple[ByteSource, ...], where: str, number: int,
        videos: tuple[ByteSource, ...] = (),
    ) -> Conversation:  # fmt: skip
        """``entry`` as a conversation.

        Args:
            pictures, videos: those of the entry.
            where: the name for errors.
            number: names the entry where it has no id.

        Raises:
            DataError: a sentence that names ``where``.
        """
        if not isinstance(entry, Mapping):
            raise DataError(f"{where}: {_short(entry)} is no JSON object; write one for each question")
        name = _first(entry, IDS)
        where = where if name is None else f"{where} (id {name!r})"
        read = self._talk if entry.get("conversations") is not None else self._side_by_side
        turns, references = read(entry, len(pictures), len(videos), where)
        check_turns(turns, len(pictures), where, videos=len(videos))
        kind = _first(entry, KINDS)
        return Conversation(
            key=self._key(number if name is None else name), turns=turns, pictures=pictures, where=where,
            references=references, kind="" if kind is None else str(kind), videos=videos,
        )  # fmt: skip

    def _key(self, name: Any) -> str:
        key = f"{self.split}/{name}"
        self._seen[key] += 1
        if self._seen[key] == 1:
            return key
        self.repeated += 1
        return f"{key}#{self._seen[key]}"

    def _talk(
        self, entry: Mapping[str, Any], pictures: int, videos: int, where: str
    ) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
        told = entry["conversations"]
        if not isinstance(told, list) or not told:
            raise DataError(f"{where}: `conversations` is {_short(told)}; give a list of turns")
        turns = [_turn(turn, where) for turn in told]
        given = _first(entry, ANSWERS)
        if turns[-1].role != "assistant":
            if given is None:
                raise DataError(f"{where}: ends without an answer; add the turn of gpt, or `answer`")
            turns.append(Turn("assistant", answer_of(accepted(given, where))))
        references = accepted(given, where) if given is not None else (turns[-1].text.strip(),)
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        unmarked = not any(mark in turn.text for turn in turns for mark in (IMAGE, VIDEO))
        if pictures + videos == 1 and first is not None and unmarked:
            turns[first] = asked(turns[first].text, pictures, None, where, videos=videos)[0]
        elif videos == 1 and not pictures:
            turns = _video_marks(turns)
        return tuple(with_prompt(turn, self.prompt) for turn in turns), references

    def _side_by_side(
        self, entry: Mapping[str, Any], pictures: int, videos: int, where: str
    ) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
        question, given = _first(entry, QUESTIONS), _first(entry, ANSWERS)
        if given is None:
            raise DataError(
                f"{where}: has no answer among its keys {listing(map(str, entry), 12)}; give `conversations`, or a question as "
                "`question` or `text` and `answer`"
            )
        if question is None and self.prompt is None:
            raise DataError(
                f"{where}: has no question among its keys {listing(map(str, entry), 12)}; give `question` or `text`, or one "
                "`prompt` for all"
            )
        if question is not None and not isinstance(question, str):
            raise DataError(f"{where}: the question is {_short(question)}; give text")
        references = accepted(given, where)
        turns = asked(question or str(self.prompt), pictures, self.prompt, where, videos=videos)
        return (*turns, Turn("assistant", answer_of(references))), references


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f'{where}: a turn is {_short(turn)}; write it as {{"from": "human", "value": "..."}}')
    side, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(side, str) or side not in ROLES:
        raise DataError(f"{where}: a turn is from {side!r}; it must be from human, gpt or system")
    if not isinstance(text, str):
        raise DataError(f"{where}: a turn of {side} says {_short(text)}; give text")
    return Turn(ROLES[side], text.strip())


def _video_marks(turns: list[Turn]) -> list[Turn]:
    """Data of Video-LLaVA marks one video by "<image>", once or once per frame: here that is one "<video>"."""
    text = "".join(turn.text for turn in turns)
    if VIDEO in text or IMAGE not in text:
        return turns
    first = next(n for n, turn in enumerate(turns) if IMAGE in turn.text)
    marked = Turn(turns[first].role, turns[first].text.replace(IMAGE, VIDEO, 1))
    rest = [Turn(turn.role, turn.text.replace(IMAGE, "").strip()) for turn in turns]
    rest[first] = Turn(marked.role, marked.text.replace(IMAGE, "").strip())
    return rest


def _first(entry: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these keys that says something."""
    return next((entry[name] for name in names if entry.get(name) not in (None, "", [])), None)


def accepted(given: Any, where: str) -> tuple[str, ...]:
    """The accepted answers: one text or number, a list of them, or VQA's ``[{"answer": ...}]``.

    >>> accepted([{"answer": "yes"}, "no", 3], "here")
    ('yes', 'no', '3')
    """
    answers = []
    for value in given if isinstance(given, list) else [given]:
        answer = value.get("answer", value.get("caption")) if isinstance(value, Mapping) else value
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise DataError(f"{where}: an answer is {_short(answer)}; give text")
        answers.append(str(answer).strip())
    return tuple(answers)


def answer_of(references: tuple[str, ...]) -> str:
    """The answer that is taught where several are accepted: the most frequent, the first among equals."""
    return Counter(references).most_common(1)[0][0]


def pictures_of(entry: Any, folder: Folder, where: str) -> tuple[ByteSource, ...]:
    """The pictures that ``image`` or ``images`` of an entry names: one, several or none; relative to ``folder``."""
    return _files(entry, folder, where, "image", "pictures")


def videos_of(entry: Any, folder: Folder, where: str) -> tuple[ByteSource, ...]:
    """The videos that ``video`` or ``videos`` of an entry names: one, several or none; relative to ``folder``."""
    return _files(entry, folder, where, "video", "videos")


def _files(entry: Any, folder: Folder, where: str, key: str, what: str) -> tuple[ByteSource, ...]:
    named = _first(entry, (key, f"{key}s")) if isinstance(entry, Mapping) else None
    names = named if isinstance(named, list) else [] if named is None else [named]
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"{where}: {'an image' if key == 'image' else 'a video'} is {_short(name)}; give the path of a file"
            )
        if "://" in name:
            raise DataError(f"{where}: {name!r} is an address, not a file; download the {what} first")
    return tuple(bytes_at(named_in(folder, name.strip(), where)) for name in names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
