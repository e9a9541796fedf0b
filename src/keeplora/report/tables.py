"""Every number of the report as a table, and how numbers are written for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from keeplora.report.charts import number
from keeplora.report.compare import Entry, best, signed
from keeplora.report.kinds import GENERATION
from keeplora.report.palette import HEAT_LEVELS
from keeplora.report.runs import Run

NOT_MEANS = ("caption", "cider")
"""Scorers whose value is worked out of all answers together."""


@dataclass(frozen=True)
class Cell:
    """A table cell: text, an extra CSS class, and whether it holds the best value of its column."""

    text: str
    cls: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a caption; ``left`` are the indices of text columns besides the first.

    ``sticky`` keeps the first column in sight while the rest scrolls: for first columns that are short.
    """

    caption: str
    head: list[str]
    rows: list[list[Cell | str]]
    left: tuple[int, ...] = ()
    sticky: bool = False


def duration(seconds: float | None) -> str:
    """Seconds for a person.

    >>> duration(0.42), duration(75), duration(3725)
    ('0.4 s', '1 min 15 s', '1 h 02 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(stamp: Any) -> str | None:
    """An ISO time as a date and a minute; anything else as it is.

    >>> moment("2026-06-20T10:00:12+00:00")
    '2026-06-20 10:00 UTC'
    """
    try:
        when = datetime.fromisoformat(stamp)
    except (TypeError, ValueError):
        return None if stamp is None else str(stamp)
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands, or an en dash."""
    return f"{value:,}".replace(",", " ") if isinstance(value, int) and not isinstance(value, bool) else "–"


def size(value: float | None) -> str:
    """Bytes for a person.

    >>> size(3 * 2**30), size(None)
    ('3.0 GiB', '–')
    """
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def moments(run: Run) -> list[str]:
    """The rows of the matrix: "before", then "after" each finished task."""
    return ["before", *(f"after {i} · {name}" for i, name in enumerate(run.tasks[: run.done], start=1))][
        : len(run.accuracy)
    ]


def heat_map(run: Run) -> dict[str, Any]:
    """The matrix with a colour level per cell; the scale runs over the tens that hold every value."""
    values = [v for row in [*run.accuracy, *run.probe_accuracy] for v in row if v is not None]
    low = 10 * math.floor(min(values, default=0) / 10)
    high = max(10 * math.ceil(max(values, default=100) / 10), low + 10)

    def cell(value: float | None, cls: str) -> Cell:
        if value is None:
            return Cell("–", f"{cls} none".strip())
        level = min(HEAT_LEVELS - 1, int((value - low) / (high - low) * HEAT_LEVELS))
        return Cell(number(value), f"heat heat{level} {cls}".strip())

    rows = []
    for i, (label, row) in enumerate(zip(moments(run), run.accuracy, strict=False)):
        kinds = ["new" if run.learns and j == i - 1 else "" for j in range(len(row))]
        probes = run.probe_accuracy[i] if i < len(run.probe_accuracy) else []
        rows.append(
            {
                "label": label.split(" · ", 1)[0],
                "task": label.partition(" · ")[2],
                "cells": [cell(v, k) for v, k in zip(row, kinds, strict=True)],
                "probes": [cell(v, "") for v in probes],
            }
        )
    return {"rows": rows, "low": low, "high": high, "levels": range(HEAT_LEVELS), "noise": _noise(run)}


def _noise(run: Run) -> str | None:
    """How well a cell is known, for the sets whose value is a mean over the test items of something in 0..1."""
    whole = [name for name, scorer in run.scorers.items() if scorer in NOT_MEANS]
    counts = [n for name, n in (run.results.get("test_counts") or {}).items() if n and name not in whole]
    if not counts:
        return None
    # Half a 95 % interval of such a mean over n items is widest where half are 1 and half 0: 1.96 * sqrt(0.25 / n).
    wide = 98.0 / math.sqrt(min(counts))
    span = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    known = f"by itself it is known to ±\u00a0{number(wide)} points at worst (95\u00a0%)."
    besides = f" That does not hold for {', '.join(whole)}: caption scores are no mean over items." if whole else ""
    return f"A cell rests on {span} {run.kind.items}: {known}{besides}"


def change_table(run: Run) -> Table:
    """Every value against the untouched model, in points."""
    names = [*run.tasks, *(f"probe: {p}" for p in run.probes)]
    whole = [
        [*row, *(run.probe_accuracy[i] if i < len(run.probe_accuracy) else [])] for i, row in enumerate(run.accuracy)
    ]
    rows: list[list[Cell | str]] = []
    for label, row in list(zip(moments(run), whole, strict=False))[1:]:
        rows.append(
            [label, *("–" if v is None or b is None else signed(v - b) for v, b in zip(row, whole[0], strict=False))]
        )
    return Table("Change against the untouched model, in points", ["moment", *names], rows, sticky=True)


