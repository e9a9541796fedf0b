"""One writer per folder."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
from pathlib import Path

from keeplora.errors import KeepLoraError
from keeplora.files import real_path

_held: set[Path] = set()  # locks of this process: a POSIX record lock does not see them
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def _born(pid: int) -> str | None:
    """What tells a living process from a later one of the same number; empty where the system does not say, None: it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{stat.rsplit(')', 1)[1].split()[19]}"  # field 22: clock ticks from boot to its start
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


class FolderLock:
    """One writer per folder. The system drops the lock when its process ends, so a killed run leaves nothing to clean up.

    A record lock (lockf) and not flock: data-loading processes inherit flock's lock and would hold it past their parent.
    A file system that has no locks (some cluster and network drives) is used all the same, and `warning` says so: there the
    process that ``.lock`` names is looked up, and a folder whose process lives on this machine is refused. Two that start in
    the same instant would not see each other.
    """

    def __init__(self, folder: Path) -> None:
        self.path = real_path(folder) / ".lock"
        self.warning: str | None = None
        self._fd: int | None = None
        self._owner = 0

    def acquire(self) -> None:
        """Raise `KeepLoraError` where another writer has the folder, OSError where it cannot be written to."""
        if self.path in _held:
            raise KeepLoraError(
                f"{self.path.parent} is already open in this process; close the first run before a second"
            )
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = os.read(fd, 256).decode("ascii", errors="replace").split()
            os.lseek(fd, 0, os.SEEK_SET)
            try:
                _lock(fd)
            except (BlockingIOError, PermissionError):
                raise self._refusal(holder) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise KeepLoraError(f"{self.path} cannot be locked: {error.strerror or error}") from None
                self._look_up(holder)
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n{platform.node()} {_born(os.getpid())}\n".encode("ascii", errors="replace"))
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._owner = fd, os.getpid()
        _held.add(self.path)

    def _refusal(self, holder: list[str]) -> KeepLoraError:
        who = f"process {holder[0]}" if holder and holder[0].isdigit() else "another process"
        return KeepLoraError(
            f"{who} is writing to {self.path.parent}; wait until it ends or stop it, or choose another --output (`output:` "
            "in the file)"
        )

    def _look_up(self, holder: list[str]) -> None:
        """Without locks: whether the process lives whose number, machine and birth the last writer left here."""
        self.warning = (
            f"{self.path.parent} lies on a file system without locks: see to it that no second process writes there"
        )
        if len(holder) < 2 or not holder[0].isdigit():
            return
        pid, host, born = int(holder[0]), holder[1], holder[2] if len(holder) > 2 else ""
        if host != platform.node():
            raise KeepLoraError(
                f"{self.path.parent} was last written by process {pid} on {host}, and its file system has no locks to tell "
                f"whether that still runs; if it does not, delete {self.path}"
            )
        if _born(pid) == born:
            raise self._refusal(holder)

    def release(self) -> None:
        if self._fd is None or self._owner != os.getpid():  # a forked child does not own the lock
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)  # the name of the process that held it last would mislead
        os.close(self._fd)
        self._fd = None
        _held.discard(self.path)


def _lock(fd: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(fd, 1 << 20, os.SEEK_SET)  # a byte beyond the text, which others may read
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        os.lseek(fd, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
