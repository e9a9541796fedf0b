"""`keeplora copy`, `export --output s3://…`, and what is said where a run is to lie behind an address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from keeplora.cli import main
from keeplora.experiment.run_directory import RunDirectory
from tests.cli.tiny_world import World


@pytest.fixture(autouse=True)
def bucket() -> Iterator[None]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield
    store.store.clear()


def cli(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return int(left.value.code or 0)


def test_a_run_goes_to_a_store_and_is_gone_on_with_elsewhere(world: World, tmp_path: Path, capsys) -> None:
    run = world.copied(world.run()[0], tmp_path / "run")
    assert cli("copy", run, "memory://bucket/run") == 0
    assert "memory:///bucket/run" in capsys.readouterr().out
    assert cli("copy", "memory://bucket/run", tmp_path / "back") == 0
    capsys.readouterr()
    assert cli("ledger", "verify", tmp_path / "back", "--files-only") == 0
    assert "checks passed" in capsys.readouterr().out
    with RunDirectory.open_existing(run):
        assert cli("copy", run, "memory://bucket/other") == 1
    assert "already open in this process" in capsys.readouterr().err


def test_an_export_goes_to_a_store(world: World, tmp_path: Path, capsys) -> None:
    run = world.copied(world.run()[0], tmp_path / "run")
    assert cli("ledger", "export", run, "--format", "peft", "--output", "memory://bucket/adapter") == 0
    assert capsys.readouterr().out.strip() == "memory:///bucket/adapter"
    assert cli("export", run, "--format", "peft", "--output", tmp_path / "adapter") == 0
    store = fsspec.filesystem("memory")
    there = {name.removeprefix("/bucket/adapter/"): store.cat_file(name) for name in store.find("/bucket/adapter")}
    here = {
        p.relative_to(tmp_path / "adapter").as_posix(): p.read_bytes()
        for p in (tmp_path / "adapter").rglob("*")
        if p.is_file()
    }
    assert there == here


def test_a_run_cannot_lie_in_a_store(world: World, tmp_path: Path, capsys) -> None:
    config = world.yaml(tmp_path / "e.yaml", output="s3://bucket/run")
    for words in (("run", config), ("resume", "s3://bucket/run"), ("ledger", "log", "s3://bucket/run")):
        assert cli(*words) == 1
        told = capsys.readouterr().err
        assert "s3://bucket/run: a " in told
        assert "must lie on a local disk" in told
        assert told.count("\n") == 1
