"""A process that has everything imported and forks a child for each command, in which faults are put.

Started as ``python -m tests.torture.crash_server``; `tests.torture.crash_world.Server` speaks to it, one JSON object a
line: the command's words, the folder whose files are watched, the fault. Starting Python anew would cost some seconds a
command, and a fork of pytest would carry over its threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

PHASES = (
    "start-up", "statistics", "training", "checkpoint", "merge", "features", "ledger", "evaluation", "results", "report", "end",
)  # fmt: skip
#: Which calls are phases: module, class or None, function, phase.
_CALLS = (
    ("keeplora.tuner.learner", "ContinualLearner", "finish_task", "merge"),
    ("keeplora.tuner.learner", "ContinualLearner", "_protect", "features"),
    ("keeplora.tuner.ledger", "Ledger", "append", "ledger"),
    ("keeplora.experiment.checkpoint", "Checkpoints", "write", "checkpoint"),
    ("keeplora.experiment.runner", "Run", "_evaluate", "evaluation"),
    ("keeplora.experiment.runner", "Run", "_write", "results"),
    ("keeplora.experiment.runner", "Run", "_score_last", "results"),
    ("keeplora.experiment.runner", "Run", "_report", "report"),
    ("keeplora.experiment.run_directory", "RunDirectory", "_leave", "end"),
    ("keeplora.experiment.runner", None, "render_report", "report"),
    ("keeplora.cli.run", None, "finish", "report"),
    ("keeplora.report.study", None, "plot_study", "report"),
)
_WARM = (
    "keeplora.cli",
    "keeplora.experiment.entry",
    "keeplora.experiment.runner",
    "keeplora.experiment.serving",
    "keeplora.report.terminal",
)


class Phases:
    """Where a child is: the number of its phase in memory that it shares with the server."""

    def __init__(self, shared: mmap.mmap) -> None:
        self.shared = shared
        self.entered: Callable[[str], None] = lambda name: None
        self.base, self.stack = "start-up", []
        self._show()

    def _show(self) -> None:
        name = self.stack[-1] if self.stack else self.base
        self.shared[0] = PHASES.index(name)
        self.entered(name)

    @property
    def now(self) -> str:
        return PHASES[self.shared[0]]

    def begin(self, name: str) -> None:
        self.base = name
        self._show()

    @contextlib.contextmanager
    def within(self, name: str) -> Any:
        self.stack.append(name)
        self._show()
        try:
            yield
        finally:
            self.stack.pop()
            self._show()

    def install(self) -> None:
        from keeplora.experiment.progress import Progress

        for module, owner, name, phase in _CALLS:
            holder: Any = importlib.import_module(module)
            holder = getattr(holder, owner) if owner else holder
            setattr(holder, name, self._wrapped(getattr(holder, name), phase))
        told = Progress.phase

        def phase_of(progress: Any, name: str, total: int | None = None) -> None:
            known = {"statistics": "statistics", "protecting": "merge"}
            if name in known or name.startswith("epoch"):
                self.begin(known.get(name, "training"))
            told(progress, name, total)

        Progress.phase = phase_of  # type: ignore[method-assign]

    def _wrapped(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **more: Any) -> Any:
            with self.within(phase):
                result = function(*args, **more)
            if phase in ("merge", "results"):  # what follows a task belongs to its results
                self.begin("results")
            return result

        return call


def _child(request: dict[str, Any], shared: mmap.mmap) -> int:
    from tests.torture.crash_faults import Fault, Faults

    for stream, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], None), (2, request["err"], None)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if flags is None else flags)
        os.dup2(fd, stream)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.update(request["environment"])
    if request["cwd"]:
        os.chdir(request["cwd"])
    phases = Phases(shared)
    phases.install()
    ops = os.open(request["ops"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if request["ops"] else None
    write = os.write

    def note(*entry: Any) -> None:
        if ops is not None:
            write(ops, json.dumps(entry).encode() + b"\n")

    values = {**request["fault"], "jumps": tuple(map(tuple, request["fault"].get("jumps", ())))}
    faults = Faults(request["root"], Fault(**values), lambda *op: note(*op, phases.now), lambda: phases.now)

    def entered(name: str) -> None:
        note("phase", name, faults.calls)
        faults.enter(name)

    if faults.fault.report:
        import keeplora.report.html as html

        def broken(*_: Any) -> None:
            raise ValueError("a chart that cannot be drawn")

        html._context = broken  # type: ignore[assignment]
    faults.install()
    entered("start-up")
    phases.entered = entered
    from keeplora.cli import main

    try:
        main(request["words"])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        sys.setprofile(None)
        traceback.print_exc()
        return 70
    finally:
        sys.setprofile(None)
        note("modules", *sys.modules)
    return 0


def learn(ops: str) -> None:
    """Import what a child came to import, so that no later one has to."""
    with open(ops, encoding="utf-8") as lines:
        told = [json.loads(line) for line in lines if line.startswith('["modules"')]
    for name in (name for names in told for name in names[1:]):
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def main() -> None:
    """Answer requests until the other side closes its end."""
    for module in _WARM:
        importlib.import_module(module)
    import torch

    from keeplora.report.pages import page_template

    page_template("report.html.j2")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        shared = mmap.mmap(-1, 1)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 71
            try:
                code = _child(request, shared)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        status, killed = None, False
        while status is None:
            ended, value = os.waitpid(pid, os.WNOHANG)
            spent = time.monotonic() - began
            if ended:
                status = os.waitstatus_to_exitcode(value)
            elif not killed and spent > (request["kill_after"] or request["timeout"]):
                os.kill(pid, signal.SIGKILL)
                killed = True
            else:
                time.sleep(0.005)
        if request["ops"]:
            learn(request["ops"])
        answer = {"code": status, "phase": PHASES[shared[0]], "seconds": time.monotonic() - began}
        print(json.dumps({**answer, "late": killed and not request["kill_after"]}), file=answers)


if __name__ == "__main__":
    main()