def comparison_table(run: Run, found: Sequence[Entry]) -> Table:
    """Methods x metrics, the best of each column marked; seconds and trained parameters beside them."""
    rows: list[list[Cell | str]] = []
    metrics = run.kind.metrics
    winners = {key: best(found, key, higher) for key, _, higher, _ in metrics}
    for i, entry in enumerate(found):
        label = entry.label
        if entry.run is not None and not entry.run.finished:
            label += f" ({entry.run.done} of {len(entry.run.tasks)} tasks)"
        cells: list[Cell | str] = [Cell(label + (" · this run" if entry.strong else ""), "me" if entry.strong else "")]
        cells += [Cell(number(entry.metrics.get(key)), best=i in winners[key]) for key, *_ in metrics]
        cost = entry.run.cost if entry.run else {}
        cells += [
            duration(cost.get("seconds")),
            size(cost.get("peak_memory_bytes")),
            count(cost.get("trained_parameters")),
        ]
        rows.append(cells)
    head = ["method", *(f"{name} {'↑' if higher else '↓'}" for _, name, higher, _ in metrics)]
    return Table(
        "Methods on the same tasks (★ best; ↑ higher is better, ↓ lower)",
        [*head, "time", "peak memory", "trained"],
        rows,
        sticky=True,
    )


def curves_table(run: Run, found: Sequence[Entry]) -> Table:
    """Every point of the forgetting curves."""
    steps = max((len(e.run.accuracy) for e in found if e.run and e.charted), default=0)
    rows: list[list[Cell | str]] = []
    for name in [*run.tasks, *run.probes]:
        for entry in found:
            if entry.run is not None and entry.charted:
                values = entry.run.column(name)
                rows.append([name, entry.label, *(number(v) for v in values), *["–"] * (steps - len(values))])
    return Table(
        f"{run.kind.quantity.capitalize()} by set, method and moment, percent",
        ["set", "method", "before", *map(str, range(1, steps))],
        rows,
        (1,),
    )


def data_table(run: Run) -> Table:
    """What was learned from and tested on."""
    if run.kind is GENERATION:
        return _questions_table(run)
    chance = run.results.get("chance") or {}
    rows: list[list[Cell | str]] = []
    for entry in run.sets:
        classes = entry.get("classes") or []
        rows.append(
            [
                str(entry.get("name")),
                str(entry.get("kind") or "task"),
                str(len(classes)) if classes else "–",
                count(entry.get("train")) if entry.get("kind") != "probe" else "–",
                count(entry.get("test")),
                number(chance.get(entry.get("name"))),
                str(entry.get("licence") or "not stated"),
                str(entry.get("fingerprint") or "–")[:12],
            ]
        )
    head = ["set", "kind", "classes", "train", "test", "chance %", "licence", "fingerprint"]
    return Table("Data sets", head, rows, (1, 6, 7), sticky=True)


def _questions_table(run: Run) -> Table:
    rows: list[list[Cell | str]] = [
        [
            str(entry.get("name")),
            "general" if entry.get("kind") == "probe" else "task",
            run.scorers.get(str(entry.get("name")), "–"),
            count(entry.get("max_new_tokens")),
            count(entry.get("train")) if entry.get("kind") != "probe" else "–",
            count(entry.get("test")),
            str(entry.get("licence") or "not stated"),
            str(entry.get("fingerprint") or "–")[:12],
        ]
        for entry in run.sets
    ]
    head = ["set", "kind", "scorer", "most tokens", "train", "test", "licence", "fingerprint"]
    return Table("Data sets", head, rows, (1, 2, 6, 7), sticky=True)


def _of_part(part: str, value: float) -> str:
    """A part's value with its unit; a judge's are a mean of points and counts of answers.

    >>> _of_part("BLEU-4", 31.25), _of_part("mean_score", 2.9), _of_part("unparsable", 37.0)
    ('31.2', '2.9 of 5', '37 answers')
    """
    if part == "mean_score":
        return f"{number(value)} of 5"
    return f"{number(value, 0)} answers" if part in ("unparsable", "skipped") else number(value)


