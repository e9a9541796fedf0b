"""Measure what is not measured yet: in this process, or in several; each point is kept as it is made."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from statistics import fmean
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from keeplora.errors import KeepLoraError
from keeplora.experiment.progress import duration, is_quiet
from keeplora.study.analyze.measure import measure
from keeplora.study.analyze.plan import AnalysisPlan, Point
from keeplora.study.analyze.store import AnalysisStore
from keeplora.study.analyze.world import World
from keeplora.study.execute import terminate_as_interrupt
from keeplora.study.resources import slots

STOP_AFTER = "KEEPLORA_STOP_AFTER_POINTS"
"""Environment variable for tests: raise `KeyboardInterrupt` after so many points."""

Measured = tuple[Point, dict[str, Any], float]
"""A point, what was found, and the seconds it took."""

_world: World | None = None  # of a worker process


def time_left(points: Sequence[Point], took: Mapping[str, Sequence[float]], jobs: int = 1) -> float | None:
    """Seconds that points will take by the mean of those of their kind, else of all that were measured; None where none was.

    >>> time_left([Point("intra"), Point("window")], {"intra": [2.0, 4.0]})
    6.0
    """
    known = [seconds for times in took.values() for seconds in times]
    if not known:
        return None
    means = {kind: fmean(times) for kind, times in took.items()}
    return sum(means.get(point.kind, fmean(known)) for point in points) / jobs


def outline(points: Sequence[Point], store: AnalysisStore, jobs: int = 1) -> str:
    """How many points of which kind are to be measured, and how long that will take where the folder's points tell."""
    unique = list({point.name: point for point in points}.values())
    todo = [point for point in unique if not store.has(point)]
    if not todo:
        return f"all {len(unique)} points are measured already"
    kinds = Counter(point.kind for point in todo)
    there = f"; {len(unique) - len(todo)} are there already" if len(todo) < len(unique) else ""
    left = time_left(todo, store.seconds(), jobs)
    told = "how long it takes is told after the first" if left is None else f"about {duration(left)}"
    each = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return f"{len(todo)} point{'s' if len(todo) > 1 else ''} to measure ({each}){there}: {told}"


class AnalysisProgress:
    """Points done and the time left (`time_left`); plain lines where no terminal is.

    Args:
        took: seconds of points that were measured before, by kind.
    """

    def __init__(
        self, total: int, jobs: int, quiet: bool | None = None, stream: IO[str] | None = None,
        took: Mapping[str, Sequence[float]] | None = None,
    ) -> None:  # fmt: skip
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = is_quiet(self.stream) if quiet is None else quiet
        self.total, self.jobs, self.done = total, jobs, 0
        self._times = {kind: list(times) for kind, times in (took or {}).items()}
        self._bars: Bars | None = None
        self._bar: Any = None

    def __enter__(self) -> AnalysisProgress:
        if not self.quiet:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
            self._bars = Bars(
                *columns, TextColumn("{task.fields[note]}"), console=Console(file=self.stream, force_terminal=True)
            )
            self._bars.start()
            self._bar = self._bars.add_task("points", total=self.total, note="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def ended(self, point: Point, seconds: float, waiting: Sequence[Point]) -> None:
        self.done += 1
        self._times.setdefault(point.kind, []).append(seconds)
        left = time_left(waiting, self._times, self.jobs)
        told = "" if left is None or not waiting else f"about {duration(left)} left"
        if self._bars is not None:
            self._bars.update(self._bar, completed=self.done, note=told)
        else:
            tail = f" ({told})" if told else ""
            print(f"[{self.done}/{self.total}] {point.name}: {seconds:.1f} s{tail}", file=self.stream, flush=True)


def run_points(
    plan: AnalysisPlan, world: World | None, store: AnalysisStore, points: Sequence[Point], *, jobs: int | None = None,
    quiet: bool | None = None,
) -> None:  # fmt: skip
    """Measure the points that the store lacks, in order, and put each into it as it is made.

    Args:
        world: opened from the plan; given up where several processes open their own. jobs: processes; None: one.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; every point that ended is kept.
    """
    todo = [point for point in {p.name: p for p in points}.values() if not store.has(point)]
    if not todo:
        return
    jobs = min(jobs or 1, len(todo))
    stop = int(os.environ.get(STOP_AFTER) or 0)
    print(f"Analysis in {store.path}: {outline(points, store, jobs)}", file=sys.stderr, flush=True)
    with terminate_as_interrupt(), AnalysisProgress(len(todo), jobs, quiet, took=store.seconds()) as progress:
        made = _here(world or World(plan), todo) if jobs == 1 else _in_processes(plan, todo, jobs)
        del world
        gc.collect()
        waiting = list(todo)
        with contextlib.closing(made):
            for point, result, seconds in made:
                store.write(point, {**result, "seconds": round(seconds, 3)})
                waiting.remove(point)
                progress.ended(point, seconds, waiting)
                if stop and progress.done == stop:
                    raise KeyboardInterrupt


def _here(world: World, points: Sequence[Point]) -> Generator[Measured, None, None]:
    with world.kind.running(world.learner):
        for point in points:
            yield _measured(world, point)


def _measured(world: World, point: Point) -> Measured:
    started = time.perf_counter()
    return point, measure(world, point), time.perf_counter() - started


# ---- several processes ---------------------------------------------------------------------------------------------


def _in_processes(plan: AnalysisPlan, points: Sequence[Point], jobs: int) -> Generator[Measured, None, None]:
    free = slots(len(points), jobs=jobs, threads=None, settings=plan.source)
    before = os.environ.get("OMP_NUM_THREADS")
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for i in range(jobs if free.gpus else 0):
        gpus.put(free.gpus[i % len(free.gpus)])
    others = set(multiprocessing.active_children())  # the caller's own
    os.environ["OMP_NUM_THREADS"] = str(free.threads)  # read when a process imports torch
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_open,
        initargs=(plan, free.threads, os.getpid(), gpus if free.gpus else None),
    )  # fmt: skip
    try:
        waiting = {pool.submit(_one, point) for point in points}
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for one in ended:
                yield one.result()
    except BrokenProcessPool:
        raise KeepLoraError(
            "a process of the analysis died (out of memory?); what was measured is kept: repeat the command with fewer --jobs"
        ) from None
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()


def _open(plan: AnalysisPlan, threads: int, parent: int, gpus: Any = None) -> None:
    """A worker's start: Ctrl-C is the parent's to hear, and without a parent there is nothing to do.

    ``gpus``: a queue with one GPU for each worker, set before anything asks CUDA; None where there is none.
    """
    global _world
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    _world = World(plan)
    _world.kind.running(_world.learner).__enter__()  # until the process ends


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _one(point: Point) -> Measured:
    assert _world is not None
    return _measured(_world, point)
