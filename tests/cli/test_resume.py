"""`keeplora resume` after real kills, interruptions and failures: the numbers of a run that was never disturbed."""

from __future__ import annotations

import json
import signal
import time

import pytest

from keeplora.experiment.run_directory import RunDirectory
from tests.cli.tiny_world import TASKS, ledger_tensors, results_of, same_tensors, status_of

SLOW = {"epochs": {"default": 2, "stripes": 60}}  # task 2 lasts long enough to be hit

# The command line, in a process that dies by SIGKILL when task 2 stands in the ledger and nothing else knows of it.
KILLED_AFTER_RECORD = """
import os, signal, sys
from keeplora.cli import main
from keeplora.experiment.runner import Run
score = Run._score_last
def killed(self, i):
    if i == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    score(self, i)
Run._score_last = killed
main(sys.argv[1:])
"""


def wait_for(child, condition, seconds=600.0):
    end = time.monotonic() + seconds
    while not condition():
        if child.poll() is not None:
            pytest.fail(f"the run ended by itself ({child.returncode}): {child.communicate()[1]}")
        assert time.monotonic() < end, "the run never came that far"
        time.sleep(0.005)


def events_without_times(path):
    return [{k: v for k, v in e.items() if k not in ("seconds", "data_wait")} for e in RunDirectory(path).read_events()]


def assert_as_undisturbed(path, straight):
    """Accuracies, losses, events and every tensor of the ledger, bit for bit."""
    one, other = results_of(path), results_of(straight)
    for key in ("accuracy", "probe_accuracy", "metrics", "layers", "audit", "comparison_key", "warnings"):
        assert one[key] == other[key], key
    assert events_without_times(path) == events_without_times(straight)
    assert same_tensors(ledger_tensors(path), ledger_tensors(straight))
    status = status_of(path)
    assert (status["state"], status["tasks_done"], status["error"]) == ("finished", 3, None)
    assert (path / "report.html").is_file()


def test_killed_in_training_of_task_2(world, cli, process, tmp_path):
    straight, _ = world.run(training=SLOW)
    path, file = tmp_path / "run", world.yaml(tmp_path / "e.yaml", training=SLOW)
    child = process("-m", "keeplora", "run", file, "--output", path)
    metrics = path / "metrics.jsonl"
    wait_for(child, lambda: metrics.exists() and '"epoch","task":"stripes","epoch":3' in metrics.read_text())
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert [p.name for p in sorted((path / "ledger").glob("0*"))] == ["0001-paint"]
    assert status_of(path)["state"] == "running"  # it had no chance to say otherwise
    kept = (path / "ledger" / "0001-paint" / "tensors.safetensors").stat().st_mtime_ns
    answer = cli("resume", path)
    assert answer.code == 0, answer.err
    assert "task 1/3" not in answer.err  # what was finished is not done again
    assert "task 2/3: stripes" in answer.err
    assert str(path / "report.html") in answer.out
    assert (path / "ledger" / "0001-paint" / "tensors.safetensors").stat().st_mtime_ns == kept
    assert_as_undisturbed(path, straight)


def test_killed_between_the_record_and_its_scores(world, cli, process, tmp_path):
    straight, _ = world.run()
    path, file = tmp_path / "run", world.yaml(tmp_path / "e.yaml")
    child = process("-c", KILLED_AFTER_RECORD, "run", file, "--output", path)
    _, err = child.communicate(timeout=600)
    assert child.returncode == -signal.SIGKILL, err
    assert [p.name for p in sorted((path / "ledger").glob("0*"))] == ["0001-paint", "0002-stripes"]
    assert len(results_of(path)["accuracy"]) == 2  # row 2 was never measured
    answer = cli("resume", path)
    assert answer.code == 0, answer.err
    assert "task 2/3" not in answer.err
    assert "task 3/3: dots" in answer.err
    assert_as_undisturbed(path, straight)


