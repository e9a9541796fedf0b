"""What the first and last bytes of a picture file tell: format, size in pixels, and whether the end is there.

Much quicker than opening the file with Pillow, and never sure of anything odd: where the bytes are not exactly what a
plain file of a known format has, the answer is None, and `keeplora.data.pictures.check_picture` must decide.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

HEAD_BYTES = 1024
TAIL_BYTES = 64

_PNM = re.compile(rb"P([56])\s(\d{1,9})\s(\d{1,9})\s255\s")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame: width and height are in it


class Header(NamedTuple):
    """Format as Pillow calls it, and the stored width and height in pixels."""

    format: str
    width: int
    height: int


def read_header(size: int, at: Callable[[int, int], bytes]) -> Header | None:
    """The header of a whole, plain JPEG, PNG, GIF, BMP, WebP or binary PPM of 8 bits; None means "look closer".

    Args:
        size: bytes of the file.
        at: ``at(offset, count)`` gives bytes of the file, fewer at its end.

    >>> data = b"P5 2 1 255 ab"
    >>> read_header(len(data), lambda offset, count: data[offset : offset + count])
    Header(format='PPM', width=2, height=1)
    """
    head = at(0, min(size, 30))
    try:
        if head.startswith(b"\xff\xd8\xff"):
            return _jpeg(at) if at(size - 2, 2) == b"\xff\xd9" else None
        if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
            return Header("PNG", *struct.unpack(">II", head[16:24])) if at(size - 12, 12) == _PNG_END else None
        if head[:6] in (b"GIF87a", b"GIF89a"):
            return Header("GIF", *struct.unpack("<HH", head[6:10])) if at(size - 1, 1) == b";" else None
        if head.startswith(b"BM"):
            (stated,), (width, height) = struct.unpack("<I", head[2:6]), struct.unpack("<ii", head[18:26])
            return Header("BMP", width, abs(height)) if size >= stated > 0 and width > 0 else None
        if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            return _webp(head) if size >= struct.unpack("<I", head[4:8])[0] + 8 else None
        if match := _PNM.match(head):
            kind, width, height = (int(group) for group in match.groups())
            whole = size == match.end() + width * height * (3 if kind == 6 else 1)
            return Header("PPM", width, height) if whole else None
    except struct.error:  # shorter than its own header
        return None
    return None


def _jpeg(at: Callable[[int, int], bytes]) -> Header | None:
    offset = 2
    for _ in range(100):  # segments before the picture; more are no plain file
        segment = at(offset, 9)
        if len(segment) < 9 or segment[0] != 0xFF:
            return None
        if segment[1] in _FRAMES:
            height, width = struct.unpack(">HH", segment[5:9])
            return Header("JPEG", width, height)
        if segment[1] in (0xDA, 0xD9, 0xFF):
            return None
        offset += 2 + int.from_bytes(segment[2:4], "big")
    return None


def _webp(head: bytes) -> Header | None:
    kind = head[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(head[i : i + 3], "little") for i in (24, 27))
    elif kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (value & 0x3FFF for value in struct.unpack("<HH", head[26:30]))
    elif kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        return None
    return Header("WEBP", width, height)
