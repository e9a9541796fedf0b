"""The elements of a Matroska or WebM file, one inside another: whether they join up, and whether their checksums hold."""

from __future__ import annotations

import zlib
from typing import BinaryIO

HEADER, SEGMENT, CLUSTER, CRC32, VOID = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0xBF, 0xEC
#: What a segment holds (search index, facts, tracks, clusters, cues, tags, chapters, attachments), and what a cluster does.
_IN_SEGMENT = frozenset({0x114D9B74, 0x1549A966, 0x1654AE6B, CLUSTER, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469})
_IN_CLUSTER = frozenset({0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0x5854, 0xAF})
_ANYWHERE = frozenset({CRC32, VOID})
_PIECE = 1 << 20


def is_matroska(file: BinaryIO) -> bool:
    """Whether the file starts as EBML does."""
    file.seek(0)
    return file.read(4) == HEADER.to_bytes(4, "big")


def number(data: bytes, *, marked: bool = False) -> tuple[int, int]:
    """A number of EBML, with its length mark or without, and how many bytes it takes.

    >>> number(b"\\x40\\x02"), number(b"\\xa3", marked=True)
    ((2, 2), (163, 1))
    """
    used = 9 - data[0].bit_length()
    value = int.from_bytes(data[:used], "big")
    return (value if marked else value & (1 << 7 * used) - 1), used


def element(file: BinaryIO, at: int) -> tuple[int, int, int | None]:
    """The element at a byte: its kind, where its content starts, and where that ends (None: it does not say).

    Raises:
        IndexError: the file ends.
    """
    file.seek(at)
    head = file.read(12)
    kind, used = number(head, marked=True)
    size, more = number(head[used:])
    start = at + used + more
    return kind, start, None if size == (1 << 7 * more) - 1 else start + size


def segment_end(file: BinaryIO) -> int:
    """Where the segment says that it ends; 0 where it does not, as in a live recording."""
    _, _, at = element(file, 0)
    if at is None:
        return 0
    kind, _, end = element(file, at)
    return end or 0 if kind == SEGMENT else 0


def damage(file: BinaryIO) -> str:
    """Where the file is damaged, as far as its elements and the checksums of its clusters tell; "" where nothing is seen."""
    at = 0
    try:
        _, _, header_end = element(file, 0)
        kind, at, end = element(file, header_end or 0)
        if kind != SEGMENT or end is None:  # a live recording may end anywhere
            return ""
        while at < end:
            kind, start, stop = element(file, at)
            if stop is None:
                return ""
            if stop > end or kind not in _IN_SEGMENT | _ANYWHERE:
                return f"damaged at byte {at:,}"
            if kind == CLUSTER and not _cluster_is_whole(file, start, stop):
                return f"damaged between bytes {at:,} and {stop:,}"
            at = stop
    except IndexError:
        return f"damaged at byte {at:,}"
    return ""


def _cluster_is_whole(file: BinaryIO, at: int, end: int) -> bool:
    kind, start, after = element(file, at)
    if kind == CRC32 and after is not None and after == start + 4:
        file.seek(start)
        told, found, left = int.from_bytes(file.read(4), "little"), 0, end - after
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            found, left = zlib.crc32(piece, found), left - len(piece)
        return found == told and left == 0
    while at < end:
        kind, _, stop = element(file, at)
        if stop is None or stop > end or kind not in _IN_CLUSTER | _ANYWHERE:
            return False
        at = stop
    return True
