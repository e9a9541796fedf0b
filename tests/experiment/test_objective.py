"""The loss, the batches of the statistics, the "cls" head and the accuracy, each against its formula."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from keeplora.data import load_task
from keeplora.experiment.candidates import candidates_for
from keeplora.experiment.device import Precision
from keeplora.experiment.objective import TaskObjective, accuracy, add_head, initial_head, predict
from keeplora.experiment.pictures import Collate, PictureTensors, TensorCache, loader
from keeplora.models import load_model

TEMPLATES = ["a photo of a {c}.", "art of the {c}.", "a bad photo of the {c}."]
FP32 = Precision("fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def family(world):
    return load_model(world.model)


@pytest.fixture
def task(world):
    return load_task({"name": "paint", "source": "folder", "path": "paint", "templates": TEMPLATES}, world.root)


@pytest.fixture
def objective(family, task):
    return TaskObjective(family, task, FP32)


@pytest.fixture
def data(family, task):
    return PictureTensors(task.train, family, TensorCache())


def batch_of(data, objective, indices=(0, 11, 12, 25)):
    return objective.collate([data[i] for i in indices])


def test_loss_is_cross_entropy_of_stock_logits_with_the_first_template(family, task, objective, data):
    batch = batch_of(data, objective)
    text = family.tokenizer([f"a photo of a {c}." for c in task.classes], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = family.model(**text, pixel_values=batch["pixel_values"]).logits_per_image
        loss = objective.loss(family.model, batch)
    expected = -logits.log_softmax(dim=1)[range(4), [task.train.labels[i] for i in (0, 11, 12, 25)]]
    assert loss.shape == (4,)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_loss_reaches_the_weights_of_both_towers(family, objective, data):
    weights = [
        family.model.get_submodule(f"{tower}.encoder.layers.0.self_attn.q_proj").weight
        for tower in ("vision_model", "text_model")
    ]
    found = torch.autograd.grad(objective.loss(family.model, batch_of(data, objective)).mean(), weights)
    assert all(g.abs().max() > 0 for g in found)


def test_head_adds_thirty_cosines():
    torch.manual_seed(0)
    logits, x, head = torch.randn(5, 3), nn.functional.normalize(torch.randn(5, 8), dim=1), 7 * torch.randn(3, 8)
    expected = torch.tensor(
        [
            [logits[n, c] + 30 * nn.functional.cosine_similarity(x[n], head[c], dim=0) for c in range(3)]
            for n in range(5)
        ]
    )
    torch.testing.assert_close(add_head(logits, x, head), expected, rtol=1e-5, atol=1e-5)


def test_head_takes_part_in_the_loss_and_gets_a_gradient(family, task, objective, data):
    batch = batch_of(data, objective)
    plain = objective.logits(batch).detach()
    objective.head = nn.Parameter(torch.randn(3, 16))
    logits = objective.logits(batch)
    torch.testing.assert_close(
        logits, plain + 30 * family.image_features(batch["pixel_values"]) @ nn.functional.normalize(objective.head).T
    )
    objective.loss(family.model, batch).mean().backward()
    assert objective.head.grad is not None
    assert objective.head.grad.abs().max() > 0
    family.model.zero_grad(set_to_none=True)


def test_head_starts_at_the_class_means(family, objective, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = initial_head(objective, data, batch_size=7)
    assert isinstance(head, nn.Parameter)
    assert head.requires_grad
    with torch.no_grad():
        features = family.image_features(torch.stack([data[i]["pixel_values"] for i in range(len(data))]))
    for label in range(3):
        mean = features[torch.tensor(data.labels) == label].mean(dim=0)
        torch.testing.assert_close(head[label].detach(), mean / mean.norm(), rtol=1e-5, atol=1e-5)


def test_class_without_a_picture_starts_at_its_text_feature(family, task, objective):
    task.train = task.train.subset([i for i, label in enumerate(task.train.labels) if label != 1])
    data = PictureTensors(task.train, family, TensorCache())
    with pytest.warns(UserWarning, match=r"task 'paint': class 'green' has no training picture.*text feature") as told:
        head = initial_head(objective, data, batch_size=8)
    assert len(told) == 1
    text = family.class_features(task.classes, task.templates)
    torch.testing.assert_close(head[1].detach(), text[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(head[0].detach(), text[0], atol=1e-2)


def test_feature_batches_are_every_picture_and_every_prompt_once(family, task, objective, data):
    batches = list(objective.feature_batches(loader(data, 8, Collate())))
    pictures = [b for b in batches if "pixel_values" in b]
    texts = [b for b in batches if "input_ids" in b]
    assert len(pictures) + len(texts) == len(batches)
    assert sum(len(b["pixel_values"]) for b in pictures) == len(data)
    assert not any("input_ids" in b for b in pictures)
    rows = [family.tokenizer.decode(row, skip_special_tokens=True).strip() for b in texts for row in b["input_ids"]]
    assert len(rows) == len(set(rows)) == 9  # 3 classes x 3 templates
    assert objective.masks(texts[0]).keys() == {"text_model"}
    mask = objective.masks(texts[0])["text_model"]
    assert torch.equal(mask, texts[0]["attention_mask"].bool())
    assert not mask.all()  # the prompts differ in length: something is masked out


def test_inference_averages_every_template(family, task, data):
    pixels = torch.stack([data[i]["pixel_values"] for i in (0, 15)])
    with torch.no_grad():
        mean = torch.zeros(3, 16)
        for template in TEMPLATES:
            text = family.tokenizer([template.format(c=c) for c in task.classes], padding=True, return_tensors="pt")
            mean += nn.functional.normalize(family.model.get_text_features(**text).pooler_output, dim=1) / 3
        x = nn.functional.normalize(family.model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        expected = family.model.logit_scale.exp() * x @ nn.functional.normalize(mean, dim=1).T
        head = torch.randn(3, 16)
        found = predict(family, candidates_for(task), pixels)
        with_head = predict(family, candidates_for(task), pixels, head)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_head - found, 30 * x @ nn.functional.normalize(head, dim=1).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_accuracy_counts_right_answers_whatever_the_batch(family, task, batch_size):
    data = PictureTensors(task.test, family, TensorCache())
    with torch.no_grad():
        pixels = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
        logits = predict(family, candidates_for(task), pixels)
        best = logits.argmax(dim=1)
        # A head that pulls every picture to class 2 by 30 · 2 points at most.
        head = torch.stack([-(x := family.image_features(pixels).mean(dim=0)), -x, x])
        pulled = (logits + 30 * family.image_features(pixels) @ nn.functional.normalize(head).T).argmax(dim=1)
    labels, calls = torch.tensor(data.labels), []
    found = accuracy(family, candidates_for(task), data, FP32, batch_size, on_batch=lambda: calls.append(1))
    assert found == pytest.approx(100 * float((best == labels).float().mean()))
    assert len(calls) == -(-len(data) // batch_size)
    assert not torch.equal(best, pulled)
    assert accuracy(family, candidates_for(task), data, FP32, batch_size, head) == pytest.approx(
        100 * float((pulled == labels).float().mean())
    )


def test_pictures_past_the_memory_limit_are_decoded_again(family, task):
    size = 3 * 32 * 32 * 4
    cache = TensorCache(max_bytes=2 * size)
    data = PictureTensors(task.train, family, cache)
    first = [data[i]["pixel_values"] for i in range(4)]
    again = [data[i]["pixel_values"] for i in range(4)]
    assert [a is b for a, b in zip(first, again)] == [True, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert cache.left == 0


def test_candidates_of_other_tasks_compete_and_shared_names_are_one(family, task):
    other = SimpleNamespace(classes=["zebra", task.classes[1]], templates=["a drawing of a {}."])
    data = PictureTensors(task.test, family, TensorCache())
    pixels = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    wide = candidates_for(task, [task, other])
    assert wide.classes == [*task.classes, "zebra"]
    with torch.no_grad():
        logits = predict(family, wide, pixels)
        torch.testing.assert_close(logits[:, :3], predict(family, candidates_for(task), pixels))
        zebra = family.class_features(["zebra"], other.templates)
        torch.testing.assert_close(logits[:, 3:], family.logits(family.image_features(pixels), zebra))

    def zebra_wins(image_features, logits, classes):
        assert classes == wide.classes
        return logits + 1e4 * torch.tensor([0.0, 0, 0, 1])

    assert accuracy(family, wide, data, FP32, 8, readout=zebra_wins) == 0.0
    assert accuracy(family, wide, data, FP32, 8) > 0
    # Seen from the other task: its own two first, labels point to them.
    assert candidates_for(other, [task, other]).classes == ["zebra", task.classes[1], task.classes[0], task.classes[2]]


def test_a_copy_of_the_model_answers_in_its_place(family, task, objective, data):
    batch = objective.collate([data[i] for i in range(4)])
    teacher = copy.deepcopy(family.model)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.1)
        mine, theirs = objective.logits(batch), objective.logits(batch, teacher)
        assert not torch.allclose(mine, theirs)
        # By its own scale, too; the teachers of lwf and zscl have the student's, which those methods leave alone.
        features = objective.image_features(batch, teacher), objective.text_features(batch, teacher)
        torch.testing.assert_close(theirs, family.around(teacher).logits(*features))
        assert torch.equal(objective.logits(batch), mine)
