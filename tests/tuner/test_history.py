"""Going back, taking a task out and putting it in again: equal to recomputation, bit for bit, in memory and on disk."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError, LedgerError
from keeplora.tuner import Ledger
from keeplora.tuner.audit import layer_rows
from tests.tuner.blocks import config, learn, loader, loss_fn, make_net, same, train, weights

NAMES = ("a", "b", "c", "d")


def fresh(ledger=None, *, base=None, **kwargs):
    return ContinualLearner(make_net() if base is None else base, config(**kwargs), ledger=ledger, base_name="net")


def learned(count=4, ledger=None, **kwargs):
    learner = fresh(ledger, **kwargs)
    for i, name in enumerate(NAMES[:count]):
        torch.manual_seed(i)  # dropout
        learn(learner, name, i)
    return learner


def summed(net, records):
    """round(W₀ + Σ s B A + Σ full), written out: the sum that a learner must hold, whatever happened before."""
    out = weights(net)
    for name in list(out):
        layer = name.removesuffix(".weight")
        parts = [
            r.factors[layer].s * (r.factors[layer].B @ r.factors[layer].A) if layer in r.factors else r.full[key]
            for r in records
            for key in dict.fromkeys((layer, name))
            if (layer in r.factors and key == layer) or key in r.full
        ]
        if parts:
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            out[name] = (out[name].float() + total).to(out[name].dtype)
    return out


def next_A(learner, seed=9):
    """A of the next task, and what it does to the model in training: all that a past can change."""
    torch.manual_seed(seed)
    model = learner.start_task("next", loader(seed=seed), loss_fn)
    A = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    train(learner.model, loader(seed=seed))
    learner.finish_task()
    return A


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_removal_is_the_sum_without_the_task(gone, dtype):
    cast = lambda m, b: loss_fn(m, (b[0].to(dtype), b[1]))  # noqa: E731
    learner = fresh(base=make_net(dtype=dtype))
    for i, name in enumerate(NAMES):
        with learner.task(name, loader(seed=i), cast) as model:
            train(model, loader(seed=i), loss=cast)
    whole, U, records = weights(learner.model), learner.U, list(learner.records)
    learner.remove(gone)
    kept = [r for r in records if r.name != gone]
    assert same(weights(learner.model), summed(make_net(dtype=dtype), kept))
    assert not same(weights(learner.model), whole)
    assert [r.name for r in learner.records] == [n for n in NAMES if n != gone]
    assert [r.name for r in learner.history] == list(NAMES)
    assert same(learner.U, U)  # still protected: later tasks rely on it
    assert [r.name for r in learner.removed] == [gone]
    assert learner.audit().passed
    assert {row.task for row in learner.audit().rows} == {r.name for r in kept}
    learner.restore(gone)
    assert same(weights(learner.model), whole)
    assert learner.records == records
    assert learner.removed == []


def test_two_removals_and_back_in_another_order():
    learner = learned()
    whole, records = weights(learner.model), list(learner.records)
    learner.remove("b")
    learner.remove("c")
    assert same(weights(learner.model), summed(make_net(), [records[0], records[3]]))
    learner.restore("b")
    assert same(weights(learner.model), summed(make_net(), [records[0], records[1], records[3]]))
    learner.restore("c")
    assert same(weights(learner.model), whole)


def test_removing_the_last_task_equals_going_back_to_the_one_before():
    one, other = learned(3), learned(3)
    one.remove("c")
    other.rollback("b")
    assert same(weights(one.model), weights(other.model))
    assert same(one.U, other.U)
    assert same(next_A(one), next_A(other))
    assert same(weights(one.model), weights(other.model))


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("to", ["a", "b", 0])
def test_rollback_equals_never_having_learned(to, on_disk, tmp_path):
    learner = learned(3, tmp_path / "ledger" if on_disk else None)
    count = {"a": 1, "b": 2, 0: 0}[to]
    learner.rollback(to)
    straight = learned(count)
    assert same(weights(learner.model), weights(straight.model))
    assert same(learner.U, straight.U)
    assert learner.start_bases().keys() == straight.start_bases().keys()
    if on_disk:
        learner = ContinualLearner.from_pretrained(tmp_path / "ledger", make_net(), append=True)
        assert same(weights(learner.model), weights(straight.model))
    assert same(next_A(learner), next_A(straight))
    assert same(weights(learner.model), weights(straight.model))
    assert same(learner.U, straight.U)
    assert [r.name for r in learner.records] == [*NAMES[:count], "next"]


def test_a_rollback_is_undone_by_going_to_the_entry_before_it():
    learner = learned(3)
    whole, U = weights(learner.model), learner.U
    learner.rollback("a")
    learner.rollback(3)
    assert same(weights(learner.model), whole)
    assert same(learner.U, U)


def test_learning_goes_on_after_a_removal_and_respects_what_was_removed(tmp_path):
    learner = learned(3, tmp_path / "ledger")
    V = learner.records[1].basis
    learner.remove("b")
    next_A(learner)
    f = learner.records[-1].factors
    for name, factors in f.items():
        assert float((factors.A @ V[name]).abs().max()) <= 1e-6
    assert learner.audit().passed
    again = ContinualLearner.from_pretrained(tmp_path / "ledger", make_net())
    assert same(weights(again.model), weights(learner.model))
    assert same(again.U, learner.U)
    assert [r.name for r in again.records] == ["a", "c", "next"]
    again.restore("b")  # in memory alone: the folder was not opened for writing
    assert same(weights(again.model), summed(make_net(), [again._shelf[i] for i in (1, 2, 3, 5)]))
    assert [s.kind for s in Ledger.open(tmp_path / "ledger").chain().steps][-1] == "task"


def test_the_folder_and_the_memory_tell_the_same(tmp_path):
    """Every operation on a learner with a ledger; a ledger by itself; a learner without one, saved at the end."""
    a, b = learned(ledger=tmp_path / "a"), learned()
    ledger = Ledger.open(shutil.copytree(tmp_path / "a", tmp_path / "c"))
    for operation, what in (
        ("remove", "b"), ("rollback", "c"), ("remove", "d"), ("remove", 1), ("restore", "a"), ("rollback", 6),
    ):  # fmt: skip
        errors = []
        for one in (a, b, ledger):
            try:
                getattr(one, operation)(what)
            except LedgerError as error:
                errors.append(str(error))
        assert len(set(errors)) <= 1
        assert len(errors) in (0, 3)
    assert same(weights(a.model), weights(b.model))
    saved = b.save_pretrained(tmp_path / "b")
    found = [ContinualLearner.from_pretrained(folder, make_net()) for folder in (tmp_path / "a", saved, tmp_path / "c")]
    for one in found:
        assert same(weights(one.model), weights(a.model))
        assert same(one.U, a.U)
        assert one._chain.steps == a._chain.steps
        assert [r.name for r in one.removed] == [r.name for r in a.removed]
    assert sorted(p.name for p in (saved / "adapters").iterdir()) == [f"{r.entry:04d}-{r.name}" for r in a.records]


def test_free_modules_and_a_learner_without_protection_are_exact():
    for kwargs in ({"free_modules": ["head"]}, {"memory": "gradients"}):
        learner = learned(3, **kwargs)
        records = list(learner.records)
        learner.remove("b")
        assert same(weights(learner.model), summed(make_net(), [records[0], records[2]]))
        learner.rollback(0)
        assert same(weights(learner.model), weights(make_net()))


def test_a_name_can_be_learned_again():
    learner = learned(3)
    learner.remove("b")
    learn(learner, "b", 7)
    assert [r.name for r in learner.records] == ["a", "c", "b"]
    with pytest.raises(LedgerError, match="beside another of its name"):
        learner.restore(2)
    learner.remove("b")
    learner.restore(2)
    assert [r.entry for r in learner.records] == [1, 2, 3]


def test_what_cannot_be_done_changes_nothing(tmp_path):
    learner = learned(2, tmp_path / "ledger")
    before, entries = weights(learner.model), len(Ledger.open(tmp_path / "ledger").entries())
    for call, sentence in (
        (lambda: learner.remove("x"), "the ledger has no task 'x'"),
        (lambda: learner.restore("a"), "is active already"),
        (lambda: learner.rollback(7), "there is no entry 7"),
    ):
        with pytest.raises(LedgerError, match=sentence):
            call()
    learner.start_task("open", loader(), loss_fn)
    for call in (lambda: learner.remove("a"), lambda: learner.rollback(0), lambda: learner.restore("a")):
        with pytest.raises(KeepLoraError):
            call()
    learner.abort_task()
    assert same(weights(learner.model), before)
    assert len(Ledger.open(tmp_path / "ledger").entries()) == entries


def test_a_ledger_that_cannot_be_written_leaves_the_learner_as_it_was(tmp_path, monkeypatch):
    learner = learned(3, tmp_path / "ledger")
    before, U, records = weights(learner.model), learner.U, list(learner.records)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("keeplora.tuner.ledger.write_sealed", full)
    for call in (lambda: learner.remove("b"), lambda: learner.rollback("a")):
        with pytest.raises(OSError, match="No space"):
            call()
        assert same(weights(learner.model), before)
        assert same(learner.U, U)
        assert learner.records == records
    monkeypatch.undo()
    learner.remove("b")
    assert [r.name for r in learner.records] == ["a", "c"]


def test_a_loaded_learner_can_be_saved_with_all_that_it_has_behind_it(tmp_path):
    ledger = Ledger.open(learned(4, tmp_path / "one")._ledger.path)
    ledger.write_metrics(2, {"tasks": {"b": 50.0}})
    ledger.remove("b")
    ledger.rollback(4)
    ledger.remove("b")
    ledger.purge("b")
    first = ContinualLearner.from_pretrained(tmp_path / "one", make_net())
    first.remove("c")
    saved = first.save_pretrained(tmp_path / "two")
    second = ContinualLearner.from_pretrained(saved, make_net())
    assert same(weights(second.model), weights(first.model))
    assert same(second.U, first.U)
    assert second._chain.state == first._chain.state
    assert not any(key.startswith(("A/", "B/")) for key in second._shelf[2].file())
    second.restore("c")
    with pytest.raises(LedgerError, match="purged"):
        second.restore("b")
    assert Ledger.open(saved / "ledger").entries()[1].metrics() == {"tasks": {"b": 50.0}}


def test_the_audit_counts_the_directions_of_removed_tasks():
    """c's factor is made to act on what b protected: it was in U when c was learned, whether or not b is active now."""
    learner = learned(3)
    learner.remove("b")
    layer = next(n for n, V in learner.history[1].basis.items() if V.shape[1] and n in learner.records[1].factors)
    f, V = learner.records[1].factors[layer], learner.history[1].basis[layer]
    learner.records[1].factors[layer] = dataclasses.replace(f, A=f.A + 0.1 * V[:, :1].T)
    audit = learner.audit()
    assert not audit.passed
    (row,) = [row for row in audit.rows if row.factor_leak > 1e-5]
    assert (row.layer, row.task) == (layer, "c")
    rows = next(row for row in layer_rows(learner) if row["layer"] == layer)
    assert len(rows["used"]) == 4
    assert rows["used"][-1] == learner.U[layer].shape[1]


