"""Data on object stores and other machines: URLs that a person wrote, through fsspec.

A URL stands where a path may: ``s3://bucket/pets``, ``gs://…``, ``hf://datasets/owner/name/…``, ``https://…``, ``memory://…``.
``file://`` is the local path behind it. Only schemes that the description of a task writes are opened: what a table names is a
path below the table's folder, and anything that would lead out of it, or to another scheme, is refused (docs/security.md).

>>> is_url("s3://bucket/a.csv"), is_url("C:/a.csv"), is_url("pets/cat")
(True, False, False)
"""

from __future__ import annotations

import functools
import posixpath
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keeplora.data.pictures import MAX_FILE_BYTES, PictureError
from keeplora.data.sets import ByteSource, FileBytes
from keeplora.errors import ConfigError, DataError
from keeplora.files import expand, read_regular

T = TypeVar("T")

ATTEMPTS = 4
"""Reads of one thing before its failure is told; the waits between them double."""
FIRST_WAIT = 0.5
"""Seconds before the second attempt."""
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "adl": "adlfs",
    "http": "aiohttp", "https": "aiohttp", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "oci": "ocifs",
    "oss": "ossfs", "webdav": "webdav4", "dropbox": "dropboxdrivefs", "hf": "huggingface_hub",
}  # fmt: skip
"""What `pip install` brings each scheme; the others come with fsspec."""
_URL = re.compile(r"[a-z][a-z0-9+.-]+(::[a-z][a-z0-9+.-]+)*://", re.IGNORECASE)
_FOREIGN = (
    "aiohttp",
    "botocore",
    "requests",
    "urllib3",
    "httpx",
    "google",
    "azure",
    "gcsfs",
    "s3fs",
    "huggingface_hub",
)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def is_url(value: object) -> bool:
    """Whether this is an address with a scheme; a Windows drive is none."""
    return isinstance(value, str) and _URL.match(value) is not None


def transient(error: BaseException) -> bool:
    """Whether trying again may help: a network that fails, not a file that is missing or forbidden."""
    if isinstance(error, _FINAL):
        return False
    return isinstance(error, OSError | TimeoutError | EOFError) or type(error).__module__.split(".")[0] in _FOREIGN


