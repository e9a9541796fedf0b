"""Run a study's cells as processes of their own, several at once; what one does never costs another.

Each cell is ``python -m keeplora run``, or ``resume`` where it had begun. It runs in a session of its own, so Ctrl-C
reaches this process alone, which passes it on once. A study that is killed leaves its cells running: they finish by
themselves, and the next study over the folder waits for them as for its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from keeplora.experiment.interrupt import Interrupted
from keeplora.study.plan import CellKey, StudyPlan
from keeplora.study.progress import StudyProgress
from keeplora.study.resources import Slots
from keeplora.study.store import CellRecord, StudyStore, is_being_written

PROGRAM = (sys.executable, "-m", "keeplora")
POLL = 0.2
PATIENCE = 60.0
"""Seconds that an interrupted run gets to write its state before it is ended."""
ERROR_LINES = 6
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class StudyInterrupted(Exception):
    """Ctrl-C, or SIGTERM: the runs were interrupted and the state is kept.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@dataclass
class _Job:
    key: CellKey
    process: subprocess.Popen[bytes] | None  # None: a run that an earlier study started and that still goes on
    gpu: str | None
    started: float
    log: Path


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler's time limit) is heard as Ctrl-C, so that the cells' state is kept."""

    def raise_interrupt(number: int, *_: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_interrupt)
    # A shell that starts us in the background has SIGINT ignored, which the runs would inherit and then never hear ours. A
    # handler that does nothing ignores it here alone: handlers do not outlive exec.
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if deaf:
        signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_gently(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Pass Ctrl-C on to keeplora's processes and wait until they have written their state.

    After `PATIENCE`, or at a second Ctrl-C, what is left is ended at once.
    """
    until = time.monotonic() + PATIENCE
    for process in processes:  # one that has ended already is not signalled: Popen looks first
        process.send_signal(signal.SIGINT) if os.name == "posix" else process.terminate()
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def last_lines(text: str, count: int = ERROR_LINES) -> str:
    """The last lines of an error stream, without colours, blank lines and what a progress bar overwrote.

    >>> last_lines("a\\n\\nb\\n\\x1b[31mError: c\\x1b[0m\\n", 2)
    'b\\nError: c'
    """
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in _ANSI.sub("", text).rstrip().split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def drop_ledger(folder: Path) -> int:
    """Delete the tensors of a finished run's ledger (its records stay) and return how many bytes that were."""
    freed = 0
    for file in sorted((folder / "ledger").rglob("*.safetensors")):
        freed += file.stat().st_size
        file.unlink()
    return freed


def _hold(log: Path) -> IO[bytes] | None:
    """The cell's own lock, to be passed on to its process, or None while a process has it.

    The process holds it from its first moment to its last, whatever becomes of this one: the run directory's lock comes
    only when everything is imported, and until then an orphan would be taken for a cell that never began.
    """
    handle = open(f"{log}.lock", "ab")  # noqa: SIM115 (it outlives this function)
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
    return handle


