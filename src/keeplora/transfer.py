"""Copying a finished run, an export or a ledger to an object store and back.

A run is written on a local disk: it renames folders into place and holds a lock, and object stores have neither. What is finished
is a plain folder, and this copies it as a whole: a copy that did not end carries the file ``INCOMPLETE``, which keeps it from
being taken for a whole one, and the same copy again completes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keeplora.data.remote import RemotePath, is_url, retried, told
from keeplora.errors import ConfigError, DataError, KeepLoraError
from keeplora.files import atomic_dir, expand

T = TypeVar("T")

INCOMPLETE = "INCOMPLETE"
"""Written first and removed last."""
LAST = ("HEAD.json", "results.json", "status.json")
"""What says that the rest is there goes last."""
_MANGLED = re.compile(r"([a-z][a-z0-9+.-]+):/(?=[^/])", re.IGNORECASE)


@dataclass(frozen=True)
class Copied:
    """What was copied."""

    target: str
    files: int
    bytes: int


def address(path: str | os.PathLike[str]) -> str | None:
    """The URL behind what was given as a path; a `Path` has lost one of its slashes.

    >>> address(Path("s3://bucket/runs/a")), address("runs/a")
    ('s3://bucket/runs/a', None)
    """
    text = os.fspath(path)
    if is_url(text):
        return text
    return _MANGLED.sub(r"\1://", text, count=1) if _MANGLED.match(text) else None


def refuse_address(path: str | os.PathLike[str], what: str) -> None:
    """A run directory must be local.

    Raises:
        ConfigError: it is an address; says what to do.
    """
    if (url := address(path)) is not None:
        raise ConfigError(
            f"{url}: {what} must lie on a local disk, for it is locked and renamed into place, which object stores cannot "
            f"do; use a local folder, and `keeplora copy FOLDER {url}` (or back) when it is finished"
        )


def copy(source: str | Path, target: str | Path) -> Copied:
    """Copy a folder to an address, or an address to a new local folder.

    Raises:
        ConfigError: both are local, or both are addresses; the target is not empty; a package is missing.
        KeepLoraError: the source holds what cannot be copied, or the network failed.
    """
    away, here = address(target), address(source)
    if (away is None) == (here is None):
        kind = (
            "local folders, which your system's own copy is for"
            if away is None
            else "addresses; copy by way of a local folder"
        )
        raise ConfigError(f"{source} and {target} are both {kind}")
    if away is not None:
        return upload(expand(source), RemotePath.of(away))
    assert here is not None
    return download(RemotePath.of(here), expand(target))


def _files(folder: Path) -> list[Path]:
    """The folder's files, relative to it, what completes it last; no locks and no remains of writers that died."""
    if not folder.is_dir():
        raise KeepLoraError(f"{folder}: no such folder")
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_symlink():
            raise KeepLoraError(
                f"{path} is a link, and what it leads to may be another's; copy the files themselves there first"
            )
        if path.is_file():
            found.append(inside)
    if not found:
        raise KeepLoraError(f"{folder}: holds no files to copy")
    return sorted(found, key=lambda path: path.name in LAST)


def upload(folder: Path, target: RemotePath) -> Copied:
    """Copy a local folder to an address that holds nothing yet, or an upload that did not end."""
    files = _files(folder)
    there = target.find() if target.exists() else {}
    if there and INCOMPLETE not in there:
        raise ConfigError(f"{target}: holds {len(there)} file(s) already; choose another address")
    _done(target, lambda: target.fs.pipe_file(_at(target, INCOMPLETE), b"a copy is under way, or did not end\n"))
    total = 0
    for inside in files:
        size = (folder / inside).stat().st_size
        place = _at(target, inside.as_posix())
        _done(target, lambda place=place, inside=inside: target.fs.put_file(str(folder / inside), place))
        arrived = _done(target, lambda place=place: target.fs.info(place)["size"])
        if arrived != size:
            raise KeepLoraError(f"{target}: {inside} arrived with {arrived} bytes in place of {size}; copy it again")
        total += size
    _done(target, lambda: target.fs.rm_file(_at(target, INCOMPLETE)))
    return Copied(str(target), len(files), total)


def download(source: RemotePath, folder: Path) -> Copied:
    """Copy an address to a local folder that is not there yet, whole or not at all."""
    if folder.exists():
        raise ConfigError(f"{folder} exists; name a new folder")
    there = {name: info for name, info in source.find().items() if info.get("type") != "directory"}
    if not there:
        raise DataError(f"{source}: holds no files; check the address")
    if INCOMPLETE in there:
        raise KeepLoraError(
            f"{source}: the copy to there did not end ({INCOMPLETE} lies in it); copy it there again first"
        )
    for name in there:
        source.below(name, str(source))  # refuses what would lead out of the folder
    total = 0
    with atomic_dir(folder) as part:
        for name, info in there.items():
            place = part / name
            place.parent.mkdir(parents=True, exist_ok=True)
            _done(source, lambda name=name, place=place: source.fs.get_file(_at(source, name), str(place)))
            size = place.stat().st_size
            if info.get("size") not in (None, size):
                raise KeepLoraError(
                    f"{source}: {name} arrived with {size} bytes in place of {info['size']}; copy it again"
                )
            total += size
    return Copied(str(folder), len(there), total)


def _at(folder: RemotePath, name: str) -> str:
    found: Any = folder / name
    return found.path


def _done(place: RemotePath, action: Callable[[], T]) -> T:
    try:
        return retried(action)
    except Exception as error:  # every store has errors of its own
        raise KeepLoraError(
            f"{place}: the copy failed ({told(error)}); check the address, the network and your rights, and copy it again"
        ) from error
