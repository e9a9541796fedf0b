"""`keeplora analyze`: the paper's analyses of one's own model, and the settings that follow from them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeplora.cli import analyze_boundary, analyze_drift, analyze_similarity
from keeplora.cli.analyze_options import Shared, with_shared

if TYPE_CHECKING:
    from keeplora.study.analyze.plan import AnalysisPlan
    from keeplora.study.analyze.run import Analysis

app = typer.Typer(
    help="See where a model keeps what it knows, what tasks do to one another, and where a stream changes.",
    no_args_is_help=True,
)
app.command("drift")(analyze_drift.drift)
app.command("similarity")(analyze_similarity.similarity)
app.command("boundary")(analyze_boundary.boundary)

Config = Annotated[Path | None, typer.Argument(help="The experiment's YAML file; not needed with --suite.")]
Source = Annotated[
    Path | None,
    typer.Argument(help="The experiment's YAML file, or a finished run's directory; not needed with --suite."),
]
Shares = Annotated[
    str,
    typer.Option(help="The grid of shares with commas between them, to which the configured ε_w is added; default "
                 "0.5,0.7,0.85,0.95."),
]  # fmt: skip
Parts = Annotated[str, typer.Option(help="Towers with commas between them, or all (at once); default each by itself.")]
What = Annotated[
    str, typer.Option(help="Only these, with commas: thirds, windows, spectra; of a run: layers, undo. Default all.")
]
Windows = Annotated[
    int, typer.Option(min=2, help="Into how many windows of depth the layers are divided, of which one at a time is adapted; "
                      "at most the number of blocks.")
]  # fmt: skip
Tasks = Annotated[int, typer.Option(min=1, help="On how many tasks, from the first, windows of layers are adapted.")]


@app.command("intra")
@with_shared
def intra(config: Config = None, shares: Shares = "", parts: Parts = "", *, shared: Shared) -> None:
    """Rebuild a model's weights from part of their singular components, and score it. Repeat the command to go on."""
    from keeplora.errors import ConfigError
    from keeplora.study.analyze import run as analysis
    from keeplora.study.analyze.plan import SHARES

    try:
        grid = [float(word) for word in words(shares)]
    except ValueError:
        raise ConfigError(f"--shares {shares!r}: write numbers with commas between them, such as 0.5,0.85") from None
    plan = plan_of(config, shared)
    finish(lambda: analysis.intra(plan, shares=grid or SHARES, parts=words(parts) or None, **shared.how), plan)


@app.command("inter")
@with_shared
def inter(source: Source = None, what: What = "", tasks: Tasks = 2, windows: Windows = 3, *, shared: Shared) -> None:
    """What the depth of a model, or of a finished run, has to do with keeping and learning. Repeat the command to go on."""
    from keeplora.errors import ConfigError
    from keeplora.study.analyze import run as analysis
    from keeplora.study.analyze.plan import INTER, INTER_RUN, check_what

    if source is not None and source.is_dir() and not (source / "config.yaml").is_file():
        raise ConfigError(
            f"{source} is no run (it holds no config.yaml) and no experiment's file; give one of the two, or --suite"
        )
    run = source if source is not None and source.is_dir() else None
    chosen = check_what(words(what), INTER_RUN if run else INTER, "a run" if run else "an untouched model")
    plan = plan_of(None if run else source, shared, run=run, tasks=tasks, windows=windows)
    finish(lambda: analysis.inter(plan, what=chosen, **shared.how), plan)


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def plan_of(config: Path | None, shared: Shared, *, run: Path | None = None, **inter: Any) -> AnalysisPlan:
    """The plan that the options of a command describe."""
    from keeplora.errors import ConfigError
    from keeplora.experiment import load_config
    from keeplora.experiment.config import parse_overrides
    from keeplora.experiment.run_directory import RunDirectory
    from keeplora.methods import method_names
    from keeplora.study.analyze.plan import AnalysisPlan

    options = {**shared.told, **inter}
    if run is not None:
        if shared.suite or shared.model or shared.method or shared.set_:
            raise ConfigError(
                f"{run} is a run, which says itself of which suite, model and settings it is: leave them out"
            )
        if shared.general != "auto":
            raise ConfigError(
                f"--general {shared.general}: of a run its own probes are looked at; leave the option out"
            )
        moved = {"data_dir": str(shared.data.absolute())} if shared.data else {}
        source = {**RunDirectory(run).read_config(), **moved}
        return AnalysisPlan(source, shared.output or run / "analysis", run=run, seed=shared.seed or 0, **options)
    if config is not None and config.is_dir():
        raise ConfigError(
            f"{config} is a folder; intra looks at an untouched model: give an experiment's YAML file or --suite "
            f"(of a finished run: `keeplora analyze inter {config}`)"
        )
    if (config is None) == (shared.suite is None):
        raise ConfigError("give either an experiment's YAML file or --suite NAME, such as --suite demo-small")
    overrides = parse_overrides(shared.set_ or [])
    given = {"method": shared.method, "data_dir": str(shared.data.absolute()) if shared.data else None}
    overrides |= {key: value for key, value in given.items() if value is not None}
    if shared.model is not None:
        overrides["model"] = shared.model
    where: Any = config if config is not None else {"suite": shared.suite, "method": shared.method or "keeplora++"}
    loaded = load_config(where, overrides, known_methods=method_names())
    folder = shared.output or Path("runs") / f"analysis-{loaded.label.replace('/', '-')}"
    seed = loaded.seed if shared.seed is None else shared.seed
    return AnalysisPlan(loaded.resolved(), folder, seed=seed, **options)


def finish(make: Any, plan: AnalysisPlan) -> Analysis:
    """Run an analysis and print what it says and where it lies."""
    from keeplora.cli.console import wide_console

    try:
        done: Analysis = make()
    except KeyboardInterrupt as stopped:
        stopped.add_note(f"what was measured is in {plan.output}; repeat the command to go on")
        raise
    if not done.results:  # a dry run
        return done
    console = wide_console()
    for lines in done.results["words"].values():
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    made = done.results.get("suggestion")
    if made and any(v is not None for k, v in made.items() if k != "evidence"):
        console.print(str(done.folder / "suggestion.yaml"), soft_wrap=True, highlight=False, markup=False)
    console.print(str(done.page), soft_wrap=True, highlight=False, markup=False)
    sys.stdout.flush()
    return done
