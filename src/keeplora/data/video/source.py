"""Opening a video: the container, its one video stream, and what its header tells; damage seen without decoding."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from PIL import Image

from keeplora.data.pictures import MAX_ASPECT
from keeplora.data.sets import ByteSource, FileBytes, HeldBytes
from keeplora.data.video.boxes import cut_short
from keeplora.errors import DataError, KeepLoraError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".ts", ".m2ts", ".mts", ".mpg"}
    | {".mpeg", ".m2v", ".vob", ".flv", ".f4v", ".wmv", ".asf", ".ogv", ".mxf", ".h264", ".264", ".h265", ".hevc"}
)
#: Earlier ones cannot be told to convert colours exactly.
OLDEST_AV = 18
#: Demuxers that read one file and nothing else. Playlists (hls, dash, concat) would open what they name, and the text and
#: picture demuxers would see a video in a letter.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,m4v,h263,h264,hevc,vvc,av1,obu,ivf,flv,live_flv,asf,ogg,"
    "mxf,nut,rm,dv,gif,yuv4mpegpipe,wtv,gxf,dirac,vc1,vc1test"
)


class VideoError(DataError):
    """A video that cannot be used; the message names the file and says how to mend it."""


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends as a video's does.

    >>> is_video("clips/A.MP4"), is_video("a.png")
    (True, False)
    """
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def require_av() -> Any:
    """The module ``av``.

    Raises:
        KeepLoraError: it is missing, or lacks what is used here.
    """
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        raise KeepLoraError('reading videos needs the package av: pip install "keeplora[video]"') from error
    if int(av.__version__.split(".")[0]) < OLDEST_AV:
        raise KeepLoraError(
            f'the package av {av.__version__} is too old to read videos right: pip install -U "av>={OLDEST_AV}"'
        )
    return av


class Opened(NamedTuple):
    """A video ready to be read, and how its pixels become a picture.

    ``width`` and ``height`` are the stored ones, ``aspect`` a pixel's width over its height.
    """

    container: InputContainer
    stream: VideoStream
    where: str
    width: int
    height: int
    aspect: Fraction


def file_of(source: ByteSource) -> str | None:
    """The absolute path of a source that is a whole file."""
    return os.path.abspath(source.path) if isinstance(source, FileBytes) else None


def at_hand(source: ByteSource) -> ByteSource:
    """A file as it is; any other source with its bytes in memory, so that they are fetched once."""
    return source if isinstance(source, FileBytes | HeldBytes) else HeldBytes(source.read())


def video_digest(source: ByteSource) -> str:
    """Hex SHA-256 of the encoded bytes, read a piece at a time.

    Raises:
        VideoError: the file cannot be read.
    """
    name = file_of(source) or "the video"
    try:
        with raw(source, name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise _unreadable(name, error) from error


def raw(source: ByteSource, where: str) -> BinaryIO:
    """The encoded bytes as a file, which is to be closed.

    Raises:
        VideoError: missing or unreadable.
    """
    path = file_of(source)
    if path is None:
        return io.BytesIO(source.read())
    _check_file(path, where)
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(where, error) from error


@contextlib.contextmanager
def opened(source: ByteSource, where: str, max_pixels: int) -> Iterator[Opened]:
    """Open a video; a file by its path, never as a whole, any other source from memory.

    Raises:
        VideoError: missing, unreadable, empty, cut short, not a video, or too large.
        KeepLoraError: the package ``av`` is missing.
    """
    av = require_av()
    path = file_of(source)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(raw(source, where))
        size = held.seek(0, io.SEEK_END)
        if size == 0:
            raise VideoError(f"{where}: the file is empty (0 bytes); copy it again or delete it")
        if reason := cut_short(held, size):
            raise VideoError(f"{where}: {reason}; copy or export it again, or delete it")
        held.seek(0)
        try:
            container = stack.enter_context(
                av.open(
                    # reading through Python would hold the interpreter; a name that is no text must go through it
                    held if path is None or not _plain(path) else f"file:{path}",
                    metadata_errors="replace",
                    options={"max_pixels": str(max_pixels)},
                    container_options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"},
                )
            )
        except (av.error.FFmpegError, ValueError) as error:
            raise _refusal(held, where, error) from error
        yield _usable(av, container, where, max_pixels)


def _plain(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_file(path: str, where: str) -> None:
    file = Path(path)
    try:
        if file.is_file():
            return
        if file.is_symlink():
            raise VideoError(f"{where}: the link points to a file that does not exist; mend or delete the link")
        kind = "is not an ordinary file" if file.exists() else "does not exist"
    except OSError as error:
        raise _unreadable(where, error) from error
    raise VideoError(f"{where}: {kind}; mend the path or leave it out")


def _unreadable(where: str, error: OSError) -> VideoError:
    return VideoError(f"{where}: cannot be read ({error.strerror or error}); check its permissions")


def _refusal(held: Any, where: str, error: Exception) -> VideoError:
    """Why FFmpeg would not open it, in words that help."""
    held.seek(0)
    try:
        kind = Image.open(held).format
    except Exception:  # not a picture, of whatever sort
        return VideoError(
            f"{where}: not a video that can be read ({brief(error)}); convert it to MP4 (H.264), copy it again, or delete it"
        )
    return VideoError(f"{where}: a picture ({kind}), not a video; list it as a picture, or leave it out")


def brief(error: BaseException) -> str:
    """What FFmpeg says, without number and address."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0][:120]


def _usable(av: Any, container: InputContainer, where: str, max_pixels: int) -> Opened:
    disposition = av.stream.Disposition
    # cover art is a stream of one picture
    streams = [s for s in container.streams.video if not s.disposition & disposition.attached_pic]
    if not streams:
        if container.streams.video:
            held = "sound and a cover picture only"
        elif container.streams.audio:
            held = "sound only"
        else:
            held = "no video stream"
        raise VideoError(f"{where}: holds {held}, no video; leave it out")
    stream = next((s for s in streams if s.disposition & disposition.default), streams[0])
    codec = stream.codec_context
    if codec is None:
        raise VideoError(f"{where}: its codec cannot be decoded here; convert it to MP4 (H.264)")
    width, height = codec.width, codec.height
    if width < 1 or height < 1:
        raise VideoError(
            f"{where}: no picture size in its header, so no frames can be read; copy it again or delete it"
        )
    aspect = stream.sample_aspect_ratio
    if not aspect or aspect <= 0:
        aspect = Fraction(1)
    shown = max(1, round(width * aspect))
    if max(width, shown) * height > max_pixels:
        raise VideoError(
            f"{where}: {max(width, shown)} x {height} pixels, more than max_pixels ({max_pixels:,}); "
            "shrink the video or raise `max_pixels`"
        )
    if max(shown, height) > MAX_ASPECT * min(shown, height):
        raise VideoError(
            f"{where}: {shown} x {height} pixels, a strip longer than {MAX_ASPECT} times its width; crop or delete it"
        )
    return Opened(container, stream, where, width, height, aspect)
