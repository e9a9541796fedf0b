"""Encoded bytes to an upright RGB picture, and a quick check that this will work.

Only raster formats that Pillow decodes by itself are opened: formats that start an interpreter (EPS) or hide several
pictures in one (PSD) are refused as "not a picture".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from keeplora.errors import ConfigError, DataError

DEFAULT_MAX_PIXELS = 64_000_000
#: Pillow refuses to open anything larger, whatever we ask for.
LARGEST_MAX_PIXELS = 178_956_970
#: A strip narrower than this would fill the memory when its short side is resized to the model's input.
MAX_ASPECT = 100
#: A file this large holds no picture that `max_pixels` would let through.
MAX_FILE_BYTES = 1 << 30

#: A phone's MPO is opened by the JPEG plugin.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"}
)


class PictureError(DataError):
    """A picture that cannot be used; the message names the file and says how to mend it."""


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # naming a format that this Pillow lacks (older ones have no AVIF) would be a KeyError
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_max_pixels(value: object) -> int:
    """Return a limit that Pillow can keep, or raise ConfigError."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= LARGEST_MAX_PIXELS:
        raise ConfigError(f"max_pixels is {value!r}: give a whole number from 1 to {LARGEST_MAX_PIXELS:,}")
    return number


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a picture file; a missing, unreadable, special, empty or absurdly large one is a PictureError."""
    file = Path(path)
    try:
        if not file.is_file():
            if file.is_symlink():
                raise PictureError(f"{file}: the link points to a file that does not exist; mend or delete the link")
            kind = "is not an ordinary file" if file.exists() else "does not exist"
            raise PictureError(f"{file}: {kind}; mend the path or leave it out")
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PictureError(f"{file}: the file has {size:,} bytes, too many for a picture; re-encode it smaller")
        return file.read_bytes()
    except OSError as error:
        raise PictureError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def _open(data: bytes, where: str, max_pixels: int) -> Image.Image:
    """Read the header alone, and refuse by it."""
    if not data:
        raise PictureError(f"{where}: the file is empty (0 bytes); copy it again or delete it")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            f"{where}: not a picture that can be read; convert it to PNG or JPEG, copy it again, or delete it"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"{where}: more pixels than Pillow opens safely; shrink the picture") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged header
        raise PictureError(f"{where}: the header is damaged ({_brief(error)}); copy it again or delete it") from error
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(
            f"{where}: {width} x {height} pixels, more than max_pixels ({max_pixels:,}); "
            "shrink the picture or raise `max_pixels`"
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise PictureError(
            f"{where}: {width} x {height} pixels, a strip longer than {MAX_ASPECT} times its width; crop or delete it"
        )
    return image


def decode_picture(data: bytes, where: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode an encoded picture into an upright RGB `PIL.Image.Image`.

    The first frame of an animation; the EXIF rotation applied; transparency laid on white; 16-bit grey scaled to
    8 bits by 255/65535 (Pillow's own conversion clips); CMYK by Pillow's plain conversion, colour profiles ignored,
    as the processors of `transformers` do.

    Args:
        data: the encoded bytes.
        where: the name that an error gives, usually the file's path.
        max_pixels: larger pictures are refused by their header, before anything is decoded.

    Raises:
        PictureError: the picture is damaged, cut short, too large or of an unknown format or mode.

    >>> buffer = io.BytesIO()
    >>> Image.new("RGBA", (2, 3), (0, 0, 0, 0)).save(buffer, "PNG")
    >>> picture = decode_picture(buffer.getvalue(), "clear.png")
    >>> picture.mode, picture.size, picture.getpixel((0, 0))
    ('RGB', (2, 3), (255, 255, 255))
    """
    image = _open(data, where, max_pixels)
    try:
        image.load()
    except Exception as error:  # as above: the type depends on the codec
        raise PictureError(f"{where}: damaged or cut short ({_brief(error)}); copy it again or delete it") from error
    # a damaged EXIF block says nothing about the pixels, which are fine
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image, where)


def read_picture(path: str | os.PathLike[str], *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """`decode_picture` of a file."""
    return decode_picture(read_bytes(path), str(path), max_pixels=max_pixels)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _wide_grey(image, where).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if mode == "La":
            image = image.convert("LA")
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    if mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise PictureError(f"{where}: colour mode {mode!r} cannot be turned into RGB; save it as RGB") from error


def _wide_grey(image: Image.Image, where: str) -> Image.Image:
    """16-bit grey (modes I;16*, or I in a 32-bit container) and float grey in [0, 1] to 8-bit grey."""
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max()))
    limit = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0.0 and high <= limit):  # also refuses NaN
        raise PictureError(
            f"{where}: grey values from {low:g} to {high:g} in mode {image.mode!r}, whose black and white are unknown; "
            "save it as 8-bit or 16-bit grey"
        )
    return Image.fromarray(np.rint(values.astype(np.float64) * (255.0 / limit)).astype(np.uint8))


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:120]


def check_picture(data: bytes, where: str, *, max_pixels: int = DEFAULT_MAX_PIXELS, full: bool = False) -> str:
    """Raise PictureError unless the picture can be used.

    With ``full=False`` the header, the checksums (PNG) and the end of the file (JPEG, WebP, GIF, BMP) are looked at;
    the pixels are decoded only where these leave a doubt, or where the format has nothing to look at (TIFF, ...).

    Returns:
        With ``full=True`` the hex SHA-256 of the size and RGB pixels, the same for two encodings of one picture;
        else the empty string.
    """
    image = _open(data, where, max_pixels)
    kind = image.format
    if kind == "PNG":
        try:
            image.verify()
        except Exception as error:  # SyntaxError, OSError, struct.error, ...: all mean damage
            raise PictureError(
                f"{where}: damaged or cut short ({_brief(error)}); copy it again or delete it"
            ) from error
    if not full and _looks_whole(data, kind):
        return ""
    picture = decode_picture(data, where, max_pixels=max_pixels)
    if not full:
        return ""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}:".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def _looks_whole(data: bytes, kind: str | None) -> bool:
    """True where the end of the file is where the format says; False means "decode it to know"."""
    if kind == "PNG":
        return True
    if kind in ("JPEG", "MPO"):
        return data.rfind(b"\xff\xd9") > _scan_start(data) > 0
    if kind == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    if kind == "GIF":
        return data.rstrip(b"\0").endswith(b";")
    if kind == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little") > 0
    return False


def _scan_start(data: bytes) -> int:
    """Where the first scan of a JPEG starts, -1 if lost; an EXIF thumbnail before it has an end marker of its own."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return -1
