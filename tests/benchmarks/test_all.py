"""benchmarks/all.py in miniature: a full table, gone on with where it was interrupted, with what failed named."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as Python does for a script
    monkeypatch.setenv("KEEPLORA_NO_CACHE", "1")
    threads = torch.get_num_threads()
    yield importlib.import_module("all")
    torch.set_num_threads(threads)


def found(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path: Path) -> list[list[str]]:
    """Of the Markdown table, without its head."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][2:]


def counted(script: ModuleType, monkeypatch: pytest.MonkeyPatch, section: str) -> list[str]:
    """The models for which a section runs from now on."""
    ran: list[str] = []
    inner = script.SECTIONS[section]

    def run(bench: Any, model: str) -> Any:
        ran.append(model)
        return inner.run(bench, model)

    monkeypatch.setitem(script.SECTIONS, section, replace(inner, run=run))
    return ran


def test_the_table_has_every_pair_and_is_kept_as_json_and_markdown(script, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--only", "boundary", "step", "inference", "sketch", "--models", "llama"]
    assert script.main([*arguments, "--output", str(path)]) == 0
    printed, kept = capsys.readouterr().out.strip(), found(path)
    assert (tmp_path / "bench.md").read_text(encoding="utf-8").strip() == printed
    assert "torch" in printed.splitlines()[0]
    told = {(row["section"], row["what"]): row for row in kept["rows"]}
    assert len(told) == len(kept["rows"]) == 16
    assert {section for section, _ in told} == {"boundary", "step", "inference", "sketch"}
    for row in kept["rows"]:
        assert not row["failed"]
        assert row["trouble"] == "" or "peak memory" in row["what"], row
        for ratio in row["ratios"][: row["ours"] is not None]:
            assert ratio == pytest.approx(row["ours"] / row["other"])
    assert (
        max(told["boundary", f"largest sine, {kind}"]["ratios"][0] for kind in ("U₀", "A", "what the features add"))
        < 1e-3
    )
    assert "for the gradient" in told["boundary", "whole, with the stop"]["note"]
    gradient = told["sketch", "memory of the gradient, r 16"]
    assert (gradient["ours"], gradient["other"]) == (64 * 256 * 8 + 64 * 256 * 4, 256 * 256 * 8)
    kept_bytes = told["step", "kept for the backward pass, to stock LoRA"]
    assert kept_bytes["ours"] < kept_bytes["other"]
    verdicts = {(section, what): verdict for section, _, what, _, _, _, verdict, _ in cells(tmp_path / "bench.md")}
    assert verdicts["sketch", "memory of the gradient, r 16"] == "missed"  # 0.375 is above a tenth
    assert verdicts["sketch", "time of the pass, r 16"] == "–"


def test_a_section_that_raises_is_a_row_and_is_measured_again(script, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--only", "inference", "sketch", "--models", "llama", "--output", str(path)]
    whole = script.SECTIONS["inference"]

    def broken(bench: Any, model: str) -> Any:
        raise RuntimeError("the | disk\nis full")

    with monkeypatch.context() as patch:
        patch.setitem(script.SECTIONS, "inference", replace(whole, run=broken))
        assert script.main(arguments) == 1
    first = cells(tmp_path / "bench.md")[0]
    assert (first[0], first[1], first[6]) == ("inference", "llama", "failed")
    assert "RuntimeError: the \\| disk" in (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert [row["section"] for row in found(path)["rows"]] == ["inference", "sketch", "sketch"]
    again, kept = counted(script, monkeypatch, "inference"), counted(script, monkeypatch, "sketch")
    assert script.main([*arguments, "--resume"]) == 0
    assert (again, kept) == (["llama"], [])
    assert sorted(row["section"] for row in found(path)["rows"]) == ["inference", "inference", "sketch", "sketch"]
    assert script.main([*arguments, "--resume"]) == 0
    assert (again, kept) == (["llama"], [])
    capsys.readouterr()


def test_what_an_interrupted_run_has_measured_is_kept(script, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--only", "inference", "sketch", "--models", "llama", "--output", str(path)]

    def interrupted(bench: Any, model: str) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(script.SECTIONS, "sketch", replace(script.SECTIONS["sketch"], run=interrupted))
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments)
    assert found(path)["done"] == [["inference", "llama"]]
    again = counted(script, monkeypatch, "inference")
    assert script.main([*arguments, "--resume"]) == 0
    assert again == []
    assert len(found(path)["rows"]) == 4
    capsys.readouterr()


def test_a_table_is_not_mixed_with_one_of_other_settings(script, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--only", "sketch", "--output", str(path)]
    assert script.main(arguments) == 0
    before = path.read_bytes()
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "--resume" in capsys.readouterr().err
    assert script.main([*arguments, "--resume", "--batch", "7"]) == 2
    assert "batch None and not 7" in capsys.readouterr().err
    path.write_text("[]", encoding="utf-8")
    assert script.main([*arguments, "--resume"]) == 2
    assert "holds no table" in capsys.readouterr().err
    path.write_bytes(before)
    for wrong in (["--device", "cuda"], ["--rounds", "0"], ["--only", "nothing"], ["--resume"]):
        with pytest.raises(SystemExit):
            script.main(wrong)
    assert path.read_bytes() == before


def test_the_demo_model_is_left_out_where_its_files_are_not(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("sections"), "embedded_path", lambda: tmp_path / "nothing")
    path = tmp_path / "bench.json"
    assert script.main(["--quick", "--only", "step", "state", "--models", "demo", "--output", str(path)]) == 0
    assert {row[6] for row in cells(tmp_path / "bench.md")} == {"left out"}
    assert "keeplora assets fetch" in capsys.readouterr().out


def test_the_other_sections(script, tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--only", "data", "state", "fifty", "--models", "clip", "--output", str(path)]
    assert script.main(arguments) == 0
    data, whole, second, fifty = found(path)["rows"]
    assert data["ratios"][0] < 1
    assert 0 < second["ours"] < whole["ours"] < whole["other"] == second["other"]
    assert len(fifty["ratios"]) == 5
    assert "protected dimensions" in fifty["note"]
    capsys.readouterr()


def test_a_budget_leaves_one_repeat_at_least(script, monkeypatch):
    table = importlib.import_module("table")
    clock = [0.0]
    monkeypatch.setattr(table.time, "perf_counter", lambda: clock[0])

    def repeats(budget: Any, each: float, most: int) -> int:
        n = 0
        for _ in budget.repeats(most):
            clock[0] += each
            n += 1
        return n

    assert repeats(table.Budget(None), 100.0, 5) == 5
    budget = table.Budget(100.0)
    budget.begin(1.0, 2.0)
    assert budget.left == 50.0
    assert repeats(budget, 15.0, 9) == 3  # a fourth would end at 60
    budget.begin(1.0, 1.0)
    assert budget.left == 55.0  # what the first did not use
    assert repeats(budget, 500.0, 9) == 1
    budget.begin(1.0, 1.0)
    assert repeats(budget, 500.0, 9) == 1
    assert budget.left == 0.0


def test_rows_say_met_by_the_median_and_small_things_in_small_units(script):
    table = importlib.import_module("table")
    row = table.pair("step", "clip", "time", [1.0, 0.9, 3.0], [1.0, 1.0, 1.0], aim=1.0, told="≤ 1.00")
    assert row.verdict == "met"
    assert "1.000 (0.900–3.000)" in table.line(row)
    assert replace(row, aim=0.99).verdict == "missed"
    assert "3.000 / 12.0 KiB" in table.line(table.pair("a", "b", "c", [3072], [12288], unit="GiB"))
    nothing = table.pair("a", "b", "c", [1.0], [0.0])
    assert (nothing.verdict, nothing.failed) == ("left out", False)
    assert table.failure("a", "b", ValueError()).trouble == "ValueError"


def test_a_boundary_that_has_no_time_for_a_second_run_tells_of_its_trial(script, monkeypatch, capsys):
    sections, table = importlib.import_module("sections"), importlib.import_module("table")
    boundary = sections.boundary
    asked: list[Any] = []

    def small(scale: Any) -> Any:
        asked.append(scale)
        return sections.works.llama(replace(scale, small=True, samples=min(scale.samples, 16), batch=16))

    ran: list[int] = []
    plain = boundary.straightforward
    monkeypatch.setitem(sections.works.MODELS, "llama", small)
    monkeypatch.setattr(boundary, "straightforward", lambda *given: ran.append(1) or plain(*given))
    budget = table.Budget(0.0)
    budget.begin(1.0, 1.0)
    rows = sections.run_boundary(sections.Bench(torch.device("cpu"), "fp32", budget), "llama")
    assert len(ran) == 2  # the trial, and the row of the stop
    assert {scale.layers for scale in asked} == {1}
    # A model this small may leave no trace in the process's peak: nothing over something is no ratio.
    assert [len(row.ratios) for row in rows if row.what != "peak memory"] == [1] * 7
    assert not any(row.failed for row in rows)
    ran.clear()
    budget = table.Budget(1e5)
    budget.begin(1.0, 1.0)
    assert sections.trial(sections.Bench(torch.device("cpu"), "fp32", budget), "llama", sections.works.Scale()) == (
        12,
        None,
    )
    capsys.readouterr()
