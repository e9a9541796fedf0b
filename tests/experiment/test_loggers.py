"""Loggers: what stands in the files of each real backend, and that none of them can cost a run."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from keeplora.errors import ConfigError
from keeplora.experiment import Experiment
from keeplora.experiment import loggers as package
from keeplora.experiment.loggers import LOGGERS, Loggers, check_loggers
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.runner import STOP_AFTER
from tests.cli.tiny_world import TASKS, results_of

CHECKOUT = Path(__file__).resolve().parents[2]


def needs(name: str) -> None:
    missing = [module for module in LOGGERS[name].needs if not package._installed(module)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


@pytest.fixture
def told(world, tmp_path):
    """A finished run's configuration and events, and a folder for what is logged of them."""
    path, results = world.run()
    run = RunDirectory(path)
    return SimpleNamespace(
        config=run.read_config(), events=run.read_events(), results=results, folder=tmp_path / "a-run"
    )


class Keeping:
    """A logger that keeps what it is told, and raises where it is asked to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def _note(self, name, *values):
        self.calls.append((name, *values))
        if self.fails == name:
            raise ConnectionError(f"no route from {name}\nsecond line")

    def start(self, config, folder, name, project, resumed_at):
        self._note("start", folder.is_dir(), name, project, resumed_at)

    def log(self, values, step):
        self._note("log", dict(values), step)

    def finish(self, status):
        self._note("finish", status)


def opened(monkeypatch, told, logger, resumed=False):
    lines: list[str] = []
    monkeypatch.setattr(package, "_make", lambda name: logger)
    monkeypatch.setattr(package, "_installed", lambda module: True)
    return Loggers.open(["wandb"], told.config, told.folder, resumed, warn=lines.append), lines


def expected_points(told) -> dict[tuple[str, int], float]:
    """(name, step) -> value of a whole run, worked out from results.json alone."""
    points, step, results = {}, 0, told.results
    for i, (row, probes) in enumerate(zip(results["accuracy"], results["probe_accuracy"], strict=True)):
        if i:
            info = results["tasks_info"][i - 1]
            for epoch in info["epochs"]:
                step += 1
                points[f"loss/{info['name']}", step] = epoch["loss"]
                points[f"train_accuracy/{info['name']}", step] = epoch["train_accuracy"]
                points[f"data_wait/{info['name']}", step] = epoch["data_wait"]
                points["lr", step] = epoch["lr"]
            points |= {(f"seconds/{key}", step): value for key, value in info["seconds"].items()}
        points |= {(f"accuracy/{task}", step): value for task, value in zip(results["tasks"], row, strict=True)}
        points |= {(f"probe/{probe}", step): value for probe, value in zip(results["probes"], probes, strict=True)}
        points["metrics/last", step] = sum(row) / len(row)
    return points


def tell(told, names, **options) -> list[str]:
    """Log the whole run; returns the warnings."""
    lines: list[str] = []
    loggers = Loggers.open(names, told.config, told.folder, False, warn=lines.append, **options)
    for event in told.events:
        loggers.event(event)
    loggers.close("finished")
    return lines


# --- translation and isolation, with a logger of our own ---


def test_every_number_of_a_run_is_told_once_at_its_epoch(monkeypatch, told):
    logger = Keeping()
    loggers, lines = opened(monkeypatch, told, logger)
    for event in told.events:
        loggers.event(event)
    loggers.close("finished")
    loggers.close("finished")
    assert logger.calls[0] == ("start", True, "keeplora++-a-run", "experiment", None)
    assert logger.calls[-1] == ("finish", "finished")
    assert [call[0] for call in logger.calls].count("finish") == 1
    told_points = [((key, step), value) for _, values, step in logger.calls[1:-1] for key, value in values.items()]
    assert dict(told_points) == pytest.approx(expected_points(told))
    assert len(dict(told_points)) == len(told_points)
    steps = [call[2] for call in logger.calls[1:-1]]
    assert steps == sorted(steps)
    assert max(steps) == 2 * len(TASKS)  # epochs count through the whole sequence
    assert dict(told_points)["metrics/last", max(steps)] == pytest.approx(told.results["metrics"]["last"])
    # A row of accuracies is one moment, not one per set.
    assert sum("metrics/last" in call[1] for call in logger.calls[1:-1]) == len(TASKS) + 1
    assert lines == []


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_logger_that_fails_is_switched_off_with_one_line(monkeypatch, told, where):
    logger = Keeping(fails=where)
    loggers, lines = opened(monkeypatch, told, logger)
    for event in told.events:
        loggers.event(event)
    loggers.close("failed")
    assert [call[0] for call in logger.calls].count(where) == 1
    assert logger.calls[-1][0] == where  # nothing is asked of it afterwards
    assert len(lines) == 1
    assert "wandb logger failed and is switched off" in lines[0]
    assert lines[0].endswith(f"no route from {where}")


def test_one_failing_logger_does_not_stop_the_other(monkeypatch, told):
    good, bad = Keeping(), Keeping(fails="log")
    monkeypatch.setattr(package, "_make", lambda name: {"wandb": bad, "tensorboard": good}[name])
    monkeypatch.setattr(package, "_installed", lambda module: True)
    lines: list[str] = []
    loggers = Loggers.open(["wandb", "tensorboard"], told.config, told.folder, False, warn=lines.append)
    for event in told.events:
        loggers.event(event)
    loggers.close("finished")
    assert len(lines) == 1
    assert good.calls[-1] == ("finish", "finished")
    assert sum(call[0] == "log" for call in good.calls) > 5


def test_a_resumed_run_goes_on_at_its_epoch(monkeypatch, told):
    """metrics.jsonl with one finished task: the next epoch is the third."""
    with RunDirectory.create(told.folder) as run:
        for event in told.events:
            run.append_event(event)
        run.cut_events(1)
    logger = Keeping()
    loggers, _ = opened(monkeypatch, told, logger, resumed=True)
    loggers.event({"event": "epoch", "task": "stripes", "epoch": 1, "loss": 0.5, "train_accuracy": 50.0, "lr": 0.1})
    assert logger.calls[0][-1] == 2
    assert logger.calls[1][2] == 3


def test_a_run_that_fails_after_an_evaluation_has_told_it(monkeypatch, told):
    logger = Keeping()
    loggers, _ = opened(monkeypatch, told, logger)
    ends = [i for i, event in enumerate(told.events) if event["event"] == "epoch"]
    for event in told.events[: ends[0]]:  # row 0, and then the first task fails
        loggers.event(event)
    loggers.close("failed")
    (_, values, step), finish = logger.calls[1:]
    assert step == 0
    assert values == {key: value for (key, at), value in expected_points(told).items() if at == 0}
    assert finish == ("finish", "failed")


def test_values_that_are_not_finite_are_left_out(monkeypatch, told):
    logger = Keeping()
    loggers, lines = opened(monkeypatch, told, logger)
    loggers.event({"event": "epoch", "task": "a", "epoch": 1, "loss": None, "train_accuracy": float("nan"), "lr": 0.1})
    assert logger.calls[1:] == [("log", {"lr": 0.1}, 1)]
    assert lines == []


def test_unknown_twice_and_not_installed_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown name 'tensorbord'; did you mean 'tensorboard'"):
        check_loggers(["tensorbord"])
    monkeypatch.setattr(package, "_installed", lambda module: True)
    with pytest.raises(ConfigError, match="given twice"):
        check_loggers(["wandb", "wandb"])
    monkeypatch.setattr(package, "_installed", lambda module: False)
    for name, command in {"wandb": "pip install wandb`", "mlflow": "pip install mlflow`"}.items():
        with pytest.raises(ConfigError, match=command):
            Loggers.open([name], {}, tmp_path / "run", False)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(package, "_installed", lambda module: module == "mlflow")  # mlflow-skinny
    with pytest.raises(ConfigError, match="pip install sqlalchemy alembic`"):
        check_loggers(["mlflow"])


def test_a_folder_called_wandb_is_not_an_installed_wandb(tmp_path, monkeypatch):
    (tmp_path / "nothing_like_it").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not package._installed("nothing_like_it")
    assert package._installed("json")


# --- the real ones ---


def test_tensorboard_files_hold_every_number(told):
    needs("tensorboard")
    assert tell(told, ["tensorboard"]) == []
    assert tensorboard_points(told.folder) == pytest.approx(expected_points(told), abs=1e-4, rel=1e-5)


def tensorboard_points(run: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "loggers/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [((tag, e.step), e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len(dict(points)) == len(points)  # nothing is shown twice
    return dict(points)


def test_tensorboard_shows_a_resumed_run_once(told):
    """Killed within task 2: what it told of that task gives way to what the resumed run tells."""
    needs("tensorboard")
    ends = [i for i, event in enumerate(told.events) if event["event"] == "task_finished"]
    with RunDirectory.create(told.folder) as run:
        for event in told.events[: ends[0] + 1]:
            run.append_event(event)
    first = Loggers.open(["tensorboard"], told.config, told.folder, False)
    for event in told.events[: ends[0] + 1]:
        first.event(event)
    first.event({"event": "epoch", "task": "stripes", "epoch": 1, "loss": 99.0, "train_accuracy": 0.0, "lr": 9.0})
    for logger in first._active.values():  # the process dies here: nothing is closed
        logger._writer.flush()
    again = Loggers.open(["tensorboard"], told.config, told.folder, True)
    for event in told.events[ends[0] + 1 :]:
        again.event(event)
    again.close("finished")
    assert tensorboard_points(told.folder) == pytest.approx(expected_points(told), abs=1e-4, rel=1e-5)


def test_wandb_offline_run_holds_the_numbers(told, monkeypatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tell(told, ["wandb"]) == []
    (folder,) = (told.folder / "loggers/wandb/wandb").glob("offline-run-*")
    run_id = (told.folder / "loggers/wandb/id.txt").read_text()
    (file,) = folder.glob("*.wandb")
    assert file.stem == f"run-{run_id}"
    until = time.monotonic() + 60  # wandb's own process writes the file; on a busy machine it is behind
    while len(wandb_points(file)) < len(expected_points(told)) and time.monotonic() < until:
        time.sleep(0.2)
    assert wandb_points(file) == pytest.approx(expected_points(told))

    again = Loggers.open(["wandb"], told.config, told.folder, True)
    again.close("interrupted")
    assert len(list((told.folder / "loggers/wandb/wandb").glob(f"offline-run-*-{run_id}"))) >= 1
    assert (told.folder / "loggers/wandb/id.txt").read_text() == run_id


def wandb_points(file: Path) -> dict[tuple[str, int], float]:
    """What an offline run's file holds: records in LevelDB's log format behind seven bytes of header."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, points = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # the end of a block is padding
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in message.history.item}
            points |= {(k, values["epochs"]): v for k, v in values.items() if k != "epochs" and not k.startswith("_")}
            record = b""
    return points


