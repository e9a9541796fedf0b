"""Fixtures of the crash tests, and the summary that a torture run ends with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny_world import World, the_world
from tests.torture.crash_world import SUMMARY, Runs, Server

ONE = {"tasks": [{"name": "stripes", "source": "folder", "path": "stripes"}], "probes": []}
TWO = {"tasks": [{"name": name, "source": "folder", "path": name} for name in ("stripes", "dots")]}
QUICK = {"training": {"epochs": 1, "batch_size": 10, "checkpoint_steps": 1}, "tuner": {"r": 2}}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SUMMARY:
        terminalreporter.section("faults")
        for title, tally in SUMMARY.items():
            terminalreporter.write_line(tally.line(title))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def one(world: World, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of one task, one epoch."""
    folder = tmp_path_factory.mktemp("one")
    return Runs.of(server, world.yaml(folder / "e.yaml", **ONE, **QUICK), folder)


@pytest.fixture(scope="session")
def two(world: World, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of two tasks and a probe; the calls of each phase are counted."""
    folder = tmp_path_factory.mktemp("two")
    return Runs.of(server, world.yaml(folder / "e.yaml", **TWO, **QUICK), folder, calls=True)


@pytest.fixture
def stopped(two: Runs, tmp_path: Path) -> Path:
    """A run directory whose process was killed while it learned its second task."""
    from tests.torture.crash_faults import Fault

    run = tmp_path / "run"
    marks = [op[0] for op in two.trace.operations() if op[3] == "training"]
    answer = two.server("run", two.config, "--output", run, root=run, fault=Fault(at=marks[-1]))
    assert answer.killed
    assert [path.name for path in (run / "ledger").glob("0*")] == ["0001-stripes"]
    yield run
    shutil.rmtree(run, ignore_errors=True)
