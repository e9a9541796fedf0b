"""What every fuzzed input is judged by: the command line answers in one sentence, in time, and touches nothing else.

An `Input` is a command line and what may come of it. `Arena.judge` carries it out and returns what is wrong: a traceback, a
hang, a wrong thing accepted in silence, a file changed outside the places that may be written, a process or connection
opened, code of the input run (a canary that appears).
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keeplora.cli import main

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 120.0
"""Longest time that one input may take; most take a tenth of a second, but a machine may be busy."""
MEMORY = 3 << 30
"""Address space that the inputs of the full form may take beyond what the process has at its start."""

Expect = Literal["refused", "either", "accepted"]


@dataclass(frozen=True)
class Input:
    """One command line, and what may come of it.

    Attributes:
        mutator: what was done to the input; words: the command line.
        expect: "refused" (never accepted), "accepted" (refusing it is a fault), or "either".
        may_write: folders that the command may fill.
        accepted: called when it was accepted; returns what is wrong with the result, or "".
    """

    mutator: str
    words: tuple[str, ...]
    expect: Expect = "either"
    may_write: tuple[Path, ...] = ()
    accepted: Callable[[Answer], str] | None = None


@dataclass(frozen=True)
class Answer:
    """What a command left behind; `fault` is the exception that came through the command line, which must not be."""

    code: int
    out: str
    err: str
    seconds: float
    fault: BaseException | None = None


class TooLong(BaseException):
    """The time limit; nothing between it and the harness may catch it as an error."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(more: int = MEMORY) -> Iterator[None]:
    """Allocations beyond the process's present address space and ``more`` bytes fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as handle:
        now = int(handle.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_here(words: Sequence[str], seconds: float = SECONDS) -> Answer:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    code, fault, start = 0, None, time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with time_limit(seconds):
                main([*words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = error
    return Answer(code, out.getvalue(), err.getvalue(), time.monotonic() - start, fault)


def run_apart(words: Sequence[str], environment: Mapping[str, str], cwd: Path, seconds: float = 5 * SECONDS) -> Answer:
    """The command line as a process of its own: what a person sees."""
    path = os.pathsep.join([str(CHECKOUT / "src"), os.environ.get("PYTHONPATH", "")])
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "keeplora", *words], capture_output=True, cwd=cwd, timeout=seconds, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(1, "", "", time.monotonic() - start, TooLong(f"more than {seconds:g} s"))
    out, err = (stream.decode("utf-8", errors="replace") for stream in (done.stdout, done.stderr))
    return Answer(done.returncode, out, err, time.monotonic() - start)


class _Watch:
    """Writes, processes and connections of this process, told by Python's audit events while `on`."""

    def __init__(self) -> None:
        self.on, self.allowed, self.seen = False, (), []  # type: tuple[bool, tuple[str, ...], list[str]]
        self._installed = False

    def start(self, allowed: Sequence[Path]) -> None:
        if not self._installed:
            sys.addaudithook(self._event)
            self._installed = True
        self.allowed = tuple(str(path) for path in allowed)
        self.seen, self.on = [], True

    def stop(self) -> list[str]:
        self.on = False
        return self.seen

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._write(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            self._write(event, args[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._write(event, args[1])
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            self.seen.append(f"{event} {args[:2]!r}"[:200])

    def _write(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        name = os.path.abspath(os.fsdecode(path))
        if "__pycache__" in name or name in ("/dev/null", "/dev/shm") or name.startswith(("/dev/shm/", "/proc/self/")):
            return
        if not any(name == allowed or name.startswith(f"{allowed}{os.sep}") for allowed in self.allowed):
            self.seen.append(f"{event} {name}")


_watch = _Watch()


def snapshot(root: Path, leave_out: Sequence[Path] = ()) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of change of everything below ``root``, links not followed."""
    found: dict[str, tuple[int, int, int]] = {}
    skip = {str(path) for path in leave_out}
    todo = [str(root)]
    while todo:
        folder = todo.pop()
        for entry in os.scandir(folder):
            if entry.path in skip:
                continue
            told = entry.stat(follow_symlinks=False)
            is_dir = entry.is_dir(follow_symlinks=False)
            # a folder's own time changes with a hidden file that came and went, which is no harm
            found[entry.path] = (told.st_mode, 0 if is_dir else told.st_size, 0 if is_dir else told.st_mtime_ns)
            if is_dir:
                todo.append(entry.path)
    return found


@dataclass
class Tally:
    """Counts of one kind of inputs."""

    kind: str
    inputs: int = 0
    apart: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    mutators: dict[str, Counter[str]] = field(default_factory=dict)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, item: Input, answer: Answer, faults: Sequence[str], apart: bool = False) -> None:
        outcome = "fault" if faults else "accepted" if answer.code == 0 else "refused"
        self.inputs += 1
        self.apart += apart
        self.outcomes[outcome] += 1
        self.mutators.setdefault(item.mutator, Counter())[outcome] += 1
        self.slowest = max(self.slowest, 0.0 if apart else answer.seconds)
        self.faults += [f"{item.mutator}: {fault}\n    keeplora {' '.join(item.words)[:300]}" for fault in faults]


class Arena:
    """A folder that holds all that an input may see, and the watch over everything else.

    ``also``: folders elsewhere that must stay as they are. `home`, `cwd` and `outside` lie in the arena; `fresh` gives a new
    folder for each input. A canary is a file in `outside` that code of an input would make.
    """

    def __init__(self, root: Path, also: tuple[Path, ...] = ()) -> None:
        self.root, self.also = root, also
        self.home, self.cwd, self.outside, self.inputs = (root / n for n in ("home", "cwd", "outside", "inputs"))
        for folder in (self.home, self.cwd, self.outside, self.inputs):
            folder.mkdir(parents=True)
        self.canary = self.outside / "canary"
        (self.outside / "victim.txt").write_text("not to be touched", encoding="utf-8")
        self._count = 0

    def fresh(self) -> Path:
        self._count += 1
        folder = self.inputs / f"{self._count:05d}"
        folder.mkdir()
        return folder

    def clear(self) -> None:
        shutil.rmtree(self.inputs)
        self.inputs.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / ".cache"), "KEEPLORA_CACHE": str(self.home / "cache"),
            "HF_HOME": str(self.home / "hf"), "KEEPLORA_NO_CACHE": "1", "HF_HUB_OFFLINE": "1",
            "KEEPLORA_CANARY": str(self.canary), "MPLCONFIGDIR": str(self.root.parent / f"{self.root.name}-matplotlib"),
        }  # fmt: skip

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """In the arena's folder and surroundings, with the hub out of reach."""
        import datasets
        import matplotlib.font_manager  # noqa: F401 (it writes a list of fonts where it is first imported)
        from huggingface_hub import constants

        kept, cwd, offline = dict(os.environ), Path.cwd(), constants.HF_HUB_OFFLINE
        cache = datasets.config.HF_DATASETS_CACHE
        datasets.config.HF_DATASETS_CACHE = self.home / "hf" / "datasets"
        os.environ.update(self.environment)
        os.chdir(self.cwd)
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = offline
            datasets.config.HF_DATASETS_CACHE = cache
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(kept)

    def _snapshot(self, item: Input) -> dict[str, tuple[int, int, int]]:
        found: dict[str, tuple[int, int, int]] = {}
        for root in (self.root, *self.also):
            found |= snapshot(root, item.may_write)
        return found

    def judge(self, item: Input, *, apart: bool = False) -> tuple[Answer, list[str]]:
        """Carry the command line out; returns its answer and everything that is wrong."""
        before = self._snapshot(item)
        if apart:
            answer, touched = run_apart(item.words, self.environment, self.cwd), []
        else:
            _watch.start(item.may_write)
            try:
                answer = run_here(item.words)
            finally:
                touched = _watch.stop()
        faults = told_wrong(item, answer) + [f"touched: {what}" for what in touched]
        after = self._snapshot(item)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        faults += [f"changed: {name}" for name in changed[:5]]
        if self.canary.exists():
            faults.append("code of the input was run")
            self.canary.unlink()
        return answer, faults


def told_wrong(item: Input, answer: Answer) -> list[str]:
    """What is wrong with an answer by itself."""
    if isinstance(answer.fault, TooLong):
        return [f"a hang: {answer.fault}"]
    if answer.fault is not None:
        where, frame = "", answer.fault.__traceback__
        while frame is not None:
            code = frame.tb_frame.f_code
            if "/keeplora/" in code.co_filename:
                where = f" in {Path(code.co_filename).name}:{frame.tb_lineno} ({code.co_name})"
            frame = frame.tb_next
        return [f"a traceback: {type(answer.fault).__name__}: {str(answer.fault)[:160]!r}{where}"]
    faults = []
    if answer.code not in (0, 1, 2):
        faults.append(f"exit status {answer.code}")
    if "Traceback" in answer.err:
        faults.append(f"a traceback: {answer.err.strip().splitlines()[-1][:200]}")
    # an audit and the doctor tell what they found as a table, and by the exit status
    verdict = (item.words[0] == "audit" and "OVER the limit" in answer.out) or (
        item.words[1] in ("doctor", "verify") and answer.out
    )
    if answer.code == 1 and not verdict and not _is_sentence(answer.err):
        faults.append(f"no sentence on standard error: {answer.err[-200:]!r}")
    if answer.code == 0 and item.expect == "refused":
        faults.append("accepted in silence")
    if answer.code != 0 and item.expect == "accepted":
        faults.append(f"refused, though nothing is wrong: {answer.err.strip()[:300]}")
    if answer.code == 0 and item.accepted is not None and (wrong := item.accepted(answer)):
        faults.append(wrong)
    return faults


def _is_sentence(err: str) -> bool:
    """ "Error: ...", followed by nothing but the lines of its list; progress may come before."""
    lines = err.strip("\n").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("Error: ")]
    return bool(starts) and all(line.startswith("  - ") for line in lines[starts[-1] + 1 :])


Maker = Callable[[Arena, random.Random], Input]


def fuzz(
    kind: str, makers: Mapping[str, Maker], arena: Arena, count: int, *, seed: int = 0, apart_every: int = 0
) -> Tally:
    """``count`` inputs, mutators in turn, each from its own seed; every ``apart_every``-th as a process of its own."""
    tally = Tally(kind)
    names = list(makers)
    with arena.entered():
        for i in range(count):
            name = names[i % len(names)]
            rng = random.Random(f"{kind}/{name}/{i // len(names)}/{seed}")
            item = makers[name](arena, rng)
            apart = bool(apart_every) and i % apart_every == apart_every - 1
            answer, faults = arena.judge(item, apart=apart)
            tally.add(item, answer, [f"[{name} #{i // len(names)}] {fault}" for fault in faults], apart)
            if not faults:
                arena.clear()
    return tally


def table(tallies: Sequence[Tally]) -> str:
    """The counts as lines of text.

    >>> print(table([Tally("yaml", inputs=2)]).splitlines()[-1].split())
    ['all', '2', '0', '0', '0', '0']
    """
    head = ("inputs of", "tried", "refused", "accepted", "faults", "own process", "slowest")
    rows = [
        (t.kind, t.inputs, t.outcomes["refused"], t.outcomes["accepted"], t.outcomes["fault"], t.apart, f"{t.slowest:.1f} s")
        for t in tallies
    ]  # fmt: skip
    total = ("all", *(sum(row[i] for row in rows) for i in range(1, 6)), "")
    lines = [tuple(map(str, row)) for row in (head, *rows, total)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )
