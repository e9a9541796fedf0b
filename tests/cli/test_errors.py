"""Mistakes as a newcomer makes them: one sentence on standard error, status 1, no traceback, nothing written."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from PIL import Image

from keeplora.errors import KeepLoraError
from keeplora.experiment import Experiment
from keeplora.experiment.run_directory import RunDirectory
from tests.cli.tiny_world import TASKS, status_of


def refusal(answer, pattern: str) -> None:
    assert answer.code == 1, answer
    assert answer.out == ""
    assert answer.err.startswith("Error: ")
    assert "Traceback" not in answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert re.search(pattern, answer.err), answer.err


def folder(name: str, **changes):
    return {"name": name, "source": "folder", "path": name, **changes}


def test_no_file(cli, tmp_path):
    refusal(cli("run", tmp_path / "e.yaml"), rf"no such file: {tmp_path}/e.yaml$")


def test_nothing_to_run(cli):
    refusal(cli("run"), "nothing to run: give an experiment's YAML file, or --suite demo --method keeplora")


def test_a_folder_instead_of_a_file(cli, tmp_path):
    refusal(cli("run", tmp_path), "is a folder; give the configuration file itself")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: clip\nmethod: lora\n  tasks: []\n", r"e\.yaml, line 3, column 3: the line is indented further"),
        ("model: clip\ntraining: {epochs: 2\n", r"e\.yaml, line 2, column 11: this .{. is not closed"),
        ("method: lora\nmethod: keeplora\n", r"e\.yaml, line 2, column 1: key 'method' is given twice \(first in line 1\)"),
        ("", r"e\.yaml is empty; it needs at least `suite:` \(or `tasks:`\) and `method:`"),
        ("- lora\n", r"e\.yaml holds a list, not a mapping"),
        ("method: lora\nmodel: clip\n", r"e\.yaml: neither `suite:` nor `tasks:` is given"),
    ],
)  # fmt: skip
def test_bad_yaml_names_the_line(cli, tmp_path, text, sentence):
    file = tmp_path / "e.yaml"
    file.write_text(text)
    refusal(cli("run", file), sentence)


@pytest.mark.parametrize(
    ("changes", "words", "sentence"),
    [
        ({"metod": "lora"}, (), r"e\.yaml, line \d+: unknown key 'metod' at the top level; did you mean 'method'\?"),
        ({"training": {"epoch": 3}}, (), r"e\.yaml, line \d+: unknown key 'epoch' in training; did you mean 'epochs'\?"),
        ({"tuner": {"epochs": 3}}, (), r"unknown key 'epochs' in tuner; it belongs under `training:`"),
        ({"method": "keeplra"}, (), r"e\.yaml, line \d+: unknown method 'keeplra'; did you mean 'keeplora'\?"),
        ({}, ("--method", "lorra"), r"command line: unknown method 'lorra'; did you mean 'lora'\?"),
        ({}, ("-o", "training.epocs=3"), r"command line: unknown key 'epocs' in training; did you mean 'epochs'\?"),
        ({}, ("-o", "training.epochs"), r"-o training.epochs: write it as KEY=VALUE"),
        ({}, ("-o", "training.epochs=many"), r"command line: training.epochs is 'many', but must be a whole number"),
        ({"tasks": None}, ("--suite", "dem"), r"unknown suite 'dem'; did you mean 'demo'\?"),
        ({"preset": "mtli"}, (), r"unknown preset 'mtli'; did you mean 'mtil'\?"),
        ({"order": ["paint", "strips", "dots"]}, (), r"names an unknown task 'strips'; did you mean 'stripes'\?"),
        ({"best_epoch": True}, (), r"best_epoch needs validation data, and task 'paint' has none"),
        ({"accept": {"max_drop": 1.0, "action": "und"}}, (), r"accept.action is 'und', but must be one of warn, undo; did you mean 'undo'\?"),  # noqa: E501
        ({"tasks": [folder("paint", claases=["a"])]}, (), r"task 'paint': unknown key 'claases' for source 'folder'; did you mean 'classes'\?"),  # noqa: E501
        ({"tasks": [folder("paint", source="foldr")]}, (), r"task 'paint': unknown source 'foldr'; did you mean 'folder'\?"),
        ({"tasks": [folder("paint", path="pant")]}, (), r"task 'paint': .*/pant: no such folder; did you mean 'paint'\?"),
        ({"tasks": [folder("paint"), folder("paint")]}, (), r"has the name 'paint', which tasks.0 has already"),
    ],
)  # fmt: skip
def test_wrong_configurations(world, cli, tmp_path, monkeypatch, changes, words, sentence):
    monkeypatch.chdir(tmp_path)
    refusal(cli("run", world.yaml(tmp_path / "e.yaml", **changes), *words), sentence)
    assert [p.name for p in tmp_path.iterdir()] == ["e.yaml"]  # no run directory


def test_several_mistakes_are_told_together(world, cli, tmp_path):
    answer = cli("run", world.yaml(tmp_path / "e.yaml", metod="lora", training={"epochs": 0}))
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("Error: 2 problems in the configuration:\n")
    assert len(re.findall(r"^  - .*e\.yaml, line \d+: ", answer.err, re.MULTILINE)) == 2


def test_unknown_column_of_a_table(world, cli, tmp_path):
    (tmp_path / "t.csv").write_text(
        "picture,kind\n"
        + "".join(f"{world.root}/paint/train/{c}/{i}.png,{c}\n" for c in ("red", "blue") for i in range(6))
    )
    task = {"name": "paint", "source": "table", "train": str(tmp_path / "t.csv"), "label_column": "kin"}
    refusal(
        cli("run", world.yaml(tmp_path / "e.yaml", tasks=[{**task, "image_column": "picture"}])),
        r"t\.csv.*'kin'.*did you mean 'kind'\?",
    )


def test_corrupt_picture_names_the_file(world, cli, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(world.root, root, ignore=shutil.ignore_patterns("runs", "clip"))
    bad = root / "stripes" / "train" / "tall" / "3.png"
    bad.write_bytes(b"not a picture")
    file = world.yaml(tmp_path / "e.yaml", base_dir=str(root), output=str(tmp_path / "run"))
    refusal(cli("run", file), rf"{re.escape(str(bad))}: not a picture that can be read.*or set `on_error: skip`")
    assert not (tmp_path / "run").exists()


def test_picture_that_breaks_while_decoding_names_the_file(world, cli, tmp_path):
    """A whole header and torn pixels, which only decoding finds: long after the run directory was made."""
    root = tmp_path / "data"
    shutil.copytree(world.root, root, ignore=shutil.ignore_patterns("runs", "clip"))
    good = root / "stripes" / "train" / "tall" / "3.png"
    bad = good.with_suffix(".jpg")
    Image.open(good).save(bad, quality=95)
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    good.unlink()
    file = world.yaml(tmp_path / "e.yaml", base_dir=str(root), method="lora", output=str(tmp_path / "run"))
    answer = cli("run", file)
    assert answer.code == 1
    assert "Traceback" not in answer.err
    last = answer.err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert f"{bad}: damaged or cut short" in last
    if (tmp_path / "run").exists():
        status = status_of(tmp_path / "run")
        assert (status["state"], status["tasks_done"]) == ("failed", 1)
        assert str(bad) in status["error"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("/nowhere/clip", r"no local folder is called '/nowhere/clip', and it is not a name on the hub"),
        ("{root}", r"is a folder without a config.json, so not a saved model"),
        ("{root}/clip/config.json", r"is a file; give the folder"),
    ],
)
def test_model_that_is_not_there(world, cli, tmp_path, model, sentence):
    file = world.yaml(tmp_path / "e.yaml", model=model.format(root=world.root), output=str(tmp_path / "run"))
    refusal(cli("run", file), sentence)
    assert not (tmp_path / "run").exists()


def test_cuda_that_is_not_there(world, cli, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    file = world.yaml(tmp_path / "e.yaml", device="cuda", output=str(tmp_path / "run"))
    refusal(cli("run", file), "device: 'cuda' was asked for, but torch finds no CUDA device; use device: auto or cpu")


@pytest.mark.parametrize("words", [("predict", "--image", "{picture}"), ("export", "--format", "peft"), ("audit",)])
def test_run_directory_that_is_not_there(world, cli, tmp_path, words):
    picture = world.root / "paint" / "test" / "red" / "0.png"
    command, *options = (word.format(picture=picture) for word in words)
    refusal(
        cli(command, tmp_path / "none", *options), r"none is not a run directory \(no config.yaml\); give the folder"
    )


def test_report_of_a_directory_that_is_not_there(cli, tmp_path):
    refusal(cli("report", tmp_path / "none"), r"none")
    assert not (tmp_path / "none").exists()


def test_output_below_a_file(world, cli, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    file = world.yaml(tmp_path / "e.yaml", method="zero-shot")
    refusal(
        cli("run", file, "--output", tmp_path / "notes.txt" / "run"),
        "notes.txt/run cannot be made: Not a directory; choose another --output",
    )
    refusal(cli("run", file, "--output", tmp_path / "notes.txt"), "notes.txt is a file; choose another --output")
    answer = cli("export", world.run()[0], "--format", "peft", "--output", tmp_path / "notes.txt" / "adapter")
    assert answer.code == 1
    assert re.fullmatch(r"Error: .*notes.txt.*(exists|Not a directory).*\n", answer.err), answer.err


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_read_only_output(world, tmp_path):
    """Root may write anywhere, so the right is given up for the moment that counts."""
    experiment = Experiment(world.config(method="zero-shot", output=str(tmp_path / "shut" / "run")), quiet=True)
    assert experiment.setup.tasks  # read while we still may
    (tmp_path / "shut").mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(KeepLoraError, match=r"run cannot be made: Permission denied; choose another --output"):
            experiment.run()
    finally:
        os.seteuid(user)
    assert list((tmp_path / "shut").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("rum",), "rum"),
        (("run", "--metod", "lora"), "--method"),
        (("predict",), "Missing argument"),
        (("run", "--seed", "x"), "'--seed'"),
    ],
)
def test_unknown_commands_and_options_are_usage_errors(cli, words, told):
    answer = cli(*words)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert told in answer.err


def test_a_loss_that_is_not_a_number_is_one_sentence(world, cli, tmp_path, monkeypatch):
    from keeplora.experiment.objective import TaskObjective

    original = TaskObjective.part_loss

    def broken(self, part, total):
        loss, logits = original(self, part, total)
        return loss * (float("nan") if self.task.name == "stripes" else 1.0), logits

    monkeypatch.setattr(TaskObjective, "part_loss", broken)
    path = tmp_path / "run"
    answer = cli("run", world.yaml(tmp_path / "e.yaml", method="lora"), "--output", path)
    assert answer.code == 1
    assert "Traceback" not in answer.err
    last = answer.err.splitlines()[-1]
    assert last.startswith("Error: task 'stripes', epoch 1, step 1: the loss is nan (samples ")
    assert last.count(".png") == 3
    assert [p.name for p in sorted((path / "ledger").glob("0*"))] == [f"0001-{TASKS[0]}"]


@pytest.mark.parametrize(
    ("tuner", "sentence"),
    [
        ({"energy_weights": {"visoin": 0.9}}, r"energy_weights: no tower is named 'visoin'; did you mean 'vision'\?"),
        ({"target_modules": ["q_porj"]}, r"no module is named 'q_porj'; did you mean 'q_proj'"),
        ({"r": {"vision": 4}}, r"r gives no value for the tower 'text_model'"),
        ({"max_basis_bytes": 1}, r"max_basis_bytes is 1, but the bases of the pretrained weights alone take"),
    ],
)  # fmt: skip
def test_what_the_learner_refuses_leaves_no_folder(world, cli, tmp_path, tuner, sentence):
    file = world.yaml(tmp_path / "e.yaml", tuner=tuner)
    refusal(cli("run", file, "--output", tmp_path / "run"), sentence)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_taken_is_refused_before_the_model_is_loaded(world, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("keeplora.experiment.setup.open_model", lambda *_: pytest.fail("the model was loaded"))
    file = world.yaml(tmp_path / "e.yaml")
    (tmp_path / "notes.txt").write_text("x")
    for taken, sentence in (
        (world.run()[0], r"\(finished, 3 tasks done\); see it by `keeplora report .* or choose another --output"),
        (tmp_path, r"is not empty \(e.yaml, notes.txt\)"),
        (tmp_path / "notes.txt", r"notes.txt is a file"),
    ):
        refusal(cli("run", file, "--output", taken), sentence)


def test_a_run_that_was_killed_is_gone_on_with(world, cli, tmp_path):
    path = world.copied(world.run()[0], tmp_path / "run")
    with RunDirectory.open_existing(path) as run:
        run.set_status(state="running", tasks_done=1)
    answer = cli("run", world.yaml(tmp_path / "e.yaml"), "--output", path)
    refusal(answer, rf"\(running, 1 task done\); go on with it by `keeplora resume {path}`, or choose another --output")


@pytest.mark.parametrize("words", [("capacity",), ("ledger", "log")])
def test_a_folder_above_runs_is_no_damaged_ledger(world, cli, tmp_path, words):
    refusal(
        cli(*words, tmp_path), rf"{tmp_path} holds no run and no ledger; give the folder that a run or save_pretrained"
    )
    world.copied(world.run()[0], tmp_path / "runs" / "a")
    refusal(cli(*words, tmp_path / "runs"), r"give one of the runs in it, such as .*/runs/a$")
    (tmp_path / "runs" / "a" / "ledger" / "ledger.json").unlink()
    refusal(cli(*words, tmp_path / "runs" / "a"), r"ledger.json is missing: the ledger is not complete|holds no run")
