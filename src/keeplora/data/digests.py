"""What is known of files, so that a second run over the same pictures need not read them again.

A fact (a SHA-256, or what a look at a picture found) is kept under the file's absolute path with its size and time stamps,
in one SQLite file of the user's cache (`keeplora.files.cache_dir`), and holds while all of these are as they were. The
cache is never needed: ``KEEPLORA_NO_CACHE=1`` turns it off, the file may be deleted at any time, and a cache that is
locked, damaged or not writable is passed over.

The risk: bytes that change while size, time of modification and time of change (ctime) all stay would go unseen. Ordinary
programs cannot do that on Linux and macOS, where every write sets ctime, also one whose modification time is turned back;
a clock that was turned back, or a file system without ctime, can. What changed less than two seconds before it was read is
not remembered, for a second change within one tick of the file system's clock would leave no trace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from keeplora.files import cache_dir

T = TypeVar("T")
R = TypeVar("R")

#: How long a file must have been left alone before what was read of it is remembered.
SETTLED_NS = 2_000_000_000
_SCHEMA = """CREATE TABLE IF NOT EXISTS facts (kind TEXT, path TEXT, size INTEGER, mtime INTEGER, ctime INTEGER, inode INTEGER,
fact TEXT, PRIMARY KEY (kind, path)) WITHOUT ROWID"""
_ROWS = 10_000
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Stamp(NamedTuple):
    """What must be as it was for a fact to hold."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int  # a link may come to lead to another file

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & 0x7FFF_FFFF_FFFF_FFFF)

    @property
    def settled(self) -> bool:
        return max(self.mtime_ns, self.ctime_ns) < time.time_ns() - SETTLED_NS


Known = Mapping[str, tuple[Stamp, str]]


class FileFacts:
    """One kind of fact about files; change the kind's name whenever the way to find the fact changes.

    >>> facts = FileFacts("colour-1")
    >>> facts.recall(["/no/such/file.png"])
    {}
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def recall(self, paths: Iterable[str]) -> dict[str, tuple[Stamp, str]]:
        """The stored facts with the stamps they were found under; whoever asks compares these with the file's."""
        wanted = [path for path in paths if _storable(path)]
        found: dict[str, tuple[Stamp, str]] = {}
        with _database() as database:
            if database is None:
                return found
            query = (
                "SELECT facts.path, size, mtime, ctime, inode, fact FROM json_each(?) AS wanted "
                "CROSS JOIN facts ON facts.kind = ? AND facts.path = wanted.value"
            )
            for start in range(0, len(wanted), _ROWS):
                rows = database.execute(query, (json.dumps(wanted[start : start + _ROWS]), self.kind))
                found.update((path, (Stamp(*stamp), fact)) for path, *stamp, fact in rows)
        return found

    def remember(self, facts: Known) -> None:
        """Store facts under the stamps that the files had before they were read."""
        rows = [(self.kind, path, *stamp, fact) for path, (stamp, fact) in facts.items() if stamp.settled]
        rows = [row for row in rows if _storable(row[1])]
        if not rows:
            return
        with _database() as database:
            if database is not None:
                with database:
                    database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


@contextlib.contextmanager
def _database() -> Iterator[sqlite3.Connection | None]:
    """The cache's database, or None; no fault of it is anyone's concern."""
    if os.environ.get("KEEPLORA_NO_CACHE", "0") not in ("", "0"):
        yield None
        return
    path = cache_dir() / "files.sqlite"
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=2.0)
            stack.callback(database.close)
            database.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            _discard(path, error)
            database = None
        try:
            yield database
        except sqlite3.Error as error:
            _discard(path, error)


def _discard(path: Path, error: Exception) -> None:
    if getattr(error, "sqlite_errorcode", None) in _DAMAGED:
        with contextlib.suppress(OSError):
            path.unlink()


def _storable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # a name in bytes that are no text
        return False
    return True


def in_threads(function: Callable[[Sequence[T]], list[R]], items: Sequence[T], size: int = 256) -> Iterator[list[R]]:
    """``function`` of slices of ``items``, some at a time, in order; a task a file would cost more than a look at it."""
    slices = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        yield from pool.map(function, slices)


def read_settled(path: str, read: Callable[[str], R]) -> tuple[Stamp | None, R]:
    """``read(path)``, and the stamp it may be remembered under: None if the file changed meanwhile.

    Raises:
        Whatever ``read`` raises.
    """
    before = _stamp(path)
    value = read(path)
    return (before if before is not None and before == _stamp(path) else None), value


def _stamp(path: str) -> Stamp | None:
    try:
        return Stamp.of(os.stat(path))
    except (OSError, ValueError):  # a name with a NUL in it
        return None


def holds(known: Known, path: str) -> str | None:
    """The fact of ``path`` if the file is as it was, else None."""
    fact = known.get(path)
    return fact[1] if fact is not None and fact[0] == _stamp(path) else None


def _sha256(path: str) -> str:
    with open(path, "rb", buffering=0) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_digests(paths: Sequence[str]) -> dict[str, str]:
    """Hex SHA-256 of every file that can be read; those that are remembered and unchanged are not read again."""
    facts = FileFacts("sha256")
    known = facts.recall(paths)
    digests: dict[str, str] = {}
    new: dict[str, tuple[Stamp, str]] = {}

    def some(part: Sequence[str]) -> list[tuple[str, Stamp | None, str]]:
        found: list[tuple[str, Stamp | None, str]] = []
        for path in part:
            if (digest := holds(known, path)) is not None:
                found.append((path, None, digest))
                continue
            with contextlib.suppress(OSError):
                stamp, digest = read_settled(path, _sha256)
                found.append((path, stamp, digest))
        return found

    for part in in_threads(some, paths, size=16):
        for path, stamp, digest in part:
            digests[path] = digest
            if stamp is not None:
                new[path] = (stamp, digest)
    facts.remember(new)
    return digests
