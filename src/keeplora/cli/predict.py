"""`keeplora predict`: name pictures, or answer a question about them, with what a run has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A picture. Repeatable.")] = None,
    video: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A video. Repeatable.")] = None,
    question: Annotated[
        str | None,
        typer.Option(help="For a generative model: what to ask about the pictures and videos, all of them at once."),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Candidates, separated by commas; any words will do.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Candidates are this learned task's classes; the task of a question.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Prompt with {} for the class; default: the task's own.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many candidates to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per picture.")] = False,
) -> None:
    """Name pictures, or answer a --question about them.

    Without --classes or --task, the candidates are every class learned so far.
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from keeplora.cli.console import print_table
    from keeplora.data import read_picture
    from keeplora.errors import KeepLoraError
    from keeplora.experiment import TrainedModel

    names = [name.strip() for name in classes.split(",") if name.strip()] if classes is not None else None
    pictures = [(path, read_picture(path)) for path in image or []]
    videos = video or []
    if not pictures and not videos and question is None:
        raise KeepLoraError(
            "nothing to look at: give --image FILE or --video FILE (and for a generative model --question TEXT)"
        )
    model = TrainedModel(directory)
    if question is not None:
        answer = model.answer([picture for _, picture in pictures], question, task=task, videos=videos)
        shown = {"images": [str(path) for path, _ in pictures], "videos": [str(path) for path in videos]}
        told = {**{what: files for what, files in shown.items() if files}, "question": question, "answer": answer}
        typer.echo(json.dumps(told, ensure_ascii=False) if as_json else answer)
        return
    console = Console()
    for path, picture in [*pictures, *((path, path) for path in videos)]:
        found = model.predict(picture, classes=names, task=task, template=template)[:top]
        if as_json:
            rows = [{"class": p.label, "task": p.task, "probability": p.probability} for p in found]
            what = "video" if path is picture else "image"
            typer.echo(json.dumps({what: str(path), "predictions": rows}, ensure_ascii=False))
            continue
        table = Table(title=str(path), title_justify="left")
        table.add_column("class")
        table.add_column("task")
        table.add_column("probability", justify="right")
        for p in found:
            table.add_row(p.label, p.task or "–", f"{100 * p.probability:.1f} %")
        print_table(console, table)
