"""What a search leaves behind: tuned.yaml, trials.csv, a table, a plot, and the doubts that belong to them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.files import atomic_write_bytes, atomic_write_text
from keeplora.study.search import LEARNING_RATE, Axis, Trial
from keeplora.study.tune import Outcome
from keeplora.yaml_text import dump_yaml

TUNED, TRIALS, PLOT = "tuned.yaml", "trials.csv", "trials.png"
_HEADER = """\
# Hyper-parameters found by `keeplora tune` on validation pictures alone; `search:` says how.
# Use them by `keeplora compare --per-method THIS_FILE`, or copy `per_method:` into an experiment or a suite.
"""


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings.

    >>> _sections({"training.learning_rate": 0.001, "tuner.options.lam": 1.0})
    {'training': {'learning_rate': 0.001}, 'tuner': {'options': {'lam': 1.0}}}
    """
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        here = nested
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return nested


def edges(outcome: Outcome) -> list[tuple[str, Axis, str]]:
    """(method, axis, "lower" or "upper") where nothing beyond the best value was tried: the best may lie outside.

    A trial that failed was tried too: where larger learning rates diverge there is nothing to look for.
    """
    found = []
    for method, trials in outcome.trials.items():
        best = outcome.best(method)
        for axis in outcome.spaces[method]:
            tried = {t.settings[axis.key] for t in trials if t.state != "running"}
            if best is None or axis.kind == "choice" or len(tried) < 2:
                continue
            sides = {min(tried): "lower", max(tried): "upper"}
            if side := sides.get(best.settings[axis.key]):
                found.append((method, axis, side))
    return found


def edge_warnings(outcome: Outcome) -> list[str]:
    """A sentence for each of `edges`."""
    lines = []
    for method, axis, side in edges(outcome):
        best = outcome.best(method)
        assert best is not None
        word = {"lower": "smallest", "upper": "largest"}[side]
        lines.append(
            f"{method}: the best {axis.key}, {best.settings[axis.key]:g}, is the {word} that was tried, at the {side} edge of "
            f"its range ({axis.text()}); search on by --range {method}:{axis.key}=LOW:HIGH into a new --output"
        )
    return lines


def failures(outcome: Outcome) -> list[str]:
    """A line for each trial that failed, with its reason."""
    return [
        f"{method}, trial {trial.number}: failed: {trial.error}"
        for method, trials in outcome.trials.items() for trial in trials if trial.state == "failed"
    ]  # fmt: skip


def write_trials(outcome: Outcome) -> Path:
    """trials.csv: one line for each trial that has ended."""
    keys = list(dict.fromkeys(axis.key for axes in outcome.spaces.values() for axis in axes))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["method", "trial", "proposed_by", "state", outcome.record["criterion"], "seconds", *keys, "error", "folder"]
    )
    for trials in outcome.trials.values():
        for t in trials:
            if t.state != "running":
                values = [t.settings.get(key, "") for key in keys]
                criterion = "" if t.criterion is None else t.criterion
                row = [t.method, t.number, t.proposed_by, t.state, criterion, t.seconds, *values, t.error, t.folder]
                table.writerow(row)
    return atomic_write_text(outcome.folder / TRIALS, text.getvalue())


def write_tuned(outcome: Outcome) -> Path:
    """tuned.yaml: ``per_method`` as suites and `keeplora compare` take it, and ``search``, which both leave alone.

    A method of which no trial finished is left out.
    """
    record = outcome.record
    any_config = next(iter(record["methods"].values()))["config"]
    found = {method: best for method in outcome.trials if (best := outcome.best(method)) is not None}
    search = {
        "criterion": f"{record['criterion']}: mean of the k x k matrix of validation accuracies, in percent",
        "suite": any_config["suite"], "model": any_config["model"]["name"],
        "tasks": next(iter(record["methods"].values()))["tasks"], "validation": any_config["validation"],
        "seed": record["seed"], "trials_per_method": record["trials"], "threads": record["threads"],
        "best": {method: {"criterion": t.criterion, "trial": t.number} for method, t in found.items()},
        "failed": {m: n for m, ts in outcome.trials.items() if (n := sum(t.state == "failed" for t in ts))},
        "ranges": {method: {a.key: a.entry() for a in axes} for method, axes in outcome.spaces.items()},
        "at_an_edge": [f"{method}: {axis.key}, {side}" for method, axis, side in edges(outcome)], "versions": record["versions"],
    }  # fmt: skip
    value = {"per_method": {m: _sections(t.settings) for m, t in found.items()}, "search": search}
    return atomic_write_text(outcome.folder / TUNED, _HEADER + dump_yaml(value))


