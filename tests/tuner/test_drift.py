"""Drift between two states: every number against its definition, from ledgers, adapters and checkpoints."""

from __future__ import annotations

import math

import pytest
from safetensors.torch import save_file

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.math import weight_basis
from keeplora.math.angles import principal_angles
from keeplora.tuner import Ledger
from keeplora.tuner.drift import START, LedgerSide, SavedSide, drift
from keeplora.tuner.leaks.saved import SavedExport
from tests.tuner.blocks import config, learn, make_net


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    learner = ContinualLearner(make_net(), config(), ledger=folder / "ledger")
    for seed, name in enumerate(("a", "b", "c")):
        learn(learner, name, seed)
    return learner, folder


def test_two_states_of_one_ledger(learned):
    learner, folder = learned
    ledger, W0 = Ledger.open(folder / "ledger"), learner.store.W0
    found = drift(LedgerSide("run", ledger, "a", W0), LedgerSide("run", ledger, None, W0), energy=0.5)
    assert found.a == "run @ a"
    assert len(found.rows) == len(learner.targets)
    total = base = 0.0
    for row in found.rows:
        name = row.layer
        W_a = W0[name].double() + learner.records[0].deltas[name].double()
        D = sum(r.deltas[name].double() for r in learner.records[1:])
        U_a, U_b = learner.U.after(name, 1).double(), learner.U[name].double()
        assert row.moved == pytest.approx(float(D.norm()))
        assert row.relative == pytest.approx(float(D.norm() / W_a.norm()))
        assert (row.k_a, row.k_b) == (U_a.shape[1], U_b.shape[1])
        assert row.overlap == pytest.approx(1.0, abs=1e-5)  # what b protects holds what a protected
        assert row.largest_angle < 1e-2
        assert row.moved_in_a < 1e-9  # the method: nothing later acts on what was protected
        D_b = D + learner.records[0].deltas[name].double()
        assert row.b_in_a == pytest.approx(float((D_b @ U_a).norm() ** 2 / D_b.norm() ** 2), rel=1e-5)
        angles = principal_angles(weight_basis(W_a, 0.5), weight_basis(W_a + D, 0.5))
        assert row.weight_angle == pytest.approx(math.degrees(float(angles[-1])), rel=1e-6)
        total, base = total + float(D.norm()) ** 2, base + float(W_a.norm()) ** 2
    assert found.relative == pytest.approx(math.sqrt(total / base))


def test_without_the_base_model(learned):
    ledger = Ledger.open(learned[1] / "ledger")
    found = drift(LedgerSide("run", ledger, START), LedgerSide("run", ledger))
    assert found.relative is None
    for row in found.rows:
        assert row.relative is None
        assert row.weight_angle is None
        assert row.a_in_b is None
        assert row.moved > 0
        assert row.overlap == pytest.approx(1.0, abs=1e-5)


def test_two_runs_whose_subspaces_differ(learned, tmp_path):
    ledger = Ledger.open(learned[1] / "ledger")
    other = ContinualLearner(make_net(), config(energy_weights=0.0), ledger=tmp_path / "ledger")
    learn(other, "x", 7)
    found = drift(LedgerSide("one", ledger), LedgerSide("other", Ledger.open(tmp_path / "ledger")))
    assert any(row.largest_angle > 1 for row in found.rows)
    for row in found.rows:
        U_a, U_b = learned[0].U[row.layer].double(), other.U[row.layer].double()
        wanted = float((U_a.T @ U_b).square().sum()) / min(U_a.shape[1], U_b.shape[1])
        assert row.overlap == pytest.approx(wanted, rel=1e-6)


def test_an_adapter_and_a_checkpoint_on_disk(learned, tmp_path):
    learner, folder = learned
    ledger, W0 = Ledger.open(folder / "ledger"), learner.store.W0
    learner.save_pretrained(tmp_path / "saved")
    adapter = next((tmp_path / "saved/adapters").glob("0001-*"))
    merged = tmp_path / "merged"
    merged.mkdir()
    tensors = {k: v.detach().contiguous() for k, v in learner.model.state_dict().items()}
    save_file(tensors, merged / "model.safetensors")
    first = LedgerSide("run", ledger, "a", W0)
    same = drift(SavedSide("adapter", SavedExport(adapter, learner.targets), learner.targets, W0), first)
    assert max(row.relative for row in same.rows) < 1e-7
    assert all(row.k_a is None and row.overlap is None and row.a_in_b is not None for row in same.rows)
    checkpoint = SavedSide("merged", SavedExport(merged, learner.targets), learner.targets, W0)
    assert max(row.relative for row in drift(LedgerSide("run", ledger, None, W0), checkpoint).rows) < 1e-6
    bare = SavedSide("merged", SavedExport(merged, learner.targets), learner.targets)
    two = drift(bare, bare)
    assert two.relative == 0.0
    assert all(row.a_in_b is None for row in two.rows)
    with pytest.raises(KeepLoraError, match="name it with --model"):
        drift(LedgerSide("run", ledger), bare)


def test_what_is_refused(learned, tmp_path):
    ledger = Ledger.open(learned[1] / "ledger")
    with pytest.raises(KeepLoraError, match="no active task is named 'z'; there are start, a, b, c"):
        LedgerSide("run", ledger, "z")
    other = ContinualLearner(make_net(5), config(), ledger=tmp_path / "ledger")
    with pytest.raises(KeepLoraError, match="different base models"):
        drift(LedgerSide("run", ledger), LedgerSide("other", other._ledger))
