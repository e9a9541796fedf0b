"""A quick look at every picture (its size, the first kilobyte and the end) and video (its container, stream and first frame);
remembered until the file changes."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from keeplora.data.checks import file_of, handle_duplicates, may_be_used
from keeplora.data.digests import FileFacts, Stamp, file_digests, holds, in_threads, read_settled
from keeplora.data.headers import HEAD_BYTES, TAIL_BYTES, Header, read_header
from keeplora.data.pictures import FORMATS, PictureError, check_picture, read_bytes
from keeplora.data.sets import Entry
from keeplora.data.video import VideoError, check_video

#: Part of the name under which looks are remembered: another number whenever they find something else.
_LOOK = 1
_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at one picture or video found.

    Attributes:
        size: bytes of the encoded file.
        width, height: of a picture as stored, of a video as shown, in pixels.
        sample: differs for two files of one size unless their first and last bytes agree.
        pixels: hex SHA-256 of the decoded pixels; "" unless the look was full, and for a video.
        problem: a sentence that names the file; "" for a sound one.
    """

    size: int
    width: int = 0
    height: int = 0
    sample: str = ""
    pixels: str = ""
    problem: str = ""

    def as_fact(self) -> str:
        return f"!{self.problem}" if self.problem else f"{self.width} {self.height} {self.sample} {self.pixels}"

    @classmethod
    def of_fact(cls, fact: str, size: int) -> Look:
        if fact.startswith("!"):
            return cls(size, problem=fact[1:])
        width, height, sample, pixels = fact.split(" ")
        return cls(size, int(width), int(height), sample, pixels)


def look_at(
    entries: Sequence[Entry], *, full: bool, max_pixels: int, tick: Callable[[int], None] = lambda count: None
) -> list[Look]:
    """Look at every picture and video, in order; ``tick(n)`` is called after every ``n`` more.

    With ``full`` every picture, and every frame of every video, is decoded.
    """
    facts = FileFacts(f"look-{_LOOK}-{'full' if full else 'quick'}-{max_pixels}")
    known = facts.recall(filter(None, map(file_of, entries)))
    new: dict[str, tuple[Stamp, str]] = {}

    def some(part: Sequence[Entry]) -> list[Look]:
        return [_look(entry, known, new, full, max_pixels) for entry in part]

    looks: list[Look] = []
    for part in in_threads(some, entries, size=4 if any(entry.medium == "video" for entry in entries) else 256):
        looks += part
        tick(len(part))
    facts.remember(new)
    return looks


def _look(
    entry: Entry, known: Mapping[str, tuple[Stamp, str]], new: dict[str, tuple[Stamp, str]], full: bool, max_pixels: int
) -> Look:
    path = file_of(entry)
    try:
        if path is None:
            data = entry.source.read()
            if entry.medium == "video":
                return _look_at_video(entry, len(data), hashlib.sha256(data).hexdigest(), full, max_pixels)
            return _look_at_bytes(data, entry.where, full, max_pixels)
        fact = holds(known, path)
        if fact is not None:
            return Look.of_fact(fact, known[path][0].size)
        stamp, look = read_settled(path, lambda name: _look_at_file(entry, name, full, max_pixels))
        if stamp is not None:
            new[path] = (stamp, look.as_fact())
        return look
    except (PictureError, VideoError) as error:
        return Look(0, problem=str(error))


def _look_at_video(entry: Entry, size: int, sample: str, full: bool, max_pixels: int) -> Look:
    try:
        facts = check_video(entry.source, entry.where, full=full, max_pixels=max_pixels)
    except VideoError as error:
        return Look(size, problem=str(error))
    return Look(size, facts.width, facts.height, sample)


def _look_at_bytes(data: bytes, where: str, full: bool, max_pixels: int) -> Look:
    """A picture in memory, all of whose bytes are at hand: its sample is its SHA-256."""
    header = read_header(len(data), lambda offset, count: data[offset : offset + count])
    sample = hashlib.sha256(data).hexdigest()
    if not full and header is not None and may_be_used(header.width, header.height, max_pixels):
        return Look(len(data), header.width, header.height, sample)
    pixels = check_picture(data, where, max_pixels=max_pixels, full=full)
    return Look(len(data), *(header or _measured(data))[1:], sample, pixels)


