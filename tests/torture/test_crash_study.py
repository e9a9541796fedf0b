"""Exports, studies and caches under the same faults: a second try ends as if there had been no first."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from keeplora.files import atomic_dir
from keeplora.study.plan import make_plan
from keeplora.study.store import StudyStore, is_being_written
from tests.cli.tiny_world import World, results_of
from tests.torture.conftest import ONE, QUICK
from tests.torture.crash_faults import GROWS, Fault
from tests.torture.crash_world import Runs, Server, assert_whole, sentence, strays, tally


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- export ------------------------------------------------------------------------------------------------------------------


class Exports:
    """Exports of one finished run, each into a folder of its own."""

    def __init__(self, runs: Runs, format: str, folder: Path) -> None:
        self.runs, self.format, self.folder = runs, format, folder
        whole = self("whole", trace=True)
        assert whole.code == 0, whole.err
        self.operations = whole.operations()
        self.expected = contents(folder / "whole" / "out")

    def __call__(self, name: str, fault: Fault | None = None, *, trace: bool = False) -> Any:
        root = self.folder / name
        root.mkdir(exist_ok=True)
        words = ["export", self.runs.straight, "--format", self.format, "--output", root / "out"]
        return self.runs.server(*words, root=root, fault=fault, trace=trace)

    def after(self, name: str, fault: Fault, counts: Any) -> None:
        root, answer = self.folder / name, self(name, fault)
        counts["exports stopped"] += 1
        if answer.killed:
            done = (root / "out").exists()
            assert not done or contents(root / "out") == self.expected
        else:
            told = sentence(answer)
            assert f"{root / 'out'}: the disk is full" in told, told
            assert strays(root) == []
            done = False
            assert not (root / "out").exists()
        again = self(name)
        assert (again.code == 0) != done, again.err
        assert contents(root / "out") == self.expected
        assert strays(root) == []
        counts["exports equal"] += 1
        shutil.rmtree(root)


def test_a_killed_export_is_made_again(one, tmp_path):
    exports, counts = Exports(one, "peft", tmp_path), tally("exports")
    kinds: dict[str, int] = {op[1]: op[0] for op in exports.operations}
    for kind, how in (("tensors", "torn"), ("write", "torn"), ("rename", "before"), ("rename", "after")):
        exports.after(f"{kind}-{how}", Fault(at=kinds[kind], how=how), counts)
    exports.after("full", Fault(at=kinds["tensors"], how="fail"), counts)


@pytest.mark.torture
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_every_write_of_an_export(one, tmp_path, format):
    exports, counts = Exports(one, format, tmp_path), tally("exports, at every write")
    for n, kind, _, _ in exports.operations:
        exports.after(f"{n}-killed", Fault(at=n, how="before"), counts)
        if kind in ("write", "tensors"):
            exports.after(f"{n}-torn", Fault(at=n, how="torn"), counts)
        if kind in GROWS:
            exports.after(f"{n}-full", Fault(at=n, how="fail"), counts)


# -- a study -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(world: World, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of one cell, which was run in a fork like everything here."""
    folder = tmp_path_factory.mktemp("study")
    file = world.yaml(folder / "e.yaml", **ONE, **QUICK)
    values = {"experiment": str(file), "methods": ["zero-shot"], "seeds": [0], "threads": 1}
    plan = make_plan({**values, "output": str(folder / "study")})
    (cell,) = plan.cells()
    store = StudyStore(plan.output)
    store.lock()
    store.join(plan)
    store.save()
    store.close()
    answer = server(*plan.command(cell, 1), root=folder / "study")
    assert answer.code == 0, answer.err
    answer = server(*words(file), "--output", folder / "study", root=folder / "study")
    assert answer.code == 0, answer.err
    return folder / "study"


def words(file: Path) -> list[object]:
    return ["compare", "--experiment", file, "--methods", "zero-shot", "--seeds", "0", "--jobs", "1", "--threads", "1"]


TABLES = ("table.csv", "summary.csv", "table.md", "table.tex")


def assert_study(folder: Path, straight: Path) -> None:
    assert strays(folder) == []
    for name in TABLES:
        told = [(path / name).read_text().replace(str(path), "STUDY") for path in (folder, straight)]
        assert told[0] == told[1], name
    assert {p.name for p in (folder / "plots").iterdir()} == {p.name for p in (straight / "plots").iterdir()}
    assert (folder / "report.html").is_file()
    cells = [json.loads((path / "study.json").read_text())["cells"] for path in (folder, straight)]
    told = [[{k: v for k, v in cell.items() if k not in ("seconds", "attempts")} for cell in group] for group in cells]
    assert told[0] == told[1]
    for run in folder.glob("cells/*/*/*"):
        if (run / "config.yaml").is_file():
            assert_whole(run)


def unrendered(study: Path, to: Path) -> Path:
    """The study before its tables were made."""
    shutil.copytree(study, to)
    shutil.rmtree(to / "plots")
    for name in (*TABLES, "report.html"):
        (to / name).unlink()
    return to


