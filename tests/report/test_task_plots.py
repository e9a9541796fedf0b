"""The drift figure leaves out what says nothing, and the runs of the similarity figure can be told apart."""

from __future__ import annotations

import re

import pytest

from keeplora.report.boundary_plot import plot_boundary
from keeplora.report.drift_plot import plot_drift
from keeplora.report.similarity_plot import AXES, plot_similarity
from keeplora.tuner.similarity import PREDICTORS

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


def test_predictors_have_axes_with_units_and_runs_go_by_their_methods(tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    predicted = {"overlap": 0.5, "energy": 0.6, "update": 1e-4, "size": 3.0}
    pair = {"run": "kpp-o1", "drop": 2.0, "predicted": predicted}
    found = {"tasks": ["a", "b"], "overlap": [[1.0, 0.5], [0.5, 1.0]], "pairs": [pair, {**pair, "run": "other"}]}
    text = plot_similarity({**found, "titles": {"kpp-o1": "KeepLoRA++, order 1"}}, tmp_path / "s.svg").read_text()
    for words in (
        "overlap of the two subspaces, share",
        "‖ΔW x‖² per ‖x‖²",
        "size of the later update",
        "KeepLoRA++, order 1",
    ):
        assert words in text
    assert "kpp-o1" not in text
    assert "other" in text  # without a title, the folder's name


def test_every_predictor_has_an_axis_in_words():
    assert set(AXES) == set(PREDICTORS)


def test_the_legend_of_the_boundary_lies_below_its_panels(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, buffer, **_: drawn.append(self))
    stream = {
        "tasks": ["a", "b"],
        "boundaries": [[40, "b"]],
        "samples": 80,
        "warmups": [[0, 20]],
        "alarms": [{"at": 42}],
    }
    values = {"positions": [20, 41], "values": [1.0, 9.0], "statistics": [0.1, 1.0]}
    plot_boundary({**stream, **values, "kind": "abrupt", "alarm_rate": 1e-3}, tmp_path / "b.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["warm-up", "a task begins", "alarm"]
    assert legend.get_window_extent().y1 <= figure.axes[1].get_tightbbox().y0
