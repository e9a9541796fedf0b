"""`keeplora analyze drift`, `similarity` and `boundary` as a person calls them."""

from __future__ import annotations

import json
import shutil

import pytest

from keeplora.cli import main  # noqa: F401  the command line before transformers
from keeplora.tuner.ledger import Ledger
from keeplora.tuner.ledger_files import seal
from tests.cli.tiny_world import results_of

ORDER = ["paint", "stripes", "dots"]


def told(answer, code=0):
    assert answer.code == code, answer.err
    return json.loads(answer.out)


@pytest.fixture(scope="module")
def run(world):
    return world.run()[0]


@pytest.fixture(scope="module")
def lora(world):
    return world.run(method="lora")[0]


def test_drift_within_a_run(run, cli, tmp_path):
    found = told(cli("analyze", "drift", run, "--task-a", "paint", "--json"))
    assert (found["a"], found["b"]) == (f"{run.name} @ paint", run.name)
    assert found["relative"] > 0
    assert all(row["moved_in_a"] is None or row["moved_in_a"] < 1e-9 for row in found["layers"])
    table = cli("analyze", "drift", run, "--plot", tmp_path / "drift.png")
    assert table.code == 0
    assert "@ start" in table.out
    assert "over all layers ‖D‖/‖W‖" in table.out
    assert (tmp_path / "drift.png").stat().st_size > 5000
    bare = cli("analyze", "drift", run, "--updates-only")
    assert bare.code == 0
    assert "base model" not in bare.out


def test_drift_between_a_run_and_its_exports(run, lora, cli, tmp_path):
    for form in ("peft", "merged"):
        assert cli("export", run, "--format", form, "--output", tmp_path / form).code == 0
        found = told(cli("analyze", "drift", run, tmp_path / form, "--json"))
        assert found["relative"] < 1e-6
    assert told(cli("analyze", "drift", tmp_path / "merged", tmp_path / "merged", "--json"))["relative"] == 0
    apart = told(cli("analyze", "drift", run, lora, "--json"))
    assert apart["relative"] > 1e-3
    assert all(row["k_b"] is None for row in apart["layers"])


def test_similarity_of_runs(run, lora, cli, tmp_path):
    found = told(cli("analyze", "similarity", lora, run, "--json"))
    assert found["tasks"] == ORDER
    assert found["source"] == run.name
    assert not found["exact"]
    assert [found["overlap"][i][i] for i in range(3)] == [1.0] * 3
    assert {(p["run"], p["earlier"], p["later"]) for p in found["pairs"]} == {
        (name, a, b)
        for name in (run.name, lora.name)
        for a, b in (("paint", "stripes"), ("paint", "dots"), ("stripes", "dots"))
    }
    # Three pairs a run say nothing by themselves.
    assert found["associations"][run.name]["overlap"]["verdict"] == "cannot be told"
    assert "gradient" not in found["associations"][run.name]  # it must be asked for
    text = cli("analyze", "similarity", run, lora, "--plot", tmp_path / "s.png")
    assert text.code == 0
    assert "cannot be told" in text.out
    assert "ledger's own columns" in text.out
    assert (tmp_path / "s.png").stat().st_size > 5000


def test_a_run_that_has_learned_nothing_stands_in_no_ones_way(run, cli, tmp_path):
    """The first ledger that holds subspaces of tasks is compared, not the first that could."""
    begun = tmp_path / "begun"
    shutil.copytree(run, begun, ignore=shutil.ignore_patterns(".lock", "results.json", "metrics.jsonl"))
    Ledger.open(begun / "ledger").rollback(0)
    assert told(cli("analyze", "similarity", begun, run, "--json"))["source"] == run.name
    answer = cli("analyze", "similarity", run, "--subspaces", begun)
    assert answer.code == 1
    assert "has learned no task, so it has no subspaces" in answer.err


def test_subspaces_of_another_base_are_refused(run, cli, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns(".lock"))
    head = next((other / "ledger").glob("*.json"))
    values = json.loads(head.read_text(encoding="utf-8"))
    values["base"]["hash"] = "0" * 64
    head.write_text(json.dumps({**values, "seal": seal(values)}), encoding="utf-8")
    answer = cli("analyze", "similarity", run, "--subspaces", other)
    assert answer.code == 1
    assert "was learned on another base model" in answer.err


