"""`keeplora resume`: go on with a run that was interrupted, or with further tasks."""

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
            help="Change a training rate: -o training.learning_rate=1e-4; of an added task also its -o "
            "training.epochs.TASK=5. Repeatable.",
        ),
    ] = None,
    add_tasks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML with further `tasks:` for a finished run, learned after its own; the run keeps its settings.",
        ),
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Other run directories for the report. Repeatable.")
    ] = None,
) -> None:
    """Go on after a crash, or with further tasks.

    From the last checkpoint of the task under way; the numbers end the same."""
    from keeplora.cli.run import finish
    from keeplora.experiment import Experiment
    from keeplora.experiment.config import parse_overrides
    from keeplora.experiment.interrupt import listening
    from keeplora.experiment.several import joined
    from keeplora.tuner import ranks

    with listening(), joined():
        Experiment.resume(directory, parse_overrides(set_ or []), quiet=quiet or None, add_tasks=add_tasks)
        first = ranks.is_first()
    if first:
        finish(directory, against or [])
