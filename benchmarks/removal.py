"""What removing a task does not undo: a run with one task taken out, against a run that never saw it.

    python benchmarks/removal.py --suite demo-small --seeds 0 1 2 3 4 --output runs/removal

For every seed three runs, each resumed where it was interrupted: all tasks (from which the middle one, or --remove, is then
taken out), the same without that task, and that again under another seed, which shows how far two runs lie apart that
differ by chance alone. (The order of the data differs between the first two as well: a task's seed follows from its place.)
Prints, as Markdown with 95 % t intervals over the seeds:

- accuracy on the other tasks and on the probes, in points, after the removal less that of the run that never saw the task
  (paired), and the same difference between the two runs that never saw it;
- per task that was learned later, ‖ΔW − ΔW'‖ / ‖ΔW'‖ over all layers, ΔW' that of the run that never saw the removed task;
- the removed task's own accuracy: untouched model, learned, after the removal.

Everything is also written to OUTPUT/removal.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from keeplora.evaluation.stats import mean_interval, paired_difference
from keeplora.experiment import Experiment, load_config
from keeplora.experiment.config import ExperimentConfig, parse_overrides
from keeplora.experiment.setup import prepare
from keeplora.files import atomic_write_json
from keeplora.methods import method_names
from keeplora.tuner import TaskRecord
from keeplora.tuner.persistence import open_ledger

CONTROL = 10_000
"""Added to a seed for the run that differs by chance alone."""


def run(values: Mapping[str, Any], output: Path, **changes: Any) -> tuple[ExperimentConfig, dict[str, Any]]:
    """(config, results) of a finished run; begun, gone on with, or read."""
    config = load_config(values, {**changes, "output": str(output)}, known_methods=method_names())
    if (output / "config.yaml").is_file():
        return config, Experiment.resume(output, quiet=True)
    return config, Experiment(config, quiet=True).run()


def scores_without(config: ExperimentConfig, path: Path, task: str) -> dict[str, float | None]:
    """Score of every task and probe after ``task`` was taken out of a finished run; the run itself is left alone."""
    setup = prepare(config)
    learner = setup.method.learner.from_pretrained(path, setup.family.model)
    learner.remove(task)
    with setup.kind.running(learner):
        return {t.name: setup.kind.score(t, setup.sets[t.name].test, learner) for t in (*setup.tasks, *setup.probes)}


def last_scores(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Score of every task and probe at the end of a run."""
    names = [*results["tasks"], *results["probes"]]
    return dict(zip(names, [*results["accuracy"][-1], *results["probe_accuracy"][-1]], strict=True))


def records(config: ExperimentConfig, path: Path) -> dict[str, TaskRecord]:
    """The active tasks of a run's ledger, by name."""
    return {record.name: record for record in open_ledger(path).records()}


def distance(one: TaskRecord, other: TaskRecord) -> float:
    """‖ΔW − ΔW'‖_F / ‖ΔW'‖_F over all layers of two records."""
    apart = norm = 0.0
    deltas, zero = (one.deltas, other.deltas), torch.zeros(())
    for name in {*deltas[0], *deltas[1]}:
        first, second = (side.get(name, zero).double() for side in deltas)
        apart, norm = apart + float((first - second).square().sum()), norm + float(second.square().sum())
    return (apart / norm) ** 0.5 if norm else float("nan")


def measure(
    values: Mapping[str, Any], changes: Mapping[str, Any], seed: int, removed: str | None, output: Path
) -> dict[str, Any]:
    """One seed: what the report is made of, as JSON. ``changes``: settings by dotted key."""
    whole = output / f"whole-seed{seed}"
    config, results = run(values, whole, **changes, seed=seed)
    order = results["tasks"]
    removed = removed or order[(len(order) - 1) // 2]
    rest = [name for name in order if name != removed]
    never, chance = output / f"never-seed{seed}", output / f"chance-seed{seed}"
    short = {**changes, "order": [*rest, removed], "first_tasks": len(rest)}  # the task comes last, and is left out
    of_never, results_never = run(values, never, **short, seed=seed)
    of_chance, results_chance = run(values, chance, **short, seed=seed + CONTROL)
    later = order[order.index(removed) + 1 :]
    sides = records(config, whole), records(of_never, never), records(of_chance, chance)
    return {
        "seed": seed, "removed": removed, "tasks": rest, "probes": results["probes"], "later": later,
        "before": dict(zip(order, results["accuracy"][0], strict=True))[removed],
        "whole": last_scores(results), "without": scores_without(config, whole, removed),
        "never": last_scores(results_never), "chance": last_scores(results_chance),
        "distance": {name: distance(sides[0][name], sides[1][name]) for name in later},
        "chance_distance": {name: distance(sides[2][name], sides[1][name]) for name in later},
    }  # fmt: skip


def interval(found: Mapping[str, Any], digits: int = 2) -> str:
    """``mean [low, high]``."""
    if found["low"] is None:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables."""
    first = rows[0]
    lines = [
        f"`{first['removed']}` removed, {len(rows)} seeds: mean with 95 % interval", "",
        "| set | run with all tasks | after the removal | never saw it | removal − never, paired | chance − never, paired |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip

    def columns(names: Sequence[str]) -> list[list[float]]:
        """Per side the mean over the sets of every seed."""
        return [
            [fmean(row[side][name] for name in names) for row in rows]
            for side in ("whole", "without", "never", "chance")
        ]

    groups = [(name, [name]) for name in (*first["tasks"], *first["probes"])]
    groups += [("mean of the other tasks", first["tasks"])]
    groups += [("mean of the probes", first["probes"])] if first["probes"] else []
    for label, names in groups:
        if any(
            row[side][name] is None
            for row in rows
            for side in ("whole", "without", "never", "chance")
            for name in names
        ):
            continue
        whole, without, never, chance = columns(names)
        cells = [interval(mean_interval(side), 1) for side in (whole, without, never)]
        cells += [interval(paired_difference(side, never)) for side in (without, chance)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| later task | ‖ΔW − ΔW'‖ / ‖ΔW'‖ | between two runs that never saw it |", "| --- | --- | --- |"]
    for name in first["later"]:
        sides = ([row[key][name] for row in rows] for key in ("distance", "chance_distance"))
        lines.append(f"| {name} | {' | '.join(interval(mean_interval(side)) for side in sides)} |")
    own = [
        [row["before"] for row in rows],
        *([row[side][first["removed"]] for row in rows] for side in ("whole", "without")),
    ]
    lines += ["", f"`{first['removed']}` itself: untouched, learned, removed: "
              + ", ".join(interval(mean_interval(side), 1) for side in own)]  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", default="demo-small")
    parser.add_argument("--method", default="keeplora++")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--remove", help="the task; default: the one in the middle of the order")
    parser.add_argument("--output", type=Path, default=Path("runs/removal"))
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="a setting, as for keeplora run")
    given = parser.parse_args(arguments)
    values = {"suite": given.suite, "method": given.method}
    changes = parse_overrides(given.overrides)
    rows = [measure(values, changes, seed, given.remove, given.output) for seed in given.seeds]
    atomic_write_json(given.output / "removal.json", rows)
    print(report(rows))
    return rows


if __name__ == "__main__":
    main()