def test_beside_a_quantised_base_the_adapter_holds_the_others_alone():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    from keeplora.tuner.adapter_store import PAST
    from tests.tuner import llama

    learner = ContinualLearner(llama.load("4bit"), llama.config(), base_name="tiny")
    for i, name in enumerate(("a", "b", "c")):
        llama.learn(learner, name, i)
    a, _, c = learner.records
    learner.remove("b")
    for name in llama.LAYERS:
        past = getattr(learner.model.get_submodule(name), PAST)
        parts = [r.factors[name] for r in (a, c) if name in r.factors]
        assert torch.equal(past.A, torch.cat([f.A for f in parts]))
        assert torch.equal(past.B, torch.cat([f.s * f.B for f in parts], dim=1))
    learner.rollback(0)
    assert not [n for n, _ in learner.model.named_modules() if n.endswith(PAST)]


def test_a_ledger_that_somebody_else_changed_is_not_written_to(tmp_path):
    learner = learned(2, tmp_path / "ledger")
    before = weights(learner.model)
    Ledger.open(tmp_path / "ledger").remove("a")
    with pytest.raises(LedgerError, match=r"has 3 entries, but had 2 .*; open the learner anew"):
        learner.remove("b")
    with pytest.raises(LedgerError, match="open the learner anew"):
        learn(learner, "c", 3)
    assert same(weights(learner.model), before)
    assert [r.name for r in learner.records] == ["a", "b"]
    assert len(Ledger.open(tmp_path / "ledger").entries()) == 3
