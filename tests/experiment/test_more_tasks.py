"""Further tasks for a finished run: it ends as a run ends that had them from the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from keeplora.errors import ConfigError, DataError, KeepLoraError
from keeplora.experiment import Experiment
from keeplora.experiment import runner as runner_module
from keeplora.experiment import training as training_module
from keeplora.experiment.looking_back import LookingBack
from keeplora.experiment.run_directory import RunDirectory
from keeplora.experiment.runner import STOP_AFTER
from keeplora.experiment.serving import TrainedModel
from keeplora.tuner import Ledger
from keeplora.yaml_text import dump_yaml
from tests.cli.tiny_world import TASKS, ledger_tensors, results_of, same_tensors, status_of
from tests.experiment.generation_world import make_world

PER_TASK = ("name", "epochs", "best_epoch", "trained_parameters", "accepted", "rank_shrunk", "not_adapted", "frozen")


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    monkeypatch.setattr(runner_module, "render_report", lambda path: None)


def specs(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "source": "folder", "path": name} for name in names]


def file_with(folder: Path, *names: str, **more: Any) -> Path:
    path = folder / "more.yaml"
    path.write_text(dump_yaml({"tasks": specs(*names), **more}), encoding="utf-8")
    return path


def started(world: Any, to: Path, names: tuple[str, ...], **changes: Any) -> Path:
    """A private copy of a finished run of the named tasks."""
    run, _ = world.run(tasks=specs(*names), **changes)
    return world.copied(run, to)


def without_times(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "data_wait")
    return [{k: v for k, v in one.items() if k not in timed} for one in told]


def ordered(events: list[dict[str, Any]]) -> list[str]:
    """Events by their rows; inside a row the sets in any order."""
    rows: list[list[str]] = [[]]
    for event in without_times(events):
        text = json.dumps(event, sort_keys=True)
        if event["event"] == "evaluation":
            rows[-1].append(text)
        else:
            rows += [[text], []]
    return [text for row in rows for text in sorted(row)]


def assert_as_from_the_start(path: Path, straight: Path) -> None:
    one, other = results_of(path), results_of(straight)
    for key in ("tasks", "probes", "accuracy", "probe_accuracy", "metrics", "layers", "capacity", "audit", "comparison_key",
                "chance", "test_counts", "warnings"):  # fmt: skip
        assert one[key] == other[key], key
    told = [[{k: info[k] for k in PER_TASK} for info in without_epoch_times(r["tasks_info"])] for r in (one, other)]
    assert told[0] == told[1]
    assert same_tensors(ledger_tensors(path), ledger_tensors(straight))
    assert ordered(RunDirectory(path).read_events()) == ordered(RunDirectory(straight).read_events())
    kept = [[e.metrics() for e in Ledger.open(p / "ledger").entries()] for p in (path, straight)]
    assert [{k: m[k] for k in ("score", "tasks", "probes")} for m in kept[0]] == [
        {k: m[k] for k in ("score", "tasks", "probes")} for m in kept[1]
    ]
    assert [d["fingerprint"] for d in RunDirectory(path).read_data()] == [
        d["fingerprint"] for d in RunDirectory(straight).read_data()
    ]
    status = status_of(path)
    assert (status["state"], status["tasks_done"], status["error"]) == ("finished", len(one["tasks"]), None)


def without_epoch_times(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**info, "epochs": without_times(info["epochs"])} for info in infos]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("keeplora++", {}),
        ("keeplora++", {"candidates": "seen"}),
        ("keeplora++", {"candidates": "all"}),
        ("keeplora++-cls", {}),
        ("lora", {"validation": 0.2, "best_epoch": True}),
        ("replay", {}),
        ("ewc", {}),
        ("rail-primal", {}),
        ("moelora", {}),
        ("oracle", {}),
        ("zero-shot", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_run_with_tasks_added_is_the_run_that_had_them_from_the_start(world, tmp_path, method, changes):
    straight, _ = world.run(method=method, **changes)
    path = started(world, tmp_path / "run", TASKS[:1], method=method, **changes)
    Experiment.resume(path, quiet=True, add_tasks={"tasks": specs(*TASKS), "base_dir": str(world.root)})
    assert_as_from_the_start(path, straight)


def test_one_after_the_other_is_the_same(world, tmp_path):
    straight, _ = world.run()
    path = started(world, tmp_path / "run", TASKS[:1])
    for name in TASKS[1:]:
        Experiment.resume(path, quiet=True, add_tasks={"tasks": specs(name), "base_dir": str(world.root)})
    assert_as_from_the_start(path, straight)


def test_paths_start_where_the_file_is(world, tmp_path):
    """The file lies elsewhere than the run's, with pictures beside it."""
    path = started(world, tmp_path / "run", TASKS[:2])
    shutil.copytree(world.root / "dots", tmp_path / "new" / "dots")
    Experiment.resume(path, quiet=True, add_tasks=file_with(tmp_path / "new", "dots"))
    assert_as_from_the_start(path, world.run()[0])
    assert RunDirectory(path).read_config()["tasks"][2]["base_dir"] == str(tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "dots")  # and they are looked for there from then on
    with pytest.raises(DataError, match=r"task 'dots': .*new/dots"):
        Experiment.resume(path, quiet=True)


