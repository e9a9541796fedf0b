"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from keeplora.errors import KeepLoraError


def _sync_dir(path: Path) -> None:
    # A rename is durable only once its directory is; not every file system can open a directory.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write ``data`` to ``path`` so that a reader (or a crash) sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
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
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
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
