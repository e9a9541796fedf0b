"""`keeplora ledger`: what was learned, entry by entry; going back, taking tasks out, and checking it all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keeplora.cli.export import export

app = typer.Typer(
    help="The record of what was learned: look at it, go back, take a task out, check it.", no_args_is_help=True
)
Directory = Annotated[Path, typer.Argument(help="A run directory, a saved learner, or a ledger.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command("log")
def log(directory: Directory, as_json: AsJson = False) -> None:
    """List the entries, oldest first: tasks, and what was done with them since."""
    from keeplora.cli import ledger_text
    from keeplora.experiment.ledgers import LedgerPlace

    rows = ledger_text.log_rows(LedgerPlace.open(directory).ledger)
    _say(rows, ledger_text.log_table(rows, str(directory)), as_json, keys=3)


@app.command("show")
def show(
    directory: Directory,
    task: Annotated[str, typer.Argument(help="The task's name, or the number of its entry.")],
    as_json: AsJson = False,
) -> None:
    """Print all that is recorded of one task."""
    from keeplora.cli import ledger_text
    from keeplora.experiment.ledgers import LedgerPlace

    told = ledger_text.task_told(LedgerPlace.open(directory).ledger, task)
    _say(told, ledger_text.task_tables(told), as_json)


@app.command("rollback")
def rollback(
    directory: Directory,
    to: Annotated[str, typer.Argument(help="A task: after it was learned. Or the number of an entry; 0: before all.")],
) -> None:
    """Go back to an earlier state; `keeplora resume` goes on from there. Nothing is deleted."""
    _change(directory, "rollback", to)


@app.command("remove")
def remove(
    directory: Directory,
    task: Annotated[str, typer.Argument(help="The task's name, or the number of its entry.")],
    purge: Annotated[bool, typer.Option("--purge", help="Delete its tensors for good as well.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the tensors are deleted.")] = False,
) -> None:
    """Take one task's update out of the model, exactly; it is kept aside until it is purged."""
    if purge:
        _confirm(task, yes)
    entry = _change(directory, "remove", task, for_good=purge)
    if purge:
        _change(directory, "purge", entry)


@app.command("restore")
def restore(
    directory: Directory,
    task: Annotated[str, typer.Argument(help="The task's name, or the number of its entry.")],
) -> None:
    """Put a removed or rolled back task in again."""
    _change(directory, "restore", task)


@app.command("purge")
def purge(
    directory: Directory,
    task: Annotated[str, typer.Argument(help="The task's name, or the number of its entry.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the tensors of a task that is not active, for good."""
    _confirm(task, yes)
    _change(directory, "purge", task)


app.command("export")(export)


@app.command("verify")
def verify(
    directory: Directory,
    model: Annotated[str | None, typer.Option(help="The base model, where the folder is no run directory.")] = None,
    files_only: Annotated[bool, typer.Option("--files-only", help="Do not load a run's model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute hashes, seals, bases and factors, and with the model its hash and leaks; status 1 at the first finding."""
    from keeplora.cli import ledger_text
    from keeplora.errors import KeepLoraError, LedgerError
    from keeplora.experiment.ledgers import LedgerPlace
    from keeplora.tuner.ledger_check import Check, checks, failure

    found: list[Check] = []
    problem: KeepLoraError | None = None
    try:
        place = LedgerPlace.open(directory)
        for check in checks(place.ledger):
            found.append(check)
            if not check.passed:
                raise failure(place.ledger.path, check)
        if model is not None or (place.run and not files_only):
            for check in place.check_model(model):
                found.append(check)
                if not check.passed:
                    raise LedgerError(f"{check.where}: {check.what} is {check.value:.1e}, over {check.limit:.0e}")
    except KeepLoraError as error:
        problem = error
    told = {
        "passed": problem is None, "problem": str(problem) if problem else None,
        "checks": [check.to_dict() for check in found],
    }  # fmt: skip
    _say(told, ledger_text.check_table(found, str(directory)), as_json, keys=2)
    if problem is not None:
        raise problem
    if not as_json:
        typer.echo(f"{len(found)} checks passed.")


@app.command("diff")
def diff(
    directory: Annotated[Path, typer.Argument(help="One ledger: a run directory, a saved learner, or a ledger.")],
    other: Annotated[Path, typer.Argument(help="The other.")],
    as_json: AsJson = False,
) -> None:
    """Say where two ledgers part, and how far their updates lie apart in each layer; exit status 1 if they differ."""
    from keeplora.cli import ledger_text
    from keeplora.experiment.ledgers import LedgerPlace
    from keeplora.tuner.ledger_check import compare_ledgers, differ

    told = compare_ledgers(LedgerPlace.open(directory).ledger, LedgerPlace.open(other).ledger)
    _say(told, ledger_text.diff_tables(told, str(directory), str(other)), as_json)
    if differ(told):
        raise typer.Exit(1)


def _confirm(task: str, yes: bool) -> None:
    import sys

    from keeplora.errors import KeepLoraError

    if not yes and not sys.stdin.isatty():
        raise KeepLoraError(
            f"the tensors of task {task!r} would be gone for good, and nobody is there to ask: add --yes"
        )
    if not yes:
        typer.confirm(f"Delete the tensors of task {task!r} for good? It cannot be restored then", abort=True)


def _change(directory: Path, operation: str, task: str | int, *, for_good: bool = False) -> int:
    """Do it and say what came of it; the entry of the task it was done to. ``for_good``: a purge is to follow."""
    from keeplora.experiment.ledgers import LedgerPlace

    place = LedgerPlace.open(directory)
    before = len(place.ledger.chain())
    place.change(operation, task)
    chain = place.ledger.chain()
    active = chain.names(chain.state.active)
    step = chain.steps[-1]
    kept = "" if for_good else "; it is kept aside"
    done = {
        "rollback": f"Back to entry {step.subject}" + (f" ({step.name!r})" if step.name else ""),
        "remove": f"Removed {step.name!r}{kept}", "restore": f"Restored {step.name!r}",
        "purge": f"Deleted the tensors of {step.name!r}",
    }[operation]  # fmt: skip
    typer.echo(f"{done}. Active: {', '.join(active) or 'no task'}.")
    if operation == "remove" and step.subject in chain.state.history:
        typer.echo("Not undone: what later tasks learned in its presence. Its directions stay protected.")
    if operation == "purge":
        typer.echo("Its record.json stays, and so does what was exported before.")
    elif not for_good:
        typer.echo(f"To undo it: keeplora ledger rollback {directory} {before}")
    if place.run and operation == "rollback":
        typer.echo(f"Go on from there: keeplora resume {directory}")
    return step.subject


def _say(value: Any, tables: Any, as_json: bool, keys: int = 1) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(value, ensure_ascii=False))
        return
    from keeplora.cli.console import print_table, wide_console

    console = wide_console()
    for table in tables:
        print_table(console, table, keys)
