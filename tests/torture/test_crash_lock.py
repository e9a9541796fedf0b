"""Two writers on one folder, locks left by the dead, file systems without locks, a clock that jumps, a report that breaks."""

from __future__ import annotations

import datetime
import errno
import itertools
import json
import os
import platform
import shutil
from pathlib import Path

import pytest

from keeplora.data import digests
from keeplora.experiment.folder_lock import FolderLock
from keeplora.experiment.run_directory import RunDirectory
from tests.cli.tiny_world import results_of, status_of
from tests.torture.crash_faults import Fault
from tests.torture.crash_world import (
    Runs,
    Tally,
    assert_as_undisturbed,
    assert_whole,
    finished_tasks,
    sentence,
    strays,
    tally,
)

DAY, YEAR = 86_400.0, 31_536_000.0


# -- two runs on one directory ----------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_the_first_ones_process(stopped, two):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"}
    with RunDirectory.open_existing(stopped):
        told = sentence(two.server("resume", stopped, root=stopped))
        again = sentence(two.server("run", two.config, "--output", stopped, root=stopped))
    assert told == (
        f"Error: process {os.getpid()} is writing to {stopped}; wait until it ends or stop it, or choose another "
        "--output (`output:` in the file)"
    )
    assert f"{stopped} already holds a run (running, 1 task done)" in again
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file() and p.name != ".lock"} == before
    two.end(stopped, finished_tasks(stopped), Tally())


def test_the_lock_of_a_dead_process_whose_number_lives_again(stopped, two):
    """The number in the file is this living process's, but nobody holds the lock."""
    (stopped / ".lock").write_text(f"{os.getpid()}\n")
    two.end(stopped, finished_tasks(stopped), Tally())


def test_a_file_system_without_locks_is_used_and_said(one):
    run = one.new()
    answer = one.go(run, Fault(locks=False))
    assert answer.code == 0, answer.err
    warning = f"warning: {run} lies on a file system without locks: see to it that no second process writes there"
    assert answer.err.count(warning) == 1
    assert_as_undisturbed(run, one.straight)


def holder(pid: int, host: str, born: str) -> str:
    return f"{pid}\n{host} {born}\n"


def test_without_locks_a_living_writer_is_found_by_its_number(stopped, two):
    lock = FolderLock(stopped)
    lock.acquire()
    try:
        text = (stopped / ".lock").read_text()
        told = sentence(two.server("resume", stopped, root=stopped, fault=Fault(locks=False)))
    finally:
        lock.release()
    assert told.startswith(f"Error: process {os.getpid()} is writing to {stopped}; wait")
    # Dead, and another process has its number now: it was born at another time.
    born = text.split()[2]
    (stopped / ".lock").write_text(text.replace(born, f"{born}0"))
    answer = two.server("resume", stopped, root=stopped, fault=Fault(locks=False))
    assert answer.code == 0, answer.err
    assert_as_undisturbed(stopped, two.straight)


def test_without_locks_a_writer_on_another_machine_is_asked_about(stopped, two):
    (stopped / ".lock").write_text(holder(4711, f"not-{platform.node()}", "x"))
    told = sentence(two.server("resume", stopped, root=stopped, fault=Fault(locks=False)))
    assert f"was last written by process 4711 on not-{platform.node()}" in told
    assert told.endswith(f"if it does not, delete {stopped / '.lock'}")
    (stopped / ".lock").unlink()
    assert two.server("resume", stopped, root=stopped, fault=Fault(locks=False)).code == 0


def test_a_lock_that_cannot_be_written_is_not_kept(tmp_path, monkeypatch):
    """The disk is full when the process writes its number: a second try must not meet a lock of our own."""

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        FolderLock(tmp_path).acquire()
    monkeypatch.setattr(os, "write", write)
    pid = os.fork()
    if pid == 0:  # another process sees no lock
        code = 1
        try:
            FolderLock(tmp_path).acquire()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()


# -- what a killed writer leaves, while another one writes -------------------------------------------------------------------


