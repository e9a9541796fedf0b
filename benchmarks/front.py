"""The front of learning against keeping: one line per γ through its learning rates, and what differs at like keeping.

    keeplora compare studies/front.yaml
    python benchmarks/front.py runs/front --output docs/evidence/front.json --figure docs/images/front.png
    python benchmarks/front.py docs/evidence/front.json                      # what is in docs/results.md

Prints, as Markdown, Last, Transfer and Probe of every cell (mean and 95 % t interval over seeds), and two comparisons of each γ
with γ = 1, paired by seed:

- at its best rate: the learning rate with the highest Last on *other* seeds (leave one seed out, so that a rate is never chosen
  by the numbers it is told with). The test pictures are the same for all seeds: what is left out is the seed's luck, not the
  pictures'.
- at like keeping: Last where a seed's line through its learning rates falls to a Probe that was asked for, which asks whether one
  front lies above the other without choosing a point of it.

Several studies (or files of numbers) may be named: they are laid together, the later one's runs in place of the earlier one's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean

import study_runs
from study_runs import METRICS, Seeds, told  # the sibling script: this folder is sys.path[0]

from keeplora.evaluation.stats import mean_interval, paired_difference
from keeplora.report.study_data import StudyCell
from keeplora.study.collect import config_of

MARKERS = "osD^vP"
"""One for each learning rate."""
NAMES = ("gamma", "learning_rate")
Cells = dict[tuple[float, float], Seeds]


def read(studies: Sequence[Path]) -> Cells:
    """(γ, learning rate) → its finished runs, by γ and rate."""

    def label(cell: StudyCell) -> tuple[float, float]:
        config = config_of(cell.run) if cell.run is not None else {}
        return (float(config["tuner"]["gamma"]), float(config["training"]["learning_rate"]))

    return dict(sorted(study_runs.read(studies, NAMES, label).items()))


def chosen(cells: Cells, gamma: float, seed: str) -> float | None:
    """The learning rate with the highest mean Last over the seeds other than ``seed``; None without two to choose from.

    >>> low, high = {"0": {"last": 9.0}, "1": {"last": 1.0}}, {"0": {"last": 1.0}, "1": {"last": 2.0}}
    >>> chosen({(1.0, 0.1): low, (1.0, 0.2): high}, 1.0, "0")
    0.2
    >>> chosen({(1.0, 0.1): low}, 1.0, "0") is None
    True
    """
    means = {
        rate: fmean(values)
        for (g, rate), seeds in cells.items()
        if g == gamma and seed in seeds and (values := [m["last"] for s, m in seeds.items() if s != seed])
    }
    return max(means, key=means.__getitem__) if len(means) > 1 else None


def at_their_best(cells: Cells) -> dict[float, dict[str, tuple[float, Mapping[str, float]]]]:
    """γ → seed → (learning rate, metrics) with each seed's rate chosen on the others."""
    found: dict[float, dict[str, tuple[float, Mapping[str, float]]]] = {}
    for gamma in {g for g, _ in cells}:
        for seed in {s for (g, _), seeds in cells.items() if g == gamma for s in seeds}:
            if (rate := chosen(cells, gamma, seed)) is not None:
                found.setdefault(gamma, {})[seed] = (rate, cells[gamma, rate][seed])
    return dict(sorted(found.items()))


def at_level(line: Sequence[Mapping[str, float]], level: float) -> float | None:
    """Last where Probe first falls to ``level`` along one seed's learning rates, upwards, between two of them in proportion.

    None if the line never comes from ``level`` or above to below it: nothing is read beyond the rates that were run.

    >>> at_level([{"probe": 30.0, "last": 50.0}, {"probe": 20.0, "last": 60.0}], 25.0)
    55.0
    >>> at_level([{"probe": 30.0, "last": 50.0}, {"probe": 26.0, "last": 60.0}], 25.0) is None
    True
    """
    for left, right in pairwise(line):
        if left["probe"] >= level > right["probe"]:
            share = (left["probe"] - level) / (left["probe"] - right["probe"])
            return left["last"] + share * (right["last"] - left["last"])
    return None


def at_like_keeping(cells: Cells, level: float) -> dict[float, dict[str, float]]:
    """γ → seed → Last at that Probe; a seed's line ends where it lacks a rate."""
    found: dict[float, dict[str, float]] = {}
    for gamma in {g for g, _ in cells}:
        rates = [seeds for (g, _), seeds in sorted(cells.items()) if g == gamma]
        for seed in sorted(set().union(*rates)):
            line = [seeds[seed] for seeds in takewhile(lambda seeds, seed=seed: seed in seeds, rates)]
            if (last := at_level(line, level)) is not None:
                found.setdefault(gamma, {})[seed] = last
    return dict(sorted(found.items()))