def test_mlflow_database_holds_the_numbers(told, monkeypatch):
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told.events[0]["set"] = "paint+"  # a task name that MLflow's rules for names refuse
    assert tell(told, ["mlflow"]) == []
    run_id = (told.folder / "loggers/mlflow/run_id.txt").read_text()
    expected = expected_points(told)
    expected["accuracy/paint_", 0] = expected.pop(("accuracy/paint", 0))
    assert mlflow_points(told.folder, run_id) == pytest.approx(expected)
    with sqlite3.connect(told.folder / "loggers/mlflow/mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("FINISHED",)]
        params = dict(db.execute("select key, value from params").fetchall())
    assert params["tuner.r"] == "4"
    assert params["method"] == "keeplora++"
    assert not Path("mlruns").exists()

    again = Loggers.open(["mlflow"], told.config, told.folder, True)
    again.close("interrupted")
    with sqlite3.connect(told.folder / "loggers/mlflow/mlflow.db") as db:
        assert db.execute("select run_uuid, status from runs").fetchall() == [(run_id, "KILLED")]


def mlflow_points(run: Path, run_id: str) -> dict[tuple[str, int], float]:
    with sqlite3.connect(run / "loggers/mlflow/mlflow.db") as db:
        rows = db.execute("select key, step, value from metrics where run_uuid = ?", (run_id,)).fetchall()
    return {(key, step): value for key, step, value in rows}


TRACKIO = """
import json, sys
from pathlib import Path
from keeplora.experiment.loggers import Loggers
told = json.loads(Path(sys.argv[1]).read_text())
def no(line): sys.exit(line)
cut = told["cut"]
loggers = Loggers.open(["trackio"], told["config"], sys.argv[2], cut is not None, warn=no)
for event in told["events"][cut or 0 :]:
    loggers.event(event)
loggers.close("finished")
"""


def test_trackio_database_holds_the_numbers(told, tmp_path):
    """In a process of its own: trackio decides at import where its database is, and it needs an older Pillow."""
    needs("trackio")
    file = tmp_path / "told.json"
    file.write_text(json.dumps({"config": told.config, "events": told.events, "cut": None}))
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "place"), "PYTHONPATH": str(CHECKOUT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(file), str(told.folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    (database,) = (tmp_path / "place").glob("experiment*.db")
    with sqlite3.connect(database) as db:
        rows = db.execute("select run_name, step, metrics from metrics").fetchall()
    assert {row[0] for row in rows} == {(told.folder / "loggers/trackio/name.txt").read_text()}
    points = {(key, step): value for _, step, text in rows for key, value in json.loads(text).items()}
    assert points == pytest.approx(expected_points(told))


# --- through a run ---


def test_a_run_logs_what_it_records(world, tmp_path):
    needs("tensorboard")
    results = Experiment(world.config(loggers=["tensorboard"], output=str(tmp_path / "run")), quiet=True).run()
    told = SimpleNamespace(results=results)
    assert tensorboard_points(tmp_path / "run") == pytest.approx(expected_points(told), abs=1e-4, rel=1e-5)
    assert results["accuracy"] == world.run()[1]["accuracy"]  # logging changes no number


def test_an_interrupted_run_goes_on_in_its_logs(world, tmp_path, monkeypatch):
    logger = Keeping()
    monkeypatch.setattr(package, "_make", lambda name: logger)
    monkeypatch.setattr(package, "_installed", lambda module: True)
    monkeypatch.setenv(STOP_AFTER, "1")
    with pytest.raises(KeyboardInterrupt):
        Experiment(world.config(loggers=["wandb"], output=str(tmp_path / "run")), quiet=True).run()
    assert logger.calls[-1] == ("finish", "interrupted")
    monkeypatch.delenv(STOP_AFTER)
    Experiment.resume(tmp_path / "run", quiet=True)
    assert [call[-1] for call in logger.calls if call[0] == "start"] == [None, 2]
    assert logger.calls[-1] == ("finish", "finished")
    points = [((key, c[2]), value) for c in logger.calls if c[0] == "log" for key, value in c[1].items()]
    assert len(dict(points)) == len(points)  # nothing twice
    told = SimpleNamespace(results=results_of(tmp_path / "run"))
    assert dict(points) == pytest.approx(expected_points(told))


def test_a_logger_that_is_not_installed_stops_the_run_before_it_begins(world, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "_installed", lambda module: False)
    with pytest.raises(ConfigError, match="pip install trackio"):
        Experiment(world.config(loggers=["trackio"], output=str(tmp_path / "run")), quiet=True).run()
    assert not (tmp_path / "run").exists()


def test_a_failing_logger_does_not_cost_the_run(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(package, "_installed", lambda module: True)
    monkeypatch.setattr(package, "_make", lambda name: Keeping(fails="log"))
    results = Experiment(world.config(loggers=["wandb"], output=str(tmp_path / "run")), quiet=True).run()
    assert results["accuracy"] == world.run()[1]["accuracy"]
    assert capsys.readouterr().err.count("no route from log") == 1
