"""WiSE-FT: the mixture, exactly, and its ends."""

from __future__ import annotations

import pytest
import torch

from keeplora.errors import ConfigError
from keeplora.models import load_model
from tests.methods.families import FamilyTask
from tests.methods.steps import check_resumes, make_learner, start, train
from tests.tuner.blocks import same, weights


@pytest.fixture
def clip(clip_folder):
    return load_model(clip_folder)


@pytest.mark.parametrize("options", [{}, {"keep": 0.3}])
def test_weights_are_the_mixture(clip, options):
    keep = options.get("keep", 0.8)
    learner = make_learner("wise-ft", clip, options)
    for name in ("one", "two"):  # the second mixes with what the first left, not with the pretrained weights
        before = weights(clip.model)
        task = FamilyTask(clip, name)
        train(learner, start(learner, task, name), task)
        tuned = weights(clip.model)
        learner.finish_task()
        after = weights(clip.model)
        moved = 0
        for n in before:
            mixture = keep * tuned[n].double() + (1 - keep) * before[n].double()
            # One rounding of the sum W₀ + Σ ΔW, and that of ΔW itself, in units of the weight's last place.
            torch.testing.assert_close(after[n].double(), mixture, rtol=3e-7, atol=1e-7)
            moved += not torch.equal(before[n], tuned[n])
        assert moved == len(learner.targets)


def test_the_ends_are_full_finetuning_and_nothing(clip_folder):
    found = {}
    for name, options in (("full-ft", {}), ("wise-ft", {"keep": 1}), ("wise-ft", {"keep": 0.0})):
        encoder = load_model(clip_folder)
        pretrained = weights(encoder.model)
        learner = make_learner(name, encoder, options)
        task = FamilyTask(encoder, "one")
        train(learner, start(learner, task, "one"), task)
        learner.finish_task()
        found[name, options.get("keep")] = weights(encoder.model)
    assert same(found["wise-ft", 1], found["full-ft", None])
    assert same(found["wise-ft", 0.0], pretrained)
    assert not same(found["full-ft", None], pretrained)


def test_resumes(clip_folder, tmp_path):
    check_resumes("wise-ft", clip_folder, tmp_path / "out", {"keep": 0.6})


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_bad_options(clip, keep):
    with pytest.raises(ConfigError, match=r"tuner.options.keep must lie between 0 and 1, got"):
        make_learner("wise-ft", clip, {"keep": keep})
