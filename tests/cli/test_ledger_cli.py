"""`keeplora ledger` as a person calls it, on a run, on a saved learner and on a ledger by itself."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from keeplora.experiment import Experiment, TrainedModel
from keeplora.experiment.run_directory import RunDirectory
from keeplora.tuner import Ledger
from keeplora.tuner.persistence import all_updates
from tests.cli.tiny_world import events_of, ledger_tensors, results_of, same_tensors, status_of

ORDER = ["paint", "stripes", "dots"]


@pytest.fixture
def run(world, tmp_path):
    return world.copied(world.run()[0], tmp_path / "run")


def told(answer, code=0):
    assert answer.code == code, answer.err
    return json.loads(answer.out)


def without_times(events):
    return [{k: v for k, v in e.items() if k not in ("seconds", "data_wait")} for e in events]


def active(path):
    ledger = Ledger.open(path / "ledger")
    return ledger.chain().names(ledger.state().active)


def test_log_and_show(world, cli):
    path, results = world.run()
    rows = told(cli("ledger", "log", path, "--json"))
    assert [(r["entry"], r["kind"], r["task"], r["state"]) for r in rows] == [
        (i, "task", name, "active") for i, name in enumerate(ORDER, 1)
    ]
    assert [r["score"] for r in rows] == [results["accuracy"][i + 1][i] for i in range(3)]
    used = [sum(layer["used"][i] for layer in results["layers"]) for i in (1, 2, 3)]
    assert [r["used"] for r in rows] == used
    assert {r["of"] for r in rows} == {sum(layer["in"] for layer in results["layers"])}
    table = cli("ledger", "log", path)
    assert re.search(r"1\s+task\s+paint\s+20\d\d-", table.out)
    assert "\x1b" not in table.out
    shown = told(cli("ledger", "show", path, "stripes", "--json"))
    assert (shown["entry"], shown["state"], shown["learned_after"]) == (2, "active", ["paint"])
    assert shown["info"]["classes"] == ["flat", "tall"]
    assert shown["metrics"]["tasks"] == dict(zip(ORDER, results["accuracy"][2], strict=True))
    assert shown["config"]["r"] == 4
    text = cli("ledger", "show", path / "ledger", "2").out
    for word in ("flat, tall", "self_attn.q_proj", "explained", "torch"):
        assert word in text
    missing = cli("ledger", "show", path, "stripe")
    assert (missing.code, missing.out) == (1, "")
    assert "no task 'stripe'; did you mean 'stripes'?" in missing.err
    assert "no task 'xyz' (one of: " in cli("ledger", "show", path, "xyz").err


def test_rollback_then_resume_is_the_run_again(world, cli, run):
    straight = world.run()[0]
    first = cli("ledger", "rollback", run, "paint")
    assert first.code == 0, first.err
    assert f"Go on from there: keeplora resume {run}" in first.out
    status = status_of(run)
    assert (status["state"], status["tasks_done"]) == ("interrupted", 1)
    results = results_of(run)
    assert results["accuracy"] == results_of(straight)["accuracy"][:2]
    assert [info["name"] for info in results["tasks_info"]] == ["paint"]
    assert {len(layer["used"]) for layer in results["layers"]} == {2}
    assert [e["task"] for e in events_of(run, "task_finished")] == ["paint"]
    assert "after stripes" not in (run / "report.html").read_text()
    answer = cli("resume", run)
    assert answer.code == 0, answer.err
    assert "task 1/3" not in answer.err
    assert "task 2/3: stripes" in answer.err
    one, other = results_of(run), results_of(straight)
    for key in ("accuracy", "probe_accuracy", "metrics", "layers", "audit", "removed"):
        assert one[key] == other[key], key
    assert without_times(RunDirectory(run).read_events()) == without_times(RunDirectory(straight).read_events())
    again = {k.partition("/")[2]: v for k, v in ledger_tensors(run).items() if k.startswith(("0005", "0006"))}
    before = {k.partition("/")[2]: v for k, v in ledger_tensors(straight).items() if k.startswith(("0002", "0003"))}
    assert [p.name for p in sorted((run / "ledger").glob("0*"))][3:] == [
        "0004-rollback-paint", "0005-stripes", "0006-dots",
    ]  # fmt: skip
    assert same_tensors(again, before)
    assert status_of(run)["state"] == "finished"


def test_a_rollback_that_is_undone_leaves_the_run_as_it_was(world, cli, run):
    straight = world.run()[0]
    assert cli("ledger", "rollback", run, "0").code == 0
    assert status_of(run)["tasks_done"] == 0
    assert results_of(run)["accuracy"] == results_of(straight)["accuracy"][:1]
    assert cli("ledger", "rollback", run, "3").code == 0
    one, other = results_of(run), results_of(straight)
    for key in ("accuracy", "probe_accuracy", "metrics", "layers", "tasks_info"):
        assert one[key] == other[key], key
    assert RunDirectory(run).read_events() == RunDirectory(straight).read_events()
    assert status_of(run)["state"] == "finished"
    answer = cli("resume", run)
    assert answer.code == 0
    assert "task " not in answer.err
    assert results_of(run)["audit"] == other["audit"]


def test_rows_of_a_run_from_before_there_were_metrics_are_not_lost(world, cli, run):
    for file in (run / "ledger").glob("*/metrics.json"):
        file.unlink()
    before = results_of(run)
    assert cli("ledger", "rollback", run, "paint").code == 0
    assert cli("ledger", "rollback", run, "3").code == 0
    assert results_of(run)["accuracy"] == before["accuracy"]


def test_removed_task_is_not_learned_again_and_its_classes_are_gone(world, cli, run):
    before = results_of(run)
    answer = cli("ledger", "remove", run, "stripes")
    assert answer.code == 0, answer.err
    assert "Removed 'stripes'; it is kept aside. Active: paint, dots." in answer.out
    assert "Not undone" in answer.out
    assert results_of(run)["removed"] == ["stripes"]
    assert results_of(run)["accuracy"] == before["accuracy"]  # what was measured was measured
    assert status_of(run)["state"] == "finished"
    report = (run / "report.html").read_text()
    for word in ("Task stripes was removed since", "was taken out since: all numbers", "2 · stripes (taken out since)"):
        assert word in report
    picture = world.root / "paint" / "test" / "red" / "0.png"
    (found,) = [
        json.loads(line) for line in cli("predict", run, "--image", picture, "--json", "--top", "9").out.splitlines()
    ]
    assert {p["task"] for p in found["predictions"]} == {"paint", "dots"}
    refused = cli("predict", run, "--image", picture, "--task", "stripes")
    assert "no learned task is named 'stripes'" in refused.err
    resumed = cli("resume", run)
    assert resumed.code == 0, resumed.err
    assert "task " not in resumed.err
    assert "Measured with stripes in the model" in " ".join(resumed.out.split())
    after = results_of(run)
    assert [info["name"] for info in after["tasks_info"]] == ORDER
    assert [i["seconds"] for i in after["tasks_info"]] == [i["seconds"] for i in before["tasks_info"]]
    assert after["accuracy"] == before["accuracy"]
    assert after["removed"] == ["stripes"]
    assert {row["task"] for row in after["audit"]["rows"]} == {"paint", "dots"}
    assert after["layers"] != []
    assert [layer["used"] for layer in after["layers"]] == [layer["used"] for layer in before["layers"]]
    assert cli("ledger", "restore", run, "stripes").code == 0
    assert active(run) == ORDER
    assert results_of(run)["removed"] == []


def test_removal_in_a_run_that_goes_on(world, cli, tmp_path, monkeypatch):
    """Task 1 taken out before task 3 is learned: tasks, records and rows stay in step."""
    monkeypatch.setenv("KEEPLORA_STOP_AFTER", "2")
    path = tmp_path / "run"
    assert cli("run", world.yaml(tmp_path / "e.yaml"), "--output", path).code == 130
    monkeypatch.delenv("KEEPLORA_STOP_AFTER")
    before = results_of(path)
    assert cli("ledger", "remove", path, "paint").code == 0
    status = status_of(path)
    assert (status["state"], status["tasks_done"]) == ("interrupted", 2)
    answer = cli("resume", path)
    assert answer.code == 0, answer.err
    assert re.findall(r"task (\d)/3", answer.err) == ["3"]
    after = results_of(path)
    assert after["accuracy"][:3] == before["accuracy"]
    assert len(after["accuracy"]) == 4
    assert [info["name"] for info in after["tasks_info"]] == ORDER
    assert [e["task"] for e in events_of(path, "task_finished")] == ORDER
    assert active(path) == ["stripes", "dots"]
    model = TrainedModel(path, device="cpu")
    assert [r.name for r in model.learner.history] == ORDER
    assert model.learner.audit().passed
    records = model.learner.records
    for name in model.learner.store.delta:
        parts = [r.factors[name].delta for r in records if name in r.factors]
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        assert torch.equal(model.learner.store.module(name).weight.detach(), model.learner.store.W0[name] + total)


def test_last_task_removed_is_not_learned_again(world, cli, run):
    assert cli("ledger", "remove", run, "dots").code == 0
    answer = cli("resume", run)
    assert answer.code == 0, answer.err
    assert "task " not in answer.err
    after = results_of(run)
    assert after["removed"] == ["dots"]
    assert [info["name"] for info in after["tasks_info"]] == ORDER
    assert {len(layer["used"]) for layer in after["layers"]} == {4}
    assert active(run) == ["paint", "stripes"]


def test_a_gap_in_the_order_is_named_before_anything_is_learned(world, cli, run):
    assert cli("ledger", "rollback", run, "paint").code == 0
    assert cli("ledger", "restore", run, "dots").code == 0
    assert "not 'stripes', which comes before it" in status_of(run)["error"]
    answer = cli("resume", run)
    assert answer.code == 1
    assert "the ledger holds task 'dots', but not 'stripes'" in answer.err


def test_changes_are_refused_while_a_run_writes(world, cli, run):
    with RunDirectory.open_existing(run):
        for words in (
            ("remove", run, "paint"), ("rollback", run, "paint"), ("remove", run / "ledger", "paint"),
            ("purge", run, "paint", "--yes"), ("restore", run, "paint"),
        ):  # fmt: skip
            answer = cli("ledger", *words)
            assert (answer.code, answer.out) == (1, "")
            assert "is already open in this process" in answer.err
    assert len(Ledger.open(run / "ledger").entries()) == 3


def test_purge_asks_and_deletes(world, cli, run):
    assert "nobody is there to ask: add --yes" in cli("ledger", "purge", run, "paint").err
    refused = cli("ledger", "purge", run, "paint", "--yes")
    assert "is active: remove it before its tensors are purged" in refused.err
    answer = cli("ledger", "remove", run, "paint", "--purge", "--yes")
    assert answer.code == 0, answer.err
    assert "To undo" not in answer.out
    assert not (run / "ledger/0001-paint/tensors.safetensors").exists()
    kept = load_file(run / "ledger/0005-purge-paint/tensors.safetensors")
    assert {key.partition("/")[0] for key in kept} == {"basis", "values"}
    gone = cli("ledger", "restore", run, "paint")
    assert "was purged: its tensors are gone" in gone.err
    back = cli("ledger", "rollback", run, "3")
    assert "entry 3 cannot be gone back to" in back.err
    assert told(cli("ledger", "verify", run, "--json"))["passed"]
    assert [r["state"] for r in told(cli("ledger", "log", run, "--json"))[:3]] == ["purged", "active", "active"]


def test_verify_prints_what_was_checked(world, cli, run):
    whole = told(cli("ledger", "verify", run, "--json"))
    what = " ".join(check["what"] for check in whole["checks"])
    for word in ("seal", "AAᵀ", "A U", "UᵀU", "base model", "weights", "factors"):
        assert word in what
    assert all(check["passed"] for check in whole["checks"])
    text = cli("ledger", "verify", run, "--files-only").out
    assert "checks passed." in text
    assert "base model" not in text
    file = run / "ledger/0002-stripes/tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    answer = cli("ledger", "verify", run, "--files-only")
    assert answer.code == 1
    assert answer.err.startswith(f"Error: {file} does not have the SHA-256")
    assert "0001-paint" in answer.out  # what was checked until then
    bad = cli("ledger", "verify", run, "--json")
    assert bad.code == 1
    assert json.loads(bad.out)["problem"].startswith(str(file))


def test_verify_refuses_another_model(world, cli, run, tmp_path):
    from tests.models.tiny import make_tiny

    learner = TrainedModel(run, device="cpu").learner
    saved = learner.save_pretrained(tmp_path / "saved")
    good = cli("ledger", "verify", saved, "--model", world.model)
    assert good.code == 0, good.err
    assert "base model" in good.out
    bad = cli("ledger", "verify", saved, "--model", make_tiny("siglip", tmp_path / "other"))
    assert bad.code == 1
    assert bad.err.startswith("Error: ")


def test_diff(world, cli, run):
    straight = world.run()[0]
    same = told(cli("ledger", "diff", straight, run, "--json"))
    assert same["same_base"]
    assert same["common"] == 3
    assert same["only_a"] == same["only_b"] == []
    assert all(row["difference"] == 0 for row in same["layers"])
    assert cli("ledger", "remove", run, "stripes").code == 0
    assert "no difference" in cli("ledger", "diff", straight, straight).out
    assert "entry 4 of the ledger is a remove, not a task" in cli("ledger", "show", run, "4").err
    apart = told(cli("ledger", "diff", straight, run, "--json"), 1)
    assert (apart["common"], apart["only_b"]) == (3, [{"entry": 4, "kind": "remove", "name": "stripes"}])
    record = Ledger.open(straight / "ledger").record(2)
    for row in apart["layers"]:
        f = record.factors.get(row["layer"])
        assert row["difference"] == pytest.approx(float(f.delta.norm()) if f else 0.0, rel=1e-4, abs=1e-9)
        assert 0 <= row["relative"] <= 2
    text = cli("ledger", "diff", straight, run).out
    assert "the same base model, 3 entries in common" in " ".join(text.split())
    other = told(cli("ledger", "diff", straight, world.run(method="lora")[0], "--json"), 1)
    assert (other["same_base"], other["common"]) == (True, 0)


@pytest.mark.parametrize("which", [("--upto", "stripes"), ("--tasks", "dots, paint"), ()])
def test_exports_equal_recomputation(world, cli, run, tmp_path, which):
    """Stock PEFT and stock transformers give what W₀ + Σ s B A of the chosen tasks gives."""
    from peft import PeftModel
    from transformers import CLIPModel

    names = {"--upto": ["paint", "stripes"], "--tasks": ["paint", "dots"]}[which[0]] if which else ORDER
    for command in (("ledger", "export"), ("export",)):
        out = tmp_path / "-".join(command)
        assert cli(*command, run, "--format", "peft", "--output", out, *which).code == 0
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"]
    merged = tmp_path / "merged"
    assert cli("ledger", "export", run, "--format", "merged", "--output", merged, *which).code == 0
    model = TrainedModel(run, device="cpu")
    learner = model.learner
    learner.store.restore(all_updates([r for r in learner.records if r.name in names]))
    pixels = model.family.preprocess(Image.open(world.root / "paint" / "test" / "red" / "0.png").convert("RGB"))[None]
    text = model.family.tokenize(["a photo of a red.", "a photo of a many."])
    adapted = PeftModel.from_pretrained(
        CLIPModel.from_pretrained(world.model).eval(), str(tmp_path / "ledger-export")
    ).eval()
    whole = CLIPModel.from_pretrained(merged).eval()
    with torch.no_grad():
        ours = model.family.model.eval()(**text, pixel_values=pixels).logits_per_image
        torch.testing.assert_close(adapted(**text, pixel_values=pixels).logits_per_image, ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole(**text, pixel_values=pixels).logits_per_image, ours, rtol=1e-5, atol=1e-5)
    for name, W in whole.state_dict().items():
        if (layer := name.removesuffix(".weight")) in learner.store.delta:
            assert torch.equal(W, learner.store.current(layer))


@pytest.mark.parametrize("command", [("ledger", "export"), ("export",)])
@pytest.mark.parametrize("inside", ["", "ledger"])
def test_a_run_names_its_own_model(cli, run, tmp_path, command, inside):
    answer = cli(*command, run / inside, "--format", "peft", "--model", "another", "--output", tmp_path / "new")
    assert answer.code == 1
    assert "names its base model itself: leave --model out" in answer.err
    assert not (tmp_path / "new").exists()


def test_an_export_that_still_holds_a_removed_task_is_told_so(cli, run, tmp_path):
    for names in ("paint,stripes", "stripes"):
        assert cli("export", run, "--format", "merged", "--tasks", names, "--output", tmp_path / names).code == 0
    assert cli("ledger", "remove", run, "stripes").code == 0
    for names in ("paint,stripes", "stripes"):
        text = " ".join(cli("audit", run, "--export", tmp_path / names).out.split())
        assert f"holding {names.replace(',', ', ')}. Of these stripes was taken out of the ledger since" in text
    assert cli("ledger", "purge", run, "stripes", "--yes").code == 0
    text = " ".join(cli("audit", run, "--export", tmp_path / "stripes").out.split())
    assert "It may hold stripes, whose tensors were purged." in text


@pytest.mark.parametrize("log", ["kept", "cut"])
def test_a_lost_results_json_never_takes_the_trained_model_for_the_untouched_one(world, cli, run, log):
    """It is made again from the ledger and metrics.jsonl; what neither has stays empty."""
    straight = results_of(world.run()[0])
    (run / "results.json").unlink()
    if log == "cut":
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in lines if '"after":0' not in line))
    for _ in range(2):
        answer = cli("resume", run)
        assert answer.code == 0, answer.err
        assert "task 1/3" not in answer.err
        found = results_of(run)
        assert found["accuracy"][1:] == straight["accuracy"][1:]
        assert found["accuracy"][0] == (straight["accuracy"][0] if log == "kept" else [None] * 3)
    assert found["metrics"]["last"] == straight["metrics"]["last"]
    if log == "kept":
        assert found["metrics"] == straight["metrics"]
        assert without_times(RunDirectory(run).read_events()) == without_times(
            RunDirectory(world.run()[0]).read_events()
        )
    else:
        assert "what the untouched model scored is not" in " ".join(found["warnings"])


def test_an_unfinished_run_without_results_json_goes_on(world, cli, run):
    straight = results_of(world.run()[0])
    assert cli("ledger", "rollback", run, "paint").code == 0
    (run / "results.json").unlink()
    answer = cli("resume", run)
    assert answer.code == 0, answer.err
    assert results_of(run)["accuracy"] == straight["accuracy"]
    assert status_of(run)["state"] == "finished"


def test_a_damaged_results_json_says_which_file_to_delete(cli, run):
    (run / "results.json").write_text("{")
    for words in (("card", run), ("ledger", "rollback", run, "1")):
        answer = cli(*words)
        assert answer.code == 1
        assert "delete this one file" in answer.err


def test_a_saved_learner_is_exported_without_its_model(world, cli, run, tmp_path):
    learner = TrainedModel(run, device="cpu").learner
    saved = learner.save_pretrained(tmp_path / "saved")
    assert cli("ledger", "remove", saved, "stripes").code == 0
    for where, out in ((saved, "a"), (saved / "ledger", "b")):
        assert cli("ledger", "export", where, "--format", "peft", "--output", tmp_path / out).code == 0
    assert cli("export", saved, "--format", "peft", "--output", tmp_path / "c").code == 0
    assert cli("ledger", "remove", run, "stripes").code == 0
    assert cli("export", run, "--format", "peft", "--output", tmp_path / "d").code == 0
    found = [load_file(tmp_path / out / "adapter_model.safetensors") for out in "abcd"]
    assert all(same_tensors(found[0], other) for other in found[1:])
    refused = cli("ledger", "export", saved, "--format", "merged", "--output", tmp_path / "m")
    assert "name it with --model" in refused.err
    given = cli(
        "ledger", "export", saved, "--format", "merged", "--output", tmp_path / "m", "--model", world.model
    )  # fmt: skip
    assert given.code == 0, given.err
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert (saved / "adapters" / "0002-stripes").is_dir()
    assert cli("ledger", "purge", saved, "stripes", "--yes").code == 0
    assert not (saved / "adapters" / "0002-stripes").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--upto", "pant"), r"no learned task is named 'pant'; did you mean 'paint'\?"),
        (("--tasks", "paint,stripes"), "task 'stripes' is not active; put it in again"),
        (("--tasks", ","), "at least one"),
        (("--tasks", "paint,paint"), "different tasks"),
        (("--upto", "paint", "--tasks", "paint"), "not both"),
    ],
)
def test_wrong_selections_are_one_sentence(world, cli, run, words, sentence):
    Ledger.open(run / "ledger").remove("stripes")
    for where in (run, run / "ledger"):
        answer = cli("ledger", "export", where, "--format", "peft", "--output", run / "out", *words)
        assert (answer.code, answer.out) == (1, "")
        assert re.search(sentence, answer.err)
        assert answer.err.count("\n") == 1


def test_methods_that_cannot_let_a_task_go_say_why(world, cli, tmp_path):
    path = world.copied(world.run(method="sd-lora")[0], tmp_path / "run")
    for where in (path, path / "ledger"):
        answer = cli("ledger", "remove", where, "paint")
        assert answer.code == 1
        assert "goes on training the magnitude" in answer.err
        answer = cli("ledger", "export", where, "--format", "peft", "--tasks", "dots", "--output", tmp_path / "out")
        assert "a selection cannot be exported" in answer.err
    assert cli("ledger", "rollback", path, "paint").code == 0
    assert cli("resume", path).code == 0
    assert results_of(path)["accuracy"] == results_of(world.run(method="sd-lora")[0])["accuracy"]


def test_folders_that_hold_no_ledger(cli, tmp_path):
    for words in (("log", tmp_path), ("verify", tmp_path), ("diff", tmp_path, tmp_path), ("remove", tmp_path, "x")):
        answer = cli("ledger", *words)
        assert answer.code == 1
        assert "holds no run and no ledger; give the folder that a run or save_pretrained wrote" in answer.err
    assert "is not a folder" in cli("ledger", "log", tmp_path / "none").err


def test_a_run_of_two_names_the_removed_ones_in_python_too(world, tmp_path):
    path = tmp_path / "run"
    Experiment(world.config(output=str(path), tasks=world.config()["tasks"][:2]), quiet=True).run()
    learner = TrainedModel(path, device="cpu").learner
    learner.remove("paint")
    assert [r.name for r in learner.records] == ["stripes"]
    assert active(path) == ["paint", "stripes"]  # a trained model is opened for reading
