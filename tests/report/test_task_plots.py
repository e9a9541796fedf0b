"""The drift figure leaves out what says nothing, and the runs of the similarity figure can be told apart."""

from __future__ import annotations

import re

import pytest

from keeplora.report.drift_plot import plot_drift

KEYS = ("relative", "moved", "overlap", "largest_angle", "weight_angle", "a_in_b", "b_in_a", "moved_in_a")


@pytest.mark.parametrize(("overlap", "angle", "shown"), [(1 - 1e-7, 1e-6, False), (0.8, 30.0, True)])
def test_overlap_and_angle_of_one_run_are_left_out(overlap, angle, shown, tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    row = dict.fromkeys(KEYS, 0.1) | {"layer": "x", "overlap": overlap, "largest_angle": angle}
    path = plot_drift({"a": "a", "b": "b", "layers": [row, {**row, "layer": "y"}]}, tmp_path / "d.svg")
    text = path.read_text()
    assert bool(re.search("overlap", text)) is shown
    assert "ΔW_a" in text
