"""`keeplora resume`: go on with a run that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def resume(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines, even in a terminal.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--set",
            metavar="KEY=VALUE",
            help="Change a training rate: -o training.learning_rate=1e-4. Repeatable.",
        ),
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Other run directories for the report. Repeatable.")
    ] = None,
) -> None:
    """Go on after a crash, from the last checkpoint of the task under way; the numbers end the same."""
    from keeplora.cli.run import finish
    from keeplora.experiment import Experiment
    from keeplora.experiment.config import parse_overrides
    from keeplora.experiment.interrupt import listening
    from keeplora.experiment.several import joined
    from keeplora.tuner import ranks

    with listening(), joined():
        Experiment.resume(directory, parse_overrides(set_ or []), quiet=quiet or None)
        first = ranks.is_first()
    if first:
        finish(directory, against or [])
