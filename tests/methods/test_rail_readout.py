"""RAIL at inference: the fusion of zero-shot and regression, over candidates found by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keeplora.methods.rail import RailPrimal
from keeplora.tuner import KeepLoraConfig
from tests.methods.analytic import CLASSES, ROOT, D, N, features, learn, make, make_model

METHODS = pytest.mark.parametrize("name", ["rail-primal", "rail-dual"])


class Fixed(RailPrimal):
    """Scores of the test's choice for the learned classes "a" and "b"."""

    table: Tensor

    def scores(self, image_features: Tensor) -> tuple[list[str], Tensor]:
        return ["a", "b"], self.table[: len(image_features)]


def fixed(table: list[list[float]], **options: Any) -> Fixed:
    learner = Fixed(make_model(), KeepLoraConfig(**ROOT, options={"hidden": 4, **options}))
    learner.table = torch.tensor(table, dtype=torch.float64)
    return learner


def test_fusion_by_hand():
    learner = fixed([[0.1, 0.9], [0.1, 0.9]], beta=0.8)
    classes = ["new", "b", "a"]
    logits = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
    found = learner.readout(torch.zeros(2, D), logits, classes)
    p = logits[0].double().softmax(0)
    # Row 0: zero-shot says "a", which is learned; the regression says "b".
    fused = torch.stack([0.2 * p[0], 0.2 * p[1] + 0.8 * 0.9, 0.2 * p[2] + 0.8 * 0.1])
    torch.testing.assert_close(found[0], fused.log().float())
    assert int(found[0].argmax()) == 1
    torch.testing.assert_close(found[0].softmax(0), (fused / fused.sum()).float())
    assert torch.equal(found[1], logits[1])  # zero-shot says "new": zero-shot alone, to the bit


def test_a_negative_score_counts_as_nothing():
    learner = fixed([[0.6, -0.4]])
    found = learner.readout(torch.zeros(1, D), torch.tensor([[2.0, 1.0]]), ["a", "b"])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.softmax(1), torch.tensor([[1.0, 0.0]]))
    logits = torch.tensor([[1.0, 2.0]])
    found = fixed([[-3.0, -4.0]]).readout(torch.zeros(1, D), logits, ["a", "b"])
    assert torch.equal(found, logits)  # nothing is above zero: zero-shot alone


def test_beta_is_the_regressions_share():
    logits = torch.tensor([[1.0, 0.0]])
    only_zero_shot = fixed([[0.0, 1.0]], beta=0.0).readout(torch.zeros(1, D), logits, ["a", "b"])
    torch.testing.assert_close(only_zero_shot.softmax(1), logits.softmax(1))
    only_regression = fixed([[0.25, 0.75]], beta=1.0).readout(torch.zeros(1, D), logits, ["a", "b"])
    torch.testing.assert_close(only_regression.softmax(1), torch.tensor([[0.25, 0.75]]))


@METHODS
def test_candidates_are_found_by_name(name):
    learner = make(name)
    learn(learner, "one")
    task = learn(learner, "two")
    x = features(learner, task)
    logits = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    classes = ["bus", "plane", "cat", "car"]
    found = learner.readout(x, logits, classes)
    order = [2, 0, 3, 1]
    permuted = learner.readout(x, logits[:, order], [classes[i] for i in order])
    torch.testing.assert_close(permuted, found[:, order])
    changed = (found != logits).any(1)
    assert torch.equal(changed, logits.argmax(1) != 1)  # "plane" is not learned
    p = logits.softmax(1)
    torch.testing.assert_close(found[changed, 1].exp(), 0.2 * p[changed, 1])  # ... and gets nothing from the regression
    assert learner.readout(x, logits[:, :2], ["plane", "ship"]) is not None
    assert torch.equal(learner.readout(x, logits[:, :2], ["plane", "ship"]), logits[:, :2])


@METHODS
def test_the_read_out_is_exact_under_autocast(name):
    learner = make(name)
    x = features(learner, learn(learner, "one"))
    logits = torch.zeros(N, 3)
    outside = learner.readout(x, logits, CLASSES["one"])
    learner._fitted = None  # solved under autocast too
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(learner.readout(x, logits, CLASSES["one"]), outside)
