"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from keeplora.errors import KeepLoraError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}\.(tmp|part)")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def _sync_dir(path: Path) -> None:
    # A rename is durable only once its directory is; not every file system can open a directory.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name ``path``: a failed write names no file, a hidden one means nothing to a reader, and safetensors
    has errors of its own."""
    try:
        yield
    except OSError as error:
        foreign = error.filename is not None and f".{path.name}." not in os.fsdecode(error.filename)
        if error.errno is None or foreign:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        if not (found := _OS_ERROR.search(str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextlib.contextmanager
def _held(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock what is being written, so that `sweep` can tell it from the remains of a process that died."""
    if fcntl is None:
        yield
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _abandoned(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    finally:
        os.close(fd)
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(folder: str | os.PathLike[str]) -> None:
    """Delete what writers that were killed left unfinished anywhere below ``folder``; a living writer's is left alone.

    Call it where no new writer can begin meanwhile: under the folder's lock. What cannot be deleted stays.
    """
    for base, folders, files in os.walk(folder):
        for name in filter(_UNFINISHED.fullmatch, [*folders, *files]):
            if _abandoned(path := Path(base, name)):
                _remove(path)
        folders[:] = [name for name in folders if not _UNFINISHED.fullmatch(name)]


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` to ``path`` so that a reader (or a crash) sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with _held(name):
                with os.fdopen(fd, "wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                os.chmod(name, 0o644)
                os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    _sync_dir(path.parent)
    return path


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`atomic_write_bytes` of UTF-8 text."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """`atomic_write_bytes` of indented JSON with sorted keys; NaN and infinities are refused."""
    return atomic_write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends, and vanishes when it raises.

    ``path`` must not exist. The files inside are flushed to disk before the rename.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):
        if _abandoned(left):
            _remove(left)
    with _named(path):
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            with _held(part):
                yield part
                for file in part.rglob("*"):
                    if file.is_file():
                        with open(file, "rb") as handle:
                            os.fsync(handle.fileno())
                os.chmod(part, 0o755)
                os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    _sync_dir(path.parent)


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` or ``~name`` at its start replaced by that home; `KeepLoraError` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise KeepLoraError(f"{os.fspath(path)}: there is no such user's home; write the path without '~'") from None


def real_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path with links followed. Unlike `Path.resolve` it takes a link that leads back to itself as it is."""
    return Path(os.path.realpath(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """An ordinary file opened for reading; a folder, pipe or device is an OSError, at once."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", os.fspath(path))
    raise OSError(errno.EINVAL, "it is not an ordinary file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of an ordinary file of at most ``most`` bytes: a pipe would be waited for, a device never ends.

    Raises:
        OSError: it cannot be read, is not an ordinary file (`errno.EINVAL`), or is larger (`errno.EFBIG`).
    """
    with open_regular(path) as handle:
        told = os.fstat(handle.fileno())
        # A read takes the memory that it asks for, whatever there is; files of /proc have no size of their own.
        asked = min(most, told.st_size or 1 << 24) + 1
        data = b"" if told.st_size > most else handle.read(asked)
        if told.st_size > most or len(data) > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", os.fspath(path))
        return data


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of an ordinary file's bytes; OSError for a pipe or a device, which would be read for ever."""
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_dir() -> Path:
    """The user's cache for fetched towers: ``$KEEPLORA_CACHE``, else ``$XDG_CACHE_HOME/keeplora``, else ``~/.cache/keeplora``."""
    if explicit := os.environ.get("KEEPLORA_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "keeplora"