def table(outcome: Outcome) -> Any:
    """A rich table: one line per method, the best setting and how it stands to the others."""
    from rich.table import Table

    shown = Table(
        title=f"{outcome.record['criterion']} on validation pictures (%), {outcome.record['trials']} trials each"
    )
    for header, justify in (("method", "left"), ("ended", "right"), ("failed", "right"), ("best", "right"),
                            ("median", "right"), ("best settings", "left")):  # fmt: skip
        shown.add_column(header, justify=justify)  # type: ignore[arg-type]
    for method, trials in outcome.trials.items():
        best = outcome.best(method)
        values = [t.criterion for t in trials if t.criterion is not None]
        failed = sum(t.state == "failed" for t in trials)
        settings = (
            ", ".join(f"{key}={value}" for key, value in best.settings.items()) if best else "none: every trial failed"
        )
        numbers = (f"{max(values):.1f}", f"{median(values):.1f}") if values else ("–", "–")
        shown.add_row(method, str(len(values) + failed), str(failed), *numbers, settings)
    return shown


def _axes(axes: list[Axis]) -> tuple[Axis, Axis | None]:
    """What a panel shows along x (the learning rate where it varies) and by colour (the first choice, if any)."""
    x = next((a for a in axes if a.key == LEARNING_RATE), next((a for a in axes if a.kind != "choice"), axes[0]))
    return x, next((a for a in axes if a.kind == "choice" and a is not x), None)


def write_plot(outcome: Outcome) -> Path:
    """trials.png: the criterion over the learning rate, a panel per method; crosses at the foot are failed trials."""
    from matplotlib.figure import Figure

    from keeplora.report.plots import INK, LINE, PLOT_MARKERS, SOFT

    methods = list(outcome.trials)
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.9 * rows + 0.3), facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    every = [t.criterion for ts in outcome.trials.values() for t in ts if t.criterion is not None]
    foot = min(every, default=0.0) - 0.08 * max(1.0, max(every, default=1.0) - min(every, default=0.0))
    for i, panel in enumerate(grid.flat):
        if i >= len(methods):
            panel.set_visible(False)
            continue
        _panel(panel, outcome, methods[i], foot, PLOT_MARKERS)
        panel.set_title(methods[i], loc="left", fontsize=11, fontweight="bold", color=INK)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(LINE)
        panel.tick_params(colors=SOFT, length=0, labelsize=8)
        panel.grid(axis="y", color=LINE, linewidth=0.7)
        panel.set_axisbelow(True)
        if i % columns == 0:
            panel.set_ylabel("validation average (%)", fontsize=9, color=SOFT)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return atomic_write_bytes(outcome.folder / PLOT, buffer.getvalue())


def _panel(panel: Any, outcome: Outcome, method: str, foot: float, markers: list[str]) -> None:
    from keeplora.report.palette import SERIES
    from keeplora.report.plots import INK, SOFT

    x, by = _axes(outcome.spaces[method])
    trials = [t for t in outcome.trials[method] if t.state != "running"]

    def place(trial: Trial) -> float:
        value = trial.settings[x.key]
        return float(x.values.index(value)) if x.kind == "choice" else float(value)

    for k, value in enumerate(by.values if by is not None else (None,)):
        mine = [t for t in trials if by is None or t.settings[by.key] == value]
        colour, mark = SERIES["light"][k % len(SERIES["light"])], markers[k % len(markers)]
        done = sorted((t for t in mine if t.criterion is not None), key=place)
        label = None if by is None else f"{by.key.split('.')[-1]} {value}"
        panel.plot(
            [place(t) for t in done], [t.criterion for t in done], mark + "-", color=colour, linewidth=1, markersize=5,
            alpha=0.9, label=label,
        )  # fmt: skip
        failed = [place(t) for t in mine if t.state == "failed"]
        panel.plot(failed, [foot] * len(failed), "x", color=colour, markersize=6)
    best = outcome.best(method)
    if best is not None:
        panel.plot([place(best)], [best.criterion], "o", markersize=11, markerfacecolor="none", color=INK)
    if x.kind == "log":
        panel.set_xscale("log")
    if x.kind == "choice":
        panel.set_xticks(range(len(x.values)), [str(v) for v in x.values])
    else:
        panel.set_xlim(x.low, x.high)
    panel.set_xlabel(x.key.split(".")[-1].replace("_", " "), fontsize=9, color=SOFT)
    if by is not None:
        panel.legend(fontsize=8, frameon=False)


def write_all(outcome: Outcome) -> list[Path]:
    """All files; `KeepLoraError` after writing them if a method has no finished trial."""
    written = [write_tuned(outcome), write_trials(outcome), write_plot(outcome)]
    if lost := [method for method in outcome.trials if outcome.best(method) is None]:
        first = next(t for t in outcome.trials[lost[0]] if t.state == "failed")
        raise KeepLoraError(
            f"every trial of {', '.join(lost)} failed, so {outcome.folder / TUNED} has no settings for it; the first of "
            f"{lost[0]}: {first.error}"
        )
    return written
