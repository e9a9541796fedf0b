"""`keeplora run`: learn tasks in sequence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.files import real_path

if TYPE_CHECKING:
    from keeplora.experiment import Experiment


def run(
    config: Annotated[Path | None, typer.Argument(help="The experiment's YAML file; not needed with --suite.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="A suite, such as demo (see `keeplora suites`), or its YAML file.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="How to learn (see `keeplora methods`).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of shuffling, sampling and random starts.")] = None,
    order: Annotated[str | None, typer.Option(help="The suite's order by name (1, 2), or shuffle-SEED.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmark's data; default $KEEPLORA_DATA, ./data.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory; default runs/NAME-METHOD-seedSEED.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("-o", "--set", metavar="KEY=VALUE", help="Any key: -o training.epochs=2. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, sizes and estimates; train nothing.")] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="With --dry-run, of a generative model: tokens=700, samples=10000, tflops=100, ... Repeatable.",
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="Analyse the model first, and take the settings that this suggests where you set none."
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes of --auto's analysis.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines, even in a terminal.")] = False,
    against: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Other run directories for the report. Repeatable.")
    ] = None,
) -> None:
    """Learn tasks one after another, and report.

    Every task in turn, evaluation after each, report.html at the end."""
    from keeplora.cli.plan_text import print_plan
    from keeplora.experiment import Experiment
    from keeplora.experiment.config import parse_overrides
    from keeplora.experiment.interrupt import listening
    from keeplora.experiment.several import joined
    from keeplora.tuner import ranks

    overrides: dict[str, Any] = parse_overrides(set_ or [])
    given = {
        "method": method, "seed": seed, "order": order, "data_dir": str(data.absolute()) if data else None,
        "output": str(output) if output else None,
    }  # fmt: skip
    for key, value in given.items():
        if value is not None:
            overrides[key] = value
    if config is None and suite is None:
        raise ConfigError("nothing to run: give an experiment's YAML file, or --suite demo --method keeplora++")
    source: Any = config if config is not None else {"suite": suite, "method": method or "keeplora++"}
    if config is not None and suite is not None:
        overrides["suite"] = suite
    experiment = Experiment(source, overrides, quiet=quiet or None)
    if auto:
        if dry_run:
            raise ConfigError("--auto trains and measures, which --dry-run must not: leave one of them out")
        experiment = with_suggestions(experiment, source, overrides, jobs)
    if dry_run:
        print_plan(experiment, assume or [])
        return
    if assume:
        raise ConfigError("--assume is for --dry-run: a run measures what a plan must assume")
    with listening(), joined(experiment.config.device):
        experiment.run()
        first = ranks.is_first()
    if first:
        finish(experiment.config.output_path, against or [])


def with_suggestions(experiment: Experiment, source: Any, overrides: dict[str, Any], jobs: int) -> Experiment:
    """The experiment with what an analysis of its model suggests wherever the user set nothing; says what was taken."""
    from keeplora.experiment import Experiment
    from keeplora.experiment.own_settings import own_settings
    from keeplora.study.analyze.auto import analysis_for, take

    if experiment.config.output_path.is_dir() and any(experiment.config.output_path.iterdir()):
        raise ConfigError(
            f"{experiment.config.output_path} is not empty; choose another --output, or go on by `keeplora resume`"
        )
    try:
        found = analysis_for(experiment.config, jobs=jobs, quiet=experiment.quiet)
    except KeyboardInterrupt as stopped:
        stopped.add_note("repeat the command to go on with the analysis")
        raise
    taken = take(found, experiment.config, own_settings(source, overrides))
    print(f"Settings after the analysis (its figures: {found.page}):", file=sys.stderr)
    for line in taken.said:
        print(f"  {line}", file=sys.stderr, flush=True)
    return Experiment(source, {**overrides, **taken.overrides, "auto": taken.record}, quiet=experiment.quiet)


def finish(path: Path, against: list[Path]) -> None:
    """What a run ends with: the tables and the report's path."""
    from keeplora.cli.console import print_table, wide_console
    from keeplora.report import find_comparable, load_results, render_report
    from keeplora.report.runs import load_run
    from keeplora.report.terminal import matrix_table, results_table

    console = wide_console()
    results = load_results(path)
    print_table(console, matrix_table(results))
    paths = {real_path(other): other for other in [*against, *find_comparable(path)]}
    print_table(console, results_table([load_run(one) for one in (path, *paths.values())]))
    try:
        report = render_report(path, against)
    except (KeepLoraError, OSError):  # OSError: the command line has a sentence for it
        raise
    except Exception as error:
        raise KeepLoraError(
            f"the run is finished and its results are kept, but report.html could not be made ({type(error).__name__}: "
            f"{error}); `keeplora report {path}` tries it again"
        ) from error
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
