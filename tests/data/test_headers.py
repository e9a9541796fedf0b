"""Headers from a few bytes: right where they say anything, silent about whatever is cut short or odd."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from keeplora.data.headers import Header, read_header

SIZES = [(1, 1), (7, 5), (640, 3), (33, 300)]


def header_of(data: bytes) -> Header | None:
    return read_header(len(data), lambda offset, count: data[max(offset, 0) : max(offset, 0) + count])


def encoded(size: tuple[int, int], kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


KINDS = [
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"mode": "L"}), ("JPEG", {"mode": "CMYK"}),
    ("JPEG", {"icc_profile": bytes(200_000)}), ("JPEG", {"comment": b"x" * 5000}),
    ("PNG", {}), ("PNG", {"mode": "P"}), ("PNG", {"mode": "RGBA"}), ("GIF", {}), ("BMP", {}),
    ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"mode": "RGBA", "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
    ("PPM", {}), ("PPM", {"mode": "L"}),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_whole_files_tell_their_size(kind, options, size):
    data = encoded(size, kind, **options)
    assert header_of(data) == Header(kind, *Image.open(io.BytesIO(data)).size)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_no_cut_file_passes_for_whole(kind, options):
    data = encoded((40, 30), kind, **options)
    for length in {0, 1, 2, 3, 10, 20, 29, 30, 40, *range(len(data) - 70, len(data)), *range(0, len(data), 97)}:
        assert header_of(data[: max(length, 0)]) is None, length


def test_a_jpeg_that_ends_with_its_thumbnail_is_not_whole():
    """The end marker of the small picture inside the header must not pass for that of the whole."""
    thumbnail = encoded((16, 16), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Exif\0\0" + thumbnail
    whole = encoded((40, 30), "JPEG")
    data = whole[:2] + segment + whole[2:]
    assert header_of(data) == Header("JPEG", 40, 30)
    cut = data[: 2 + len(segment)]
    assert cut.endswith(b"\xff\xd9")
    assert header_of(cut) is None


def test_a_jpeg_without_a_frame_before_its_scan_is_left_to_the_decoder():
    scan = b"\xff\xda\x00\x02" + b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 30, 40) + bytes(8)
    assert header_of(b"\xff\xd8" + scan + b"\xff\xd9") is None


@pytest.mark.parametrize(
    "data",
    [b"not a picture at all, but long enough to be one", b"\xff\xd8\xff" + bytes(40) + b"\xff\xd9", b"BM" + bytes(60)],
)
def test_what_only_starts_like_a_picture_is_left_to_the_decoder(data):
    assert header_of(data) is None


def test_other_formats_are_left_to_the_decoder():
    for kind in ("TIFF", "JPEG2000"):
        assert header_of(encoded((9, 8), kind)) is None
