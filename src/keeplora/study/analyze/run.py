"""An analysis from its plan to its page, for Python callers and the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keeplora.errors import KeepLoraError
from keeplora.experiment.run_directory import RunDirectory
from keeplora.study.analyze.execute import outline, run_points
from keeplora.study.analyze.outcome import about, conclude
from keeplora.study.analyze.plan import (
    INTER,
    INTER_RUN,
    SHARES,
    AnalysisPlan,
    Point,
    check_shares,
    inter_points,
    intra_points,
    undo_steps,
)
from keeplora.study.analyze.plan import run_points as points_of_run
from keeplora.study.analyze.store import AnalysisStore
from keeplora.study.analyze.world import World


class Analysis(NamedTuple):
    """What an analysis found.

    Attributes:
        results: what results.json holds. folder: where everything is. page: analysis.html.
    """

    results: dict[str, Any]
    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "analysis.html"


def analyze(
    plan: AnalysisPlan, points: Callable[[World], Sequence[Point]], *, jobs: int | None = None, quiet: bool | None = None,
    world: World | None = None, dry: Callable[[str], None] | None = None,
) -> Analysis:  # fmt: skip
    """Measure what the folder lacks of ``points``, then write results, suggestion and page of them, and of what else it has.

    Args:
        points: of the opened model, what is wanted. dry: called with what would be measured and how long it takes (`outline`), in
            place of measuring and writing anything.

    Raises:
        KeepLoraError: the folder holds another analysis, or another process writes to it.
        KeyboardInterrupt: Ctrl-C; what was measured is kept, and the page is written of it.
    """
    world = world or World(plan)
    wanted, told, identity = list(points(world)), about(plan, world), world.identity()
    if dry is not None:
        store = AnalysisStore(plan.output)
        store.check(identity)
        dry(outline(wanted, store, jobs or 1))
        return Analysis({}, plan.output)
    if jobs is not None and jobs > 1:
        world = None  # every process opens its own
    with AnalysisStore(plan.output).writing(identity) as store:
        try:
            run_points(plan, world, store, wanted, jobs=jobs, quiet=quiet)
        except KeyboardInterrupt:
            if any(store.has(point) for point in wanted):
                conclude(store, told, wanted)
            raise
        return Analysis(conclude(store, told, wanted), plan.output)


def require_finished(run: Path) -> None:
    """What is measured of a run is of all its tasks."""
    state = RunDirectory(run).read_status().get("state")
    if state != "finished":
        raise KeepLoraError(
            f"{run} is not finished (its state: {state or 'unknown'}); finish it with `keeplora resume {run}`"
        )


def intra(
    plan: AnalysisPlan, *, shares: Sequence[float] = SHARES, parts: Sequence[str] | None = None, **how: Any
) -> Analysis:
    """The spectrum: `intra_points` of the untouched model."""
    check_shares(shares)  # before a model is opened
    return analyze(plan, lambda world: intra_points(world.targets, shares, parts, world.configured_energies), **how)


def inter(plan: AnalysisPlan, *, what: Sequence[str] = (), **how: Any) -> Analysis:
    """The depth: of an untouched model `INTER`, of a finished run `INTER_RUN`; ``what``: only these of them."""
    if plan.run is not None:
        require_finished(plan.run)
        chosen = list(what) or list(INTER_RUN)
        return analyze(
            plan, lambda world: points_of_run(chosen, len(world.learner.records), undo_steps(world.targets)), **how
        )
    chosen = list(what) or list(INTER)

    def points(world: World) -> Sequence[Point]:
        return inter_points(world.targets, chosen, min(plan.tasks, len(world.setup.tasks)), plan.windows)

    return analyze(plan, points, **how)
