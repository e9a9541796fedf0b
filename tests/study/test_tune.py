"""The search of `keeplora tune`: spaces, the even design, TPE, what a kill leaves, and what is written."""

from __future__ import annotations

import csv
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment.config import load_config
from keeplora.experiment.run_directory import RunDirectory
from keeplora.methods import get_method, method_names
from keeplora.study import tune as module
from keeplora.study import tune_plan
from keeplora.study import tune_report as report
from keeplora.study.plan import read_per_method
from keeplora.study.search import LEARNING_RATE, Axis, Searcher, design, make_space, parse_ranges
from keeplora.study.tune import Outcome, tune
from keeplora.study.tune_plan import TunePlan
from keeplora.yaml_text import read_yaml

optuna = pytest.importorskip("optuna", reason="optuna is not installed")

RATE = Axis(LEARNING_RATE, "log", 1e-4, 1e-2)
GAMMA = Axis("tuner.gamma", "choice", values=(0.2, 0.5))
SOURCE = {
    "model": "embedded",
    "tasks": [{"name": name, "source": "folder", "path": name} for name in ("a", "b", "c")],
    "probes": [{"name": "p", "source": "folder", "path": "p"}],
}


# --- spaces ---


def test_every_method_that_trains_has_a_space_which_its_configuration_accepts():
    """The ends of every range of every method, through the whole configuration and the method's own options."""
    from keeplora.tuner.options import make_options

    seen = 0
    for name in method_names():
        method = get_method(name)
        if not method.trains:
            continue
        seen += 1
        axes = make_space(name, method.search, [], {})
        for share in (0.0, 0.999):
            settings = {axis.key: axis.at(share) for axis in axes}
            config = load_config(SOURCE, {"method": name, **settings}, known_methods=method_names())
            make_options(method.learner.Options, config.tuner.options)
            for key, value in settings.items():
                got = config.model_dump()
                for part in key.split("."):
                    got = got[part]
                assert got == value, (name, key)
    assert seen >= 4


def test_a_design_tries_every_part_of_each_axis_once():
    for n, seed in ((1, 0), (6, 1), (10, 2)):
        whole = Axis("tuner.r", "log", 1, 64)
        found = design([RATE, GAMMA, whole], n, seed)
        places = sorted((math.log10(s[LEARNING_RATE]) + 4) / 2 * n for s in found)
        assert [math.floor(place) for place in places] == list(range(n))
        counts = [sum(s["tuner.gamma"] == value for s in found) for value in GAMMA.values]
        assert abs(counts[0] - counts[1]) <= 1
        assert all(isinstance(s["tuner.r"], int) and 1 <= s["tuner.r"] <= 64 for s in found)
    assert design([RATE, GAMMA], 6, 1) == design([RATE, GAMMA], 6, 1) != design([RATE, GAMMA], 6, 2)


def test_a_design_does_not_tie_two_axes_together():
    """Of many draws the most spread out is taken: no learning-rate half is tried with one gamma alone."""
    for seed in range(20):
        found = design([RATE, GAMMA], 6, seed)
        for half in (True, False):
            assert {s["tuner.gamma"] for s in found if (s[LEARNING_RATE] < 1e-3) is half} == {0.2, 0.5}


@pytest.mark.parametrize(
    "entry", [("log", 0, 1), ("log", 2, 1), ("uniform", 1, 1), ("choice", []), ("grid", 1, 2), ("log", 1)]
)
def test_an_axis_that_cannot_be_is_refused(entry):
    with pytest.raises(ConfigError, match=r"tuner.gamma is \["):
        Axis.make("tuner.gamma", entry)


def test_only_training_and_tuner_are_searched():
    with pytest.raises(ConfigError, match="'seed' is no key of training or tuner"):
        Axis.make("seed", ("log", 1, 2))


def test_a_fixed_key_leaves_the_search_and_the_learning_rate_must_stay():
    search = {LEARNING_RATE: ("log", 1e-4, 1e-2), "tuner.gamma": ("choice", [0.2, 0.5])}
    assert [a.key for a in make_space("m", search, ["tuner.gamma", "training.epochs"], {})] == [LEARNING_RATE]
    with pytest.raises(ConfigError, match="it is what is searched"):
        make_space("m", search, [LEARNING_RATE], {})
    with pytest.raises(ConfigError, match="m has nothing to search"):
        make_space("m", {}, [], {})
    closed_form = {"tuner.options.lam": ("log", 1, 10)}
    assert [a.key for a in make_space("m", closed_form, [LEARNING_RATE], {})] == ["tuner.options.lam"]


