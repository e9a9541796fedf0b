"""Options that `keeplora analyze intra` and `inter` share, written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


@dataclass(frozen=True)
class Shared:
    """What both commands are told; every field is an option."""

    suite: Annotated[
        str | None, typer.Option("--suite", help="A suite, such as demo-small (see `keeplora suites`).")
    ] = None
    model: Annotated[
        str | None, typer.Option(help="Another model: a Hugging Face name, a local folder, or embedded.")
    ] = None
    method: Annotated[
        str | None, typer.Option("--method", help="The method that learns where a part is trained; default keeplora++.")
    ] = None
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark's data; default $KEEPLORA_DATA, ./data.")
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("-o", "--set", help="Any key of the experiment: -o training.epochs=2. Repeatable."),
    ] = None
    by: Annotated[str, typer.Option(help="What shares of the spectrum are of: energy (Σσ²) or sum (Σσ).")] = "energy"
    general: Annotated[
        str,
        typer.Option(
            help="What stands for general knowledge: reference, probes, or auto: the reference set where there is one."
        ),
    ] = "auto"
    limit: Annotated[int, typer.Option(help="Most samples of each set; 0: all.")] = 200
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the choice of samples, and of training; default the experiment's, of a run 0."),
    ] = None
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each opens the model for itself.")] = 1
    output: Annotated[
        Path | None, typer.Option(help="The analysis's folder; default runs/analysis-NAME, of a run RUN/analysis.")
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines, even in a terminal.")] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say how many points there are, and how long they take where some are measured; measure none.",
        ),
    ] = False

    @property
    def told(self) -> dict[str, Any]:
        """Of the plan, what is not where the model and the data come from."""
        return {"limit": self.limit or None, "by": self.by, "general": self.general}

    @property
    def how(self) -> dict[str, Any]:
        """How the points are measured."""
        return {"jobs": self.jobs, "quiet": self.quiet or None, "dry": typer.echo if self.dry_run else None}


def with_shared(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose last parameter is a `Shared`, with that one's fields as options of its own."""
    hints = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()][:-1]
    hints = get_type_hints(Shared, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=f.default, annotation=hints[f.name])
        for f in fields(Shared)
    ]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        command(**{p.name: given.pop(p.name) for p in own}, shared=Shared(**given))

    call.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    return call
