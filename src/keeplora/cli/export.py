"""`keeplora export`: the result as an ordinary adapter or checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    format: Annotated[str, typer.Option("--format", help="peft: one stock adapter; merged: a whole checkpoint.")],
    output: Annotated[Path | None, typer.Option(help="A new folder; default RUN/export-FORMAT.")] = None,
) -> None:
    """Write what was learned so that stock `peft` or `transformers` opens it."""
    from keeplora.experiment import TrainedModel

    target = output or directory / f"export-{format}"
    typer.echo(str(TrainedModel(directory, device="cpu").export(target, format)))
