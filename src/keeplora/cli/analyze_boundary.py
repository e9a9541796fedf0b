"""`keeplora analyze boundary`: a run's tasks as one stream, and where a new task is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keeplora.cli.plot_place import check_plot


def boundary(
    directory: Annotated[
        Path, typer.Argument(help="The run directory whose tasks (their training samples) are laid end to end.")
    ],
    kind: Annotated[
        str,
        typer.Option("--stream", help="abrupt; gradual: tasks mix over --ramp samples; shuffled: no boundary at all."),
    ] = "abrupt",
    alarm_rate: Annotated[float, typer.Option(help="False alarms per sample, above 0 and below 0.5.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Samples that each task is told from; none is judged there.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Samples that arrive at once.")] = 8,
    ramp: Annotated[int, typer.Option(help="With --stream gradual: samples over which one task gives way.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the order within each task.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Every sample as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the statistic: a file that ends in .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Print where a stream of a run's tasks, without their labels, is seen to go over to a new one.

    Each task's training samples are streamed once, in random order. The base model is loaded.
    """
    import json

    from keeplora.experiment.boundary import watch_run

    if plot is not None:
        check_plot(plot)
    found = watch_run(
        directory, kind=kind, alarm_rate=alarm_rate, warmup=warmup, size=batch_size, ramp=ramp, seed=seed
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
    else:
        judged = len(found.positions)
        typer.echo(
            f"{found.kind} stream of {found.samples} samples, {judged} of them judged (the others are warm-ups):"
        )
        for alarm in found.alarms:
            way = "more" if alarm.up else "less"
            typer.echo(
                f"  alarm at sample {alarm.at}: {way} energy outside than before, since about sample {alarm.onset}"
            )
        for name, delay in found.delays():
            typer.echo(f"  {name}: " + ("not noticed" if delay is None else f"noticed after {delay} samples"))
        typer.echo(
            f"false alarms: {found.false_alarms()}; asked for {alarm_rate:g} per sample, {alarm_rate * judged:.2g} in so many"
        )
    if plot is not None:
        from keeplora.report.boundary_plot import plot_boundary

        plot_boundary(found.to_dict(), plot, title=directory.name)
        typer.echo(f"Plot: {plot}", err=as_json)
