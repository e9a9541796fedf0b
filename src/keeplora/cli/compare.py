"""`keeplora compare`: methods × seeds × orders, run or read, in tables with intervals."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeplora.errors import ConfigError, KeepLoraError

if TYPE_CHECKING:
    from keeplora.report.study_data import Study
    from keeplora.study.plan import StudyPlan

_WHAT_IS_RUN = ("suite", "experiment", "methods", "seeds", "orders", "set", "per_method", "data")


def compare(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="A STUDY.yaml to run; or run directories, or a study's folder, to read.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="The suite to run (see `keeplora suites`).")] = None,
    experiment: Annotated[Path | None, typer.Option(help="An experiment's YAML file to run, in place of a suite.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="Methods with commas between them, or all. Repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0-4, or 0,1,7.")] = None,
    orders: Annotated[
        list[str] | None, typer.Option(metavar="ORDERS", help="Orders of the tasks: 1,2 or shuffle-7. Repeatable.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at once; default one per GPU, else per core as memory allows.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each run; default cores / jobs.")] = None,
    output: Annotated[Path | None, typer.Option(help="The study's folder; default runs/compare-NAME.")] = None,
    name: Annotated[str | None, typer.Option(help="What the report is called; default the suite's name.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the benchmark's data.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("-o", "--set", metavar="KEY=VALUE", help="Any key, for every run. Repeatable.")
    ] = None,
    per_method: Annotated[
        Path | None, typer.Option(help="YAML with `per_method:`, each method's own settings (`keeplora tune` writes one).")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The method that differences are taken against; default lora.")] = None,
    keep_ledgers: Annotated[
        bool | None, typer.Option("--keep-ledgers/--drop-ledgers", help="Delete a finished run's ledger tensors, to save disk.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and what is done; run nothing.")] = False,
    only_tables: Annotated[bool, typer.Option("--only-tables", help="Write the tables of what there is; run nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines, even in a terminal.")] = False,
) -> None:  # fmt: skip
    """Compare methods over seeds and orders, with intervals.

    Runs methods × seeds × orders, or reads runs that exist, and writes a report and tables.

    Every cell is a run of its own, several at once. Call it again to go on after a stop, or to add methods, seeds, orders.
    """
    from keeplora.experiment.config import parse_overrides

    values: dict[str, Any] = {
        "suite": suite, "experiment": str(experiment) if experiment else None, "methods": methods, "seeds": seeds,
        "orders": orders or None, "jobs": jobs, "threads": threads, "output": str(output) if output else None, "name": name,
        "data": str(data) if data else None, "set": parse_overrides(set_ or []) or None,
        "per_method": str(per_method) if per_method else None, "against": against, "keep_ledgers": keep_ledgers,
    }  # fmt: skip
    given = {key: value for key, value in values.items() if value is not None}
    found = paths or []
    study_file = len(found) == 1 and found[0].suffix in (".yaml", ".yml")
    if found and not study_file:
        if wrong := [key for key in _WHAT_IS_RUN if key in given]:
            word = wrong[0].replace("_", "-")
            raise ConfigError(f"--{word} is for runs to be made, but {found[0]} and what follows it are to be read; give one of "
                              "the two (methods are given with commas: --methods lora,keeplora++)")  # fmt: skip
        _read(found, output, name, against)
        return
    if only_tables and not study_file and "output" in given and "suite" not in given and "experiment" not in given:
        _read([Path(given["output"])], None, name, against)
        return
    plan, whole = _plan(found[0] if study_file else None, given)
    if dry_run:
        _print_plan(plan, whole)
    elif only_tables:
        _read([plan.output], None, None, plan.against)
    else:
        _run(plan, whole, quiet)


def _plan(file: Path | None, given: dict[str, Any]) -> tuple[StudyPlan, bool]:
    """The plan, and whether it is what a folder holds with nothing added: then its own cells are run and no others."""
    from keeplora.study.plan import make_plan, read_study
    from keeplora.study.store import StudyStore, is_study

    below: dict[str, Any] = {}
    whole = False
    if file is not None:
        below, _ = read_study(file)
        if "suite" in given or "experiment" in given:
            below = {key: value for key, value in below.items() if key not in ("suite", "experiment")}
    elif "suite" not in given and "experiment" not in given:
        folder = Path(given["output"]) if "output" in given else None
        if folder is None or not is_study(folder):
            told = f"{folder} holds no study to go on with" if folder else "nothing to compare"
            raise ConfigError(f"{told}: give a STUDY.yaml, --suite and --methods, or run directories")
        below = StudyStore(folder).load().plan_values()
        whole = not any(key in given for key in _WHAT_IS_RUN)
    settings = {**(below.get("set") or {}), **given.get("set", {})}
    return make_plan({**below, **given, **({"set": settings} if settings else {})}), whole


def _run(plan: StudyPlan, whole: bool, quiet: bool) -> None:
    from keeplora.study.execute import StudyInterrupted
    from keeplora.study.run import run_study
    from keeplora.study.store import StudyStore

    keys = list(StudyStore(plan.output).load().cells) if whole else None
    go_on = f"keeplora compare --output {shlex.quote(str(plan.output))}"
    try:
        outcome = run_study(plan, keys=keys, quiet=quiet or None)
    except StudyInterrupted as stopped:
        typer.echo(f"Interrupted. What is finished is kept; go on with `{go_on}`.", err=True)
        raise typer.Exit(128 + stopped.signal) from None
    _show(outcome.study, outcome.report)
    if outcome.failed:
        n = len(outcome.failed)
        typer.echo(
            f"Error: {n} cell{'' if n == 1 else 's'} failed, the tables are of the others; mend the cause and try again with "
            f"`{go_on}`", err=True,
        )  # fmt: skip
        raise typer.Exit(1)


def _read(paths: list[Path], output: Path | None, name: str | None, against: str | None) -> None:
    from keeplora.study.run import read_study

    if not paths:
        raise KeepLoraError("nothing to read: give run directories, or a study's folder")
    outcome = read_study(paths, output=output, name=name, against=against)
    _show(outcome.study, outcome.report)


def _show(study: Study, report: Path) -> None:
    from keeplora.cli.console import print_table, wide_console
    from keeplora.report.study_text import terminal

    console = wide_console(160)
    for part in terminal(study):
        print_table(console, part)
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)


def _print_plan(plan: StudyPlan, whole: bool) -> None:
    from rich.table import Table

    from keeplora.cli.console import print_table, wide_console
    from keeplora.study.resources import slots
    from keeplora.study.run import open_study

    plan.check()
    store, keys = open_study(plan)
    keys = list(store.cells) if whole else keys
    table = Table(
        title=f"{plan.name}: {len(plan.methods)} methods × {len(plan.seeds)} seeds × {len(plan.orders)} orders → {plan.output}"
    )
    for header in ("method", "order", "seed", "state", "folder"):
        table.add_column(header, justify="right" if header == "seed" else "left", overflow="fold")
    for key in keys:
        table.add_row(key.method, key.order, str(key.seed), store.cells[key].state, key.folder)
    console = wide_console(160)
    print_table(console, table, keys=3)
    done = sum(store.cells[key].state == "finished" for key in keys)
    free = slots(max(1, len(keys) - done), jobs=plan.jobs, threads=plan.threads or store.threads, settings=plan.set)
    on = f", GPUs {', '.join(free.gpus)}" if free.gpus else ""
    console.print(f"{done} of {len(keys)} cells are finished; {free.jobs} at once, {free.threads} threads each{on}")
