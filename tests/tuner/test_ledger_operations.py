"""A ledger's operations on disk: crashes between two writes, purges, version 0, what verify and diff tell of other methods."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keeplora import ContinualLearner
from keeplora.errors import LedgerError
from keeplora.methods import get_method
from keeplora.tuner import Ledger, TaskRecord
from keeplora.tuner import ledger as ledger_module
from keeplora.tuner.ledger_check import compare_ledgers, verify
from tests.fixtures.make_ledger_v0 import TwoBlocks, batches
from tests.fixtures.make_ledger_v0 import loss_fn as two_blocks_loss
from tests.methods.lifecycle import learn as learn_with
from tests.tuner.blocks import TARGETS, config, learn, make_net, same, weights

V0 = Path(__file__).parents[1] / "fixtures" / "ledger_v0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("operations") / "ledger"
    learner = ContinualLearner(make_net(), config(), ledger=path, base_name="net")
    for i, name in enumerate(("a", "b", "c")):
        learn(learner, name, i)
    return path


@pytest.fixture
def ledger(made, tmp_path):
    return Ledger.open(shutil.copytree(made, tmp_path / "ledger"))


class Crash(BaseException):
    """A kill: no handler of ours catches it and goes on."""


def everything(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def visible(path):
    """Files that are not remnants of a write that was cut short."""
    return {name for name in everything(path) if not any(part.startswith(".") for part in Path(name).parts)}


OPERATIONS = {
    "remove": lambda ledger: ledger.remove("b"),
    "rollback": lambda ledger: ledger.rollback("a"),
    "restore": lambda ledger: ledger.restore("c"),
    "purge": lambda ledger: ledger.purge("b"),
    "append": lambda ledger: ledger.append(TaskRecord("sat out", info={"why": "no capacity"})),
}


def killed_at(stop, call, monkeypatch):
    """Run ``call`` and die before its ``stop``-th touch of the disk; whether it came to its end."""
    left = [stop]

    def counted(real):
        def touched(*args, **kwargs):
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return real(*args, **kwargs)

        return touched

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (Path, "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        # What a kill leaves behind stays: nothing is tidied up on the way out.
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(os, "unlink", lambda *args, **kwargs: None)
        try:
            call()
        except Crash:
            return False
    return True


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_crash_after_any_write_is_the_old_state_or_the_new_one(ledger, operation, tmp_path, monkeypatch):
    """The process dies at the first, second, ... touch of the disk in one operation; then somebody goes on."""
    if operation in ("restore", "purge"):
        ledger.remove("c" if operation == "restore" else "b")
    straight = Ledger.open(shutil.copytree(ledger.path, tmp_path / "straight"))
    old = straight.state()
    OPERATIONS[operation](straight)
    new = straight.state()
    wanted = ContinualLearner.from_pretrained(straight.path, make_net())
    seen, ended, stop = set(), False, 0
    while not ended:
        path = Path(shutil.copytree(ledger.path, tmp_path / f"copy-{stop}"))
        copy = Ledger.open(path)
        ended = killed_at(stop, lambda copy=copy: OPERATIONS[operation](copy), monkeypatch)
        state = Ledger.open(path).state()
        assert state in (old, new)
        assert state == new or not ended
        seen.add(state == new)
        verify(Ledger.open(path))
        if state == old:
            OPERATIONS[operation](Ledger.open(path))
        learner = ContinualLearner.from_pretrained(path, make_net(), append=True)  # heals what was cut short
        assert same(weights(learner.model), weights(wanted.model))
        assert same(learner.U, wanted.U)
        assert json.loads((path / "HEAD.json").read_text())["entries"] == len(learner._chain)
        assert visible(path) == visible(straight.path)
        stop += 1
    assert seen == {True, False}
    assert stop > 5


def test_a_full_disk_changes_nothing(ledger, monkeypatch):
    before = everything(ledger.path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "write_sealed"):
        with monkeypatch.context() as patch:
            patch.setattr(ledger_module, name, full)
            with pytest.raises(OSError, match="No space"):
                ledger.append(ledger.record(1))
        assert everything(ledger.path) == before


def test_an_entry_beyond_the_end_by_two_is_refused(ledger):
    end = (ledger.path / "HEAD.json").read_bytes()
    ledger.remove("b")
    ledger.restore("b")
    (ledger.path / "HEAD.json").write_bytes(end)
    with pytest.raises(LedgerError, match="names 3 entries and there are 5"):
        ledger.state()


def test_purge_keeps_what_later_tasks_rely_on_and_nothing_else(ledger):
    directions = ledger.record(2).directions()
    U = ContinualLearner.from_pretrained(ledger.path, make_net()).U
    ledger.remove("b")
    ledger.purge("b")
    file = ledger.path / "0005-purge-b" / "tensors.safetensors"
    assert {key.partition("/")[0] for key in directions} == {"basis", "values"}
    assert same(load_file(file), directions)
    assert not (ledger.path / "0002-b" / "tensors.safetensors").exists()
    assert same(ContinualLearner.from_pretrained(ledger.path, make_net()).U, U)
    ledger.remove("c")
    ledger.purge("c")  # nothing was learned after it
    assert [p.name for p in (ledger.path / "0007-purge-c").iterdir()] == ["record.json"]
    assert not (ledger.path / "0003-c" / "tensors.safetensors").exists()
    verify(ledger)
    learner = ContinualLearner.from_pretrained(ledger.path, make_net(), append=True)
    assert [r.name for r in learner.history] == ["a"]
    learn(learner, "d", 5)
    assert ledger.record(8).name == "d"


def test_entries_that_are_not_there_are_named(ledger):
    with pytest.raises(LedgerError, match="no task at entry 9"):
        ledger.record(9)
    with pytest.raises(LedgerError, match="no task at entry 0"):
        ledger.write_metrics(0, {})
    ledger.remove("a")
    with pytest.raises(LedgerError, match="no task at entry 4"):
        ledger.record(4)
    with pytest.raises(LedgerError, match="is not active"):
        ledger.remove("a")


# ---- version 0 --------------------------------------------------------------------------------------------------


@pytest.fixture
def v0(tmp_path):
    return Path(shutil.copytree(V0, tmp_path / "v0"))


def test_a_ledger_of_version_0_is_gone_on_with(v0):
    before = everything(v0 / "ledger")
    learner = ContinualLearner.from_pretrained(v0, TwoBlocks(), append=True)
    with learner.task("third", batches(37), two_blocks_loss) as model:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        two_blocks_loss(model, batches(37)[0]).mean().backward()
        optimizer.step()
    ledger = Ledger.open(v0 / "ledger")
    assert [e.value["version"] for e in ledger.entries()] == [0, 0, 1]
    after = everything(v0 / "ledger")
    assert {name: after[name] for name in before} == before  # nothing that version 0 wrote was touched
    assert set(after) - set(before) == {"HEAD.json", "0003-third/record.json", "0003-third/tensors.safetensors"}
    again = ContinualLearner.from_pretrained(v0, TwoBlocks())
    assert same(weights(again.model), weights(learner.model))
    assert len(verify(ledger)) > 5


def test_every_operation_works_on_version_0(v0):
    ledger = Ledger.open(v0 / "ledger")
    whole = weights(ContinualLearner.from_pretrained(v0, TwoBlocks()).model)
    ledger.remove("First task")
    (second,) = ledger.records()
    expected = weights(TwoBlocks())
    for name, f in second.factors.items():
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + f.delta
    assert same(weights(ContinualLearner.from_pretrained(v0, TwoBlocks()).model), expected)
    ledger.restore(1)
    assert same(weights(ContinualLearner.from_pretrained(v0, TwoBlocks()).model), whole)
    ledger.rollback(0)
    assert same(weights(ContinualLearner.from_pretrained(v0, TwoBlocks()).model), weights(TwoBlocks()))
    ledger.rollback(4)
    ledger.remove(1)
    ledger.purge(1)
    ledger.write_metrics(2, {"score": 1.0})
    verify(ledger)


def test_version_0_without_an_end_is_read_and_with_later_entries_is_not(v0):
    ledger = Ledger.open(v0 / "ledger")
    shutil.rmtree(next((v0 / "ledger").glob("0002-*")))  # the hole that version 1 closes
    assert [r.name for r in ledger.records()] == ["First task"]
    ledger.rollback(0)
    (v0 / "ledger" / "HEAD.json").unlink()
    with pytest.raises(LedgerError, match=r"HEAD\.json is missing"):
        ledger.entries()


# ---- verify and diff for every kind of record -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["keeplora", "inflora", "gpm-lora", "lora", "full-ft"])
def test_verify_asks_of_each_method_what_it_promises(method, tmp_path):
    chosen = get_method(method)
    values = {"r": 3, "lora_alpha": 3, "energy_features": 0.8, "target_modules": TARGETS}
    learner = chosen.learner(make_net(), chosen.make_config(values), ledger=tmp_path / "ledger")
    for i, name in enumerate(("a", "b")):
        learn_with(learner, name, i)
    words = " ".join(check.what for check in verify(Ledger.open(tmp_path / "ledger")))
    assert ("rows of A" in words) == (method in ("keeplora", "inflora"))
    assert ("‖A U‖/‖A‖" in words) == (method == "gpm-lora")
    assert ("U after" in words) == (method not in ("lora", "full-ft"))


def test_diff_of_ledgers_that_part(ledger, tmp_path):
    other = Ledger.open(shutil.copytree(ledger.path, tmp_path / "other"))
    learner = ContinualLearner.from_pretrained(other.path, make_net(), append=True)
    learner.rollback("b")
    learn(learner, "d", 7)
    told = compare_ledgers(ledger, other)
    assert told["same_base"]
    assert told["common"] == 3
    assert told["only_a"] == []
    assert [(e["kind"], e["name"]) for e in told["only_b"]] == [("rollback", "b"), ("task", "d")]
    sides = [{r.name: r for r in one.records()} for one in (ledger, other)]
    for row in told["layers"]:
        deltas = [
            sum(r.factors[row["layer"]].delta.double() for r in side.values() if row["layer"] in r.factors)
            for side in sides
        ]
        assert row["difference"] == pytest.approx(float((deltas[0] - deltas[1]).norm()), rel=1e-6, abs=1e-9)
        assert row["relative"] == pytest.approx(row["difference"] / max(row["a"], row["b"]))
    assert json.loads(json.dumps(told)) == told
