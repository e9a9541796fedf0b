"""A study's ``report.html``: one file without script or network, like a run's, made of the same pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from keeplora.files import atomic_write_text
from keeplora.report import palette, study_tables
from keeplora.report.charts import number, stacked_bars, swatch
from keeplora.report.compare import signed
from keeplora.report.kinds import IN_POINTS
from keeplora.report.pages import TEMPLATES, page_template
from keeplora.report.study_charts import Dot, dots, ranks, spread
from keeplora.report.study_data import FEWEST, Difference, Study
from keeplora.report.study_tables import sure, with_ends, with_half

Figure = dict[str, Any]


def _spoken(rows: list[Dot]) -> str:
    return "; ".join(f"{row.name} {row.text}" for row in rows) + "."


def means(study: Study) -> list[Figure]:
    """Per metric: a lane per method with mean and interval over everything, the untouched model at the end."""
    figures = []
    for key, name, higher, meaning in study.kind.metrics:
        rows = []
        for method in study.methods:
            found = study.estimates.get((method.name, None, key))
            ends = (found["low"], found["high"]) if found else (None, None)
            rows.append(Dot(method.title, found["mean"] if found else None, *ends, with_half(found)))
        if all(row.value is None for row in rows):
            continue
        level = study.untouched.get((None, key))
        if level is not None and all(method.learns for method in study.methods):
            rows.append(Dot(study_tables.UNTOUCHED, level, text=number(level), index=5, solid=False))
        unit = "percent" if key in study.kind.percents else "points"
        chart = dots(rows, label=f"{name}, {unit}, mean with its 95 percent interval: {_spoken(rows)}")
        figures.append(
            {"title": f"{name} ({'higher' if higher else 'lower'} is better)", "note": meaning, "chart": chart}
        )
    return figures


def forest(study: Study) -> list[Figure]:
    """Per metric: each method's paired difference to the reference, with its interval, against 0."""
    figures = []
    for key, name, higher, _ in study.kind.metrics:
        rows = []
        for method in study.methods:
            one = study.differences.get((method.name, None, key))
            if one is not None:
                ends = (one.interval["low"], one.interval["high"])
                rows.append(Dot(method.title, one.interval["mean"], *ends, with_ends(one), sure(one)))
        if rows:
            against = study.title(study.against or "")
            label = f"{name}: difference to {against} in points with its 95 percent interval: {_spoken(rows)}"
            note = f"{'right' if higher else 'left'} of 0 is better than {against}"
            figures.append({"title": name, "note": note, "chart": dots(rows, label=label, zero=True)})
    return figures


def rank_figures(study: Study) -> list[Figure]:
    """Per metric: mean ranks over the blocks and who is within the critical difference of whom."""
    figures = []
    for one in study.rankings:
        names = [study.title(method) for method in one.methods]
        found = one.ranking
        spoken = ", ".join(f"{n} {number(r, 2)}" for r, n in sorted(zip(found.ranks, names, strict=True)))
        label = f"Mean ranks for {one.name}, 1 is best: {spoken}. Critical difference {number(found.critical_difference, 2)}."
        note = f"{found.blocks} blocks; Friedman χ² = {number(found.chi2)}, p {_equals(found.p)}"
        if one.left_out:
            note += f"; without {', '.join(map(study.title, one.left_out))} (too few cells)"
        chart = ranks(names, found.ranks, found.critical_difference, label=label)
        figures.append({"title": one.name, "note": note, "chart": chart})
    return figures


def _equals(p: float) -> str:
    text = study_tables.p_value(p)
    return text if text.startswith("<") else f"= {text}"


def orders(study: Study) -> list[Figure]:
    """Per metric: a lane per method with its mean under each order."""
    labels = [order.label for order in study.orders]
    figures = []
    for key, name, *_ in study.kind.metrics:
        rows = []
        for method in study.methods:
            rows.append((method.title, [study.order_means.get((method.name, label, key)) for label in labels]))
        if any(v is not None for _, values in rows for v in values):
            told = "; ".join(f"{m} {', '.join(number(v) for v in values)}" for m, values in rows)
            chart = spread(rows, labels, label=f"{name} under the orders {', '.join(labels)}: {told}.")
            figures.append(
                {"title": name, "note": "one mark per order: mean over the seeds that have all", "chart": chart}
            )
    return figures


def cost_figure(study: Study) -> list[Figure]:
    """Time of a run, split into statistics, training and evaluation."""
    parts = ("statistics", "training", "evaluation")
    found = [(m.title, c) for m in study.methods if (c := study.costs.get(m.name))]
    stacks = [[cost.get(f"{part}_seconds", 0.0) / 60 for part in parts] for _, cost in found]
    if not any(map(sum, stacks)):
        return []
    label = "Minutes of a run: " + "; ".join(
        f"{name} {', '.join(f'{part} {number(v)}' for part, v in zip(parts, stack, strict=True))}"
        for (name, _), stack in zip(found, stacks, strict=True)
    )
    chart = stacked_bars([name for name, _ in found], stacks, parts, label=label, unit="min")
    legend = [{"name": part, "index": i} for i, part in enumerate(parts)]
    return [{"title": "Time of a run", "note": "mean over its finished cells", "chart": chart, "legend": legend}]


