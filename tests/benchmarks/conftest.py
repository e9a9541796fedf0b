"""A benchmark's script, called in this process as from the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``run_script("front", path, "--levels", 20)``: what the script printed."""
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as Python does for a script

    def call(name: str, *words: object) -> str:
        script = importlib.import_module(name)
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, words)])
        script.main()
        return capsys.readouterr().out

    return call