def retried(action: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """What ``action`` returns; after a `transient` error it is tried again, `ATTEMPTS` times in all."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if attempt + 1 == ATTEMPTS or not transient(error):
                raise
            sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable")


def told(error: BaseException) -> str:
    """A foreign error in short: its kind and first line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it.

    Raises:
        ConfigError: the scheme is unknown, or the package that reads it is not installed.
    """
    import fsspec.core

    scheme = url.split("://", 1)[0].split("::")[-1].lower()
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        how = f"pip install {package}" if package else str(error)
        raise ConfigError(f"{url}: {scheme}:// needs a package that is not installed: {how}") from error
    except ValueError as error:
        raise ConfigError(
            f"{url}: cannot be opened ({told(error)}); schemes that can be read: {', '.join(sorted(PACKAGES))}, memory, file"
        ) from error
    except Exception as error:  # credentials, endpoints: the scheme's own package raises nearly anything
        raise DataError(f"{url}: cannot be opened ({told(error)}); check the address and your credentials") from error


@dataclass(frozen=True)
class RemotePath:
    """A place on an fsspec filesystem, with the part of `pathlib.Path` that the readers use.

    Args:
        fs: the filesystem. path: in it. scheme: how a person wrote it, with ``://``.

    >>> here = RemotePath.of("memory://bucket/pets")
    >>> str(here / "train/cat.png"), (here / "train").name
    ('memory:///bucket/pets/train/cat.png', 'train')
    """

    fs: Any
    path: str
    scheme: str

    @classmethod
    def of(cls, url: str) -> RemotePath:
        fs, path = filesystem(url)
        return cls(fs, path.rstrip("/") or "/", url.split("://", 1)[0] + "://")

    def __str__(self) -> str:
        return self.path if "://" in self.path else self.scheme + self.path

    def __truediv__(self, name: str | Path | RemotePath) -> RemotePath | Path:
        """The place below, by a relative path; a URL of its own is a place of its own."""
        if isinstance(name, RemotePath) or is_url(str(name)):
            return name if isinstance(name, RemotePath) else place(str(name), Path())
        text = name.as_posix() if isinstance(name, Path) else name
        return RemotePath(self.fs, posixpath.normpath(posixpath.join(self.path, text)), self.scheme)

    def below(self, name: str, where: str) -> RemotePath:
        """A file that data names: it must lie below this folder.

        Raises:
            DataError: it is a URL, an absolute path, or leads upwards.
        """
        inside = name.replace("\\", "/")
        if "://" in inside or "::" in inside:
            raise DataError(f"{where}: {name!r} is an address, not a file; a table names files below {self}")
        if inside.startswith(("/", "~")) or ".." in inside.split("/") or re.match(r"[A-Za-z]:", inside):
            raise DataError(
                f"{where}: {name!r} leads out of {self}; on a remote filesystem files must lie below that folder"
            )
        found = self / inside
        assert isinstance(found, RemotePath)
        return found

    def inside(self, url: str) -> str | None:
        """What of a URL lies below this place, without opening it; None where it lies elsewhere."""
        if not url.startswith(self.scheme):
            return None
        path, root = str(self.fs._strip_protocol(url)), self.path.rstrip("/") + "/"
        return path[len(root) :] if path.startswith(root) and len(path) > len(root) else None

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.path)[1]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.fs, posixpath.dirname(self.path) or "/", self.scheme)

    def absolute(self) -> RemotePath:
        return self

    def relative_to(self, other: RemotePath) -> Path:
        return Path(posixpath.relpath(self.path, other.path))

    def _ask(self, action: Callable[[], T]) -> T:
        try:
            return retried(action)
        except Exception as error:
            raise DataError(
                f"{self}: cannot be read ({told(error)}); check the address, the network and your rights"
            ) from error

    def exists(self) -> bool:
        return bool(self._ask(lambda: self.fs.exists(self.path)))

    def is_dir(self) -> bool:
        return bool(self._ask(lambda: self.fs.isdir(self.path)))

    def is_file(self) -> bool:
        return bool(self._ask(lambda: self.fs.isfile(self.path)))

    def find(self) -> dict[str, dict[str, Any]]:
        """Every file below, by its path relative to this place, with what the filesystem tells of it, sorted by name."""
        found = self._ask(lambda: self.fs.find(self.path, detail=True))
        inside = {posixpath.relpath(path, self.path): info for path, info in found.items()}
        return {name: inside[name] for name in sorted(inside) if not name.startswith("..")}

    def read_bytes(self, most: int = MAX_FILE_BYTES) -> bytes:
        """The whole file.

        Raises:
            OSError: it is missing, unreadable, or larger than ``most`` bytes.
        """

        def read() -> bytes:
            with self.fs.open(self.path, "rb") as handle:
                return handle.read(most + 1)

        try:
            data = retried(read)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{told(error)}") from error
        if len(data) > most:
            raise OSError(f"it has more than {most:,} bytes")
        return data


@dataclass(frozen=True, slots=True)
class RemoteBytes:
    """A picture or a video on a remote filesystem, fetched whenever it is asked for; ``where`` names it in errors."""

    path: RemotePath

    def read(self) -> bytes:
        """The bytes.

        Raises:
            PictureError: missing, or the network failed `ATTEMPTS` times.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            tries = f" in {ATTEMPTS} attempts" if transient(error) else ""
            raise PictureError(
                f"{self.path}: cannot be read{tries} ({told(error)}); check the address and the network, or leave it out"
            ) from error
        if not data:
            raise PictureError(f"{self.path}: the file is empty (0 bytes); copy it again or delete it")
        return data


@functools.lru_cache(maxsize=64)
def _root(url: str) -> RemotePath:
    return RemotePath.of(url)


def place(value: str, base: Path | RemotePath) -> Path | RemotePath:
    """Where ``value`` is: a URL as it stands, ``file://`` as a local path, anything else below ``base``."""
    if is_url(value):
        scheme, _, rest = value.partition("://")
        if scheme.lower() in ("file", "local"):
            return Path("/" + rest.lstrip("/"))
        return _root(value)
    if isinstance(base, RemotePath):
        return base / value
    return (base / expand(value)).absolute()


def named_in(folder: Path | RemotePath, name: str, where: str) -> Path | RemotePath:
    """A file that data names, relative to ``folder``: locally as a person's own path would be, remotely below it alone."""
    return folder.below(name, where) if isinstance(folder, RemotePath) else folder / expand(name)


def bytes_at(path: Path | RemotePath) -> ByteSource:
    """The source of a file's bytes."""
    return RemoteBytes(path) if isinstance(path, RemotePath) else FileBytes(path)


def read_whole(path: Path | RemotePath, most: int) -> bytes:
    """An ordinary file of at most ``most`` bytes; OSError where it cannot be read."""
    return path.read_bytes(most) if isinstance(path, RemotePath) else read_regular(path, most)
