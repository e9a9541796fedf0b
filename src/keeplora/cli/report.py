"""`keeplora report`: write a run's report again, beside other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    against: Annotated[list[Path] | None, typer.Option(help="Other run directories. Repeatable.")] = None,
) -> None:
    """Render report.html; runs beside this one that are comparable are put in by themselves."""
    from keeplora.report import render_report

    typer.echo(str(render_report(directory, against or [])))
