"""The index over many runs: complete, escaped, a plain table without a script, sorted and filtered in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_answers import make_answers
from fake_runs import make_run
from test_browser import BROWSER, browse
from test_html import VOID, Page

from keeplora.errors import KeepLoraError
from keeplora.evaluation import metrics
from keeplora.files import atomic_write_json
from keeplora.report import render_index, render_report
from keeplora.report.index import Row
from keeplora.report.index_html import _link

EVIL = '<script>alert("x")</script>'


class Rows(Page):
    """The body's rows as texts of their cells, the head's first."""

    def __init__(self, source: str) -> None:
        self.rows: list[list[str]] = []
        super().__init__(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            return
        super().handle_data(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> dict[str, str]:
        (found,) = [row for row in self.rows[1:] if row[0].startswith(name)]
        return dict(zip(self.rows[0], (re.sub(r"\s+", " ", cell).strip() for cell in found), strict=True))


def rendered(folder: Path) -> Rows:
    out = render_index(folder)
    assert out == folder / "index.html"
    return Rows(out.read_text(encoding="utf-8"))


def change(path: Path, **values: Any) -> None:
    atomic_write_json(path, {**json.loads(path.read_text()), **values})


def make_study(root: Path, cells: list[dict[str, Any]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    plan = {"name": "a study", "kind": "suite", "base": "demo-small", "methods": ["lora", "keeplora++"]}
    atomic_write_json(root / "study.json", {"plan": plan, "started": "2026-06-21T08:00:00Z", "cells": cells})
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    render_report(make_run(root, "kpp", seed=3))
    make_run(root, "lora", "lora")
    make_run(root, "stopped", done=2, state="interrupted")
    make_run(root, "killed", done=1, state="running")
    make_run(root, "broken", done=1, state="failed", error=f"the disk is full {EVIL}")
    (make_run(root, "torn") / "results.json").write_text('{"format": "keeplora-res')
    young = root / "young"
    (young / "ledger").mkdir(parents=True)
    (young / "config.yaml").write_text("name: young\nmethod: lora\nmodel: {name: embedded}\nsuite: demo\nseed: 7\n")
    cells = [{"state": "finished", "seconds": 60.0}, {"state": "failed", "seconds": 2.5}, {"state": "pending"}]
    study = make_study(root / "deep/er/study", cells)
    make_run(study / "cells/lora/order-1", "seed-0", "lora", seed=1)
    # What is no run: somebody's own configuration, hidden folders, and whatever lies inside a run.
    (root / "notes").mkdir()
    (root / "notes/config.yaml").write_text("a: 1\n")
    make_run(root / ".trash", "old")
    make_run(root / "kpp/ledger", "inner")
    return root


def test_every_run_and_study_has_a_row_with_its_numbers(folder: Path) -> None:
    page = rendered(folder)
    assert len(page.rows) - 1 == 9
    kpp, results = page.row("kpp"), json.loads((folder / "kpp/results.json").read_text())
    assert (kpp["suite"], kpp["method"], kpp["model"], kpp["seed"]) == ("demo", "KeepLoRA++", "embedded", "3")
    for head, key in (
        ("Transfer ↑", "transfer"),
        ("Avg ↑", "average"),
        ("Last ↑", "last"),
        ("Probe ↑", "probe"),
        ("Forgetting ↓", "forgetting"),
    ):
        assert float(kpp[head].replace("−", "-")) == pytest.approx(results["metrics"][key], abs=0.051), head
    assert (kpp["time"], kpp["started"]) == ("3 min 52 s", "2026-06-20 10:00 UTC")
    assert kpp["size"].endswith("KiB")
    assert kpp["state"] == "finished"
    assert "MFN ↑" not in page.rows[0]  # no run answers questions, so its columns would be empty


def test_what_is_not_finished_or_not_whole_says_so(folder: Path) -> None:
    page = rendered(folder)
    states = {name: page.row(name)["state"] for name in ("stopped", "killed", "broken", "torn", "young", "a study")}
    assert states["stopped"] == "interrupted2 of 5 tasks"
    assert states["killed"] == "running, or killed1 of 5 tasks"
    assert states["broken"] == f"failed1 of 5 tasksthe disk is full {EVIL}"
    assert states["torn"].startswith("damaged")
    assert "results.json is damaged: it is not readable JSON" in states["torn"]
    assert states["young"] == "unknown"
    assert states["a study"] == "failed1 of 3 cells1 of its cells failed"
    young, study = page.row("young"), page.row("a study")
    assert (young["method"], young["model"], young["suite"], young["seed"], young["Last ↑"]) == (
        "lora",
        "embedded",
        "demo",
        "7",
        "–",
    )
    assert (study["kind"], study["suite"], study["method"], study["time"]) == (
        "study",
        "demo-small",
        "2 methods",
        "1 min 02 s",
    )
    assert "1 damaged" in page.text
    assert "2 failed" in page.text


def test_reports_are_linked_where_there_are_any(folder: Path, tmp_path: Path) -> None:
    odd = make_run(folder / "a: b", "50% #1?", name_in_file := "odd")
    change(odd / "results.json", name=name_in_file)
    render_report(odd)
    page = rendered(folder)
    links = [target for target in page.targets if target.endswith(".html")]
    assert sorted(links) == ["a%3A%20b/50%25%20%231%3F/report.html", "kpp/report.html"]
    assert "no report" in page.row("lora")["name"]


def test_a_name_that_is_no_utf8_is_shown_all_the_same(tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs", "plain")
    os.rename(os.fsencode(path), os.fsencode(path.parent) + b"/caf\xe9")
    (Path(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9")) / "report.html").write_text("x")
    page = rendered(tmp_path / "runs")
    assert "caf%E9/report.html" in page.targets


def test_runs_that_answer_questions_bring_their_columns(tmp_path: Path) -> None:
    path = make_run(tmp_path / "runs", "vqa")
    results = json.loads((path / "results.json").read_text())
    scores = {name: getattr(metrics, name)(results["accuracy"]) for name in ("mft", "mfn", "maa", "bwt")}
    change(path / "results.json", kind="generation", metrics=scores)
    make_run(tmp_path / "runs", "pictures")
    page = rendered(tmp_path / "runs")
    assert {"Last ↑", "MFT ↑", "MFN ↑", "MAA ↑", "Probe ↑", "BWT ↑"} <= set(page.rows[0])
    assert page.row("vqa")["Last ↑"] == "–" != page.row("vqa")["MFN ↑"]


def test_the_page_is_one_file_and_its_policy_lets_its_own_script_alone_run(folder: Path) -> None:
    source = render_index(folder).read_text(encoding="utf-8")
    page = Rows(source)
    assert EVIL not in source
    assert "http" not in re.sub(r"http-equiv", "", source)
    assert page.tags & {"link", "img", "iframe", "object"} <= {"link"}
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    stated = re.search(r"script-src '(sha256-[^']+)'", html.unescape(source))
    assert stated is not None
    assert stated[1] == "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert VOID  # the page is parsed strictly: tags balanced, ids unique


def test_a_folder_without_runs_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(KeepLoraError, match="holds no run and no study"):
        render_index(tmp_path)
    with pytest.raises(KeepLoraError, match="is no folder"):
        render_index(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_listed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "mine", "one")
    (tmp_path / "theirs").mkdir()
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "theirs":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    page = rendered(tmp_path)
    assert page.row("one")["state"] == "finished"
    assert page.row("theirs")["state"].endswith("theirs cannot be listed: Permission denied")


def test_an_analysis_is_no_damaged_run(folder: Path) -> None:
    before = rendered(folder).rows
    atomic_write_json(folder / "analysis-x" / "analysis.json", {"format": "keeplora-analysis"})
    atomic_write_json(folder / "analysis-x" / "results.json", {"format": "keeplora-analysis-results"})
    assert rendered(folder).rows == before


def test_a_report_that_may_not_be_looked_at_is_none(tmp_path: Path) -> None:
    class Closed(type(tmp_path)):  # type: ignore[misc]
        def is_file(self, **_: Any) -> bool:
            raise PermissionError(13, "Permission denied", str(self))

    assert _link(Row(Closed(tmp_path), "folder", "one", "unknown"), tmp_path) is None


def test_a_study_whose_file_is_damaged_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/study.json").write_text("{}")
    assert "is no study's plan" in rendered(tmp_path).row("s")["state"]
    (tmp_path / "s/study.json").write_text("[]")
    assert "holds a list where an object is expected" in rendered(tmp_path).row("s")["state"]


# What a person would do, then what they would see: the names in the order in which they stand, hidden ones left out.
DO = """<script>
const seen = () => [...document.querySelectorAll('table.index tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].dataset.v);
const button = name => [...document.querySelectorAll('table.index thead button')].find(b => b.textContent.trim() === name);
const press = name => { button(name).click(); return seen(); };
const field = document.getElementById('filter');
const type = text => { field.value = text; field.dispatchEvent(new Event('input')); return seen(); };
const found = {before: seen(), name: press('name'), back: press('name'), last: press('Last ↑'), lastup: press('Last ↑'),
  size: press('size'), sorted: document.querySelectorAll('[aria-sort]').length, filtered: type('LORA finished'),
  shown: document.getElementById('shown').textContent, none: type('zzz'), all: type(''),
  tools: getComputedStyle(document.getElementById('tools')).display};
document.title = JSON.stringify(found);
</script>"""


def in_browser(page: str, tmp_path: Path, *more: str) -> str:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        *more, "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_columns_sort_and_the_filter_narrows(folder: Path, tmp_path: Path) -> None:
    source = render_index(folder).read_text(encoding="utf-8")
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    dom = in_browser(re.sub(policy, "", source).replace("</body>", DO + "</body>"), tmp_path)
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    names = sorted(found["before"], key=str.lower)
    assert found["name"] == names
    assert found["back"] == names[::-1]
    last = {path.parent.name: json.loads(path.read_text())["metrics"]["last"] for path in folder.rglob("results.json")
            if path.parent.name not in ("torn", "inner", "old")}  # fmt: skip
    value = [last[name] for name in found["last"] if last.get(name) is not None]
    assert len(value) == 3
    assert value == sorted(value, reverse=True)  # the first press shows the best
    up = [last[name] for name in found["lastup"] if last.get(name) is not None]
    assert up == sorted(value)
    without = [name for name in names if last.get(name) is None]
    assert without
    assert sorted(found["last"][-len(without) :]) == sorted(found["lastup"][-len(without) :]) == sorted(without)
    assert found["size"] == sorted(found["size"], key=lambda name: sizes(folder)[name])
    assert found["sorted"] == 1
    assert sorted(found["filtered"]) == ["kpp", "lora", "seed-0"]
    assert found["shown"] == "3 of 9 rows"
    assert found["none"] == []
    assert len(found["all"]) == 9
    assert found["tools"] == "flex"


def sizes(folder: Path) -> dict[str, int]:
    from keeplora.report.index import collect

    return {row.name: row.size or 0 for row in collect(folder)}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_the_real_page_runs_its_script_under_its_policy(folder: Path, tmp_path: Path) -> None:
    dom = in_browser(render_index(folder).read_text(encoding="utf-8"), tmp_path)
    assert re.search(r'<button type="button">Last ↑</button>', dom)
    assert "9 rows" in dom


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_without_its_script_it_is_a_plain_table(folder: Path, tmp_path: Path) -> None:
    source = render_index(folder).read_text(encoding="utf-8")
    found, console = browse(re.sub(r"<script>.*?</script>", "", source, flags=re.S), tmp_path, width=390)
    assert console == ""
    assert found["scroll"] <= 390, found["wide"]
    assert 'id="tools" hidden' in source


@pytest.fixture
def suites(tmp_path: Path) -> Path:
    """Runs of pictures and of questions, with long names, paths and models."""
    root = tmp_path / "many"
    make_run(root, "demo-small-keeplora++-seed0")
    long = make_run(root, "mtil-order-II-keeplora++-cls-seed42", "keeplora++-cls", variant="cls")
    change(long / "results.json", suite="mtil", model="openai/clip-vit-base-patch16", order="2")
    own = make_run(root, "photos of a long name and more", "lora")
    change(own / "results.json", suite="/home/somebody/photos/experiment-of-june.yaml", order="shuffle-1234")
    make_run(root, "broken", done=1, state="failed", error="the disk is full " * 9)
    models = {"ucit": "llava-hf/llava-1.5-7b-hf", "cl-vista": "LanguageBind/Video-LLaVA-7B-hf"}
    for name, suite, model in (("ucit-seed1", "ucit", models["ucit"]), ("videos", "cl-vista", models["cl-vista"])):
        change(make_answers(root, name) / "results.json", suite=suite, model=model)
    return root


WIDE = """<script>
const box = document.querySelector('.scroll');
window.parent.document.title = JSON.stringify({scroll: document.documentElement.scrollWidth, inner: innerWidth,
  table: box.scrollWidth, room: box.clientWidth});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1000, 1400])
