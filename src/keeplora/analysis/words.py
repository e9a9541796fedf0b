"""An analysis's figures in words; what an interval does not tell apart is said to be so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from keeplora.analysis.suggest import NOT_MEASURED

Results = Mapping[str, Any]
KNOWN = {"energy_weights": "ε_w", "energy_features": "ε_f", "gamma": "γ", "r": "rank"}


def percent(share: float) -> str:
    """
    >>> percent(0.853), percent(0.004)
    ('85 %', '0.4 %')
    """
    return f"{100 * share:.1f} %" if 0 < share < 0.0095 else f"{100 * share:.0f} %"


def points_of(change: Mapping[str, Any]) -> str:
    """A difference in points with its interval over samples.

    >>> points_of({"mean": -3.25, "low": -5.0, "high": -1.5})
    '−3.2 points [−5.0, −1.5]'
    """
    return f"{change['mean']:+.1f} points [{change['low']:+.1f}, {change['high']:+.1f}]".replace("+-", "-").replace(
        "-", "−"
    )


def seen(change: Mapping[str, Any]) -> bool:
    """Whether the interval leaves 0 out."""
    return change["low"] > 0 or change["high"] < 0


def effect(name: str, change: Mapping[str, Any]) -> str:
    """
    >>> effect("the general sets", {"mean": -0.4, "low": -2.0, "high": 1.0})
    'no change can be seen in the general sets (−0.4 points [−2.0, +1.0])'
    >>> effect("the tasks", {"mean": -3.0, "low": -5.0, "high": -1.0})
    'the tasks lose 3.0 points [1.0, 5.0]'
    """
    if not seen(change):
        return f"no change can be seen in {name} ({points_of(change)})"
    low, high = sorted(abs(change[end]) for end in ("low", "high"))
    return f"{name} {'lose' if change['mean'] < 0 else 'gain'} {abs(change['mean']):.1f} points [{low:.1f}, {high:.1f}]"


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two intervals have nothing in common: a cautious test of a difference."""
    return one["high"] < other["low"] or other["high"] < one["low"]


def read_out(results: Results) -> dict[str, list[str]]:
    """Sentences by section of the page: "summary", "intra", "thirds", "windows", "spectra", "layers", "undo",
    "interference"."""
    makers = {
        "intra": _intra,
        "thirds": _thirds,
        "windows": _windows,
        "spectra": _spectra,
        "layers": _layers,
        "undo": _undo,
        "interference": lambda results: interference(results["interference"]),
    }
    words = {key: make(results) for key, make in makers.items() if results.get(key)}
    return {"summary": _summary(results), **words}


def _summary(results: Results) -> list[str]:
    said = []
    if missing := results.get("missing"):
        points = f"{missing} of {results['asked']} points {'is' if missing == 1 else 'are'}"
        said.append(f"Unfinished: {points} not measured yet, and nothing is suggested. Repeat the command to go on.")
    base = results.get("untouched")
    if base:
        general = base["general"]
        said.append(
            f"Untouched, the model scores {general['mean']:.1f} [{general['low']:.1f}, {general['high']:.1f}] on the general "
            f"sets ({general['n']} samples of {', '.join(results['general'])}) and {base['specific']['mean']:.1f} "
            f"[{base['specific']['low']:.1f}, {base['specific']['high']:.1f}] on the tasks ({base['specific']['n']} samples)."
        )
    said.append(f"{results['note'][:1].upper()}{results['note'][1:]}.")
    made = results.get("suggestion")
    if made:
        as_it_was = results.get("as_it_was") or []
        given = [f"{KNOWN[k]} = {_value(v, as_it_was)}" for k, v in made.items() if k in KNOWN and v is not None]
        if made.get("learning_rate") is not None:
            rates = [_value(rate, []) for rate in (made["learning_rate"], results["learning_rate"])]
            given.append(f"learning rate {rates[0]} in place of {rates[1]}")
        why = made["evidence"]
        silent = [k for k, v in made.items() if k in KNOWN and v is None]
        unmeasured = [KNOWN[k] for k in silent if str(why.get(k, "")).startswith(NOT_MEASURED)]
        not_told = [KNOWN[k] for k in silent if KNOWN[k] not in unmeasured]
        if given:
            said.append(f"Suggested for this model: {', '.join(given)}.")
        if not_told:
            said.append(f"Left as configured, for these figures show no fault in it: {', '.join(not_told)}.")
        if unmeasured:
            said.append(f"Not measured by this analysis: {', '.join(unmeasured)}.")
    return said


