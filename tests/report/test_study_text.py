"""A study's tables for other programs: every number is there, names are escaped, gaps are dashes and never a crash."""

from __future__ import annotations

import csv
import doctest
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from keeplora.report import study_charts, study_data, study_tables, study_text
from keeplora.report.runs import Run
from keeplora.report.study_data import Study, StudyCell
from keeplora.report.study_plots import plot_study
from keeplora.study.collect import read_runs, study_of
from keeplora.study.tables import summarise
from tests.study.fake_study import METRICS, fake_cell, fake_study

EVIL = r"100% of {A} & B_1 #2 $x$ ~^\ [b]|* <i>"


def study(paths: list[Path], **more) -> Study:
    found = read_runs(paths)
    return study_of(found.cells, name=more.pop("name", "s"), against=more.pop("against", None), notes=found.notes)


def failing(tmp_path: Path) -> Study:
    """A finished cell, one with half its tasks, one that failed, one that never began; joint has no Transfer."""
    whole = read_runs(fake_study(tmp_path, methods=("lora",), seeds=[0, 1], orders=["1"])).cells
    joint = read_runs([fake_cell(tmp_path, "joint", metrics={"last": 90.0})]).cells
    half = read_runs([fake_cell(tmp_path, "joint", seed=1, done=2, state="running")]).cells
    dead = StudyCell("ewc", "1", 0, "failed", tmp_path, error=f"Traceback\nError: {EVIL}")
    return summarise([*whole, *joint, *half, dead, StudyCell("ewc", "1", 1, "pending", tmp_path)], name=EVIL)


def test_csv_has_a_row_per_cell_and_every_metric(tmp_path: Path) -> None:
    found = study(fake_study(tmp_path, cost={"state_bytes": 77}))
    rows = list(csv.DictReader(io.StringIO(study_text.table_csv(found))))
    assert len(rows) == 12
    for row, cell in zip(rows, found.cells, strict=True):
        assert (row["method"], row["order"], int(row["seed"]), row["state"]) == (
            cell.method,
            cell.order,
            cell.seed,
            "finished",
        )
        assert {k: float(row[k]) for k in METRICS} == {k: cell.metrics[k] for k in METRICS}
        assert row["state_bytes"] == "77"


def test_summary_csv_has_every_estimate_and_test(tmp_path: Path) -> None:
    found = study(fake_study(tmp_path))
    rows = list(csv.DictReader(io.StringIO(study_text.summary_csv(found))))
    assert len(rows) == 2 * 3 * len(METRICS)
    for row in rows:
        key = (row["method"], None if row["order"] == "all" else row["order"], row["metric"])
        one = found.estimates[key]
        assert [float(row[k]) for k in ("mean", "low", "high")] == [one["mean"], one["low"], one["high"]]
        difference = found.differences.get(key)
        assert (row["difference"] == "") == (difference is None)
        if difference is not None:
            assert float(row["difference"]) == difference.interval["mean"]
            assert float(row["t_p_holm"]) == difference.t_p_holm
            assert float(row["wilcoxon_p"]) == difference.wilcoxon_p


def test_gaps_are_dashes_everywhere(tmp_path: Path) -> None:
    found = failing(tmp_path)
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(study_text.table_csv(found)))}
    assert rows["ewc"]["last"] == ""
    assert rows["ewc"]["error"] == "" or "Error" in rows["ewc"]["error"]
    markdown = study_text.table_md(found)
    joint = next(line for line in markdown.splitlines() if line.startswith("| joint"))
    assert joint.split(" | ")[1:5] == ["1", "–", "–", "90.0"]
    ewc = next(line for line in markdown.splitlines() if line.lower().startswith("| ewc"))
    assert ewc.split(" | ")[1:4] == ["0", "–", "–"]
    assert "3 of 6 cells are finished. Missing:" in markdown
    assert "- ewc, order 1, seed 0: failed: Error:" in markdown
    assert "- joint, order 1, seed 1: running, 2 of 5 tasks" in markdown
    stream = io.StringIO()
    for part in study_text.terminal(found):
        Console(file=stream, width=160).print(part)
    assert "3 of 6 cells are finished" in stream.getvalue()
    assert "[b]|* <i>" in stream.getvalue()  # text, not markup


