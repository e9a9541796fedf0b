"""Whether a container ends before its own header says: seen from a few bytes, nothing is decoded."""

from __future__ import annotations

import struct
from typing import BinaryIO

from keeplora.data.video.matroska import is_matroska, segment_end

#: The first boxes that tell an MP4 or MOV file.
_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")


def cut_short(file: BinaryIO, size: int) -> str:
    """Why a file of ``size`` bytes is not whole, or "" where nothing tells (also for formats that have no length).

    >>> import io
    >>> cut_short(io.BytesIO(b"RIFF\\x80\\0\\0\\0AVI LIST"), 16)
    'cut short: 16 of 136 bytes are there'
    """
    file.seek(0)
    head = file.read(64)
    try:
        if head[4:8] in _FIRST:
            return _boxes(file, size)
        if is_matroska(file):
            return _told(size, segment_end(file))
        if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
            return _told(size, 8 + struct.unpack("<I", head[4:8])[0])
    except (struct.error, IndexError):  # the header itself is broken: FFmpeg will say so
        return ""
    return ""


def _told(size: int, end: int) -> str:
    return f"cut short: {size:,} of {end:,} bytes are there" if size < end else ""


def _boxes(file: BinaryIO, size: int) -> str:
    at, index = 0, False
    for _ in range(100_000):  # a fragmented file has two boxes a second
        if at + 8 > size:
            break
        file.seek(at)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1:
            (length,) = struct.unpack(">Q", head[8:16])
        if length == 0:  # to the end of the file
            length = size - at
        if length < 8 or not all(32 <= byte < 127 or byte == 0xA9 for byte in kind):
            break  # no box: what follows the last one is nobody's business
        if kind in (b"moov", b"moof"):
            index = True
        if at + length > size:
            if kind == b"mdat" and not index:
                return f"cut short, and its index (moov) is lost: {size:,} of at least {at + length:,} bytes are there"
            return _told(size, at + length)
        at += length
    return "" if index else "its index (moov) is missing, as of a recording that was broken off"