@pytest.mark.parametrize(("number", "status_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_keeps_it(world, cli, process, tmp_path, number, status_code):
    path, file = tmp_path / "run", world.yaml(tmp_path / "e.yaml", training=SLOW)
    child = process("-m", "keeplora", "run", file, "--output", path)
    metrics = path / "metrics.jsonl"
    wait_for(child, lambda: metrics.exists() and '"epoch","task":"stripes","epoch":2' in metrics.read_text())
    child.send_signal(number)
    out, err = child.communicate(timeout=600)
    assert child.returncode == status_code
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"Interrupted. What was learned is kept; go on with `keeplora resume {path}`."
    assert out == ""
    status = status_of(path)
    assert (status["state"], status["tasks_done"]) == ("interrupted", 1)
    (kept,) = (path / "checkpoint").glob("*/state.json")
    steps = json.loads(kept.read_text())["steps"]
    assert steps > 6  # two epochs of three steps were told of
    answer = cli("resume", path)
    assert answer.code == 0
    assert f"  goes on from its checkpoint, after step {steps} of 180\n" in answer.err
    assert_as_undisturbed(path, world.run(training=SLOW)[0])


@pytest.mark.parametrize("method", ["keeplora++-cls", "lora", "full-ft", "zero-shot"])
def test_every_kind_of_method_goes_on_where_it_stopped(world, cli, tmp_path, monkeypatch, method):
    monkeypatch.setenv("KEEPLORA_STOP_AFTER", "1")
    path, file = tmp_path / "run", world.yaml(tmp_path / "e.yaml", method=method)
    stopped = cli("run", file, "--output", path)
    assert stopped.code == 130
    assert "Interrupted." in stopped.err
    assert status_of(path)["state"] == "interrupted"
    assert len(results_of(path)["accuracy"]) == 2
    monkeypatch.delenv("KEEPLORA_STOP_AFTER")
    assert cli("resume", path).code == 0
    assert_as_undisturbed(path, world.run(method=method)[0])


def test_resume_of_a_finished_run_changes_nothing_and_prints_it_again(world, cli, tmp_path):
    path = world.copied(world.run()[0], tmp_path / "run")
    before = results_of(path), ledger_tensors(path), (path / "metrics.jsonl").read_bytes()
    started = status_of(path)["started"]
    times = {p: p.stat().st_mtime_ns for p in (path / "ledger").rglob("*")}
    answer = cli("resume", path)
    assert answer.code == 0, answer.err
    assert "task " not in answer.err
    assert "epoch" not in answer.err
    assert f"{before[0]['metrics']['last']:.1f}" in answer.out
    assert str(path / "report.html") in answer.out
    after = results_of(path)
    assert {k: v for k, v in after.items() if k != "cost"} == {k: v for k, v in before[0].items() if k != "cost"}
    assert (path / "metrics.jsonl").read_bytes() == before[2]
    assert {p: p.stat().st_mtime_ns for p in (path / "ledger").rglob("*")} == times
    assert status_of(path)["state"] == "finished"
    assert status_of(path)["started"] == started


@pytest.mark.parametrize("change", ["new bytes", "one picture less", "another class name"])
def test_changed_pictures_are_refused(world, cli, tmp_path, monkeypatch, change):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(world.root, root, ignore=shutil.ignore_patterns("runs", "clip"))
    path = tmp_path / "run"
    monkeypatch.setenv("KEEPLORA_STOP_AFTER", "1")
    file = world.yaml(tmp_path / "e.yaml", base_dir=str(root), method="zero-shot")
    assert cli("run", file, "--output", path).code == 130
    monkeypatch.delenv("KEEPLORA_STOP_AFTER")
    folder = root / "dots" / "train" / "few"
    if change == "new bytes":
        shutil.copy(root / "paint" / "train" / "red" / "0.png", folder / "0.png")
    elif change == "one picture less":
        (folder / "0.png").unlink()
    else:
        for split in ("train", "test"):
            (root / "dots" / split / "few").rename(root / "dots" / split / "fewer")
    answer = cli("resume", path)
    assert (answer.code, answer.out) == (1, "")
    assert "the pictures or classes of dots have changed since the run began" in answer.err
    assert answer.err.count("\n") == 1
    assert status_of(path)["tasks_done"] == 1


def test_resume_refuses_what_is_no_run(cli, tmp_path):
    missing = cli("resume", tmp_path / "nowhere")
    assert (missing.code, missing.err) == (1, f"Error: no such run directory: {tmp_path / 'nowhere'}\n")
    foreign = cli("resume", tmp_path)
    assert foreign.code == 1
    assert "holds no config.yaml: is it the folder that `keeplora run` printed?" in foreign.err


def test_resume_refuses_another_model(world, cli, tmp_path):
    from tests.models.tiny import make_tiny

    path = world.copied(world.run(method="keeplora++")[0], tmp_path / "run")
    other = make_tiny("siglip", tmp_path / "other")
    config = path / "config.yaml"
    config.write_text(config.read_text().replace(str(world.model), str(other)))
    answer = cli("resume", path)
    assert answer.code == 1
    assert "another base model" in answer.err
    assert "Traceback" not in answer.err


def test_further_tasks(world, cli, tmp_path):
    """The experiment's own file, one task longer; before it `run` says how."""
    file = world.yaml(tmp_path / "e.yaml", tasks=[{"name": n, "source": "folder", "path": n} for n in TASKS[:2]])
    path = world.copied(world.run(first_tasks=2)[0], tmp_path / "run")
    again = cli("run", file, "--output", path)
    assert again.code == 1
    assert f"teach it further tasks by `keeplora resume {path} --add-tasks FILE`" in again.err
    none = cli("resume", path, "--add-tasks", file)
    assert (none.code, none.err.count("\n")) == (1, 1)
    assert none.err.startswith(f"Error: {file}: every task of it is learned already (paint, stripes)")
    answer = cli("resume", path, "--add-tasks", world.yaml(file))
    assert answer.code == 0, answer.err
    assert "scores on dots before" in answer.err
    assert "no checkpoint" not in answer.err  # nothing was interrupted
    assert "task 3/3: dots" in answer.err
    assert "task 2/3" not in answer.err
    assert_as_undisturbed_but_for_the_order_in_a_row(path, world.run()[0])
    assert str(path / "report.html") in answer.out


def assert_as_undisturbed_but_for_the_order_in_a_row(path, straight):
    assert results_of(path)["accuracy"] == results_of(straight)["accuracy"]
    assert same_tensors(ledger_tensors(path), ledger_tensors(straight))
    assert "dots" in (path / "report.html").read_text(encoding="utf-8")
