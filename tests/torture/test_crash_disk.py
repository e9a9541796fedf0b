"""A full disk, a failing one and one that cannot be written to: one sentence that names the file, nothing lost, and once there
is space `resume` ends with the undisturbed run's numbers."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture.crash_faults import GROWS, Fault
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


def growing(runs: Runs) -> list[tuple[int, str, str, str]]:
    """The operations of an undisturbed run that a full disk refuses."""
    return [op for op in runs.trace.operations() if op[1] in GROWS]


def told_full(runs: Runs, run: Path, fault: Fault, counts: Tally) -> None:
    """The disk is full from an operation on: one sentence, everything whole, nothing unfinished left."""
    answer = runs.go(run, fault)
    told = sentence(answer)
    assert "the disk is full; free some space" in told, told
    assert str(run) in told, told
    counts["runs stopped"] += 1
    if run.is_dir():
        assert_whole(run)
        assert strays(run) == []  # what could not be finished was taken away at once


def test_disk_full_in_every_phase(two):
    """One run after whose every phase there was no space; each time it comes as far as the next."""
    run, counts, kept = two.new(), tally("disk full"), {}
    for phase in ("start-up", "evaluation", "training", "ledger", "results", "report"):
        writes = [op[1] for op in two.trace.operations() if op[3] == phase].index("write") + 1
        told_full(two, run, Fault(at=writes, how="fail", phase=phase), counts)
        counts[f"in {phase}"] += 1
        now = finished_tasks(run)
        assert kept.items() <= now.items()
        kept = now
    two.end(run, kept, counts)


@pytest.mark.torture
def test_disk_full_at_every_write(one):
    counts = tally("disk full, at every write")
    for n, *_ in growing(one):
        run = one.new()
        told_full(one, run, Fault(at=n, how="fail"), counts)
        one.end(run, finished_tasks(run), counts)
        shutil.rmtree(run)
    assert counts["runs ended equal"] == counts["runs stopped"] >= 50


@pytest.mark.torture
def test_one_write_fails_and_the_next_does_not(one):
    """An input/output error that goes away by itself: told, or in a report or checkpoint alone, and never taken for success."""
    counts = tally("one write failed (EIO)")
    for n, *_ in growing(one):
        (answer,) = one.disturb([Fault(at=n, how="fail", error=errno.EIO, sticky=False)], counts)
        counts["writes that failed"] += 1
        if answer.code == 0:
            assert any(
                told in answer.err for told in ("report.html could not be made", "no checkpoint could be written")
            )
        else:
            assert "the disk or network drive failed (input/output error)" in sentence(answer)


@pytest.mark.parametrize("limit", [300, 20_000])
def test_no_file_may_grow_beyond_a_limit(one, limit):
    """The system itself refuses, half-way through a write and in safetensors' own code: RLIMIT_FSIZE."""
    run = one.new()
    told = sentence(one.go(run, Fault(limit=limit)))
    assert "it is larger than the system lets one file be" in told
    assert str(run) in told
    assert_whole(run)
    assert strays(run) == []
    one.end(run, finished_tasks(run), tally("files limited in size"))


# -- a real file system that is full -----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory, mounted at a folder; where that is not allowed the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def used(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def really_full(runs: Runs, disk: Path, shares: list[float], counts: Tally) -> None:
    need = used(runs.straight)
    for i, share in enumerate(shares):
        run = disk / f"run-{i}"
        resize(disk, str(max(1, round(need * share / 4096)) * 4096))
        answer = runs.go(run)
        told = sentence(answer)
        assert "the disk is full; free some space" in told
        assert str(run) in told
        assert_whole(run)
        counts["runs stopped"] += 1
        resize(disk, "16m")
        runs.end(run, finished_tasks(run), counts)
        shutil.rmtree(run)


def test_a_small_file_system_is_full(one, disk):
    really_full(one, disk, [0.7], tally("tmpfs full"))


@pytest.mark.torture
def test_file_systems_of_many_sizes_are_full(two, disk):
    really_full(two, disk, [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], tally("tmpfs full, in full"))


def test_the_cache_of_digests_does_without_a_full_disk(world, disk, monkeypatch):
    """What is known of files is passed over, not half-believed."""
    from keeplora.data.digests import file_digests

    files = sorted(str(path) for path in (world.root / "paint").rglob("*.png"))
    for path in files:
        os.utime(path, (1, 1))
    expected = file_digests(files)  # KEEPLORA_NO_CACHE of the tests: read
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "0")
    monkeypatch.setenv("KEEPLORA_CACHE", str(disk / "cache"))
    resize(disk, "16k")
    assert file_digests(files) == expected
    resize(disk, "16m")
    assert file_digests(files) == expected


# -- a sample that cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["stripes/train/flat/3.png", "stripes/test/tall/1.png"])
def test_a_sample_on_a_failing_disk(one, file):
    run = one.new()
    told = sentence(one.go(run, Fault(error=errno.EIO, sample=file)))
    assert file in told
    assert "nput/output error" in told
    one.end(run, finished_tasks(run), tally("samples that could not be read"))


# -- folders that cannot be written to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EROFS, "it lies on a read-only file system"), (errno.EACCES, "Permission denied")]
)
def test_a_new_run_where_nothing_can_be_written(one, code, words):
    run = one.new()
    told = sentence(one.go(run, Fault(at=1, how="fail", error=code)))
    assert told == f"Error: {run} cannot be made: {words}; choose another --output (`output:` in the file)"
    assert not run.exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_resume_and_report_where_nothing_can_be_written(one, stopped, two, code):
    words = {errno.EROFS: "it lies on a read-only file system", errno.EACCES: "Permission denied"}[code]
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    fault = Fault(at=1, how="fail", error=code)
    assert sentence(two.go(stopped, fault)) == f"Error: {stopped} cannot be written to: {words}"
    told = sentence(two.server("report", stopped, root=stopped, fault=fault))
    assert told == f"Error: {stopped / 'report.html'}: {words}"
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_read_only_mount(two, world, tmp_path):
    """What only reads goes on working; what writes says in one sentence why it cannot."""
    run = shutil.copytree(two.straight, tmp_path / "run")
    made = subprocess.run(["mount", "--bind", run, run], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", run], check=True)
        for words, told in (
            (["resume", run], f"Error: {run} cannot be written to: it lies on a read-only file system"),
            (["report", run], f"Error: {run / 'report.html'}: it lies on a read-only file system"),
            (["export", run, "--format", "peft"], f"Error: {run / 'export-peft'}: it lies on a read-only file system"),
        ):
            assert sentence(two.server(*words, root=run)) == told
        picture = next((world.root / "dots").rglob("*.png"))
        read = two.server("predict", run, "--image", picture, "--json", root=run)
        assert read.code == 0, read.err
        exported = two.server("export", run, "--format", "peft", "--output", tmp_path / "out", root=run)
        assert exported.code == 0, exported.err
    finally:
        subprocess.run(["umount", run], check=True)
    assert_as_undisturbed(run, two.straight)
