"""`keeplora analyze` and `keeplora run --auto` from end to end on tiny worlds of both kinds."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import signal
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from keeplora.math import layer_scales
from keeplora.study.analyze.execute import STOP_AFTER
from keeplora.yaml_text import dump_yaml, read_yaml
from tests.cli.tiny_world import results_of
from tests.experiment.generation_world import make_world

GRID = ("--shares", "0.5,0.9")


class Page(html.parser.HTMLParser):
    """Tags that do not close, pictures and words of a page."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.pictures.append(found)
        assert tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def points_of(folder: Path) -> dict[str, Any]:
    """Measured points by name, without their times."""
    found = {}
    for file in sorted((folder / "points").glob("*.json")):
        value = json.loads(file.read_text(encoding="utf-8"))
        value["result"].pop("seconds")
        found[file.stem] = value
    return found


@pytest.fixture(scope="module")
def looked_at(world, tmp_path_factory):
    """intra and inter of the tiny CLIP in one folder, by the command line; the tests read it and change nothing."""
    from keeplora.cli import main

    folder = tmp_path_factory.mktemp("analysis")
    config = world.yaml(folder / "experiment.yaml")
    for command in (("intra", *GRID), ("inter", "--tasks", "1")):
        with pytest.raises(SystemExit) as left:
            main(["analyze", command[0], str(config), *command[1:], "--output", str(folder / "a"), "--quiet"])
        assert not left.value.code
    return config, folder / "a"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A generative world's configuration file."""
    folder = tmp_path_factory.mktemp("questions")
    path = folder / "experiment.yaml"
    path.write_text(dump_yaml(make_world(folder)), encoding="utf-8")
    return path


def test_the_full_end_of_the_grid_is_the_model_itself(looked_at):
    points = points_of(looked_at[1])
    base = points["untouched"]["result"]
    for part in ("vision_model", "text_model"):
        full = points[f"intra-{part}-leading-1.0"]["result"]
        assert full["energy"] == pytest.approx(1.0)
        assert {k: full[k] for k in base} == base
        nothing = points[f"intra-{part}-leading-0.0"]["result"]
        assert nothing["energy"] == 0.0
        assert nothing["specific"] != base["specific"]


def test_both_ends_are_measured_at_equal_energy_and_compared_there(looked_at):
    points = points_of(looked_at[1])
    shares = {"vision_model": (0.5, 0.85, 0.9), "text_model": (0.2, 0.5, 0.9)}  # the grid, and the tower's ε_w
    for part, grid in shares.items():
        for share in grid:
            leading, trailing = (points[f"intra-{part}-{mode}-{share}"]["result"] for mode in ("leading", "trailing"))
            assert trailing["energy"] == leading["energy"] >= share
            assert trailing["rank_share"] > leading["rank_share"]
    rows = results_of(looked_at[1])["ends"]
    assert [(row["part"], row["share"]) for row in rows] == [(p, s) for p in sorted(shares) for s in shares[p]]
    for row in rows:
        one = {m: points[f"intra-{row['part']}-{m}-{row['share']}"]["result"] for m in ("leading", "trailing")}
        one["floor"] = points[f"intra-{row['part']}-leading-0.0"]["result"]
        for group in ("general", "specific"):
            mean = {m: fmean(fmean(values) for values in result[group].values()) for m, result in one.items()}
            found = row[group]
            assert found["difference"]["mean"] == pytest.approx(mean["leading"] - mean["trailing"], abs=1e-3)
            assert found["trailing_over_floor"]["mean"] == pytest.approx(mean["trailing"] - mean["floor"], abs=1e-3)
            assert found["difference"]["low"] <= found["difference"]["mean"] <= found["difference"]["high"]


def test_points_of_another_grid_are_left_alone(looked_at, cli, tmp_path):
    """What an older keeplora measured of the complement lies in its folder, and is neither shown nor compared."""
    config, whole = looked_at
    folder = Path(shutil.copytree(whole, tmp_path / "a", ignore=shutil.ignore_patterns(".lock")))
    old = json.loads((folder / "points/intra-vision_model-trailing-0.5.json").read_text())
    (folder / "points/intra-vision_model-without-0.5.json").write_text(json.dumps({**old, "mode": "without"}))
    assert cli("analyze", "inter", config, "--tasks", "1", "--output", folder, "--quiet").code == 0
    mine, theirs = results_of(folder), results_of(whole)
    assert (mine["intra"], mine["ends"]) == (theirs["intra"], theirs["ends"])


