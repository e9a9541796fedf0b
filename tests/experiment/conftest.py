"""The tiny world of the command line's tests: the same pictures, model and finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny_world import World, the_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


@pytest.fixture
def base(hub: Any, world: World) -> str:
    """The base model under a name that others can use, and its card."""
    (folder := world.root / "published-base").mkdir(exist_ok=True)
    for file in Path(world.model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    hub.add("tiny/clip", folder)
    return "tiny/clip"
