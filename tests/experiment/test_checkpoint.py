"""The files of a checkpoint: whole or not at all, of one run and moment alone, and when they are written."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
import torch

from keeplora.experiment import checkpoint as module
from keeplora.experiment.checkpoint import CheckpointError, Checkpoints, Identity, Keeper, ledger_digest, seal
from keeplora.experiment.interrupt import STOP, Interrupted
from tests.cli.tiny_world import World

WHO = Identity("pets", 2, "c", "l", "d", {"torch": "2"}, "cpu")


def snapshot(value: float = 1.0):
    return {"parameter/w": torch.full((2, 3), value), "rng/torch": torch.arange(5, dtype=torch.uint8)}, {
        "loop": {"step": 3}
    }


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(p.name for p in checkpoints.path.iterdir())


def test_what_is_written_is_read_bit_for_bit_and_only_the_newest_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.read(WHO) is None
    checkpoints.write(WHO, 1, snapshot(0.1))
    checkpoints.write(WHO, 1, snapshot(0.2))
    found = checkpoints.read(WHO)
    assert found is not None
    assert torch.equal(found[0]["parameter/w"], snapshot(0.2)[0]["parameter/w"])
    assert torch.equal(found[0]["rng/torch"], snapshot()[0]["rng/torch"])
    assert (found[1]["loop"], found[1]["steps"]) == ({"step": 3}, 1)
    assert names(checkpoints) == ["0002-00000002"]


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("task", "cars", "it is of another task"),
        ("index", 1, "it is of another place in the order"),
        ("config", "x", "the configuration has changed"),
        ("ledger", "x", "the learned tasks are others now"),
        ("data", "x", "the task's data have changed"),
        ("versions", {"torch": "3"}, "the installed libraries are others now"),
        ("device", "cuda", "it was written on another kind of device"),
    ],
)
def test_what_belongs_to_another_run_is_refused_in_words(tmp_path, field, value, why):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(WHO, 1, snapshot())
    with pytest.raises(CheckpointError, match=f"^{why}$"):
        checkpoints.read(replace(WHO, **{field: value}))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: (f / "state.json").unlink(), "state.json is missing or no JSON"),
        (lambda f: (f / "state.json").write_text("[" * 100_000), "state.json is missing or no JSON"),
        (lambda f: (f / "state.json").write_bytes(b"\xff\xfe"), "state.json is missing or no JSON"),
        (lambda f: (f / "state.json").write_text("[]"), "its format is not 'keeplora-checkpoint'"),
        (lambda f: (f / "tensors.safetensors").unlink(), "tensors.safetensors is missing or damaged"),
        (lambda f: (f / "tensors.safetensors").write_bytes(b""), "tensors.safetensors is damaged"),
    ],
)
def test_damage_is_told_in_words(tmp_path, spoil, why):
    checkpoints = Checkpoints(tmp_path)
    spoil(checkpoints.write(WHO, 1, snapshot()))
    with pytest.raises(CheckpointError, match=f"^{why}$"):
        checkpoints.read(WHO)


def test_a_later_version_and_an_unsealed_change_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    file = checkpoints.write(WHO, 1, snapshot()) / "state.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, "steps": 2}))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        checkpoints.read(WHO)
    later = {**value, "version": 1}
    file.write_text(json.dumps({**later, "seal": seal(later)}))
    with pytest.raises(CheckpointError, match="it has version 1, and this keeplora reads 0"):
        checkpoints.read(WHO)


def test_nan_is_not_kept_and_the_checkpoint_before_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(WHO, 1, snapshot())
    with pytest.raises(FloatingPointError, match="parameter/w holds NaN or infinity after 2 steps of task 'pets'"):
        checkpoints.write(WHO, 2, snapshot(float("nan")))
    assert names(checkpoints) == ["0002-00000001"]


@pytest.mark.parametrize("moment", ["in the tensors", "before the rename", "before the old one goes"])
def test_a_death_at_any_moment_of_writing_leaves_a_whole_one(tmp_path, monkeypatch, moment):
    class Dead(BaseException):
        pass

    def dead(*args, **kwargs):
        raise Dead

    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(WHO, 1, snapshot(1.0))
    with monkeypatch.context() as patch:
        # atomic_dir would tidy up, which a killed process does not.
        patch.setattr("keeplora.files.shutil.rmtree", lambda *args, **kwargs: None)
        if moment == "in the tensors":
            patch.setattr(module, "save_file", dead)
        elif moment == "before the rename":
            patch.setattr("keeplora.files.os.rename", dead)
        else:
            patch.setattr(module.shutil, "rmtree", dead)
        with pytest.raises(Dead):
            checkpoints.write(WHO, 2, snapshot(2.0))
    assert len(names(checkpoints)) == 2
    found = checkpoints.read(WHO)
    assert found is not None
    assert found[0]["parameter/w"][0, 0] == (2.0 if moment == "before the old one goes" else 1.0)
    checkpoints.write(WHO, 3, snapshot(3.0))
    assert len(names(checkpoints)) == 1  # what the death left is gone


def test_nothing_is_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0002-00000009").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint").symlink_to(outside)
    checkpoints = Checkpoints(run)
    assert checkpoints.read(WHO) is None
    checkpoints.write(WHO, 1, snapshot())
    assert [p.name for p in outside.iterdir()] == ["0002-00000009"]
    assert checkpoints.read(WHO) is not None


def test_what_a_finished_task_left_goes_and_what_is_under_way_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(WHO, 1, snapshot())
    checkpoints.drop_finished(1)
    assert checkpoints.read(WHO) is not None
    checkpoints.drop_finished(2)
    assert not checkpoints.path.exists()
    checkpoints.clear()


def test_the_ledger_s_digest_changes_with_any_record(world: World, tmp_path):
    ledger = world.copied(world.run(method="lora")[0], tmp_path / "run") / "ledger"
    before = ledger_digest(ledger)
    assert before == ledger_digest(ledger)
    (ledger / ".0004-x.part").mkdir()
    (ledger / ".0004-x.part" / "record.json").write_text("{}")
    assert ledger_digest(ledger) == before
    file = next(ledger.glob("0003-*/record.json"))
    file.write_text(file.read_text() + " ")
    assert ledger_digest(ledger) != before


# ---- when ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def keeper(tmp_path, told=None, **when):
    lines = [] if told is None else told
    return Keeper(
        Checkpoints(tmp_path), WHO, **{"minutes": None, "steps": None, **when}, more=lambda: ({}, {"run": {"warnings": []}}),
        tell=lines.append,
    )  # fmt: skip


def kept(tmp_path) -> int | None:
    found = Checkpoints(tmp_path).read(WHO)
    return None if found is None else found[1]["steps"]


def test_processes_may_agree_on_when_it_is_late(tmp_path):
    here, asked = keeper(tmp_path, minutes=1e-9), []
    here.late = lambda late: asked.append(late) or False  # another process's clock says no
    here.after_step(1, snapshot)
    assert kept(tmp_path) is None
    assert asked == [True]
    here.late = lambda late: True
    here.after_step(2, snapshot)
    assert kept(tmp_path) == 2


def test_minutes_are_counted_from_the_last_checkpoint(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    keeping = keeper(tmp_path, minutes=5)
    moments = []
    for step in range(1, 8):
        clock.now += 100
        keeping.after_step(step, snapshot)
        moments.append(kept(tmp_path))
    assert moments == [None, None, 3, 3, 3, 6, 6]
    keeping.at_end(7, snapshot)
    assert kept(tmp_path) == 7  # the merge may take long: what took a tenth of the interval is kept


def test_steps_are_counted_from_the_task_s_start(tmp_path):
    keeping = keeper(tmp_path, steps=3)
    moments = []
    for step in range(1, 8):
        keeping.after_step(step, snapshot)
        moments.append(kept(tmp_path))
    assert moments == [None, None, 3, 3, 3, 6, 6]


def test_nothing_is_kept_where_nothing_is_asked_for_but_at_a_signal(tmp_path):
    keeping = keeper(tmp_path)
    keeping.after_step(1, snapshot)
    keeping.at_end(1, snapshot)
    assert kept(tmp_path) is None
    try:
        with STOP.held():
            STOP.ask(15)
        with pytest.raises(Interrupted):
            keeping.after_step(2, snapshot)
    finally:
        STOP.forget()
    assert kept(tmp_path) == 2


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    told: list[str] = []
    keeping = keeper(tmp_path, told, steps=1)
    keeping.after_step(1, snapshot)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "atomic_write_json", full)
        keeping.after_step(2, snapshot)
    assert told == ["no checkpoint could be written (No space left on device); training goes on"]
    assert kept(tmp_path) == 1
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1
    keeping.after_step(3, snapshot)
    assert kept(tmp_path) == 3
