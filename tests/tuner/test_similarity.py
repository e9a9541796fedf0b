"""Similarity of tasks from a ledger: against the covariances, and against what can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.math import Subspace
from keeplora.methods import get_method
from keeplora.tuner import Ledger
from keeplora.tuner.similarity import (
    Directions,
    TaskFeatures,
    disturbance,
    energy_inside,
    gradient_inside,
    ledger_features,
    overlap_matrix,
    pairs_of,
    updates_of,
)
from tests.tuner.blocks import config, learn, make_net

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # tiny layers are full soon


def ledger(folder, seeds=(1, 2, 1), **kwargs) -> Ledger:
    torch.manual_seed(0)  # dropout draws
    learner = ContinualLearner(make_net(), config(**{"energy_features": 0.95, **kwargs}), ledger=folder / "ledger")
    for i, seed in enumerate(seeds):
        learn(learner, f"t{i}", seed)
    return Ledger.open(folder / "ledger")


def test_a_task_is_most_alike_to_itself(tmp_path):
    """Tasks 0 and 2 are of the same data."""
    found = ledger_features(ledger(tmp_path, keep_covariance=True))
    assert list(found) == ["t0", "t1", "t2"]
    assert all(t.exact for t in found.values())
    matrix = overlap_matrix(found, 0.9)
    assert matrix[0][2] > 0.9 > matrix[0][1]
    assert matrix[0][2] == matrix[2][0]
    assert energy_inside(found["t2"], found["t0"], 0.9) > energy_inside(found["t1"], found["t0"], 0.9)
    assert energy_inside(found["t0"], found["t0"], 0.9) >= 0.9


def test_the_ledgers_columns_say_the_same_of_earlier_tasks(tmp_path):
    """Σ of ``values`` along an earlier task's columns is tr(VᵀCV)/tr C: as the covariance has it."""
    exact = ledger(tmp_path / "exact", energy_features=0.7, keep_covariance=True)
    plain = ledger(tmp_path / "plain", energy_features=0.7)
    columns, records = ledger_features(plain), exact.records()
    assert not any(t.exact for t in columns.values())
    for layer, V in plain.records()[0].basis.items():
        w = columns["t1"].beyond[layer]
        inside = float((w.w * (V.double().T @ w.Q.double()).square().sum(0)).sum())
        C = records[1].covariance[layer].double()
        assert inside == pytest.approx(float((V.double() * (C @ V.double())).sum() / C.diagonal().sum()), abs=1e-5)
    assert energy_inside(columns["t0"], columns["t2"]) is None  # t2's columns came after t0's energy was measured
    assert energy_inside(columns["t2"], columns["t0"]) is not None


def test_an_own_subspace_is_the_fewest_columns():
    s = Directions(torch.eye(4), torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))
    assert [s.own(e).shape[1] for e in (0.5, 0.79, 0.95, 1.0)] == [1, 2, 3, 4]
    assert Directions(torch.eye(2), torch.zeros(2).double()).own(0.9).shape == (2, 0)


def test_a_gradient_is_inside_what_the_features_span():
    """By hand: U₀ = e₁, i's own subspace = e₂; of a gradient's rows what lies along e₁ does not count."""
    start = {"l": Subspace.of(torch.eye(4)[:, :1]), "m": Subspace.of(torch.eye(4)[:, :1])}
    beyond = {name: Directions(torch.eye(4)[:, 1:2], torch.ones(1, dtype=torch.float64)) for name in ("l", "m")}
    one = TaskFeatures("i", beyond=beyond, start=start)
    G = {"l": torch.tensor([[9.0, 3.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]), "m": torch.tensor([[5.0, 0.0, 0.0, 6.0]])}
    assert gradient_inside(G, one) == pytest.approx(9 / (9 + 1 + 36))
    assert gradient_inside({"l": G["l"], "elsewhere": G["m"]}, one) == pytest.approx(0.9)
    assert gradient_inside({"l": torch.tensor([[7.0, 0.0, 0.0, 0.0]])}, one) is None  # nothing beyond U₀


def test_disturbance_is_the_energy_that_an_update_adds():
    X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
    D = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    w, Q = torch.linalg.eigh(X.T @ X / float(X.square().sum()))
    one = TaskFeatures("t", whole={"l": Directions(Q, w), "m": Directions(Q, w)})
    wanted = float((X @ D.double().T).square().sum() / X.square().sum())
    assert disturbance({"l": D}, one) == pytest.approx(wanted / 2)  # the other layer is left alone


def test_pairs_and_drops(tmp_path):
    found = ledger(tmp_path, keep_covariance=True)
    accuracy = [[10.0, 11.0, 12.0], [90.0, 13.0, 14.0], [80.0, 91.0, 15.0], [75.0, 91.5, 92.0]]
    pairs = pairs_of("run", ["t0", "t1", "t2"], accuracy, updates_of(found.records()), ledger_features(found))
    assert [(p.earlier, p.later, p.drop) for p in pairs] == [("t0", "t1", 10.0), ("t0", "t2", 5.0), ("t1", "t2", -0.5)]
    assert all(v is not None and v >= 0 for p in pairs for k, v in p.predicted.items() if k != "gradient")
    assert {p.predicted["gradient"] for p in pairs} == {None}  # a ledger has no gradients
    given = pairs_of("run", ["t0", "t1", "t2"], accuracy, {}, ledger_features(found), gradients={"t2": {"t0": 0.25}})
    assert [p.predicted["gradient"] for p in given] == [None, 0.25, None]
    unfinished = pairs_of("run", ["t0", "t1", "t2"], accuracy[:3], {}, ledger_features(found))
    assert [p.drop for p in unfinished] == [10.0, None, None]
    assert unfinished[0].predicted["update"] is None
    assert unfinished[0].predicted["overlap"] is not None


def test_a_protected_task_is_disturbed_less_than_an_unprotected_one(tmp_path):
    kept = ledger(tmp_path / "kept", (1, 2), keep_covariance=True, energy_weights=0.0)
    plain = get_method("lora").learner(make_net(), config(), ledger=tmp_path / "lora")
    for i, seed in enumerate((1, 2)):
        learn(plain, f"t{i}", seed)
    features = ledger_features(kept)
    ours = disturbance(updates_of(kept.records())["t1"], features["t0"])
    theirs = disturbance(updates_of(plain.records)["t1"], features["t0"])
    assert ours < 0.2 * theirs


def test_what_is_refused(tmp_path):
    plain = get_method("lora").learner(make_net(), config(), ledger=tmp_path / "lora")
    learn(plain, "t0", 1)
    with pytest.raises(KeepLoraError, match="keeps no subspaces"):
        ledger_features(Ledger.open(tmp_path / "lora"))
    with pytest.raises(KeepLoraError, match="version 0"):
        ledger_features(Ledger.open(FIXTURES / "ledger_v0/ledger"))