class Executor:
    """The cells of one call of `keeplora compare`, in the order given, at most ``slots.jobs`` at a time."""

    def __init__(
        self, plan: StudyPlan, store: StudyStore, keys: Sequence[CellKey], slots: Slots, progress: StudyProgress
    ) -> None:
        self.plan, self.store, self.slots, self.progress = plan, store, slots, progress
        self._waiting = deque(key for key in keys if store.cells[key].state != "finished")
        self._running: list[_Job] = []

    def run(self) -> list[CellRecord]:
        """Run what is not finished; returns the cells that failed.

        Raises
        ------
        StudyInterrupted
            After the runs under way were interrupted and their state was kept.
        """
        failed: list[CellRecord] = []
        with terminate_as_interrupt(), self.progress:
            try:
                while self._waiting or self._running:
                    while self._waiting and len(self._running) < self.slots.jobs:
                        self._start(self._waiting.popleft())
                    self._sleep()
                    for job in [job for job in self._running if self._ended(job)]:
                        self._running.remove(job)
                        record = self._finish(job)
                        if record.state == "failed":
                            failed.append(record)
            except KeyboardInterrupt as stopped:
                self._interrupt()
                raise StudyInterrupted(getattr(stopped, "signal", signal.SIGINT)) from None
            except BaseException:
                self._interrupt()
                raise
        return failed

    def _sleep(self) -> None:
        self.progress.tick([(job.key, time.monotonic() - job.started) for job in self._running], self._waiting)
        time.sleep(POLL)

    def _free_gpu(self) -> str | None:
        if not self.slots.gpus:
            return None
        used = [job.gpu for job in self._running]
        return min(self.slots.gpus, key=used.count)

    def _start(self, key: CellKey) -> None:
        record, folder = self.store.cells[key], self.store.folder(key)
        log = self.store.path / "logs" / (key.folder.removeprefix("cells/").replace("/", "."))
        log.parent.mkdir(parents=True, exist_ok=True)
        held = _hold(log)
        if held is None or (folder.is_dir() and is_being_written(folder)):
            if held is not None:
                held.close()
            record.state = "running"
            self._running.append(_Job(key, None, None, time.monotonic(), log))
            self.progress.started(key, adopted=True)
            self.store.save()
            return
        resumed = (folder / "config.yaml").is_file()
        words = ["resume", str(folder), "--quiet"] if resumed else self.plan.command(key, self.slots.threads)
        gpu = self._free_gpu()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.slots.threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        # Each attempt starts its logs anew: the last lines must be this attempt's.
        with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err, held:
            process = subprocess.Popen(
                [*PROGRAM, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env=environment, start_new_session=True, pass_fds=(held.fileno(),) if os.name == "posix" else (),
            )  # fmt: skip
        record.state, record.error, record.attempts = "running", None, record.attempts + 1
        self._running.append(_Job(key, process, gpu, time.monotonic(), log))
        self.store.save()
        self.progress.started(key, resumed=resumed)

    def _ended(self, job: _Job) -> bool:
        if job.process is not None:
            return job.process.poll() is not None
        held = _hold(job.log)
        if held is None:
            return False
        held.close()
        return not is_being_written(self.store.folder(job.key))

    def _finish(self, job: _Job, interrupted: bool = False) -> CellRecord:
        """Note how a run ended; a cell that is not finished after a call of its own has failed."""
        record, folder = self.store.cells[job.key], self.store.folder(job.key)
        record.state = "interrupted"
        if job.process is not None:
            record.seconds = round((record.seconds or 0.0) + time.monotonic() - job.started, 1)
        self.store.refresh([job.key])
        code = job.process.returncode if job.process is not None else None
        if record.state == "finished":
            if not self.plan.keep_ledgers and record.dropped_bytes is None:
                record.dropped_bytes = drop_ledger(folder)
        elif not interrupted and job.process is None:
            # Another study's run that stopped half-way: it is this study's to go on with.
            self._waiting.appendleft(job.key)
        elif not interrupted:
            record.state, record.error = "failed", self._error(job, code)
        self.store.save()
        self.progress.ended(record)
        return record

    def _error(self, job: _Job, code: int | None) -> str:
        told = ""
        with contextlib.suppress(OSError):
            told = last_lines(Path(f"{job.log}.err").read_text(encoding="utf-8", errors="replace"))
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
            hint = " (often: out of memory; give fewer --jobs)" if name == "SIGKILL" else ""
            told = f"{told}\nended by {name}{hint}".lstrip()
        return told or f"ended with status {code} and no message"

    def _interrupt(self) -> None:
        """Pass Ctrl-C on, and wait until the runs have written their state; a second one ends them at once."""
        jobs = [job for job in self._running if job.process is not None]
        self.progress.interrupting(len(jobs))
        end_gently([job.process for job in jobs if job.process is not None])
        for job in self._running:
            if job.process is not None:
                self._finish(job, interrupted=True)
        self._running.clear()
        self.store.save()