def test_a_study_killed_while_it_writes_its_tables(server, study, tmp_path):
    folder = unrendered(study, tmp_path / "study")
    answer = server("compare", "--output", folder, root=folder, fault=Fault(at=14, how="torn"))
    assert answer.killed
    told = sentence(server("compare", "--output", folder, root=folder, fault=Fault(at=8, how="fail")))
    assert "the disk is full; free some space" in told
    answer = server("compare", "--output", folder, root=folder)
    assert answer.code == 0, answer.err
    assert_study(folder, study)


@pytest.mark.torture
def test_every_write_of_a_study(server, study, tmp_path):
    counts = tally("studies, at every write")
    trace = server("compare", "--output", unrendered(study, tmp_path / "whole"), root=tmp_path / "whole", trace=True)
    assert trace.code == 0, trace.err
    for n, kind, path, _ in trace.operations():
        if kind not in ("write", "rename", "mkdir"):  # what lies between looks the same from outside
            continue
        folder = unrendered(study, tmp_path / "study")
        fault = Fault(at=n, how="torn" if kind == "write" else "before")
        assert server("compare", "--output", folder, root=folder, fault=fault).killed
        json.loads((folder / "study.json").read_text())
        counts["kills"] += 1
        if kind != "rename":
            answer = server("compare", "--output", folder, root=folder, fault=Fault(at=n, how="fail"))
            # The first operations are other ones now, so this hits whatever comes n-th.
            assert "the disk is full" in sentence(answer), path
            counts["full disks"] += 1
        answer = server("compare", "--output", folder, root=folder)
        assert answer.code == 0, answer.err
        assert_study(folder, study)
        counts["studies ended equal"] += 1
        shutil.rmtree(folder)


@pytest.mark.torture
def test_a_study_killed_while_a_cell_runs(world, server, study, tmp_path):
    """The cell outlives the study that started it; the next one waits for it and takes it over."""
    counts = tally("studies killed while a cell ran")
    file = world.yaml(tmp_path / "e.yaml", **ONE, **QUICK)
    for n in range(4):
        folder = tmp_path / f"study-{n}"
        answer = server(*words(file), "--output", folder, root=folder, kill_after=(0.3, 1.5, 3.0, 6.0)[n])
        counts["kills" if answer.killed else "ended before the kill"] += 1
        answer = server(*words(file), "--output", folder, root=folder)
        assert answer.code == 0, answer.err
        cell = next(path.parent for path in folder.glob("cells/**/results.json"))
        assert not is_being_written(cell)
        mine, whole = (results_of(next(path.glob("cells/**/results.json")).parent) for path in (folder, study))
        assert mine["accuracy"] == whole["accuracy"]
        assert strays(folder) == []
        counts["studies ended equal"] += 1


# -- caches ------------------------------------------------------------------------------------------------------------------


def test_a_cache_folder_whose_writer_was_killed_is_made_again(tmp_path):
    """What `assets fetch` and the stand-ins put into the user's cache."""
    folder = tmp_path / "embedded-1"
    pid = os.fork()
    if pid == 0:
        with atomic_dir(folder) as part:
            (part / "model.safetensors").write_bytes(b"x" * 1000)
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert len(strays(tmp_path)) == 1
    other = tmp_path / ".embedded-2.abcdefgh.part"
    other.mkdir()  # another folder's: not this one's to judge
    with atomic_dir(folder) as part:
        (part / "model.safetensors").write_bytes(b"y")
        assert strays(tmp_path) == sorted([part.name, other.name], key=strays(tmp_path).index)
    assert (folder / "model.safetensors").read_bytes() == b"y"
    assert strays(tmp_path) == [other.name]


def test_two_writers_of_one_cache_folder_leave_each_other_alone(tmp_path):
    folder = tmp_path / "embedded-1"

    def both() -> None:
        with atomic_dir(folder) as first:
            (first / "a").write_text("1")
            with atomic_dir(folder) as second:
                (second / "a").write_text("2")
            assert first.is_dir()  # a living writer's, not taken for the remains of a dead one

    with pytest.raises(OSError, match="not empty"):
        both()
    assert (folder / "a").read_text() == "2"
    assert strays(tmp_path) == []


@pytest.mark.torture
def test_kills_while_digests_are_remembered(tmp_path, monkeypatch):
    """SQLite's own journal: what is there afterwards is whole or absent, and never another file's."""
    from keeplora.data.digests import file_digests

    counts = tally("digest caches")
    files = []
    for i in range(300):
        file = tmp_path / f"{i}.bin"
        file.write_bytes(bytes([i % 256]) * (i + 1))
        os.utime(file, (1, 1))
        files.append(str(file))
    expected = file_digests(files)
    time.sleep(2.1)  # until the files count as left alone
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "0")
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "cache"))
    for i in range(12):
        pid = os.fork()
        if pid == 0:
            file_digests(files)
            os._exit(0)
        time.sleep(0.002 * i)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        counts["kills"] += 1
        assert file_digests(files) == expected
        if i % 3 == 0:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    counts["caches right"] += 12
