"""The run beside other methods: who is shown, under which name and colour, who is best, and the headline in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from markupsafe import Markup

from keeplora.report.charts import number
from keeplora.report.kinds import IN_POINTS, Metric
from keeplora.report.runs import Run

OTHER_COLOURS = [1, 2, 3, 4, 6, 7]
GREY = 5
MOST_RIVALS = 4  # in the words of the headline; the table has all


@dataclass(frozen=True)
class Entry:
    """One row of the comparison: a run, or the untouched model read off row 0 (``run`` is None)."""

    label: str
    run: Run | None
    metrics: dict[str, float | None]
    index: int = GREY
    strong: bool = False
    charted: bool = True

    @property
    def learns(self) -> bool:
        """Whether it can forget at all; a model that never changes is no rival in forgetting."""
        return self.run is not None and self.run.learns

    @property
    def bound(self) -> bool:
        """Whether it shows what could be had with more than a learner may see: no rival either."""
        return self.run is not None and self.run.bound


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def untouched(run: Run) -> dict[str, float | None]:
    """The metrics of a model that is never trained, from row 0: each value holds at every moment.

    Nothing with ``candidates: seen``: later more classes stand to choose from than before the first task, and a model that is
    never trained would name fewer right as well.
    """
    if not run.accuracy or run.results.get("candidates") == "seen":
        return {}
    row = run.accuracy[0]
    mean = _mean(row)
    probe = _mean(run.probe_accuracy[0]) if run.probe_accuracy else None
    found = {"transfer": _mean(row[1:]), "probe": probe, **dict.fromkeys(("average", "last", "mft", "mfn"), mean)}
    # At moment i MAA counts the tasks up to i alone, learned or not.
    return found | {"maa": _mean([_mean(row[: i + 1]) for i in range(len(row))])}


def _labels(runs: Sequence[Run]) -> list[str]:
    """The method; where one comes twice, what tells its runs apart: the seed, a setting, the run's name, its folder."""
    names = [run.label for run in runs]
    for told in (_seeds, _differing, _run_names, _folders):
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(name, []).append(i)
        for name, group in groups.items():
            extras = told([runs[i] for i in group])
            if len(set(extras)) > 1:
                for i, extra in zip(group, extras, strict=True):
                    names[i] = f"{name}, {extra}" if extra else name
    return names


def _seeds(runs: Sequence[Run]) -> list[str]:
    return [f"seed {run.seed}" for run in runs]


