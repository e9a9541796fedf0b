"""`keeplora analyze similarity`: how alike tasks are, and whether that predicts what they did to each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeplora.cli.plot_place import check_plot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from keeplora.experiment.similarity import Gradients, Similarity
    from keeplora.tuner.similarity import TaskFeatures

SHOWN = 30


def similarity(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories of the same tasks (or ledgers: without accuracies).")
    ],
    subspaces: Annotated[
        Path | None,
        typer.Option(help="Take the tasks' subspaces from this ledger or run; default: the best of those given."),
    ] = None,
    energy: Annotated[
        float, typer.Option(help="Share of a task's energy that its own subspace holds, above 0 to 1.")
    ] = 0.99,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Also take every task's gradient at the weights it started from: opens each run's model and data.",
        ),
    ] = False,
    limit: Annotated[int, typer.Option(help="With --gradients, most training samples of each task; 0: all.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a file that ends in .png, .svg or .pdf.")] = None,
) -> None:
    """Print how far tasks' feature subspaces overlap, and check what that predicts against the forgetting measured."""
    import json

    from keeplora.errors import KeepLoraError
    from keeplora.experiment.similarity import task_similarity

    if not 0 < energy <= 1:
        raise KeepLoraError(f"--energy is a share above 0 and at most 1, got {energy}")
    if plot is not None:
        check_plot(plot)
    if limit < 0:
        raise KeepLoraError(f"--limit is a number of samples, or 0 for all, got {limit}")

    def take(name: str, path: Path, features: Mapping[str, TaskFeatures]) -> Gradients:
        from keeplora.experiment.gradients import gradients_inside

        def told(task: str) -> None:
            print(f"{name}: gradient of {task}", file=sys.stderr, flush=True)

        return gradients_inside(path, features, energy, limit=limit or None, on_task=told)

    found = task_similarity(runs, energy, subspaces=subspaces, gradients=take if gradients else None)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        _show(found)
    if plot is not None:
        from keeplora.report.similarity_plot import plot_similarity

        plot_similarity(found.to_dict(), plot)
        typer.echo(f"Plot: {plot}", err=as_json)


def _show(found: Similarity) -> None:
    from rich.table import Table

    from keeplora.cli.console import print_table, wide_console

    console = wide_console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(title: str, head: list[str], rows: list[list[str]], keys: int = 1) -> None:
        made = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
        for i, name in enumerate(head):
            made.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            made.add_row(*row)
        print_table(console, made, keys)
        console.print()

    how = "kept covariances" if found.exact else "the ledger's own columns (exact with tuner.keep_covariance: true)"
    say(f"Subspaces beyond U₀ of {found.source}, from {how}.\n")
    tasks = list(found.tasks)
    for title, rows in (
        ("Overlap of the tasks' own subspaces: 0 orthogonal, 1 one inside the other", found.overlap),
        ("Share of the row's energy inside the column's subspace", found.energy),
    ):
        table(title, ["", *tasks], [[t, *map(_number, row)] for t, row in zip(tasks, rows, strict=True)])
    measured = [pair for pair in found.pairs if pair.drop is not None]
    if not measured:
        say("No run among them has accuracies of two tasks, so there is nothing to check the prediction against.")
        return
    used = list(next(iter(found.associations.values())))
    ranked = sorted(measured, key=lambda pair: -(pair.drop or 0.0))
    table(
        "Measured: points that the earlier task fell while the later was learned",
        ["run", "earlier", "later", "drop", *used],
        [[p.run, p.earlier, p.later, f"{p.drop:+.1f}", *(_number(p.predicted[k]) for k in used)] for p in ranked[:SHOWN]],
        keys=3,
    )  # fmt: skip
    if len(ranked) > SHOWN:
        say(f"{len(ranked) - SHOWN} pairs that fell less are not shown (--json has them).\n")
    rows = [
        [key, name, _number(one.rho), "–" if one.low is None else f"[{one.low:+.2f}, {one.high:+.2f}]", _number(one.p),
         str(one.n), "–" if one.least is None else f"±{one.least:.2f}", one.verdict]
        for key, by in found.associations.items() for name, one in by.items()
    ]  # fmt: skip
    table(
        "Does the prediction go with the drop? Spearman's ρ within runs",
        ["runs", "predictor", "ρ", "95 %", "p", "pairs", "told from", ""],
        rows,
        keys=2,
    )
    say(
        "Interval: bootstrap over pairs; p: values shuffled within runs; told from: the |ρ| that 5 % of the shuffles reach. "
        "Pairs that share a task are not independent, so with few tasks all three are too sure."
    )


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"
