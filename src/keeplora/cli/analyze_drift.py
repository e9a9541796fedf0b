"""`keeplora analyze drift`: how far two states of a model lie apart, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeplora.cli.plot_place import check_plot

if TYPE_CHECKING:
    from keeplora.tuner.drift import Drift

SHOWN = 24
COLUMNS = (
    ("relative", "‖D‖/‖W‖\n%", 100.0, ".3f"), ("overlap", "overlap\nof U", 1.0, ".3f"),
    ("mean_angle", "U angle\nmean °", 1.0, ".1f"), ("largest_angle", "U angle\nlargest °", 1.0, ".1f"),
    ("weight_angle", "W angle\nlargest °", 1.0, ".2f"), ("a_in_b", "ΔW_a\nin U_b %", 100.0, ".2f"),
    ("b_in_a", "ΔW_b\nin U_a %", 100.0, ".2f"), ("moved_in_a", "D\nin U_a %", 100.0, ".2g"),
)  # fmt: skip


def drift(
    a: Annotated[Path, typer.Argument(help="A run directory, saved learner, ledger, exported adapter or checkpoint.")],
    b: Annotated[
        Path | None, typer.Argument(help="The other; left out, the same ledger, from before its first task on.")
    ] = None,
    task_a: Annotated[
        str | None, typer.Option(help="Of a ledger: as it was after this task; start: before all.")
    ] = None,
    task_b: Annotated[str | None, typer.Option(help="The same of the other side.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model, where neither side is a run directory.")] = None,
    energy: Annotated[
        float, typer.Option(help="Share of ‖W‖² that the weights' principal subspaces hold, above 0 to 1.")
    ] = 0.5,
    updates_only: Annotated[
        bool, typer.Option("--updates-only", help="Load no model: what was learned, without W.")
    ] = False,
    every_layer: Annotated[bool, typer.Option("--all", help="Every layer, not only the 24 that moved most.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every layer as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a file that ends in .png, .svg or .pdf.")] = None,
) -> None:
    """Print how far two states lie apart per layer: weights, protected subspaces, and each one's update inside the other's."""
    import json

    from keeplora.errors import KeepLoraError
    from keeplora.experiment.drift_sides import open_sides
    from keeplora.tuner.drift import START
    from keeplora.tuner.drift import drift as measure

    if not 0 < energy <= 1:
        raise KeepLoraError(f"--energy is a share above 0 and at most 1, got {energy}")
    if plot is not None:
        check_plot(plot)
    if b is None:
        task_a = task_a or START
    found = measure(
        *open_sides(a, b or a, task_a=task_a, task_b=task_b, model=model, weights=not updates_only), energy=energy
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        _show(found, every_layer, updates_only)
    if plot is not None:
        from keeplora.report.drift_plot import plot_drift

        plot_drift(found.to_dict(), plot)
        typer.echo(f"Plot: {plot}", err=as_json)


def _show(found: Drift, every_layer: bool, updates_only: bool) -> None:
    from rich import box
    from rich.table import Table

    from keeplora.cli.console import print_table, wide_console
    from keeplora.report.audit_charts import short_names

    console = wide_console()
    order = sorted(found.rows, key=lambda row: -(row.relative if row.relative is not None else row.moved))
    shown = order if every_layer else order[:SHOWN]
    known = [c for c in COLUMNS if any(getattr(row, c[0]) is not None for row in shown)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", no_wrap=True)
    for heading in ["‖D‖", *(c[1] for c in known)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, name in zip(shown, short_names([row.layer for row in shown], 32), strict=True):
        table.add_row(name, f"{row.moved:.3g}", *(_cell(getattr(row, key), k, form) for key, _, k, form in known))
    console.print(f"Drift from a = {found.a} to b = {found.b}: D = W_b − W_a", markup=False, highlight=False)
    print_table(console, table)
    if len(shown) < len(order):
        console.print(f"{len(order) - len(shown)} more layers moved less (--all shows them).", highlight=False)
    if found.relative is not None:
        console.print(f"over all layers ‖D‖/‖W‖ = {found.relative:.3%}", highlight=False)
    elif known and not updates_only:
        console.print("The base model is not at hand, so there is no ‖W‖; name it with --model.", highlight=False)


def _cell(value: Any, scale: float, form: str) -> str:
    return "–" if value is None else f"{value * scale:{form}}"
