"""SIGKILL at any moment costs the task under way and nothing else: `resume` ends with the undisturbed run's numbers, bit for
bit, and leaves no half of a file behind."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keeplora.files import sweep
from keeplora.yaml_text import dump_yaml
from tests.experiment.generation_world import make_world
from tests.torture.crash_faults import Fault
from tests.torture.crash_server import PHASES
from tests.torture.crash_world import CHECKOUT, Answer, Runs, Tally, assert_whole, tally

ALL = tuple(phase for phase in PHASES if phase != "end")


def kill_at_random_calls(runs: Runs, chains: list[list[str]], seed: int, counts: Tally) -> None:
    """For each chain a run: one kill at a random call of each phase that it names."""
    rng = random.Random(seed)
    lengths = {phase: sum(b - a for a, b in spans) for phase, spans in runs.trace.calls().items()}
    waiting = list(chains)
    while waiting:
        run, kept, chain = runs.new(), dict[str, str](), waiting.pop(0)
        for i, phase in enumerate(chain):
            # What goes on has fewer calls before it than the whole run.
            answer = runs.go(
                run, Fault(at=rng.randint(1, lengths[phase] // (1 if i == 0 else 3)), call=True, phase=phase)
            )
            kept = runs.after(run, answer, kept, counts)
            if not answer.killed:  # it had less of this phase left, and is finished
                waiting.append(chain[i:])
                break
            assert answer.phase == phase
        runs.end(run, kept, counts)
        shutil.rmtree(run)


def test_killed_at_a_random_call_of_every_phase(two):
    assert set(two.trace.calls()) >= set(ALL)
    counts = tally("killed at random calls")
    kill_at_random_calls(two, [[*ALL], ["training"]], 1, counts)
    assert counts["kills"] == len(ALL) + 1 == 11


@pytest.mark.torture
def test_killed_at_more_than_fifty_random_calls(two):
    counts = tally("killed at random calls, in full")
    rng = random.Random(2)
    drawn = [phase for _ in range(6) for phase in rng.sample(ALL, len(ALL))]
    kill_at_random_calls(two, [drawn[i : i + 3] for i in range(0, len(drawn), 3)], 2, counts)
    assert counts["kills"] == 6 * len(ALL) == 60


@pytest.mark.torture
def test_killed_from_outside_at_random_times(two):
    counts, rng = tally("killed from outside at random times"), random.Random(3)
    while counts["kills"] < 12:
        times = [rng.uniform(0.0, two.trace.seconds) for _ in range(2)]
        run, kept = two.new(), dict[str, str]()
        for after in times:
            kept = two.after(run, two.go(run, kill_after=after), kept, counts)
        two.end(run, kept, counts)
        shutil.rmtree(run)


def content(run: Path) -> str:
    """The files of a run, but for the lock and for names and times that differ from run to run."""
    names = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return repr([(str(path.relative_to(run)), path.read_bytes()) for path in names])


def go_on_from_every_state(runs: Runs, photos: Path, counts: Tally) -> None:
    """A copy of the folder taken before each operation is what a kill there leaves; those that differ are gone on with."""
    photos.mkdir()
    run = runs.new()
    trace = runs.go(run, Fault(photos=str(photos)), trace=True)
    assert trace.code == 0, trace.err
    seen: set[str] = set()
    for photo in sorted(photos.iterdir()):
        counts["looked at"] += 1
        assert_whole(photo)
        copy = runs.new()
        shutil.copytree(photo, copy)
        sweep(copy)
        if (state := content(copy)) not in seen:
            seen.add(state)
            shutil.rmtree(copy)
            shutil.move(photo, copy)  # with what the kill left unfinished
            counts["gone on with"] += 1
            try:
                runs.end(copy, {}, counts)
            except AssertionError as error:
                raise AssertionError(f"the state before {trace.operations()[int(photo.name) - 1]}: {error}") from error
        shutil.rmtree(copy)
    assert len(seen) >= 20


def test_the_state_before_every_write_can_be_gone_on_with(one, tmp_path):
    counts = tally("states between two writes")
    go_on_from_every_state(one, tmp_path / "photos", counts)
    assert counts["looked at"] >= 100


@pytest.mark.torture
def test_the_states_of_a_generative_run(server, tmp_path):
    """Answers and samples are files too."""
    values = make_world(tmp_path)
    values |= {"tasks": values["tasks"][:1], "training": {**values["training"], "epochs": 1, "checkpoint_steps": 2}}
    file = tmp_path / "e.yaml"
    file.write_text(dump_yaml(values), encoding="utf-8")
    runs = Runs.of(server, file, tmp_path)
    assert list((runs.straight / "predictions").rglob("*.jsonl"))
    go_on_from_every_state(runs, tmp_path / "photos", tally("states between two writes of a generative run"))


@pytest.mark.torture
def test_killed_before_and_within_every_write(one):
    counts = tally("killed at every write")
    operations = one.trace.operations()
    for n, kind, _, _ in operations:
        (answer,) = one.disturb([Fault(at=n, how="before")], counts)
        assert answer.killed
        counts["operations"] += 1
        if kind in ("write", "tensors"):
            (answer,) = one.disturb([Fault(at=n, how="torn")], counts)
            assert answer.killed
            counts["of them torn"] += 1
    (answer,) = one.disturb([Fault(at=len(operations), how="after")], counts)
    assert answer.killed


@pytest.mark.torture
def test_killed_as_a_process_of_its_own(two, world):
    """No fork and no patch: the command line as a person starts it."""
    counts, rng = tally("killed as processes of their own"), random.Random(4)
    for _ in range(3):
        run = two.new()
        kept: dict[str, str] = {}
        for _ in range(2):
            words = ["resume", run] if (run / "config.yaml").is_file() else ["run", two.config, "--output", run]
            child = subprocess.Popen(
                [sys.executable, "-m", "keeplora", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env={**_environment()},
            )  # fmt: skip
            wanted = rng.choice(["config.yaml", "ledger", "results.json", "ledger/0001-stripes", "report.html"])
            end = time.monotonic() + 120
            while child.poll() is None and not (run / wanted).exists() and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.3))
            child.kill()
            out, err = child.communicate()
            assert child.returncode in (-signal.SIGKILL, 0), err
            answer = Answer(child.returncode, out, err, "unknown", 0.0, [])
            kept = two.after(run, answer, kept, counts)
        two.end(run, kept, counts)
        shutil.rmtree(run)


def _environment() -> dict[str, str]:
    import os

    path = os.pathsep.join([str(CHECKOUT / "src"), str(CHECKOUT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
