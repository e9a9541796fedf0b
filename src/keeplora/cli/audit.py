"""`keeplora audit`: how much of each update acts on protected inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Every layer and task as JSON.")] = False,
) -> None:
    """Print both leak figures per layer; exit status 1 if a factor leaks more than 1e-5."""
    import json

    from keeplora.errors import KeepLoraError
    from keeplora.experiment import TrainedModel

    learner = TrainedModel(directory, device="cpu").learner
    if not learner.protects:
        raise KeepLoraError(f"{directory}: its method protects no subspace, so there is nothing to leak into")
    found = learner.audit()
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found), nl=as_json)
    if not as_json:
        verdict = "within" if found.passed else "OVER"
        typer.echo(f"worst factor leak {found.factor_leak_max:.1e}, {verdict} the limit of 1e-5")
    if not found.passed:
        raise typer.Exit(1)
