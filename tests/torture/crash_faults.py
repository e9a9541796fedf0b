"""Faults on purpose: every operation that changes files below one folder is counted, and the n-th one kills, tears or fails.

It is put into a process that does nothing else (`tests.torture.crash_server` forks one for each command) by replacing the
calls through which Python, and so keeplora, reaches files: ``os.*``, ``open``, and the function by which safetensors writes.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: What a full disk refuses: it still renames, truncates and deletes.
GROWS = ("open", "mkdir", "write", "fsync", "tensors")
#: What a read-only file system refuses.
CHANGES = (*GROWS, "truncate", "rename", "chmod", "unlink", "rmdir")


@dataclass(frozen=True)
class Fault:
    """What to do to a process.

    Attributes:
        at: the number, from 1, of the operation that is hit; 0: none. With ``call``, of the call that is hit.
        how: "before", "torn" (half of a write is done) or "after": when SIGKILL comes; "fail": the operation, or the next
            one that this error is of, fails.
        error: errno of a failure. sticky: everything after ``at`` fails too, as on a disk that stays full.
        call: count function calls of the main thread and not operations; SIGKILL comes at the ``at``-th.
        phase: only what happens in this phase counts.
        photos: a folder: before each operation the watched folder is copied there, under the operation's number. Such a
            copy is what SIGKILL would have left at that moment.
        locks: False: the file system knows no locks (ENOLCK).
        jumps: (operation number, seconds): the wall clock jumps by so much there.
        sample: reading a file whose path ends so fails with ``error``.
        report: making report.html raises. limit: no file may have more bytes (RLIMIT_FSIZE).
    """

    at: int = 0
    how: str = "after"
    error: int = errno.ENOSPC
    sticky: bool = True
    call: bool = False
    phase: str = ""
    photos: str = ""
    locks: bool = True
    jumps: tuple[tuple[int, float], ...] = ()
    sample: str = ""
    report: bool = False
    limit: int = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Faults:
    """Counts and spoils what happens below ``root``; ``tell`` gets (number, operation, path relative to root) of each."""

    def __init__(
        self, root: str, fault: Fault, tell: Callable[[int, str, str], None], phase: Callable[[], str]
    ) -> None:
        self.root = os.path.realpath(root)
        self.fault, self.tell, self.phase = fault, tell, phase
        self.count = self.calls = 0
        self.failed = False
        self.shift = 0.0
        self.paths: dict[int, str] = {}
        self.real: dict[str, Any] = {}

    # -- the one place where everything passes -----------------------------------------------------------------------

    def operation(self, kind: str, path: str, do: Callable[[], Any], torn: Callable[[], Any] | None = None) -> Any:
        fault = self.fault
        if not fault.phase or fault.phase == self.phase():
            self.count += 1
        n = self.count
        self.tell(n, kind, os.path.relpath(path, self.root))
        if fault.photos and os.path.isdir(self.root):
            shutil.copytree(self.root, os.path.join(fault.photos, f"{n:04d}"))
        for when, seconds in fault.jumps:
            if when == n:
                self.shift += seconds
        hit = bool(fault.at) and not fault.call
        if hit and fault.how == "fail":
            refused = CHANGES if fault.error in (errno.EROFS, errno.EACCES) else GROWS
            if kind in refused and n >= fault.at and (fault.sticky or not self.failed):
                if torn is not None and not self.failed:
                    torn()
                self.failed = True
                self._raise(kind, path)
        elif hit and n == fault.at:
            if fault.how == "torn" and torn is not None:
                torn()
            if fault.how != "after":
                die()
            do()
            die()
        return do()

    def _raise(self, kind: str, path: str) -> None:
        code = self.fault.error
        if kind == "tensors":
            from safetensors import SafetensorError

            raise SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")
        if kind in ("write", "fsync", "truncate"):  # the system names no file for what goes through a descriptor
            raise OSError(code, os.strerror(code))
        raise OSError(code, os.strerror(code), path)

    def _where(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The absolute path, or None where it is not below the root."""
        if isinstance(path, int):
            return self.paths.get(path)
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(self.paths.get(dir_fd, "/"), text)
        text = os.path.abspath(text)
        return text if text == self.root or text.startswith(self.root + os.sep) else None

    # -- the calls that are replaced ---------------------------------------------------------------------------------

    def install(self) -> None:
        """Replace the calls, for good: the process is thrown away."""
        for name in ("open", "close", "write", "fsync", "ftruncate", "replace", "rename", "chmod", "mkdir", "unlink", "remove",
                     "rmdir"):  # fmt: skip
            self.real[name] = getattr(os, name)
            setattr(os, name, getattr(self, f"_{name}"))
        self.real["io"] = io.open
        builtins.open = io.open = self._file  # type: ignore[assignment]
        import safetensors.torch

        self.real["tensors"] = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._tensors
        if not self.fault.locks:
            fcntl.lockf = fcntl.flock = self._no_locks  # type: ignore[assignment]
        if self.fault.jumps:
            self._replace_clock()
        if self.fault.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.fault.limit, self.fault.limit))
        self.enter(self.phase())

    def enter(self, phase: str) -> None:
        """Count calls from here on, or stop it: counting makes Python slow."""
        if self.fault.call:
            sys.setprofile(self._call if self.fault.phase in ("", phase) else None)

    def _call(self, frame: Any, event: str, argument: Any) -> None:
        self.calls += 1
        if self.calls == self.fault.at:
            die()

    def _no_locks(self, *_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def _replace_clock(self) -> None:
        import datetime as module

        now, now_ns, real = time.time, time.time_ns, module.datetime

        class Shifted(real):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return real.now(tz) + module.timedelta(seconds=self.shift)

        time.time = lambda: now() + self.shift
        time.time_ns = lambda: now_ns() + int(self.shift * 1e9)
        for name, loaded in list(sys.modules.items()):
            if name.startswith("keeplora") and getattr(loaded, "datetime", None) is real:
                loaded.datetime = Shifted  # type: ignore[attr-defined]

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def do() -> int:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)

        where = self._where(path, dir_fd)
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        fd = self.operation("open", where, do) if where and writes else do()
        if where:
            self.paths[fd] = where
        return fd

    def _close(self, fd: int) -> None:
        self.paths.pop(fd, None)
        self.real["close"](fd)

    def _write(self, fd: int, data: Any) -> int:
        def do() -> int:
            return self.real["write"](fd, data)

        where = self.paths.get(fd)
        half = bytes(data)[: len(data) // 2]
        return self.operation("write", where, do, lambda: self.real["write"](fd, half)) if where else do()

    def _fsync(self, fd: int) -> None:
        # Not done: it is for when the power fails, which these faults are not, and it takes a disk's time.
        where = self.paths.get(fd if isinstance(fd, int) else fd.fileno())
        if where and not os.path.isdir(where):
            self.operation("fsync", where, lambda: None)

    def _ftruncate(self, fd: int, length: int) -> None:
        where = self.paths.get(fd)
        do = lambda: self.real["ftruncate"](fd, length)  # noqa: E731
        self.operation("truncate", where, do) if where else do()

    def _two(self, name: str, src: Any, dst: Any, **more: Any) -> None:
        where = self._where(dst, more.get("dst_dir_fd"))
        do = lambda: self.real[name](src, dst, **more)  # noqa: E731
        self.operation("rename", where, do) if where else do()

    def _replace(self, src: Any, dst: Any, **more: Any) -> None:
        self._two("replace", src, dst, **more)

    def _rename(self, src: Any, dst: Any, **more: Any) -> None:
        self._two("rename", src, dst, **more)

    def _one(self, name: str, kind: str, path: Any, *args: Any, **more: Any) -> None:
        where = self._where(path, more.get("dir_fd"))
        do = lambda: self.real[name](path, *args, **more)  # noqa: E731
        self.operation(kind, where, do) if where else do()

    def _chmod(self, path: Any, mode: int, **more: Any) -> None:
        self._one("chmod", "chmod", path, mode, **more)

    def _mkdir(self, path: Any, mode: int = 0o777, **more: Any) -> None:
        where = self._where(path, more.get("dir_fd"))
        if where and os.path.isdir(where):  # mkdir(exist_ok=True) of what is there changes nothing
            self.real["mkdir"](path, mode, **more)
        else:
            self._one("mkdir", "mkdir", path, mode, **more)

    def _unlink(self, path: Any, **more: Any) -> None:
        self._one("unlink", "unlink", path, **more)

    def _remove(self, path: Any, **more: Any) -> None:
        self._one("remove", "unlink", path, **more)

    def _rmdir(self, path: Any, **more: Any) -> None:
        self._one("rmdir", "rmdir", path, **more)

    def _tensors(self, tensors: Any, filename: Any, *args: Any, **more: Any) -> None:
        def do() -> None:
            self.real["tensors"](tensors, filename, *args, **more)

        def torn() -> None:
            do()
            os.truncate(filename, os.path.getsize(filename) // 2)

        where = self._where(filename)
        self.operation("tensors", where, do, torn) if where else do()

    def _file(self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
              newline: str | None = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
        where = self._where(file)
        if not set(mode) & set("wax+") or where is None:
            if self.fault.sample and not isinstance(file, int) and os.fsdecode(file).endswith(self.fault.sample):
                raise OSError(self.fault.error, os.strerror(self.fault.error), os.fsdecode(file))
            return self.real["io"](file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw_mode = mode.replace("b", "").replace("t", "")
        make = lambda: _File(self, where, file, raw_mode, closefd, opener)  # noqa: E731
        raw = make() if isinstance(file, int) else self.operation("open", where, make)
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        text = io.TextIOWrapper(buffer, encoding, errors, newline)
        text.mode = mode
        return text


class _File(io.FileIO):
    """A file whose writes pass through `Faults.operation`."""

    def __init__(self, faults: Faults, where: str, *args: Any) -> None:
        super().__init__(*args)
        self._faults, self._where = faults, where
        self._fd = self.fileno()
        faults.paths[self._fd] = where

    def write(self, data: Any) -> int | None:
        write, half = super().write, bytes(data)[: len(data) // 2]
        return self._faults.operation("write", self._where, lambda: write(data), lambda: write(half))

    def truncate(self, size: int | None = None) -> int:
        truncate = super().truncate
        return self._faults.operation("truncate", self._where, lambda: truncate(size))

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(AttributeError):
                self._faults.paths.pop(self._fd, None)
        super().close()