def test_every_kind_of_point_is_in_the_results_with_intervals(looked_at):
    results = results_of(looked_at[1])
    assert results["format"] == "keeplora-analysis-results"
    assert {(c["part"], c["mode"]) for c in results["intra"]} == {
        (part, mode) for part in ("vision_model", "text_model") for mode in ("leading", "trailing")
    }
    for curve in results["intra"]:
        energies = [p["energy"] for p in curve["points"]]
        assert energies == sorted(energies)
    for row in results["windows"]:
        assert row["gain"]["low"] <= row["gain"]["mean"] <= row["gain"]["high"]
        assert row["tasks"] == ["paint"]
    assert [row["name"] for row in results["windows"]] == ["the shallow third", "the middle third", "the deep third"]
    assert sum(row["layers"] for row in results["windows"]) == 20
    captured = [one["median"] for one in results["spectra"]["captured"]]
    assert captured == sorted(captured)
    rooms = [one["room"] for one in results["spectra"]["protected"]]
    assert rooms == sorted(rooms, reverse=True)  # the more is protected, the less is free
    assert results["words"]["summary"]


def test_a_test_picture_is_never_scored(looked_at, world):
    sets = points_of(looked_at[1])["untouched"]["result"]["specific"]
    # 10 training pictures a class, of which a quarter, at most, is held out for the windows.
    assert {name: len(values) for name, values in sets.items()} == {"paint": 22, "stripes": 15, "dots": 15}


def test_the_suggestion_is_of_the_tuners_own_keys(looked_at):
    values, _ = read_yaml(looked_at[1] / "suggestion.yaml")
    assert set(values["tuner"]) | set(values["not_told"]) == {"energy_weights", "energy_features", "gamma", "r"}
    results = results_of(looked_at[1])
    assert values["tuner"] == {k: v for k, v in results["suggestion"].items() if k != "evidence" and v is not None}
    assert set(values["evidence"]) >= {"gamma", "r", "energy_features", "energy_weights.vision_model"}


def test_a_suggested_gamma_stands_in_the_file_with_its_rate(looked_at, cli, tmp_path, monkeypatch):
    from keeplora.analysis import suggest
    from keeplora.study.analyze import outcome

    config, whole = looked_at
    folder = tmp_path / "a"
    shutil.copytree(whole, folder)
    found = suggest.Suggestion(1.0, "because")
    monkeypatch.setattr(outcome.suggest, "gamma", lambda *args: found)
    answer = cli("analyze", "inter", config, "--tasks", "1", "--output", folder, "--quiet")
    assert answer.code == 0, answer.err
    values, _ = read_yaml(folder / "suggestion.yaml")
    assert values["tuner"]["gamma"] == 1.0
    blocks = (3, 2)  # of the tiny CLIP's towers, four targets each
    squares = sum(4 * sum(s * s for s in layer_scales(L, 0.2)) for L in blocks) / (4 * sum(blocks))
    assert values["training"]["learning_rate"] == pytest.approx(0.01 * squares**0.5, rel=5e-3)
    assert "leaves that as it was" in values["evidence"]["learning_rate"]
    assert "learning rate" in Page(folder / "analysis.html").text
    assert any("in place of 0.01" in line for line in results_of(folder)["words"]["summary"])


def test_the_page_is_whole_and_holds_every_figure(looked_at):
    page = Page(looked_at[1] / "analysis.html")
    assert page.open == []
    assert {"intra", "thirds", "windows", "spectra", "how", "summary"} <= set(page.ids)
    assert len(page.pictures) == 4
    assert all(p["src"].startswith("data:image/png;base64,") and p["alt"] for p in page.pictures)
    assert {f.name for f in (looked_at[1] / "figures").iterdir()} == {
        f"{name}.png" for name in ("intra", "thirds", "windows", "spectra")
    }
    for line in results_of(looked_at[1])["words"]["intra"]:
        assert line in page.text