def _look_at_file(entry: Entry, path: str, full: bool, max_pixels: int) -> Look:
    if not os.path.isfile(path):  # a link that leads nowhere, a folder, a pipe that would never end
        read_bytes(path)
    try:
        size, header, sample = _ends(path)
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if entry.medium == "video":
        return _look_at_video(entry, size, sample, full, max_pixels)
    if not full and header is not None and may_be_used(header.width, header.height, max_pixels):
        return Look(size, header.width, header.height, sample)
    data = read_bytes(path)
    try:
        pixels = check_picture(data, path, max_pixels=max_pixels, full=full)
    except PictureError as error:
        return Look(size, problem=str(error))
    return Look(size, *(header or _measured(data))[1:], sample, pixels)


def _ends(path: str) -> tuple[int, Header | None, str]:
    """Size of the file, its header if it is whole and plain, and a checksum of its first and last bytes."""
    handle = os.open(path, os.O_RDONLY | _BINARY)
    try:
        size = os.fstat(handle).st_size
        head = os.read(handle, HEAD_BYTES)
        tail_at = max(len(head), size - TAIL_BYTES)
        tail = b""
        if tail_at < size:
            os.lseek(handle, tail_at, os.SEEK_SET)
            tail = os.read(handle, TAIL_BYTES)

        def at(offset: int, count: int) -> bytes:
            if offset < 0:
                return b""
            if offset + count <= len(head) or len(head) == size:
                return head[offset : offset + count]
            if offset >= tail_at:
                return tail[offset - tail_at : offset - tail_at + count]
            os.lseek(handle, offset, os.SEEK_SET)
            return os.read(handle, count)

        return size, read_header(size, at), f"{zlib.crc32(tail, zlib.crc32(head)):08x}"
    finally:
        os.close(handle)


def _measured(data: bytes) -> Header:
    """Size in pixels of a picture that `check_picture` let pass."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        return Header(image.format or "", *image.size)


def find_duplicates(splits: Mapping[str, Sequence[tuple[Entry, Look]]]) -> list[str]:
    """One sentence for each two splits that share pictures, and one for pictures of train under two classes.

    Only files of one size whose first and last bytes agree are read in full.
    """
    by_pixels: dict[str, int] = defaultdict(int)
    for _, look in _each(splits):
        by_pixels[look.pixels] += 1
    digests = doubtful_digests(_each(splits))
    candidates: dict[str, list[Entry]] = {}
    for split, found in splits.items():
        candidates[split] = kept = []
        for entry, look in found:
            digest = digests.get(id(entry))
            if digest is None and not (look.pixels and by_pixels[look.pixels] > 1):
                continue
            # what cannot be read is equal to nothing
            kept.append(replace(entry, digest=digest or f"unread {entry.key}", pixels=look.pixels))
    return handle_duplicates(candidates, "warn")[1]


def doubtful_digests(pictures: Iterable[tuple[Entry, Look]]) -> dict[int, str]:
    """Hex SHA-256 by ``id(entry)`` of the pictures that look like another; a picture not in it is equal to no other.

    What cannot be read is left out.
    """
    alike: dict[tuple[int, str], list[tuple[Entry, Look]]] = defaultdict(list)
    for entry, look in pictures:
        alike[look.size, look.sample].append((entry, look))
    doubtful = [pair for group in alike.values() if len(group) > 1 for pair in group]
    files = file_digests(sorted({path for entry, _ in doubtful if (path := file_of(entry)) is not None}))
    digests: dict[int, str] = {}
    for entry, look in doubtful:
        path = file_of(entry)
        digest = look.sample if path is None else files.get(path)  # one in memory has its SHA-256 for a sample
        if digest is not None:
            digests[id(entry)] = digest
    return digests


def _each(splits: Mapping[str, Sequence[tuple[Entry, Look]]]) -> Iterable[tuple[Entry, Look]]:
    return ((entry, look) for found in splits.values() for entry, look in found if not look.problem)
