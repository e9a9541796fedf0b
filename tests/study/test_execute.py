"""Cells as processes: as many at once as there are slots, none costing another, interrupted with care, never lost."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keeplora.experiment.run_directory import RunDirectory
from keeplora.study import execute, resources
from keeplora.study.execute import Executor, StudyInterrupted, last_lines
from keeplora.study.plan import CellKey, StudyPlan
from keeplora.study.progress import StudyProgress
from keeplora.study.resources import Slots
from keeplora.study.store import StudyStore, is_being_written

FAKE = Path(__file__).with_name("fake_program.py")


@pytest.fixture(autouse=True)
def fake_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "PROGRAM", (sys.executable, str(FAKE)))
    monkeypatch.setattr(execute, "POLL", 0.02)


class Started:
    """A study over fake cells: its executor, its store, and what it prints."""

    def __init__(
        self, folder: Path, *, jobs: int = 2, gpus: tuple[str, ...] = (), act: Any = "", **changes: Any
    ) -> None:
        values = {
            "name": "s", "kind": "suite", "base": "demo-small", "methods": ("lora", "ewc"), "seeds": (0, 1), "orders": {"1": "1"},
            "output": folder, "set": {"act": act},
        }  # fmt: skip
        self.plan = StudyPlan(**{**values, **changes})
        self.store = StudyStore(folder).load()
        self.store.join(self.plan)
        self.store.refresh()
        self.store.save()
        self.told = io.StringIO()
        keys = list(self.store.cells)
        progress = StudyProgress(self.store, keys, jobs, True, self.told)
        self.executor = Executor(self.plan, self.store, keys, Slots(jobs, 3, gpus), progress)

    def states(self) -> list[str]:
        return [record.state for record in StudyStore(self.plan.output).load().cells.values()]

    def seen(self, method: str = "lora", seed: int = 0) -> dict[str, Any]:
        return json.loads((self.store.folder(CellKey(method, "1", seed)) / "seen.json").read_text())


def test_every_cell_runs_once_and_finished_ones_never_again(tmp_path: Path) -> None:
    study = Started(tmp_path)
    assert study.executor.run() == []
    assert study.states() == ["finished"] * 4
    first = study.seen()
    assert first["OMP_NUM_THREADS"] == "3"
    assert first["words"][:5] == ["run", "--suite", "demo-small", "--method", "lora"]
    assert "threads=3" in first["words"]
    again = Started(tmp_path)
    assert again.executor.run() == []
    assert again.seen() == first
    assert again.told.getvalue() == ""
    more = Started(tmp_path, seeds=(2,))
    more.executor.run()
    assert more.states() == ["finished"] * 6
    assert more.seen() == first


def test_as_many_at_once_as_there_are_slots(tmp_path: Path) -> None:
    study = Started(tmp_path, act="sleep", jobs=2)
    study.executor.run()
    spans = [study.seen(m, s) for m in ("lora", "ewc") for s in (0, 1)]
    events = sorted([(one["began"], 1) for one in spans] + [(one["ended"], -1) for one in spans])
    level, levels = 0, []
    for _, step in events:
        level += step
        levels.append(level)
    assert max(levels) == 2


def test_gpus_are_dealt_out(tmp_path: Path) -> None:
    study = Started(tmp_path, act="sleep", jobs=2, gpus=("4", "7"))
    study.executor.run()
    pairs = [{study.seen(m, s)["CUDA_VISIBLE_DEVICES"] for m in ("lora", "ewc")} for s in (0, 1)]
    assert pairs == [{"4", "7"}, {"4", "7"}]


def test_a_failed_cell_costs_no_other(tmp_path: Path) -> None:
    study = Started(tmp_path, act={"lora": "fail"}, jobs=1)
    failed = study.executor.run()
    assert [record.key for record in failed] == [("lora", "1", 0), ("lora", "1", 1)]
    assert study.states() == ["failed", "finished", "failed", "finished"]
    assert failed[0].error == "a line before\nError: the disk is on fire"
    assert "    Error: the disk is on fire" in study.told.getvalue()
    assert failed[0].attempts == 1
    # The next call tries it again, from where it was.
    again = Started(tmp_path, act={"lora": "fail"}, jobs=1)
    again.executor.run()
    assert again.seen()["words"][0] == "resume"
    assert again.store.cells["lora", "1", 0].attempts == 2
    assert again.store.cells["ewc", "1", 0].attempts == 1


def test_a_killed_cell_is_a_failed_one(tmp_path: Path) -> None:
    study = Started(tmp_path, act="hang", methods=("lora",), seeds=(0,))
    killer = threading.Thread(target=lambda: (wait_for(lambda: study.executor._running), kill(study)))
    killer.start()
    (record,) = study.executor.run()
    killer.join()
    assert record.state == "failed"
    assert record.error is not None
    assert record.error.endswith("ended by SIGKILL (often: out of memory; give fewer --jobs)")


def kill(study: Started) -> None:
    folder = study.store.folder(CellKey("lora", "1", 0))
    wait_for(lambda: (folder / "seen.json").is_file())
    process = study.executor._running[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)


def wait_for(done: Any, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGTERM, in the background"])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A shell starts what it puts into the background with SIGINT ignored, and so do its children unless told otherwise."""
    before = signal.getsignal(signal.SIGINT)
    if "background" in request.param:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield signal.Signals[request.param.split(",")[0]]
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_interrupts_the_cells_and_keeps_their_state(tmp_path: Path, number: signal.Signals) -> None:
    study = Started(tmp_path, act="hang", jobs=2)
    folders = [study.store.folder(CellKey(m, "1", 0)) for m in ("lora", "ewc")]

    def press() -> None:
        wait_for(lambda: all((folder / "seen.json").is_file() for folder in folders))
        os.kill(os.getpid(), number)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(StudyInterrupted) as stopped:
        study.executor.run()
    presser.join()
    assert stopped.value.signal == number
    assert study.states() == ["interrupted", "interrupted", "pending", "pending"]
    assert not any(is_being_written(folder) for folder in folders)
    told = [RunDirectory(folder).read_status()["state"] for folder in folders]
    assert told == ["interrupted"] * 2  # by the runs themselves: they were not killed
    assert "Interrupting 2 runs; their finished tasks are kept" in study.told.getvalue()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)
    again = Started(tmp_path, act="hang", jobs=2)
    assert again.executor.run() == []
    assert again.states() == ["finished"] * 4
    assert again.seen()["words"][0] == "resume"