def test_the_page_never_scrolls_sideways(suites: Path, tmp_path: Path, width: int) -> None:
    """Of many kinds of runs the table may scroll in its own box; the page does not."""
    page = render_index(suites).read_text(encoding="utf-8").replace("</body>", WIDE + "</body>")
    found, console = browse(page, tmp_path, width=width, measure="")
    assert console == ""
    assert found["inner"] == width
    assert found["scroll"] <= width


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_runs_of_one_kind_fit_a_wide_window(suites: Path, tmp_path: Path) -> None:
    """Their numbers are what the page is for: at 1,400 pixels none is out of sight."""
    for name in ("ucit-seed1", "videos"):
        shutil.rmtree(suites / name)
    page = render_index(suites).read_text(encoding="utf-8").replace("</body>", WIDE + "</body>")
    found, _ = browse(page, tmp_path, width=1400, measure="")
    assert found["table"] <= found["room"] <= 1400


def test_columns_that_tell_nothing_are_left_out(suites: Path, tmp_path: Path) -> None:
    page = rendered(suites)
    assert "kind" not in page.rows[0]  # all are runs
    assert page.row("photos")["suite"] == "experiment-of-june"
    assert page.row("photos")["order"] == "shuffle-1234"
    make_run(tmp_path / "one", "run")
    assert "order" not in rendered(tmp_path / "one").rows[0]
