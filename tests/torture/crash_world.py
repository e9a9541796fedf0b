"""What the crash tests share: the server's other end, a tiny run, and what must be true of a run directory after a fault."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from keeplora.experiment.run_directory import RunDirectory
from keeplora.tuner.ledger import Ledger
from keeplora.tuner.ledger_check import verify
from tests.cli.tiny_world import ledger_tensors, results_of, same_tensors, status_of
from tests.torture.crash_faults import Fault

CHECKOUT = Path(__file__).resolve().parents[2]
KILLED = -9
_STRAY = re.compile(r"\.(tmp|part)$")


@dataclass(frozen=True)
class Answer:
    """How a command ended: status (-9: killed), what it printed, the phase it was in, and its operations if asked for."""

    code: int
    out: str
    err: str
    phase: str
    seconds: float
    ops: list[list[Any]]

    @property
    def killed(self) -> bool:
        return self.code == KILLED

    def operations(self) -> list[tuple[int, str, str, str]]:
        """(number, operation, path, phase) of everything that changed a file."""
        return [tuple(op) for op in self.ops if isinstance(op[0], int)]  # type: ignore[misc]

    def calls(self) -> dict[str, list[tuple[int, int]]]:
        """Per phase, the stretches of calls that it lasted."""
        marks = [(op[1], op[2]) for op in self.ops if op[0] == "phase"]
        out: dict[str, list[tuple[int, int]]] = {}
        for (name, start), (_, end) in itertools.pairwise(marks):
            if end > start + 1:
                out.setdefault(name, []).append((start + 1, end))
        return out


class Server:
    """A warm process that runs ``keeplora`` commands, each in a fork of its own with a fault in it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        path = os.pathsep.join([str(CHECKOUT / "src"), str(CHECKOUT)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "KEEPLORA_NO_CACHE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.crash_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment, cwd=CHECKOUT,
        )  # fmt: skip
        assert self._read() == {"ready": True}

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the server of forks ended ({self._process.wait()})"
        return json.loads(line)

    def __call__(
        self, *words: object, root: Path, fault: Fault | None = None, trace: bool = False, kill_after: float | None = None,
        environment: dict[str, str] | None = None, cwd: Path | None = None,
    ) -> Answer:  # fmt: skip
        out, err, ops = (self.scratch / name for name in ("out", "err", "ops"))
        request = {
            "words": [str(word) for word in words], "root": str(root), "fault": asdict(fault or Fault()), "out": str(out),
            "err": str(err), "ops": str(ops) if trace else None, "kill_after": kill_after, "timeout": 120.0,
            "environment": environment or {}, "cwd": str(cwd) if cwd else None,
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        assert not answer["late"], f"{words} did not end: {err.read_text()}"
        lines = [json.loads(line) for line in ops.read_text().splitlines()] if trace else []
        return Answer(answer["code"], out.read_text(), err.read_text(), answer["phase"], answer["seconds"], lines)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Tally(Counter[str]):
    """What was done to how many runs; `line` is what a torture run prints."""

    def line(self, title: str) -> str:
        return f"{title}: " + ", ".join(f"{count} {what}" for what, count in self.items())


SUMMARY: dict[str, Tally] = {}
"""The tallies of this session by title, for the summary."""


def tally(title: str) -> Tally:
    return SUMMARY.setdefault(title, Tally())


# -- what must be true of a run directory ---------------------------------------------------------------------------------


def assert_whole(run: Path) -> None:
    """No file that a reader may open is half-written, at whatever moment the process died."""
    for file in run.rglob("*"):
        relative = file.relative_to(run)
        if any(_STRAY.search(part) for part in relative.parts) or not file.is_file():
            continue
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert tensors.keys() is not None
        elif file.suffix == ".html":
            assert file.read_text(encoding="utf-8").rstrip().endswith("</html>")
    RunDirectory(run).read_events()
    if (run / "ledger").is_dir():
        verify(Ledger.open(run / "ledger"))  # what `keeplora ledger verify` does


def strays(folder: Path) -> list[str]:
    """Unfinished files and folders."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if _STRAY.search(path.name)]


def files(run: Path) -> set[str]:
    """Names of everything in a run's folder."""
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def finished_tasks(run: Path) -> dict[str, str]:
    """Of each task in the ledger, the SHA-256 of its record and its tensors."""
    folders = sorted((run / "ledger").glob("0*"))
    names = ("record.json", "tensors.safetensors")
    return {f.name: hashlib.sha256(b"".join((f / name).read_bytes() for name in names)).hexdigest() for f in folders}


def _told(run: Path) -> dict[str, Any]:
    """results.json without what differs between any two runs: times and memory."""
    results = results_of(run)
    infos = [{k: v for k, v in info.items() if k not in ("seconds", "data_wait")} for info in results["tasks_info"]]
    for info in infos:
        info["epochs"] = [
            {k: v for k, v in epoch.items() if k not in ("seconds", "data_wait")} for epoch in info["epochs"]
        ]
    return {**{k: v for k, v in results.items() if k != "cost"}, "tasks_info": infos}


def _events(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in event.items() if k not in ("seconds", "data_wait")}
        for event in RunDirectory(run).read_events()
    ]


def assert_as_undisturbed(run: Path, straight: Path, *, report: bool = True) -> None:
    """Accuracies, losses, events, predictions and every tensor of the ledger, bit for bit; nothing left over."""
    assert_whole(run)
    assert strays(run) == []
    assert _told(run) == _told(straight)
    assert _events(run) == _events(straight)
    assert same_tensors(ledger_tensors(run), ledger_tensors(straight))
    for file in (straight / "predictions").rglob("*.jsonl"):
        assert (run / file.relative_to(straight)).read_bytes() == file.read_bytes()
    status = status_of(run)
    assert (status["state"], status["error"]) == ("finished", None)
    assert status["tasks_done"] == len(finished_tasks(straight))
    assert status["seconds"] >= 0
    expected = files(straight) - (set() if report else {"report.html"})
    assert files(run) == expected, f"missing: {expected - files(run)}, too many: {files(run) - expected}"


@dataclass
class Runs:
    """One configuration, its undisturbed run, and runs of it that are disturbed and gone on with."""

    server: Server
    config: Path
    folder: Path
    straight: Path
    trace: Answer
    number: int = 0

    @classmethod
    def of(cls, server: Server, config: Path, folder: Path, *, calls: bool = False) -> Runs:
        straight = folder / "straight"
        fault = Fault(at=-1, call=True) if calls else None
        trace = server("run", config, "--output", straight, root=straight, trace=True, fault=fault)
        assert trace.code == 0, trace.err
        return cls(server, config, folder, straight, trace)

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"run-{self.number:04d}"

    def go(self, run: Path, fault: Fault | None = None, **more: Any) -> Answer:
        """Begin the run or go on with it, as a person would: `resume` once there is something to resume."""
        if (run / "config.yaml").is_file():
            return self.server("resume", run, root=run, fault=fault, **more)
        return self.server("run", self.config, "--output", run, root=run, fault=fault, **more)

    def disturb(self, faults: Sequence[Fault], tally: Tally, **more: Any) -> list[Answer]:
        """Go on under one fault after the other, then without one, and compare with the undisturbed run."""
        run = self.new()
        answers: list[Answer] = []
        try:
            kept: dict[str, str] = {}
            for fault in faults:
                answers.append(self.go(run, fault, **more))
                kept = self.after(run, answers[-1], kept, tally)
            self.end(run, kept, tally)
        except AssertionError as error:
            raise AssertionError(f"{faults} in {run}, ended in {[a.phase for a in answers]}: {error}") from error
        shutil.rmtree(run)
        return answers

    def end(self, run: Path, kept: dict[str, str], tally: Tally) -> None:
        """Go on undisturbed to the end, and compare."""
        last = self.go(run)
        assert last.code == 0, last.err
        self._keeps(run, kept)
        assert_as_undisturbed(run, self.straight)
        tally["runs ended equal"] += 1

    def after(self, run: Path, answer: Answer, kept: dict[str, str], tally: Tally) -> dict[str, str]:
        assert answer.code in (KILLED, 0, 1), answer.err
        if answer.killed:
            tally["kills"] += 1
            tally[f"in {answer.phase}"] += 1
        elif answer.code == 1:
            assert_one_sentence(answer)
            tally["refusals told in one sentence"] += 1
        if run.is_dir():
            assert_whole(run)
        return self._keeps(run, kept)

    @staticmethod
    def _keeps(run: Path, kept: dict[str, str]) -> dict[str, str]:
        """No task that was finished before is gone or another."""
        now = finished_tasks(run)
        assert kept.items() <= now.items(), f"finished before: {list(kept)}, now: {list(now)}"
        return now


def assert_one_sentence(answer: Answer) -> None:
    """Status 1 with one line that starts with Error: as the last thing said, and no traceback."""
    assert answer.code == 1, (answer.code, answer.err)
    assert "Traceback" not in answer.err, answer.err
    assert answer.err.rstrip().splitlines()[-1].startswith("Error: "), answer.err
    assert f"\n{answer.err}".count("\nError: ") == 1, answer.err


def sentence(answer: Answer) -> str:
    assert_one_sentence(answer)
    return answer.err.rstrip().splitlines()[-1]
