"""The run directory: who may write, what survives a kill, what is refused and with which words."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keeplora.errors import KeepLoraError
from keeplora.experiment import run_directory
from keeplora.experiment.config import load_config
from keeplora.experiment.run_directory import RunDirectory

CONFIG = {"tasks": [{"name": "pets", "source": "folder"}], "model": "embedded", "method": "lora"}

HOLDER = """
import os, sys, time
from keeplora.experiment.run_directory import RunDirectory
run = RunDirectory.create(sys.argv[1])
run.write_config({"method": "lora"})
run.append_event({"event": "task_finished", "task": "a"})
run.set_status(tasks_done=1)
child = os.fork() if len(sys.argv) > 2 else -1
if child:  # the other one is like a data-loading process, which outlives a killed parent
    print("ready", child, flush=True)
time.sleep(60)
os._exit(0)
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds a run; returns the process, its folder and a forked child's id."""
    started, children = [], []

    def start(*words):
        path = tmp_path / "held"
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), *words], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        started.append(process)
        assert process.stdout is not None
        word, child = process.stdout.readline().split()
        assert word == "ready"
        children.append(int(child))
        return process, path, int(child)

    yield start
    for process in started:
        process.kill()
        process.wait()
    for child in children:
        if child > 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_run_from_beginning_to_end(tmp_path):
    config = load_config(CONFIG)
    with RunDirectory.create(tmp_path / "a" / "run") as run:
        run.write_config(config.resolved())
        run.write_environment({"python": "3"})
        run.write_data([{"name": "pets", "kind": "task"}])
        run.append_event({"event": "epoch", "loss": float("nan"), "epoch": 1})
        run.write_results({"accuracy": [[50.0, float("inf")]]})
        run.set_status(state="finished", tasks_done=1)
    read = RunDirectory(run.path)
    assert load_config(read.read_config()) == config
    assert load_config(read.config_path) == config
    assert read.read_data() == [{"name": "pets", "kind": "task"}]
    assert read.read_events() == [{"event": "epoch", "loss": None, "epoch": 1}]
    assert read.read_results() == {"accuracy": [[50.0, None]]}
    status = read.read_status()
    assert (status["state"], status["tasks_done"], status["format"], status["version"]) == (
        "finished",
        1,
        "keeplora-run",
        0,
    )
    assert json.loads(read.environment_path.read_text()) == {"python": "3"}
    assert {path.name for path in run.path.iterdir()} <= {
        ".lock", "config.yaml", "environment.json", "data.json", "status.json", "metrics.jsonl", "results.json"
    }  # fmt: skip


def test_reading_what_is_not_there_yet(tmp_path):
    run = RunDirectory(tmp_path)
    assert (run.read_status(), run.read_events(), run.read_results(), run.read_data()) == ({}, [], None, [])


