"""The judge of the fuzzer sees what it is there to see: each kind of fault, made on purpose."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keeplora.errors import KeepLoraError, LedgerError
from keeplora.tuner.persistence import open_ledger
from tests.cli.tiny_world import the_world
from tests.torture import fuzz_harness
from tests.torture.fuzz_damage import Sealed
from tests.torture.fuzz_harness import Arena, Input, fuzz, run_here, snapshot


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path / "arena", also=(tmp_path,))


def _judged(arena: Arena, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], **more: object) -> list[str]:
    """What is found wrong with a command line that does ``act``."""

    def main(_: object) -> None:
        act()

    monkeypatch.setattr(fuzz_harness, "main", main)
    return arena.judge(Input("made up", ("a", "command"), **more))[1]  # type: ignore[arg-type]


def _raise(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def _fail(err: str, code: int = 1) -> Callable[[], object]:
    def act() -> None:
        print(err, file=sys.stderr)
        sys.exit(code)

    return act


def test_a_sentence_is_no_fault(arena, monkeypatch):
    assert _judged(arena, monkeypatch, _fail("Error: no such file")) == []
    assert _judged(arena, monkeypatch, _fail("working\nError: 2 problems:\n  - a\n  - b")) == []


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (_raise(KeyError("x")), "a traceback: KeyError"),
        (_raise(KeepLoraError("past the command line")), "a traceback: KeepLoraError"),
        (_raise(MemoryError()), "a traceback: MemoryError"),
        (_fail("Error: x", code=3), "exit status 3"),
        (_fail("oh"), "no sentence on standard error"),
        (_fail("Error: a\nb"), "no sentence on standard error"),
        (_fail("Traceback (most recent call last)\nError: x"), "a traceback"),
    ],
)
def test_an_answer_that_is_no_sentence(arena, monkeypatch, act, told):
    assert told in _judged(arena, monkeypatch, act)[0]


def test_silence_and_needless_refusal(arena, monkeypatch):
    assert _judged(arena, monkeypatch, lambda: None, expect="refused") == ["accepted in silence"]
    assert "refused, though" in _judged(arena, monkeypatch, _fail("Error: no"), expect="accepted")[0]
    assert _judged(arena, monkeypatch, lambda: None, accepted=lambda _: "a wrong number") == ["a wrong number"]


def test_a_hang_is_cut_off(arena, monkeypatch):
    monkeypatch.setattr(run_here, "__defaults__", (0.3,))
    os.mkfifo(arena.root / "pipe")
    assert "a hang" in _judged(arena, monkeypatch, (arena.root / "pipe").read_text)[0]


def test_a_write_elsewhere_is_seen(arena, monkeypatch, tmp_path):
    inside, elsewhere = arena.fresh(), tmp_path / "elsewhere"
    assert _judged(arena, monkeypatch, lambda: (inside / "x").write_text("x"), may_write=(inside,)) == []
    found = _judged(arena, monkeypatch, lambda: elsewhere.write_text("x"), may_write=(inside,))
    assert {f"touched: open {elsewhere}", f"changed: {elsewhere}"} <= set(found)
    assert f"touched: os.remove {elsewhere}" in _judged(arena, monkeypatch, elsewhere.unlink)
    victim = arena.outside / "victim.txt"
    assert f"changed: {victim}" in _judged(arena, monkeypatch, lambda: victim.write_text("other"))


def test_a_process_a_connection_and_a_canary_are_seen(arena, monkeypatch):
    found = _judged(arena, monkeypatch, lambda: subprocess.run(["true"], check=True))
    assert "subprocess.Popen" in found[0]

    def connect() -> None:
        with socket.socket() as one:
            one.connect_ex(("127.0.0.1", 9))

    assert "socket.connect" in _judged(arena, monkeypatch, connect)[0]
    assert "code of the input was run" in _judged(arena, monkeypatch, lambda: os.system(f"touch '{arena.canary}'"))


def test_faults_are_counted_with_their_mutator(arena, monkeypatch):
    monkeypatch.setattr(fuzz_harness, "main", lambda _: {}["x"])
    tally = fuzz("made up", {"one": lambda *_: Input("one", ("a", "b"))}, arena, 3)
    assert (tally.inputs, tally.outcomes["fault"], len(tally.faults)) == (3, 3, 3)
    assert tally.faults[0].startswith("one: [one #0] a traceback: KeyError")


def test_inputs_are_the_same_every_time(arena, monkeypatch):
    seen: list[float] = []
    monkeypatch.setattr(fuzz_harness, "main", lambda _: None)

    def make(_, rng):
        seen.append(rng.random())
        return Input("one", ("a", "b"))

    fuzz("made up", {"one": make}, arena, 4)
    fuzz("made up", {"one": make}, arena, 4)
    assert seen[:4] == seen[4:]
    assert len(set(seen)) == 4


def test_a_snapshot_sees_modes_sizes_and_links(tmp_path):
    (tmp_path / "a").write_text("x")
    before = snapshot(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("nowhere")
    assert snapshot(tmp_path) != before


def test_a_resealed_ledger_opens_as_before(tmp_path, tmp_path_factory):
    """Sealing again what means the same changes nothing: a forgery is not refused for hashes that were forgotten."""
    world = the_world(tmp_path_factory)
    run = world.copied(world.run(method="keeplora++")[0], tmp_path / "run")
    sealed = Sealed(run / "ledger")
    head = run / "ledger" / "ledger.json"
    before = [record.name for record in open_ledger(run).records()]
    head.write_text(json.dumps(json.loads(head.read_text())))  # other bytes, the same value
    with pytest.raises(LedgerError, match="does not follow the record before it"):
        open_ledger(run).records()
    sealed.reseal()
    assert [record.name for record in open_ledger(run).records()] == before