@pytest.fixture
def shop(world, tmp_path):
    """(a suite's file of one's own with two tasks, what writes it with these ones, the rest of an experiment)."""
    values = world.config()
    for name in (*TASKS, "grey"):
        shutil.copytree(world.root / name, tmp_path / "data" / name)
    file = tmp_path / "data" / "shop.yaml"

    def write(*names: str, **more: Any) -> None:
        suite = {"name": "shop", "description": "of a shop", "tasks": specs(*names), "probes": values["probes"], **more}
        file.write_text(dump_yaml(suite), encoding="utf-8")

    own = {key: value for key, value in values.items() if key not in ("tasks", "probes", "base_dir")}
    return file, write, {**own, "suite": str(file), "output": str(tmp_path / "run")}


@pytest.mark.parametrize("orders", [{}, {"orders": {1: ["stripes", "paint"]}}], ids=["as listed", "an order"])
def test_a_suite_of_ones_own_grows(world, shop, orders):
    """The file gets a task more and is given to the run; until then the run is as it was."""
    file, write, config = shop
    write(*TASKS[:2], **orders)
    Experiment(config, quiet=True).run()
    path, before = Path(config["output"]), results_of(Path(config["output"]))
    write(*TASKS, **({"orders": {1: ["dots", *orders["orders"][1]]}} if orders else {}))
    assert TrainedModel(path, device="cpu").tasks == before["tasks"]
    assert Experiment.resume(path, quiet=True)["tasks"] == before["tasks"]
    Experiment.resume(path, quiet=True, add_tasks=file)
    results = results_of(path)
    assert (results["suite"], results["name"]) == (None, "shop")
    straight, _ = world.run(tasks=specs(*before["tasks"], "dots"))
    assert_as_from_the_start(path, straight)
    file.unlink()  # from now on the run has its tasks itself
    assert TrainedModel(path, device="cpu").tasks == [*before["tasks"], "dots"]


def test_what_first_tasks_left_out_stays_out(world, shop):
    file, write, config = shop
    write(*TASKS[:2])
    Experiment({**config, "first_tasks": 1}, quiet=True).run()
    path = Path(config["output"])
    Experiment.resume(path, quiet=True, add_tasks={"tasks": specs("dots"), "base_dir": str(file.parent)})
    assert_as_from_the_start(path, world.run(tasks=specs("paint", "dots"))[0])


STOPS = {
    "before the configuration": (RunDirectory, "write_config"),
    "before the data": (RunDirectory, "write_data"),
    "measuring": (LookingBack, "_row"),
    "after the ledger": (RunDirectory, "replace_evaluations"),
    "after the events": (RunDirectory, "write_results"),
}


