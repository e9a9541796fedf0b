"""`keeplora export` and `keeplora ledger export`: the result as an ordinary adapter or checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    directory: Annotated[Path, typer.Argument(help="A run directory, a saved learner, or a ledger.")],
    format: Annotated[str, typer.Option("--format", help="peft: one stock adapter; merged: a whole checkpoint.")],
    output: Annotated[Path | None, typer.Option(help="A new folder; default DIRECTORY/export-FORMAT.")] = None,
    upto: Annotated[str | None, typer.Option(help="The last task to be in it; default all.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Names of the tasks to be in it, separated by commas.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, where the folder is no run directory and it is needed.")
    ] = None,
) -> None:
    """Write what was learned so that stock `peft` or `transformers` opens it."""
    from keeplora.experiment import TrainedModel

    target = output or directory / f"export-{format}"
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else None
    if model is None and ((directory / "config.yaml").is_file() or not directory.is_dir()):
        written = TrainedModel(directory, device="cpu").export(target, format, upto=upto, tasks=names)
    else:
        from keeplora.experiment.ledgers import LedgerPlace

        written = LedgerPlace.open(directory).export(target, format, upto=upto, tasks=names, model=model)
    typer.echo(str(written))
