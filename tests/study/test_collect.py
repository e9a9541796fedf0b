"""Reading runs: what may stand in one table, what is refused with which sentence, what is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keeplora.errors import KeepLoraError
from keeplora.report.runs import load_run
from keeplora.report.study_data import StudyCell
from keeplora.study.collect import comparable, differences, read_runs, study_of
from keeplora.study.run import read_study
from tests.study.fake_study import ORDERS, TASKS, change, fake_cell, fake_study


def test_orders_of_the_same_tasks_are_pooled(tmp_path: Path) -> None:
    found = read_runs(fake_study(tmp_path))
    assert found.notes == []
    assert {(c.method, c.order, c.seed) for c in found.cells} == {
        (m, o, s) for m in ("lora", "keeplora++") for o in ("1", "2") for s in range(3)
    }
    study = study_of(found.cells, name="x", against=None)
    assert [m.name for m in study.methods] == ["lora", "keeplora++"]  # the registry's order
    assert {o.label: list(o.tasks) for o in study.orders} == ORDERS
    last = [c.metrics["last"] for c in found.cells if c.method == "lora"]
    assert study.estimates["lora", None, "last"]["mean"] == pytest.approx(sum(last) / 6)  # type: ignore[arg-type]


def test_a_folder_of_runs_and_single_runs_are_the_same(tmp_path: Path) -> None:
    paths = fake_study(tmp_path / "runs")
    (tmp_path / "runs" / "notes.txt").write_text("x")
    one, two = read_runs([tmp_path / "runs"]).cells, read_runs(paths).cells
    assert {c.path for c in one} == {c.path for c in two}
    assert len(one) == 12


def test_runs_of_other_data_are_refused_and_the_difference_named(tmp_path: Path) -> None:
    paths = fake_study(tmp_path, seeds=[0], orders=["1"])
    odd = fake_cell(tmp_path, "lora", seed=7)
    sets = json.loads((odd / "data.json").read_text())["tasks"]
    sets[2]["fingerprint"] = "other"
    change(odd, "data.json", {"tasks": sets})
    with pytest.raises(KeepLoraError) as caught:
        read_runs([*paths, odd])
    assert str(caught.value) == (
        f"these runs cannot stand in one table: {odd} differ from {paths[0]} in the pictures or classes of {TASKS[2]}. Name the "
        "runs of one group at a time."
    )


@pytest.mark.parametrize(
    ("results", "told"),
    [
        ({"model": "clip"}, "the model (clip against embedded)"),
        ({"candidates": "all"}, "the test candidates (all against own)"),
        ({"evaluate_on": "validation"}, "evaluate_on (validation against test)"),
        ({"probes": ["flags"], "probe_accuracy": [[9.0]] * 6}, "the probe sets (flags against flags, pictograms)"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, results: dict, told: str) -> None:
    one, two = fake_cell(tmp_path, "lora"), fake_cell(tmp_path, "keeplora")
    assert differences(load_run(one), load_run(two)) == ""
    change(one, "results.json", results)
    assert differences(load_run(one), load_run(two)) == told
    with pytest.raises(KeepLoraError, match="cannot stand in one table"):
        read_runs([one, two])


def test_key_that_differs_within_an_order_is_refused(tmp_path: Path) -> None:
    one, two = fake_cell(tmp_path, "lora"), fake_cell(tmp_path, "keeplora", key="a later version's")
    with pytest.raises(KeepLoraError, match=r"differ from .* in their comparison keys"):
        read_runs([one, two])


def test_a_studys_odd_cells_are_left_out_and_named(tmp_path: Path) -> None:
    paths = [*fake_study(tmp_path, seeds=[0, 1], orders=["1"]), fake_cell(tmp_path, "lora", seed=2, key="odd")]
    cells = []
    for path in paths:
        run = load_run(path)
        cells.append(StudyCell(run.method, "1", run.seed, "finished", path, run))
    found = comparable(cells, strict=False)
    assert len(found.cells) == 4
    assert found.notes == [
        "lora, order 1, seed 2: left out of every table, made on something else than the rest: their comparison keys."
    ]
    study = study_of(cells, name="x", against=None)
    assert study.counts["lora", None] == 2
    assert study.notes[0] == found.notes[0]


def test_same_order_name_for_another_order_is_no_pair(tmp_path: Path) -> None:
    one = fake_cell(tmp_path, "lora", order="1")
    two = fake_cell(tmp_path, "keeplora", order="1", tasks=TASKS[::-1])
    labels = {c.method: c.order for c in read_runs([one, two]).cells}
    assert labels == {"lora": "1", "keeplora": "1 A"}


def test_orders_without_names_get_letters(tmp_path: Path) -> None:
    paths = [
        fake_cell(tmp_path, "lora", order=None),
        fake_cell(tmp_path, "lora", order=None, tasks=TASKS[::-1], name="b"),
    ]
    assert sorted(c.order for c in read_runs(paths).cells) == ["A", "B"]
    assert [c.order for c in read_runs(paths[:1]).cells] == ["listed"]


def test_two_runs_of_one_cell_are_refused(tmp_path: Path) -> None:
    one, two = fake_cell(tmp_path, "lora"), fake_cell(tmp_path, "lora", name="again")
    with pytest.raises(KeepLoraError, match=r"are both lora, order 1, seed 0; a table takes one"):
        read_runs([one, two])


def test_what_is_no_run_is_passed_over_or_refused(tmp_path: Path) -> None:
    one = fake_cell(tmp_path, "lora")
    empty, young = tmp_path / "empty", fake_cell(tmp_path, "keeplora")
    empty.mkdir()
    (young / "results.json").unlink()
    found = read_runs([one, empty, young])
    assert [c.method for c in found.cells] == ["lora"]
    assert found.notes == [
        f"{empty} was passed over: it is no run directory.", f"{young} was passed over: it has no results yet."
    ]  # fmt: skip
    with pytest.raises(KeepLoraError, match="empty is no run directory"):
        read_runs([empty])
    with pytest.raises(KeepLoraError, match=r"no such file or folder: .*nothing \(methods are given as --methods"):
        read_runs([tmp_path / "nothing"])


def test_partial_run_is_missing_from_the_tables_and_told(tmp_path: Path) -> None:
    paths = [
        *fake_study(tmp_path, seeds=[0, 1], orders=["1"]),
        fake_cell(tmp_path, "lora", seed=2, done=2, state="interrupted"),
    ]
    outcome = read_study(paths, output=tmp_path / "out", name=None, against=None)
    assert outcome.study.counts["lora", None] == 2
    (missing,) = outcome.study.missing
    assert missing.progress == "interrupted, 2 of 5 tasks"
    assert "2 interrupted, 2 of 5 tasks" in (tmp_path / "out" / "report.html").read_text()


def test_reading_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    paths = fake_study(tmp_path / "runs", seeds=[0], orders=["1"])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(KeepLoraError, match="is not empty and holds no comparison"):
        read_study(paths, output=tmp_path / "thesis", name=None, against=None)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    for _ in range(2):  # the second call replaces the first one's files
        read_study(paths, output=tmp_path / "out", name=None, against=None)


def test_settings_of_different_runs_of_a_method_are_told(tmp_path: Path) -> None:
    paths = [fake_cell(tmp_path, "lora", seed=s, settings=f"tuner: {{r: {4 + s}, gamma: 0.2}}\n") for s in range(2)]
    study = read_study(paths, output=tmp_path / "out", name=None, against=None).study
    assert study.notes == (
        "lora: its runs differ in tuner.r (4 in 1, 5 in 1), so their mean is one over different settings.",
    )


def test_what_defines_a_method_wins_in_the_settings(tmp_path: Path) -> None:
    paths = [fake_cell(tmp_path, m, settings="tuner: {gamma: 0.2}\n") for m in ("keeplora", "keeplora++")]
    study = read_study(paths, output=tmp_path / "out", name=None, against=None).study
    assert dict(study.settings)["tuner.gamma"] == {"keeplora": "1.0", "keeplora++": "0.2"}


def test_runs_that_were_not_made_alike_are_named(tmp_path: Path) -> None:
    """Two states of the code ended a point apart once, and nothing said that a table held both."""
    paths = fake_study(tmp_path, seeds=[0, 1], orders=["1"])

    def notes(**told: Any) -> list[str]:
        change(paths[0], "environment.json", told)
        return list(study_of(read_runs(paths).cells, name="x", against=None).notes)

    for path in paths:
        made = {"code": "a" * 64, "versions": {"torch": "2.13"}, "cpu": {"model": "EPYC"}, "torch": {"gpus": []}}
        (path / "environment.json").write_text(json.dumps(made))
    assert notes() == []
    (told,) = notes(code="b" * 64, versions={"torch": "2.11"})
    assert "other code of keeplora in 1 of 2 pairs of order and seed, other packages in 1 of 2" in told
    assert notes(code=None, versions={"torch": "2.13"}) == []  # of before runs noted it


def test_one_sequence_under_two_names_is_not_two_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two studies of one experiment may call the same order differently; pooled, every run would count twice."""
    from keeplora.study import collect

    run = load_run(fake_cell(tmp_path, "lora", seed=0))
    names = {tmp_path / "a": "back", tmp_path / "b": "reverse"}
    monkeypatch.setattr(collect, "is_study", lambda path: path in names)
    monkeypatch.setattr(collect, "StudyStore", lambda path: type("Store", (), {"load": lambda self: path})())
    monkeypatch.setattr(
        collect, "study_cells", lambda path: [StudyCell("lora", names[path], 0, "finished", run.path, run)]
    )
    with pytest.raises(
        KeepLoraError, match=r"the same sequence of tasks under two names of orders \(back and reverse\)"
    ):
        read_runs(list(names))