def test_stopped_it_goes_on_where_it_was(looked_at, cli, tmp_path, monkeypatch):
    config, whole = looked_at
    words = ("analyze", "intra", config, *GRID, "--output", tmp_path / "a")
    monkeypatch.setenv(STOP_AFTER, "3")
    answer = cli(*words)
    assert answer.code == 130
    assert f"Analysis in {tmp_path / 'a'}: 17 points to measure" in answer.err
    assert f"what was measured is in {tmp_path / 'a'}; repeat the command to go on" in answer.err
    assert len(points_of(tmp_path / "a")) == 3
    partial = results_of(tmp_path / "a")
    assert partial["missing"] > 0
    assert partial["suggestion"] is None
    assert "Repeat the command to go on." in Page(tmp_path / "a/analysis.html").text
    assert not (tmp_path / "a/suggestion.yaml").exists()
    monkeypatch.delenv(STOP_AFTER)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "a/points").iterdir()}
    assert cli(*words).code == 0
    assert all(f.stat().st_mtime_ns == when for f, when in before.items())  # not measured again
    mine, theirs = points_of(tmp_path / "a"), points_of(whole)
    assert len(mine) > 3
    assert mine == {name: theirs[name] for name in mine}


def test_a_dry_run_says_how_much_there_is_to_do(looked_at, cli, tmp_path):
    config, folder = looked_at
    answer = cli("analyze", "intra", config, *GRID, "--dry-run", "--output", tmp_path / "a")
    assert answer.code == 0, answer.err
    # Per tower 0, 0.5, 0.9, 1 and its own ε_w from the leading end, and what lies between from the trailing one.
    assert answer.out == "17 points to measure (1 untouched, 16 intra): how long it takes is told after the first\n"
    assert not (tmp_path / "a").exists()
    answer = cli("analyze", "intra", config, *GRID, "--dry-run", "--output", folder)
    assert answer.out == "all 17 points are measured already\n"
    before = sorted(folder.rglob("*"))
    answer = cli("analyze", "intra", config, "--shares", "0.5,0.6", "--dry-run", "--output", folder)
    assert re.fullmatch(r"4 points to measure \(4 intra\); 13 are there already: about 0:\d\d\n", answer.out)
    assert sorted(folder.rglob("*")) == before
    answer = cli("analyze", "intra", config, "--limit", "5", "--dry-run", "--output", folder)
    assert "the analysis of another model, other data or other options: limit 200 (now 5)" in answer.err


def test_windows_of_another_number_are_kept_apart(looked_at, cli, tmp_path, monkeypatch):
    config, whole = looked_at
    folder = Path(shutil.copytree(whole, tmp_path / "a", ignore=shutil.ignore_patterns(".lock")))
    words = ("analyze", "inter", config, "--what", "windows", "--tasks", "1", "--output", folder)
    monkeypatch.setenv(STOP_AFTER, "1")
    assert cli(*words, "--windows", "2").code == 130
    monkeypatch.delenv(STOP_AFTER)
    kept = {f: f.stat().st_mtime_ns for f in (folder / "points").iterdir()}
    answer = cli(*words, "--windows", "2")
    assert answer.code == 0, answer.err
    assert all(f.stat().st_mtime_ns == when for f, when in kept.items())
    found = results_of(folder)
    assert [(row["window"], row["of"], row["name"]) for row in found["windows"]] == [
        (0, 2, "window 1 of 2"), (1, 2, "window 2 of 2")
    ]  # fmt: skip
    # Three blocks of pictures, two of words: the middle block lies at 0.5, in the second half.
    assert [row["blocks"] for row in found["windows"]] == [
        "blocks 0 of text_model and 0 of vision_model", "blocks 1 of text_model and 1–2 of vision_model"
    ]  # fmt: skip
    assert [row["layers"] for row in found["windows"]] == [8, 12]
    assert any(
        "Adapting window 2 of 2 alone (12 layers: blocks 1 of text_model and 1–2 of" in w
        for w in found["words"]["windows"]
    )
    # Thirds are asked for again, and nothing is measured: theirs lie there still.
    monkeypatch.setenv(STOP_AFTER, "1")
    assert cli(*words).code == 0
    assert results_of(folder)["windows"] == results_of(whole)["windows"]
    # A call that asks for no windows tells of thirds, and does not mix the two.
    assert cli("analyze", "intra", config, *GRID, "--output", folder).code == 0
    assert results_of(folder)["windows"] == results_of(whole)["windows"]


