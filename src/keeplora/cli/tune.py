"""`keeplora tune`: hyper-parameters on validation pictures, the same number of trials for every method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from keeplora.errors import ConfigError


def tune(
    config: Annotated[Path | None, typer.Argument(help="The experiment's YAML file; not needed with --suite.")] = None,
    suite: Annotated[str | None, typer.Option(help="A suite, such as demo-small (see `keeplora suites`).")] = None,
    methods: Annotated[str, typer.Option(help="Methods with commas between them, such as lora,keeplora++.")] = "",
    tasks: Annotated[int, typer.Option(help="How many tasks, from the first: only these are looked at.")] = 2,
    trials: Annotated[int, typer.Option(help="Trials of each method.")] = 6,
    order: Annotated[str | None, typer.Option(help="The suite's order by name (1, 2), or shuffle-SEED.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of search and trials; take one that no table uses.")] = 100,
    validation: Annotated[
        float | None,
        typer.Option(help="Share of the training pictures to hold out; default the experiment's, or 0.25."),
    ] = None,
    range_: Annotated[
        list[str] | None, typer.Option("--range", help="Another range: [METHOD:]KEY=LOW:HIGH. Repeatable.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trials at once; default one per GPU, else as cores and memory allow.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark's data; default $KEEPLORA_DATA, ./data.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("-o", "--set", help="Any key of every trial: -o training.epochs=2. Repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The search's folder; default runs/tune-NAME.")] = None,
) -> None:
    """Search each method's hyper-parameters without looking at a test picture. Repeat the command to go on."""
    from keeplora.cli.console import print_table, wide_console
    from keeplora.study.tune import require_optuna
    from keeplora.study.tune_plan import TunePlan

    if (config is None) == (suite is None):
        raise ConfigError("give either an experiment's YAML file or --suite NAME, such as --suite demo-small")
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise ConfigError("no methods to tune: give them by --methods lora,keeplora++ (see `keeplora methods`)")
    require_optuna()
    settings = list(set_ or [])
    if data is not None:
        settings.append(f"data_dir={data.absolute()}")
    label = Path(suite).stem if suite is not None else config.stem if config is not None else ""
    plan = TunePlan(
        source={"suite": suite} if suite is not None else str(config), methods=names,
        output=output or Path("runs") / f"tune-{label}", tasks=tasks, trials=trials, seed=seed, order=order,
        validation=validation, settings=settings, ranges=range_ or [], jobs=jobs,
    )  # fmt: skip
    from keeplora.study import tune_report as report
    from keeplora.study.tune import tune as search

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        outcome = search(plan, say)
    except KeyboardInterrupt as stopped:
        say(f"Interrupted. Trials that ended are kept in {plan.output}; repeat the command to go on.")
        raise typer.Exit(128 + getattr(stopped, "signal", 2)) from None
    console = wide_console()
    print_table(console, report.table(outcome))
    for line in [*report.failures(outcome), *(f"warning: {line}" for line in report.edge_warnings(outcome))]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for path in report.write_all(outcome):
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