def test_ranges_of_the_command_line():
    spaces = {
        "one": {LEARNING_RATE: ("log", 1e-4, 1e-2), "tuner.gamma": ("choice", [1])},
        "two": {LEARNING_RATE: ("log", 1e-5, 1e-3), "tuner.r": ("log", 1, 8)},
    }
    assert parse_ranges([f"{LEARNING_RATE}=1e-6:1"], spaces) == {
        "one": {LEARNING_RATE: ("log", 1e-6, 1.0)}, "two": {LEARNING_RATE: ("log", 1e-6, 1.0)},
    }  # fmt: skip
    assert parse_ranges(["two:tuner.r=2:64"], spaces) == {"one": {}, "two": {"tuner.r": ("log", 2, 64)}}
    for wrong, words in {
        "tuner.r=2": "write it as KEY=LOW:HIGH", "three:tuner.r=1:2": "'three' is not among --methods",
        "tuner.gamma=0:1": "no range of 'tuner.gamma'", "training.learning_rat=1:2": "did you mean 'training.learning_rate'",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            parse_ranges([wrong], spaces)


# --- optuna's database ---

SEARCH = """
import math, sys
from pathlib import Path
from keeplora.study.search import Axis, LEARNING_RATE, Searcher
axes = [Axis(LEARNING_RATE, "log", 1e-4, 1e-2), Axis("tuner.gamma", "choice", values=(0.2, 0.5)), Axis("tuner.r", "log", 1, 64)]
searcher = Searcher(Path(sys.argv[1]), "lora", axes, 6, 0)
def tell(trial):
    value = -((math.log10(trial.settings[LEARNING_RATE]) + 3) ** 2)
    searcher.tell(trial.number, None if trial.number == 3 else value, 1.0, "diverged")
for trial in searcher.trials():
    if trial.state == "running":
        tell(trial)
while len(searcher.trials()) < 10:
    trial = searcher.ask()
    print("asked", trial.number, flush=True)
    tell(trial)
for trial in searcher.trials():
    print(trial)
"""


@pytest.mark.slow
def test_proposals_do_not_depend_on_kills(tmp_path):
    """Killed (SIGKILL) at several moments, the database goes on as if it had never been."""

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SEARCH, str(tmp_path / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    straight, errors = start("straight.db").communicate()
    assert straight.count("state='finished'") == 9, errors
    assert straight.count("error='diverged'") == 1
    assert straight.count("proposed_by='tpe'") == 4
    draw, kills = random.Random(0), 0
    while kills < 6:
        process = start("killed.db")
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first.startswith("asked"):
            process.communicate()
            break
        time.sleep(draw.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills  # how many depends on how quick the machine is
    assert start("killed.db").communicate()[0].splitlines()[-10:] == straight.splitlines()[-10:]


def test_tpe_waits_for_earlier_trials_and_learns_from_them(tmp_path):
    searcher = Searcher(tmp_path / "o.db", "lora", [RATE], 6, 0)
    begun = [searcher.ask() for _ in range(6)]
    assert all(trial is not None and trial.proposed_by == "design" for trial in begun)
    assert searcher.ask() is None
    for trial in begun:
        searcher.tell(trial.number, -abs(math.log10(trial.settings[LEARNING_RATE]) + 2.4), 1.0)
    after = []
    for _ in range(8):
        trial = searcher.ask()
        assert trial is not None
        assert trial.proposed_by == "tpe"
        assert searcher.ask() is None
        after.append(abs(math.log10(trial.settings[LEARNING_RATE]) + 2.4))
        searcher.tell(trial.number, -after[-1], 1.0)
    assert sorted(after)[4] < 0.45  # of draws at random the middle one would be 0.6 away


def test_a_damaged_database_is_told(tmp_path):
    (tmp_path / "o.db").write_bytes(b"nothing that SQLite knows" * 50)
    with pytest.raises(KeepLoraError, match="cannot be used as optuna's database"):
        Searcher(tmp_path / "o.db", "lora", [RATE], 2, 0)


# --- a whole search whose trials are made up, so that there can be many ---


class FakeRuns:
    """In place of `keeplora run` processes: a run directory whose matrix is a function of the learning rate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draw = random.Random(0)
        self.begun: list[str] = []
        self.at_once = self.most = 0
        self.fails = lambda config: None
        monkeypatch.setattr(module, "POLL", 0)
        monkeypatch.setattr(module.subprocess, "Popen", self.popen)

    def popen(self, words, **_):
        assert words[1:4] == ["-m", "keeplora", "run"]
        self.begun.append("/".join(Path(words[6]).parts[-2:]))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        left = self.draw.randrange(3)

        def poll():
            nonlocal left
            left -= 1
            if process.returncode is None and left < 0:
                process.returncode = self.end(read_yaml(words[4])[0], Path(words[6]))
                self.at_once -= 1
            return process.returncode

        process = SimpleNamespace(returncode=None, poll=poll, send_signal=lambda s: None, wait=lambda t=None: 0)
        process.kill = lambda: None
        return process

    def end(self, config, folder) -> int:
        error = self.fails(config)
        if error == "never began":
            folder.with_suffix(".log").write_text("some line\nError: no such model\n")
            return 1
        rate = config["training"]["learning_rate"]
        value = 60.0 - 20.0 * abs(math.log10(rate) + 2.7)
        with RunDirectory.create(folder) as run:
            run.write_config(config)
            if error:
                run.set_status(state="failed", error=error)
                return 1
            k = config["first_tasks"]
            matrix = [[0.0] * k, *[[value + j for j in range(k)]] * k]
            mean = sum(matrix[1]) / k
            run.write_results({"accuracy": matrix, "metrics": {"average": mean}, "evaluate_on": config["evaluate_on"]})
            run.set_status(state="finished", tasks_done=k)
        return 0


@pytest.fixture
def fake(monkeypatch):
    return FakeRuns(monkeypatch)


def plan(folder: Path, **changes) -> TunePlan:
    values = {"source": SOURCE, "methods": ("lora", "keeplora++"), "output": folder, "trials": 3, "jobs": 1}
    return TunePlan(**{**values, **changes})


def told(outcome: Outcome) -> dict:
    return {m: [(t.number, t.settings, t.criterion, t.error) for t in ts] for m, ts in outcome.trials.items()}


def test_every_method_gets_the_same_number_of_trials_in_turn(tmp_path, fake):
    lines: list[str] = []
    outcome = tune(plan(tmp_path / "t"), lines.append)
    assert [len(ts) for ts in outcome.trials.values()] == [3, 3]
    assert [name.split("/")[0] for name in fake.begun] == ["lora", "keeplora++"] * 3
    assert len(lines) == 6
    best = outcome.best("lora")
    assert best.settings[LEARNING_RATE] == 0.001  # nearest to the made-up best, 10 ** -2.7
    assert best.criterion == max(t.criterion for t in outcome.trials["lora"])
    # Again: everything is read back, nothing is run.
    begun = len(fake.begun)
    assert told(tune(plan(tmp_path / "t"))) == told(outcome)
    assert len(fake.begun) == begun


def test_jobs_do_not_change_what_is_found(tmp_path, fake, monkeypatch):
    """Two of seven trials are TPE's, and each waits for all before it."""
    monkeypatch.setattr(tune_plan, "DESIGN", 5)
    one = tune(plan(tmp_path / "one", methods=("lora",), trials=7))
    assert fake.most == 1
    four = tune(plan(tmp_path / "four", methods=("lora",), trials=7, jobs=4))
    assert fake.most == 4
    assert told(four) == told(one)
    assert [t.proposed_by for t in one.trials["lora"]] == ["design"] * 5 + ["tpe"] * 2


def test_a_search_can_grow_by_trials_and_methods_alone(tmp_path, fake):
    first = tune(plan(tmp_path / "t"))
    grown = tune(plan(tmp_path / "t", trials=4, methods=("lora", "keeplora++", "ewc")))
    assert [len(ts) for ts in grown.trials.values()] == [4, 4, 4]
    for method in ("lora", "keeplora++"):
        assert told(grown)[method][:3] == told(first)[method]
    for changes, words in {
        ("trials", 3): "holds 4 trials a method", ("methods", ("lora",)): "also holds ewc, keeplora",
        ("seed", 7): "another seed", ("tasks", 3): "another first_tasks", ("validation", 0.5): "another validation",
        ("settings", ("training.epochs=1",)): "another training", ("order", "shuffle-1"): "another order",
        ("ranges", (f"lora:{LEARNING_RATE}=1e-3:1",)): "another range of training.learning_rate",
    }.items():  # fmt: skip
        same = {"trials": 4, "methods": ("lora", "keeplora++", "ewc")}
        with pytest.raises(KeepLoraError, match=words):
            tune(plan(tmp_path / "t", **{**same, changes[0]: changes[1]}))


def test_what_a_trial_runs(tmp_path, fake):
    tune(plan(tmp_path / "t", trials=1, methods=("lora",), settings=("training.epochs=7",), order="shuffle-3", seed=5))
    values, _ = read_yaml(tmp_path / "t/lora/trial-00.yaml")
    config = load_config(values)
    assert (config.evaluate_on, config.first_tasks, config.validation) == ("validation", 2, 0.25)
    assert (config.seed, config.training.epochs, config.threads, config.order_name) == (5, 7, 1, "shuffle-3")
    assert config.training.learning_rate == 0.001  # one trial: the middle of the range


@pytest.mark.parametrize(("own", "asked", "held"), [(None, None, 0.25), (0.4, None, 0.4), (0.4, 0.1, 0.1)])
def test_the_share_held_out(tmp_path, own, asked, held):
    assert (
        plan(tmp_path, source={**SOURCE, "validation": own}, validation=asked).config("lora", {}, 1).validation == held
    )


def test_a_failed_trial_is_told_and_costs_no_other(tmp_path, fake):
    fake.fails = lambda c: "FloatingPointError: the loss is nan" if c["training"]["learning_rate"] > 2e-3 else None
    outcome = tune(plan(tmp_path / "t", methods=("lora",), trials=4))
    assert sorted(t.state for t in outcome.trials["lora"]) == ["failed", "finished", "finished", "finished"]
    failed = [t for t in outcome.trials["lora"] if t.state == "failed"]
    assert {t.settings[LEARNING_RATE] for t in failed} == {0.00562}
    assert report.failures(outcome) == [f"lora, trial {failed[0].number}: failed: FloatingPointError: the loss is nan"]
    assert outcome.best("lora").settings[LEARNING_RATE] == 0.00178
    # The largest that worked is not at an edge: a larger one was tried, and diverged.
    assert report.edges(outcome) == []
    begun = len(fake.begun)
    tune(plan(tmp_path / "t", methods=("lora",), trials=4))
    assert len(fake.begun) == begun  # a failed trial has been one of the four


def test_a_method_whose_trials_all_fail_is_left_out_and_told(tmp_path, fake):
    fake.fails = lambda c: "it broke" if c["method"] == "lora" else None
    outcome = tune(plan(tmp_path / "t"))
    with pytest.raises(KeepLoraError, match=r"every trial of lora failed.*it broke"):
        report.write_all(outcome)
    values, _ = read_yaml(tmp_path / "t/tuned.yaml")
    assert list(values["per_method"]) == ["keeplora++"]
    assert values["search"]["failed"] == {"lora": 3}


def test_what_cannot_begin_stops_the_search_at_once(tmp_path, fake):
    fake.fails = lambda c: "never began"
    with pytest.raises(KeepLoraError, match="lora could not begin: no such model"):
        tune(plan(tmp_path / "t"))
    assert len(fake.begun) == 1
    fake.fails = lambda c: None  # the model is there now: the same call goes on, with all trials
    outcome = tune(plan(tmp_path / "t"))
    assert [t.state for ts in outcome.trials.values() for t in ts] == ["finished"] * 6


def test_a_run_that_is_not_on_validation_pictures_is_no_trial(tmp_path, fake, monkeypatch):
    end = fake.end
    fake.end = lambda config, folder: end({**config, "evaluate_on": "test"}, folder)
    outcome = tune(plan(tmp_path / "t", methods=("lora",), trials=1))
    assert outcome.trials["lora"][0].state == "failed"
    assert "not those of a trial on validation pictures" in outcome.trials["lora"][0].error


def test_files_of_a_search(tmp_path, fake):
    outcome = tune(plan(tmp_path / "t", ranges=(f"lora:{LEARNING_RATE}=1e-6:1e-3",), trials=4))
    written = report.write_all(outcome)
    assert [path.name for path in written] == ["tuned.yaml", "trials.csv", "trials.png"]

    # lora's best lies above its range, keeplora++'s within.
    assert report.edges(outcome) == [("lora", outcome.spaces["lora"][0], "upper")]
    (line,) = report.edge_warnings(outcome)
    assert "the largest that was tried, at the upper edge of its range (1e-06 to 0.001)" in line

    values, _ = read_yaml(tmp_path / "t/tuned.yaml")
    assert values["per_method"]["lora"] == {"training": {"learning_rate": 0.000422}}
    best = outcome.best("keeplora++")
    assert values["per_method"]["keeplora++"] == {
        "training": {"learning_rate": best.settings[LEARNING_RATE]}, "tuner": {"gamma": best.settings["tuner.gamma"]},
    }  # fmt: skip
    assert values["search"]["tasks"] == ["a", "b"]
    assert values["search"]["versions"]["optuna"] == optuna.__version__
    # As compare and an experiment take it.
    assert read_per_method(tmp_path / "t/tuned.yaml", tmp_path) == values["per_method"]
    config = load_config(
        {**SOURCE, "per_method": values["per_method"]}, {"method": "lora"}, known_methods=method_names()
    )
    assert config.training.learning_rate == 0.000422

    rows = list(csv.DictReader((tmp_path / "t/trials.csv").open()))
    assert len(rows) == 8
    for row in rows:
        trial = outcome.trials[row["method"]][int(row["trial"])]
        assert float(row["average"]) == trial.criterion
        assert float(row[LEARNING_RATE]) == trial.settings[LEARNING_RATE]
        assert (tmp_path / "t" / row["folder"] / "results.json").is_file()
    assert {row["tuner.gamma"] for row in rows if row["method"] == "lora"} == {""}
    assert (tmp_path / "t/trials.png").read_bytes().startswith(b"\x89PNG")


def test_on_a_tie_the_smaller_learning_rate_wins(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(module, "read_criterion", lambda folder, tasks: (50.0, ""))
    outcome = tune(plan(tmp_path / "t", methods=("lora",), trials=4, seed=4))
    rates = [t.settings[LEARNING_RATE] for t in outcome.trials["lora"]]
    assert rates[0] != min(rates)  # or the first would win by being first
    assert outcome.best("lora").settings[LEARNING_RATE] == min(rates)


def test_refusals(tmp_path, fake):
    for changes, words in {
        ("methods", ("zero-shot",)): "zero-shot learns nothing", ("methods", ("lorra",)): "did you mean 'lora'",
        ("trials", 0): "--trials is 0", ("tasks", 4): "first_tasks is 4, but there are 3 tasks",
        ("settings", ("evaluate_on=test",)): "a search always measures validation pictures",
        ("settings", ("seed=3",)): "use --seed", ("settings", (f"{LEARNING_RATE}=1",)): "it is what is searched",
        ("settings", ("training.epoch=3",)): "unknown key 'epoch'", ("validation", 1.5): "between 0 and 1",
    }.items():  # fmt: skip
        with pytest.raises(KeepLoraError, match=words):
            tune(plan(tmp_path / "t", **{changes[0]: changes[1]}))
        assert not (tmp_path / "t").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(KeepLoraError, match=r"is not empty \(letter.txt\) and no search"):
        tune(plan(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_without_optuna_the_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(KeepLoraError, match=r"pip install 'keeplora\[tune\]'"):
        tune(plan(tmp_path / "t"))
    assert not (tmp_path / "t").exists()


def test_tune_json_is_read_back_and_damage_is_told(tmp_path, fake):
    tune(plan(tmp_path / "t", methods=("lora",), trials=1))
    record = json.loads((tmp_path / "t/tune.json").read_text())
    assert (record["format"], record["trials"], record["design"]) == ("keeplora-tune", 1, 1)
    (tmp_path / "t/tune.json").write_text("{")
    with pytest.raises(KeepLoraError, match=r"tune.json is damaged"):
        tune(plan(tmp_path / "t", methods=("lora",), trials=1))