@pytest.mark.parametrize("where", [*STOPS, "learning"])
def test_an_interruption_loses_nothing(world, tmp_path, monkeypatch, where):
    straight, _ = world.run()
    path = started(world, tmp_path / "run", TASKS[:1])
    added = {"tasks": specs(*TASKS), "base_dir": str(world.root)}

    def stops(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if where == "learning":
            patched.setenv(STOP_AFTER, "2")
        else:
            patched.setattr(*STOPS[where], stops)
        with pytest.raises(KeyboardInterrupt) as stopped:
            Experiment.resume(path, quiet=True, add_tasks=added)
    assert status_of(path)["state"] == "interrupted"
    if where not in ("before the configuration", "before the data"):
        assert stopped.value.__notes__ == [f"go on with `keeplora resume {path}`"]
    Experiment.resume(path, quiet=True)
    if where == "before the configuration":
        assert results_of(path)["tasks"] == ["paint"]
        Experiment.resume(path, quiet=True, add_tasks=added)
    assert_as_from_the_start(path, straight)


def test_a_checkpoint_of_a_suites_first_tasks_is_used(world, shop, monkeypatch, capsys):
    """Also when the suite has got a task since."""
    _, write, config = shop
    write(*TASKS[:2])
    config = {**config, "first_tasks": 1, "training": {**config["training"], "checkpoint_steps": 1}}
    path = Path(config["output"])
    steps, gradient = [0], training_module._Loop._gradient

    def step(self: Any, *args: Any) -> Any:
        steps[0] += 1
        if steps[0] == 3:
            raise KeyboardInterrupt
        return gradient(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(training_module._Loop, "_gradient", step)
        with pytest.raises(KeyboardInterrupt):
            Experiment(config, quiet=True).run()
    assert (path / "checkpoint").is_dir()
    write(*TASKS)
    Experiment.resume(path, quiet=True)
    told = capsys.readouterr().err
    assert "goes on from its checkpoint" in told
    assert results_of(path)["tasks"] == ["paint"]


def test_a_state_that_was_purged_leaves_its_scores_empty(world, tmp_path):
    path = started(world, tmp_path / "run", TASKS[:2], method="lora")
    ledger = Ledger.open(path / "ledger")
    ledger.remove("paint")
    ledger.purge("paint")
    Experiment.resume(path, quiet=True, add_tasks={"tasks": specs("dots"), "base_dir": str(world.root)})
    results = results_of(path)
    column = [row[2] for row in results["accuracy"]]
    assert column[1:3] == [None, None]
    assert None not in (column[0], column[3])
    assert results["metrics"]["transfer"] is None
    assert results["metrics"]["last"] is not None
    assert any("stays empty" in line and "purged" in line for line in results["warnings"])


def test_settings_of_a_new_task(world, tmp_path):
    path = started(world, tmp_path / "run", TASKS[:1])
    added = {"tasks": specs("stripes"), "base_dir": str(world.root)}
    changes = {"training.epochs.stripes": 3, "training.learning_rate": 0.005}
    Experiment.resume(path, changes, quiet=True, add_tasks=added)
    assert [len(info["epochs"]) for info in results_of(path)["tasks_info"]] == [2, 3]
    with pytest.raises(ConfigError, match=r"-o tuner\.r: a run keeps its settings .* -o training\.epochs\.dots=5"):
        Experiment.resume(path, {"tuner.r": 8}, quiet=True, add_tasks={"tasks": specs("dots")})


def test_settings_that_the_file_gives_the_new_task_by_name(world, tmp_path):
    path = started(world, tmp_path / "run", TASKS[:1], training={"epochs": {"paint": 2}})
    added = {"tasks": specs("paint", "stripes"), "base_dir": str(world.root)}
    with pytest.raises(ConfigError, match=r"gives no value for task 'stripes'.* -o training\.epochs\.stripes=3"):
        Experiment.resume(path, quiet=True, add_tasks=added)
    of_file = {"training": {"epochs": {"paint": 9, "stripes": 1}, "batch_size": 2}, "validation": {"stripes": 0.2}}
    Experiment.resume(path, quiet=True, add_tasks={**added, **of_file})
    assert [len(info["epochs"]) for info in results_of(path)["tasks_info"]] == [2, 1]
    assert [d["validation"] > 0 for d in RunDirectory(path).read_data()[:2]] == [False, True]
    assert RunDirectory(path).read_config()["training"]["batch_size"] == 8


def test_a_suites_file_with_its_data_elsewhere(world, tmp_path):
    """`fetch` is no key of a task, and `data: external` says where its paths start; a `base_dir` of a task starts there too."""
    path = started(world, tmp_path / "run", TASKS[:1])
    shutil.copytree(world.root / "dots", tmp_path / "data" / "more" / "dots")
    suite = {"tasks": [{**specs("dots")[0], "base_dir": "more", "fetch": "by hand"}], "data": "external", "name": "x"}
    config = RunDirectory(path).read_config() | {"data_dir": str(tmp_path / "data")}
    with RunDirectory.open_existing(path) as directory:
        directory.write_config(config)
    Experiment.resume(path, quiet=True, add_tasks=suite)
    assert_as_from_the_start(path, world.run(tasks=specs("paint", "dots"))[0])


def test_files_that_are_damaged_or_missing_stop_it_before_anything_is_written(world, tmp_path):
    added = {"tasks": specs("dots"), "base_dir": str(world.root)}
    for name, says in (
        ("results.json", "results.json is missing: `keeplora resume"),
        ("metrics.jsonl", "line 2: not an event"),
    ):
        path = started(world, tmp_path / name, TASKS[:2])
        if name == "results.json":
            (path / name).unlink()
        else:
            lines = (path / name).read_text().splitlines()
            (path / name).write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
        with pytest.raises(KeepLoraError, match=says):
            Experiment.resume(path, quiet=True, add_tasks=added)
        assert status_of(path)["state"] == "finished"
        assert len(RunDirectory(path).read_config()["tasks"]) == 2
    path = tmp_path / "results.json"
    Experiment.resume(path, quiet=True)  # makes it again
    Experiment.resume(path, quiet=True, add_tasks=added)
    assert results_of(path)["accuracy"] == results_of(world.run()[0])["accuracy"]


def test_a_ledger_that_went_back_behind_the_runs_back(world, tmp_path):
    """The rows that it lacks are measured when it has them again."""
    path = started(world, tmp_path / "run", TASKS[:2])
    Ledger.open(path / "ledger").rollback("paint")
    Experiment.resume(path, quiet=True, add_tasks={"tasks": specs("dots"), "base_dir": str(world.root)})
    assert results_of(path)["accuracy"] == results_of(world.run()[0])["accuracy"]


def test_a_schedule_over_all_tasks_says_that_there_are_more(world, tmp_path):
    path = started(world, tmp_path / "run", TASKS[:2], method="inflora")
    Experiment.resume(path, quiet=True, add_tasks={"tasks": specs("dots"), "base_dir": str(world.root)})
    assert any("laid out over 2 tasks" in line and "is over 3" in line for line in results_of(path)["warnings"])
    told = started(world, tmp_path / "told", TASKS[:2], method="inflora", tuner={"options": {"tasks": 3}})
    Experiment.resume(told, quiet=True, add_tasks={"tasks": specs("dots"), "base_dir": str(world.root)})
    assert not any("laid out" in line for line in results_of(told)["warnings"])


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ({"tasks": specs("paint", "stripes")}, r"every task of it is learned already \(paint, stripes\)"),
        ({"tasks": []}, r"lists no `tasks:`"),
        ({"suite": "demo"}, r"lists no `tasks:`"),
        ({"tasks": ["dots"]}, r"tasks\.0 is 'dots', but must be a mapping with a `name:`"),
        (
            {"tasks": [{**specs("paint")[0], "path": "dots"}]},
            r"task 'paint' has `path: 'dots'`, but was learned with 'paint'",
        ),
        (
            {"tasks": [{**specs("paint")[0], "templates": ["a {}"]}]},
            r"task 'paint' has `templates: \['a {}'\]`, but was learned without it",
        ),
        ({"tasks": specs("Paint")}, r"has the name 'Paint', which .* has already"),
        ({"tasks": [{"name": "dots"}]}, r"has no `source:`"),
        ({"tasks": specs("nowhere")}, r"task 'nowhere': .*nowhere: no such folder"),
        (
            {"tasks": specs("paint", "dots"), "base_dir": "/elsewhere"},
            r"paths that start at /elsewhere, but was learned with /",
        ),
    ],
)
def test_what_cannot_be_added_changes_nothing(world, tmp_path, added, says):
    path = started(world, tmp_path / "run", TASKS[:2])
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(KeepLoraError, match=says):
        Experiment.resume(path, quiet=True, add_tasks={"base_dir": str(world.root), **added})
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_only_a_finished_run_and_no_joint_one(world, tmp_path, monkeypatch):
    joint = started(world, tmp_path / "joint", TASKS[:2], method="joint")
    with pytest.raises(ConfigError, match="learns all tasks of a run at once"):
        Experiment.resume(joint, quiet=True, add_tasks={"tasks": specs("dots")})
    path = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setenv(STOP_AFTER, "1")
        with pytest.raises(KeyboardInterrupt):
            Experiment(world.config(tasks=specs(*TASKS[:2]), output=str(path)), quiet=True).run()
    with pytest.raises(KeepLoraError, match=r"is not finished \(interrupted, 1 tasks done\): `keeplora resume"):
        Experiment.resume(path, quiet=True, add_tasks={"tasks": specs("dots")})


@pytest.mark.parametrize("scorer", ["exact", "rouge-l"])
def test_questions_too(tmp_path, scorer):
    """With the answers of every state, and what a score is made of."""
    values = make_world(tmp_path / "world")
    values["tasks"][1]["scorer"] = scorer
    straight, path = tmp_path / "straight", tmp_path / "run"
    Experiment({**values, "output": str(straight)}, quiet=True).run()
    Experiment({**values, "tasks": values["tasks"][:1], "output": str(path)}, quiet=True).run()
    Experiment.resume(path, quiet=True, add_tasks={"tasks": values["tasks"], "base_dir": values["base_dir"]})
    assert_as_from_the_start(path, straight)
    assert results_of(path)["components"] == results_of(straight)["components"]
    answers = {p.relative_to(straight): p.read_bytes() for p in (straight / "predictions").rglob("*.jsonl")}
    assert answers == {p.relative_to(path): p.read_bytes() for p in (path / "predictions").rglob("*.jsonl")}
    assert len(answers) == 9  # three sets, three states
