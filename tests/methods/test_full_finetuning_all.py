"""Full fine-tuning of every parameter: what trains, what the ledger brings back, and that nothing stays of a dropped task."""

from __future__ import annotations

import pytest
import torch

from keeplora.models import load_model
from tests.methods.families import FamilyTask
from tests.methods.steps import check_resumes, learn, make_learner, start, train
from tests.models import tiny
from tests.tuner.blocks import same, weights


@pytest.fixture
def clip(clip_folder):
    return load_model(clip_folder)


def test_every_parameter_trains_and_what_the_loss_reaches_moves(clip):
    before = weights(clip.model)
    learner = make_learner("full-ft-all", clip)
    task = FamilyTask(clip, "one")
    model = start(learner, task, "one")
    assert all(p.requires_grad for p in model.parameters())
    assert learner._open.info["trained_parameters"] == sum(p.numel() for p in model.parameters())
    train(learner, model, task)
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    trained = weights(model)
    record = learner.finish_task()
    after = weights(clip.model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == reached
    kinds = ("logit_scale", "token_embedding", "position_embedding", "class_embedding", "layer_norm", "q_proj.weight",
             "q_proj.bias", "mlp.fc1", "visual_projection", "text_projection")  # fmt: skip
    for kind in kinds:
        assert any(kind in n for n in moved), f"{kind} did not move"
    for n in before:
        torch.testing.assert_close(after[n], trained[n], rtol=3e-7, atol=1e-7)
    assert set(record.full) == set(learner.store.names)
    assert len(record.full) == len(before)
    assert {t.name for t in learner.targets} < set(record.full)


@pytest.mark.parametrize("family", ["siglip", "embedded"])
def test_other_families_come_back_from_disk(family, tmp_path):
    folder = tiny.make_tiny(family, tmp_path / family)
    encoder = load_model(folder)
    learner = make_learner("full-ft-all", encoder)
    task = FamilyTask(encoder, "one")
    start = task.mean_loss()
    learn(learner, task, "one")
    assert task.mean_loss() < start
    again = load_model(folder)
    type(learner).from_pretrained(learner.save_pretrained(tmp_path / "out"), again.model)
    assert same(weights(again.model), weights(encoder.model))


def test_a_parameter_that_two_modules_share_is_held_once(clip):
    clip.model.vision_model.pre_layrnorm.bias = clip.model.vision_model.post_layernorm.bias
    learner = make_learner("full-ft-all", clip)
    task = FamilyTask(clip, "one")
    learn(learner, task, "one")
    assert len(learner.store.names) == len(list(clip.model.parameters()))
    assert clip.model.vision_model.pre_layrnorm.bias is clip.model.vision_model.post_layernorm.bias


def test_full_ft_stays_with_the_targets(clip):
    learner = make_learner("full-ft", clip)
    task = FamilyTask(clip, "one")
    learn(learner, task, "one")
    assert set(learner.records[0].full) == {t.name for t in learner.targets}


def test_resumes(clip_folder, tmp_path):
    check_resumes("full-ft-all", clip_folder, tmp_path / "out", {})
