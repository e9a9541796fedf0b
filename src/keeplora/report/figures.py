"""The report's charts, built from a run and the methods beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from markupsafe import Markup

from keeplora.report.charts import Series, bar_chart, line_chart, nice_top, number, stacked_bars, stacked_columns
from keeplora.report.compare import Entry, best
from keeplora.report.kinds import Kind
from keeplora.report.runs import Run

Figure = dict[str, Any]


def _figure(title: str, chart: Markup, note: str = "") -> Figure:
    return {"title": title, "note": note, "chart": chart}


def charted(found: Sequence[Entry]) -> list[Entry]:
    """The runs that get a line and a colour."""
    return [entry for entry in found if entry.charted and entry.run is not None]


def curves(run: Run, found: Sequence[Entry]) -> list[Figure]:
    """One small chart per task and probe set: its values through the sequence, one line per method."""
    shown = charted(found)
    columns = {name: [e.run.column(name) for e in shown if e.run] for name in [*run.tasks, *run.probes]}
    top = nice_top([v for lines in columns.values() for line in lines for v in line])  # CIDEr can pass 100
    chance = run.results.get("chance") or {}
    x_labels = [str(i) for i in range(len(run.tasks) + 1)]
    figures = []
    for k, (name, lines) in enumerate(columns.items()):
        task = k < len(run.tasks) and run.learns
        own = run.column(name)
        now = "before it was taken out" if name in run.removed else "now"
        series = [Series(e.label, line, e.index, e.strong) for e, line in zip(shown, lines, strict=True)]
        start = own[k + 1] if task and len(own) > k + 1 else own[0] if own else None
        if task and len(own) > k + 1:
            note = f"{number(start)} when learned, {number(own[-1])} {now}"
        elif task:
            note = f"{number(start)} untouched; not learned yet"
        else:
            note = f"{number(start)} before, {number(own[-1] if own else None)} {now}"
        spoken = "; ".join(f"{s.name}: {', '.join(number(v) for v in s.values)}" for s in series)
        chart = line_chart(
            series,
            x_labels,
            label=f"{run.kind.quantity.capitalize()} on {name} in percent, before the first task and after each. {spoken}.",
            top=top,
            learned_at=k + 1 if task else None,
            chance=chance.get(name),
        )
        figures.append(_figure(_set_title(run, k, name), chart, note))
    return figures


def _set_title(run: Run, k: int, name: str) -> str:
    if k >= len(run.tasks):
        return f"probe · {name}"
    return f"{k + 1} · {name}" + (" (taken out since)" if name in run.removed else "")


def bars(kind: Kind, found: Sequence[Entry]) -> list[Figure]:
    """The metrics in percent: one bar per method, the best starred."""
    shown = [entry for entry in found if entry.charted]
    figures = []
    for key, name, higher, meaning in kind.metrics:
        if key not in kind.percents:
            continue
        values = [entry.metrics.get(key) for entry in shown]
        if all(value is None for value in values):
            continue
        series = [Series(e.label, [v], e.index, e.strong) for e, v in zip(shown, values, strict=True)]
        spoken = ", ".join(f"{s.name} {number(s.values[0])}" for s in series)
        chart = bar_chart(
            series, label=f"{name}, percent: {spoken}.", top=nice_top(values), best=sorted(best(shown, key, higher))
        )
        figures.append(_figure(name, chart, meaning))
    return figures


def _by_depth(layers: Sequence[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    order = sorted(layers, key=lambda one: (one.get("depth") is None, one.get("depth") or 0))
    for layer in order:
        groups.setdefault(layer.get("depth"), []).append(layer)
    return groups


def towers(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Layers by tower, in the order in which the towers first come."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in run.layers:
        groups.setdefault(str(layer.get("tower") or "model"), []).append(layer)
    return groups


def _shares(layers: Sequence[dict[str, Any]], steps: int) -> list[float]:
    """Percent of the input dimensions from W and added by each task, averaged over ``layers``; a gap repeats the last."""
    added = [0.0] * steps
    counted = [layer for layer in layers if layer.get("in")]
    for layer in counted:
        before = 0
        for t, used in enumerate(layer.get("used") or []):
            if used is not None:
                added[t] += 100.0 * (used - before) / layer["in"] / len(counted)
                before = used
    return [max(share, 0.0) for share in added]


def capacity(run: Run) -> list[Figure]:
    """Per tower: the share of every block's input dimensions that is protected, from W and by each task."""
    figures = []
    steps = max((len(layer.get("used") or []) for layer in run.layers), default=0)
    names = ["from W", *(f"task {i} · {name}" for i, name in enumerate(run.tasks, start=1))][:steps]
    names += [f"task {i}" for i in range(len(names), steps)]
    if steps == 0 or not any(layer.get("used") for layer in run.layers):
        return []
    for tower, layers in towers(run).items():
        groups = _by_depth(layers)
        labels = ["–" if depth is None else str(depth) for depth in groups]
        stacks = [_shares(group, steps) for group in groups.values()]
        full = [sum(stack) for stack in stacks]
        spoken = ", ".join(
            f"block {label}: {number(total, 0)}\u00a0%" for label, total in zip(labels, full, strict=True)
        )
        chart = stacked_columns(
            labels,
            stacks,
            names,
            label=f"Protected share of the input dimensions in the {tower} tower, by block. {spoken}.",
            x_title="block",
        )
        figures.append(_figure(f"{tower} tower", chart, f"{number(fmean(full), 0)}\u00a0% in use on average"))
    return figures


