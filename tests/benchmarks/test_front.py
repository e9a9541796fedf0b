"""The front of γ and learning rate, against numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def rows(*cells: tuple[float, float, dict[str, tuple[float, float]]]) -> str:
    """A file of numbers: γ, learning rate, seed → (Last, Probe)."""
    return json.dumps(
        [
            {
                "gamma": gamma,
                "learning_rate": rate,
                "seeds": {
                    f"{s} 1": {"last": last, "transfer": 10.0, "probe": probe} for s, (last, probe) in of.items()
                },
            }
            for gamma, rate, of in cells
        ]
    )


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "front.json"
    path.write_text(
        rows(  # the rates not in order: lines go by them all the same
            (1.0, 0.002, {"0": (60.0, 10.0), "1": (62.0, 12.0), "2": (99.0, 99.0)}),
            (1.0, 0.001, {"0": (50.0, 30.0), "1": (50.0, 28.0)}),
            (0.2, 0.001, {"0": (48.0, 30.0), "1": (50.0, 30.0)}),
            (0.2, 0.002, {"0": (64.0, 20.0), "1": (64.0, 20.0)}),
            (0.2, 0.004, {"0": (30.0, 10.0), "1": (30.0, 10.0), "3": (9.0, 9.0)}),
            (0.2, 0.0005, {"0": (40.0, 33.0), "1": (40.0, 33.0), "3": (40.0, 33.0)}),
        )
    )
    return path


@pytest.fixture
def run(run_script: Run) -> Run:
    """The script with these words: what it printed."""
    return partial(run_script, "front")


def test_last_at_the_same_probe(numbers: Path, run: Run) -> None:
    found = run(numbers, "--levels", 20, 25)
    # At 20: γ 1 halfway between 50 and 60 (seed 0) and between 50 and 62 (seed 1); γ 0.2 just reaches its second rate, and
    # crosses after it. Differences 9 and 8: mean 8.5, t interval 8.5 ± 12.706 · 0.7071 / √2.
    assert "| 20 | 1 | 2 | 55.5 [49.1, 61.9] |  |  |" in found
    assert "| 20 | 0.2 | 2 | 64.0 [64.0, 64.0] | 2 | 8.5 [2.1, 14.9] |" in found
    # At 25: 56 and 57 against 52.5 and 50 + 12 · 3/16 = 52.25.
    assert "| 25 | 0.2 | 2 | 56.5 [50.1, 62.9] | 2 | 4.1 [" in found


def test_nothing_is_read_beyond_the_rates_that_were_run(numbers: Path, run: Run) -> None:
    """Nor across one that was not: seed 3 has the first and the last rate of γ 0.2."""
    found = run(numbers, "--levels", 11, 35)
    assert "| 11 | 1 | 1 | 59.5 |" in found  # seed 1 ends at 12
    assert "| 11 | 0.2 | 2 | 33.4 [33.4, 33.4] | 1 | -26.1 |" in found
    assert "| 35 |" not in found


def test_a_later_file_takes_an_earlier_ones_place(numbers: Path, run: Run, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    again.write_text(rows((1.0, 0.001, {"0": (70.0, 30.0)})))
    found = run(numbers, again, "--output", tmp_path / "all.json", "--figure", tmp_path / "f.png")
    assert "| 1 | 0.001 | 2 | 60.0 [" in found  # (70 + 50) / 2
    assert run(tmp_path / "all.json") == found
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_what_is_not_there_is_named(numbers: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(numbers.with_name("nowhere"))
    assert "nowhere is not there; give the folder of a study" in capsys.readouterr().err
