"""The leaks as a picture and in the page: what is drawn, for few layers and many, old results and damaged ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import make_run
from PIL import Image

from keeplora.errors import KeepLoraError
from keeplora.report import render_report
from keeplora.report.audit_charts import leak_figures, leak_grid, leak_level, precisions, short_names
from keeplora.report.audit_plot import plot_audit


def audit(layers: int = 6, tasks: int = 3, exports: bool = True, worst: float = 3e-8) -> dict[str, Any]:
    names = [f"model.layers.{i}.q_proj" for i in range(layers)]
    rows = [
        {"layer": n, "task": f"task {t}", "factor_leak": worst if (i, t) == (1, 1) else 1e-8, "weight_leak": 2e-7,
         "weight_floor": 1.5e-7, "by_basis": [1e-8]}
        for i, n in enumerate(names) for t in range(tasks)
    ]  # fmt: skip
    out: dict[str, Any] = {"factor_leak_max": worst, "rows": rows, "notes": [], "bases": [None]}
    if exports:
        out["exports"] = [
            {"export": e, "dtype": d, "layer": n, "basis": None, "leak": leak, "floor": floor}
            for n in names
            for e, d, leak, floor in (
                ("running", "fp32", 2e-7, 1e-7), ("bf16", "bf16", 0.2, 0.19), ("adapter", "fp32", 1e-8, None),
            )
        ]  # fmt: skip
    return out


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_repeat_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    first = plot_audit(audit(), tmp_path / f"a{suffix}", title="a run").read_bytes()
    assert len(first) > 5000
    if suffix != ".svg":  # ids inside are drawn by chance
        assert plot_audit(audit(), tmp_path / f"b{suffix}", title="a run").read_bytes() == first


def test_a_leak_above_the_limit_is_red(tmp_path: Path) -> None:
    red = [0xC0, 0x39, 0x2B]

    def area(path: Path) -> int:
        return int((np.asarray(Image.open(path).convert("RGB")) == red).all(axis=-1).sum())

    fine = area(plot_audit(audit(), tmp_path / "fine.png"))
    assert area(plot_audit(audit(worst=2e-5), tmp_path / "bad.png")) > fine + 500


@pytest.mark.parametrize(
    ("layers", "tasks", "exports"), [(1, 1, False), (1, 12, True), (200, 10, True), (40, 1, False)]
)
def test_any_size_stays_on_a_page(tmp_path: Path, layers: int, tasks: int, exports: bool) -> None:
    found = audit(layers, tasks, exports)
    width, height = Image.open(plot_audit(found, tmp_path / "a.png", dpi=50)).size
    assert 150 < width < 1000
    assert 150 < height < 700


def test_other_endings_and_empty_audits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeepLoraError, match=r"a plot is written as .png, .svg or .pdf, not as '.gif'"):
        plot_audit(audit(), tmp_path / "a.gif")
    with pytest.raises(KeepLoraError, match="the audit has no rows to plot"):
        plot_audit({"rows": []}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_what_is_drawn() -> None:
    layers, tasks, grid = leak_grid(audit(2, 2, worst=4e-8))
    assert (layers, tasks) == (["model.layers.0.q_proj", "model.layers.1.q_proj"], ["task 0", "task 1"])
    assert grid == [[1e-8, 1e-8], [1e-8, 4e-8]]
    found = {one.label: one for one in precisions(audit(2, 2))}
    assert list(found) == ["running fp32", "bf16", "adapter"]
    assert found["bf16"].leaks == (0.2, 0.2)
    assert found["bf16"].floors == (0.19, 0.19)
    assert found["adapter"].floors == ()
    (old,) = precisions(audit(2, 2, exports=False))
    assert (old.label, old.leaks, old.floors) == ("running", (2e-7, 2e-7), (1.5e-7, 1.5e-7))
    still = audit(1, 2)
    still["rows"][0] |= {"factor_leak": 0.0, "by_basis": []}  # the task left the layer alone
    assert leak_grid(still)[2][0][0] is None
    still["rows"][0]["by_basis"] = [0.0]
    assert leak_grid(still)[2][0][0] == 0.0


def test_levels_and_names() -> None:
    levels = [leak_level(v) for v in (0, 1e-12, 1e-9, 1e-8, 1e-6, 1e-5, 1.0)]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, 12)
    assert short_names(["vision.a.b.q", "text.a.b.q"], 30) == ["vision.a.b.q", "text.a.b.q"]
    assert short_names(["only.one"], 30) == ["only.one"]
    assert short_names(["q", "q"], 30) == ["q", "q"]
    assert all(len(name) == 12 for name in short_names(["vision.layers.11.query", "texts.layers.11.query"], 12))


def page(tmp_path: Path, value: Any) -> str:
    path = make_run(tmp_path, "run")
    results = json.loads((path / "results.json").read_text())
    results["audit"] = value
    (path / "results.json").write_text(json.dumps(results))
    return render_report(path).read_text(encoding="utf-8")


def test_the_page_shows_both_charts(tmp_path: Path) -> None:
    text = page(tmp_path, audit(worst=2e-5))
    assert "Factors, layer by task" in text
    assert "Weights, by precision" in text
    assert "The worst is 2.0e-05, in model.layers.1.q_proj by task task 1; the limit is 1e-5." in text
    assert "bf16: leaks up to 2e-01, floor up to 2e-01" in text
    section = text[text.index("Factors, layer by task") :]
    assert section.count('class="cell"') == 18
    assert section.count("fill:var(--bad)") == 1
    assert "model.layers.0.q_proj, task 0: 1.0e-08" in section


def test_results_of_before_have_their_chart_and_damaged_ones_none(tmp_path: Path) -> None:
    old = audit(exports=False)
    for row in old["rows"]:
        del row["by_basis"]
    del old["bases"]
    text = page(tmp_path / "old", old)
    assert "Factors, layer by task" in text
    assert "running: leaks up to 2e-07" in text
    nothing = page(
        tmp_path / "none", {"factor_leak_max": None, "rows": [{"layer": "x", "task": "y", "factor_leak": None}]}
    )
    assert "Factors, layer by task" not in nothing
    assert leak_figures({}) == []
    assert "Leak audit" not in page(tmp_path / "null", None)


def test_a_wide_model_does_not_swell_the_page(tmp_path: Path) -> None:
    text = page(tmp_path, audit(300, 10))
    charts = re.findall(r"<svg.*?</svg>", text[text.index("Factors, layer by task") :], re.S)[:2]
    assert sum(map(len, charts)) < 900_000
    names = page(tmp_path / "evil", {**audit(2, 1), "rows": [{"layer": "<b>", "task": "<i>", "factor_leak": 1e-8}]})
    assert "<b>, <i>" not in names
    assert "&lt;b&gt;" in names
