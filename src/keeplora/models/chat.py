"""Conversations as the model's own chat template writes them, and where in the text its answers stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from keeplora.errors import DataError, KeepLoraError

IMAGE, VIDEO = "<image>", "<video>"
MARKS = re.compile(f"({IMAGE}|{VIDEO})")
_TYPES = {IMAGE: "image", VIDEO: "video"}
_NAMES = {IMAGE: "picture", VIDEO: "video"}


class Turn(Protocol):
    """One turn of a conversation: `role` is system, user or assistant; "<image>" and "<video>" in `text` mark the places
    of pictures and videos."""

    @property
    def role(self) -> str: ...
    @property
    def text(self) -> str: ...


Span = tuple[int, int]


class ChatFormat:
    """A chat template, asked once how it writes an answer.

    The template is rendered with a stand-in for every answer, and the answers are put in afterwards: a template may trim
    or move what it is given, yet where each answer begins and ends is known to the character. What is trained on is
    always the prompt that `generate` gets (`add_generation_prompt=True`) followed by the answer and its end token, also
    for templates that write a finished turn differently from an opened one (LLaVA-OneVision: "assistant \\n").

    Args:
        tokenizer: whose `apply_chat_template` renders.
        template: the Jinja text.
        reserved: the class's own placeholder tokens, refused in texts.
        name: the model's, for error messages.

    Attributes:
        lead: what stands between the opened turn and the answer ("ASSISTANT:" + " " + answer); trained with it.
        end: the token that ends an answer. A template that writes none (LLaVA-1.5) gets the tokenizer's end token after
            every answer, as LLaVA-1.5 was taught; without it the model would never learn to stop.
    """

    def __init__(self, tokenizer: Any, template: str, *, reserved: Sequence[str] = (), name: str = "the model") -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.reserved = tuple(token for token in reserved if token and token not in (IMAGE, VIDEO))
        self._study()

    def _study(self) -> None:
        asked, mark = [{"role": "user", "content": [{"type": "text", "text": "a"}]}], _mark(0)
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": mark}]}]
        opened, whole = self._apply(asked, True), self._apply(answered, False)
        if whole.count(mark) != 1:
            raise KeepLoraError(
                f"{self.name}: its chat template does not write the assistant's text once, so there is nothing to train on; "
                "mend chat_template.jinja in the model's folder"
            )
        before, _, tail = whole.partition(mark)
        self.lead = before[len(opened) :] if before.startswith(opened) else ""
        specials = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        first = re.match(r"\s*(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")", tail)
        self._written = first.group(0) if first and specials else None
        if self._written is None and self.tokenizer.eos_token is None:
            raise KeepLoraError(
                f"{self.name}: neither its chat template nor its tokenizer has a token that ends an answer"
            )
        self.end: str = self.tokenizer.eos_token if self._written is None else first.group(1)  # type: ignore[union-attr]
        self._tail = self._written if self._written is not None else tail[: len(tail) - len(tail.lstrip())]

    def _apply(self, messages: list[dict[str, Any]], opened: bool, where: str = "") -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # a template is a program of the model's author and raises what it likes
            raise DataError(
                f"{where or self.name}: the chat template of {self.name} does not take this conversation: {error}"
            ) from error

    def prompt(self, turns: Sequence[Turn], where: str = "") -> tuple[str, list[Span]]:
        """The text up to where the next answer begins, and the earlier answers' places in it."""
        answers = [turn.text.strip() for turn in turns if turn.role == "assistant"]
        numbers = iter(range(len(turns)))
        messages = [
            {"role": turn.role, "content": [{"type": "text", "text": _mark(next(numbers))}]}
            if turn.role == "assistant"
            else {"role": turn.role, "content": self._content(turn.text, where)}
            for turn in turns
        ]
        text, rest, spans = "", self._apply(messages, True, where), []
        for i, answer in enumerate(answers):
            head, found, rest = rest.partition(_mark(i))
            if not found:
                raise DataError(f"{where or self.name}: the chat template of {self.name} leaves out an earlier answer")
            text += head
            start = len(text) - (len(self.lead) if self.lead and head.endswith(self.lead) else 0)
            rest = rest.removeprefix(self._tail)
            text += answer + (self._written or self.end)
            spans.append((start, len(text)))
        return text + rest, spans

    def whole(self, turns: Sequence[Turn], where: str = "") -> tuple[str, list[Span]]:
        """The text of a conversation that ends with an answer, and every answer's place in it, end token included."""
        text, spans = self.prompt(turns[:-1], where)
        answer = self.lead + turns[-1].text.strip() + (self._written or self.end)
        return text + answer, [*spans, (len(text), len(text) + len(answer))]

    def _content(self, text: str, where: str) -> list[dict[str, str]]:
        """A turn's text, pictures and videos in order; a line break beside a mark, as LLaVA's data has it, is the mark's."""
        for token in self.reserved:
            if token in text:
                raise DataError(
                    f"{where or self.name}: the text holds {token!r}, which {self.name} reads as a picture or video; remove it, "
                    f"or write {IMAGE} where a picture and {VIDEO} where a video goes"
                )
        parts: list[dict[str, str]] = []
        for piece in MARKS.split(text.strip()):
            if piece in _TYPES:
                parts.append({"type": _TYPES[piece]})
            elif piece := piece.strip("\n"):
                parts.append({"type": "text", "text": piece})
        return parts

    def writes(self, token: str) -> bool:
        """Whether the template writes a video as the placeholder `token`."""
        shown = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}]
        try:
            return self._apply(shown, True).count(token) == 1
        except DataError:
            return False


