"""A run opened again: its weights, its predictions against their formula, its exports in stock libraries."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from keeplora.data import read_picture
from keeplora.errors import ConfigError, KeepLoraError, LedgerError
from keeplora.experiment import TrainedModel
from keeplora.models import load_model
from tests.cli.tiny_world import TASKS, ledger_tensors, record_of


@pytest.fixture(scope="module")
def picture(world):
    return Image.open(world.root / "paint" / "test" / "red" / "0.png").convert("RGB")


def opened(world, **changes) -> TrainedModel:
    return TrainedModel(world.run(**changes)[0], device="cpu")


def stock_inputs(world, picture, classes):
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    tokenizer, images = (part.from_pretrained(world.model) for part in (AutoTokenizer, CLIPImageProcessorPil))
    text = tokenizer([f"a photo of a {c}." for c in classes], padding=True, return_tensors="pt")
    return {**text, "pixel_values": images(images=picture, return_tensors="pt")["pixel_values"]}


@pytest.mark.parametrize("method", ["keeplora++", "lora", "full-ft"])
def test_weights_are_the_base_and_every_task_s_update(world, method):
    path, _ = world.run(method=method)
    base, model = load_model(world.model).model.state_dict(), TrainedModel(path, device="cpu").family.model.state_dict()
    tensors, changed = ledger_tensors(path), 0
    for name, W in model.items():
        layer = name.removesuffix(".weight")
        expected = base[name].double()
        for i, task in enumerate(TASKS, 1):
            if f"{i:04d}-{task}/A/{layer}" in tensors:
                s = record_of(path, i)["layers"][layer]["s"]
                A, B = (tensors[f"{i:04d}-{task}/{k}/{layer}"].double() for k in "AB")
                expected = expected + s * B @ A
            elif f"{i:04d}-{task}/delta/{layer}" in tensors:
                expected = expected + tensors[f"{i:04d}-{task}/delta/{layer}"].double()
        torch.testing.assert_close(W.double(), expected, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(W, base[name])
    assert changed == 4 * (3 + 2)  # q, k, v, o in every block of both towers, and nothing else


def test_prediction_among_named_classes_is_the_model_s_softmax(world, picture):
    model = opened(world)
    classes = ["cat", "small dog", "red"]
    with torch.no_grad():
        logits = model.family.model(**stock_inputs(world, picture, classes)).logits_per_image[0]
    found = model.predict(picture, classes=classes)
    assert [p.probability for p in found] == sorted((p.probability for p in found), reverse=True)
    assert {p.label: p.probability for p in found} == pytest.approx(
        dict(zip(classes, logits.softmax(0).tolist())), abs=1e-5
    )
    assert {p.task for p in found} == {None}


def test_prediction_among_all_learned_classes_names_the_task(world, picture):
    found = opened(world).predict(picture)
    assert {(p.label, p.task) for p in found} == {
        ("red", "paint"), ("green", "paint"), ("blue", "paint"), ("flat", "stripes"), ("tall", "stripes"),
        ("few", "dots"), ("many", "dots"),
    }  # fmt: skip
    assert sum(p.probability for p in found) == pytest.approx(1, abs=1e-5)
    assert next(p.label for p in found if p.task == "paint") == "red"


def test_cls_prediction_adds_thirty_cosines_with_the_task_s_own_head(world, picture):
    path, _ = world.run(method="keeplora++-cls")
    model = TrainedModel(path, device="cpu")
    family = model.family
    logits = {}
    with torch.no_grad():
        x = family.image_features(family.preprocess(picture)[None])
        for i, task in enumerate(TASKS, 1):
            info = record_of(path, i)["info"]
            plain = family.model(**stock_inputs(world, picture, info["classes"])).logits_per_image[0]
            head = nn.functional.normalize(ledger_tensors(path)[f"{i:04d}-{task}/extra/head"], dim=1)
            logits[task] = dict(zip(info["classes"], (plain + 30 * (x @ head.T)[0]).tolist()))
            assert (30 * (x @ head.T)).abs().max() > 1  # it does weigh
    for task, group in logits.items():
        expected = torch.tensor(list(group.values())).softmax(0).tolist()
        found = {p.label: p.probability for p in model.predict(picture, task=task)}
        assert found == pytest.approx(dict(zip(group, expected)), abs=1e-5)
    every = {label: value for group in logits.values() for label, value in group.items()}
    expected = dict(zip(every, torch.tensor(list(every.values())).softmax(0).tolist()))
    assert {p.label: p.probability for p in model.predict(picture)} == pytest.approx(expected, abs=1e-5)


def test_class_of_two_tasks_is_one_candidate_at_its_best_logit(world, picture):
    tasks = [
        {"name": "paint", "source": "folder", "path": "paint"},
        {"name": "again", "source": "folder", "path": "stripes", "classes": {"flat": "red", "tall": "tall"},
         "templates": ["art of the {c}."]},
    ]  # fmt: skip
    model = opened(world, method="lora", tasks=tasks, probes=[])
    alone = {name: {p.label: p for p in model.predict(picture, task=name)} for name in ("paint", "again")}
    both = model.predict(picture)
    assert sorted(p.label for p in both) == ["blue", "green", "red", "tall"]
    ratio = {
        # odds of red against the task's other class, which the softmax leaves as the logits have them
        "paint": alone["paint"]["red"].probability / alone["paint"]["blue"].probability,
        "again": alone["again"]["red"].probability / alone["again"]["tall"].probability,
    }
    merged = {p.label: p for p in both}
    winner = merged["red"].task
    assert winner in ("paint", "again")
    other = {"paint": "blue", "again": "tall"}
    for name in ("paint", "again"):
        odds = merged["red"].probability / merged[other[name]].probability
        assert odds == pytest.approx(ratio[name], rel=1e-3) if name == winner else odds > ratio[name]
    model.learner.records.reverse()  # whichever task comes first
    turned = {p.label: p for p in model.predict(picture)}
    assert turned["red"].task == winner
    assert {label: p.probability for label, p in turned.items()} == pytest.approx(
        {label: p.probability for label, p in merged.items()}, abs=1e-6
    )


def test_template_of_the_caller_is_used(world, picture):
    model = opened(world)
    plain, other = (model.predict(picture, task="paint", template=t) for t in (None, "art of the {}."))
    assert {p.label: p.probability for p in plain} != {p.label: p.probability for p in other}
    same = model.predict(picture, task="paint", template="a photo of a {}.")
    assert plain == same


def test_wrong_candidates_are_sentences(world, picture):
    model = opened(world)
    with pytest.raises(ConfigError, match="not both"):
        model.predict(picture, classes=["a"], task="paint")
    with pytest.raises(ConfigError, match=r"no learned task is named 'pant'; did you mean 'paint'\?"):
        model.predict(picture, task="pant")
    for classes in ([], ["a", "a"]):
        with pytest.raises(ConfigError, match="must be different names, at least one"):
            model.predict(picture, classes=classes)


def test_adapter_opens_in_stock_peft_with_equal_outputs(world, picture, tmp_path):
    from peft import PeftModel
    from transformers import CLIPModel

    for method in ("keeplora++", "lora"):
        model = opened(world, method=method)
        folder = model.export(tmp_path / method, "peft")
        assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        inputs = stock_inputs(world, picture, ["cat", "red", "blue"])
        base = CLIPModel.from_pretrained(world.model).eval()
        with torch.no_grad():
            untouched = base(**inputs).logits_per_image
            adapted = PeftModel.from_pretrained(base, str(folder)).eval()(**inputs).logits_per_image
            expected = model.family.model(**inputs).logits_per_image
        torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
        assert (adapted - untouched).abs().max() > 0.1
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(world.model)
        assert config["lora_alpha"] == config["r"] == 12  # three tasks of rank 4 side by side


def test_merged_checkpoint_opens_in_stock_transformers_with_equal_outputs(world, picture, tmp_path):
    from transformers import CLIPModel, pipeline

    for method in ("keeplora++", "full-ft"):
        model = opened(world, method=method)
        folder = model.export(tmp_path / method, "merged")
        classes = ["cat", "red", "blue"]
        inputs = stock_inputs(world, picture, classes)
        with torch.no_grad():
            expected = model.family.model(**inputs).logits_per_image
            found = CLIPModel.from_pretrained(folder).eval()(**inputs).logits_per_image
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
        answers = classify(picture, candidate_labels=classes, hypothesis_template="a photo of a {}.")
        shown = {answer["label"]: answer["score"] for answer in answers}
        assert shown == pytest.approx(dict(zip(classes, expected[0].softmax(0).tolist())), abs=1e-5)
        ours = {p.label: p.probability for p in model.predict(picture, classes=classes)}
        assert shown == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("method", ["zero-shot", "full-ft"])
def test_a_method_without_factors_has_no_adapter(world, tmp_path, method):
    with pytest.raises(KeepLoraError, match=rf"\(method {method}\) holds no low-rank factors.*--format merged"):
        opened(world, method=method).export(tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_export_refusals(world, tmp_path):
    model = opened(world)
    for format in ("peft", "merged"):
        with pytest.raises(KeepLoraError, match="exists already; choose a new folder"):
            model.export(tmp_path, format)
    with pytest.raises(ConfigError, match=r"unknown format 'merge'; did you mean 'merged'\?"):
        model.export(tmp_path / "new", "merge")
    assert list(tmp_path.iterdir()) == []


def test_half_finished_run_can_be_used(world, picture, tmp_path, monkeypatch):
    from keeplora.experiment import Experiment
    from keeplora.experiment.runner import STOP_AFTER

    monkeypatch.setenv(STOP_AFTER, "1")
    with pytest.raises(KeyboardInterrupt):
        Experiment(world.config(output=str(tmp_path / "run")), quiet=True).run()
    model = TrainedModel(tmp_path / "run", device="cpu")
    assert model.tasks == ["paint"]
    assert {p.task for p in model.predict(picture)} == {"paint"}


def test_run_of_another_base_model_is_refused(world, tmp_path):
    from safetensors.torch import load_file, save_file

    from tests.models.tiny import make_tiny

    path = world.copied(world.run()[0], tmp_path / "run")
    other = make_tiny("clip", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["vision_model.encoder.layers.0.self_attn.q_proj.weight"] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = path / "config.yaml"
    config.write_text(config.read_text().replace(str(world.model), str(other)))
    with pytest.raises(LedgerError, match="belongs to another base model"):
        TrainedModel(path, device="cpu")


def test_damaged_ledger_is_named(world, tmp_path):
    path = world.copied(world.run()[0], tmp_path / "run")
    file = path / "ledger" / "0002-stripes" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(LedgerError, match=r"0002-stripes/tensors.safetensors does not have the SHA-256"):
        TrainedModel(path, device="cpu")


@pytest.mark.parametrize(
    ("method", "why"), [("oracle", "one model per task"), ("rail-dual", "a regression beside the model")]
)
def test_what_is_no_single_model_is_not_exported(world, tmp_path, method, why):
    path, _ = world.run(method=method)
    for format in ("peft", "merged"):
        with pytest.raises(KeepLoraError, match=why):
            TrainedModel(path).export(tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_predictions_go_through_the_task_s_own_model_and_the_method_s_read_out(world):
    path, results = world.run(method="oracle")
    files = sorted((world.root / "paint/test").rglob("*.png"))
    oracle = TrainedModel(path)
    right = sum(oracle.predict(read_picture(f), task="paint")[0].label == f.parent.name for f in files)
    assert 100 * right / len(files) == pytest.approx(results["accuracy"][3][0])
    with pytest.raises(ConfigError, match="must be told which task"):
        oracle.predict(read_picture(files[0]))
    path, results = world.run(method="rail-dual")
    rail = TrainedModel(path)
    right = sum(rail.predict(read_picture(f), task="paint")[0].label == f.parent.name for f in files)
    assert 100 * right / len(files) == pytest.approx(results["accuracy"][3][0])
    assert abs(results["accuracy"][3][0] - results["accuracy"][0][0]) > 5  # the regression has a say
