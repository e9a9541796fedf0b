"""Progress: plain lines in pipes and CI, bars in a terminal."""

from __future__ import annotations

import io
import re

import pytest

from keeplora.experiment import progress as progress_module
from keeplora.experiment.progress import Progress, duration, fields_text, is_quiet


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("stream", "environment", "quiet"),
    [
        (Terminal(), {}, False),
        (Terminal(), {"CI": "true"}, True),
        (Terminal(), {"CI": "1"}, True),
        (Terminal(), {"CI": "false"}, False),
        (Terminal(), {"CI": ""}, False),
        (Terminal(), {"TERM": "dumb"}, True),
        (io.StringIO(), {}, True),
        (object(), {}, True),
    ],
)
def test_when_to_be_quiet(monkeypatch, stream, environment, quiet):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert is_quiet(stream) is quiet
    if not isinstance(stream, io.StringIO):
        return
    assert Progress(stream=stream).quiet is quiet


def run(progress, clock):
    for index, name in enumerate(["pets", "signs [x]"], start=1):
        progress.task(name, index, 2)
        for epoch in (1, 2):
            progress.phase(f"epoch {epoch}/2", 4)
            for step in range(4):
                clock[0] += 0.5
                progress.advance(loss=1.0 / (step + 1), accuracy=None if step < 3 else 87.26)
        progress.line("rank [bold]16")


def test_quiet_writes_one_line_per_task_and_epoch(clock):
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        run(progress, clock)
    assert stream.getvalue().splitlines() == [
        "task 1/2: pets",
        "  epoch 1/2: loss 0.2500, accuracy 87.3, 2.0 s",
        "  rank [bold]16",
        "  epoch 2/2: loss 0.2500, accuracy 87.3, 2.0 s",
        "task 2/2: signs [x] (ETA 0:04)",
        "  epoch 1/2: loss 0.2500, accuracy 87.3, 2.0 s",
        "  rank [bold]16",
        "  epoch 2/2: loss 0.2500, accuracy 87.3, 2.0 s",
    ]
    assert "\x1b" not in stream.getvalue()


def test_live_shows_bars_and_the_same_lines(monkeypatch, clock):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        run(progress, clock)
        progress._rich.refresh()
        shown = stream.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "\x1b" in shown
    assert "task 2/2: signs [x]" in text
    assert "4/4" in text
    assert "rank [bold]16" in text
    assert "epoch 1/2: loss 0.2500, accuracy 87.3, 2.0 s" in text
    assert "done in 0:08" in text


def test_an_exception_ends_the_bars_and_says_how_far_it_came(clock):
    stream = io.StringIO()

    def stopped():
        with Progress(stream=stream) as progress:
            progress.task("pets", 1, 1)
            progress.phase("epoch 1/2", 10)
            progress.advance(3, loss=0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert stream.getvalue().splitlines()[-1] == "  epoch 1/2 stopped at 3/10: loss 0.5000, 0.0 s"


def test_eta_counts_the_tasks_of_this_session_alone(clock):
    with Progress(stream=io.StringIO()) as progress:
        assert progress.eta() is None
        progress.task("c", 3, 6)  # a resumed run: two tasks were done earlier
        clock[0] += 30
        assert progress.eta() is None
        clock[0] += 30
        progress.task("d", 4, 6)
        assert progress.eta() == 180
        clock[0] += 45
        assert progress.eta() == 135
        clock[0] += 1000
        assert progress.eta() == 0


def test_lines_before_any_task_and_phases_of_unknown_length(clock):
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.line("loading")
        progress.phase("evaluation")
        progress.advance(2)
    assert stream.getvalue().splitlines() == ["loading", "  evaluation: 0.0 s"]


def test_texts():
    assert [duration(s) for s in (-1, 0, 59.9, 60, 3599, 36000)] == [
        "0:00",
        "0:00",
        "0:59",
        "1:00",
        "59:59",
        "10:00:00",
    ]
    assert fields_text({"loss": 0.12345, "train_accuracy": 5.0, "lr": 0.0001, "n": 3, "x": None}) == (
        "loss 0.1235, train accuracy 5.0, lr 1.00e-04, n 3"
    )
