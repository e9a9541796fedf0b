"""`keeplora resume`: go on with a run that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def resume(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines, even in a terminal.")] = False,
    against: Annotated[
        list[Path] | None, typer.Option(help="Other run directories for the report. Repeatable.")
    ] = None,
) -> None:
    """Go on after a crash: finished tasks are kept, the one under way starts again, the numbers end the same."""
    from keeplora.cli.run import finish
    from keeplora.experiment import Experiment

    Experiment.resume(directory, quiet=quiet or None)
    finish(directory, against or [])
