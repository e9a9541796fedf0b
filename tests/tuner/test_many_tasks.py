"""What a boundary does, and what a learner holds, does not grow with the number of tasks; and the bits are as if it did."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from keeplora import ContinualLearner
from keeplora.errors import LedgerError
from keeplora.math import Subspace
from keeplora.tuner import stored
from keeplora.tuner.adapter import Factors
from keeplora.tuner.basis import Bases
from keeplora.tuner.ledger import TaskRecord
from keeplora.tuner.stored import StoredFactors, opened
from keeplora.tuner.weights import WeightStore
from tests.tuner.blocks import same, weights
from tests.tuner.stream import learn, make_wide, settings

OPTIONS = {"energy_weights": 0.1, "energy_features": 0.3, "r": 6}


def factors(seed: int, n: int = 12, r: int = 3) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, n, generator=draw), torch.randn(n, r, generator=draw), 0.5)


class Counted(Factors):
    """Factors that count how often their product is formed."""

    formed = 0

    @property
    def delta(self):
        Counted.formed += 1
        return super().delta


def counted(seed: int) -> Counted:
    f = factors(seed)
    return Counted(f.A, f.B, f.s)


def by_hand(W0, updates):
    total = torch.zeros_like(W0)
    for u in updates:
        total = total + u.s * (u.B @ u.A)
    return W0 + total


@pytest.fixture
def store():
    torch.manual_seed(0)
    return WeightStore(nn.Sequential(nn.Linear(12, 12)), ["0"])


def test_a_merge_forms_one_product_once_the_factors_are_more_than_the_sum(store):
    W0, updates = store.module("0").weight.detach().clone(), [counted(i) for i in range(8)]
    per_merge = []
    for i, update in enumerate(updates):
        Counted.formed = 0
        store.add({"0": update})
        per_merge.append(Counted.formed)
        assert torch.equal(store.module("0").weight, by_hand(W0, updates[: i + 1]))
    assert per_merge == [1, 2, 1, 1, 1, 1, 1, 1]  # 72 numbers in a pair of factors, 144 in the sum
    assert store.summed() == {"0"}


def test_every_way_back_is_summed_anew_or_goes_on_from_what_is_held(store):
    W0, updates = store.module("0").weight.detach().clone(), [counted(i) for i in range(6)]
    for update in updates:
        store.add({"0": update})
    before = store.snapshot()
    for chosen in ([0, 1, 2, 3, 4, 5], [0, 1, 2], [0, 2, 4, 5], [1], [0, 1, 2, 3, 4, 5], []):
        store.restore({"0": tuple(updates[i] for i in chosen)} if chosen else {})
        assert torch.equal(store.module("0").weight, by_hand(W0, [updates[i] for i in chosen])), chosen
    assert not store.summed()
    Counted.formed = 0
    store.restore(before)
    assert (Counted.formed, store.summed()) == (6, {"0"})
    store.restore(before)
    assert Counted.formed == 6
    assert torch.equal(store.module("0").weight, by_hand(W0, updates))


def test_what_is_held_is_not_what_a_caller_may_write_into_by_mistake(store):
    whole = torch.ones(12, 12)
    store.add({"0": whole})
    store.add({"0": whole})
    assert store.summed() == {"0"}
    assert torch.equal(whole, torch.ones(12, 12))


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """The same tasks with a ledger and without; enough of them that factors are more than their sum."""
    folder = tmp_path_factory.mktemp("many") / "ledger"
    kept = ContinualLearner(make_wide(), settings(**OPTIONS), ledger=folder)
    plain = ContinualLearner(make_wide(), settings(**OPTIONS))
    for learner in (kept, plain):
        for i in range(5):
            learn(learner, i)
    return kept, plain, folder


def held_factors(learner) -> int:
    """Numbers of A and B in memory."""
    found = [f for r in learner._shelf.values() for f in r.factors.values() if not isinstance(f, StoredFactors)]
    found += [u for us in learner.store.updates.values() for u in us if not isinstance(u, StoredFactors)]
    return sum(f.numel() for f in {id(f): f for f in found}.values())


def test_with_a_ledger_no_more_factors_are_held_than_their_sum_is_large(streams):
    kept, plain, _ = streams
    sizes = {t.name: t.n_in * t.n_out for t in kept.targets}
    assert held_factors(plain) > sum(sizes.values())
    summed = kept.store.summed()
    assert summed
    for name in summed:
        assert all(isinstance(r.factors[name], StoredFactors) for r in kept.records if name in r.factors)
        assert all(isinstance(u, StoredFactors) for u in kept.store.updates[name])
    assert held_factors(kept) < sum(sizes.values())
    assert same(weights(kept.model), weights(plain.model))
    for a, b in zip(kept.records, plain.records, strict=True):
        for name, f in b.factors.items():
            assert torch.equal(a.factors[name].A, f.A)
            assert torch.equal(a.factors[name].B, f.B)
            assert (a.factors[name].s, a.factors[name].numel()) == (f.s, f.numel())
    assert kept.audit().to_dict() == plain.audit().to_dict()


def test_taking_out_putting_back_and_reopening_give_the_same_bits(streams, tmp_path):
    _, plain, folder = streams
    shutil.copytree(folder, tmp_path / "ledger")
    again = ContinualLearner.from_pretrained(tmp_path / "ledger", make_wide(), append=True)
    assert any(isinstance(f, StoredFactors) for r in again.records for f in r.factors.values())
    assert same(weights(again.model), weights(plain.model))
    without = ContinualLearner(make_wide(), settings(**OPTIONS))
    without.store.restore({n: us[:1] + us[2:] for n, us in plain.store.updates.items()})
    again.remove("task 1")
    assert same(weights(again.model), weights(without.model))
    again.restore("task 1")
    assert same(weights(again.model), weights(plain.model))
    again.rollback("task 1")
    for i in (2, 3, 4):
        learn(again, i)
    assert same(weights(again.model), weights(plain.model))
    assert same(again.U, plain.U)
    saved = again.save_pretrained(tmp_path / "out")
    assert same(weights(ContinualLearner.from_pretrained(saved, make_wide()).model), weights(plain.model))


def test_a_ledger_that_is_gone_is_named_when_a_task_is_taken_out(streams, tmp_path):
    shutil.copytree(streams[2], tmp_path / "ledger")
    learner = ContinualLearner.from_pretrained(tmp_path / "ledger", make_wide(), append=True)
    before = weights(learner.model)
    (tmp_path / "ledger/0001-task-0/tensors.safetensors").unlink()
    with pytest.raises(LedgerError, match=r"tensors\.safetensors cannot be read.*must stay where it is"):
        learner.remove("task 1")
    assert same(weights(learner.model), before)


def grown(n: int, tasks: int) -> Bases:
    """U₀ of one direction, and one more per task."""
    eye, U = torch.eye(n), Bases.of({"x": torch.eye(n)[:, :1]})
    for i in range(tasks):
        U = U.extended(TaskRecord(f"t{i}", basis={"x": eye[:, i + 1 : i + 2]}))
        U.subspace("x")
    return U


def test_a_complement_follows_from_the_one_before_and_not_from_all_tasks(monkeypatch):
    U = grown(40, 30)
    anew = Bases(U.start, U.records).subspace("x")
    steps, real = [], Subspace.extended
    monkeypatch.setattr(Subspace, "extended", lambda S, V: steps.append(1) or real(S, V))
    more = U.extended(TaskRecord("next", basis={"x": torch.eye(40)[:, 35:36]}))
    for _ in range(3):
        assert more.subspace("x").k == 32
    assert len(steps) == 1
    assert torch.equal(U.subspace("x").held, anew.held)
    # What is held: the pieces, and what they leave; never more than the width.
    assert sum(r.basis["x"].shape[1] for r in U.records) + 1 + U._past_half["x"].held.shape[1] == 40
    assert not grown(40, 10)._past_half


def test_a_stored_tensor_is_not_read_to_know_that_it_is_there(streams, monkeypatch):
    kept, _, _ = streams
    basis = kept.records[0].basis
    opened = []
    monkeypatch.setattr(type(basis), "_open", lambda self: opened.append(1))
    assert kept.targets[0].name in basis
    assert "nothing" not in basis
    assert kept.targets[0].name in kept.U.start
    assert kept.U.dims() == kept.records[-1].used
    assert not opened


def test_files_are_opened_once_for_a_boundary(streams, tmp_path, monkeypatch):
    shutil.copytree(streams[2], tmp_path / "ledger")
    learner = ContinualLearner.from_pretrained(tmp_path / "ledger", make_wide(), append=True)
    basis = learner.records[0].basis
    names = [t.name for t in learner.targets]
    with opened([record.basis for record in learner.records]):
        monkeypatch.setattr(stored, "safe_open", None)  # opening once more would fail
        inside = {name: basis[name] for name in names}
    monkeypatch.undo()
    assert same(inside, {name: basis[name] for name in names})
