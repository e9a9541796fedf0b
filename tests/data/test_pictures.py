from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import encode
from PIL import Image

from keeplora.data.pictures import (
    LARGEST_MAX_PIXELS,
    MAX_ASPECT,
    PictureError,
    check_max_pixels,
    check_picture,
    decode_picture,
    read_bytes,
    read_picture,
)
from keeplora.errors import ConfigError


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    picture = decode_picture(data, "x")
    assert picture.mode == "RGB"
    check_picture(data, "x")  # the quick check must agree that it can be used
    return np.asarray(picture).astype(int)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 100) + b"IDAT"


def test_rgb_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (decoded(saved(Image.fromarray(pixels), "PNG")) == pixels).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_laid_on_white(kind: str) -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = decoded(saved(image, kind, **options))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[5, 5].tolist() == [200, 0, 0]


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (3, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    assert decoded(saved(image, "PNG"))[0, :2].tolist() == [[40, 40, 40], [255, 255, 255]]


def test_palette() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decoded(saved(image, "PNG"))[0, :2].tolist() == [[10, 20, 30], [200, 100, 50]]
    # the same with colour 1 transparent, and with half-transparent entries
    assert decoded(saved(image, "PNG", transparency=1))[0, :2].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert decoded(saved(image, "PNG", transparency=bytes([255, 0])))[0, 1].tolist() == [255, 255, 255]
    assert decoded(saved(image, "GIF", transparency=1))[0, 1].tolist() == [255, 255, 255]


def test_colour_key_transparency() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert decoded(saved(image, "PNG", transparency=(9, 9, 9)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 9)
    assert decoded(saved(grey, "PNG", transparency=9))[0].tolist() == [[7, 7, 7], [255, 255, 255]]


def test_one_bit() -> None:
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    assert decoded(saved(image, "PNG"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert decoded(saved(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_grey_in_wider_containers() -> None:
    pgm = b"P5 4 1 65535\n" + np.array([0, 257, 32768, 65535], dtype=">u2").tobytes()
    assert decoded(pgm)[0, :, 0].tolist() == [0, 1, 128, 255]
    wide = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.int32))
    assert wide.mode == "I"
    assert decoded(saved(wide, "TIFF"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_grey() -> None:
    ramp = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert decoded(saved(ramp, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[[-1, 5]], [[0, 70000]]])
def test_grey_of_unknown_range_is_refused(values: list[list[int]]) -> None:
    data = saved(Image.fromarray(np.array(values, dtype=np.int32)), "TIFF")
    with pytest.raises(PictureError, match=r"scan\.tif: grey values from .* save it as 8-bit"):
        decode_picture(data, "scan.tif")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red ink
    pixels = decoded(saved(image, kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert np.abs(pixels[8, 8] - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0))])
def test_exif_rotation_is_applied_once(kind: str, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 16, 16))  # top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode_picture(saved(image, kind, exif=exif), "x")
    assert picture.size == ((32, 64) if orientation in (6, 8) else (64, 32))
    row, column = corner
    at = (4 if column == 0 else picture.width - 5, 4 if row == 0 else picture.height - 5)
    assert max(picture.getpixel(at)) < 60
    assert sum(np.asarray(picture)[:, :, 0].ravel() < 60) == pytest.approx(256, abs=40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_picture() -> None:
    data = encode(kind="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 12)
    assert decode_picture(data, "x").size == (12, 10)


def test_animation_gives_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decoded(data)[1, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("keep", [0.97, 0.6, 0.3])
def test_cut_short_is_seen_by_the_quick_check(kind: str, keep: float) -> None:
    data = encode(3, kind, (60, 50))
    check_picture(data, "whole")
    with pytest.raises(PictureError, match=r"^cut\.x: .*(copy it again|convert it)"):
        check_picture(data[: int(len(data) * keep)], "cut.x")


def test_jpeg_with_a_thumbnail_cut_short() -> None:
    exif = b"Exif\0\0" + encode(1, "JPEG")  # holds an end marker before the scan
    data = encode(3, "JPEG", (60, 50), exif=exif)
    check_picture(data, "whole")
    with pytest.raises(PictureError, match=r"cut\.jpg"):
        check_picture(data[:-40], "cut.jpg")


def test_flipped_bits_in_a_png() -> None:
    data = bytearray(encode(3, "PNG", (60, 50)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(PictureError, match=r"bad\.png: damaged"):
        check_picture(bytes(data), "bad.png")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
@pytest.mark.filterwarnings("ignore")
def test_damage_never_raises_anything_else(kind: str, data: st.DataObject) -> None:
    body = bytearray(encode(4, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_picture(bytes(body), "x")
        assert decode_picture(bytes(body), "x").mode == "RGB"
    except PictureError as error:
        assert str(error).startswith("x: ")  # noqa: PT017


def test_tail_after_a_jpeg_is_harmless() -> None:
    check_picture(encode(0, "JPEG") + b"made by a camera", "x")


@pytest.mark.parametrize("data", [b"hello, I am text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff"])
def test_not_a_picture(data: bytes) -> None:
    with pytest.raises(PictureError, match=r"notes\.png: not a picture"):
        check_picture(data, "notes.png")


def test_zero_bytes() -> None:
    with pytest.raises(PictureError, match=r"none\.png: the file is empty"):
        check_picture(b"", "none.png")


def test_huge_is_refused_by_its_header() -> None:
    with pytest.raises(PictureError, match=r"map\.png: 9000 x 9000 pixels, more than max_pixels \(64,000,000\)"):
        decode_picture(png_header(9000, 9000), "map.png")
    with pytest.raises(PictureError, match=r"bomb\.png: more pixels than Pillow opens"):
        decode_picture(png_header(60000, 60000), "bomb.png")
    with pytest.raises(PictureError, match=r"120 pixels|more than max_pixels \(119\)"):
        decode_picture(encode(), "x", max_pixels=119)
    assert decode_picture(encode(), "x", max_pixels=120).size == (12, 10)


def test_strips_are_refused() -> None:
    decode_picture(saved(Image.new("L", (MAX_ASPECT, 1)), "PNG"), "x")
    with pytest.raises(PictureError, match=r"line\.png: 101 x 1 pixels, a strip"):
        check_picture(saved(Image.new("L", (MAX_ASPECT + 1, 1)), "PNG"), "line.png")


@pytest.mark.parametrize("value", [0, -1, True, "many", 1.5, LARGEST_MAX_PIXELS + 1])
def test_max_pixels_is_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="max_pixels"):
        check_max_pixels(value)


def test_max_pixels_may_be_written_as_yaml_float() -> None:
    assert check_max_pixels(64e6) == 64_000_000


def test_pixel_hash_sees_through_the_encoding() -> None:
    assert check_picture(encode(5, "PNG"), "a", full=True) == check_picture(encode(5, "BMP"), "b", full=True) != ""
    assert check_picture(encode(5), "a", full=True) != check_picture(encode(6), "b", full=True)
    assert check_picture(encode(5), "a") == ""


def test_files(tmp_path: Path) -> None:
    good = tmp_path / "ünïcode 猫.png"
    good.write_bytes(encode())
    assert read_picture(good).size == (12, 10)
    with pytest.raises(PictureError, match=r"gone\.png: does not exist"):
        read_bytes(tmp_path / "gone.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(PictureError, match=r"link\.png: the link points to a file that does not exist"):
        read_bytes(tmp_path / "link.png")
    with pytest.raises(PictureError, match="is not an ordinary file"):
        read_bytes(tmp_path)
