"""The table of what a study's variants change, against differences worked out by hand."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keeplora.report.study_data import StudyCell

Run = Callable[..., Any]


def rows(**variants: list[float]) -> str:
    """A file of numbers: the variants' Last by seed."""
    return json.dumps(
        [
            {
                "variant": name,
                "seeds": {f"{s} 1": {"last": v, "transfer": 10.0, "probe": 20.0} for s, v in enumerate(last)},
            }
            for name, last in variants.items()
        ]
    )


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    (tmp_path / "one.json").write_text(rows(**{"keeplora++": [60.0, 62.0, 64.0]}))
    (tmp_path / "two.json").write_text(rows(better=[63.0, 65.1, 66.9], fewer=[50.0]))
    return tmp_path


@pytest.fixture
def run(run_script: Run) -> Run:
    """The script with these words: what it printed."""
    return partial(run_script, "differences")


def test_variants_of_one_study_beside_the_reference_of_another(numbers: Path, run: Run) -> None:
    found = run(
        numbers / "one.json", numbers / "two.json", "--figure", numbers / "f.png", "--output", numbers / "all.json"
    )
    told = {line.split(" | ")[0].strip("| "): line for line in found.splitlines()}
    # Pairs differ by 3.0, 3.1 and 2.9: mean 3.0, t interval 3.0 ± 4.303 · 0.1 / √3; sure after Holm's correction.
    assert "| **3.0 [2.8, 3.2]** |" in told["better"]
    assert told["fewer"].startswith("| fewer | 1 | 50.0 | 10.0 | 20.0 | -10.0 |")
    assert (numbers / "f.png").read_bytes().startswith(b"\x89PNG")
    assert list(told)[2:] == ["keeplora++", "better", "fewer"]
    assert run(numbers / "all.json") == found


def test_a_mark_says_where_its_interval_is(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled: without 0; hollow: holds 0; a cross: no interval; arrowheads: beyond the axis."""
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self))
    variants = {
        "clear": [63.0, 65.1, 66.9],
        "open": [60.5, 61.9, 64.2],
        "one": [50.0],
        "even": [63.0, 65.0],
        "wide": [40.0, 90.0],
    }
    (tmp_path / "all.json").write_text(rows(**{"keeplora++": [60.0, 62.0, 64.0]}, **variants))
    run(tmp_path / "all.json", "--figure", tmp_path / "f.png")
    marks: dict[int, list[tuple[str, str]]] = {}
    for line in drawn[0].axes[0].lines:
        if line.get_marker() not in ("None", ""):
            marks.setdefault(int(line.get_ydata()[0]), []).append((line.get_marker(), line.get_markerfacecolor()))
    assert marks == {
        0: [("o", "C0")], 1: [("o", "white")], 2: [("x", "C0")], 3: [("x", "C0")],
        4: [("<", "C0"), (">", "C0"), ("o", "white")],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("nowhere", "nowhere does not exist; give the folder of a study"),
        ("two.json", "no finished run of 'keeplora++'; there are: better, fewer"),
    ],
)
def test_what_is_refused(numbers: Path, run: Run, file: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(numbers / file)
    assert told in capsys.readouterr().err


def test_a_folder_and_the_file_that_is_written_of_it_tell_the_same(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variants as the plan has them, whichever finished first; runs that have not finished are left out."""
    study_runs = importlib.import_module("study_runs")

    def cell(method: str, seed: int, last: float, state: str = "finished") -> StudyCell:
        made: Any = SimpleNamespace(metrics={"last": last, "transfer": 1.0, "probe": None, "forgetting": 2.0})
        return StudyCell(method, "1", seed, state, tmp_path, made)

    cells = [cell("plain", 0, 50.0), cell("better", 1, 61.0), cell("plain", 1, 51.0), cell("better", 0, 9.0, "running")]
    store = SimpleNamespace(plan_values=lambda: {"methods": {"better": {}, "plain": {}, "never": {}}})
    monkeypatch.setattr(study_runs, "StudyStore", lambda path: SimpleNamespace(load=lambda: store))
    monkeypatch.setattr(study_runs, "study_cells", lambda found: cells)
    found = study_runs.read([tmp_path], ("variant",), lambda cell: (cell.method,))
    told = {"last": 50.0, "transfer": 1.0}
    assert found == {
        ("better",): {"1 1": {**told, "last": 61.0}},
        ("plain",): {"0 1": told, "1 1": {**told, "last": 51.0}},
    }
    assert list(found) == [("better",), ("plain",)]
    study_runs.write(tmp_path / "all.json", ("variant",), found)
    assert study_runs.read([tmp_path / "all.json"], ("variant",), lambda cell: (cell.method,)) == found
