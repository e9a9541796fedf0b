"""Runs that die: in a forked process, so that no handler of ours can tidy up, at a step that the test names."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keeplora.experiment import Experiment
from keeplora.experiment import training as loop_module
from keeplora.experiment.interrupt import Interrupted, listening

DEAD = 57


def _on_steps(action: Callable[[int], None]) -> None:
    """``action(n)`` inside step n of this process, when the weights have moved and before anything is kept."""
    inner = loop_module._Loop._step
    done = [0]

    def step(self: Any, batch: Any) -> None:
        after = self.hooks.after_step

        def after_step() -> None:
            after()
            done[0] += 1
            action(done[0])

        self.hooks.after_step = after_step
        try:
            inner(self, batch)
        finally:
            self.hooks.__dict__.pop("after_step", None)

    loop_module._Loop._step = step  # type: ignore[method-assign]  # of a forked process alone


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does ``work``; signals as a shell tells them."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        except Interrupted as stopped:
            code = 128 + stopped.signal
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - status if status < 0 else status


def dies(config: Mapping[str, Any], path: Path, at: int, how: str) -> None:
    """Run ``config`` into ``path`` until step ``at``, counted over the tasks: "kill" there, or "term" or "int" heard there."""

    def action(n: int) -> None:
        if n == at and how == "kill":
            os._exit(DEAD)
        if n == at:
            os.kill(os.getpid(), {"term": signal.SIGTERM, "int": signal.SIGINT}[how])

    def work() -> None:
        _on_steps(action)
        with listening():
            if (path / "config.yaml").is_file():
                Experiment.resume(path, quiet=True)
            else:
                Experiment({**config, "output": str(path)}, quiet=True).run()

    assert in_child(work) == {"kill": DEAD, "term": 143, "int": 130}[how]


@contextlib.contextmanager
def counted_steps(monkeypatch: Any) -> Iterator[list[tuple[str, int, int]]]:
    """(task, epoch, step) of every step that is taken inside."""
    taken: list[tuple[str, int, int]] = []
    inner = loop_module._Loop._step

    def step(self: Any, batch: Any) -> None:
        taken.append((self.objective.task.name, self.state.epoch, self.state.step + 1))
        inner(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module._Loop, "_step", step)
        yield taken