def test_writing_needs_the_lock(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        pass
    for write in (
        lambda: run.set_status(state="failed"),
        lambda: run.append_event({}),
        lambda: run.write_config({}),
        lambda: run.write_results({}),
        lambda: run.cut_events(0),
    ):
        with pytest.raises(RuntimeError, match="open for reading"):
            write()
    assert run.read_status()["state"] == "running"


# --- which folder ------------------------------------------------------------------------------------------------


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(KeepLoraError, match=r"is not empty \(thesis.tex\) and not a run of keeplora; choose a new"):
        RunDirectory.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_foreign_status_file_is_not_overwritten(tmp_path):
    (tmp_path / "status.json").write_text('{"mine": 1}')
    with pytest.raises(KeepLoraError, match="not a run's status"):
        RunDirectory.create(tmp_path)
    assert (tmp_path / "status.json").read_text() == '{"mine": 1}'


def test_a_finished_run_is_not_overwritten(tmp_path):
    path = tmp_path / "run"
    with RunDirectory.create(path) as run:
        run.write_config({"a": 1})
        run.set_status(state="finished", tasks_done=5)
    with pytest.raises(KeepLoraError, match=r"holds a run \(finished, 5 tasks done\).*keeplora report .*run"):
        RunDirectory.create(path)


def test_empty_and_hidden_and_barely_begun_folders_are_taken(tmp_path):
    (tmp_path / ".DS_Store").write_text("x")
    RunDirectory.create(tmp_path).close()
    RunDirectory.create(tmp_path).close()  # killed before config.yaml: nothing to lose


def test_a_file_or_an_impossible_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(KeepLoraError, match="is a file"):
        RunDirectory.create(tmp_path / "file")
    with pytest.raises(KeepLoraError, match="cannot be made"):
        RunDirectory.create(tmp_path / "file" / "below")


def test_resume_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(KeepLoraError, match="no such run directory"):
        RunDirectory.open_existing(tmp_path / "none")
    with pytest.raises(KeepLoraError, match=r"holds no config.yaml: is it the folder"):
        RunDirectory.open_existing(tmp_path)
    RunDirectory.create(tmp_path / "run").close()
    with pytest.raises(KeepLoraError, match="stopped before it began"):
        RunDirectory.open_existing(tmp_path / "run")


def test_resume_refuses_another_version_and_damage(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        run.write_config({"a": 1})
    status = json.loads(run.status_path.read_text())
    run.status_path.write_text(json.dumps({**status, "version": 7}))
    with pytest.raises(KeepLoraError, match=r"version 7 of the run format, this keeplora knows 0"):
        RunDirectory.open_existing(run.path)
    run.status_path.write_text("{")
    with pytest.raises(KeepLoraError, match=r"status.json is damaged"):
        RunDirectory.open_existing(run.path)


# --- lock --------------------------------------------------------------------------------------------------------


def test_one_writer_in_this_process(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        run.write_config({"a": 1})
        with pytest.raises(KeepLoraError, match="already open in this process"):
            RunDirectory.open_existing(run.path)
        run.set_status(state="failed")  # the refused attempt did not take the lock away
    (tmp_path / "x").mkdir()
    roundabout = tmp_path / "x" / ".." / "run"
    with (
        RunDirectory.open_existing(roundabout),
        pytest.raises(KeepLoraError, match="already open in this process"),
    ):
        RunDirectory.open_existing(run.path)
    RunDirectory.open_existing(run.path).close()


def test_one_writer_over_all_processes_and_a_kill_frees_the_lock(holder):
    process, path, _ = holder()
    with pytest.raises(KeepLoraError, match=rf"process {process.pid} is writing to .*held; wait"):
        RunDirectory.open_existing(path)
    assert RunDirectory(path).read_status()["tasks_done"] == 1  # reading is free
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (path / ".lock").read_text().split()[0] == str(process.pid)  # a stale lock file
    with RunDirectory.open_existing(path) as run:
        assert run.read_status()["state"] == "running"
        assert (path / ".lock").read_text().split()[0] == str(os.getpid())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_orphaned_child_of_a_killed_run_does_not_hold_the_lock(holder):
    process, path, child = holder("fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(child, 0)  # the child lives
    RunDirectory.open_existing(path).close()


# --- status ------------------------------------------------------------------------------------------------------


def test_seconds_add_up_over_resumes(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(run_directory.time, "monotonic", lambda: clock[0])
    with RunDirectory.create(tmp_path / "run") as run:
        run.write_config({"a": 1})
        clock[0] += 5
        run.set_status(tasks_done=1)
    started = run.read_status()["started"]
    clock[0] += 1000
    with RunDirectory.open_existing(run.path) as again:
        clock[0] += 2
        again.set_status(state="finished")
    status = again.read_status()
    assert (status["seconds"], status["tasks_done"], status["started"]) == (7.0, 1, started)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", status["updated"])


def test_unknown_states_are_a_fault(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run, pytest.raises(ValueError, match="state is 'done'"):
        run.set_status(state="done")


# --- events ------------------------------------------------------------------------------------------------------


def fill(run: RunDirectory) -> None:
    run.append_event({"event": "evaluation", "after": 0})
    for task in ("a", "b"):
        run.append_event({"event": "epoch", "task": task})
        run.append_event({"event": "evaluation", "after": task})
        run.append_event({"event": "task_finished", "task": task})
    run.append_event({"event": "epoch", "task": "c"})


@pytest.mark.parametrize(("done", "left"), [(0, 0), (1, 4), (2, 7)])
def test_cut_events_after_the_last_finished_task(tmp_path, done, left):
    with RunDirectory.create(tmp_path / "run") as run:
        fill(run)
        before = run.read_events()
        run.cut_events(done)
        assert run.read_events() == before[:left]
        run.append_event({"event": "new"})
        assert run.read_events() == [*before[:left], {"event": "new"}]


def test_cut_events_refuses_missing_lines(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        fill(run)
        with pytest.raises(KeepLoraError, match="tells of 2 finished tasks where 3 are recorded"):
            run.cut_events(3)
        assert len(run.read_events()) == 8


@pytest.mark.parametrize("torn", [b'{"event": "epo', b"{", b'{"event": "epoch"}', '{"task": "ü'.encode()[:-1]])
def test_a_torn_last_line_is_ignored_and_mended(tmp_path, torn):
    with RunDirectory.create(tmp_path / "run") as run:
        fill(run)
        whole = run.read_events()
        with open(run.metrics_path, "ab") as handle:
            handle.write(torn)
        assert run.read_events() == whole
        run.append_event({"event": "next"})
        assert run.read_events() == [*whole, {"event": "next"}]
        assert run.metrics_path.read_bytes().endswith(b'{"event":"next"}\n')


def test_a_file_of_one_torn_line(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        run.metrics_path.write_bytes(b'{"ev')
        assert run.read_events() == []
        run.append_event({"event": "first"})
        assert run.read_events() == [{"event": "first"}]


def test_damage_within_the_file_is_told_with_its_line(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        fill(run)
        lines = run.metrics_path.read_bytes().splitlines(keepends=True)
        run.metrics_path.write_bytes(b"".join([*lines[:2], b"oops\n", *lines[2:]]))
        with pytest.raises(KeepLoraError, match=r"metrics.jsonl, line 3: not an event"):
            run.read_events()


def test_every_event_is_in_the_file_at_once(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        for count in range(1, 4):
            run.append_event({"event": "epoch", "epoch": count})
            assert len(RunDirectory(run.path).read_events()) == count


def test_appending_is_cheap(tmp_path):
    with RunDirectory.create(tmp_path / "run") as run:
        began = time.perf_counter()
        for count in range(500):
            run.append_event({"event": "epoch", "epoch": count})
        assert time.perf_counter() - began < 5
        assert Path(run.metrics_path).read_text().count("\n") == 500