def test_a_run_that_outlived_its_study_is_waited_for(tmp_path: Path) -> None:
    study = Started(tmp_path, methods=("lora",), seeds=(0,))
    key = CellKey("lora", "1", 0)
    orphan = subprocess.Popen([sys.executable, str(FAKE), *study.plan.command(key, 1), "-o", 'act="hang"'])
    try:
        wait_for(lambda: (study.store.folder(key) / "seen.json").is_file())
        threading.Timer(0.5, lambda: orphan.send_signal(signal.SIGINT)).start()
        assert study.executor.run() == []
    finally:
        orphan.kill()
        orphan.wait()
    # It stopped half-way, so this study went on with it; never were two at work on it.
    assert study.states() == ["finished"]
    assert "lora, order 1, seed 0: still running since an earlier call" in study.told.getvalue()
    assert study.store.cells[key].attempts == 1
    assert study.seen()["words"][0] == "resume"


def test_a_run_that_has_not_even_imported_anything_is_waited_for_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late.py"
    late.write_text(f"import runpy, time\ntime.sleep(1)\nrunpy.run_path({str(FAKE)!r}, run_name='__main__')\n")
    monkeypatch.setattr(execute, "PROGRAM", (sys.executable, str(late)))
    killed = Started(tmp_path / "s", methods=("lora",), seeds=(0,))
    killed.executor._start(CellKey("lora", "1", 0))  # and then the study was killed: nobody waits for its process
    study = Started(tmp_path / "s", methods=("lora",), seeds=(0,))
    assert study.executor.run() == []
    assert study.states() == ["finished"]
    assert study.store.cells["lora", "1", 0].attempts == 1
    assert "still running since an earlier call" in study.told.getvalue()
    (job,) = killed.executor._running
    assert job.process is not None
    assert job.process.wait(10) == 0


