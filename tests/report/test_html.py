"""The page: complete, self-contained, escaped, and whole whatever part of a run is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run

from keeplora.errors import KeepLoraError
from keeplora.report import render_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags balanced, ids unique, text of cells and of everything collected."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(source)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        if "id" in found:
            self.ids.append(str(found["id"]))
        self.targets += [str(found[key]) for key in ("href", "src") if key in found]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and any(tag in ("td", "th") for tag in self.open):
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def rendered(path: Path, **options: Any) -> Page:
    out = render_report(path, **options)
    assert out == path / "report.html"
    return Page(out.read_text(encoding="utf-8"))


def edit(path: Path, file: str, change: dict[str, Any]) -> None:
    value = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**value, **change}))


def test_every_number_is_in_a_table(runs: dict[str, Path]) -> None:
    page = rendered(runs["keeplora++"])
    cells = {cell.replace("★", "").strip() for cell in page.cells}

    def shown(value: float, digits: int = 1) -> bool:
        return f"{value:.{digits}f}".replace("-", "−") in cells

    for path in runs.values():
        results = json.loads((path / "results.json").read_text())
        for row in [*results["accuracy"], *results["probe_accuracy"]]:
            assert all(shown(value) for value in row)
        for key in ("transfer", "average", "last", "forgetting", "bwt", "probe"):
            assert shown(results["metrics"][key]), key
    own = json.loads((runs["keeplora++"] / "results.json").read_text())
    for layer in own["layers"]:
        assert layer["layer"] in cells
        assert shown(layer["scale"], 3)
        assert {str(k) for k in layer["used"]} <= cells
    for info in own["tasks_info"]:
        assert all(shown(epoch["loss"], 4) for epoch in info["epochs"])
    assert all(shown(value) for value in own["chance"].values())
    assert {"3.1e-07", "4.4e-06", "3.9e-06", "442 368"} <= cells


def test_page_is_self_contained(runs: dict[str, Path]) -> None:
    source = render_report(runs["keeplora++"]).read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(|srcset", source)
    assert all(target.startswith("#") or target == "data:," for target in page.targets)
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    assert "default-src 'none'" in source


def test_every_chart_has_words_for_those_who_cannot_see_it(runs: dict[str, Path]) -> None:
    source = render_report(runs["keeplora++"]).read_text(encoding="utf-8")
    drawn = re.findall(r"<svg ([^>]*)>", source)
    assert len(drawn) > 15
    for attributes in drawn:
        assert 'aria-hidden="true"' in attributes or re.search(r'role="img" aria-label="[^"]{20,}"', attributes)


def test_methods_are_set_beside_each_other_and_the_best_is_marked(runs: dict[str, Path]) -> None:
    page = rendered(runs["keeplora++"])
    for label in (
        "KeepLoRA++ · this run",
        "KeepLoRA (γ = 1)",
        "Sequential LoRA",
        "Full fine-tuning",
        "Untouched model",
    ):
        assert label in page.cells
    last = json.loads((runs["keeplora++"] / "results.json").read_text())["metrics"]["last"]
    assert f"{last:.1f} ★" in page.cells


def test_text_from_people_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    path = make_run(
        tmp_path,
        "run",
        tasks=[evil, "b & c"],
        probes=['p"><img src=x onerror=alert(1)>'],
        warnings=[evil],
        state="failed",
        error=evil,
    )
    edit(path, "results.json", {"name": evil, "model": evil, "suite": "</style>" + evil, "method": "<b>m</b>"})
    edit(path, "environment.json", {evil: evil})
    (path / "config.yaml").write_text(f"x: '{evil}'\n</pre>")
    sets = json.loads((path / "data.json").read_text())["tasks"]
    sets[0].update(classes=[evil], licence=evil, warnings=[evil])
    edit(path, "data.json", {"tasks": sets})
    page = rendered(path)
    assert not {"script", "img"} & page.tags
    assert evil in page.text
    assert "b & c" in page.text
    assert page.text.count(evil) > 8


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_partial_run(tmp_path: Path, state: str) -> None:
    path = make_run(tmp_path, "run", done=2, state=state, error="Stopped by a signal." if state != "running" else None)
    make_run(tmp_path, "done", "lora")
    page = rendered(path)
    assert "2 of 5 tasks" in page.text
    assert "the summary metrics follow when all are" in page.text
    assert ("Stopped by a signal." in page.text) == (state != "running")
    assert "not learned yet" in page.text
    assert "KeepLoRA++ (2 of 5 tasks) · this run" in page.cells


def test_before_the_first_task(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", done=0, state="running")
    page = rendered(path)
    assert "0 of 5 tasks" in page.text
    assert "before" in page.cells


def test_nothing_evaluated_yet(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", state="running")
    (path / "results.json").unlink()
    page = rendered(path)
    assert "Nothing has been evaluated yet." in page.text
    assert "matrix" not in page.ids
    assert "data" in page.ids


@pytest.mark.parametrize("file", ["data.json", "status.json", "environment.json", "config.yaml", "metrics.jsonl"])
def test_any_other_file_may_be_missing(tmp_path: Path, file: str) -> None:
    path = make_run(tmp_path, "run")
    (path / file).unlink()
    assert "matrix" in rendered(path).ids


def test_results_alone_and_almost_empty(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "results.json").write_text('{"format": "keeplora-results", "version": 0}')
    assert "Nothing has been evaluated yet." in rendered(path).text
    matrix = {"tasks": ["a"], "accuracy": [[1.0], [None]]}
    (path / "results.json").write_text(json.dumps({"format": "keeplora-results", "version": 0, **matrix}))
    assert "unknown method" in rendered(path).text


def test_null_cells_and_layers_without_depth_or_size(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run")
    results = json.loads((path / "results.json").read_text())
    results["accuracy"][2][3] = None
    results["probe_accuracy"][1] = [None, None]
    results["metrics"] = dict.fromkeys(results["metrics"])
    results["layers"] += [
        {
            "layer": "projector",
            "tower": "vision",
            "depth": None,
            "in": 384,
            "out": 512,
            "used": [4, None, 9],
            "rank": [16, None],
        },
        {"layer": "bare"},
    ]
    results["cost"] = {}
    results["audit"] = {"factor_leak_max": None, "rows": [{"layer": "bare", "task": "emoji", "factor_leak": None}]}
    (path / "results.json").write_text(json.dumps(results))
    page = rendered(path)
    assert {"projector", "bare", "–"} <= set(page.cells)


def test_one_task_without_probes(tmp_path: Path) -> None:
    page = rendered(make_run(tmp_path, "run", tasks=["only"], probes=[]))
    assert "on 1 task " in page.text
    assert "learned one task" in page.text
    assert "probes" not in page.cells


def test_zero_shot_has_no_layers_and_forgets_nothing(tmp_path: Path) -> None:
    page = rendered(make_run(tmp_path, "run", "zero-shot"))
    assert "layers" not in page.ids
    assert "The untouched model names" in page.text
    assert "just learned" not in page.text


def test_many_tasks_and_many_runs(tmp_path: Path) -> None:
    tasks = [f"task {i} with a rather long name" for i in range(11)]
    path = make_run(tmp_path, "run", tasks=tasks)
    for k in range(9):
        make_run(tmp_path, f"other-{k}", f"method-{k}", tasks=tasks)
    page = rendered(path)
    assert all(f"method-{k}" in page.cells for k in range(9))
    assert "3 further runs" in page.text


def test_undone_task_and_data_warnings_are_told(tmp_path: Path) -> None:
    path = make_run(tmp_path, "run", warnings=["careful"])
    results = json.loads((path / "results.json").read_text())
    results["tasks_info"][1]["accepted"] = False
    (path / "results.json").write_text(json.dumps(results))
    sets = json.loads((path / "data.json").read_text())["tasks"]
    sets[2]["warnings"] = ["3 pictures were skipped"]
    edit(path, "data.json", {"tasks": sets})
    page = rendered(path)
    assert "Warnings (3)" in page.text
    assert "digits: 3 pictures were skipped" in page.text
    assert "Task road signs was undone" in page.text


def test_against_must_be_comparable(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", "run")
    same, other = make_run(tmp_path / "b", "lora", "lora"), make_run(tmp_path / "b", "else", "lora", key="beef")
    assert "Sequential LoRA" in rendered(path, against=[same]).cells
    before = (path / "report.html").read_bytes()
    with pytest.raises(KeepLoraError, match="cannot be compared"):
        render_report(path, against=[other])
    assert (path / "report.html").read_bytes() == before


def test_rendering_is_repeatable_and_leaves_nothing_behind(runs: dict[str, Path]) -> None:
    path = runs["keeplora++"]
    before = {file.name for file in path.iterdir()}
    first = render_report(path).read_bytes()
    assert render_report(path).read_bytes() == first
    assert {file.name for file in path.iterdir()} == before | {"report.html"}
