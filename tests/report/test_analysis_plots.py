"""An analysis's figures: one per part that has data, small enough for a page, none for what is not there."""

from __future__ import annotations

import struct
from typing import Any

from keeplora.analysis.words import read_out
from keeplora.report.analysis_plots import draw

CHANGE = {"mean": -3.0, "low": -5.0, "high": -1.0, "low_tasks": None, "high_tasks": None, "n": 40, "sets": 1}
SCORE = {"mean": 60.0, "low": 55.0, "high": 65.0, "low_tasks": 50.0, "high_tasks": 70.0, "n": 40, "sets": 2}
ROW: dict[str, Any] = {
    "general": SCORE, "specific": SCORE, "general_change": CHANGE, "specific_change": {**CHANGE, "low": -5.0, "high": 2.0},
    "general_sets": {"a": 60.0}, "specific_sets": {"b": 60.0},
}  # fmt: skip


def results(**parts: Any) -> dict[str, Any]:
    base = {
        "untouched": ROW, "general": ["a"], "specific": ["b"], "note": "measured on a", "options": {"by": "energy"},
        "suggestion": {"gamma": 0.5, "r": None, "evidence": {}}, "towers": ["vision"],
    }  # fmt: skip
    return {**base, **parts}


def thirds(low: float, high: float) -> list[dict[str, Any]]:
    changes = [{**CHANGE, "mean": m, "low": m - 1, "high": m + 1} for m in (low, high)]
    names = ("the shallow third", "the deep third")
    return [
        {"window": i, "name": names[i], "points": [{**ROW, "share": 0.5, "general_change": changes[i], "layers": 4}]}
        for i in (0, 1)
    ]


def test_a_figure_for_each_part_and_no_other():
    pictures = draw(results(thirds=thirds(-20, -5), windows=[]))
    assert set(pictures) == {"thirds"}
    width, height = struct.unpack(">II", pictures["thirds"][16:24])
    assert 600 < width < 1400
    assert 200 < height < 800
    assert len(pictures["thirds"]) < 150_000


def test_words_tell_apart_what_the_intervals_do():
    said = read_out(results(thirds=thirds(-20, -5)))["thirds"]
    assert said[-1] == "At 50 % kept, general knowledge depends more on the shallow third."
    said = read_out(results(thirds=thirds(-6, -5)))["thirds"]
    assert (
        said[-1]
        == "Whether general knowledge depends more on the shallow third or on the deep third cannot be told from this."
    )
    assert "no change can be seen in the tasks (−3.0 points [−5.0, +2.0])" in said[0]


def test_two_ends_at_the_floor_are_never_told_apart():
    """Keeping the leading and keeping the trailing half of a tower may both leave nothing; a difference there means nothing."""
    up, down, none = ({**CHANGE, "mean": m, "low": m - 2, "high": m + 2} for m in (9.0, -9.0, 0.0))
    floor = {"difference": up, "leading_over_floor": none, "trailing_over_floor": none}
    alive = {"difference": down, "leading_over_floor": none, "trailing_over_floor": up}
    alike = {"difference": none, "leading_over_floor": up, "trailing_over_floor": up}

    def said(*rows: Any) -> list[str]:
        ends = [
            {"part": "vision", "share": share, "energy": share, "general": row, "specific": floor}
            for share, row in zip((0.5, 0.7, 0.95), rows)
        ]
        intra = [{"part": "vision", "mode": "leading", "points": []}]
        return [line for line in read_out(results(intra=intra, ends=ends))["intra"] if "general sets" in line]

    lines = said(floor, floor)
    assert "at 50 %, 70 % of Σσ² neither end of the spectrum" in lines[0]
    assert lines[-1] == "vision, the general sets: which end of the spectrum is worth more cannot be told."
    lines = said(floor, alike, alive)
    assert "at 70 % of Σσ² kept the leading and the trailing components are not told apart" in lines[1]
    assert "at 95 % of Σσ² kept the leading components score 9.0 points [7.0, 11.0] less" in lines[2]
    assert "the trailing components are worth more than the leading ones that hold as much" in lines[-1]
    both = {**alive, "difference": up, "leading_over_floor": up}
    assert "depends on how much is kept" in said(both, alive)[-1]
    assert "the leading components are worth more than the trailing ones" in said(both)[-1]


def test_what_is_not_told_is_said_so():
    summary = read_out(results())["summary"]
    assert "Suggested for this model: γ = 0.5." in summary
    assert "Left as configured, for these figures show no fault in it: rank." in summary
