"""A study's page: every number, self-contained, escaped, whole whatever is missing, and quiet in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_runs import TASKS
from test_browser import BROWSER, browse
from test_html import Page

from keeplora.report.charts import number
from keeplora.report.runs import Run
from keeplora.report.study import render_study
from keeplora.report.study_charts import Dot, cliques, dots, ranks, span, spread
from keeplora.report.study_data import Study, StudyCell
from keeplora.report.study_html import headline, render_page
from keeplora.report.study_tables import with_ends, with_half
from keeplora.study.collect import read_runs, study_of
from keeplora.study.tables import summarise
from tests.study.fake_study import fake_cell, fake_study

EVIL = '<script>alert("x")</script>'


def study(paths: list[Path]) -> Study:
    found = read_runs(paths)
    return study_of(found.cells, name="A study", against=None, notes=found.notes)


def rendered(found: Study, folder: Path) -> Page:
    return Page(render_page(found, folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def whole(tmp_path: Path) -> Study:
    return study(
        fake_study(
            tmp_path / "runs", methods=("zero-shot", "lora", "keeplora", "keeplora++"), cost={"state_bytes": 2048}
        )
    )


def test_every_number_is_in_a_table(whole: Study, tmp_path: Path) -> None:
    page = rendered(whole, tmp_path)
    cells = {cell.replace("★", "").strip() for cell in page.cells}
    assert {with_half(one) for one in whole.estimates.values()} <= cells
    assert {with_ends(one) for one in whole.differences.values()} <= cells
    for matrix in whole.matrices.values():
        assert {number(v, 0) for row in (*matrix.rows, *matrix.probe_rows) for v in row} <= cells
    assert {"2 KiB", "442 368", "3 × 2", "0 1 2"} <= cells
    assert all(" → ".join(order.tasks) in page.text for order in whole.orders)
    assert "Wilcoxon’s exact test with 3 seeds that differ can give no p below 0.25" in page.text
    assert "needs many blocks to be telling" in page.text.lower()


def test_page_is_self_contained(whole: Study, tmp_path: Path) -> None:
    source = render_page(whole, tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(|srcset", source)
    assert all(target.startswith("#") or target == "data:," for target in page.targets)
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    assert "default-src 'none'" in source
    drawn = re.findall(r"<svg ([^>]*)>", source)
    assert len(drawn) > 20  # means, forest, ranks, orders, cost
    for attributes in drawn:
        assert 'aria-hidden="true"' in attributes or re.search(r'role="img" aria-label="[^"]{20,}"', attributes)


def test_text_from_people_is_escaped(tmp_path: Path) -> None:
    results = {"method": EVIL, "method_title": EVIL, "tasks": [EVIL, "b"], "probes": [EVIL], "metrics": {"last": 50.0},
               "accuracy": [[1.0, 2.0]] * 3, "probe_accuracy": [[3.0]] * 3}  # fmt: skip
    cells = [StudyCell(EVIL, EVIL, s, "finished", tmp_path, Run(tmp_path, results)) for s in range(2)]
    cells += [
        StudyCell("b", EVIL, 0, "failed", tmp_path, error=EVIL),
        StudyCell("b", "2", 1, "finished", tmp_path, cells[0].run),
    ]
    found = summarise(
        cells, name=EVIL, notes=[EVIL], facts=[(EVIL, EVIL)], configs=[(cells[0], {"tuner": {EVIL: EVIL}})]
    )
    page = rendered(found, tmp_path)
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 8


def test_missing_and_failed_cells_are_told(tmp_path: Path) -> None:
    cells = read_runs(fake_study(tmp_path / "runs", seeds=[0, 1])).cells
    odd = cells[-1]
    cells[-1] = StudyCell(
        odd.method, odd.order, odd.seed, "failed", odd.path, odd.run, "some lines\nError: no space left"
    )
    page = rendered(summarise(cells, name="s"), tmp_path)
    assert "7 of 8 cells are finished: every number below is a partial one" in page.text
    assert "1 failed" in page.text
    assert f"{odd.place} failed some lines Error: no space left" in page.text
    assert "1 × 2 (+1)" in page.cells


@pytest.mark.parametrize("count", [0, 1])
def test_page_of_next_to_nothing(tmp_path: Path, count: int) -> None:
    cells = [StudyCell("lora", "1", s, "pending", tmp_path) for s in range(2)]
    if count:
        cells[0] = read_runs([fake_cell(tmp_path / "runs", "lora")]).cells[0]
    page = rendered(summarise(cells, name="s"), tmp_path)
    assert f"{count} of 2 cells" in page.text
    assert ("No cell is finished yet." in page.text) == (count == 0)


def test_joint_without_transfer_and_a_matrix_with_gaps(tmp_path: Path) -> None:
    paths = fake_study(tmp_path, seeds=[0, 1], orders=["1"])
    joint = [fake_cell(tmp_path, "joint", seed=s, metrics={"last": 91.0 + s}) for s in range(2)]
    found = study([*paths, *joint])
    rows = [[None] * len(TASKS) for _ in TASKS]
    for cell in found.cells:
        if cell.method == "joint" and cell.run:
            cell.run.results["accuracy"][1:] = [*rows[:-1], [90.0] * len(TASKS)]
    page = rendered(study_of(found.cells, name="s", against=None), tmp_path)
    title = found.title("joint")
    at = page.cells.index(title)
    assert page.cells[at + 1 : at + 5] == [
        "2",
        "–",
        "–",
        "91.5 ± 6.4 ★" if not found.methods[-1].bound else "91.5 ± 6.4",
    ]
    # Row 1 of its matrix has no task, row 5 has all.
    assert page.cells.count("90") >= 5
    assert page.cells.count("–") > 4 * len(TASKS)


@pytest.mark.parametrize("seeds", [2, 3])
def test_what_cannot_be_told_apart_comes_first_and_nothing_is_called_best(tmp_path: Path, seeds: int) -> None:
    """The reference is no method of the preset's name; the tests see nothing, whatever the means are."""
    values = {"ewc": [50.0, 62.0, 55.0], "lora": [58.0, 51.0, 60.0]}
    paths = [
        fake_cell(tmp_path, method, seed=s, metrics=dict.fromkeys(("last", "probe", "forgetting"), last[s]))
        for method, last in values.items()
        for s in range(seeds)
    ]
    found = study_of(read_runs(paths).cells, name="s", against="ewc")
    said = [re.sub("<[^>]*>", "", line).replace("\u00a0", " ") for line in headline(found)]
    assert said[0].startswith("No method can be told from ewc in any metric: ")
    assert sum("told" in line for line in said) == 1
    assert said[1].startswith("Highest mean of Last: ")
    assert f"({seeds} seeds" in said[1]
    assert ("too few to call it the best" in said[1]) == (seeds < 3)
    assert not any("Best" in line for line in said)