def heats(study: Study) -> list[dict[str, Any]]:
    """Mean matrices by order, methods side by side."""
    low, high = study_tables.scale_of(study)
    groups = []
    for order in study.orders:
        shown = []
        for method in study.methods:
            matrix = study.matrices.get((method.name, order.label))
            if matrix is not None:
                rows = study_tables.heat(matrix, low, high, method.learns)
                seeds = "1 seed" if matrix.n == 1 else f"mean of {matrix.n} seeds"
                shown.append({"title": method.title, "note": seeds, "matrix": matrix, "rows": rows})
        if shown:
            first = shown[0]["matrix"]
            groups.append({"order": order.label, "tasks": first.tasks, "probes": first.probes, "methods": shown})
    return groups


MOST_NAMED = 4


def _named(study: Study, found: list[tuple[str, Difference]]) -> str:
    """Methods with their differences, the largest first; how many more there are."""
    ordered = sorted(found, key=lambda pair: -abs(pair[1].interval["mean"]))
    told = [f"{study.title(method)} ({with_ends(one)})" for method, one in ordered[:MOST_NAMED]]
    return ", ".join(told) + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")


def _tested(study: Study) -> list[Difference]:
    """Every difference to the reference, over all orders, that the sentences may speak of."""
    return [one for (_, scope, key), one in study.differences.items() if scope is None and key in study.kind.told]


def headline(study: Study) -> list[Markup]:
    """What came out, in sentences: how complete it is, the best means, and what the tests can tell apart."""
    said: list[Markup] = []
    total, done = len(study.cells), sum(cell.finished for cell in study.cells)
    if done < total:
        text = "{} of {} cells are finished: every number below is a partial one, and n says from how many cells."
        said.append(Markup(text).format(Markup("<strong>{}</strong>").format(done), total))
    if done == 0:
        return said
    nothing = bool(family := _tested(study)) and not any(map(sure, family))
    if nothing:
        text = (
            "No method can be told from <strong>{}</strong> in any metric: which mean is highest or lowest may be chance, and "
            "with few seeds even a large difference is not seen."
        )
        said.append(Markup(text).format(study.title(study.against or "")))
    for key, name, higher, _ in study.kind.metrics:
        top = study.top(None, key, higher)
        if key in study.kind.best and top:
            titles = " and ".join(study.title(method.name) for method in study.methods if method.name in top)
            n = min(study.estimates[method, None, key]["n"] for method in top)
            found = study.estimates[next(iter(sorted(top))), None, key]
            unit = "points" if key in IN_POINTS else "%"
            called = "Best" if study.best(None, key, higher) and not nothing else "Highest" if higher else "Lowest"
            seeds = f"{n} seed{'' if n == 1 else 's'}" + (", too few to call it the best" if n < FEWEST else "")
            text = "{} mean of {}: <strong>{}</strong> with {}\u00a0{} ({})."
            said.append(Markup(text).format(called, name, titles, with_half(found), unit, seeds))
    if study.against is not None and not nothing:
        for key, name, higher, _ in study.kind.metrics:
            if key not in study.kind.told:
                continue
            # What never learns cannot forget: no achievement.
            rivals = [m.name for m in study.methods if m.learns or key not in IN_POINTS]
            family = [(m, one) for m in rivals if (one := study.differences.get((m, None, key)))]
            clear = [(method, one) for method, one in family if sure(one)]
            better = [pair for pair in clear if (pair[1].interval["mean"] > 0) == higher]
            worse = [pair for pair in clear if pair not in better]
            parts = [
                f"{word} for {_named(study, some)}" for word, some in (("better", better), ("worse", worse)) if some
            ]
            if parts:
                text = "{} against <strong>{}</strong>: {}."
                said.append(Markup(text).format(name, study.title(study.against), "; ".join(parts)))
            elif family:
                text = "{} against <strong>{}</strong>: the tests tell no method apart."
                said.append(Markup(text).format(name, study.title(study.against)))
    return said


def _context(study: Study) -> dict[str, Any]:
    done = sum(cell.finished for cell in study.cells)
    low, high = study_tables.scale_of(study)
    reference = study.title(study.against) if study.against else None
    scopes = study.scopes[1:]
    pairs = max((one.wilcoxon_n for (_, scope, _), one in study.differences.items() if scope is None), default=0)
    return {
        "study": study, "done": done, "total": len(study.cells), "headline": headline(study), "reference": reference,
        "means": means(study), "table_all": study_tables.methods_table(study, None),
        "tables": [(s, study_tables.methods_table(study, s)) for s in scopes],
        "forest": forest(study), "differences": study_tables.differences_table(study, None),
        "tests": [t for s in study.scopes if (t := study_tables.tests_table(study, s))], "pairs": pairs,
        "smallest": study_tables.p_value(min(1.0, 2.0 ** (1 - pairs))) if pairs else None,
        "ranks": rank_figures(study), "orders": orders(study) if len(study.orders) > 1 else [],
        "heats": heats(study), "low": low, "high": high, "levels": range(palette.HEAT_LEVELS),
        "cost": study_tables.cost_table(study), "cost_figure": cost_figure(study),
        "settings": study_tables.settings_table(study), "cells": study_tables.cells_table(study),
        "failed": study.failed, "dropped": sum(cell.dropped_bytes is not None for cell in study.cells),
        "metric_meanings": [(name, meaning) for _, name, _, meaning in study.kind.metrics], "swatch": swatch, "signed": signed,
        "light": palette.css("light"), "dark": palette.css("dark"),
        "style": "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "study.css")),
    }  # fmt: skip


def render_page(study: Study, path: Path) -> Path:
    """Write the page; every text that came from a person is escaped by the template engine."""
    page = page_template("study.html.j2").render(**_context(study))
    return atomic_write_text(path, page.lstrip())
