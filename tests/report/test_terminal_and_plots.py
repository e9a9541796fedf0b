"""Terminal tables and README pictures."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from fake_runs import make_run
from PIL import Image
from rich.console import Console

from keeplora.errors import KeepLoraError
from keeplora.report.plots import plot_summary
from keeplora.report.terminal import matrix_table, results_table


def printed(table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=160).print(table)
    return stream.getvalue()


def results(path: Path) -> dict:
    return json.loads((path / "results.json").read_text())


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if f" {name} " in line)
    return re.split(r" {2,}", line.strip())


def test_results_table(runs: dict[str, Path]) -> None:
    found = {method: results(path) for method, path in runs.items()}
    text = printed(results_table(list(found.values()), title="demo"))
    metrics = found["lora"]["metrics"]
    cells = row(text, "Sequential LoRA")
    assert cells[1:5] == [f"{metrics[k]:.1f}" for k in ("transfer", "average", "last", "probe")]
    assert cells[5] == f"{metrics['forgetting']:.1f}"
    assert cells[7] == "3 min 52 s"
    assert row(text, "KeepLoRA++")[3] == f"{found['keeplora++']['metrics']['last']:.1f}★"
    assert row(text, "Untouched model")[5:] == ["–", "–", "–"]
    assert "★ the best of its column, as far as shown (Forgetting: the lowest)" in text


def test_results_table_of_partial_and_of_no_runs(tmp_path: Path) -> None:
    text = printed(results_table([results(make_run(tmp_path, "a", done=2))]))
    assert row(text, "KeepLoRA++ (2 of 5 tasks)")[1:7] == ["–"] * 6
    assert "★" not in text  # nothing to be better than, so nothing to explain
    assert "method" in printed(results_table([]))


def test_matrix_table(tmp_path: Path) -> None:
    one = results(make_run(tmp_path, "a", tasks=["[bold]x[/bold]", "b"], probes=["p"]))
    text = printed(matrix_table(one))
    assert "[bold]x[/bold]" in text
    assert row(text, "before")[1:] == [f"{v:.1f}" for v in [*one["accuracy"][0], *one["probe_accuracy"][0]]]
    assert row(text, "after b")[1:] == [f"{v:.1f}" for v in [*one["accuracy"][2], *one["probe_accuracy"][2]]]


def test_a_long_sequence_is_told_in_means(tmp_path: Path) -> None:
    """Twenty-two columns would show a digit each; twelve still fit."""
    names = [f"task-{number}" for number in range(1, 23)]
    one = results(make_run(tmp_path, "a", tasks=names, probes=["p"]))
    text = printed(matrix_table(one))
    for moment, learned in (("after task-1", 1), ("after task-20", 20)):
        values = one["accuracy"][learned]
        means = [values[learned - 1], fmean(values[:learned]), fmean(values[learned:])]
        assert row(text, moment)[1:] == [f"{v:.1f}" for v in [*means, *one["probe_accuracy"][learned]]]
    assert row(text, "before")[1] == "–"
    assert row(text, "after task-22")[3] == "–"
    assert max(map(len, text.splitlines())) < 100
    few = printed(matrix_table(results(make_run(tmp_path, "b", tasks=names[:12], probes=["p"]))))
    assert "mean of learned" not in few
    assert "task-12" in few


@pytest.mark.parametrize("count", [2, 4])
def test_plot_summary(runs: dict[str, Path], tmp_path: Path, count: int) -> None:
    paths = list(runs.values())[:count]
    out = plot_summary(paths, tmp_path / "docs" / "plot.png")
    with Image.open(out) as picture:
        width, height = picture.size
        assert width > 1.8 * height
        # Something is drawn in each third, and the paper is white.
        for k in range(3):
            colours = (
                picture.convert("RGB").crop((k * width // 3, 60, (k + 1) * width // 3, height - 60)).getcolors(1 << 24)
            )
            assert colours is not None
            assert len(colours) > 20
            assert max(colours)[1] == (255, 255, 255)
    first = out.read_bytes()
    assert plot_summary(paths, out).read_bytes() == first


def test_plot_of_partial_runs_and_svg(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, "a", done=2), make_run(tmp_path, "b", "lora", done=0)]
    assert plot_summary(paths, tmp_path / "p.svg").read_text().startswith("<?xml")


def test_plot_refuses_what_it_cannot_show(runs: dict[str, Path], tmp_path: Path) -> None:
    one, two = list(runs.values())[:2]
    with pytest.raises(KeepLoraError, match="at least two runs"):
        plot_summary([one], tmp_path / "p.png")
    with pytest.raises(KeepLoraError, match=r"written as \.png"):
        plot_summary([one, two], tmp_path / "p.gif")
    with pytest.raises(KeepLoraError, match="not made on the same"):
        plot_summary([one, make_run(tmp_path, "x", key="beef")], tmp_path / "p.png")
    edited = results(two) | {"accuracy": [], "probe_accuracy": []}
    (two / "results.json").write_text(json.dumps(edited))
    with pytest.raises(KeepLoraError, match="no evaluated model yet"):
        plot_summary([one, two], tmp_path / "p.png")


def test_importing_the_report_is_light() -> None:
    heavy = ("matplotlib", "jinja2", "torch", "rich")
    code = "import sys, keeplora.report, keeplora.report.terminal, keeplora.report.plots; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