@pytest.mark.slow
def test_killed_with_its_processes_it_goes_on(looked_at, process, tmp_path):
    config, whole = looked_at
    words = ("-m", "keeplora", "analyze", "intra", config, *GRID, "--jobs", "2", "--output", tmp_path / "a")
    child = process(*words)
    end = time.monotonic() + 300
    while len(list((tmp_path / "a/points").glob("*.json"))) < 2:
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "a/results.json").exists()
    again = process(*words)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    mine, theirs = points_of(tmp_path / "a"), points_of(whole)
    assert mine == {name: theirs[name] for name in mine}


def test_a_folder_of_another_analysis_is_refused(looked_at, cli):
    config, folder = looked_at
    answer = cli("analyze", "intra", config, "--limit", "5", "--output", folder)
    assert answer.code == 1
    assert "another model, other data or other options: limit 200 (now 5)" in answer.err
    answer = cli("analyze", "intra", config, "--output", folder / "points")
    assert answer.code == 1
    assert "holds no analysis; choose another --output" in answer.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("intra",), "give either an experiment's YAML file or --suite NAME"),
        (("intra", "CONFIG", "--shares", "0.5,x"), "write numbers with commas between them"),
        (("intra", "CONFIG", "--shares", "1.5"), "a share of the spectrum lies between 0 and 1"),
        (
            ("intra", "CONFIG", "--parts", "vison_model"),
            "no tower is named 'vison_model'; did you mean 'vision_model'?",
        ),
        (("intra", "CONFIG", "--by", "energie"), "unknown word 'energie'; did you mean 'energy'?"),
        (("intra", "CONFIG", "--general", "reference"), "names no `reference:` set"),
        (("intra", "CONFIG", "--limit", "2"), "fewer than 4 samples"),
        (("inter", "CONFIG", "--what", "window"), "did you mean 'windows'?"),
        (("inter", "CONFIG", "--windows", "4"), "--windows is 4, but the deepest tower has 3 blocks: give 2 to 3"),
        (("inter", "CONFIG", "--what", "undo"), "an untouched model has no 'undo'"),
        (("inter", "RUN", "--general", "probes"), "of a run its own probes are looked at; leave the option out"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(looked_at, world, cli, tmp_path, words, said):
    places = {"CONFIG": str(looked_at[0]), "RUN": str(world.run()[0]) if "RUN" in words else ""}
    words = [places.get(word, word) for word in words]
    answer = cli("analyze", *words, "--output", tmp_path / "a")
    assert answer.code == 1
    assert said in answer.err
    assert not (tmp_path / "a").exists()


def test_the_seed_is_the_experiments_where_none_is_asked_for(world, tmp_path):
    from keeplora.cli.analyze import plan_of
    from keeplora.cli.analyze_options import Shared

    config = world.yaml(tmp_path / "e.yaml", seed=7)
    assert plan_of(config, Shared()).seed == 7
    assert plan_of(config, Shared(set_=["seed=3"])).seed == 3
    assert plan_of(config, Shared(seed=5, set_=["seed=3"])).seed == 5
    assert plan_of(None, Shared(), run=world.run()[0]).seed == 0


def test_without_the_outer_windows_no_gamma_follows(world, cli, tmp_path):
    config = world.yaml(tmp_path / "e.yaml", tuner={"target_modules": r".*layers\.[12]\.self_attn\.(q|v)_proj"})
    assert cli("analyze", "inter", config, "--what", "windows", "--output", tmp_path / "a", "--quiet").code == 0
    found = results_of(tmp_path / "a")
    assert [row["window"] for row in found["windows"]] == [1, 2]
    assert found["suggestion"]["gamma"] is None
    assert found["suggestion"]["evidence"]["gamma"] == "of the shallow third alone nothing was measured"


def test_towers_with_energies_of_their_own_are_left_as_they_are(world, cli, tmp_path):
    config = world.yaml(tmp_path / "e.yaml", tuner={"energy_features": {"vision_model": 0.97, "text_model": 0.9}})
    assert cli("analyze", "inter", config, "--what", "spectra", "--output", tmp_path / "a", "--quiet").code == 0
    found = results_of(tmp_path / "a")
    assert 0.97 in [one["energy"] for one in found["spectra"]["protected"]]
    assert found["suggestion"]["energy_features"] is None
    assert "each tower has an ε_f of its own" in found["suggestion"]["evidence"]["energy_features"]


def test_without_general_sets_nothing_is_begun(world, cli, tmp_path):
    config = world.yaml(tmp_path / "e.yaml", probes=[])
    answer = cli("analyze", "intra", config, "--output", tmp_path / "a")
    assert answer.code == 1
    assert "nothing stands for general knowledge" in answer.err


def test_a_finished_run(world, cli, tmp_path):
    run, results = world.run()
    answer = cli("analyze", "inter", run, "--output", tmp_path / "a")
    assert answer.code == 0, answer.err
    found = results_of(tmp_path / "a")
    points = points_of(tmp_path / "a")
    # Nothing undone: the run's last row. Everything undone: its first, the untouched model.
    for steps, row in ((0, -1), (3, 0)):
        sets = points[f"undo-shallow-{steps}-3"]["result"]["specific"]
        scores = [sum(sets[name]) / len(sets[name]) for name in results["tasks"]]
        assert scores == pytest.approx(results["accuracy"][row], abs=1e-3)
    # A block of the deeper tower, of four layers, a step; the other tower's two blocks go with the first and the last third.
    out = {first: [p["layers"] for p in c["points"]] for c in found["undo"] for first in [c["first"]]}
    assert out == {"shallow": [0, 8, 12, 20], "deep": [0, 8, 12, 20]}
    last = found["layers"][-1]
    assert [t["task_name"] for t in found["layers"]] == ["paint", "stripes", "dots"]
    for task in found["layers"]:
        for row in task["rows"]:
            assert row["update"] > 0
            assert 0 <= row["outside"] <= 1
            assert 0 < row["taken"] <= 1 + 1e-5
            assert row["cka"] is None or row["cka"] <= 1 + 1e-6
    assert max(row["total"] for row in last["rows"]) > max(row["update"] for row in found["layers"][0]["rows"])
    assert found["suggestion"] is None
    assert not (tmp_path / "a/suggestion.yaml").exists()
    page = Page(tmp_path / "a/analysis.html")
    assert page.open == []
    assert {"layers", "undo"} <= set(page.ids)


def test_the_residual_share_is_that_of_the_gradient_the_task_was_given(world, cli, tmp_path):
    """Of the first task A takes min(r, …) directions of the residual gradient: with r as wide as the layer, all of it."""
    run, _ = world.run(tuner={"r": 24}, tasks=[{"name": "paint", "source": "folder", "path": "paint"}])
    assert cli("analyze", "inter", run, "--what", "layers", "--output", tmp_path / "a").code == 0
    rows = results_of(tmp_path / "a")["layers"][0]["rows"]
    assert all(row["taken"] == pytest.approx(1.0, abs=1e-3) for row in rows)


def test_a_method_without_updates_to_undo_is_refused(world, cli, tmp_path):
    run, _ = world.run(method="oracle")
    answer = cli("analyze", "inter", run, "--output", tmp_path / "a")
    assert answer.code == 1
    assert "keeps a model per task" in answer.err


def test_questions_and_answers(questions, cli, tmp_path):
    base = ("--output", tmp_path / "a", "--limit", "6")
    assert cli("analyze", "intra", questions, *GRID, *base).code == 0
    assert cli("analyze", "inter", questions, "--tasks", "1", *base).code == 0
    found = results_of(tmp_path / "a")
    assert found["kind"] == "generation"
    points = points_of(tmp_path / "a")
    untouched = points["untouched"]["result"]
    full = points["intra-model.language_model-leading-1.0"]["result"]
    assert {k: full[k] for k in untouched} == untouched
    assert [row["name"] for row in found["windows"]] == ["the shallow third", "the deep third"]
    assert found["general"] == ["general"]
    assert Page(tmp_path / "a/analysis.html").open == []


def test_a_run_of_questions(questions, cli, tmp_path):
    assert cli("run", questions, "--output", tmp_path / "run", "--quiet").code == 0
    answer = cli("analyze", "inter", tmp_path / "run")
    assert answer.code == 0, answer.err
    found = results_of(tmp_path / "run/analysis")
    cka = [row["cka"] for row in found["layers"][-1]["rows"] if row["tower"] == "model.language_model"]
    assert all(0 < value <= 1 + 1e-6 for value in cka)
    run = results_of(tmp_path / "run")
    sets = points_of(tmp_path / "run/analysis")["undo-shallow-0-2"]["result"]["specific"]
    scores = [sum(sets[name]) / len(sets[name]) for name in run["tasks"]]
    assert scores == pytest.approx(run["accuracy"][-1], abs=1e-3)


# ---- run --auto ---------------------------------------------------------------------------------------------------


def suggesting(folder: Path, config: Path, **values: Any) -> None:
    """Put suggestions into the analysis that a first ``run --auto`` left, as if its points had told them."""
    results = results_of(folder)
    results["suggestion"] |= values
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def test_auto_takes_what_the_user_did_not_say(world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = world.yaml(tmp_path / "experiment.yaml", tuner={"r": 4, "energy_features": 0.9})
    from keeplora.study.analyze import auto

    real = auto.analyze

    def told(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        suggesting(found.folder, config, gamma=0.5, r=2, energy_features=0.95, learning_rate=0.005)
        return found._replace(results=results_of(found.folder))

    monkeypatch.setattr(auto, "analyze", told)
    answer = cli("run", config, "--auto", "--output", tmp_path / "run", "--quiet")
    assert answer.code == 0, answer.err
    assert "gamma: 0.5 from the analysis (was 0.2)" in answer.err
    assert "r: 4, as your configuration says" in answer.err
    # The world's configuration names a rate, which stays; without it the γ brings its own.
    assert "learning_rate: as your configuration says, though another γ moves all layers by more or less" in answer.err
    assert "energy_features: 0.9, as your configuration says" in answer.err
    values, _ = read_yaml(tmp_path / "run/config.yaml")
    assert (values["tuner"]["gamma"], values["tuner"]["r"], values["tuner"]["energy_features"]) == (0.5, 4, 0.9)
    record = results_of(tmp_path / "run")["auto"]
    assert record["settings"]["gamma"] == {"suggested": 0.5, "taken": True, "before": 0.2}
    assert record["settings"]["r"]["taken"] is False
    (folder,) = (tmp_path / "runs").glob("analysis-experiment-*")
    assert record["analysis"] == f"runs/{folder.name}"
    scales = {row["layer"]: row["scale"] for row in results_of(tmp_path / "run")["layers"]}
    assert min(scales.values()) == pytest.approx(0.5)

    # The same again, from a folder of another name that an older keeplora wrote, which noted less: nothing is measured.
    folder = folder.rename(folder.with_name("analysis-another-name"))
    (tmp_path / "runs/analysis-a-damaged-one").mkdir()
    (tmp_path / "runs/analysis-a-damaged-one/analysis.json").write_text("{")
    about = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    del about["identity"]["general_sets"], about["identity"]["max_length"]
    (folder / "analysis.json").write_text(json.dumps(about), encoding="utf-8")
    again = cli("run", config, "--auto", "--output", tmp_path / "run2", "--quiet")
    assert again.code == 0
    assert "[1/" not in again.err.split("Settings after")[0]
    assert sorted(f.name for f in (tmp_path / "runs").glob("analysis-*")) == ["analysis-a-damaged-one", folder.name]
    full = cli("run", config, "--auto", "--output", tmp_path / "run", "--quiet")
    assert full.code == 1
    assert "is not empty" in full.err


def test_the_scale_stays_where_the_rank_changes(world, cli, tmp_path, monkeypatch):
    from keeplora.experiment import load_config
    from keeplora.study.analyze.auto import take
    from keeplora.study.analyze.run import Analysis

    config = load_config(world.config(tuner={"r": 4}))
    made = {"energy_weights": {"vision_model": 0.9, "text_model": 0.5}, "energy_features": None, "gamma": None, "r": 8}
    results = {"suggestion": {**made, "evidence": {}}, "note": ""}
    (tmp_path / "results.json").write_text("{}")
    taken = take(Analysis(results, tmp_path), config, own=[])
    assert taken.overrides["tuner.r"] == 8
    assert taken.overrides["tuner.lora_alpha"] / 8 == config.tuner.lora_alpha / 4
    assert taken.overrides["tuner.energy_weights"] == made["energy_weights"]
    assert "tuner.gamma" not in taken.overrides
    assert "lora_alpha" not in str(take(Analysis(results, tmp_path), config, own=["lora_alpha"]).overrides)
    assert "tuner.r" not in take(Analysis(results, tmp_path), config, own=["r"]).overrides
    # ε_f makes room for the suggested rank: without it there is no reason for it.
    made["energy_features"] = 0.9
    results = {"suggestion": {**made, "evidence": {}}, "note": ""}
    assert take(Analysis(results, tmp_path), config, own=[]).overrides["tuner.energy_features"] == 0.9
    without = take(Analysis(results, tmp_path), config, own=["r"])
    assert "tuner.energy_features" not in without.overrides
    assert "energy_features: 0.99, for 0.9 was made for rank 8, which the run does not take" in without.said


def test_a_gamma_brings_the_rate_at_which_the_layers_move_as_far(world, tmp_path):
    from keeplora.experiment import load_config
    from keeplora.experiment.own_settings import own_settings
    from keeplora.study.analyze.auto import take
    from keeplora.study.analyze.run import Analysis

    config = load_config(world.config())
    results = {
        "suggestion": {
            "energy_weights": None, "energy_features": None, "gamma": 1.0, "r": None, "learning_rate": {"paint": 0.002},
            "evidence": {},
        },
        "note": "",
    }  # fmt: skip
    (tmp_path / "results.json").write_text("{}")
    assert take(Analysis(results, tmp_path), config, []).overrides["training.learning_rate"] == {"paint": 0.002}
    own = own_settings(world.config())
    assert own == ["learning_rate", "r"]
    assert list(take(Analysis(results, tmp_path), config, own).overrides) == ["tuner.gamma"]
    assert not take(Analysis(results, tmp_path), config, ["gamma"]).overrides  # no γ, no rate


def test_auto_is_for_the_methods_that_read_its_settings(world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = world.yaml(tmp_path / "e.yaml", method="lora")
    answer = cli("run", config, "--auto", "--output", tmp_path / "run")
    assert answer.code == 1
    assert "method 'lora' does not read" in answer.err
    answer = cli("run", config, "--auto", "--dry-run")
    assert answer.code == 1
    assert "leave one of them out" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_damaged_point_is_named(looked_at, cli, tmp_path):
    config, whole = looked_at
    folder = Path(shutil.copytree(whole, tmp_path / "a", ignore=shutil.ignore_patterns(".lock")))
    (folder / "points/untouched.json").write_text("{")
    answer = cli("analyze", "intra", config, *GRID, "--output", folder)
    assert answer.code == 1
    assert "untouched.json is damaged" in answer.err
    assert "delete it and repeat the command" in answer.err


def test_undo_without_deep_points_has_no_deep_curve(world, cli, tmp_path, monkeypatch):
    run = world.copied(world.run()[0], tmp_path / "run")
    monkeypatch.setenv(STOP_AFTER, "3")
    assert cli("analyze", "inter", run, "--what", "undo", "--limit", "6").code == 130
    assert [curve["first"] for curve in results_of(run / "analysis")["undo"]] == ["shallow"]


def test_an_unfinished_run_a_run_for_intra_and_a_folder_without_either_are_refused(world, cli, tmp_path):
    run = world.copied(world.run()[0], tmp_path / "run")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    said = cli("analyze", "inter", run, "--what", "undo").err
    assert "is not finished (its state: interrupted); finish it with `keeplora resume" in said
    assert "intra looks at an untouched model" in cli("analyze", "intra", run).err
    (tmp_path / "empty").mkdir()
    assert "is no run (it holds no config.yaml)" in cli("analyze", "inter", tmp_path / "empty").err


def test_a_call_tells_what_it_asked_for_and_not_what_lies_there(looked_at, cli, tmp_path, monkeypatch):
    config, whole = looked_at
    shutil.copytree(whole, tmp_path / "a")
    words = ("analyze", "intra", config, "--output", tmp_path / "a")
    assert cli(*words, "--shares", "0.5").code == 0
    found = results_of(tmp_path / "a")
    mine, theirs = (
        {p["share"] for curve in one["intra"] for p in curve["points"]} for one in (found, results_of(whole))
    )
    assert theirs - mine == {0.9}
    assert found["windows"] == results_of(whole)["windows"]  # of the other command, in the same folder
    assert (tmp_path / "a/suggestion.yaml").exists()
    # Unfinished: nothing is suggested, and what an earlier call suggested goes.
    monkeypatch.setenv(STOP_AFTER, "1")
    for file in (tmp_path / "a/points").glob("intra-*"):
        file.unlink()
    assert cli(*words, *GRID).code == 130
    found = results_of(tmp_path / "a")
    assert 0 < found["missing"] < found["asked"]
    assert (
        f"{found['missing']} of {found['asked']} points are not measured yet" in Page(tmp_path / "a/analysis.html").text
    )
    assert not (tmp_path / "a/suggestion.yaml").exists()