def scales(run: Run) -> list[Figure]:
    """Layer scale against depth, one line per tower."""
    lines: list[Series] = []
    depths = sorted({layer["depth"] for layer in run.layers if layer.get("depth") is not None})
    for index, (tower, layers) in enumerate(towers(run).items()):
        groups = _by_depth(layers)
        values: list[float | None] = []
        for depth in depths:
            known = [layer["scale"] for layer in groups.get(depth, []) if layer.get("scale") is not None]
            values.append(fmean(known) if known else None)
        lines.append(Series(f"{tower} tower", values, index, index == 0))
    lines = _together(lines)
    every = [value for line in lines for value in line.values if value is not None]
    if not every:
        return []
    spoken = "; ".join(f"{s.name}: {', '.join(number(v, 2) for v in s.values)}" for s in lines)
    labels = [str(depth) for depth in depths]
    chart = line_chart(
        lines,
        labels,
        label=f"Layer scale by block. {spoken}.",
        top=nice_top(every),
        digits=2,
        x_title="block (0 = shallowest)",
    )
    return [{**_figure("Layer scale", chart), "legend": lines}]


def _together(lines: Sequence[Series]) -> list[Series]:
    """Lines that would lie on one another, drawn once under both names.

    >>> [s.name for s in _together([Series("vision tower", [0.2, 1.0, 1.0]), Series("text tower", [0.2, 1.0, None], 1)])]
    ['vision tower and text tower (the same line)']
    """
    found: list[tuple[Series, list[str]]] = []
    for line in lines:
        for i, (held, names) in enumerate(found):
            pairs = list(zip(held.values, line.values, strict=True))
            if all(a is None or b is None or a == b for a, b in pairs) and (
                all(b is None or a is not None for a, b in pairs) or all(a is None or b is not None for a, b in pairs)
            ):
                values = [b if a is None else a for a, b in pairs]
                found[i] = replace(held, values=values), [*names, line.name]
                break
        else:
            found.append((line, [line.name]))
    return [
        replace(line, name=f"{' and '.join(names)} (the same line)") if len(names) > 1 else line
        for line, names in found
    ]


def epochs(run: Run) -> list[dict[str, Any]]:
    """Epoch records in task order: the log's, the last one where a resumed run wrote an epoch twice."""
    found: dict[tuple[str, Any], dict[str, Any]] = {}
    for event in run.events:
        if event.get("event") == "epoch" and event.get("task") is not None:
            found[str(event["task"]), event.get("epoch")] = event
    for info in run.tasks_info:
        for record in info.get("epochs") or []:
            found.setdefault((str(info.get("name")), record.get("epoch")), {**record, "task": info.get("name")})
    order = {name: i for i, name in enumerate(run.tasks)}
    return sorted(found.values(), key=lambda e: (order.get(str(e["task"]), len(order)), e.get("epoch") or 0))


def training(run: Run, records: Sequence[dict[str, Any]]) -> list[Figure]:
    """Training loss and accuracy over all epochs, one curve per task."""
    figures = []
    tasks = [name for name in run.tasks if any(str(r["task"]) == name for r in records)]
    spans = {name: [i for i, r in enumerate(records) if str(r["task"]) == name] for name in tasks}
    bands = [
        (min(at) - 0.5, max(at) + 0.5, str(run.tasks.index(name) + 1)) for name, at in spans.items()
    ]  # fmt: skip
    for key, title, digits, unit in (
        ("loss", "Training loss", 3, ""),
        ("train_accuracy", "Accuracy on the training pictures", 1, " in percent"),
    ):
        values = [record.get(key) for record in records]
        if all(value is None for value in values):
            continue
        series = [
            Series(name, [v if i in set(at) else None for i, v in enumerate(values)], 0, True)
            for name, at in spans.items()
        ]
        spoken = "; ".join(
            f"{s.name}: {', '.join(number(v, digits) for v in s.values if v is not None)}" for s in series
        )
        chart = line_chart(
            series,
            [str(record.get("epoch")) for record in records],
            label=f"{title}{unit} by epoch. {spoken}.",
            top=nice_top(values),
            digits=digits,
            bands=bands,
            x_title="epoch within task (task number above)",
        )
        figures.append(_figure(title, chart))
    return figures


COST_PARTS = ["statistics", "training", "evaluation"]


def cost(run: Run) -> list[Figure]:
    """Seconds of each task, split into statistics, training and evaluation."""
    names, stacks = [], []
    for i, info in enumerate(run.tasks_info, start=1):
        seconds = info.get("seconds") or {}
        if any(seconds.get(part) is not None for part in COST_PARTS):
            names.append(f"{i} · {info.get('name')}")
            stacks.append([float(seconds.get(part) or 0.0) for part in COST_PARTS])
    if not names:
        return []
    spoken = ", ".join(f"{name} {number(sum(stack))}" for name, stack in zip(names, stacks, strict=True))
    chart = stacked_bars(names, stacks, COST_PARTS, label=f"Seconds per task: {spoken}.", unit="s")
    return [{**_figure("Time per task", chart), "legend": [Series(part, [], i) for i, part in enumerate(COST_PARTS)]}]
