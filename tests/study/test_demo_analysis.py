"""The demo's analysis, kept as its points: what today's rules make of it is what docs/analyze.md says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from keeplora.analysis.intervals import Resamples
from keeplora.analysis.words import at_floor
from keeplora.study.analyze import outcome
from keeplora.study.analyze.plan import Point
from keeplora.study.analyze.store import AnalysisStore

ORDER = ("part", "mode", "task", "window", "share")
"""Of the values in a point's name."""
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads((DOCS / "evidence/analysis.json").read_text(encoding="utf-8"))


def concluded(kept: Mapping[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Results of the kept points by the code as it is; no figure is drawn."""
    monkeypatch.setattr(outcome, "render_analysis", lambda results, folder: folder)
    store, wanted = AnalysisStore(folder), []
    for name, point in kept["points"].items():
        wanted.append(Point(point["kind"], {key: point[key] for key in ORDER if key in point}))
        assert wanted[-1].name == name
        store.write(wanted[-1], point["result"])
    return outcome.conclude(store, kept["about"], wanted)


def test_todays_rules_suggest_gamma_1_at_a_lower_rate_and_nothing_else(kept, tmp_path, monkeypatch):
    found = concluded(kept, tmp_path, monkeypatch)
    made = {key: value for key, value in found["suggestion"].items() if key != "evidence"}
    assert made == {"energy_weights": None, "energy_features": None, "gamma": 1.0, "r": None, "learning_rate": 0.00096}
    assert made["learning_rate"] / kept["about"]["learning_rate"] == pytest.approx(0.65, abs=0.005)
    page = " ".join((DOCS / "analyze.md").read_text(encoding="utf-8").split())
    assert "these figures suggest γ = 1, at 0.65 times the learning rate, and nothing else" in page


def test_the_page_prints_what_the_points_hold(kept, tmp_path, monkeypatch):
    found = concluded(kept, tmp_path, monkeypatch)
    page = (DOCS / "analyze.md").read_text(encoding="utf-8").replace("−", "-")
    for row in found["windows"]:
        gain, loss = (f"{s['mean']:.1f} [{s['low']:.1f}, {s['high']:.1f}]" for s in (row["gain"], row["loss"]))
        assert f"| {row['name']} | {gain} | {loss}" in page
    for row in found["ends"]:
        floor = ", both at the floor" if at_floor(row["general"]) else ""
        line = f"| {row['part'].removesuffix('_model')}, {row['share']:.0%} | {cell(row['general']['difference'])}{floor} |"
        assert line.replace("%", " %") in page


def test_points_of_finer_windows_are_not_mixed_into_thirds(kept, tmp_path, monkeypatch):
    thirds = concluded(kept, tmp_path, monkeypatch)["windows"]
    store, point = AnalysisStore(tmp_path), kept["points"]["window-1-0"]
    finer = [Point("window", {"task": 1, "window": w, "windows": 12}) for w in range(12)]
    for one in finer:
        store.write(one, point["result"])
    asked = [Point("untouched")]  # a call that asks for no windows
    assert outcome.conclude(store, kept["about"], asked)["windows"] == thirds
    rows = outcome.conclude(store, kept["about"], finer)["windows"]
    assert [row["name"] for row in rows] == [f"window {k} of 12" for k in range(1, 13)]
    assert [row["blocks"] for row in rows[:2]] == [
        "block 0 of vision_model", "blocks 0 of text_model and 1 of vision_model"
    ]  # fmt: skip


def test_with_every_sample_the_leading_end_of_the_vision_tower_is_told(kept):
    points = kept["every_sample"]["points"]
    scores = {name.removeprefix("intra-vision_model-"): p["result"]["general"] for name, p in points.items()}
    draws = Resamples({name: len(values) for name, values in scores["untouched"].items()})
    assert sum(draws.sizes.values()) == 320
    page = (DOCS / "analyze.md").read_text(encoding="utf-8").replace("−", "-")
    for share in (0.95, 0.98):
        leading, trailing = scores[f"leading-{share}"], scores[f"trailing-{share}"]
        found = draws.difference(leading, trailing)
        assert found.low > 0
        assert draws.difference(leading, scores["leading-0.0"]).low > 0
        assert f"**{cell(found._asdict())}** at {share:.0%}".replace("%", " %") in page
        lost = draws.difference(scores["untouched"], leading)
        assert f"{lost.mean:.1f} [{lost.low:.1f}, {lost.high:.1f}]" in page


def cell(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:+.1f} [{spread['low']:+.1f}, {spread['high']:+.1f}]"
