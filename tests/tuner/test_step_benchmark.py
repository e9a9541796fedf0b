"""benchmarks/step.py in miniature: its arms do the same work, and what they keep is ordered as it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import kept_bytes
from tests.tuner.blocks import hooks, same, weights
from tests.tuner.llama import SUFFIXES, batches, load, mean_loss

SCRIPTS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, SCRIPTS)  # as Python does for a script
step, step_works = importlib.import_module("step"), importlib.import_module("step_works")
sys.path.remove(SCRIPTS)


@pytest.fixture
def work() -> Any:
    model, batch = load(), batches(size=4)[0]

    def infer() -> torch.Tensor:
        return model(input_ids=batch["input_ids"], use_cache=False).logits

    return step_works.Work(
        "tiny", model, lambda: mean_loss(model, batch), infer, step_works.targets_of(model, 3, SUFFIXES)
    )


def gradients(work: Any, arm: str) -> tuple[float, dict[str, torch.Tensor]]:
    with step.opened(arm, work) as parameters:
        for p in parameters:
            with torch.no_grad():
                if p.shape[0] > p.shape[1]:  # B, which starts at zero
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        loss = work.loss()
        loss.backward()
        return float(loss), {n: p.grad for n, p in work.model.named_parameters() if p.grad is not None}


def test_arms_do_the_same_work_and_give_the_model_back(work):
    before, hooked = weights(work.model), hooks(work.model)
    plain, fused = gradients(work, "ours"), gradients(work, "fused")
    assert fused[0] == pytest.approx(plain[0], rel=1e-6)
    assert fused[1].keys() == plain[1].keys()
    assert all("lora_B" in name for name in plain[1])
    for name, gradient in plain[1].items():
        assert torch.allclose(fused[1][name], gradient, atol=1e-6), name
        assert gradient.abs().max() > 1e-6
    assert {"lora_A", "lora_B"} == {n.split(".")[-3] for n in gradients(work, "lora")[1]}
    assert gradients(work, "floor")[1] == {}
    assert same(weights(work.model), before)
    assert hooks(work.model) == hooked


def test_a_frozen_A_keeps_h_alone(work):
    kept = {}
    for arm in ("floor", "lora", "ours", "fused"):
        with step.opened(arm, work):
            kept[arm] = kept_bytes(work.loss, work.model)
    rows = 4 * 9
    h = len(work.targets) * rows * 3 * 4
    assert kept["ours"] - kept["floor"] == h
    assert kept["fused"] == kept["ours"]
    # Plain LoRA keeps the inputs of A as well: of each block two norms' outputs and down_proj's, o_proj's is kept anyway.
    assert kept["lora"] - kept["ours"] >= 2 * rows * (64 + 64 + 128) * 4


def test_serving_is_measured_on_a_model_that_moved_and_comes_back(work):
    before = weights(work.model)
    with step.opened("ours", work) as parameters:
        step.make_step(work, parameters)()
        assert any(p.abs().max() > 0 for p in parameters)
    found = step.serving(work, range(2), torch.device("cpu"))
    assert {state: len(seconds) for state, seconds in found.items()} == {"base": 2, "merged": 2, "lora": 2}
    assert all(s > 0 for seconds in found.values() for s in seconds)
    assert same(weights(work.model), before)