def _run_names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _folders(runs: Sequence[Run]) -> list[str]:
    """Folders' names; whole paths where even those are equal."""
    short = [run.path.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


MOST_SETTINGS = 2


def _differing(runs: Sequence[Run]) -> list[str]:
    """The first settings in which the runs' configurations differ, the tuner's before others: "r 8"."""
    found = [run.settings for run in runs]
    if not all(found):
        return [""] * len(runs)
    keys = dict.fromkeys(key for one in found for key in one)
    differ = [key for key in keys if len({one.get(key) for one in found}) > 1]
    differ.sort(key=lambda key: not key.startswith("tuner."))
    return [
        ", ".join(f"{key.rpartition('.')[2]} {one.get(key, '–')}" for key in differ[:MOST_SETTINGS]) for one in found
    ]


def entries(run: Run, others: Sequence[Run]) -> list[Entry]:
    """The run first, then the others, then the untouched model unless a zero-shot run already stands for it.

    Charts show one run per method (the same seed as this run's if there is one) and at most six others; tables show all.
    """
    runs = [run, *others]
    found = [Entry(n, r, r.metrics, charted=False) for n, r in zip(_labels(runs), runs, strict=True)]
    found[0] = replace(found[0], index=0, strong=True, charted=True)
    chosen: dict[str, int] = {}
    for i, other in enumerate(others, start=1):
        rank = (other.finished, other.seed == run.seed)
        if other.label != run.label and other.label not in chosen:
            chosen[other.label] = i
        elif other.label in chosen:
            held = runs[chosen[other.label]]
            if rank > (held.finished, held.seed == run.seed):
                chosen[other.label] = i
    colours = iter(OTHER_COLOURS)
    for i in chosen.values():
        index = GREY if not runs[i].learns else next(colours, None)
        if index is not None:
            found[i] = replace(found[i], index=index, charted=True)
    if run.accuracy and all(one.learns for one in runs) and (base := untouched(run)):
        found.append(Entry("Untouched model", None, base))
    return found


def best(found: Sequence[Entry], key: str, higher: bool) -> set[int]:
    """Indices of the entries with the best ``key``; empty where fewer than two have one, or all are equal."""
    values = {
        i: value
        for i, entry in enumerate(found)
        if (value := entry.metrics.get(key)) is not None and (entry.learns or key not in IN_POINTS) and not entry.bound
    }
    if len(values) < 2:
        return set()
    if len({number(value) for value in values.values()}) == 1:
        return set()  # where all are equal none is best
    top = max(values.values()) if higher else min(values.values())
    return {i for i, value in values.items() if number(value) == number(top)}


def signed(value: float) -> str:
    """A difference with its sign.

    >>> signed(1.26), signed(-0.04)
    ('+1.3', '0.0')
    """
    text = number(value)
    return f"+{text}" if value > 0 and float(text) else text


POINTS = {
    "forgetting": "points below a task’s best, on average",
    "bwt": "points from a task’s learning to the end, on average",
}


def _told(run: Run) -> list[Metric]:
    return [metric for metric in run.kind.metrics if metric.key in run.kind.told]


def _beside(value: float, level: float) -> str:
    """A value against the untouched model's, in words.

    >>> _beside(10.6, 17.8), _beside(50.0, 50.0)
    ('7.2 points below the untouched model’s 17.8', 'the same as the untouched model')
    """
    if number(value) == number(level):
        return "the same as the untouched model"
    return f"{number(abs(value - level))} points {'above' if value > level else 'below'} the untouched model’s {number(level)}"


def tiles(run: Run) -> list[dict[str, Any]]:
    """The big numbers: name, value, and one line that puts it in proportion."""
    base, found = untouched(run), []
    for key, name, _, meaning in _told(run):
        value = run.metrics.get(key)
        if value is None:
            continue
        level = base.get(key)
        note = POINTS[key] if key in IN_POINTS else ""
        if level is not None and run.learns:
            note = _beside(value, level)
        found.append(
            {
                "name": name,
                "value": signed(value) if key == "bwt" else number(value),
                "unit": "" if key in IN_POINTS else "%",
                "note": note,
                "title": meaning,
            }
        )
    return found


def _strong(template: str, *values: str) -> Markup:
    return Markup(template).format(*(Markup("<strong>{}</strong>").format(value) for value in values))


def _against(run: Run, entry: Entry) -> Markup | None:
    parts = []
    for key, name, _, _ in _told(run):
        mine, theirs = run.metrics.get(key), entry.metrics.get(key)
        if mine is not None and theirs is not None and (key not in IN_POINTS or entry.learns):
            parts.append(f"{name} {signed(mine - theirs)}")
    if not parts:
        return None
    return Markup("Against <strong>{}</strong> on the same tasks, in points: {}.").format(entry.label, ", ".join(parts))


def headline(run: Run, found: Sequence[Entry]) -> list[Markup]:
    """What came out, in sentences with the numbers in them; only what the run has reached."""
    n, metrics, base, kind = len(run.tasks), run.metrics, untouched(run), run.kind
    said: list[Markup] = []
    value, level = metrics.get(kind.end), base.get(kind.end)
    if not run.accuracy:
        return [Markup("Nothing has been evaluated yet.")]
    if run.removed:
        said.append(
            _strong(
                "{} was taken out since: all numbers here were measured with it in the model.", ", ".join(run.removed)
            )
        )
    if not run.finished:
        said.append(
            _strong("{} of {} tasks are finished; the summary metrics follow when all are.", str(run.done), str(n))
        )
    if not run.learns and value is not None:
        said.append(_strong(kind.untouched, f"{number(value)}\u00a0%", str(n)))
    elif value is not None:
        tasks = f"{n} tasks one after another" if n > 1 else "one task"
        after = "After the last one" if n > 1 else "After it"
        text = "{} learned {}. " + after + " " + kind.ends
        said.append(
            _strong(text, run.label, tasks, f"{number(value)}\u00a0%") + Markup("" if level is not None else ".")
        )
        if level is not None:
            said[-1] += _strong("; before the first it was {}.", f"{number(level)}\u00a0%")
    if run.learns:
        said += _kept(run, base)
    rivals = [e for e in found if e.run is not None and e.charted and not e.strong]
    rivals.sort(key=lambda e: -(e.metrics.get(kind.end) or 0.0))
    said += [line for e in rivals[:MOST_RIVALS] if (line := _against(run, e))]
    if len(said) > 1 and rivals:
        said.append(Markup("One run of each method: a few points can be chance. Several seeds give an interval."))
    return said


def _kept(run: Run, base: dict[str, float | None]) -> list[Markup]:
    said: list[Markup] = []
    drop, metrics = run.metrics.get("forgetting" if "forgetting" in run.kind.told else "bwt"), run.metrics
    if drop is not None:
        first = run.column(run.tasks[0])
        points = f"{number(abs(drop))} points"
        if "forgetting" in run.kind.told:
            if abs(drop) < 0.05:
                text = Markup("On average a task ended at its earlier best, to a tenth of a point.")
            else:
                text = _strong(
                    "On average a task ended {} its earlier best.", f"{points} {'below' if drop > 0 else 'above'}"
                )
        else:
            text = _strong(
                "Between its learning and the end a task {} on average (BWT).",
                f"{'lost' if drop < 0 else 'gained'} {points}",
            )
        if first[1] is not None and first[-1] is not None:
            text += _strong(
                " The first task, {}, stood at {} when it was learned and at {} at the end.",
                run.tasks[0], f"{number(first[1])}\u00a0%", f"{number(first[-1])}\u00a0%",
            )  # fmt: skip
        said.append(text)
    for key, text in (
        ("transfer", "Tasks not yet learned stood at {} (Transfer); the untouched model has {} on them."),
        (
            "probe",
            f"The {run.kind.probes}, never trained on, stood at {{}} over the sequence; the untouched model has {{}}.",
        ),
    ):
        value, level = metrics.get(key), base.get(key)
        if key in run.kind.told and value is not None and level is not None:
            said.append(_strong(text, f"{number(value)}\u00a0%", f"{number(level)}\u00a0%"))
    return said
