"""CLIP's activation with half of what autograd keeps for it: the same bits, and modules that are given back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import QuickGELUActivation

from benchmarks.machine import kept_bytes
from keeplora import ContinualLearner
from keeplora.tuner.activations import lean_activations, quick_gelu
from tests.tuner.blocks import config, hooks

WIDTH, MLP, BLOCKS, TOKENS = 16, 64, 2, 5


def clip() -> nn.Module:
    torch.manual_seed(0)
    settings = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=8,
        patch_size=4,
    )  # fmt: skip
    return CLIPVisionModel(settings).eval()


def pictures(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2])) for _ in range(2)]


def loss_fn(model: nn.Module, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(10 * model(pixel_values=batch[0]).pooler_output, batch[1])


def learner_of(model: nn.Module) -> ContinualLearner:
    return ContinualLearner(model, config(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))


def activations(model: nn.Module) -> list[QuickGELUActivation]:
    return [m for m in model.modules() if isinstance(m, QuickGELUActivation)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_bits_in_both_directions(dtype):
    torch.manual_seed(0)
    x, g = (8 * torch.randn(37, 53)).to(dtype), torch.randn(37, 53).to(dtype)
    x[0, :3] = torch.tensor([0.0, 60.0, -60.0])
    found = []
    for function in (QuickGELUActivation(), quick_gelu):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(g)
        found.append((y.detach(), leaf.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_gradients():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, (x,))
    assert torch.autograd.gradgradcheck(quick_gelu, (x,))


def test_half_of_each_activation_is_kept():
    model = clip()
    learner = learner_of(model)
    batch = pictures()[0]
    kept = []
    learner.start_task("a", pictures(), loss_fn)
    assert learner._open is not None
    assert learner._open.adapter is not None
    kept.append(kept_bytes(lambda: loss_fn(model, batch), model))
    learner._open.adapter._restore_activations()
    kept.append(kept_bytes(lambda: loss_fn(model, batch), model))
    one = 3 * TOKENS * MLP * 4
    assert kept[1] - kept[0] == BLOCKS * one, "σ(1.702 x) of each block, and nothing else"
    learner.abort_task()


def test_a_task_learns_the_same_bits_without_it(monkeypatch):
    results = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr("keeplora.tuner.adapter.lean_activations", lambda model: lambda: None)
        learner = learner_of(clip())
        for i, name in enumerate("ab"):
            with learner.task(name, pictures(i), loss_fn) as model:
                assert all(("forward" in vars(m)) == lean for m in activations(model))
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
                for batch in pictures(i):
                    optimizer.zero_grad()
                    loss_fn(model, batch).backward()
                    optimizer.step()
        results.append(learner.records)
    for a, b in zip(*results, strict=True):
        for name, factors in a.factors.items():
            assert torch.equal(factors.A, b.factors[name].A)
            assert torch.equal(factors.B, b.factors[name].B)
            assert factors.B.abs().max() > 0


@pytest.mark.parametrize("end", ["finish_task", "abort_task"])
def test_modules_are_given_back(end):
    model = clip()
    before = hooks(model)
    learner = learner_of(model)
    learner.start_task("a", pictures(), loss_fn)
    assert all(m.forward is quick_gelu for m in activations(model))
    copied = copy.deepcopy(model)  # as a teacher is made while a task is open
    assert all(m.forward is quick_gelu for m in activations(copied))
    getattr(learner, end)()
    assert not any("forward" in vars(m) for m in model.modules())
    assert hooks(model) == before


def test_what_somebody_replaced_is_left_alone():
    model = nn.Sequential(QuickGELUActivation(), QuickGELUActivation())
    first, second = activations(model)
    first.forward = own = lambda input: input
    restore = lean_activations(model)
    assert first.forward is own
    second.forward = later = lambda input: 2 * input
    restore()
    assert first.forward is own
    assert second.forward is later
