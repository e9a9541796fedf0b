"""From measured points to curves with intervals, suggestions and the page; everything here is made anew from the points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from keeplora.analysis import suggest
from keeplora.analysis.intervals import REPEATS, Resamples, Spread, ends
from keeplora.analysis.words import read_out
from keeplora.experiment.similarity import task_similarity
from keeplora.files import atomic_write_json, atomic_write_text
from keeplora.report.analysis_html import render_analysis
from keeplora.study.analyze.plan import (
    MODES,
    WINDOWS,
    AnalysisPlan,
    Point,
    blocks_of,
    label_of,
    window_blocks,
    window_name,
)
from keeplora.study.analyze.store import AnalysisStore
from keeplora.study.analyze.world import NOTES, World
from keeplora.yaml_text import dump_yaml

FORMAT = "keeplora-analysis-results"
VERSION = 0
GROUPS = ("general", "specific")

Found = Mapping[str, list[dict[str, Any]]]
"""Points by kind."""


def about(plan: AnalysisPlan, world: World) -> dict[str, Any]:
    """What results.json says of the model and the data, taken before the world is given up."""
    config = world.setup.tuner_config()
    towers = list(dict.fromkeys(t.tower for t in world.targets))
    return {
        "label": label_of(plan.source, plan.run), "model": world.config.model.name, "suite": world.config.suite,
        "kind": world.kind.name, "method": world.config.method, "run": str(plan.run) if plan.run else None,
        "options": plan.told, "note": NOTES[world.general_kind], "general": list(world.general),
        "specific": list(world.specific), "towers": towers, "blocks": blocks_of(world.targets),
        "now": {
            name: {tower: config.for_tower(name, tower) for tower in towers}
            for name in ("energy_weights", "energy_features", "gamma", "r")
        },
        "learning_rate": world.config.training.learning_rate,
        "depth": {
            tower: {"blocks": inside[0].blocks, "targets": len(inside)}
            for tower in towers
            if (inside := [t for t in world.targets if t.tower == tower and t.depth is not None])
        } if config.schedule == "linear" else {},
    }  # fmt: skip


def conclude(store: AnalysisStore, told: Mapping[str, Any], wanted: Sequence[Point]) -> dict[str, Any]:
    """Write results.json, suggestion.yaml, the figures and analysis.html from the points that there are; the results.

    ``wanted``: what was asked for (`AnalysisStore.points`). While some of it is not measured nothing is suggested, page and file
    say so, and a suggestion of an earlier call goes.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for point in store.points(wanted):
        found[point["kind"]].append(point)
    missing = sum(not store.has(point) for point in wanted)
    results: dict[str, Any] = {"format": FORMAT, "version": VERSION, **told, "asked": len(wanted), "missing": missing}
    if found["untouched"]:
        base = found["untouched"][0]["result"]
        curves = _Curves(base)
        results["untouched"] = curves.of(base)
        # Another keeplora dropped leading components by a grid of their own; such points may lie here still.
        halves = [point for point in found["intra"] if point["mode"] in MODES]
        results["intra"] = curves.grouped(halves, ("part", "mode"), "share")
        results["ends"] = _ends(curves, halves)
        thirds = curves.grouped(found["third"], ("window",), "share")
        results["thirds"] = [{**one, "name": window_name(one["window"])} for one in thirds]
    count, there = _count(wanted, found["window"])
    results["windows"], windows = _windows(there, count, told["blocks"])
    results["spectra"] = _spectra(found["spectra"])
    results["layers"] = [{"task": p["task"], **p["result"]} for p in sorted(found["layers"], key=lambda p: p["task"])]
    results["undo"] = _undo(found["undo"])
    results["interference"] = _interference(told["run"], results["layers"])
    results["suggestion"], results["as_it_was"] = None, []
    if told["run"] is None and not missing:
        results["suggestion"], results["as_it_was"] = _suggestion(results, windows, count, found)
    results["seconds"] = round(sum(p["result"].get("seconds", 0.0) for ps in found.values() for p in ps), 1)
    results["words"] = read_out(results)
    atomic_write_json(store.path / "results.json", results)
    if results["suggestion"] is not None:
        _write_suggestion(store.path / "suggestion.yaml", results)
    else:
        (store.path / "suggestion.yaml").unlink(missing_ok=True)
    render_analysis(results, store.path)
    return results


# ---- curves ----------------------------------------------------------------------------------------------------------


