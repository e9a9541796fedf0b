"""``report.html``: one file that opens anywhere, from what the run directory holds and nothing else.

No script, no font, no request: charts are inline SVG, and the page's own policy forbids everything but its style sheet.
All text that came from a person (names of tasks, classes, files) is escaped by the template engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keeplora.files import atomic_write_text
from keeplora.report import answers, audit_charts, capacity, compare, figures, palette, tables
from keeplora.report.charts import part_opacity, swatch
from keeplora.report.pages import TEMPLATES, page_template
from keeplora.report.runs import Run, load_others, load_run

STATES = {"finished": "Finished", "running": "Still running", "failed": "Failed", "interrupted": "Interrupted"}


def _status(run: Run) -> dict[str, Any]:
    state = str(run.status.get("state") or ("finished" if run.finished else "unknown"))
    return {
        "state": state if state in STATES else "unknown",
        "word": STATES.get(state, f"State: {state}"),
        "error": run.status.get("error"),
        "done": run.done,
        "total": len(run.tasks),
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """What a reader asks first: which model, which suite, which seed, when, how long."""
    facts = [
        ("model", run.results.get("model")),
        ("suite", run.results.get("suite")),
        ("seed", run.seed),
        ("judged on", "held-out training samples, no test sample" if run.on_validation else None),
        ("started", tables.moment(run.status.get("started"))),
        ("time", tables.duration(run.cost.get("seconds")) if run.cost.get("seconds") is not None else None),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _cost_facts(run: Run) -> list[tuple[str, str]]:
    cost = run.cost
    facts = [
        (name, tables.duration(cost.get(key)))
        for name, key in (
            ("all", "seconds"),
            ("statistics", "statistics_seconds"),
            ("training", "training_seconds"),
            ("evaluation", "evaluation_seconds"),
        )
    ]
    facts += [
        ("peak memory", tables.size(cost.get("peak_memory_bytes"))),
        ("trained parameters", tables.count(cost.get("trained_parameters"))),
    ]
    return [fact for fact in facts if fact[1] != "–"]


def _warnings(run: Run) -> list[str]:
    found = [str(text) for text in run.results.get("warnings") or []]
    for entry in run.sets:
        found += [f"{entry.get('name')}: {text}" for text in entry.get("warnings") or []]
    found += [
        f"Task {i.get('name')} was undone: it was not accepted." for i in run.tasks_info if i.get("accepted") is False
    ]
    found += [f"Task {name} was removed since; the rows up to then were measured with it." for name in run.removed]
    return list(dict.fromkeys(found))


def _context(run: Run, others: Sequence[Run]) -> dict[str, Any]:
    found = compare.entries(run, others)
    records = figures.epochs(run)
    steps = max((len(layer.get("used") or []) for layer in run.layers), default=0)
    audit = run.results.get("audit") or {}
    return {
        "run": run,
        "status": _status(run),
        "facts": _facts(run),
        "headline": compare.headline(run, found),
        "tiles": compare.tiles(run),
        "heat": tables.heat_map(run) if run.accuracy else None,
        "answers": (found_answers := answers.read_answers(run)),
        "films": any(item.film for one in found_answers for item in (*one.shown, *one.others)),
        "answer_tables": answers.count_tables(found_answers),
        "fates": [(answers.FATE_NAMES.get(name, name), meaning) for name, meaning in answers.FATES.items()],
        "right_from": answers.RIGHT_FROM,
        "components": tables.components_table(run),
        "chance": run.results.get("chance") or {},
        "change": tables.change_table(run) if run.done else None,
        "curves": figures.curves(run, found) if run.accuracy else [],
        "curve_legend": figures.charted(found),
        "curves_table": tables.curves_table(run, found),
        "bars": figures.bars(run.kind, found),
        "comparison": tables.comparison_table(run, found) if run.accuracy else None,
        "hidden": sum(1 for entry in found if not entry.charted),
        "metric_meanings": [(name, meaning) for _, name, _, meaning in run.kind.metrics],
        "capacity": figures.capacity(run),
        "capacity_parts": [(i, f"task {i}", f"{part_opacity(i, steps):.2f}") for i in range(1, steps)],
        "fill": capacity.figures(run.results.get("capacity")),
        "capacity_notes": (run.results.get("capacity") or {}).get("notes") or [],
        "capacity_table": capacity.table(run.results.get("capacity")),
        "scales": figures.scales(run),
        "layers": tables.layer_table(run) if run.layers else None,
        "training": figures.training(run, records),
        "losses": tables.loss_table(records) if records else None,
        "cost": figures.cost(run),
        "cost_facts": _cost_facts(run),
        "task_table": tables.task_table(run) if run.tasks_info else None,
        "audit": audit,
        "audit_figures": audit_charts.leak_figures(audit),
        "audit_table": tables.audit_table(run) if audit.get("rows") else None,
        "warnings": _warnings(run),
        "data": tables.data_table(run) if run.sets else None,
        "environment": tables.flatten(run.environment) if run.environment else [],
        "swatch": swatch,
        "light": palette.css("light"),
        "dark": palette.css("dark"),
        "heat_levels": range(palette.HEAT_LEVELS),
        "style": (TEMPLATES / "style.css").read_text(encoding="utf-8"),
    }


def render_report(run_dir: str | os.PathLike[str], against: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Reads the run's ``results.json``, ``data.json``, ``status.json``, ``environment.json``, ``config.yaml``,
    ``metrics.jsonl`` and, of a run that answers questions, ``predictions`` and ``samples``. Each may be missing while the
    run is young. Beside it stand the runs in ``against`` and the siblings with the same ``comparison_key``
    (`find_comparable`). The file is replaced atomically.

    Raises `KeepLoraError` where ``run_dir`` is no run directory, a file of it is damaged, or a run in ``against`` was
    not made on the same model, tasks, order and data.

    Example::

        path = render_report("runs/demo-keeplora++")
    """
    run = load_run(Path(run_dir))
    others = load_others(run, [Path(path) for path in against])
    page = page_template("report.html.j2").render(**_context(run, others))
    return atomic_write_text(run.path / "report.html", page.lstrip())
