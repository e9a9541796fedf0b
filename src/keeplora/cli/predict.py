"""`keeplora predict`: classify pictures with what a run has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    image: Annotated[list[Path], typer.Option(help="A picture. Repeatable.")],
    classes: Annotated[str | None, typer.Option(help="Candidates, separated by commas; any words will do.")] = None,
    task: Annotated[str | None, typer.Option(help="Candidates are the classes of this learned task.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt with {} for the class; default: the task's own.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many candidates to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per picture.")] = False,
) -> None:
    """Print the likeliest classes of pictures; without --classes or --task, among every class learned so far."""
    import json

    from rich.console import Console
    from rich.table import Table

    from keeplora.data import read_picture
    from keeplora.experiment import TrainedModel

    names = [name.strip() for name in classes.split(",") if name.strip()] if classes is not None else None
    pictures = [(path, read_picture(path)) for path in image]
    model = TrainedModel(directory)
    console = Console()
    for path, picture in pictures:
        found = model.predict(picture, classes=names, task=task, template=template)[:top]
        if as_json:
            rows = [{"class": p.label, "task": p.task, "probability": p.probability} for p in found]
            typer.echo(json.dumps({"image": str(path), "predictions": rows}, ensure_ascii=False))
            continue
        table = Table(title=str(path), title_justify="left")
        table.add_column("class")
        table.add_column("task")
        table.add_column("probability", justify="right")
        for p in found:
            table.add_row(p.label, p.task or "–", f"{100 * p.probability:.1f} %")
        console.print(table)
