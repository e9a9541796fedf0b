"""benchmarks/sequence.py: pairs, units, ages and layers of runs whose numbers are known."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keeplora.evaluation.metrics import summary

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sequence.py"
sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script
sequence = importlib.import_module("sequence")
sys.path.remove(str(SCRIPT.parent))


def run(method: str, order: str, seed: int, lost: float = 0.0, learned: float = 80.0, tasks: int = 7) -> dict[str, Any]:
    """Every task is learned to ``learned`` and loses ``lost`` with each later one; half of the layers are full at the last."""
    accuracy = [
        [learned - lost * (after - task - 1) if after > task else 10.0 for task in range(tasks)]
        for after in range(tasks + 1)
    ]
    probes = [[40.0 - after, 20.0 - after] for after in range(tasks + 1)]
    layers = [{"rank": [16] * tasks}, {"rank": [16] * (tasks - 1) + [0]}] if method != "lora" else []
    results = {
        "metrics": summary(accuracy, probes), "accuracy": accuracy, "probe_accuracy": probes, "layers": layers,
    }  # fmt: skip
    return sequence.row_of(method, order, seed, results)


def runs(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    file = tmp_path / "sequence.json"
    file.write_text(json.dumps(rows))
    return file


def rows_of(text: str, head: str) -> list[list[str]]:
    """The Markdown table whose head begins so, as cells."""
    block = next(part for part in text.split("\n\n") if part.startswith(f"| {head}"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def test_a_row_is_what_the_run_says() -> None:
    row = run("keeplora++", "1", 0, lost=2.0)
    assert row["probes"] == [30.0, 29.0, 28.0, 27.0, 26.0, 25.0, 24.0, 23.0]
    assert row["adapted"] == [1.0] * 6 + [0.5]
    assert run("lora", "1", 0)["adapted"] == []
    assert sequence.lost_by_age(row["accuracy"]) == {age: [2.0 * age] * (7 - age) for age in range(1, 7)}


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two orders in which the difference is 10 and 20, two seeds in which it is 12 and 18: each interval is of its unit."""
    rows = []
    for order, by_order in (("1", 10.0), ("2", 20.0)):
        for seed, by_seed in ((0, -3.0), (1, 3.0)):
            rows.append(run("lora", order, seed, lost=3.0, learned=50.0))
            rows.append(run("keeplora++", order, seed, lost=3.0, learned=50.0 + by_order + by_seed))
    file, image = runs(tmp_path, rows), tmp_path / "figure.png"
    monkeypatch.setattr(sys, "argv", ["sequence.py", str(file), "--figure", str(image)])
    sequence.main()
    told = capsys.readouterr().out
    metrics = {row[0]: row[1:] for row in rows_of(told, "| lora | keeplora++")}
    assert metrics["Last"] == ["41.0", "56.0", "15.0 [-48.5, 78.5]", "15.0 [-23.1, 53.1]", "10.0 to 20.0"]
    assert metrics["Probe"][2:] == ["0.0 [0.0, 0.0]", "0.0 [0.0, 0.0]", "0.0 to 0.0"]
    assert "over 2 orders" in told
    assert "over 2 seeds" in told
    # After five of seven tasks they have lost 6 points on average, after all 9.
    assert rows_of(told, "tasks learned") == [
        ["5", "44.0", "59.0", "15.0 [-48.5, 78.5]"],
        ["7", "41.0", "56.0", "15.0 [-48.5, 78.5]"],
    ]
    ages = rows_of(told, "points lost")
    # 2 to 5 tasks later: 5, 4, 3 and 2 tasks have lost 6, 9, 12 and 15 points.
    assert ages == [
        ["1", *["3.0 [3.0, 3.0]"] * 2],
        ["2–5", *["9.4 [9.4, 9.4]"] * 2],
        ["6–10", *["18.0 [18.0, 18.0]"] * 2],
    ]
    assert rows_of(told, "layers") == [["keeplora++", "100", "100", "50"]]
    with Image.open(image) as picture:
        assert picture.width == 1100


def test_only_whole_seeds_and_pairs_count() -> None:
    """Seed 1 lacks order 2 of one method; seed 2 is there for one method alone."""
    rows = [run(m, o, 0) for m in ("lora", "keeplora++") for o in ("1", "2")]
    rows += [run("lora", "1", 1), run("keeplora++", "1", 1), run("lora", "2", 1), run("lora", "1", 2)]
    ours, theirs = sequence.paired(rows, "keeplora++", "lora")
    assert [(row["order"], row["seed"]) for row in ours] == [("1", 0), ("2", 0)]
    assert [(row["order"], row["seed"]) for row in theirs] == [("1", 0), ("2", 0)]
    assert {row["method"] for row in theirs} == {"lora"}


def test_without_a_pair_it_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sequence.py", str(runs(tmp_path, [run("lora", "1", 0)]))])
    with pytest.raises(SystemExit):
        sequence.main()
    assert "holds no seed with finished runs of keeplora++ and lora in the same orders" in capsys.readouterr().err


def test_the_examples_hold() -> None:
    assert doctest.testmod(sequence).failed == 0
