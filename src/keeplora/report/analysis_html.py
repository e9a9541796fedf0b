"""``analysis.html``: an analysis's figures and what they say, one file without script or network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.analysis.words import at_floor, seen
from keeplora.files import atomic_write_bytes, atomic_write_text
from keeplora.report import palette
from keeplora.report.analysis_plots import draw
from keeplora.report.pages import TEMPLATES, page_template
from keeplora.report.tables import duration

SECTIONS = {
    "intra": (
        "The spectrum",
        "The weights of every block of a tower are rebuilt from their leading singular components alone, or from the trailing "
        "ones that hold as much of Σσ². What general knowledge needs of the spectrum is what ε_w should protect (M1).",
    ),
    "thirds": (
        "One third of the depth cut",
        "The spectrum of the shallow, the middle or the deep third of every tower is cut, the rest is left as it is.",
    ),
    "windows": (
        "One window of the depth adapted",
        "A task is learned with all layer scales at 1 and only one window of the layers adapted. Where a point gained costs more "
        "general knowledge, layers should move less: that is what γ is for (M6).",
    ),
    "spectra": (
        "Gradients and features",
        "How many directions the residual gradient has (M3, M4), how much of it lies outside the weights’ subspace at each "
        "depth, and what is left of it when the features of the tasks are protected (M8), or their gradients (M8g).",
    ),
    "layers": (
        "Every layer after each task",
        "How far the weights have moved, how much of a task’s gradient was residual, and how like the untouched model’s the "
        "features of general samples still are.",
    ),
    "undo": (
        "Updates taken out again",
        "The learned updates are removed block by block, from the shallow end and from the deep one.",
    ),
    "interference": (
        "What one task does to another",
        "How alike the tasks’ features are, and how much of what a later task wants to change lies where an earlier one’s "
        "features live, beside the points that the earlier one fell while the later was learned.",
    ),
}
NAMES = {
    "energy_weights": "ε_w (energy_weights)",
    "energy_features": "ε_f (energy_features)",
    "gamma": "γ (gamma)",
    "r": "rank (r)",
    "learning_rate": "learning rate",
}


def _cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "–"
    return f"{spread['mean']:.1f} [{spread['low']:.1f}, {spread['high']:.1f}]".replace("-", "−")


def _over_tasks(spread: Mapping[str, Any]) -> str:
    if spread.get("low_tasks") is None:
        return "–"
    return f"[{spread['low_tasks']:.1f}, {spread['high_tasks']:.1f}]".replace("-", "−")


def _table(caption: str, head: list[str], rows: list[list[str]]) -> dict[str, Any]:
    return {"caption": caption, "head": head, "rows": rows}


def _scores(points: list[dict[str, Any]], lead: str, key: str) -> dict[str, Any]:
    head = [lead, "general sets", "over sets", "change", "tasks", "over tasks", "change"]
    rows = []
    for label, p in ((str(p[key]), p) for p in points):
        rows.append([
            label, _cell(p["general"]), _over_tasks(p["general"]), _cell(p["general_change"]), _cell(p["specific"]),
            _over_tasks(p["specific"]), _cell(p["specific_change"]),
        ])  # fmt: skip
    return _table("Scores with their 95 % intervals over samples, and over sets and their samples", head, rows)


def _tables(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    made: dict[str, list[dict[str, Any]]] = {}
    if results.get("intra"):
        rows = [
            {**p, "row": f"{c['part']}, {c['mode']} {p['energy']:.3f} of Σσ²"}
            for c in results["intra"] for p in c["points"]
        ]  # fmt: skip
        made["intra"] = [_scores(rows, "kept", "row"), *_ends(results)]
    if results.get("thirds"):
        rows = [{**p, "row": f"{one['name']}, {p['share']:g}"} for one in results["thirds"] for p in one["points"]]
        made["thirds"] = [_scores(rows, "third, share kept", "row")]
    if results.get("windows"):
        head = ["adapted", "blocks", "layers", "trained", "gain", "over tasks", "loss", "over tasks"]
        body = [
            [
                w["name"], w["blocks"], str(w["layers"]), f"{w['trained']:,}", _cell(w["gain"]), _over_tasks(w["gain"]),
                _cell(w["loss"]), _over_tasks(w["loss"]),
            ]
            for w in results["windows"]
        ]  # fmt: skip
        made["windows"] = [_table("Points gained on the new tasks and lost on the general sets", head, body)]
    if results.get("spectra"):
        found = results["spectra"]
        made["spectra"] = [
            _table(
                "Share of the residual gradient’s energy in its leading directions, over layers and tasks",
                ["rank", "median", "lower quartile", "upper quartile"],
                [[str(o["rank"]), *(f"{o[k]:.3f}" for k in ("median", "low", "high"))] for o in found["captured"]],
            )
        ]
        if found["protected"]:
            made["spectra"].append(
                _table(
                    f"After the {found['memory']} of all tasks but the last are protected, in a few blocks of each tower",
                    ["ε_f", "free dimensions", "least", "last task’s gradient left", "outside U₀ alone"],
                    [
                        [f"{o['energy']:g}", f"{o['room']:g}", str(o["least_room"]), f"{o['left']:.3f}", f"{o['start']:.3f}"]
                        for o in found["protected"]
                    ],
                )
            )  # fmt: skip
    if results.get("undo"):
        rows = [
            {**p, "row": f"{one['first']} first, {p['layers']} of {p['of']} out"}
            for one in results["undo"] for p in one["points"]
        ]  # fmt: skip
        made["undo"] = [_scores(rows, "layers", "row")]
    if results.get("interference"):
        found = results["interference"]
        pairs = sorted((p for p in found["pairs"] if p["drop"] is not None), key=lambda p: -p["drop"])
        made["interference"] = [
            _table(
                "Spearman’s rank correlation of each prediction with the drop",
                ["prediction", "ρ", "95 %", "p", "pairs", "told from", "verdict"],
                [[name, *_correlation(one)] for by in list(found["associations"].values())[:1] for name, one in by.items()],
            ),
            _table(
                "Points that the earlier task fell while the later was learned, and what was predicted",
                ["earlier → later", "drop", *(pairs[0]["predicted"] if pairs else ())],
                [
                    [f"{p['earlier']} → {p['later']}", f"{p['drop']:+.1f}".replace("-", "−"),
                     *("–" if v is None else f"{v:.3g}" for v in p["predicted"].values())]
                    for p in pairs
                ],
            ),
        ]  # fmt: skip
    return made


def _ends(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both ends of the spectrum at equal energy kept; no table where there is nothing to compare."""
    rows = [
        [
            f"{row['part']}, {row['energy']:.3f} of Σσ², {name}",
            *(_cell(row[group][key]) for key in ("difference", "leading_over_floor", "trailing_over_floor")),
            "at the floor" if at_floor(row[group]) else "told" if seen(row[group]["difference"]) else "not told",
        ]
        for row in results.get("ends", ()) for group, name in (("general", "general sets"), ("specific", "tasks"))
    ]  # fmt: skip
    head = ["kept", "leading less trailing", "leading less nothing kept", "trailing less nothing kept", "difference"]
    return (
        [_table("Leading components beside trailing ones that hold as much, points, sample by sample", head, rows)]
        if rows
        else []
    )


