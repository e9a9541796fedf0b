"""A whole experiment: what it measures, what it writes, that it repeats, and that a task which fails leaves nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from PIL import Image

from keeplora.errors import KeepLoraError
from keeplora.experiment import Experiment, TrainedModel
from keeplora.experiment.objective import TaskObjective, initial_head
from keeplora.experiment.runner import Run
from tests.cli.tiny_world import (
    METHODS,
    PROBE,
    TASKS,
    TEST,
    TRAIN,
    events_of,
    ledger_tensors,
    record_of,
    results_of,
    same_tensors,
    status_of,
)

SETS = (*TASKS, PROBE)


def stock_accuracy(world, model: Any, name: str, classes: list[str]) -> float:
    """Percent right on a test folder by `transformers` alone: no code of keeplora."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    tokenizer, images = (part.from_pretrained(world.model) for part in (AutoTokenizer, CLIPImageProcessorPil))
    text = tokenizer([f"a photo of a {c}." for c in classes], padding=True, return_tensors="pt")
    right = total = 0
    for label, word in enumerate(classes):
        for file in sorted((world.root / name / "test" / word).iterdir()):
            pixels = images(images=Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                logits = model(**text, pixel_values=pixels).logits_per_image[0]
            right, total = right + int(logits.argmax() == label), total + 1
    return 100.0 * right / total


# ---- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fills_both_matrices(world, method):
    path, results = world.run(method=method)
    accuracy, probes = results["accuracy"], results["probe_accuracy"]
    assert [len(row) for row in accuracy] == [3] * 4  # row 0 and one per task
    assert [len(row) for row in probes] == [1] * 4
    cells = [value for row in [*accuracy, *probes] for value in row]
    assert all(0 <= value <= 100 for value in cells)
    # A percentage of 12 or 18 test pictures, which no other number is.
    sizes = [len(SEQ) * TEST for SEQ in ("rgb", "ab", "ab")]
    assert all(
        math.isclose(v * n / 100, round(v * n / 100), abs_tol=1e-9) for row in accuracy for v, n in zip(row, sizes)
    )
    assert accuracy[0] == world.run(method="zero-shot")[1]["accuracy"][0]  # nothing has moved before the first task
    assert (accuracy[-1] == accuracy[0]) == (method == "zero-shot")
    assert results == results_of(path)
    assert status_of(path)["state"] == "finished"
    assert status_of(path)["tasks_done"] == 3


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_their_formulas(world, method):
    results = world.run(method=method)[1]
    a, p, m = results["accuracy"], results["probe_accuracy"], results["metrics"]
    assert m["last"] == pytest.approx(sum(a[3]) / 3)
    assert m["average"] == pytest.approx(sum(a[i][j] for i in (1, 2, 3) for j in range(3)) / 9)
    assert m["transfer"] == pytest.approx((a[1][1] + (a[1][2] + a[2][2]) / 2) / 2)
    assert m["bwt"] == pytest.approx(((a[3][0] - a[1][0]) + (a[3][1] - a[2][1])) / 2)
    forgotten = [max(a[1][j], a[2][j]) - a[3][j] for j in (0, 1)]
    assert m["forgetting"] == pytest.approx(sum(forgotten) / 2)
    assert m["probe"] == pytest.approx((p[1][0] + p[2][0] + p[3][0]) / 3)
    assert m["probe_before"] == pytest.approx(p[0][0])


def test_first_and_last_row_are_what_stock_transformers_measures(world):
    from transformers import CLIPModel

    path, results = world.run(method="keeplora++")
    classes = {e["name"]: e["classes"] for e in json.loads((path / "data.json").read_text())["tasks"]}
    untouched = CLIPModel.from_pretrained(world.model).eval()
    trained = TrainedModel(path, device="cpu").family.model
    for row, model in ((0, untouched), (3, trained)):
        found = [stock_accuracy(world, model, name, classes[name]) for name in SETS]
        assert found == pytest.approx([*results["accuracy"][row], *results["probe_accuracy"][row]])
    assert results["accuracy"][0] != results["accuracy"][3]


def test_tasks_are_learned_in_the_order_asked_for(world):
    path, results = world.run(method="lora", order=["dots", "paint", "stripes"])
    assert results["tasks"] == ["dots", "paint", "stripes"]
    assert [record_of(path, i)["name"] for i in (1, 2, 3)] == ["dots", "paint", "stripes"]
    ordered = world.run(method="lora")[1]
    assert results["accuracy"][0] == [ordered["accuracy"][0][TASKS.index(name)] for name in results["tasks"]]
    assert results["comparison_key"] != ordered["comparison_key"]


def test_runs_over_the_same_data_share_their_comparison_key(world):
    keys = {world.run(method=method)[1]["comparison_key"] for method in METHODS}
    assert len(keys) == 1


# ---- what is written -----------------------------------------------------------------------------------------------


def test_run_directory_holds_every_file(world):
    path, results = world.run(method="keeplora++")
    files = {p.name for p in path.iterdir() if p.name != ".lock"}
    assert files == {
        "config.yaml", "environment.json", "data.json", "status.json", "metrics.jsonl", "results.json", "report.html",
        "ledger",
    }  # fmt: skip
    for key in (
        "format", "version", "name", "method", "variant", "model", "suite", "seed", "comparison_key", "tasks", "probes",
        "accuracy", "probe_accuracy", "test_counts", "chance", "metrics", "layers", "tasks_info", "cost", "audit",
        "warnings",
    ):  # fmt: skip
        assert key in results, key
    assert results["test_counts"] == {"paint": 3 * TEST, "stripes": 2 * TEST, "dots": 2 * TEST, PROBE: 2 * TEST}
    assert results["chance"]["paint"] == pytest.approx(100 / 3)
    environment = json.loads((path / "environment.json").read_text())
    assert "torch" in json.dumps(environment)
    page = (path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in SETS)


def test_data_json_tells_sizes_classes_and_fingerprints(world):
    entries = json.loads((world.run(method="keeplora++")[0] / "data.json").read_text())["tasks"]
    assert [(e["name"], e["kind"]) for e in entries] == [*((n, "task") for n in TASKS), (PROBE, "probe")]
    assert [(e["train"], e["test"]) for e in entries[:3]] == [(3 * TRAIN, 3 * TEST), *[(2 * TRAIN, 2 * TEST)] * 2]
    assert (entries[3]["train"], entries[3]["test"]) == (0, 2 * TEST)
    assert entries[0]["classes"] == ["blue", "green", "red"]
    assert len({e["fingerprint"] for e in entries}) == 4
    assert all(len(e["fingerprint"]) == 64 for e in entries)


def test_metrics_jsonl_tells_every_epoch_and_evaluation_in_order(world):
    path, results = world.run(method="keeplora++")
    epochs, evaluations = events_of(path, "epoch"), events_of(path, "evaluation")
    assert [(e["task"], e["epoch"]) for e in epochs] == [(t, n) for t in TASKS for n in (1, 2)]
    assert all(0 < e["loss"] < 100 and 0 <= e["train_accuracy"] <= 100 for e in epochs)
    assert [(e["after"], e["set"]) for e in evaluations] == [(i, name) for i in range(4) for name in SETS]
    shown = [[e["accuracy"] for e in evaluations if e["after"] == i and e["kind"] == "task"] for i in range(4)]
    assert shown == results["accuracy"]
    assert [e["task"] for e in events_of(path, "task_finished")] == list(TASKS)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "task_finished"


@pytest.mark.parametrize("method", ["keeplora++", "keeplora++-cls", "lora", "full-ft", "zero-shot"])
def test_ledger_records_hold_what_the_format_promises(world, method):
    path, _ = world.run(method=method)
    tensors = ledger_tensors(path)
    parents = []
    for i, name in enumerate(TASKS, 1):
        record = record_of(path, i)
        assert (record["format"], record["version"]) == ("keeplora-ledger", 1)
        assert record["name"] == name
        assert len(record["base_hash"]) == 64
        parents.append(record["parent"])
        info = record["info"]
        assert len(info["classes"]) == (3 if name == "paint" else 2)
        assert info["templates"] == ["a photo of a {c}."]
        assert len(info["data"]) == 64
        assert info["training"]["epochs"] == 2
        layers = record["layers"]
        mine = {key.split("/", 1)[1]: v for key, v in tensors.items() if key.startswith(f"{i:04d}-")}
        kinds = {key.split("/")[0] for key in mine}
        assert kinds >= {
            "keeplora++": {"A", "B", "basis"}, "keeplora++-cls": {"A", "B", "basis", "extra"}, "lora": {"A", "B"},
            "full-ft": {"delta"}, "zero-shot": set(),
        }[method]  # fmt: skip
        if method.startswith("keeplora"):
            for layer, entry in layers.items():
                assert entry["s"] > 0
                assert entry["rank"] == mine[f"A/{layer}"].shape[0] == mine[f"B/{layer}"].shape[1]
                assert 0.99 <= entry["explained"] <= 1 + 1e-6  # ε_t reached energy_features
                assert entry["trace"] > 0
                assert mine[f"B/{layer}"].abs().max() > 0
        if method.endswith("cls"):
            assert mine["extra/head"].shape == (len(info["classes"]), 16)
    assert len(set(parents)) == 3
    head = json.loads((path / "ledger" / "ledger.json").read_text())
    assert head["config"]["r"] == 4
    assert head["base"]["name"] == str(world.model)


def test_factors_do_not_leak_into_protected_inputs(world):
    for method in ("keeplora", "keeplora++", "keeplora++-cls"):
        audit = world.run(method=method)[1]["audit"]
        assert audit["factor_leak_max"] <= 1e-5
        assert {row["task"] for row in audit["rows"]} == set(TASKS)
    assert world.run(method="lora")[1]["audit"] is None


def test_shallow_layers_are_scaled_down_by_keeplora_pp_alone(world):
    scales = {m: {r["scale"] for r in world.run(method=m)[1]["layers"]} for m in ("keeplora", "keeplora++")}
    assert scales["keeplora"] == {1.0}
    assert min(scales["keeplora++"]) == pytest.approx(0.2)
    assert max(scales["keeplora++"]) == pytest.approx(1.0)


# ---- repeating -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["keeplora++", "lora"])
def test_resolved_config_repeats_the_run_bit_for_bit(world, tmp_path, method):
    path, results = world.run(method=method)
    torch.manual_seed(12345)  # whatever the caller's random state
    again = Experiment(path / "config.yaml", {"output": str(tmp_path / "again")}, quiet=True).run()
    assert again["accuracy"] == results["accuracy"]
    assert again["probe_accuracy"] == results["probe_accuracy"]
    assert same_tensors(ledger_tensors(tmp_path / "again"), ledger_tensors(path))
    epochs = [[e["loss"] for e in events_of(p, "epoch")] for p in (path, tmp_path / "again")]
    assert epochs[0] == epochs[1]


@pytest.mark.parametrize("method", ["keeplora++", "lora"])
def test_another_seed_is_another_run(world, method):
    path, results = world.run(method=method)
    other, changed = world.run(method=method, seed=1)
    a, b = ledger_tensors(path), ledger_tensors(other)
    assert not any(torch.equal(a[key], b[key]) for key in a if "/B/" in key)
    assert changed["seed"] == 1
    assert changed["accuracy"][0] == results["accuracy"][0]


def test_a_second_run_into_the_same_directory_is_refused(world):
    path, _ = world.run(method="zero-shot")
    before = (path / "results.json").read_bytes()
    with pytest.raises(
        KeepLoraError, match=r"already holds a run \(finished, 3 tasks done\).*keeplora report.*--output"
    ):
        Experiment(world.config(method="zero-shot", output=str(path)), quiet=True).run()
    assert (path / "results.json").read_bytes() == before


# ---- schedules -----------------------------------------------------------------------------------------------------


def test_cosine_and_onecycle_follow_their_formulas(world):
    rate, total = 0.01, 8  # paint: 30 pictures in batches of 8, two epochs; an epoch tells the rate of its last step
    steps = (3, 7)
    path, _ = world.run(method="lora", training={"schedule": "cosine"})
    cosine = [e["lr"] for e in events_of(path, "epoch")[:2]]
    assert cosine == pytest.approx([rate * (1 + math.cos(math.pi * k / total)) / 2 for k in steps], abs=1e-12)
    onecycle = [e["lr"] for e in events_of(world.run(method="lora")[0], "epoch")[:2]]
    peak = 0.3 * total - 1  # torch's OneCycle: from the peak down to rate / 25 / 1e4 by a half cosine
    low = rate / 25 / 1e4
    shares = [(k - peak) / (total - 1 - peak) for k in steps]
    assert onecycle == pytest.approx([low + (rate - low) * (1 + math.cos(math.pi * share)) / 2 for share in shares])
    assert not same_tensors(ledger_tensors(path), ledger_tensors(world.run(method="lora")[0]))


# ---- the "cls" variant ---------------------------------------------------------------------------------------------


def test_trained_heads_decide_the_evaluation(world, tmp_path):
    """Row 3 of a cls run is the accuracy of logits + 30 · cos with the heads in the ledger, and not without them."""
    path, results = world.run(method="keeplora++-cls")
    model = TrainedModel(path, device="cpu")
    family = model.family
    with_head, without = [], []
    for i, name in enumerate(TASKS, 1):
        info, head = record_of(path, i)["info"], ledger_tensors(path)[f"{i:04d}-{name}/extra/head"]
        right = [0, 0]
        for label, word in enumerate(info["classes"]):
            for file in sorted((world.root / name / "test" / word).iterdir()):
                with torch.no_grad():
                    x = family.image_features(family.preprocess(Image.open(file).convert("RGB"))[None])
                    plain = family.logits(x, family.class_features(info["classes"], info["templates"]))
                    cos = (x @ head.T) / (x.norm() * head.norm(dim=1))
                right[0] += int((plain + 30 * cos).argmax() == label)
                right[1] += int(plain.argmax() == label)
        n = TEST * len(info["classes"])
        with_head.append(100 * right[0] / n)
        without.append(100 * right[1] / n)
    assert with_head == pytest.approx(results["accuracy"][3])
    assert without != pytest.approx(results["accuracy"][3])
    assert results["variant"] == "cls"
    # Before a task is learned it has no head: row 0 is the text variant's.
    assert results["accuracy"][0] == world.run(method="keeplora++")[1]["accuracy"][0]


def test_head_in_the_ledger_is_the_trained_one(world):
    """It left the class means of the untouched model, by no more than its few steps of AdamW allow."""
    path, _ = world.run(method="keeplora++-cls")
    setup = Experiment(world.config(method="keeplora++-cls"), quiet=True).setup
    objective = TaskObjective(setup.family, setup.tasks[0], setup.precision)
    start = initial_head(objective, setup.sets["paint"].train, 64).detach()
    moved = (ledger_tensors(path)["0001-paint/extra/head"] - start).abs().max().item()
    assert 1e-4 < moved < 8 * 0.01


# ---- validation ----------------------------------------------------------------------------------------------------


def scripted(monkeypatch, scores: dict[str, list[float]]) -> dict[str, list[torch.Tensor]]:
    """Let validation return these scores; returns the trained parameters as they were at each call."""
    seen: dict[str, list[torch.Tensor]] = {}
    original = Run._selection

    def selection(self, task, objective):
        made = original(self, task, objective)
        if made is None:
            return None

        def validate() -> float:
            assert 0 <= made.validate() <= 100  # the real one works, too
            states = seen.setdefault(task.name, [])
            B = [p.detach().clone() for n, p in self.setup.family.model.named_parameters() if "lora_B" in n]
            states.append(torch.cat([b.flatten() for b in B]))
            return scores[task.name][len(states) - 1]

        return type(made)(validate, made.best_epoch, made.patience)

    monkeypatch.setattr(Run, "_selection", selection)
    return seen


def test_best_epoch_and_early_stopping(world, tmp_path, monkeypatch):
    scores = {"paint": [10, 60, 60, 20], "stripes": [50, 40, 30, 99], "dots": [1, 2, 3, 4]}
    seen = scripted(monkeypatch, scores)
    config = world.config(
        output=str(tmp_path / "run"), validation=0.2, best_epoch=True, early_stopping={"patience": 2},
        training={"epochs": 4},
    )  # fmt: skip
    results = Experiment(config, quiet=True).run()
    assert [i["best_epoch"] for i in results["tasks_info"]] == [2, 1, 4]
    assert [len(i["epochs"]) for i in results["tasks_info"]] == [4, 3, 4]  # stripes stops: two epochs no better
    tensors = ledger_tensors(tmp_path / "run")
    for i, (name, best) in enumerate(zip(TASKS, (2, 1, 4)), 1):
        kept = {k.split("/B/")[1]: v for k, v in tensors.items() if k.startswith(f"{i:04d}-") and "/B/" in k}
        assert sorted(torch.cat([b.flatten() for b in kept.values()]).tolist()) == sorted(seen[name][best - 1].tolist())
    entries = json.loads((tmp_path / "run" / "data.json").read_text())["tasks"]
    assert [(e["train"], e["validation"]) for e in entries[:3]] == [(24, 6), (16, 4), (16, 4)]
    shown = [e["validation_accuracy"] for e in events_of(tmp_path / "run", "epoch")]
    assert shown == [*scores["paint"], *scores["stripes"][:3], *scores["dots"]]


def test_validation_pictures_are_neither_trained_on_nor_tested(world):
    experiment = Experiment(world.config(method="lora", validation={"paint": 0.3}), quiet=True)
    task, other = experiment.setup.tasks[:2]
    assert task.validation is not None
    keys = [set(part.keys) for part in (task.train, task.validation, task.test)]
    assert [len(k) for k in keys] == [21, 9, 18]
    assert not keys[0] & keys[1]
    assert not keys[1] & keys[2]
    assert other.validation is None


# ---- accept --------------------------------------------------------------------------------------------------------


def test_accept_undoes_a_task_in_a_run(world, tmp_path, monkeypatch):
    original = Run._guard_scores

    def guard(self, upto):
        real = original(self, upto)
        assert set(real) == {*(name for name in TASKS[:upto] if name != "stripes"), PROBE}  # undone: nothing to keep
        merged = not any("lora" in n for n, _ in self.setup.family.model.named_modules())
        calls.append((upto, merged))
        # "stripes" costs 30 points; the others nothing.
        drop = 30.0 if upto == 1 and len([c for c in calls if c[0] == 1]) == 2 else 0.0
        return dict.fromkeys(real, 80.0 - drop)

    calls: list[tuple[int, bool]] = []
    monkeypatch.setattr(Run, "_guard_scores", guard)
    config = world.config(
        output=str(tmp_path / "run"), validation=0.2, accept={"max_drop": 5.0, "action": "undo"}, tuner={"r": 4}
    )
    results = Experiment(config, quiet=True).run()
    assert calls == [(0, True), (0, True), (1, True), (1, True), (2, True), (2, True)]
    assert [i["accepted"] for i in results["tasks_info"]] == [True, False, True]
    assert results["accuracy"][2] == results["accuracy"][1]  # nothing of it is left in the model
    assert results["accuracy"][3] != results["accuracy"][2]
    record = record_of(tmp_path / "run", 2)
    assert record["info"]["undone"] is True
    assert all(layer["rank"] == 0 for layer in record["layers"].values())
    assert not [k for k in ledger_tensors(tmp_path / "run") if k.startswith("0002-")]
    told = [w for w in results["warnings"] if "stripes" in w]
    assert any("costs more than 5 points" in w for w in told)
    assert any("undone" in w for w in told)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "costs more than 5 points" in page


def test_accept_never_looks_at_what_is_reported(world):
    setup = Experiment(world.config(validation=0.2, accept={"max_drop": 1.0}), quiet=True).setup
    guard, reported = set(setup.guards[PROBE].pictures.keys), set(setup.probes[0].test.keys)
    assert len(guard) == len(reported) == TEST
    assert not guard & reported


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nan_in_stripes(monkeypatch):
    """The second training batch of the second task has a loss that is not a number."""
    original, seen = TaskObjective.logits, [0]

    def logits(self, batch):
        out = original(self, batch)
        if (
            self.task.name == "stripes"
            and torch.is_grad_enabled()
            and any("lora_B" in n and p.requires_grad for n, p in self.family.model.named_parameters())
        ):
            seen[0] += 1
            if seen[0] == 2:
                return out * math.nan
        return out

    monkeypatch.setattr(TaskObjective, "logits", logits)
    return monkeypatch


def test_a_loss_that_is_not_a_number_keeps_nothing_of_the_task(world, tmp_path, nan_in_stripes):
    path = tmp_path / "run"
    experiment = Experiment(world.config(output=str(path)), quiet=True)
    with pytest.raises(FloatingPointError) as caught:
        experiment.run()
    told = str(caught.value)
    assert "task 'stripes', epoch 1, step 2: the loss is nan" in told
    assert str(world.root / "stripes" / "train") in told
    assert told.count(".png") == 3
    assert "learning_rate" in told
    status = status_of(path)
    assert (status["state"], status["tasks_done"]) == ("failed", 1)
    assert "the loss is nan" in status["error"]
    assert [p.name for p in sorted((path / "ledger").glob("0*"))] == ["0001-paint"]
    # The model stands where task 1 left it: no adapter, no gradient, bit-identical weights.
    model = experiment.setup.family.model
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.grad is None for p in model.parameters())
    kept = TrainedModel(path, device="cpu").family.model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    # And the run can go on from there, to the numbers of one that never failed.
    nan_in_stripes.undo()
    straight, results = world.run(method="keeplora++")
    assert Experiment.resume(path, quiet=True)["accuracy"] == results["accuracy"]
    assert same_tensors(ledger_tensors(path), ledger_tensors(straight))