def tables(cells: Cells, against: float, levels: Sequence[float]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| γ | learning rate | n | Last | Transfer | Probe |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for (gamma, rate), seeds in cells.items():
        columns = [told(mean_interval([m[name] for m in seeds.values()])) for name in METRICS]
        lines.append(f"| {gamma:g} | {rate:.3g} | {len(seeds)} | {' | '.join(columns)} |")
    best = at_their_best(cells)
    head = "| γ at its best rate (chosen on other seeds) | rates | n | Last | Transfer | Probe |"
    lines += ["", f"{head} less γ = {against:g}: Last | Transfer | Probe |", f"| --- | --- |{' ---: |' * 7}"]
    for gamma, seeds in best.items():
        rates = ", ".join(f"{rate:.3g}" for rate in sorted({rate for rate, _ in seeds.values()}))
        columns = [str(len(seeds)), *(told(mean_interval([m[name] for _, m in seeds.values()])) for name in METRICS)]
        pairs = sorted(seeds.keys() & best.get(against, {}).keys())
        for name in METRICS:
            ours, theirs = ([side[s][1][name] for s in pairs] for side in (seeds, best.get(against, {})))
            columns.append(told(paired_difference(ours, theirs)) if pairs and gamma != against else "")
        lines.append(f"| {gamma:g} | {rates} | {' | '.join(columns)} |")
    lines += [
        "",
        f"| at Probe | γ | n | Last | n of both | Last less γ = {against:g} |",
        f"| ---: | ---: |{' ---: |' * 4}",
    ]
    for level in levels:
        like = at_like_keeping(cells, level)
        for gamma, lasts in like.items():
            columns = [str(len(lasts)), told(mean_interval(list(lasts.values())))]
            pairs = sorted(lasts.keys() & like.get(against, {}).keys()) if gamma != against else []
            columns.append(str(len(pairs)) if pairs else "")
            difference = (
                paired_difference([lasts[s] for s in pairs], [like[against][s] for s in pairs]) if pairs else None
            )
            columns.append(told(difference) if difference else "")
            lines.append(f"| {level:g} | {gamma:g} | {' | '.join(columns)} |")
    return lines


def figure(cells: Cells, path: Path) -> None:
    """Last over Transfer and over Probe: a line per γ through the means of its learning rates, every seed a faint dot.

    Bars would say less: of two or three seeds a t interval is wider than the page.
    """
    from matplotlib.figure import Figure

    rates = sorted({rate for _, rate in cells})
    drawing = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, keep in zip(drawing.subplots(1, 2, sharey=True), ("transfer", "probe"), strict=True):
        for number, gamma in enumerate(sorted({g for g, _ in cells})):
            points = [(rate, list(seeds.values())) for (g, rate), seeds in cells.items() if g == gamma]
            x, y = ([fmean(m[name] for m in seeds) for _, seeds in points] for name in (keep, "last"))
            axes.plot(x, y, "-", color=f"C{number}", label=f"γ = {gamma:g}")
            every = [m for _, seeds in points for m in seeds]
            axes.scatter([m[keep] for m in every], [m["last"] for m in every], s=9, color=f"C{number}", alpha=0.35)
            for (rate, _), at_x, at_y in zip(points, x, y, strict=True):
                axes.plot(at_x, at_y, MARKERS[rates.index(rate) % len(MARKERS)], color=f"C{number}", markersize=8)
        axes.set_xlabel(f"{METRICS[keep]}, percent")
        axes.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("Last, percent")
    for number, rate in enumerate(rates):
        drawing.axes[0].plot([], [], MARKERS[number % len(MARKERS)], color="gray", label=f"learning rate {rate:.2g}")
    drawing.axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", type=Path, nargs="+", help="a study's folder, or the numbers that were written of it"
    )
    parser.add_argument("--against", type=float, default=1.0, help="the γ that differences are taken against")
    parser.add_argument("--levels", type=float, nargs="+", default=[25.0, 20.0, 15.0], help="Probe, percent")
    parser.add_argument("--output", type=Path, help="write the numbers of the runs here as well")
    parser.add_argument("--figure", type=Path, help="write the figure here as well")
    args = parser.parse_args()
    if missing := [path for path in args.studies if not path.exists()]:
        parser.error(f"{missing[0]} is not there; give the folder of a study, or a file of its numbers")
    if not (cells := read(args.studies)):
        parser.error("no finished run in there; give the folder of a study, or a file of its numbers")
    print("\n".join(tables(cells, args.against, args.levels)))
    if args.output:
        study_runs.write(args.output, NAMES, cells)
    if args.figure:
        figure(cells, args.figure)


if __name__ == "__main__":
    main()
