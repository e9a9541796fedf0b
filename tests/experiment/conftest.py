"""The tiny world of the command line's tests: the same pictures, model and finished runs."""

from __future__ import annotations

import pytest

from tests.cli.tiny_world import World, the_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)