def _correlation(one: Mapping[str, Any]) -> list[str]:
    if one["rho"] is None:
        return ["–", "–", "–", str(one["n"]), "–", one["verdict"]]
    cells = [f"{one['rho']:+.2f}", f"[{one['low']:+.2f}, {one['high']:+.2f}]", f"{one['p']:.2g}", str(one["n"])]
    return [*(cell.replace("-", "−") for cell in cells), f"±{one['least']:.2f}", one["verdict"]]


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = results["options"]
    facts = [
        ("model", Path(str(results["model"])).name), ("suite", Path(str(results["suite"])).stem if results["suite"] else ""),
        ("general sets", ", ".join(results["general"])), ("tasks", ", ".join(results["specific"])),
        ("samples of each set", "all" if options["limit"] is None else f"at most {options['limit']}"),
        ("share of", "Σσ²" if options["by"] == "energy" else "Σσ"), ("seed", str(options["seed"])),
        ("time", duration(results["seconds"])),
    ]  # fmt: skip
    return [fact for fact in facts if fact[1]]


def render_analysis(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``figures/*.png`` and ``analysis.html`` of an analysis's results, and return the page's path."""
    pictures = draw(results)
    for name, data in pictures.items():
        atomic_write_bytes(folder / "figures" / f"{name}.png", data)
    tables, words = _tables(results), results["words"]
    sections = [
        {
            "key": key, "title": title, "about": about, "words": words.get(key, []), "tables": tables.get(key, []),
            "picture": "data:image/png;base64," + base64.b64encode(pictures[key]).decode("ascii"),
        }
        for key, (title, about) in SECTIONS.items() if key in pictures
    ]  # fmt: skip
    made: Mapping[str, Any] = results.get("suggestion") or {}
    suggested = [(_setting(key), why) for key, why in made.get("evidence", {}).items()]
    values = [(NAMES[key], _value(made[key], results["as_it_was"])) for key in NAMES if key in made]
    page = page_template("analysis.html.j2").render(
        results=results, facts=_facts(results), sections=sections, summary=words["summary"], values=values, evidence=suggested,
        light=palette.css("light"), dark=palette.css("dark"), style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        own=(TEMPLATES / "analysis.css").read_text(encoding="utf-8"),
    )  # fmt: skip
    return atomic_write_text(folder / "analysis.html", page.lstrip())


def _setting(key: str) -> str:
    """
    >>> _setting("energy_weights.vision"), _setting("r")
    ('ε_w (energy_weights) · vision', 'rank (r)')
    """
    name, _, tower = key.partition(".")
    return f"{NAMES[name]} · {tower}" if tower else NAMES[name]


def _value(value: Any, as_it_was: Sequence[str]) -> str:
    if value is None:
        return "as configured"
    if isinstance(value, Mapping):
        return ", ".join(f"{v:g} {tower}{' (as it was)' if tower in as_it_was else ''}" for tower, v in value.items())
    return f"{value:g}"