def test_a_full_residual_space_lets_tasks_sit_out(world):
    path, results = world.run(tuner={"energy_weights": 1.0})
    assert results["accuracy"] == [results["accuracy"][0]] * 4
    assert status_of(path)["state"] == "finished"
    for i, name in enumerate(TASKS, 1):
        record = record_of(path, i)
        assert "no target has residual space left" in record["info"]["not_learned"]
        assert all(layer["rank"] == 0 for layer in record["layers"].values())
        assert any(f"task {name!r} cannot be learned" in w for w in results["warnings"])
    assert [i["trained_parameters"] for i in results["tasks_info"]] == [0, 0, 0]
    assert "cannot be learned" in (path / "report.html").read_text(encoding="utf-8")


def test_output_that_cannot_be_made_is_a_sentence(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeepLoraError, match=r"file/run cannot be made: Not a directory; choose another --output"):
        Experiment(world.config(method="zero-shot", output=str(tmp_path / "file" / "run")), quiet=True).run()


def test_overrides_reach_a_mapping(world):
    experiment = Experiment(world.config(), {"training.epochs": 1, "method": "lora"}, quiet=True)
    assert (experiment.config.method, experiment.config.training.epochs) == ("lora", 1)
    later = Experiment(experiment.config, {"seed": 7}, quiet=True)
    assert (later.config.seed, later.config.method) == (7, "lora")


def test_a_run_killed_in_its_first_task_keeps_the_untouched_model_s_row_in_its_log(world, tmp_path, monkeypatch):
    path, expected = world.run(method="lora")

    def killed(self, task, index):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_learn", killed)
        with pytest.raises(KeyboardInterrupt):
            Experiment(world.config(method="lora", output=str(tmp_path / "run")), quiet=True).run()
    results = Experiment.resume(tmp_path / "run", quiet=True)
    assert results["accuracy"] == expected["accuracy"]
    events = [
        [(e["after"], e["set"], e["accuracy"]) for e in events_of(run, "evaluation")]
        for run in (path, tmp_path / "run")
    ]
    assert events[0] == events[1]
    assert len(events[0]) == 4 * len(SETS)