def test_render_writes_every_file(whole: Study, tmp_path: Path) -> None:
    out = render_study(whole, tmp_path / "out")
    assert out == tmp_path / "out" / "report.html"
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "table.csv", "summary.csv", "table.tex", "table.md", "plots"}


def test_axes_hold_every_value() -> None:
    for values in ([], [3.0], [0.0, 0.0], [-14.2, 5.1], [99.0, 99.4], [0.001, 0.002], [-1e-12, 50.0]):
        axis = span(values, zero=True)
        assert axis.low <= min([*values, 0.0]) + 1e-9
        assert axis.high >= max([*values, 0.0]) - 1e-9
        assert 2 <= len(axis.ticks) <= 8
        assert 0.0 in axis.ticks


def test_marks_are_solid_only_where_sure_and_intervals_are_where_they_belong() -> None:
    chart = str(
        dots([Dot("a", 5.0, 0.0, 10.0, "x"), Dot("b", -5.0, solid=False), Dot("c", None)], label="l" * 20, zero=True)
    )
    assert chart.count("hollow") == 1
    assert chart.count("<circle") == 2
    axis = span([5.0, 0.0, 10.0, -5.0], zero=True)
    assert f'x1="{axis.at(0.0):.1f}" y1="23.0" x2="{axis.at(10.0):.1f}"' in chart
    assert f'cx="{axis.at(-5.0):.1f}"' in chart
    assert 'class="zero"' in chart


def test_ranks_join_what_is_not_told_apart() -> None:
    assert cliques([1.0, 2.0, 3.0], 0.5) == []
    assert cliques([1.0, 2.0, 3.0], 5.0) == [(0, 2)]
    assert cliques([1.0, 1.9, 2.8], 1.0) == [(0, 1), (1, 2)]
    chart = str(ranks(["a", "b", "c"], [2.8, 1.0, 1.9], 1.0, label="l" * 20))
    assert chart.count('class="clique"') == 2
    assert chart.index(">b</text>") < chart.index(">c</text>") < chart.index(">a</text>")


def test_orders_are_joined_and_their_spread_is_told() -> None:
    chart = str(spread([("a", [50.0, 53.5]), ("b", [None, 1.0]), ("c", [None, None])], ["1", "2"], label="l" * 20))
    assert "3.5 apart" in chart
    assert chart.count('class="join"') == 1
    assert chart.count('class="mark"') == 3


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_the_table_of_differences_needs_no_scrolling_on_a_desk(whole: Study, tmp_path: Path) -> None:
    page = render_page(whole, tmp_path / "report.html").read_text()
    found, _ = browse(page, tmp_path, width=1400)
    assert not [name for name in found["scrolled"] if name.startswith(("Less", "Mean"))]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_fits_and_is_quiet(tmp_path: Path, width: int, dark: bool) -> None:
    tasks = ["Verkehrszeichenerkennungsaufgabe_ohne_Leerzeichen", *TASKS[1:]]
    cells = []
    for seed in range(2):
        for label, names in (("1", tasks), ("a_very_long_name_of_an_order_without_spaces", tasks[::-1])):
            for method in ("zero-shot", "lora", "keeplora++"):
                path = fake_cell(tmp_path / "runs", method, order=label, seed=seed, tasks=names)
                cells += read_runs([path]).cells
    cells.append(StudyCell("a-method-" + "m" * 50, "1", 0, "failed", tmp_path, error="/a/very/long/path" * 20))
    page = render_page(summarise(cells, name="n" * 70, notes=["w" * 120]), tmp_path / "report.html").read_text()
    found, console = browse(page, tmp_path, width=width, dark=dark)
    assert console == ""
    assert found["scroll"] <= width, found["wide"]
    assert found["wide"] == []
    assert found["charts"] > 15
    assert found["small"] == 0
    assert found["dark"] == ("rgb(15, 19, 24)" if dark else "rgb(244, 246, 249)")
