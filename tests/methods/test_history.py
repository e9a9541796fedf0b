"""Every method goes back to an earlier task; every method lets a single task go, or says why it cannot."""

from __future__ import annotations

import pytest
import torch

from keeplora.errors import KeepLoraError, LedgerError
from keeplora.methods import get_method, method_names
from keeplora.models import load_model
from keeplora.tuner import Ledger
from tests.methods.families import TASKS, FamilyTask
from tests.methods.test_methods import make_learner, train
from tests.tuner.blocks import same, weights

NAMES = list({get_method(name).learner: name for name in method_names()}.values())
IRREMOVABLE = {"joint", "moelora", "sd-lora"}


class Sequence:
    """A method on a tiny CLIP, and tasks that alternate between two sets of pictures."""

    def __init__(self, name, folder):
        self.name = name
        self.encoder = load_model(folder)
        self.learner = make_learner(name, self.encoder)
        self.follow()

    def follow(self):
        self.tasks = {name: FamilyTask(self.encoder, name) for name in TASKS}

    @classmethod
    def opened(cls, name, folder, saved):
        self = cls.__new__(cls)
        self.name, self.encoder = name, load_model(folder)
        self.learner = get_method(name).learner.from_pretrained(saved, self.encoder.model)
        self.follow()
        return self

    def learn(self, name, which, seed):
        task = self.tasks[which]
        torch.manual_seed(seed)
        model = task.start(self.learner, name, reference=task.batches)
        train(self.name, self.learner, model, task, steps=2)
        return self.learner.finish_task()

    def answers(self):
        """What it answers, as a run measures it: for each task that it may be told."""
        found = []
        for told, which in (("one", "one"), ("two", "two"), ("three", "one")):
            task = self.tasks[which]
            with torch.no_grad(), self.learner.serving(told):
                batch = task.batches[0]
                found.append(self.learner.readout(task.image_features(batch), task.logits(batch), task.classes))
        return found


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tensors(record):
    return record.file()


@pytest.fixture(scope="module")
def learned(clip_folder, tmp_path_factory):
    """Three tasks of a method, what it was after the second, and the folder it was saved to; each made once."""
    made = {}

    def make(name):
        if name not in made:
            one = Sequence(name, clip_folder)
            one.learn("one", "one", 1)
            one.learn("two", "two", 2)
            after = weights(one.encoder.model), one.answers(), one.learner.state_bytes(), dict(one.learner.U)
            one.learn("three", "one", 3)
            made[name] = after, one.learner.save_pretrained(tmp_path_factory.mktemp(name) / "saved")
        return made[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_rollback_equals_never_having_learned(name, learned, clip_folder, tmp_path):
    (before, answers, size, U), saved = learned(name)
    one = Sequence.opened(name, clip_folder, saved)
    third = one.learner.records[2]
    one.learner.rollback("two")
    assert same(weights(one.encoder.model), before)
    assert equal(one.answers(), answers)
    assert one.learner.state_bytes() == size
    assert same(one.learner.U, U)
    again = one.learn("three", "one", 3)  # the same numbers as the first time
    assert same(tensors(again), tensors(third))
    folder = one.learner.save_pretrained(tmp_path / "again")
    two = Sequence.opened(name, clip_folder, folder)
    assert [r.name for r in two.learner.records] == ["one", "two", "three"]
    assert same(weights(two.encoder.model), weights(one.encoder.model))
    assert equal(two.answers(), one.answers())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in IRREMOVABLE])
def test_a_task_is_taken_out_as_if_its_record_had_never_been(name, learned, clip_folder, tmp_path):
    _, saved = learned(name)
    one = Sequence.opened(name, clip_folder, saved)
    first, _, third = one.learner.records
    whole, answers = weights(one.encoder.model), one.answers()
    one.learner.remove("two")

    # A learner that was given the two records, and never knew of the third.
    other = Sequence(name, clip_folder)
    other.learner.records = [first, third]
    if other.learner.accumulates:
        for record in (first, third):
            other.learner.store.add(record.updates)
    other.learner._recall(other.learner.records)
    assert same(weights(one.encoder.model), weights(other.encoder.model))
    assert equal(one.answers(), other.answers())
    if name != "zero-shot":
        assert not equal(one.answers(), answers)

    one.learn("four", "two", 4)
    one.learner.restore("two")
    assert [r.name for r in one.learner.records] == ["one", "two", "three", "four"]
    one.learner.rollback(4)  # before the restoration, without the fourth
    assert same(weights(one.encoder.model), weights(other.encoder.model))
    one.learner.rollback(3)
    assert same(weights(one.encoder.model), whole)
    assert equal(one.answers(), answers)

    Ledger.open(saved / "ledger").remove("two")
    try:
        two = Sequence.opened(name, clip_folder, saved)
        assert same(weights(two.encoder.model), weights(other.encoder.model))
        assert equal(two.answers(), other.answers())
    finally:
        Ledger.open(saved / "ledger").rollback(len(Ledger.open(saved / "ledger").entries()) - 1)


@pytest.mark.parametrize("name", sorted(IRREMOVABLE))
def test_who_cannot_let_a_task_go_says_why(name, learned, clip_folder):
    _, saved = learned(name)
    one = Sequence.opened(name, clip_folder, saved)
    before = weights(one.encoder.model)
    for task in ("one", "three"):
        with pytest.raises(KeepLoraError, match=r"cannot be removed: this method .*; go back to an earlier task"):
            one.learner.remove(task)
    assert same(weights(one.encoder.model), before)
    ledger = Ledger.open(saved / "ledger")
    with pytest.raises(LedgerError, match=r"no task of this ledger can be removed, for the method"):
        ledger.remove("one")
    ledger.head["learner"]["irremovable"] = ""  # as version 0, which does not say
    ledger.remove("one")
    with pytest.raises(LedgerError, match=r"a task was taken out of it, but this method .*; restore that task"):
        Sequence.opened(name, clip_folder, saved)
    ledger.restore("one")
    assert same(weights(Sequence.opened(name, clip_folder, saved).encoder.model), before)


def test_marks_of_a_removed_task_are_not_lost_to_the_others(clip_folder):
    """RegLoRA keeps an entry with the first task that marks it; without that task it is the second one's."""
    one = Sequence("reglora", clip_folder)
    one.learner.options = type(one.learner.options)(lam=2500.0, share=50.0)
    for name, which, seed in (("one", "one", 1), ("two", "one", 2), ("three", "one", 3)):
        one.learn(name, which, seed)
    layer = one.learner.targets[0].name
    one.learner.remove("one")
    from keeplora.methods.reg_lora import largest

    factors = [r.factors[layer] for r in one.learner.records]
    wanted = torch.cat([largest(f.B @ f.A, 50.0) for f in factors]).unique()
    assert torch.equal(one.learner.marks(layer).sort().values, wanted)