def test_a_partial_study_without_any_number_is_written_too(tmp_path: Path) -> None:
    found = summarise([StudyCell("lora", "1", 0, "pending", tmp_path)], name="s")
    for make in (study_text.table_csv, study_text.summary_csv, study_text.table_md, study_text.table_tex):
        assert "lora" in make(found)
    assert plot_study(found, tmp_path / "plots") == []


def unescaped(text: str) -> str:
    """LaTeX without its commands, escapes and groups: what is left must hold no character that LaTeX would trip over."""
    text = re.sub(r"^%.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\\[&%$#_{}\\]|\\[a-zA-Z]+", "", text)


def test_latex_escapes_what_people_write(tmp_path: Path) -> None:
    results = {"method": "x", "method_title": EVIL + " γ → −1 ±2", "tasks": ["a"], "metrics": {"last": 50.0}}
    cells = [StudyCell("x", EVIL, s, "finished", tmp_path, Run(tmp_path, results)) for s in range(2)]
    text = study_text.table_tex(summarise(cells, name=EVIL))
    assert (
        r"100\% of \{A\} \& B\_1 \#2 \$x\$ \textasciitilde{}\textasciicircum{}\textbackslash{} {[}b{]}$|$* $<$i$>$"
        in text
    )
    assert r"$\gamma$ $\rightarrow$ $-$1 $\pm$2" in text
    rest = unescaped(text)
    assert not set(rest) & set("%#~^_\\")
    assert rest.count("$") % 2 == 0
    assert rest.count("{") == rest.count("}")
    assert text.isascii()


def test_latex_tables_are_whole(tmp_path: Path) -> None:
    found = study(fake_study(tmp_path))
    text = study_text.table_tex(found)
    assert (
        text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 7
    )  # 3 scopes of means and differences; cost
    for block in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in block[1].splitlines() if line.endswith(r"\\")]
        assert len(rows) >= 2
        assert all(len(re.findall(r"(?<!\\)&", row)) == len(block[0]) - 1 for row in rows)
        assert [rule in block[1] for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [True] * 3
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == 7


def test_markdown_keeps_its_columns(tmp_path: Path) -> None:
    results = {"method": "x", "method_title": "a|b *c*", "tasks": ["a"], "metrics": {"last": 50.0}}
    cells = [StudyCell("x", "1", 0, "finished", tmp_path, Run(tmp_path, results))]
    text = study_text.table_md(summarise(cells, name="s"))
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert row.startswith(r"| a\|b \*c\* | 1 |")
    assert len(re.findall(r"(?<!\\)\|", row)) == 9


def test_bold_is_the_best_and_what_is_sure(tmp_path: Path) -> None:
    lasts = {"lora": (50.0, 50.5, 51.0), "ewc": (60.0, 60.4, 61.1), "l2": (50.0, 52.5, 50.0)}
    paths = [fake_cell(tmp_path, m, seed=s, metrics={"last": v}) for m, of in lasts.items() for s, v in enumerate(of)]
    text = study_text.table_md(study(paths))
    assert text.count("**60.5 ± ") == 1
    assert "**+10.0 [" in text
    assert "| +0.3 [" in text  # not bold


def test_untouched_model_only_without_zero_shot(tmp_path: Path) -> None:
    paths = fake_study(tmp_path, seeds=[0], orders=["1"])
    assert "| Untouched model | – |" in study_text.table_md(study(paths))
    assert "Untouched" not in study_text.table_md(study([*paths, fake_cell(tmp_path, "zero-shot")]))


def test_plots_are_drawn_and_stale_ones_go(tmp_path: Path) -> None:
    found = study(fake_study(tmp_path / "runs", methods=("zero-shot", "lora", "keeplora++")))
    paths = plot_study(found, tmp_path / "plots", dpi=60)
    assert {p.name for p in paths} == {
        "means.png", "forest.png", "orders.png", "critical-difference.png", "matrices-1.png", "matrices-2.png"
    }  # fmt: skip
    for path in paths:
        with Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert max(colours)[1] == (255, 255, 255)
            assert len(colours) > 20
    one = study(fake_study(tmp_path / "other", methods=("lora",), orders=["1"]))
    assert {p.name for p in plot_study(one, tmp_path / "plots", dpi=60)} == {"means.png", "matrices-1.png"}
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"means.png", "matrices-1.png"}


@pytest.mark.parametrize("module", [study_charts, study_tables, study_text, study_data])
def test_docstring_examples(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
