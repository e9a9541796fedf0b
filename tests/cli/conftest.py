"""The tiny world, and the command line called in this process or as one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from keeplora.cli import main
from tests.cli.tiny_world import World, the_world

CHECKOUT = Path(__file__).resolve().parents[2]


class Answer(NamedTuple):
    """What a command left behind: exit status, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """``cli("run", path, "--dry-run")`` in this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # as in a process of its own, where the command line is there before transformers

    def call(*words: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        told = capsys.readouterr()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return Answer(code or 0, told.out, told.err)

    return call


@pytest.fixture
def process() -> Any:
    """Start a Python process on this source tree with both streams in pipes; what is left is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(CHECKOUT / "src"), str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
        child = subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()