def _mark(number: int) -> str:
    # Private-use characters: no template and no tokenizer's special token has them.
    return f"\ue000{number}\ue001"


def check_turns(turns: Sequence[Turn], pictures: int, where: str, *, answers: bool, videos: int = 0) -> None:
    """Refuse a conversation that cannot be learned or asked, naming it by `where`."""
    if not turns:
        raise DataError(f"{where}: the conversation is empty")
    if answers and turns[-1].role != "assistant":
        raise DataError(f"{where}: the last turn is the {turns[-1].role}'s; there is no answer to learn")
    for i, turn in enumerate(turns):
        if turn.role not in ("system", "user", "assistant"):
            raise DataError(f"{where}: turn {i + 1} has role {turn.role!r}; use system, user or assistant")
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"{where}: turn {i + 1}, an answer, is empty; leave the sample out or give it a text")
        if turn.role == "assistant" and (mark := MARKS.search(turn.text)):
            raise DataError(
                f"{where}: turn {i + 1}, an answer, holds {mark.group()}; only questions can show a "
                f"{_NAMES[mark.group()]}"
            )
    for mark, given in ((IMAGE, pictures), (VIDEO, videos)):
        marks = sum(turn.text.count(mark) for turn in turns)
        if marks != given:
            name = _NAMES[mark]
            raise DataError(
                f"{where}: {marks} {mark} in the text but {given} {name}{'' if given == 1 else 's'}; there must be one "
                f"{mark} per {name}"
            )


def shift(position: int, placed: Sequence[Mapping[str, Any]]) -> int:
    """Where a character of the text stands after the placeholders before it have been drawn out."""
    ends = [place for place in placed if place["span"][1] <= position]
    return position + (ends[-1]["new_span"][1] - ends[-1]["span"][1] if ends else 0)


def overlap(offsets: Tensor, start: int, end: int) -> Tensor:
    """Which tokens, of which `offsets` [T, 2] gives the characters, share one with the span: bool [T]."""
    return (offsets[:, 0] < end) & (offsets[:, 1] > start)


def before(answer: str, stop: Sequence[str]) -> str:
    """The answer up to the first of the texts in `stop`."""
    return answer[: min((answer.find(s) for s in stop if s in answer), default=len(answer))]
