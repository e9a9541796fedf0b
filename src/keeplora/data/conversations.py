"""Questions about pictures and videos and their answers: what a generative model is taught and asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from keeplora.data.pictures import DEFAULT_MAX_PIXELS, decode_picture
from keeplora.data.remote import RemoteBytes
from keeplora.data.sets import ByteSource, FileBytes
from keeplora.data.video import Clip, FrameCache, Sampling, decode_clip, video_digest
from keeplora.errors import DataError

if TYPE_CHECKING:
    from keeplora.data.streams import SampleStream

IMAGE, VIDEO = "<image>", "<video>"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says.

    Attributes:
        role: "system", "user" or "assistant".
        text: "<image>" in it (of a user's turn) marks where a picture goes, "<video>" where a video goes.
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns about pictures and videos; the last turn is the assistant's.

    Attributes:
        key: stable name, the same on every machine (part of the fingerprint).
        turns: a system turn may come first, then user and assistant by turns.
        pictures: one for each "<image>", in order.
        where: the name for errors, e.g. a file and the number of the entry.
        references: the accepted answers to the last question, at least one; captions have several.
        kind: the sort of question, for stratified samples; "" where the source does not tell.
        digests: hex SHA-256 of the bytes of the pictures, then of the videos; empty until they are read.
        videos: one for each "<video>", in order.

    >>> asked = Conversation("1", (Turn("user", "<image>\\nWhat is it?"), Turn("assistant", "a cat")), (), "a.json", ("a cat",))
    >>> asked.question, len(asked.prompt_turns)
    ('What is it?', 1)
    """

    key: str
    turns: tuple[Turn, ...]
    pictures: tuple[ByteSource, ...]
    where: str
    references: tuple[str, ...]
    kind: str = ""
    digests: tuple[str, ...] = ()
    videos: tuple[ByteSource, ...] = ()

    @property
    def question(self) -> str:
        """The last user turn without its pictures' and videos' marks."""
        text = next(turn.text for turn in reversed(self.turns) if turn.role == "user")
        return text.replace(IMAGE, "").replace(VIDEO, "").strip()

    @property
    def prompt_turns(self) -> tuple[Turn, ...]:
        """The turns without the last answer."""
        return self.turns[:-1]


class ConversationSet:
    """Conversations whose pictures and videos are decoded when asked for and never kept.

    Args:
        conversations: keys must differ.
        max_pixels: larger pictures are refused.
        skipped: conversations of a test whose files cannot be read (``on_error: skip``): each scores 0.
    """

    def __init__(
        self, conversations: Sequence[Conversation], *, max_pixels: int = DEFAULT_MAX_PIXELS,
        skipped: Sequence[Conversation] = (),
    ) -> None:  # fmt: skip
        self.conversations = list(conversations)
        self.max_pixels = max_pixels
        self.skipped = list(skipped)
        number = {kind: n for n, kind in enumerate(sorted({c.kind for c in self.conversations}))}
        #: the number of each conversation's kind
        self.labels: list[int] = [number[c.kind] for c in self.conversations]
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    def __repr__(self) -> str:
        return f"ConversationSet({len(self)} conversations)"

    @property
    def keys(self) -> list[str]:
        """Stable names of the conversations."""
        return [conversation.key for conversation in self.conversations]

    @property
    def has_videos(self) -> bool:
        return any(conversation.videos for conversation in self.conversations)

    def conversation(self, index: int) -> Conversation:
        return self.conversations[index]

    def where(self, index: int) -> str:
        """The name of conversation ``index`` for a message to a person."""
        return self.conversations[index].where

    def pictures(self, index: int) -> list[Image.Image]:
        """The pictures of conversation ``index``, upright RGB; see `decode_picture`."""
        conversation = self.conversations[index]
        return [
            decode_picture(source.read(), picture_name(source, conversation.where), max_pixels=self.max_pixels)
            for source in conversation.pictures
        ]

    def clips(self, index: int, sampling: Sampling, cache: FrameCache | None = None) -> list[Clip]:
        """Frames of the videos of conversation ``index``; see `keeplora.data.video.decode_clip`."""
        conversation = self.conversations[index]
        decode = decode_clip if cache is None else cache.get
        return [
            decode(source, picture_name(source, conversation.where), sampling, max_pixels=self.max_pixels)
            for source in conversation.videos
        ]

    def digest(self, index: int) -> str:
        """Hex SHA-256 over the files of conversation ``index`` (over its turns where it has none).

        Conversations about the same pictures and videos have the same one, so that a split can keep them on one side.
        """
        conversation = self.conversations[index]
        told = list(file_digests(conversation)) or [[turn.role, turn.text] for turn in conversation.turns]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over every conversation's key, turns, references and files, in order; computed once.

        A skipped conversation is in it too, by its key: a test with fewer readable files is another test.
        """
        if self._fingerprint is None:
            total = hashlib.sha256()
            for c in self.conversations:
                turns = [[turn.role, turn.text] for turn in c.turns]
                line = [c.key, c.kind, turns, list(c.references), list(file_digests(c))]
                total.update(json.dumps(line).encode() + b"\n")
            for c in self.skipped:
                total.update(json.dumps(["skipped", c.key]).encode() + b"\n")
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def subset(self, indices: Sequence[int]) -> ConversationSet:
        """The conversations at ``indices``, in that order, and none of the skipped."""
        return ConversationSet([self.conversations[i] for i in indices], max_pixels=self.max_pixels)


@dataclass(slots=True)
class ConversationTask:
    """One task of questions and answers, ready to be learned; a probe has an empty ``train``.

    Attributes:
        name: the task's name.
        train, test, validation: the conversations; validation is None unless asked for.
        scorer: the name of the score that judges answers.
        max_new_tokens: the longest answer that is generated.
        prompt: the instruction that was added to every question, or None.
        warnings: sentences a person should read; nothing was refused.
        licence: what the source states, if anything.
    """

    kind: ClassVar[str] = "generation"

    name: str
    train: ConversationSet | SampleStream
    test: ConversationSet
    validation: ConversationSet | None = None
    scorer: str = "exact"
    max_new_tokens: int = 32
    prompt: str | None = None
    warnings: list[str] = field(default_factory=list)
    licence: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the three sets and how answers are judged: equal means the same task, whatever its name."""
        sets = [s.fingerprint if s is not None else None for s in (self.train, self.test, self.validation)]
        text = json.dumps([self.scorer, self.max_new_tokens, self.prompt, sets])
        return hashlib.sha256(text.encode()).hexdigest()


