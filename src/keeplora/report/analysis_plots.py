"""An analysis's charts as PNG, by matplotlib on white paper; the page holds the same pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keeplora.report.palette import SERIES
from keeplora.report.plots import INK, LINE, PLOT_MARKERS, SOFT
from keeplora.report.similarity_plot import similarity_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
COLOURS = SERIES["light"]
GROUPS = (("general", "general sets"), ("specific", "tasks"))
DPI = 110


def _figure(columns: int, rows: int = 1, wide: float = 4.2, high: float = 3.1) -> tuple[Figure, list[list[Any]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide * columns + 0.4, high * rows + 0.3), facecolor="white", layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _style(axes: Any, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=9, color=SOFT)
    axes.set_ylabel(y, fontsize=9, color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0, labelsize=8.5)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)


def _band(
    axes: Any, xs: Sequence[float], spreads: Sequence[Mapping[str, Any]], k: int, label: str, joined: bool
) -> None:
    """Means with their intervals over ``xs``; not ``joined`` where points between them may be missing."""
    if not joined:
        for x, s in zip(xs, spreads, strict=True):
            axes.plot([x, x], [s["low"], s["high"]], color=COLOURS[k], linewidth=1.2, alpha=0.6)
        axes.plot(xs, [s["mean"] for s in spreads], PLOT_MARKERS[k], color=COLOURS[k], markersize=4.5, label=label)
        return
    axes.fill_between(xs, [s["low"] for s in spreads], [s["high"] for s in spreads], color=COLOURS[k], alpha=0.16, lw=0)
    axes.plot(
        xs, [s["mean"] for s in spreads], PLOT_MARKERS[k] + "-", color=COLOURS[k], markersize=4.5, linewidth=1.7, label=label
    )  # fmt: skip


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 6), frameon=False, fontsize=9)


ENDS = (("leading", "leading components kept", 2), ("trailing", "trailing components kept", 3))
"""Which end of the spectrum weights are rebuilt from, how it is called, and its colour."""


def intra(results: Results) -> Figure:
    """A column per tower, general sets above and tasks below: score against the share of Σσ² kept, from either end."""
    parts = list(dict.fromkeys(curve["part"] for curve in results["intra"]))
    joined, base = not results.get("missing"), results.get("untouched")
    curves = {(c["part"], c["mode"]): c["points"] for c in results["intra"]}
    figure, axes = _figure(len(parts), len(GROUPS))
    for j, part in enumerate(parts):
        nothing = [p for p in curves.get((part, "leading"), ()) if p["share"] == 0]
        whole = [{**base, "energy": 1.0}] if base else []
        for i, (group, label) in enumerate(GROUPS):
            panel = axes[i][j]
            for mode, end, k in ENDS:
                rows = curves.get((part, mode), [])
                if mode == "trailing" and rows:  # nothing and everything are the same from either end
                    rows = [*nothing, *rows, *whole]
                rows = sorted(rows, key=lambda r: r["energy"])
                _band(panel, [r["energy"] for r in rows], [r[group] for r in rows], k, end, joined)
            for one, style, said in (
                *((p, "--", "nothing kept") for p in nothing),
                *((p, ":", "untouched") for p in whole),
            ):
                panel.axhline(one[group]["mean"], color=SOFT, linewidth=0.9, linestyle=style, label=said)
            name = "all towers" if part == "all" else part
            below = "share of Σσ² kept" if i == len(GROUPS) - 1 else ""
            _style(panel, f"{name}: {label}", below, "score" if j == 0 else "")
            panel.set_xlim(-0.02, 1.02)
            panel.set_ylim(bottom=0)
    _legend(figure, axes[0][0])
    return figure


def thirds(results: Results) -> Figure:
    """Score with one third of the depth cut to a share of its spectrum."""
    joined = not results.get("missing")
    figure, axes = _figure(2)
    for panel, (group, label) in zip(axes[0], GROUPS):
        for k, one in enumerate(results["thirds"]):
            _band(panel, [p["share"] for p in one["points"]], [p[group] for p in one["points"]], k, one["name"], joined)
        base = (results.get("untouched") or {}).get(group)
        if base:
            panel.axhline(base["mean"], color=SOFT, linewidth=1, linestyle=":", label="untouched model")
        measure = "Σσ²" if results["options"]["by"] == "energy" else "Σσ"
        _style(panel, label, f"share of {measure} kept in that third", "score")
    _legend(figure, axes[0][0])
    return figure


def windows(results: Results) -> Figure:
    """Gain on the new task against loss on the general sets, a mark per window of layers; of more than thirds, numbered."""
    figure, axes = _figure(1, wide=5.6, high=3.6)
    panel = axes[0][0]
    count = results["windows"][0]["of"]
    for k, row in enumerate(results["windows"]):
        gain, loss = row["gain"], row["loss"]
        panel.errorbar(
            gain["mean"], loss["mean"], xerr=_ends(gain), yerr=_ends(loss), fmt=PLOT_MARKERS[k % 8], color=COLOURS[k % 8],
            capsize=3, linewidth=1.5, markersize=7, label=f"{row['name']} alone" if count == 3 else None,
        )  # fmt: skip
        if count != 3:
            panel.annotate(
                str(row["window"] + 1),
                (gain["mean"], loss["mean"]),
                xytext=(5, 5),
                textcoords="offset points",
                color=INK,
            )
    panel.axhline(0, color=INK, linewidth=1, zorder=0.6)
    panel.axvline(0, color=INK, linewidth=1, zorder=0.6)
    title = (
        "One third of the layers adapted" if count == 3 else f"One of {count} windows of depth adapted (1: shallowest)"
    )
    _style(panel, title, "gain on the new task (points)", "loss on the general sets (points)")
    _legend(figure, panel)
    return figure


def _ends(spread: Mapping[str, Any]) -> list[list[float]]:
    return [[max(0.0, spread["mean"] - spread["low"])], [max(0.0, spread["high"] - spread["mean"])]]


def spectra(results: Results) -> Figure:
    """Gradient energy by rank, by depth, and what protecting the tasks leaves."""
    found = results["spectra"]
    figure, axes = _figure(3 if found["protected"] else 2, wide=3.7)
    panel = axes[0][0]
    ranks = [one["rank"] for one in found["captured"]]
    panel.fill_between(
        ranks, [o["low"] for o in found["captured"]], [o["high"] for o in found["captured"]], color=COLOURS[2], alpha=0.18, lw=0
    )  # fmt: skip
    panel.plot(ranks, [o["median"] for o in found["captured"]], "o-", color=COLOURS[2], markersize=4.5)
    panel.axhline(0.9, color=SOFT, linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ranks, [str(r) for r in ranks])
    _style(panel, "Residual gradient by rank", "rank (band: middle half of layers)", "share of its energy")
    panel.set_ylim(0, 1.03)
    panel = axes[0][1]
    for k, tower in enumerate(dict.fromkeys(row["tower"] for row in found["outside"])):
        rows = [row for row in found["outside"] if row["tower"] == tower]
        _band(
            panel, [r["depth"] for r in rows], [{"mean": r["median"], "low": r["low"], "high": r["high"]} for r in rows], k,
            tower or "model", True,
        )  # fmt: skip
    panel.xaxis.get_major_locator().set_params(integer=True)
    _style(panel, "Gradient outside U₀", "block (0 is the shallowest)", "share of its energy")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8.5)
    if found["protected"]:
        panel = axes[0][2]
        at = range(len(found["protected"]))
        panel.plot(at, [o["left"] for o in found["protected"]], "s-", color=COLOURS[1], markersize=5)
        panel.axhline(found["protected"][0]["start"], color=SOFT, linestyle=":", linewidth=1)
        panel.set_xticks(list(at), [f"{o['energy']:g}" for o in found["protected"]])
        _style(panel, "Left for the last task", "ε_f (dotted: outside U₀ alone)", "share of its gradient energy")
        panel.set_ylim(bottom=0)
    return figure


def layers(results: Results) -> Figure:
    """Per layer after each task: size of the update, residual gradient, and drift of the features."""
    tasks = results["layers"]
    towers = list(dict.fromkeys(row["tower"] for row in tasks[0]["rows"]))
    shown = [
        (key, title, y) for key, title, y in (
            ("total", "‖ΔW‖/‖W₀‖", "all updates so far"), ("outside", "Residual gradient", "share of ‖G‖² outside U"),
            ("cka", "Feature drift", "linear CKA to the untouched model"),
        ) if any(row.get(key) is not None for task in tasks for row in task["rows"])
    ]  # fmt: skip
    figure, axes = _figure(len(shown), len(towers), wide=3.7, high=2.8)
    for i, tower in enumerate(towers):
        for j, (key, title, y) in enumerate(shown):
            panel = axes[i][j]
            if not any(row.get(key) is not None for task in tasks for row in task["rows"] if row["tower"] == tower):
                panel.set_visible(False)  # a tower whose inputs are not one row per sample, or too few samples
                continue
            panel.xaxis.get_major_locator().set_params(integer=True)
            for k, task in enumerate(tasks):
                by: dict[int, list[float]] = {}
                for row in task["rows"]:
                    if row["tower"] == tower and row.get(key) is not None:
                        by.setdefault(-1 if row["depth"] is None else row["depth"], []).append(row[key])
                xs = sorted(by)
                colour, mark = COLOURS[k % len(COLOURS)], PLOT_MARKERS[k % 8]
                panel.plot(
                    xs, [sum(by[x]) / len(by[x]) for x in xs], mark + "-", color=colour, markersize=4, linewidth=1.4,
                    label=f"after {task['task']} · {task['task_name']}",
                )  # fmt: skip
            _style(
                panel, f"{title}: {tower or 'model'}", "block (mean over its layers)" if i == len(towers) - 1 else "", y
            )
            if key != "cka":
                panel.set_ylim(bottom=0)
    _legend(figure, axes[0][0])
    return figure


def undo(results: Results) -> Figure:
    """Scores while updates are taken out, from the shallow end and from the deep one."""
    figure, axes = _figure(2)
    names = {"shallow": "shallow layers first", "deep": "deep layers first"}
    for panel, (group, label) in zip(axes[0], reversed(GROUPS)):
        for k, one in enumerate(sorted(results["undo"], key=lambda o: o["first"], reverse=True)):
            shares = [p["layers"] / p["of"] for p in one["points"]]
            _band(
                panel, shares, [p[group] for p in one["points"]], k + 2, names[one["first"]], not results.get("missing")
            )
        _style(panel, label, "share of layers whose updates are out", "score")
        panel.set_xlim(-0.02, 1.02)
    _legend(figure, axes[0][0])
    return figure


MAKERS = {
    "intra": intra, "thirds": thirds, "windows": windows, "spectra": spectra, "layers": layers, "undo": undo,
    "interference": lambda results: similarity_figure(results["interference"]),
}  # fmt: skip


def draw(results: Results) -> dict[str, bytes]:
    """Every chart that the results have data for, as PNG bytes by name."""
    made = {}
    for name, make in MAKERS.items():
        if results.get(name):
            buffer = io.BytesIO()
            make(results).savefig(buffer, format="png", dpi=DPI)
            made[name] = buffer.getvalue()
    return made
