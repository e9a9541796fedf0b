"""Weighted positions: C = Σ w x xᵀ and G = Σ w g xᵀ; boolean masks are the weights 0 and 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from keeplora import ContinualLearner
from keeplora.errors import TargetError
from keeplora.tuner.passes import collect_features, collect_gradients
from tests.tuner.blocks import WIDTH, config, make_net, train
from tests.tuner.llama import SUFFIXES, batches, load, token_losses
from tests.tuner.llama import config as llama_config


class Row(nn.Module):
    """One linear, so that C and G can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


X = torch.tensor([[[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]]])  # one sample of three positions
LOSS = lambda m, b: (m(b["x"]) * torch.tensor([1.0, 2.0])).sum().reshape(1)  # noqa: E731  g = (1, 2) everywhere


def both(mask: Tensor | None) -> tuple[Tensor, Tensor]:
    model = Row()
    learner = ContinualLearner(model, config(target_modules=["up"], r=1))
    masks = lambda b: {} if mask is None else {"": mask}  # noqa: E731
    data = [{"x": X}]
    G = collect_gradients(model, learner.targets, learner.store, data, LOSS, masks)["up"]
    C = collect_features(model, learner.targets, learner.store, data, LOSS, masks).C("up")
    return C, G


def test_weights_enter_once_in_both_sums():
    C, G = both(torch.tensor([[4.0, 0.5, 0.0]]))
    # 4·[1,0][1,0]ᵀ + ½·[1,2][1,2]ᵀ, and 4·(1,2)(1,0)ᵀ + ½·(1,2)(1,2)ᵀ
    assert C == pytest.approx(torch.tensor([[4.5, 1.0], [1.0, 2.0]], dtype=torch.float64))
    assert G == pytest.approx(torch.tensor([[4.5, 1.0], [9.0, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_masks_of_zeros_and_ones_are_those_weights(dtype):
    for found, expected in zip(
        both(torch.tensor([[1, 0, 1]]).to(dtype)), both(torch.tensor([[1.0, 0.0, 1.0]])), strict=True
    ):
        assert torch.equal(found, expected)
    C, _ = both(torch.tensor([[1, 0, 1]]).to(dtype))
    assert torch.equal(C, torch.tensor([[10.0, 3.0], [3.0, 1.0]], dtype=torch.float64))


def test_weights_of_one_change_nothing_and_a_common_factor_scales():
    plain, ones, twos = both(None), both(torch.ones(1, 3)), both(torch.full((1, 3), 2.0))
    for i in (0, 1):
        assert torch.equal(plain[i], ones[i])
        assert twos[i] == pytest.approx(2 * plain[i])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_make_no_sense_are_refused(bad):
    with pytest.raises(TargetError, match=r"weights of tower .* must be finite and not negative"):
        both(torch.tensor([[1.0, bad, 1.0]]))


def test_half_precision_weights_are_taken_as_they_are():
    for found, expected in zip(
        both(torch.tensor([[4.0, 0.5, 0.0]], dtype=torch.bfloat16)), both(torch.tensor([[4.0, 0.5, 0.0]])), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_task_takes_them():
    """A position of weight 0 protects nothing: what only it holds stays free; with weight 1 it is protected."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, 3, generator=generator) @ torch.randn(3, WIDTH, generator=generator)
    labels = torch.arange(8) % 3
    data = [{"x": x, "labels": labels}]
    loss = lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["labels"], reduction="none")  # noqa: E731
    shares = {}
    for weight in (0.0, 1.0):
        learner = ContinualLearner(
            make_net(), config(target_modules=["embed"], energy_weights=0.0, energy_features=1.0)
        )
        weights = torch.tensor([1.0, 1.0, 1.0, weight]).expand(8, 4).clone()
        x[:, 3] = torch.eye(WIDTH)[:8]  # directions that no other position has
        with learner.task("a", data, loss, mask_fn=lambda b, w=weights: {"": w}) as model:
            train(model, data, loss=lambda m, b: loss(m, b).mean())
        U = learner.U["embed"]
        shares[weight] = float((torch.eye(WIDTH)[:8] @ U).square().sum() / 8)
    assert shares[0.0] < 0.5
    assert shares[1.0] > 0.99


def test_answer_tokens_alone_in_a_language_model():
    """Weighting all but the answer to zero is the same as cutting the covariance to the answer's positions."""
    model = load()
    learner = ContinualLearner(model, llama_config())
    answers = lambda b: {"": (b["labels"] != -100).float() * 0.25}  # noqa: E731
    C = collect_features(model, learner.targets, learner.store, batches(), token_losses, answers)
    inputs: list[Tensor] = []
    name = f"model.layers.1.mlp.{SUFFIXES[4]}"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches():
            token_losses(model, batch)
    handle.remove()
    rows = torch.cat([x[b["labels"] != -100] for x, b in zip(inputs, batches(), strict=True)]).double()
    assert len(rows) == 3 * (5 + 3)
    assert torch.allclose(C.C(name), 0.25 * rows.T @ rows, atol=1e-5)