def test_resume_sweeps_what_is_left_and_spares_what_is_being_written(stopped, two):
    from keeplora.files import atomic_dir

    (stopped / ".results.json.abcdefgh.tmp").write_text("{")
    (stopped / "ledger" / ".0002-dots.abcdefgh.part").mkdir()
    (stopped / ".notes.tmp").write_text("a person's own file")
    with atomic_dir(stopped / "export-peft") as part:
        (part / "adapter_config.json").write_text("{}")
        answer = two.server("resume", stopped, root=stopped)
        assert answer.code == 0, answer.err
        assert strays(stopped) == [part.name, ".notes.tmp"] or strays(stopped) == [".notes.tmp", part.name]
    assert (stopped / "export-peft" / "adapter_config.json").is_file()


# -- a clock that jumps ------------------------------------------------------------------------------------------------------


def jumps(runs: Runs) -> tuple[tuple[int, float], ...]:
    """Back a day, forward a year, and so on, at the first operation of each stretch of a phase."""
    operations = runs.trace.operations()
    starts = [op[0] for before, op in itertools.pairwise(operations) if before[3] != op[3]]
    return tuple((n, (-DAY, YEAR, -2 * DAY)[i % 3]) for i, n in enumerate(starts))


def assert_no_negative_time(run: Path) -> None:
    def look(value: object, where: str) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                look(entry, f"{where}.{key}")
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                look(entry, f"{where}[{i}]")
        elif isinstance(value, float | int) and "seconds" in where:
            assert value >= 0, (where, value)

    for file in run.rglob("*.json"):
        look(json.loads(file.read_text()), str(file.relative_to(run)))
    for event in RunDirectory(run).read_events():
        look(event, "event")


def test_the_clock_jumps_between_and_within_phases(two):
    run = two.new()
    # Killed in the middle, and gone on with two days earlier than it began.
    marks = [op[0] for op in two.trace.operations() if op[3] == "ledger"]
    assert two.go(run, Fault(at=marks[-2], how="before", jumps=jumps(two))).killed
    seconds = status_of(run)["seconds"]
    assert_whole(run)
    answer = two.go(run, Fault(jumps=((1, -2 * DAY), *jumps(two))))
    assert answer.code == 0, answer.err
    assert_as_undisturbed(run, two.straight)
    assert_no_negative_time(run)
    status = status_of(run)
    assert seconds <= status["seconds"] < 600  # a year is not taken for work
    assert results_of(run)["cost"]["seconds"] < 600
    updated = datetime.datetime.fromisoformat(status["updated"])
    assert abs((updated - datetime.datetime.now(datetime.UTC)).total_seconds()) > DAY / 2  # the clock did jump
    assert "-" not in "".join(line.split("ETA")[1] for line in answer.err.splitlines() if "ETA" in line)
    # The clock is right again.
    assert two.server("report", run, root=run).code == 0
    assert two.go(run).code == 0
    assert_as_undisturbed(run, two.straight)


@pytest.mark.parametrize("jump", [-DAY, YEAR])
def test_what_is_known_of_files_outlives_no_change_whatever_the_clock_says(tmp_path, monkeypatch, jump):
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "0")
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "picture.png"
    file.write_bytes(b"one")
    os.utime(file, ns=(10**18, 10**18))
    now = digests.time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + int(3e9))  # left alone for three seconds
    first = digests.file_digests([str(file)])
    known = digests.FileFacts("sha256").recall([str(file)])
    assert known[str(file)][1] == first[str(file)]  # it is remembered
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + int(3e9 + jump * 1e9))
    assert digests.file_digests([str(file)]) == first
    file.write_bytes(b"two")
    os.utime(file, ns=(10**18, 10**18))  # its time of modification is as it was
    second = digests.file_digests([str(file)])
    assert second != first
    monkeypatch.setattr(digests.time, "time_ns", now)
    assert digests.file_digests([str(file)]) == second


# -- a report that breaks ----------------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_drawn_costs_no_result(two):
    run = two.new()
    answer = two.go(run, Fault(report=True))
    told = sentence(answer)
    assert told == (
        "Error: the run is finished and its results are kept, but report.html could not be made (ValueError: a chart that "
        f"cannot be drawn); `keeplora report {run}` tries it again"
    )
    assert answer.err.count("warning: report.html could not be made") == 3  # after each task, and at the end
    assert "stripes" in answer.out  # the tables are printed all the same
    assert_as_undisturbed(run, two.straight, report=False)
    assert two.server("report", run, root=run).code == 0
    assert_as_undisturbed(run, two.straight)
    shutil.rmtree(run)
    tally("reports that broke")["results kept"] += 1
