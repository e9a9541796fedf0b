"""docs/suites.md: its suite runs, does what the page says, and is a packaged one as soon as it lies in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from keeplora import suites
from keeplora.data.doctor.layouts import LAYOUTS
from tests.docs.documents import ROOT, blocks, run_block, run_keeplora

PAGE = ROOT / "docs/suites.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def results(path: Path) -> dict[str, Any]:
    return json.loads((path / "results.json").read_text())


@pytest.mark.usefixtures("tiny_models")
def test_the_page_runs(here, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    to_run = [block for block in blocks(PAGE) if block.runs]
    assert [block.language for block in to_run] == ["bash", "bash", "python", "yaml", "bash"]
    for block in to_run:
        run_block(block, here, {})
    out = capsys.readouterr().out
    assert "All 2 datasets are there and sound." in out
    assert "order square-first: square, round-1, round-2" in out
    ours, other = (
        results(here / "runs/shapes-keeplora++-seed0"),
        results(here / "runs/shapes-lora-ordersquare-first-seed0"),
    )
    assert (ours["tasks"], ours["order"], ours["candidates"]) == (["round-1", "round-2", "square"], "1", "seen")
    assert (other["tasks"], other["order"]) == (["square", "round-1", "round-2"], "square-first")
    data = json.loads((here / "runs/shapes-keeplora++-seed0/data.json").read_text())["tasks"]
    assert sorted(data[0]["classes"] + data[1]["classes"]) == ["arc", "circle", "ellipse", "ring"]
    assert [len(task["classes"]) for task in data] == [2, 2, 2]
    assert all(task["warnings"] == [] for task in data)

    # One file more in the folder, and it is a packaged suite.
    folder = tmp_path / "packaged"
    shutil.copytree(suites.suite_folder(), folder, ignore=shutil.ignore_patterns("*.parquet", "__pycache__"))
    shutil.copy(here / "shapes.yaml", folder)
    (here / "shapes").rename(folder / "shapes")
    monkeypatch.setattr(suites, "__file__", str(folder / "__init__.py"))
    run_keeplora(["suites"], "packaging")
    assert "Drawn shapes" in capsys.readouterr().out
    run_keeplora(["run", "--suite", "shapes", "--method", "zero-shot", "--output", "packaged-run"], "packaging")
    assert results(here / "packaged-run")["suite"] == "shapes"


def test_the_snippet_of_cifar_is_a_task():
    (snippet,) = [block for block in blocks(PAGE) if block.language == "yaml" and block.file is None]
    (task,) = yaml.safe_load(snippet.text)["tasks"]
    (packaged,) = [spec for spec in suites.load_suite("mtil")["tasks"] if spec["name"] == task["name"]]
    assert {key: packaged[key] for key in ("name", "source", "path")} == {
        key: task[key] for key in ("name", "source", "path")
    }


def test_the_tree_of_mtil_is_what_the_doctor_looks_for():
    text = PAGE.read_text(encoding="utf-8")
    tree = next(block.text for block in blocks(PAGE) if block.text.startswith("DATA/"))
    for spec in suites.load_suite("mtil")["tasks"]:
        line = next(line for line in tree.splitlines() if line.strip().startswith(f"{spec['path']}/"))
        for name in LAYOUTS[spec["source"]]:
            assert name.split("|")[0].split("/")[0] in line, (spec["name"], name)
    assert all(spec["path"] in text for spec in suites.load_suite("x-tail")["tasks"])
