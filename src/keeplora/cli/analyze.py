"""`keeplora analyze`: the paper's analyses of one's own model, and the settings that follow from them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keeplora.cli import analyze_boundary, analyze_drift, analyze_similarity

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
SuiteName = Annotated[str | None, typer.Option("--suite", help="A suite, such as demo-small (see `keeplora suites`).")]
Model = Annotated[str | None, typer.Option(help="Another model: a Hugging Face name, a local folder, or embedded.")]
MethodName = Annotated[
    str | None, typer.Option("--method", help="The method that learns where a part is trained; default keeplora++.")
]
Data = Annotated[Path | None, typer.Option(help="Folder of the benchmark's data; default $KEEPLORA_DATA, ./data.")]
Set = Annotated[
    list[str] | None, typer.Option("-o", "--set", help="Any key of the experiment: -o training.epochs=2. Repeatable.")
]
Limit = Annotated[int, typer.Option(help="Most samples of each set; 0: all.")]
General = Annotated[
    str,
    typer.Option(
        help="What stands for general knowledge: reference, probes, or auto: the reference set where there is one."
    ),
]
By = Annotated[str, typer.Option(help="What shares of the spectrum are of: energy (Σσ²) or sum (Σσ).")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of samples, and of training.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes; each opens the model for itself.")]
Output = Annotated[
    Path | None, typer.Option(help="The analysis's folder; default runs/analysis-NAME, of a run RUN/analysis.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines, even in a terminal.")]


@app.command("intra")
def intra(
    config: Config = None,
    suite: SuiteName = None,
    model: Model = None,
    method: MethodName = None,
    data: Data = None,
    set_: Set = None,
    shares: Annotated[
        str, typer.Option(help="The grid of shares with commas between them; default 0.5,0.7,0.85,0.95.")
    ] = "",
    parts: Annotated[
        str, typer.Option(help="Towers with commas between them, or all (at once); default each by itself.")
    ] = "",
    by: By = "energy",
    general: General = "auto",
    limit: Limit = 200,
    seed: Seed = 0,
    jobs: Jobs = 1,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Rebuild a model's weights from part of their singular components, and score it. Repeat the command to go on."""
    from keeplora.errors import ConfigError
    from keeplora.study.analyze import run as analysis
    from keeplora.study.analyze.plan import SHARES

    try:
        grid = [float(word) for word in words(shares)]
    except ValueError:
        raise ConfigError(f"--shares {shares!r}: write numbers with commas between them, such as 0.5,0.85") from None
    plan = plan_of(config, suite, model, method, data, set_, output, limit=limit, by=by, general=general, seed=seed)
    finish(
        lambda: analysis.intra(plan, shares=grid or SHARES, parts=words(parts) or None, jobs=jobs, quiet=quiet or None),
        plan,
    )


@app.command("inter")
def inter(
    source: Source = None,
    suite: SuiteName = None,
    model: Model = None,
    method: MethodName = None,
    data: Data = None,
    set_: Set = None,
    what: Annotated[
        str,
        typer.Option(help="Only these, with commas: thirds, windows, spectra; of a run: layers, undo. Default all."),
    ] = "",
    tasks: Annotated[
        int, typer.Option(min=1, help="On how many tasks, from the first, windows of layers are adapted.")
    ] = 2,
    by: By = "energy",
    general: General = "auto",
    limit: Limit = 200,
    seed: Seed = 0,
    jobs: Jobs = 1,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
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
    plan = plan_of(
        None if run else source, suite, model, method, data, set_, output, run=run, limit=limit, by=by, general=general,
        seed=seed, tasks=tasks,
    )  # fmt: skip
    finish(lambda: analysis.inter(plan, what=chosen, jobs=jobs, quiet=quiet or None), plan)


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def plan_of(
    config: Path | None, suite: str | None, model: str | None, method: str | None, data: Path | None,
    set_: list[str] | None, output: Path | None, *, run: Path | None = None, limit: int = 200, **options: Any,
) -> AnalysisPlan:  # fmt: skip
    """The plan that the options of a command describe."""
    from keeplora.errors import ConfigError
    from keeplora.experiment import load_config
    from keeplora.experiment.config import parse_overrides
    from keeplora.experiment.run_directory import RunDirectory
    from keeplora.methods import method_names
    from keeplora.study.analyze.plan import AnalysisPlan

    options["limit"] = limit or None
    if run is not None:
        if suite or model or method or set_:
            raise ConfigError(
                f"{run} is a run, which says itself of which suite, model and settings it is: leave them out"
            )
        moved = {"data_dir": str(data.absolute())} if data else {}
        source = {**RunDirectory(run).read_config(), **moved}
        return AnalysisPlan(source, output or run / "analysis", run=run, **options)
    if config is not None and config.is_dir():
        raise ConfigError(
            f"{config} is a folder; intra looks at an untouched model: give an experiment's YAML file or --suite "
            f"(of a finished run: `keeplora analyze inter {config}`)"
        )
    if (config is None) == (suite is None):
        raise ConfigError("give either an experiment's YAML file or --suite NAME, such as --suite demo-small")
    overrides = parse_overrides(set_ or [])
    given = {"method": method, "data_dir": str(data.absolute()) if data else None}
    overrides |= {key: value for key, value in given.items() if value is not None}
    if model is not None:
        overrides["model"] = model
    where: Any = config if config is not None else {"suite": suite, "method": method or "keeplora++"}
    loaded = load_config(where, overrides, known_methods=method_names())
    return AnalysisPlan(
        loaded.resolved(), output or Path("runs") / f"analysis-{loaded.label.replace('/', '-')}", **options
    )


def finish(make: Any, plan: AnalysisPlan) -> Analysis:
    """Run an analysis and print what it says and where it lies."""
    from keeplora.cli.console import wide_console

    try:
        done: Analysis = make()
    except KeyboardInterrupt as stopped:
        stopped.add_note(f"what was measured is in {plan.output}; repeat the command to go on")
        raise
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
