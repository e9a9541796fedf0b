"""`keeplora analyze`: what a model, its tasks and a stream of data look like to the method."""

from __future__ import annotations

import typer

from keeplora.cli import analyze_boundary, analyze_drift, analyze_similarity

app = typer.Typer(help="Look into models, tasks and streams as the method sees them.", no_args_is_help=True)
app.command("drift")(analyze_drift.drift)
app.command("similarity")(analyze_similarity.similarity)
app.command("boundary")(analyze_boundary.boundary)
