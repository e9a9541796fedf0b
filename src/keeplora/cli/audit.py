"""`keeplora audit`: how much of each update acts on protected inputs, and what that means for the answers to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from keeplora.tuner import Audit


def audit(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Every layer, task and precision as JSON.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the factors and the running weights, as after every task of a run.")
    ] = False,
    every_layer: Annotated[
        bool, typer.Option("--all", help="Every layer in the table, not only the worst 24.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="Audit this exported adapter or merged checkpoint in place of all precisions.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the leaks: .png, .svg or .pdf.")] = None,
) -> None:
    """Print what leaks into what is protected, layer by layer.

    In every precision, with the stability bounds. Exit status 1 if a factor leaks more than 1e-5; with --export also if the
    exported weights leak more than twice what rounding to their precision explains.
    """
    import json

    from keeplora.errors import KeepLoraError
    from keeplora.experiment import TrainedModel

    if plot is not None:
        from keeplora.report.plot_file import check_plot_name

        check_plot_name(plot)  # before minutes are spent on the audit
    learner = TrainedModel(directory, device="cpu").learner
    if not learner.protects:
        raise KeepLoraError(f"{directory}: its method protects no subspace, so there is nothing to leak into")
    found = learner.audit("quick" if quick else "full", export)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        _show(found, every_layer)
    if plot is not None:
        from keeplora.report.audit_plot import plot_audit

        plot_audit(found.to_dict(), plot, title=f"{directory.name}")
        typer.echo(f"Plot: {plot}", err=as_json)
    if not found.passed:
        raise typer.Exit(1)


def _show(found: Audit, every_layer: bool) -> None:
    import sys

    from rich.console import Console

    from keeplora.cli.console import print_table, with_layers
    from keeplora.tuner.leaks.table import WIDTH, audit_tables, closing_lines, shown_layers

    console = Console(file=sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    for table in audit_tables(found, every_layer):
        print_table(console, with_layers(console, table, shown_layers(found, every_layer)))
        console.print()
    for line in [*found.notes, *closing_lines(found, every_layer)]:
        console.print(line, style="bold red" if line.startswith("✗") else None, soft_wrap=True)
    verdict = "within" if found.factor_leak_max <= 1e-5 else "OVER"
    console.print(f"worst factor leak {found.factor_leak_max:.1e}, {verdict} the limit of 1e-5", soft_wrap=True)
    if any(row.export == "saved" for row in found.exports):
        explained = "leaks no more than" if found.passed else "LEAKS MORE THAN"
        console.print(f"the export {explained} its precision explains", soft_wrap=True)
