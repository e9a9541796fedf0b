"""Small worlds of processes: forked from a server that has everything imported, over gloo and a file, so no port is needed."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["tests.ranks.world", "tests.ranks.work", "tests.ranks.runs", "tests.ranks.shards"]
PATIENCE = 300.0
"""Seconds after which a world that does not end is a failure; none of them takes a tenth of it."""


def _member(work: Callable[..., Any], rank: int, size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    out = Path(folder, f"out-{rank}.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        result = ("returned", work(*args))
    except BaseException as error:
        result = ("raised", type(error).__name__, str(error), traceback.format_exc())
    torch.save(result, out)
    os._exit(0)  # without a farewell: another rank may be gone, and the group's end would wait for it


def start(work: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """The processes of a world, under way."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_member, args=(work, r, size, str(folder), args)) for r in range(size)]
    for process in processes:
        process.start()
    return processes


def results(processes: list[Any], folder: Path) -> list[Any]:
    """Per rank ("returned", value), ("raised", type, message, traceback), or ("died", exit code)."""
    found = []
    for rank, process in enumerate(processes):
        process.join(PATIENCE)
        if process.is_alive():
            for other in processes:
                other.kill()
            raise AssertionError(f"rank {rank} does not end")
        out = folder / f"out-{rank}.pt"
        found.append(torch.load(out, weights_only=False) if out.exists() else ("died", process.exitcode))
    return found


def outcomes(work: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """Run ``work(*args)`` on ``size`` ranks; what became of each."""
    return results(start(work, size, folder, *args), folder)


def run(work: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """What ``work(*args)`` returned on each of ``size`` ranks; it may not raise."""
    found = outcomes(work, size, folder, *args)
    for rank, outcome in enumerate(found):
        assert outcome[0] == "returned", f"rank {rank}: {outcome[-1]}"
    return [outcome[1] for outcome in found]
