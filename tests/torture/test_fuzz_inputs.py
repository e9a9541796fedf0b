"""Mutated inputs of every kind: one sentence or a right answer, and nothing else touched. `make torture` tries 2,200."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.tiny_world import World, the_world
from tests.torture.fuzz_all import KINDS, TALLIES, makers
from tests.torture.fuzz_harness import Arena, fuzz, memory_limit, run_here


@pytest.fixture(scope="module")
def fuzz_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


def _fuzz(kind: str, world: World, folder: Path, count: int, seed: int, apart: int) -> None:
    arena = Arena(folder / "arena", also=(world.root,))
    found = makers(kind, world, folder)
    with arena.entered():  # what is imported at the first use, and what torch allocates, is not an input's doing
        run_here(["run", str(world.yaml(folder / "first.yaml")), "--dry-run"], seconds=120.0)
    tally = fuzz(kind, found, arena, count, seed=seed, apart_every=apart)
    TALLIES.append(tally)
    assert tally.inputs == count
    assert not tally.faults, f"{len(tally.faults)} faults:\n" + "\n".join(tally.faults[:20])
    if count >= 3 * len(found):  # a mutator that is always refused for another reason tries nothing
        assert tally.outcomes["accepted"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_some(kind: str, fuzz_world: World, tmp_path: Path) -> None:
    _fuzz(kind, fuzz_world, tmp_path, KINDS[kind].short, seed=0, apart=0)


@pytest.mark.torture
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind: str, fuzz_world: World, tmp_path: Path) -> None:
    with memory_limit():
        _fuzz(kind, fuzz_world, tmp_path, KINDS[kind].full, seed=1, apart=KINDS[kind].apart)
