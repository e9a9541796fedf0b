"""U is held once, by its smaller side, and nothing of what a learner does can tell the difference."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from keeplora import ContinualLearner
from keeplora.errors import LedgerError
from keeplora.math import Subspace, complement, orthonormality_error
from keeplora.tuner.basis import Bases, StoredStart, StoredTensors, in_force
from keeplora.tuner.ledger import TaskRecord
from tests.tuner.blocks import same, weights
from tests.tuner.stream import batch, learn, logits, loss_fn, make_wide, settings

TASKS = 3


def run(tasks: int = TASKS, **more) -> ContinualLearner:
    ledger = more.pop("ledger", None)
    learner = ContinualLearner(make_wide(), settings(**more), ledger=ledger)
    for i in range(tasks):
        learn(learner, i)
    return learner


def projector(U):
    return U.double() @ U.double().T


@pytest.fixture(scope="module")
def past_half():
    """A learner whose layers all pass half their width, some from the first task and some from the second on."""
    learner = run(2)
    assert all(2 * k > learner.U.start_dims()[name][0] for name, k in learner.U.dims().items())
    return learner


@pytest.mark.parametrize(("memory", "energy_weights"), [("features", 0.1), ("features", 0.7), ("gradients", 0.85)])
def test_the_complement_loses_nothing(monkeypatch, memory, energy_weights):
    """The same three tasks, once with columns alone. Trained by SGD: AdamW turns a difference of 1e-9 into a step."""

    def stream() -> ContinualLearner:
        learner = ContinualLearner(
            make_wide(), settings(memory=memory, energy_weights=energy_weights, energy_features=0.9, r=2)
        )
        for i in range(TASKS):
            model = learner.start_task(f"task {i}", [batch(i)], loss_fn)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
            for _ in range(4):
                optimizer.zero_grad()
                loss_fn(model, batch(i)).backward()
                optimizer.step()
            learner.finish_task()
        return learner

    mine = stream()
    assert sum(mine.U.subspace(t.name).by_complement for t in mine.targets) >= 2
    monkeypatch.setattr(Subspace, "of", classmethod(lambda cls, U: cls(U.to(torch.float32))))
    plain = stream()
    assert not any(plain.U.subspace(t.name).by_complement for t in plain.targets)
    for a, b in zip(mine.records, plain.records, strict=True):
        assert a.used == b.used
        assert a.explained == pytest.approx(b.explained, abs=1e-6)
        for name, f in b.factors.items():
            A, other = a.factors[name].A.double(), f.A.double()
            assert torch.allclose(A.T @ A, other.T @ other, atol=1e-5), name
            assert float(f.delta.abs().max()) > 1e-4
            assert torch.allclose(a.factors[name].delta, f.delta, atol=1e-6)
    for name in plain.U:
        assert torch.allclose(projector(mine.U[name]), projector(plain.U[name]), atol=1e-5)
    for i in range(TASKS):
        assert torch.allclose(logits(mine, i), logits(plain, i), atol=1e-5)
    assert mine.audit().passed


def test_columns_come_in_the_order_in_which_they_came(past_half):
    for t in past_half.targets:
        U0, U = past_half.start_bases()[t.name], past_half.U[t.name]
        parts = [U0, *(record.basis[t.name] for record in past_half.records)]
        assert torch.equal(U, torch.cat(parts, dim=1))
        assert orthonormality_error(U) <= 1e-5
        for i, found in enumerate(past_half.U.before_each(t.name)):
            assert torch.equal(found, torch.cat(parts[: i + 1], dim=1))
            assert torch.equal(past_half.U.after(t.name, i), found)
        S = past_half.U.subspace(t.name)
        assert S.by_complement
        assert float((S.held.double().T @ U.double()).abs().max()) <= 1e-6


def test_state_is_the_smaller_side(past_half):
    found = past_half.U
    wanted = sum(4 * n * min(found.dims()[name], n - found.dims()[name]) for name, (n, _) in found.start_dims().items())
    assert past_half.state_bytes() == wanted
    assert wanted < sum(4 * U.numel() for U in found.values())


def test_a_start_past_half_is_its_complement_from_the_beginning():
    learner = ContinualLearner(make_wide(), settings(energy_weights=0.98))
    start = learner.U.start
    assert any(S.by_complement for S in start.values())
    for name, S in start.items():
        assert torch.allclose(projector(learner.start_bases()[name]), projector(S.basis()), atol=1e-6)
        assert S.bytes == 4 * S.n_in * min(S.k, S.n_in - S.k)


@pytest.mark.parametrize("energy_weights", [0.1, 0.92])
def test_with_a_ledger_the_pieces_stay_on_disk(tmp_path, energy_weights):
    options = {"energy_weights": energy_weights, "energy_features": 0.9, "r": 1}
    kept, plain = run(ledger=tmp_path / "ledger", **options), run(**options)
    for record in kept.records:
        assert isinstance(record.basis, StoredTensors)
    assert isinstance(kept.U.start, StoredStart)
    assert same(kept.U, plain.U)
    assert same(weights(kept.model), weights(plain.model))
    assert kept.state_bytes() == plain.state_bytes()
    assert kept.audit().to_dict() == plain.audit().to_dict()
    for t in kept.targets:
        assert torch.equal(kept.U.subspace(t.name).held, plain.U.subspace(t.name).held)
    # What is held in memory: the smaller sides and nothing else.
    held = kept.U._held
    assert sum(S.bytes for S in held.values()) == kept.U.bytes
    keys = {key.split("/")[0] for key in load_file(tmp_path / "ledger/base.safetensors")}
    assert keys == {"basis"} if energy_weights < 0.5 else "complement" in keys


@pytest.mark.parametrize("energy_weights", [0.1, 0.92])
def test_an_interrupted_learner_goes_on_with_the_same_bits(tmp_path, energy_weights):
    options = {"energy_weights": energy_weights, "energy_features": 0.9, "r": 1}
    straight = run(4, ledger=tmp_path / "straight", **options)
    run(2, ledger=tmp_path / "cut", **options)
    resumed = ContinualLearner.from_pretrained(tmp_path / "cut", make_wide(), append=True)
    for i in (2, 3):
        learn(resumed, i)
    assert same(resumed.U, straight.U)
    assert same(weights(resumed.model), weights(straight.model))
    for t in straight.targets:
        assert torch.equal(resumed.U.subspace(t.name).held, straight.U.subspace(t.name).held)
    saved = straight.save_pretrained(tmp_path / "out")
    again = ContinualLearner.from_pretrained(saved, make_wide())
    assert same(again.U, straight.U)
    assert again.capacity().to_dict() == straight.capacity().to_dict()


def test_a_task_that_is_undone_leaves_U_as_it_was(past_half, monkeypatch):
    before = past_half.U
    monkeypatch.setattr(past_half, "_remember", lambda task, record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn(past_half, 2)
    assert past_half.U is before


def test_a_task_that_sits_out_counts_among_those_behind_U():
    learner = run(1)
    learner.sit_out("sick", {})
    learn(learner, 2)
    assert [record.name for record in learner.U.records] == ["task 0", "sick", "task 2"]
    for name, U in learner.U.items():
        assert torch.equal(learner.U.after(name, 1), learner.U.after(name, 2))
        assert torch.equal(learner.U.after(name, 3), U)
    rows = learner.audit().rows
    assert {row.task for row in rows} == {"task 0", "sick", "task 2"}
    assert learner.audit().passed


def test_a_ledger_that_goes_away_or_changes_under_the_learner_is_named(tmp_path):
    learner = run(2, ledger=tmp_path / "ledger")
    folder = tmp_path / "ledger/0001-task-0"
    file, whole = folder / "tensors.safetensors", load_file(folder / "tensors.safetensors")
    name = learner.targets[0].name
    save_file({**whole, f"basis/{name}": whole[f"basis/{name}"][:, 1:].contiguous()}, file)
    with pytest.raises(LedgerError, match=r"changed while it was in use.*another shape"):
        learner.U.after(name, 1)
    shutil.rmtree(folder)
    with pytest.raises(LedgerError, match=r"cannot be read.*must stay where it is"):
        learner.U.after(name, 1)


def test_a_start_that_is_not_orthonormal_is_refused(tmp_path):
    learner = run(1)
    with pytest.raises(LedgerError, match=r"the stored basis of .* is not orthonormal"):
        learner.restore_bases({n: Subspace(1.1 * U) for n, U in learner.start_bases().items()}, learner.records)


# ---- which columns are in force -----------------------------------------------------------------------------------------


def masked() -> Bases:
    """Three tasks on eight dimensions; the second takes a column of the first out of force, the third one of the second."""
    eye, kept = torch.eye(8), {1: [True, False, True], 2: [True, False, False, True]}
    records = []
    for i, columns in enumerate(([1, 2], [3], [4])):
        record = TaskRecord(f"t{i}", basis={"x": eye[:, columns]})
        if i in kept:
            record.kept["x"] = torch.tensor(kept[i])
        records.append(record)
    return Bases.of({"x": eye[:, :1]}).extended(records[0]).extended(records[1]).extended(records[2])


def test_masks_say_what_was_in_force_at_each_moment():
    U = masked()
    spans = [sorted(U.after("x", i).argmax(0).tolist()) for i in range(4)]
    assert spans == [[0], [0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert [u.argmax(0).tolist() for u in U.before_each("x")] == spans[:3]
    assert (U.dims(), U.added("x").shape) == ({"x": 3}, (8, 4))
    assert torch.equal(U["x"], U.after("x", 3))
    assert torch.equal(projector(U.subspace("x").basis()), projector(U["x"]))
    assert in_force(U.records, "x").tolist() == [True, False, False, True]
    assert torch.equal(U.added_in_force("x"), torch.eye(8)[:, [1, 4]])


def test_columns_that_are_taken_out_bring_a_complement_back_to_columns():
    eye = torch.eye(6)
    many = TaskRecord("many", basis={"x": eye[:, 1:5]})
    fewer = TaskRecord("fewer", basis={"x": eye[:, 5:]}, kept={"x": torch.tensor([True, False, False, False, True])})
    U = Bases.of({"x": eye[:, :1]}).extended(many)
    assert U.subspace("x").by_complement
    U = U.extended(fewer)
    assert not U.subspace("x").by_complement
    assert torch.equal(U["x"], eye[:, [0, 1, 5]])
    assert torch.allclose(projector(complement(complement(U["x"]))), projector(U["x"]))


def test_a_mask_of_another_length_is_refused():
    record = TaskRecord("one", basis={"x": torch.eye(4)[:, :1]}, kept={"x": torch.tensor([True, False])})
    with pytest.raises(LedgerError, match="task 'one': kept/x names 2 columns where the tasks have added 1"):
        Bases.of({"x": torch.zeros(4, 0)}).extended(record).dims()