def _value(value: Any, as_it_was: Sequence[str]) -> str:
    if isinstance(value, Mapping):
        return " / ".join(
            f"{float(v):g} ({tower}{', not told: as it was' if tower in as_it_was else ''})"
            for tower, v in value.items()
        )
    return f"{value:g}"


def _curve(results: Results, part: str) -> list[dict[str, Any]]:
    return next((c["points"] for c in results["intra"] if (c["part"], c["mode"]) == (part, "leading")), [])


def _intra(results: Results) -> list[str]:
    said = []
    for part in dict.fromkeys(curve["part"] for curve in results["intra"]):
        name = "All towers" if part == "all" else part
        leading = _curve(results, part)
        inner = [p for p in leading if 0 < p["share"] < 1]
        for group, what in (("general", "the general sets"), ("specific", "the tasks")):
            least = _least_unharmed(leading, group)
            if least is not None and least["share"] == 0:
                said.append(
                    f"{name}: with nothing kept of these weights no loss can be seen in {what}: these samples tell nothing."
                )
            elif least is not None and least["share"] < 1:
                said.append(
                    f"{name}: rebuilt from the leading {percent(least['rank_share'])} of their singular components "
                    f"({percent(least['energy'])} of Σσ²) and from more, no loss can be seen in {what}."
                )
            elif least is not None:
                said.append(f"{name}: every truncation that was tried costs {what} something.")
        if inner:
            said.append(_together(name, f"kept are {percent(inner[0]['energy'])} of Σσ²", inner[0]))
        rows = [row for row in results.get("ends", ()) if row["part"] == part]
        for group, what in (("general", "the general sets"), ("specific", "the tasks")):
            said += ends(f"{name}, {what}", [{"energy": row["energy"], **row[group]} for row in rows])
    return said


def at_floor(row: Mapping[str, Any]) -> bool:
    """Whether neither end of the spectrum visibly scores more than the model does with nothing kept: nothing to compare."""
    return not any(row[f"{end}_over_floor"]["low"] > 0 for end in ("leading", "trailing"))


