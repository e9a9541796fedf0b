"""How many runs fit at once: GPUs, cores and memory of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_GUESS = 4 * 2**30
"""Bytes that a run on the CPU is taken to need until a finished one has told its peak."""
_MARGIN = 1.2  # the next run's peak is not exactly the last one's


class Slots(NamedTuple):
    """Runs at once, CPU threads of each, and the GPUs that they are dealt out to (empty: CPU)."""

    jobs: int
    threads: int
    gpus: tuple[str, ...]


def cores() -> int:
    """Cores that this process may use."""
    with contextlib.suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that new processes can have, after the container's limit; None where the system does not tell."""
    free = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        free = min(free if free is not None else limit, max(0, limit - used))
    return free


def gpu_ids(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES may be set to, one GPU each; empty where there is none or the study is on the CPU."""
    if settings.get("device") == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    import torch

    count = torch.cuda.device_count()
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip())[:count]
    return tuple(str(i) for i in range(count))


def slots(
    cells: int, *, jobs: int | None, threads: int | None, settings: Mapping[str, Any], peaks: Sequence[int] = (),
) -> Slots:  # fmt: skip
    """Slots for ``cells`` runs. Jobs asked for are taken as they are; else one per GPU, else per core as memory allows.

    ``peaks`` are the peak memories of finished runs in bytes.
    """
    gpus, have = gpu_ids(settings), cores()
    if jobs is None and gpus:
        jobs = len(gpus)
    elif jobs is None:
        need = max(peaks) * _MARGIN if peaks else MEMORY_GUESS
        memory = available_memory()
        jobs = have if memory is None else min(have, int(memory // need))
    jobs = max(1, min(jobs, cells))
    return Slots(jobs, threads or max(1, have // jobs), gpus)
