"""`keeplora compare`: a true study, killed and gone on with; a cell that fails; reading; and every wrong word's sentence."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from keeplora.experiment.run_directory import RunDirectory
from keeplora.study import run as study_run
from keeplora.study.execute import StudyInterrupted
from tests.cli.tiny_world import results_of
from tests.study.fake_study import fake_cell, fake_study

METHODS, ORDERS, SEEDS = ("lora", "keeplora++"), ("shuffle-1", "shuffle-0"), (0, 1)


def states(study: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    cells = json.loads((study / "study.json").read_text())["cells"]
    return {(c["method"], c["order"], c["seed"]): c for c in cells}


def table(study: Path, name: str = "table.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((study / name).read_text())))


@pytest.mark.slow
def test_study_is_killed_gone_on_with_read_and_extended(world, process, cli, tmp_path):
    """2 methods × 2 seeds × 2 orders of a tiny CLIP; one test, for each step needs the one before."""
    study = tmp_path / "study"
    file = world.yaml(tmp_path / "e.yaml", training={"epochs": 1})
    words = [
        "-m", "keeplora", "compare", "--experiment", file, "--methods", "lora,keeplora++", "--seeds", "0-1",
        "--orders", "shuffle-1,shuffle-0", "--jobs", "2", "--threads", "1", "--output", study, "-o", "tuner.r=2",
    ]  # fmt: skip
    first = process(*words)
    until = time.monotonic() + 900  # a machine that others use
    while not (study / "study.json").is_file() or [c["state"] for c in states(study).values()].count("finished") < 2:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
    first.kill()
    first.communicate()
    before = states(study)
    assert set(before) == {(m, o, s) for m in METHODS for o in ORDERS for s in SEEDS}
    done = [key for key, cell in before.items() if cell["state"] == "finished"]
    assert 2 <= len(done) < 8
    assert all(key[2] == 0 for key in done)  # seeds outermost
    stamps = {key: (study / before[key]["folder"] / "results.json").stat().st_mtime_ns for key in done}

    # The same words go on; what is finished is not touched.
    second = process(*words)
    out, err = second.communicate(timeout=900)
    assert second.returncode == 0, err
    after = states(study)
    assert [c["state"] for c in after.values()] == ["finished"] * 8
    assert {key: (study / after[key]["folder"] / "results.json").stat().st_mtime_ns for key in done} == stamps
    assert all(after[key]["attempts"] == 1 for key in done)
    assert out.splitlines()[-1] == f"Report: {study / 'report.html'}"
    assert "\x1b" not in out + err
    assert "[8/8]" in err

    # Each cell is the run that `keeplora run` makes: killed or not, alone or beside others.
    for key, cell in after.items():
        config = RunDirectory(study / cell["folder"]).read_config()
        assert (config["method"], config["order_name"], config["seed"], config["tuner"]["r"]) == (*key, 2)
        assert config["threads"] == 1
    alone = world.run(method="lora", seed=1, order="shuffle-0", threads=1, training={"epochs": 1}, tuner={"r": 2})[1]
    mine = results_of(study / after["lora", "shuffle-0", 1]["folder"])
    assert mine["accuracy"] == alone["accuracy"]
    assert mine["tasks"] == alone["tasks"]

    # The tables hold the runs' own numbers.
    rows = {(r["method"], r["order"], int(r["seed"])): r for r in table(study)}
    assert set(rows) == set(after)
    for key, row in rows.items():
        metrics = results_of(study / after[key]["folder"])["metrics"]
        assert float(row["last"]) == pytest.approx(metrics["last"])
        assert row["state"] == "finished"
    pooled = next(
        r for r in table(study, "summary.csv") if (r["method"], r["order"], r["metric"]) == ("lora", "all", "last")
    )
    seeds = [sum(float(rows["lora", o, s]["last"]) for o in ORDERS) / 2 for s in SEEDS]
    assert float(pooled["mean"]) == pytest.approx(sum(seeds) / 2)
    assert pooled["n_seeds"] == "2"

    # Read as runs that lie somewhere, the same tables.
    paths = [study / cell["folder"] for cell in after.values()]
    answer = cli("compare", *paths, "--output", tmp_path / "read", "--name", "e")
    assert answer.code == 0, answer.err
    assert (tmp_path / "read" / "summary.csv").read_text() == (study / "summary.csv").read_text()
    assert (tmp_path / "read" / "table.md").read_text() == (study / "table.md").read_text()

    # One method more, and a cell that must fail: the folder of one is somebody else's.
    thesis = study / "cells" / "zero-shot" / "order-shuffle-1" / "seed-0"
    thesis.mkdir(parents=True)
    (thesis / "chapter.tex").write_text("x")
    third = process(
        "-m", "keeplora", "compare", "--output", study, "--methods", "zero-shot", "--seeds", "0", "--jobs", "2", "--drop-ledgers"
    )  # fmt: skip
    out, err = third.communicate(timeout=900)
    assert third.returncode == 1
    assert "Error: 1 cell failed, the tables are of the others" in err
    last = states(study)
    assert last["zero-shot", "shuffle-1", 0]["state"] == "failed"
    assert "is not empty (chapter.tex)" in last["zero-shot", "shuffle-1", 0]["error"]
    assert last["zero-shot", "shuffle-0", 0]["state"] == "finished"
    assert last["zero-shot", "shuffle-0", 0]["dropped_bytes"] is not None
    assert last["lora", "shuffle-1", 0] == after["lora", "shuffle-1", 0]
    assert len(last) == 10
    assert "zero-shot, order shuffle-1, seed 0: failed: Error:" in " ".join(out.split())
    page = (study / "report.html").read_text()
    assert "is not empty (chapter.tex)" in page
    assert "9 of 10 cells" in page
    assert [p.name for p in thesis.iterdir()] == ["chapter.tex"]


def test_dry_run_prints_the_cells_and_writes_nothing(world, cli, tmp_path):
    file = world.yaml(tmp_path / "e.yaml")
    answer = cli(
        "compare", "--experiment", file, "--methods", "lora", "--methods", "keeplora++", "--seeds", "0,3", "--jobs", "2",
        "--orders", "shuffle-1", "--output", tmp_path / "study", "--dry-run",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert not (tmp_path / "study").exists()
    for folder in ("cells/lora/order-shuffle-1/seed-3", "cells/keeplora++/order-shuffle-1/seed-0"):
        assert folder in answer.out
    assert answer.out.count("pending") == 4
    assert "0 of 4 cells are finished; 2 at once" in answer.out


def test_study_file_and_options_over_it(world, cli, tmp_path, monkeypatch):
    world.yaml(tmp_path / "e.yaml")
    file = tmp_path / "study.yaml"
    file.write_text("experiment: e.yaml\nmethods: [lora]\nseeds: 0-1\nset: {training.epochs: 1}\n")
    plans = []

    def caught(plan, **_):
        plans.append(plan)
        raise StudyInterrupted

    monkeypatch.setattr(study_run, "run_study", caught)
    answer = cli("compare", file, "--seeds", "7", "-o", "tuner.r=2", "--output", tmp_path / "a b", "--drop-ledgers")
    assert answer.code == 130
    assert (
        answer.err
        == f"Interrupted. What is finished is kept; go on with `keeplora compare --output '{tmp_path / 'a b'}'`.\n"
    )
    (plan,) = plans
    assert (plan.methods, plan.seeds, dict(plan.set)) == (("lora",), (7,), {"training.epochs": 1, "tuner.r": 2})
    assert not plan.keep_ledgers


def test_reading_prints_and_writes_the_tables(cli, tmp_path):
    paths = fake_study(tmp_path / "runs", methods=("lora", "keeplora", "keeplora++"))
    answer = cli("compare", *paths, "--output", tmp_path / "out", "--against", "keeplora")
    assert answer.code == 0, answer.err
    assert "KeepLoRA++" in answer.out
    assert "less KeepLoRA (γ = 1)" in answer.out
    assert "Untouched model" in answer.out
    for name in (
        "report.html",
        "table.csv",
        "summary.csv",
        "table.tex",
        "table.md",
        "plots/forest.png",
        "plots/means.png",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 0
    wrong = cli("compare", *paths, "--output", tmp_path / "out", "--against", "ewc")
    assert (wrong.code, wrong.out) == (1, "")
    assert wrong.err.startswith("Error: against: 'ewc' is not a method of this study (one of: keeplora,")


def test_only_tables_of_a_study_runs_nothing(world, cli, tmp_path):
    from keeplora.study.plan import make_plan
    from keeplora.study.store import StudyStore

    file = world.yaml(tmp_path / "e.yaml")
    made = make_plan(
        {"experiment": str(file), "methods": "lora,keeplora++", "seeds": "0-1", "output": str(tmp_path / "s")}
    )
    store = StudyStore(made.output)
    store.join(made)
    store.save()
    for key in list(store.cells)[:3]:
        store.folder(key).parent.mkdir(parents=True, exist_ok=True)
        fake_cell(tmp_path / "made", key.method, order=None, seed=key.seed).rename(store.folder(key))
    for words in (["--output", made.output, "--only-tables"], [made.output]):
        answer = cli("compare", *words)
        assert answer.code == 0, answer.err
        assert "3 of 4 cells are finished. Missing:" in answer.out
        assert "keeplora++, order listed, seed 1: pending" in answer.out
        assert len(table(made.output)) == 4
        (made.output / "report.html").unlink()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to compare: give a STUDY.yaml, --suite and --methods, or run directories"),
        (["--suite", "demo-small"], "methods is missing; give some of"),
        (["--suite", "demo-smal", "--methods", "lora"], "did you mean 'demo-small'"),
        (["--suite", "demo-small", "--methods", "lorra"], "did you mean 'lora'"),
        (
            ["--suite", "demo-small", "--methods", "lora", "keeplora++"],
            "methods are given with commas: --methods lora,keeplora++",
        ),
        (["--output", "nowhere"], "nowhere holds no study to go on with"),
        (["nowhere"], "no such file or folder: nowhere"),
        (["--suite", "demo-small", "--methods", "lora", "-o", "training.epoch=1"], "unknown key 'epoch'"),
        (["--suite", "demo-small", "--methods", "lora", "-o", "method=lora"], "use methods: in place of it"),
        (["--suite", "demo-small", "--methods", "lora", "--orders", "9"], "9"),
    ],
)
def test_wrong_words_are_a_sentence_and_start_nothing(cli, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    answer = cli("compare", *words)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("Error: ")
    assert told in answer.err
    assert list(tmp_path.iterdir()) == []


def test_runs_from_before_their_file_changed_are_refused(world, cli, tmp_path):
    """The path is the same, the study is the same, and what its new runs would learn is another thing."""
    file = world.yaml(tmp_path / "e.yaml")
    words = ("compare", "--experiment", file, "--output", tmp_path / "s", "--seeds", "1", "--quiet", "--jobs", "1")
    assert cli(*words, "--methods", "zero-shot").code == 0
    (cell,) = (tmp_path / "s").glob("cells/*/*/*")
    told = (cell / "config.yaml").read_text(encoding="utf-8")
    assert "validation_seed: 0\n" in told
    # As an older keeplora wrote it, and with what a resume may set.
    told = told.replace("validation_seed: 0\n", "").replace("workers: 0", "workers: 2")
    (cell / "config.yaml").write_text(told, encoding="utf-8")
    assert cli(*words, "--methods", "zero-shot,wise-ft", "--dry-run").code == 0
    world.yaml(file, training={"epochs": 9})
    for more in ((), ("--dry-run",)):
        answer = cli(*words, "--methods", "zero-shot,wise-ft", *more)
        assert answer.code == 1
        assert "was run with training.epochs 2 (now 9): what the study's runs go by has changed since" in answer.err
    world.yaml(file)
    assert cli(*words, "--methods", "zero-shot").code == 0


def test_seeds_of_a_study_hold_out_the_same_samples(world, cli, tmp_path):
    """Else each would stand alone, made on other data than the rest."""
    file = world.yaml(tmp_path / "e.yaml", validation=0.2, accept={"max_drop": 100.0})
    words = ("--experiment", file, "--methods", "zero-shot", "--seeds", "0-1", "--output", tmp_path / "s", "--quiet")
    answer = cli("compare", *words, "--jobs", "1")
    assert answer.code == 0, answer.err
    assert "left out" not in answer.out
    prints = [
        {task["name"]: task["fingerprint"] for task in json.loads((run / "data.json").read_text())["tasks"]}
        for run in sorted((tmp_path / "s").glob("cells/*/*/*"))
    ]
    assert len(prints) == 2
    assert prints[0] == prints[1]


def test_another_study_in_the_folder_is_refused(world, cli, tmp_path):
    from keeplora.study.plan import make_plan
    from keeplora.study.store import StudyStore

    file = world.yaml(tmp_path / "e.yaml")
    made = make_plan({"experiment": str(file), "methods": "lora", "output": str(tmp_path / "s")})
    store = StudyStore(made.output)
    store.join(made)
    store.save()
    answer = cli(
        "compare", "--experiment", file, "--methods", "lora", "--output", made.output, "-o", "training.epochs=9"
    )
    assert answer.code == 1
    assert "training.epochs not set (asked for now: training.epochs = 9)" in answer.err