def picture_name(source: ByteSource, where: str) -> str:
    """The name of a picture for a message: its file's, where it has one."""
    return f"{source.path} ({where})" if isinstance(source, FileBytes | RemoteBytes) else where


def file_digests(conversation: Conversation) -> tuple[str, ...]:
    """Hex SHA-256 of the bytes of each picture and video; read now where they are not known yet."""
    if len(conversation.digests) == len(conversation.pictures) + len(conversation.videos):
        return conversation.digests
    pictures = [hashlib.sha256(source.read()).hexdigest() for source in conversation.pictures]
    return (*pictures, *map(video_digest, conversation.videos))


def asked(
    question: str, pictures: int, prompt: str | None = None, where: str = "the question", *, videos: int = 0
) -> tuple[Turn, ...]:
    """A question as a conversation of one turn; without marks in it pictures and videos come first, as LLaVA has them.

    Args:
        question: text; each "<image>" or "<video>" in it marks the place of a picture or a video.
        pictures, videos: how many there are.
        prompt: an instruction to be added; see `with_prompt`.
        where: the name for errors.

    Raises:
        DataError: there are marks, but not as many as pictures and videos; or the question is empty.

    >>> asked("What is it?", 1)[0].text
    '<image>\\nWhat is it?'
    """
    turn = Turn("user", question.strip())
    for mark, count in ((VIDEO, videos), (IMAGE, pictures)):
        if mark not in turn.text:
            turn = Turn("user", f"{mark}\n" * count + turn.text)
    check_turns((turn,), pictures, where, videos=videos)
    return (with_prompt(turn, prompt),)


def with_prompt(turn: Turn, prompt: str | None) -> Turn:
    """A user's turn with the instruction on a line of its own (after a space where ``prompt`` begins with one), once.

    >>> with_prompt(Turn("user", "How many?"), "Answer with a number.").text
    'How many?\\nAnswer with a number.'
    """
    if not prompt or turn.role != "user" or turn.text.endswith(prompt.strip()):
        return turn
    return Turn(turn.role, turn.text + (prompt.rstrip() if prompt[0].isspace() else f"\n{prompt.rstrip()}"))


def check_turns(turns: Sequence[Turn], pictures: int, where: str, *, videos: int = 0) -> None:
    """Refuse turns that no chat template could write, and marks that do not fit the pictures and videos.

    Raises:
        DataError: a sentence that names ``where``.
    """
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    for number, turn in enumerate(talk):
        due = "assistant" if number % 2 else "user"
        if turn.role != due:
            raise DataError(
                f"{where}: turn {number + 1} is the {turn.role}'s, but must be the {due}'s; let user and assistant take turns, "
                "the user first"
            )
    for turn in turns:
        for mark in (IMAGE, VIDEO):
            if turn.role != "user" and mark in turn.text:
                raise DataError(
                    f"{where}: {mark!r} is in a turn of the {turn.role}; it can stand in the user's turns alone"
                )
        if not turn.text.replace(IMAGE, "").replace(VIDEO, "").strip():
            raise DataError(f"{where}: a turn of the {turn.role} is empty; fill it in or delete the entry")
    for mark, count, what in ((IMAGE, pictures, "picture"), (VIDEO, videos, "video")):
        marks = sum(turn.text.count(mark) for turn in turns)
        if marks != count:
            raise DataError(
                f"{where}: {marks} {mark!r} in the text but {count} {what}(s); write {mark!r} once for each {what}"
            )