def test_similarity_takes_gradients_of_runs_by_any_method(run, lora, cli, tmp_path):
    """Each run's own: the first pair's gradients were taken where both runs stood on other weights."""
    answer = cli("analyze", "similarity", run, lora, "--gradients", "--limit", "8", "--json")
    found = told(answer)
    shares = {(p["run"], p["earlier"], p["later"]): p["predicted"]["gradient"] for p in found["pairs"]}
    assert len(shares) == 6
    assert all(0 < share < 1 for share in shares.values())
    assert shares[run.name, "paint", "stripes"] != shares[lora.name, "paint", "stripes"]
    assert f"{lora.name}: gradient of dots" in answer.err
    assert list(found["associations"][run.name]) == ["overlap", "energy", "gradient", "update", "size"]
    # The analysis of the run takes the same ones.
    assert cli("analyze", "inter", run, "--what", "layers", "--limit", "8", "--output", tmp_path / "a").code == 0
    page = results_of(tmp_path / "a")
    kept = {(i, row["task_name"]): share for row in page["layers"] for i, share in row["inside"].items()}
    assert kept == pytest.approx({(i, j): v for (name, i, j), v in shares.items() if name == run.name}, rel=1e-4)
    assert [p["predicted"]["gradient"] for p in page["interference"]["pairs"]] == pytest.approx(list(kept.values()))
    assert "cannot be told" in " ".join(page["words"]["interference"])
    assert '<h2 id="h-interference">' in (tmp_path / "a/analysis.html").read_text(encoding="utf-8")


def test_boundaries_of_a_run(run, cli, tmp_path):
    words = ("--warmup", "16", "--batch-size", "4", "--alarm-rate", "0.01")
    found = told(cli("analyze", "boundary", run, *words, "--json"))
    assert found["tasks"] == ORDER
    assert found["samples"] == sum(10 * n for n in (3, 2, 2))  # every training picture, and no test picture
    assert [at for at, _ in found["boundaries"]] == [30, 50]
    assert len(found["positions"]) == len(found["values"]) == len(found["statistics"]) > 0
    assert found["positions"] == sorted(set(found["positions"]))
    # What is learned of a task is not judged; what was judged since its onset is learned of the next.
    assert found["warmups"][0] == [0, 16]
    assert found["positions"][0] == 17
    assert all(alarm["onset"] < alarm["at"] for alarm in found["alarms"])
    text = cli("analyze", "boundary", run, *words, "--stream", "gradual", "--ramp", "16", "--plot", tmp_path / "b.png")
    assert text.code == 0
    assert "false alarms:" in text.out
    assert (tmp_path / "b.png").stat().st_size > 5000
    mixed = told(cli("analyze", "boundary", run, *words, "--stream", "shuffled", "--json"))
    assert mixed["boundaries"] == []
    assert mixed["delays"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("drift", "RUN", "--energy", "0"), "--energy is a share above 0"),
        (("drift", "RUN", "--task-b", "pets"), "no active task is named 'pets'; there are start, paint, stripes, dots"),
        (("drift", "RUN", "--plot", "x.txt"), "a plot is written as"),
        (("drift", "/nowhere"), "/nowhere is not a folder"),
        (("similarity", "LORA"), "keeps no subspaces"),
        (("similarity", "RUN", "RUN"), "same folder name"),
        (("similarity", "RUN", "--gradients", "--limit", "-1"), "--limit is a number of samples, or 0 for all, got -1"),
        (("boundary", "RUN", "--alarm-rate", "1"), "--alarm-rate is the number of false alarms per sample"),
        (("boundary", "RUN", "--stream", "sudden"), "--stream is one of abrupt, gradual, shuffled"),
        (("boundary", "RUN", "--alarm-rate", "-1"), "--alarm-rate is the number"),
        (("boundary", "RUN", "--warmup", "8"), "--warmup is 16 at least (two batches of --batch-size 8), got 8"),
        (("boundary", "RUN", "--warmup", "70"), "--warmup 70 takes the whole stream of 70 samples"),
        (("boundary", "RUN", "--warmup", "65"), "--warmup 65 takes the whole stream of 70 samples"),
        (("boundary", "RUN", "--batch-size", "0"), "--batch-size is 1 at least, got 0"),
        (("boundary", "RUN", "--ramp", "0"), "--ramp is 1 at least, got 0"),
        (("boundary", "RUN", "--plot", "nowhere/b.png"), "there is no folder nowhere"),
        (("similarity", "RUN", "--plot", "nowhere/s.png"), "there is no folder nowhere"),
        (("drift", "RUN", "--plot", "nowhere/d.png"), "there is no folder nowhere"),
        (("drift", "EMPTY"), "holds no ledger, adapter or checkpoint; give"),
        (("boundary", "LEDGER"), "is not a run directory"),
    ],
)
def test_what_is_refused(run, lora, cli, tmp_path, words, message):
    places = {"RUN": run, "LORA": lora, "LEDGER": run / "ledger", "EMPTY": tmp_path}
    answer = cli("analyze", *(places.get(word, word) for word in words))
    assert answer.code == 1
    assert message in answer.err
    assert answer.err.startswith("Error: ")