def components_table(run: Run) -> Table | None:
    """The parts of the scores that have parts, as of the latest evaluation; "-plain" marks those made without Java."""
    found = run.results.get("components") or {}
    rows: list[list[Cell | str]] = [
        [str(name), str(part), _of_part(part, value)] for name, parts in found.items() for part, value in parts.items()
    ]
    caption = (
        "Components of the scores at the latest evaluation, in percent where nothing else is said; “-plain”: on plain words, no "
        "published score"
    )
    return Table(caption, ["set", "component", "value"], rows, (1,)) if rows else None


def _fate(info: Mapping[str, Any], run: Run) -> str:
    if info.get("name") in run.removed:
        return "removed"
    if info.get("not_learned"):
        return "not learned"
    return {True: "kept", False: "undone"}.get(info.get("accepted"), "–")  # type: ignore[arg-type]


def task_table(run: Run) -> Table:
    """What each task cost and how it ended."""
    rows: list[list[Cell | str]] = []
    for info in run.tasks_info:
        seconds = info.get("seconds") or {}
        epochs = info.get("epochs") or []
        rows.append(
            [
                str(info.get("name")),
                *(duration(seconds.get(part)) for part in ("statistics", "training", "evaluation")),
                str(len(epochs)) if epochs else "–",
                str(info["best_epoch"]) if info.get("best_epoch") is not None else "–",
                "–" if info.get("data_wait") is None else f"{100 * info['data_wait']:.0f} %",
                number(epochs[-1].get("loss"), 3) if epochs else "–",
                count(info.get("trained_parameters")),
                _fate(info, run),
            ]
        )
    head = [
        "task",
        "statistics",
        "training",
        "evaluation",
        "epochs",
        "epoch used",
        "waited for data",
        "final loss",
        "trained parameters",
        "result",
    ]
    if all(row[6] == "–" for row in rows):  # runs of before 0.2 did not measure it
        rows, head = [[*row[:6], *row[7:]] for row in rows], [*head[:6], *head[7:]]
    return Table("Cost and outcome of each task", head, rows, (len(head) - 1,))


def loss_table(epochs: Sequence[dict[str, Any]]) -> Table:
    """Every epoch's training loss and what was logged with it."""
    rows: list[list[Cell | str]] = [
        [
            str(e.get("task")),
            str(e.get("epoch")),
            number(e.get("loss"), 4),
            number(e.get("train_accuracy")),
            "–" if e.get("lr") is None else f"{e['lr']:.2e}",
            duration(e.get("seconds")),
        ]
        for e in epochs
    ]
    head = ["task", "epoch", "loss", "train accuracy %", "learning rate", "time"]
    if all(row[3] == "–" for row in rows):  # answers are generated after training: there is no such share
        rows, head = [[*row[:3], *row[4:]] for row in rows], [*head[:3], *head[4:]]
    return Table("Training, epoch by epoch", head, rows)


def layer_table(run: Run) -> Table:
    """Per layer: dimensions protected over those it has, after each task, its scale, and the rank each task got."""
    steps = max((len(layer.get("used") or []) for layer in run.layers), default=0)
    rows: list[list[Cell | str]] = []
    for layer in run.layers:
        used = layer.get("used") or []
        rows.append(
            [
                str(layer.get("layer")),
                str(layer.get("tower") or "–"),
                "–" if layer.get("depth") is None else str(layer["depth"]),
                count(layer.get("in")),
                count(layer.get("out")),
                number(layer.get("scale"), 3),
                *("–" if k is None else str(k) for k in used),
                *["–"] * (steps - len(used)),
                " ".join("–" if r is None else str(r) for r in layer.get("rank") or []) or "–",
            ]
        )
    after = ["from W", *(f"after {i}" for i in range(1, steps))][:steps]
    head = ["layer", "tower", "depth", "in", "out", "scale", *after, "rank per task"]
    return Table("Protected input dimensions of every layer", head, rows, (1, len(head) - 1))


def audit_table(run: Run) -> Table:
    """Leak of each task's factors and of the running weights into the protected subspace."""
    rows: list[list[Cell | str]] = [
        [
            str(row.get("layer")),
            str(row.get("task")),
            *("–" if row.get(k) is None else f"{row[k]:.1e}" for k in ("factor_leak", "weight_leak", "weight_floor")),
        ]
        for row in (run.results.get("audit") or {}).get("rows") or []
    ]
    return Table("Leak per layer and task", ["layer", "task", "factors", "weights", "rounding floor"], rows, (1,))


def flatten(value: Any, prefix: str = "") -> list[list[Cell | str]]:
    """Nested settings as (dotted key, text) rows."""
    if isinstance(value, dict):
        return [
            row for key, inner in value.items() for row in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [[prefix, "–" if value is None else str(value)]]
