"""Pictures, or videos, with labels, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from PIL import Image

from keeplora.data.pictures import DEFAULT_MAX_PIXELS, decode_picture, read_bytes

if TYPE_CHECKING:
    from keeplora.data.streams import SampleStream
    from keeplora.data.video import Clip, FrameCache, Sampling


class ByteSource(Protocol):
    """Where the encoded bytes of one picture come from; small and picklable, so that loader workers can have it."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A file."""

    path: Path

    def read(self) -> bytes:
        return read_bytes(self.path)


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Encoded bytes already in memory."""

    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class RowBytes:
    """One row of a `datasets.Dataset`: bytes, ``{"bytes", "path"}`` or a path relative to ``base``, a folder or an address."""

    dataset: Any
    row: int
    column: str
    base: Any
    where: str

    def read(self) -> bytes:
        from keeplora.data.hub_open import source_in_row

        return source_in_row(self.dataset[self.row][self.column], self.base, self.where).read()


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture, or one video, before its class has a number.

    Attributes:
        key: stable name, the same on every machine (part of the fingerprint).
        label: the class as the source writes it.
        where: the name for errors, e.g. an absolute path.
        source: where the bytes are.
        digest: hex SHA-256 of the bytes; "" until read.
        pixels: hex SHA-256 of the decoded pixels; "" unless the check was full.
        medium: "picture" or "video".
    """

    key: str
    label: str
    where: str
    source: ByteSource
    digest: str = ""
    pixels: str = ""
    medium: str = "picture"


class PictureSet:
    """Labelled pictures, or labelled videos, decoded when asked for and never kept.

    Args:
        entries: the pictures or videos, all of one medium; keys must differ.
        labels: class number of each, from 0.
        max_pixels: larger pictures and frames are refused.
        skipped: how many more belong to the set but cannot be read (``on_error: skip``): in a test, each is wrong.
    """

    def __init__(
        self, entries: Sequence[Entry], labels: Sequence[int], *, max_pixels: int = DEFAULT_MAX_PIXELS, skipped: int = 0
    ) -> None:
        if len(entries) != len(labels):
            raise ValueError(f"{len(entries)} pictures but {len(labels)} labels")
        self.entries = list(entries)
        self.labels: list[int] = [int(label) for label in labels]
        self.max_pixels = max_pixels
        self.skipped = skipped
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"PictureSet({len(self)} {self.medium}s, {len(set(self.labels))} classes)"

    @property
    def medium(self) -> str:
        """ "picture" or "video"."""
        return self.entries[0].medium if self.entries else "picture"

    @property
    def keys(self) -> list[str]:
        """Stable names of the pictures or videos."""
        return [entry.key for entry in self.entries]

    def where(self, index: int) -> str:
        """The name of picture ``index`` for a message to a person."""
        return self.entries[index].where

    def picture(self, index: int) -> Image.Image:
        """Picture ``index``, upright RGB; see `decode_picture`."""
        entry = self.entries[index]
        return decode_picture(entry.source.read(), entry.where, max_pixels=self.max_pixels)

    def clip(self, index: int, sampling: Sampling, cache: FrameCache | None = None) -> Clip:
        """Frames of video ``index``; see `keeplora.data.video.decode_clip`. ``cache``: where decoded frames are kept."""
        from keeplora.data.video import decode_clip

        entry = self.entries[index]
        decode = decode_clip if cache is None else cache.get
        return decode(entry.source, entry.where, sampling, max_pixels=self.max_pixels)

    def digest(self, index: int) -> str:
        """Hex SHA-256 of the encoded bytes of picture or video ``index``."""
        entry = self.entries[index]
        if entry.digest or entry.medium != "video":
            return entry.digest or hashlib.sha256(entry.source.read()).hexdigest()
        from keeplora.data.video import video_digest

        return video_digest(entry.source)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over every picture's or video's key, label and bytes, in order; computed once.

        How many were skipped is in it too: a test with fewer readable files is another test.
        """
        if self._fingerprint is None:
            total = hashlib.sha256()
            for index, entry in enumerate(self.entries):
                total.update(json.dumps([entry.key, self.labels[index], self.digest(index)]).encode() + b"\n")
            if self.skipped:
                total.update(json.dumps(["skipped", self.skipped]).encode() + b"\n")
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def subset(self, indices: Sequence[int]) -> PictureSet:
        """The pictures or videos at ``indices``, in that order, and none of the skipped."""
        return PictureSet(
            [self.entries[i] for i in indices], [self.labels[i] for i in indices], max_pixels=self.max_pixels
        )


@dataclass(slots=True)
class TaskData:
    """One task, ready to be learned; a probe has an empty ``train``.

    Attributes:
        name: the task's name.
        classes: display names; the index is the label.
        templates: prompts with ``{}`` or ``{c}`` for the class.
        train, test, validation: the pictures or videos; validation is None unless asked for.
        warnings: sentences a person should read; nothing was refused.
        licence: what the source states, if anything.
    """

    kind: ClassVar[str] = "classification"

    name: str
    classes: list[str]
    templates: list[str]
    train: PictureSet | SampleStream
    test: PictureSet
    validation: PictureSet | None = None
    warnings: list[str] = field(default_factory=list)
    licence: str | None = None

    @property
    def medium(self) -> str:
        """ "picture" or "video": what the task's samples are, all of them."""
        return self.test.medium

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over classes, templates and the three sets: equal means the same task, whatever its name."""
        sets = [s.fingerprint if s is not None else None for s in (self.train, self.test, self.validation)]
        text = json.dumps([self.classes, self.templates, sets], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()