def ends(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The leading components beside the trailing ones that hold as much of Σσ², share by share.

    >>> over, under, none = ({"mean": m, "low": m - 2, "high": m + 2} for m in (9.0, -9.0, 0.5))
    >>> floor = {"energy": 0.5, "difference": over, "leading_over_floor": none, "trailing_over_floor": none}
    >>> for line in ends("vision", [floor, {**floor, "energy": 0.95, "difference": under, "trailing_over_floor": over}]):
    ...     print(line)
    vision: at 50 % of Σσ² neither end of the spectrum visibly scores more than nothing does: no comparison.
    vision: at 95 % of Σσ² kept the leading components score 9.0 points [7.0, 11.0] less than the trailing ones.
    vision: as far as these samples tell, the trailing components are worth more than the leading ones that hold as much.
    """
    if not rows:
        return []
    floor = [percent(row["energy"]) for row in rows if at_floor(row)]
    said = []
    if floor:
        said.append(
            f"{name}: at {', '.join(floor)} of Σσ² neither end of the spectrum visibly scores more than nothing "
            "does: no comparison."
        )
    worth: list[bool] = []
    for row in (row for row in rows if not at_floor(row)):
        found, kept = row["difference"], f"{name}: at {percent(row['energy'])} of Σσ² kept"
        if not seen(found):
            said.append(
                f"{kept} the leading and the trailing components are not told apart (leading less trailing "
                f"{points_of(found)})."
            )
            continue
        worth.append(found["mean"] > 0)
        low, high = sorted(abs(found[end]) for end in ("low", "high"))
        said.append(
            f"{kept} the leading components score {abs(found['mean']):.1f} points [{low:.1f}, {high:.1f}] "
            f"{'more' if worth[-1] else 'less'} than the trailing ones."
        )
    if not worth:
        verdict = "which end of the spectrum is worth more cannot be told"
    elif len(set(worth)) > 1:
        verdict = "which end of the spectrum is worth more depends on how much is kept"
    else:
        more, other = ("leading", "trailing") if worth[0] else ("trailing", "leading")
        verdict = f"as far as these samples tell, the {more} components are worth more than the {other} ones that hold as much"
    return [*said, f"{name}: {verdict}."]


def _least_unharmed(points: Sequence[Mapping[str, Any]], group: str) -> Mapping[str, Any] | None:
    """The least share from which on no loss is seen."""
    found = None
    for point in reversed(points):
        change = point[f"{group}_change"]
        if change["high"] < 0:
            break
        found = point
    return found


def _together(name: str, what: str, point: Mapping[str, Any]) -> str:
    general, specific = point["general_change"], point["specific_change"]
    end = "" if apart(general, specific) else "; the two are not told apart"
    return f"{name}: where {what}, {effect('the general sets', general)}, and {effect('the tasks', specific)}{end}."


def _thirds(results: Results) -> list[str]:
    said = []
    rows = [one for one in results["thirds"] if one["points"]]
    for one in rows:
        for point in one["points"][:: max(1, len(one["points"]) - 1)]:  # the hardest cut and the mildest
            said.append(
                f"With {one['name']} of every tower cut to {percent(point['share'])} of its spectrum, "
                f"{effect('the general sets', point['general_change'])}, and {effect('the tasks', point['specific_change'])}."
            )
    if len(rows) < 2:
        return said
    (shallow, deep), told = (rows[0], rows[-1]), False
    for a, b in zip(shallow["points"], deep["points"]):
        if apart(a["general_change"], b["general_change"]):
            more = shallow if a["general_change"]["mean"] < b["general_change"]["mean"] else deep
            said.append(f"At {percent(a['share'])} kept, general knowledge depends more on {more['name']}.")
            told = True
    if not told:
        said.append(
            f"Whether general knowledge depends more on {shallow['name']} or on {deep['name']} cannot be told from this."
        )
    return said


def _windows(results: Results) -> list[str]:
    said = []
    rows = results["windows"]
    for row in rows:
        gain, loss = row["gain"], row["loss"]
        lost = {"mean": -loss["mean"], "low": -loss["high"], "high": -loss["low"]}
        said.append(
            f"Adapting {row['name']} alone ({row['layers']} layers: {row['blocks']}) on {', '.join(row['tasks'])}: "
            f"{effect('held-out samples of the new task', gain)}, and {effect('the general sets', lost)}."
        )
    if len(rows) > 1:
        shallow, deep = rows[0], rows[-1]
        for key, what in (("gain", "learn more"), ("loss", "cost general knowledge more")):
            if apart(shallow[key], deep[key]):
                more = shallow if shallow[key]["mean"] > deep[key]["mean"] else deep
                said.append(
                    f"Of the two ends, {more['name']} {what.replace('learn', 'learns').replace('cost', 'costs')}."
                )
            else:
                said.append(f"Which of the two ends would {what} cannot be told: the intervals overlap.")
    if rows and len(rows[0]["tasks"]) == 1:
        said.append("One task alone was learned: other tasks may differ.")
    return said


def _spectra(results: Results) -> list[str]:
    found, said = results["spectra"], []
    for one in found["captured"]:
        if one["median"] >= 0.9:
            said.append(
                f"The leading {one['rank']} directions hold {percent(one['median'])} of the residual gradient's energy at "
                f"the median layer (the middle half of the layers: {percent(one['low'])} to {percent(one['high'])})."
            )
            break
    else:
        last = found["captured"][-1]
        said.append(
            f"Even {last['rank']} directions hold only {percent(last['median'])} of the residual gradient's energy at the median "
            "layer."
        )
    for tower in dict.fromkeys(row["tower"] for row in found["outside"]):
        rows = [row for row in found["outside"] if row["tower"] == tower]
        shallow, deep = rows[: max(1, len(rows) // 3)], rows[-max(1, len(rows) // 3) :]
        a, b = (percent(median(r["median"] for r in third)) for third in (shallow, deep))
        said.append(
            f"{tower or 'The model'}: outside the weights' protected subspace lies {a} of the tasks' gradient energy in the "
            f"shallow third and {b} in the deep third."
        )
    for one in found["protected"]:
        said.append(
            f"At ε_f = {one['energy']:g} the {found['memory']} of all tasks but the last leave {one['room']:g} free dimensions "
            f"at the median layer (least {one['least_room']}), and {percent(one['left'])} of the last task's gradient energy, of "
            f"{percent(one['start'])} before the first."
        )
    if found["protected"]:
        said.append("These are the untouched model's features and gradients; those of a run differ as it learns.")
    return said


def _third(rows: Sequence[Mapping[str, Any]], key: str, deep: bool) -> float | None:
    """Median of a value over the shallow or the deep third of the layers with a depth."""
    chosen = [
        r[key] for r in rows
        if r["depth"] is not None and r.get(key) is not None and r["blocks"] > 1
        and ((r["depth"] + 0.5) / r["blocks"] > 2 / 3 if deep else (r["depth"] + 0.5) / r["blocks"] < 1 / 3)
    ]  # fmt: skip
    return median(chosen) if chosen else None


def _layers(results: Results) -> list[str]:
    last = results["layers"][-1]
    rows, n = last["rows"], len(results["layers"])
    said = []
    told = (
        ("total", f"After {n} task{'s' if n > 1 else ''} the updates are {{}} of the weights' norm in the shallow third and {{}} "
                  "in the deep third (medians)."),
        ("outside", "Of the last task's gradient energy {} lay outside the protected subspace in the shallow third and {} in the "
                    "deep third."),
        ("taken", "Of that its A took {} in the shallow third and {} in the deep third."),
    )  # fmt: skip
    for key, sentence in told:
        ends = [_third(rows, key, deep) for deep in (False, True)]
        if None not in ends:
            said.append(sentence.format(*(percent(v) for v in ends if v is not None)))
    drift = [_third(rows, "cka", deep) for deep in (False, True)]
    if None not in drift:
        a, b = (v for v in drift if v is not None)
        said.append(
            f"Features of the general sets are like the untouched model’s to a linear CKA of {a:.3f} in the shallow third and "
            f"{b:.3f} in the deep third (1: the same up to rotation and scale; unbiased estimate, no interval)."
        )
    return said


def _undo(results: Results) -> list[str]:
    said = []
    by = {one["first"]: one["points"] for one in results["undo"]}
    steps, blocks = max(p["steps"] for p in by["shallow"]), max(results["blocks"].values(), default=0)
    if blocks > steps:
        few = blocks // steps
        size = f"{few}" if blocks == few * steps else f"{few} or {few + 1}"
        said.append(f"The deepest tower has {blocks} blocks: a step takes the updates of {size} of them out.")
    ends = {}
    for first, name in (("shallow", "shallow"), ("deep", "deep")):
        middle = next((p for p in by.get(first, []) if p["steps"] >= len(by[first]) // 3 and p["steps"] > 0), None)
        if middle is not None:
            ends[first] = middle
            said.append(
                f"With the updates of the {name} layers taken out ({middle['layers']} of {middle['of']} layers), "
                f"{effect('the tasks', middle['specific_change'])}, and {effect('the general sets', middle['general_change'])}."
            )
    if len(ends) == 2:
        a, b = (ends[k]["specific_change"] for k in ("shallow", "deep"))
        if apart(a, b):
            where = "shallow" if a["mean"] < b["mean"] else "deep"
            said.append(f"What the tasks learned sits more in the {where} layers.")
        else:
            said.append("Where what the tasks learned sits cannot be told from these two: their intervals overlap.")
    return said


MEANT = {
    "overlap": "the overlap of two tasks' feature subspaces", "energy": "the share of the later task's feature energy inside the "
    "earlier one's", "gradient": "the share of the later task's residual gradient inside the earlier one's features",
    "update": "what the update does to the earlier task's features", "size": "the size of the update alone (the control)",
}  # fmt: skip


def interference(found: Mapping[str, Any]) -> list[str]:
    """What `keeplora.experiment.similarity` found, in words, of its first set of pairs: all runs, or the only one."""
    if not found["associations"]:
        return ["There are no accuracies of two tasks, so there is nothing to check a prediction against."]
    by = next(iter(found["associations"].values()))
    counted = max(by.values(), key=lambda one: one["n"])
    if not counted["n"]:
        return [
            "Too few pairs of tasks were measured, or all fell alike: whether anything predicts that cannot be told."
        ]
    runs = f" of {counted['groups']} runs" if counted["groups"] > 1 else ""
    said = [
        f"{counted['n']} pairs of tasks{runs}: a rank correlation with the points that the earlier task fell while the later was "
        f"learned would have to pass ±{counted['least']:.2f} to be told from chance."
    ]
    for name, one in by.items():
        if one["rho"] is None:
            said.append(f"{name}, {MEANT[name]}: too few pairs are known, it cannot be told.")
            continue
        says = {
            "cannot be told": "whether it goes with forgetting cannot be told",
            "goes with it": "the larger, the more is forgotten",
            "goes against it": "the larger, the less is forgotten",
        }[one["verdict"]]  # fmt: skip
        told = f"ρ = {one['rho']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}], p = {one['p']:.2g}".replace("-", "−")
        said.append(f"{name}, {MEANT[name]}: {says} ({told}).")
    said.append(
        "Pairs that share a task are not independent, so these intervals are rather too narrow, and one in twenty such "
        "correlations passes by chance."
    )
    return said
