"""What each variant of a study changes: paired differences over the seeds, as a table, a figure and a file of the numbers.

    keeplora compare studies/ablations.yaml
    python benchmarks/differences.py runs/ablations --output docs/evidence/ablations.json --figure docs/images/ablations.png
    python benchmarks/differences.py docs/evidence/ablations.json                      # what is in docs/results.md

Several studies (or files of numbers) may be named: they are laid together, so that a variant of one is compared with the runs of
another under the same seed. Differences are in points, ours less `--against`, with a 95 % t interval over the paired seeds;
`n` says how many those are. Holm's correction is over every difference of three pairs or more: a bold one has p < 0.05 after it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import study_runs
from study_runs import METRICS, Seeds, told  # the sibling script: this folder is sys.path[0]

from keeplora.evaluation.stats import Interval, holm, mean_interval, paired_difference, paired_t_test

NAMES = ("variant",)
Cells = dict[str, Seeds]


def read(paths: Sequence[Path]) -> Cells:
    """Variant → its finished runs."""
    return {name: seeds for (name,), seeds in study_runs.read(paths, NAMES, lambda cell: (cell.method,)).items()}


def compared(cells: Cells, against: str) -> dict[tuple[str, str], tuple[Interval, float | None]]:
    """(variant, metric) → paired difference and its p after Holm's correction."""
    found: dict[tuple[str, str], tuple[Interval, float | None]] = {}
    for name, seeds in cells.items():
        pairs = sorted(seeds.keys() & cells[against].keys())
        for metric in METRICS:
            ours, theirs = ([side[s][metric] for s in pairs] for side in (seeds, cells[against]))
            if pairs and name != against:
                sure = paired_t_test(ours, theirs) if len(pairs) > 2 else None  # two pairs may agree by chance
                found[name, metric] = (paired_difference(ours, theirs), sure)
    corrected = holm([p for _, p in found.values()])
    return {key: (interval, p) for (key, (interval, _)), p in zip(found.items(), corrected, strict=True)}


def table(cells: Cells, against: str) -> list[str]:
    """Lines of Markdown."""
    differences = compared(cells, against)
    names = list(METRICS.values())
    lines = [
        f"| | n | {' | '.join(names)} | less {against}: {' | '.join(names)} |",
        f"| --- | ---: |{' ---: |' * 2 * len(names)}",
    ]
    for name, seeds in cells.items():
        columns = [told(mean_interval([m[metric] for m in seeds.values()])) for metric in METRICS]
        for metric in METRICS:
            found = differences.get((name, metric))
            text = told(found[0]) if found else ""
            columns.append(f"**{text}**" if found and found[1] is not None and found[1] < 0.05 else text)
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(columns)} |")
    return lines


def figure(cells: Cells, against: str, path: Path) -> None:
    """A row per variant and a panel per metric: the paired difference with its interval, and every pair a faint dot.

    A filled mark: the interval leaves out 0, a hollow one: it holds 0, a cross: there is none (one pair, or pairs that are all
    equal). An arrowhead ends an interval that goes on beyond the axis.
    """
    from matplotlib.figure import Figure

    differences = compared(cells, against)
    rows = [name for name in cells if name != against]
    drawing = Figure(figsize=(11, 1.5 + 0.34 * len(rows)), layout="constrained")
    for axes, (metric, title) in zip(drawing.subplots(1, len(METRICS), sharey=True), METRICS.items(), strict=True):
        reach = 1.15 * max((abs(d["mean"]) for (_, m), (d, _) in differences.items() if m == metric), default=1) + 8
        axes.set_xlim(-reach, reach)
        for y, name in enumerate(rows):
            if (name, metric) not in differences:
                continue
            interval, _ = differences[name, metric]
            pairs = cells[name].keys() & cells[against].keys()
            dots = [cells[name][s][metric] - cells[against][s][metric] for s in pairs]
            axes.scatter(dots, [y] * len(dots), s=9, color="C0", alpha=0.35)
            low, high = interval["low"], interval["high"]
            if low is None or high is None or low == high:
                axes.plot(interval["mean"], y, "x", color="C0", ms=7, mew=1.8)
                continue
            axes.plot([max(low, -reach), min(high, reach)], [y, y], color="C0", lw=1.5)
            # A few seeds' intervals may be wider than the axis.
            for end, marker in ((low, "<"), (high, ">")):
                if abs(end) > reach:
                    axes.plot(math.copysign(0.975 * reach, end), y, marker, color="C0", ms=6)
            axes.plot(interval["mean"], y, "o", color="C0", mfc="white" if low <= 0 <= high else "C0", ms=6)
        axes.axvline(0, color="gray", lw=0.8)
        axes.set_xlabel(f"{title}, points less {against}")
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), rows)
    drawing.axes[0].invert_yaxis()
    drawing.supxlabel(
        "95 % interval; filled: without 0; hollow: holds 0; ×: no interval (one pair, or all equal); arrow: goes on",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="folders of studies, or files that --output wrote")
    parser.add_argument(
        "--against", default="keeplora++", help="the method or variant that differences are taken against"
    )
    parser.add_argument("--output", type=Path, help="write the numbers here, as JSON")
    parser.add_argument("--figure", type=Path, help="write the figure here")
    args = parser.parse_args()
    for path in args.studies:
        if not path.exists():
            parser.error(f"{path} does not exist; give the folder of a study, or a file of numbers")
    cells = read(args.studies)
    if args.against not in cells:
        parser.error(f"no finished run of {args.against!r}; there are: {', '.join(cells) or 'none at all'}")
    print("\n".join(table(cells, args.against)))
    if args.output:
        study_runs.write(args.output, NAMES, {(name,): seeds for name, seeds in cells.items()})
    if args.figure:
        figure(cells, args.against, args.figure)


if __name__ == "__main__":
    main()