def _told(spread: Spread) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in spread._asdict().items()}


class _Curves:
    """Scores of points against those of ``base``, resampled alike."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self.base = {group: base[group] for group in GROUPS}
        self.draws = {group: Resamples({k: len(v) for k, v in base[group].items()}) for group in GROUPS}

    def of(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Mean and intervals per group, their difference to the base, and the mean of every set."""
        row: dict[str, Any] = {}
        for group in GROUPS:
            row[group] = _told(self.draws[group].spread(result[group]))
            row[f"{group}_change"] = _told(self.difference(group, result, self.base))
            row[f"{group}_sets"] = {name: round(fmean(values), 4) for name, values in result[group].items()}
        return row

    def difference(self, group: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Spread:
        """``one`` less ``other`` in a group, sample by sample."""
        return self.draws[group].difference(one[group], other[group])

    def grouped(self, points: Sequence[Mapping[str, Any]], keys: Sequence[str], along: str) -> list[dict[str, Any]]:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for point in sorted(points, key=lambda p: p[along]):
            row = {along: point[along], **self.of(point["result"])}
            row |= {k: point["result"][k] for k in ("energy", "rank_share", "layers", "of") if k in point["result"]}
            groups.setdefault(tuple(point[k] for k in keys), []).append(row)
        return [{**dict(zip(keys, key)), "points": rows} for key, rows in sorted(groups.items())]


def _ends(curves: _Curves, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per part and share both ends of the spectrum at equal energy kept: leading less trailing, and each less the floor.

    The floor is what is left with nothing of the part's weights kept: two ends that both lie there tell nothing, whatever the
    difference between them.
    """
    at = {(p["part"], p["mode"], p["share"]): p["result"] for p in points}
    rows: list[dict[str, Any]] = []
    for (part, mode, share), trailing in at.items():
        leading, floor = at.get((part, "leading", share)), at.get((part, "leading", 0.0))
        if mode != "trailing" or leading is None or floor is None:
            continue
        row: dict[str, Any] = {"part": part, "share": share, "energy": trailing["energy"]}
        for group in GROUPS:
            row[group] = {
                "difference": _told(curves.difference(group, leading, trailing)),
                "leading_over_floor": _told(curves.difference(group, leading, floor)),
                "trailing_over_floor": _told(curves.difference(group, trailing, floor)),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["part"], row["share"]))


def _count(wanted: Sequence[Point], points: Sequence[Mapping[str, Any]]) -> tuple[int, list[Mapping[str, Any]]]:
    """(Into how many windows the depth is divided, the points of these windows).

    What is asked for decides; a call that asks for none tells of thirds where there are some, else of the fewest.
    """
    asked = {point.values.get("windows", WINDOWS) for point in wanted if point.kind == "window"}
    counts = asked or {point.get("windows", WINDOWS) for point in points}
    count = WINDOWS if WINDOWS in counts else min(counts, default=WINDOWS)
    return count, [point for point in points if point.get("windows", WINDOWS) == count]


def _windows(
    points: Sequence[Mapping[str, Any]], count: int, blocks: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[suggest.Window]]:
    """Per window: gain on the new tasks and loss on the general sets, over the tasks that every window has learned."""
    learned: dict[int, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for point in points:
        if "not_learned" not in point["result"]:
            learned[point["window"]][point["task"]] = point["result"]
    shared = sorted(set.intersection(*(set(tasks) for tasks in learned.values()))) if learned else []
    rows: list[dict[str, Any]] = []
    windows: list[suggest.Window] = []
    if not shared:
        return rows, windows
    picks = np.random.default_rng(0).integers(0, len(shared), (REPEATS, len(shared)))
    for index in sorted(learned):
        gains, losses, gain_draws, loss_draws = [], [], [], []
        for task in shared:
            result = learned[index][task]
            for before, after, means, draws, sign in (
                ("before", "after", gains, gain_draws, 1.0),
                ("general_before", "general_after", losses, loss_draws, -1.0),
            ):
                resample = Resamples({k: len(v) for k, v in result[before].items()})
                mine, theirs = resample.means(result[after]), resample.means(result[before])
                means.append(sign * (mine[0] - theirs[0]))
                draws.append(sign * (mine[1] - theirs[1]))
        name = window_name(index, count)
        gain, loss = np.stack(gain_draws, axis=1), np.stack(loss_draws, axis=1)
        more, less = (np.take_along_axis(draws, picks, axis=1).mean(1) for draws in (gain, loss))
        windows.append(suggest.Window(name, fmean(gains), fmean(losses), more, less, len(shared)))
        result = learned[index][shared[0]]
        rows.append({
            "window": index, "of": count, "name": name, "blocks": window_blocks(index, count, blocks),
            "tasks": [learned[index][t]["task_name"] for t in shared],
            "layers": result["layers"], "trained": result["trained"],
            "gain": _of_draws(fmean(gains), gain, picks), "loss": _of_draws(fmean(losses), loss, picks),
        })  # fmt: skip
    return rows, windows


def _of_draws(mean: float, draws: Any, picks: Any) -> dict[str, Any]:
    low, high = ends(draws.mean(1))
    over = np.take_along_axis(draws, picks, axis=1).mean(1)
    pair = ends(over) if draws.shape[1] > 1 else (None, None)
    return _told(Spread(mean, low, high, *pair, 0, draws.shape[1]))


def _undo(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Both ends' curves; nothing undone, the model as it is, is the first point of each."""
    # Of a folder's points the finest steps: those of another keeplora, which took six and named no number, may lie there too.
    total = max((p.get("total", 6) for p in points), default=0)
    points = [p for p in points if p.get("total", 6) == total]
    start = [p for p in points if p["steps"] == 0]
    if not start:
        return []
    everything = [p for p in points if p["steps"] == total]
    deep = any(p["first"] == "deep" for p in points)
    both = [{**p, "first": "deep"} for p in (*start, *everything)] if deep else []
    return _Curves(start[0]["result"]).grouped([*points, *both], ("first",), "steps")


# ---- gradients and features --------------------------------------------------------------------------------------------


def _spectra(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not points:
        return None
    result = points[0]["result"]
    rows, ranks = result["rows"], result["ranks"]
    taken = []
    for i, r in enumerate(ranks):
        values = [row["captured"][i] for row in rows]
        low, high = (float(v) for v in np.quantile(values, [0.25, 0.75]))
        taken.append({"rank": r, "median": median(values), "low": low, "high": high})
    outside: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["depth"] is not None:
            outside[row["tower"], row["depth"]].append(row["outside"])
    return {
        "captured": taken,
        "outside": [
            {"tower": tower, "depth": depth, "median": median(values), "low": min(values), "high": max(values)}
            for (tower, depth), values in sorted(outside.items())
        ],
        "protected": [
            {
                "energy": one["energy"], "room": median(one["room"]), "least_room": min(one["room"]),
                "left": median(one["left"]), "start": median(one["start"]), "layers": len(one["layers"]),
            }
            for one in result["protected"]
        ],
        "tasks": result["tasks"], "memory": result.get("memory", "features"),
    }  # fmt: skip


# ---- interference ----------------------------------------------------------------------------------------------------


def _interference(run: str | None, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`task_similarity` of a run, with the gradients' shares that its points hold; None where they hold none."""
    inside = {row["task_name"]: row["inside"] for row in layers if row.get("inside")}
    if run is None or not inside:
        return None
    return task_similarity([Path(run)], gradients=lambda *_: inside).to_dict()


# ---- suggestion ----------------------------------------------------------------------------------------------------------


def _suggestion(
    results: Mapping[str, Any], windows: Sequence[suggest.Window], count: int, points: Found
) -> tuple[dict[str, Any], list[str]]:
    """(Values by the tuner's own names, None where the figures do not tell, with the evidence for each; towers whose ε_w is not
    told and stands beside the others' as it was)."""
    found: dict[str, suggest.Suggestion] = {}
    evidence: dict[str, str] = {}
    towers: dict[str, Any] = {}
    now = results["now"]
    parts = {p["part"] for p in points["intra"] if p["mode"] == "leading"} - {"all"}
    for part in sorted(parts):
        tower = part if part in results["towers"] else ""
        configured = now["energy_weights"][tower]
        one = suggest.energy_weights(_curve(points, part, configured, results["options"]["by"]), configured)
        evidence[f"energy_weights.{part}"], towers[tower] = one.why, one.value
    value: Any = None
    if any(v is not None for v in towers.values()):
        whole = {tower: towers.get(tower) for tower in results["towers"]}
        value = {t: v if v is not None else now["energy_weights"][t] for t, v in whole.items()}
        if "" in value:  # a model of one tower has no name for it
            value = value[""]
    if windows:
        outer = {0, count - 1} - {row["window"] for row in results["windows"]}
        found["gamma"] = (
            suggest.Suggestion(
                None, f"of {' and '.join(window_name(w, count) for w in sorted(outer))} alone nothing was measured"
            )
            if outer
            else suggest.gamma(windows, list(now["gamma"].values()), count)
        )
    rate = None
    if "gamma" in found and found["gamma"].value is not None and results["depth"]:
        depth = [(d["blocks"], d["targets"], now["gamma"][tower]) for tower, d in results["depth"].items()]
        factor, sentence = suggest.same_step(depth, found["gamma"].value)
        rate = _times(results["learning_rate"], factor)
        evidence["learning_rate"] = sentence
    if points["spectra"]:
        result = points["spectra"][0]["result"]
        shares = {r: [row["captured"][i] for row in result["rows"]] for i, r in enumerate(result["ranks"])}
        found["r"] = suggest.rank(shares, min(now["r"].values()))
        tried = [
            suggest.Protected(o["energy"], o["room"], o["left"], o["start"]) for o in result["protected"] if o["room"]
        ]
        energies = set(now["energy_features"].values())
        found["energy_features"] = (
            suggest.Suggestion(None, "each tower has an ε_f of its own, and one for all would not be better than these")
            if len(energies) > 1
            else suggest.energy_features(
                tried, int(found["r"].value or max(now["r"].values())), energies.pop(), int(result["tasks"])
            )
        )
    evidence |= {key: one.why for key, one in found.items()}
    for key, measured_by in suggest.MEASURED_BY.items():
        if not any(name == key or name.startswith(f"{key}.") for name in evidence):
            evidence[key] = f"{suggest.NOT_MEASURED} by this analysis: {measured_by} does"
    made = {
        "energy_weights": value, **{k: found[k].value if k in found else None for k in ("energy_features", "gamma", "r")},
        **({} if rate is None else {"learning_rate": rate}), "evidence": evidence,
    }  # fmt: skip
    return made, [tower for tower in results["towers"] if isinstance(value, Mapping) and towers.get(tower) is None]


def _times(rate: Any, factor: float) -> Any:
    """A learning rate, or one per task, times ``factor``, to three digits."""
    if isinstance(rate, Mapping):
        return {task: _times(one, factor) for task, one in rate.items()}
    return float(f"{rate * factor:.3g}")


def _curve(points: Found, part: str, configured: float, by: str) -> list[suggest.Kept]:
    """A tower's points against the whole model, and against the weights cut to the configured ε_w."""
    # A share of Σσ² is what ε_w is; one of Σσ stands for the share of Σσ² that it keeps, over the layers.
    mine = [p for p in points["intra"] if p["part"] == part and p["mode"] == "leading"]
    energy = {p["share"]: p["share"] if by == "energy" else p["result"]["energy"] for p in mine}
    base = points["untouched"][0]["result"]["general"]
    draws = Resamples({name: len(values) for name, values in base.items()})
    # Where the configured share itself was not measured, the next above it, which keeps no less, stands for it.
    above = [p for p in mine if energy[p["share"]] >= configured - 1e-3]
    stand = min(above, key=lambda p: energy[p["share"]], default=None)
    rows = []
    for p in mine:
        scores = p["result"]["general"]
        more = stand is not None and energy[p["share"]] > energy[stand["share"]]
        over = draws.difference(scores, stand["result"]["general"]) if stand is not None and more else None
        rows.append(
            suggest.Kept(
                energy[p["share"]],
                suggest.Change(*draws.difference(scores, base)[:3]),
                over and suggest.Change(*over[:3]),
            )
        )
    return rows


def _write_suggestion(path: Path, results: Mapping[str, Any]) -> None:
    made = results["suggestion"]
    settings = {key: value for key, value in made.items() if key not in ("evidence", "learning_rate")}
    rate = made.get("learning_rate")
    atomic_write_text(path, dump_yaml({
        "format": "keeplora-suggestion", "version": 0, "model": results["model"], "of": results["label"],
        "tuner": {key: value for key, value in settings.items() if value is not None},
        **({} if rate is None else {"training": {"learning_rate": rate}}),
        "not_told": [key for key, value in settings.items() if value is None], "evidence": made["evidence"],
        "data": results["note"],
    }))  # fmt: skip