def test_ledgers_are_dropped_once_results_are_written(tmp_path: Path) -> None:
    study = Started(tmp_path, keep_ledgers=False, act={"ewc": "half"})
    study.executor.run()
    records = StudyStore(tmp_path).load().cells
    assert [(r.state, r.dropped_bytes) for r in records.values()] == [("finished", 1000), ("failed", None)] * 2
    ledger = study.store.folder(CellKey("lora", "1", 0)) / "ledger" / "0001-x"
    assert [p.name for p in ledger.iterdir()] == ["record.json"]
    kept = Started(tmp_path / "kept")
    kept.executor.run()
    assert (kept.store.folder(CellKey("lora", "1", 0)) / "ledger" / "0001-x" / "tensors.safetensors").is_file()


def test_time_left_goes_by_the_method(tmp_path: Path) -> None:
    study = Started(tmp_path, seeds=(0, 1, 2))
    progress = study.executor.progress
    assert progress.seconds_left([], study.store.cells) is None
    for method, seconds in (("lora", 10.0), ("ewc", 100.0)):
        record = study.store.cells[method, "1", 0]
        record.state, record.seconds = "finished", seconds
    lora, ewc = (CellKey(m, "1", 1) for m in ("lora", "ewc"))
    # 60 left of one running, 10 and 100 waiting, two at a time.
    assert progress.seconds_left([(ewc, 40.0)], [lora, ewc]) == pytest.approx((60 + 10 + 100) / 2)
    assert progress.seconds_left([(ewc, 10.0)], []) == pytest.approx(90.0)  # one run cannot be shared
    assert progress.seconds_left([(lora, 99.0)], []) == 0.0


def test_last_lines_are_for_people() -> None:
    assert last_lines("") == ""
    assert last_lines("Loading 1%\rLoading 2%\rdone\n\n\x1b[1mError: x\x1b[0m\n") == "done\nError: x"
    assert last_lines("\n".join(map(str, range(20)))) == "\n".join(map(str, range(14, 20)))


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(resources, "cores", lambda: 8)
    monkeypatch.setattr(resources, "available_memory", lambda: 13 * gib)
    monkeypatch.setattr(resources, "gpu_ids", lambda settings: ())
    assert resources.slots(20, jobs=None, threads=None, settings={}) == (3, 2, ())  # 4 GiB each until one has told
    assert resources.slots(20, jobs=None, threads=None, settings={}, peaks=[gib, 2 * gib]) == (5, 1, ())
    assert resources.slots(20, jobs=8, threads=None, settings={}) == (8, 1, ())  # who asks gets it
    assert resources.slots(2, jobs=None, threads=None, settings={}, peaks=[gib]) == (2, 4, ())
    assert resources.slots(20, jobs=16, threads=None, settings={}) == (16, 1, ())
    assert resources.slots(20, jobs=2, threads=3, settings={}) == (2, 3, ())
    monkeypatch.setattr(resources, "available_memory", lambda: gib)
    assert resources.slots(20, jobs=None, threads=None, settings={})[0] == 1
    monkeypatch.setattr(resources, "gpu_ids", lambda settings: ("0", "1"))
    assert resources.slots(20, jobs=None, threads=None, settings={}) == (2, 4, ("0", "1"))


def test_gpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert resources.gpu_ids({}) == ("0", "1")
    assert resources.gpu_ids({"device": "cpu"}) == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a")
    assert resources.gpu_ids({}) == ("5", "GPU-8a")


def test_memory_is_known_here() -> None:
    memory = resources.available_memory()
    assert memory is None or memory > 0
    assert resources.cores() >= 1
