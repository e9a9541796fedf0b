"""`keeplora capacity`: how full every layer is, and how many more tasks fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def capacity(
    directory: Annotated[Path, typer.Argument(help="The run directory, or a folder that save_pretrained wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Every layer as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a file that ends in .png, .svg or .pdf.")] = None,
) -> None:
    """Print dimensions used and left per layer, and a forecast. Reads the ledger alone: no model is loaded."""
    import json

    from keeplora.cli.console import print_table, wide_console, with_layers
    from keeplora.tuner.capacity import gauge_ledger
    from keeplora.tuner.persistence import open_ledger

    if plot is not None:
        from keeplora.report.plot_file import check_plot_name

        check_plot_name(plot)
    found = gauge_ledger(open_ledger(directory))
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        console = wide_console()
        print_table(console, with_layers(console, found.table(), [layer.layer for layer in found.layers]))
        for note in found.notes():
            console.print(note, markup=False, highlight=False)
    if plot is not None:
        from keeplora.report.capacity import plot_capacity

        plot_capacity(found.to_dict(), plot, title=directory.name)
        typer.echo(f"Plot: {plot}", err=as_json)
