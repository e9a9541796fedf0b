"""Studies of models that answer questions: their own columns, paired intervals, and never in one table with the other kind."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
from fake_answers import GENERAL, SETS, make_answers
from scipy.stats import t as student
from test_html import Page

from keeplora.errors import KeepLoraError
from keeplora.experiment.run_directory import FORMAT
from keeplora.report import kinds, study_tables, study_text
from keeplora.report.runs import load_run
from keeplora.report.study import render_study
from keeplora.report.study_data import StudyCell
from keeplora.study.collect import comparable, differences, read_runs, study_of
from keeplora.study.tables import summarise
from tests.study.fake_study import change, fake_cell

MAA = {"lora": (50.0, 52.0, 47.0), "keeplora++": (61.0, 60.0, 59.0)}
KEYS = ("mft", "mfn", "maa", "bwt", "probe")


@pytest.fixture
def cells(tmp_path: Path) -> list[Path]:
    """Two methods × three seeds, MAA as in the table above."""
    paths = []
    for method, values in MAA.items():
        for seed, value in enumerate(values):
            path = make_answers(tmp_path, f"{method}-{seed}", method, seed=seed)
            metrics = json.loads((path / "results.json").read_text())["metrics"]
            change(path, "results.json", {"metrics": {**metrics, "maa": value}, "order": "1"})
            change(path, "status.json", {"format": FORMAT, "version": 0})
            config = "model: {name: stand-in, dtype: auto}\ngeneration: {sample: false}\ntraining: {epochs: 3}\n"
            (path / "config.yaml").write_text(config + f"method: {method}\nseed: {seed}\n")
            paths.append(path)
    return paths


def test_columns_and_paired_differences(cells: list[Path], tmp_path: Path) -> None:
    study = study_of(read_runs(cells).cells, name="questions", against=None)
    assert study.kind is kinds.GENERATION
    assert study.against == "lora"
    heads = ["MFT ↑", "MFN ↑", "MAA ↑", "BWT ↑", "General ↑"]
    table = study_tables.differences_table(study, None)
    assert study_tables.methods_table(study, None).head == ["method", "n", *heads]
    assert table is not None
    assert table.head == ["less Sequential LoRA", "pairs", *heads]
    gaps = [a - b for a, b in zip(MAA["keeplora++"], MAA["lora"], strict=True)]
    half = float(student.ppf(0.975, 2)) * stdev(gaps) / math.sqrt(3)
    one = study.differences["keeplora++", None, "maa"].interval
    assert (one["mean"], one["low"], one["high"]) == pytest.approx(
        (fmean(gaps), fmean(gaps) - half, fmean(gaps) + half)
    )
    for key in KEYS:
        assert study.differences["keeplora++", None, key].interval["n"] == 3
    assert {key for _, _, key in study.estimates} == set(KEYS)
    page = Page(render_study(study, tmp_path / "out").read_text())
    assert "BWT against Sequential LoRA" in page.text
    assert "Best mean of MFN: " in page.text
    assert "No method can be told" not in page.text
    assert "Score after every task" in page.text
    for word in ("Transfer", "accuracy", "pictures named right"):
        assert word not in page.text, word
    assert {p.stem for p in (tmp_path / "out" / "plots").iterdir()} == {"means", "forest", "matrices-1"}
    rows = list(csv.DictReader(io.StringIO(study_text.table_csv(study))))
    assert [float(r["maa"]) for r in rows if r["method"] == "lora"] == list(MAA["lora"])
    assert "transfer" not in rows[0]
    assert "MAA" in study_text.table_tex(study)


def test_the_untouched_model_and_what_never_learns(cells: list[Path], tmp_path: Path) -> None:
    study = study_of(read_runs(cells).cells, name="s", against=None)
    before = load_run(cells[0]).accuracy[0]
    assert study.untouched[None, "mft"] == study.untouched[None, "mfn"] == pytest.approx(fmean(before))
    assert (None, "bwt") not in study.untouched
    still = make_answers(tmp_path, "still", "zero-shot")
    change(still, "results.json", {"order": "1"})
    (still / "config.yaml").write_text("model: {name: stand-in}\ngeneration: {sample: false}\n")
    more = study_of(read_runs([*cells, still]).cells, name="s", against=None)
    assert more.estimates["zero-shot", None, "bwt"]["mean"] == 0.0
    assert "zero-shot" not in more.best(None, "bwt", True)
    assert [one.metric for one in more.rankings] == []  # one seed of zero-shot is no block to rank over


def test_kinds_are_never_in_one_table(cells: list[Path], tmp_path: Path) -> None:
    names = fake_cell(tmp_path / "b", "lora", seed=7)
    with pytest.raises(KeepLoraError) as caught:
        read_runs([*cells, names])
    assert str(caught.value) == (
        f"these runs cannot stand in one table: {names} differ from {cells[0]} in what they do: a run that names pictures "
        "(classification) against one that answers questions (generation). Name the runs of one group at a time."
    )
    mixed = [StudyCell("lora", "1", i, "finished", p, load_run(p)) for i, p in enumerate((cells[0], names))]
    with pytest.raises(KeepLoraError, match="their metrics are not the same"):
        summarise(mixed, name="s")
    found = comparable(
        [*mixed, *(StudyCell("lora", "1", 5, "finished", p, load_run(p)) for p in cells[1:2])], strict=False
    )
    assert len(found.cells) == 2
    assert "left out of every table" in found.notes[0]


def test_runs_without_a_kind_pool_with_runs_that_name_classification(tmp_path: Path) -> None:
    one, two = fake_cell(tmp_path, "lora"), fake_cell(tmp_path, "keeplora++")
    change(two, "results.json", {"kind": "classification"})
    study = study_of(read_runs([one, two]).cells, name="s", against=None)
    assert study.kind is kinds.CLASSIFICATION
    assert study_tables.heads(study) == ["Transfer ↑", "Avg ↑", "Last ↑", "Probe ↑", "Forgetting ↓", "BWT ↑"]


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("results.json", {"scorers": SETS | GENERAL | {"signs": "vqa"}}, "the scorers"),
        (
            "config.yaml",
            "model: {name: stand-in, quantize: 4bit}\ngeneration: {sample: false}\n",
            "the model's quantisation",
        ),
        (
            "config.yaml",
            "model: {name: stand-in, dtype: bf16}\ngeneration: {sample: false}\n",
            "the weights' precision",
        ),
        ("config.yaml", "model: {name: stand-in}\ngeneration: {sample: true}\n", "how answers are generated"),
    ],
)
def test_what_makes_scores_unlike_is_named(cells: list[Path], file: str, values: dict | str, told: str) -> None:
    assert differences(load_run(cells[0]), load_run(cells[3])) == ""
    if isinstance(values, str):
        (cells[3] / file).write_text(values)
    else:
        change(cells[3], file, values)
    found = differences(load_run(cells[0]), load_run(cells[3]))
    assert found.startswith(f"{told} (")
    with pytest.raises(KeepLoraError, match="cannot stand in one table"):
        read_runs(cells)
