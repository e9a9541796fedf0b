"""How often `keeplora.tuner.task_detection` gives false alarms, and how soon it sees a new task; with intervals.

    python benchmarks/task_detection.py                                  # some minutes for the features, once; then a minute
    python benchmarks/task_detection.py --plot docs/images/task-detection.png
    python benchmarks/task_detection.py --late runs/demo-small-keeplora++-seed0    # its old tasks coming back after its last

The demo model's features (embedded, 112 pixels, vision tower) of all pictures of demo-small's five sources are gone through
once: per source and start (64 pictures that make V) the share of energy outside span[U₀, V] of every picture at every layer.
Streams are then drawn from that table, pictures with replacement, those that made V left out:

- shuffled: one source, no boundary: alarms per sample against the rate asked for;
- sorted: one source, its pictures in the order of its files, class by class: what is promised for samples in no order does
  not hold here;
- abrupt: 200 samples of one source, then another's: samples from the change to the alarm, over all 20 ordered pairs;
- gradual: the other source's share rises from 0 to 1 over 200 samples: samples from the rise's beginning to the alarm.

Intervals: 95 %, t over repetitions (source × start × seed). Compared: what is outside of (U₀ alone, V alone, both), how layers
become one number, and how many samples give the ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from machine import machine
from torch import Tensor

from keeplora.evaluation.stats import mean_interval
from keeplora.experiment import TrainedModel, load_config
from keeplora.experiment.pictures import Collate, loader
from keeplora.experiment.setup import prepare
from keeplora.files import atomic_write_bytes
from keeplora.math import Subspace, new_directions
from keeplora.math.change import RankCusum
from keeplora.methods import method_names
from keeplora.tuner.observers import FeatureObserver, quiet_model
from keeplora.tuner.task_detection import ShareObserver, reduce_layers

STARTS, FIT, RANKS, BEFORE, RAMP, MOST = 3, 64, 64, 200, 200, 2000
RATES = (1e-2, 1e-3, 1e-4)
BOTH = "U₀ + V"
REFERENCES = ("U₀", "V", BOTH)


def features(cache: Path, late: Path | None = None) -> dict[str, Any]:
    """Per reference, source and start: the shares (pictures of all sources, layers); and which pictures made V.

    Args:
        late: a run; its model and U before its last task, which is the only one to start from.
    """
    if cache.is_file():
        return torch.load(cache, weights_only=True)
    config = load_config({"suite": "demo", "method": "keeplora++"}, {}, known_methods=method_names())
    setup = prepare(config)
    family, learner = setup.family, setup.method.learner(setup.family.model, setup.tuner_config())
    starts = [task.name for task in setup.tasks]
    if late is not None:
        trained = TrainedModel(late, device="cpu")
        family, learner = trained.family, trained.learner
        starts = trained.tasks[-1:]
        learner.rollback(trained.tasks[-2])
    targets = [t for t in learner.targets if "vis" in t.tower]
    pictures = {
        task.name: [
            batch["pixel_values"]
            for part in ("train", "test")
            for batch in loader(getattr(setup.sets[task.name], part), 32, Collate())
        ]
        for task in setup.tasks
    }
    pixels = {name: torch.cat(found) for name, found in pictures.items()}
    labels = {
        task.name: [*setup.sets[task.name].train.labels, *setup.sets[task.name].test.labels] for task in setup.tasks
    }
    fits = {
        (name, start): torch.randperm(len(p), generator=torch.Generator().manual_seed(start))[:FIT]
        for name, p in pixels.items()
        if name in starts
        for start in range(STARTS)
    }
    model = learner.model
    subspaces: dict[tuple[str, str, int], dict[str, Subspace]] = {}
    none: dict[str, Subspace] = {}
    with torch.no_grad(), quiet_model(model):
        for (name, start), chosen in fits.items():
            with FeatureObserver(targets, learner.store) as observer:
                family.image_features(pixels[name][chosen])
            for layer, C in observer.leaders().items():
                assert isinstance(C, Tensor)
                energy, U0 = learner.feature_energy(layer), learner.U.subspace(layer)  # late: U of all tasks before
                none[layer] = Subspace.of(torch.zeros(C.shape[0], 0))
                for reference, S in (("V", none[layer]), (BOTH, U0)):
                    found = subspaces.setdefault((reference, name, start), {})
                    found[layer] = S.extended(new_directions(S, C, energy)[0])
        subspaces["U₀", "", 0] = {layer: learner.U.subspace(layer) for layer in none}
        shares: dict[str, list[Tensor]] = {}
        for name, all_of_it in pixels.items():
            for batch in all_of_it.split(32):
                with ExitStack() as stack:
                    watching = {
                        key: stack.enter_context(ShareObserver(targets, learner.store, seen))
                        for key, seen in subspaces.items()
                    }
                    for observer in watching.values():
                        observer.begin(len(batch), {})
                    family.image_features(batch)
                for key, observer in watching.items():
                    table = torch.stack([observer.shares()[layer] for layer in none], dim=1).double()
                    shares.setdefault("|".join(map(str, key)), []).append(table)
            print(f"features of {name}: {len(all_of_it)} pictures", flush=True)
    out = {
        "labels": labels,
        "counts": {name: len(p) for name, p in pixels.items()},
        "fits": {f"{name}|{start}": chosen for (name, start), chosen in fits.items()},
        "shares": {key: torch.cat(parts) for key, parts in shares.items()},
    }
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(out, cache)
    return out


class Table:
    """One number per picture as a detector that began on ``source`` sees it."""

    def __init__(self, found: dict[str, Any], source: str, start: int, reference: str, how: str) -> None:
        key = "U₀||0" if reference == "U₀" else f"{reference}|{source}|{start}"
        shares = found["shares"][key]
        fit = found["fits"][f"{source}|{start}"]
        offsets, at = {}, 0
        for name, n in found["counts"].items():
            offsets[name] = at
            at += n
        made = shares[fit + offsets[source]]
        mean, spread = made.mean(0), made.std(0).clamp(min=1e-12)
        if how == "mean of shares":
            spread = torch.ones_like(spread)
        numbers = reduce_layers(shares, mean, spread)
        used = set(fit.tolist())
        self.of = {
            name: [float(numbers[offsets[name] + i]) for i in range(n) if name != source or i not in used]
            for name, n in found["counts"].items()
        }
        self.in_order = self.of[source]  # the files lie class by class within each split

    def draw(self, name: str, random: Random, n: int) -> list[float]:
        return random.choices(self.of[name], k=n)


def watch(table: Table, source: str, rate: float, seed: int, ranks: int = RANKS) -> RankCusum:
    found = RankCusum(rate, seed=seed)
    # Draws of their own: the same ones as for the ties would tie each picture to one side of its equals.
    found.learn(table.draw(source, Random(f"ranks {source} {seed}"), ranks))
    return found


def tables(found: dict[str, Any], reference: str, how: str) -> Iterator[tuple[str, int, Table]]:
    for source in dict.fromkeys(key.partition("|")[0] for key in found["fits"]):
        for start in range(STARTS):
            yield source, start, Table(found, source, start, reference, how)


def interval(values: list[float], form: str) -> str:
    one = mean_interval(values)
    return f"{one['mean']:{form}} [{one['low']:{form}}, {one['high']:{form}}]"


def false_alarms(found: dict[str, Any], rate: float, samples: int, *, in_order: bool = False) -> list[float]:
    """Alarms per sample without any boundary, one number per source and start."""
    out = []
    for source, start, table in tables(found, BOTH, "on one scale"):
        random, one = Random(f"{source} {start}"), watch(table, source, rate, start)
        if in_order:
            stream = (table.in_order * (samples // len(table.in_order) + 1))[:samples]
        else:
            stream = table.draw(source, random, samples)
        out.append(sum(one.update(value) is not None for value in stream) / samples)
    return out


def delays(
    found: dict[str, Any], rate: float, *, gradual: bool = False, reference: str = BOTH, how: str = "on one scale",
    ranks: int = RANKS, seeds: int = 4,
) -> dict[tuple[str, str], list[float]]:  # fmt: skip
    """Samples from the change (or from the beginning of the rise) to the first alarm after it, per ordered pair."""
    out: dict[tuple[str, str], list[float]] = {}
    for source, start, table in tables(found, reference, how):
        for other in found["counts"]:
            for seed in range(seeds if other != source else 0):
                random = Random(f"{source} {other} {start} {seed}")
                one = watch(table, source, rate, seed, ranks)
                for value in table.draw(source, random, BEFORE):
                    one.update(value)  # an alarm here is a false one; the watch goes on
                delay = MOST
                for i in range(1, MOST):
                    mixed = source if gradual and random.random() > i / RAMP else other
                    if one.update(table.draw(mixed, random, 1)[0]) is not None:
                        delay = i
                        break
                out.setdefault((source, other), []).append(delay)
    return out


def quantiles(pairs: dict[tuple[str, str], list[float]]) -> tuple[str, float, float, float]:
    """(mean with interval over repetitions, median, 90th percentile, share not seen at all)."""
    every = sorted(value for values in pairs.values() for value in values)
    return (
        interval(every, ".1f"), median(every), every[int(0.9 * (len(every) - 1))],
        sum(v >= MOST for v in every) / len(every),
    )  # fmt: skip


def plot(
    path: Path, rates: dict[str, list[list[float]]], abrupt: dict[tuple[str, str], list[float]], rate: float
) -> None:
    import io

    from matplotlib.figure import Figure

    from keeplora.report.palette import SERIES

    figure = Figure(figsize=(10, 4.2), facecolor="white", layout="constrained")
    axes, grid = figure.subplots(1, 2)
    axes.plot([RATES[-1] / 2, RATES[0] * 2], [RATES[-1] / 2, RATES[0] * 2], color="#8b97a5", linewidth=1)
    for i, (name, found) in enumerate(rates.items()):
        stats = [mean_interval(one) for one in found]
        means = [s["mean"] for s in stats]
        bars = [(s["high"] or 0.0) - s["mean"] for s in stats]
        axes.errorbar(RATES, means, yerr=bars, fmt="os"[i], color=SERIES["light"][i], capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("false alarms per sample, asked for")
    axes.set_ylabel("measured")
    axes.set_title("No boundary: false alarms", loc="left", fontsize=11)
    axes.legend(frameon=False)
    names = sorted({a for a, _ in abrupt})
    values = [[median(abrupt[a, b]) if a != b else float("nan") for b in names] for a in names]
    top = max(value for row in values for value in row if value == value)
    image = grid.imshow(values, cmap="Blues", aspect="auto", vmin=0.0, vmax=top)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                grid.text(
                    x,
                    y,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    color="black" if value < 0.6 * top else "white",
                    fontsize=9,
                )
    grid.set_xticks(range(len(names)), names, rotation=30, ha="right")
    grid.set_yticks(range(len(names)), names)
    grid.set_xlabel("to")
    grid.set_ylabel("from")
    grid.set_title(f"Abrupt change: median delay in samples (rate {rate:g})", loc="left", fontsize=11)
    figure.colorbar(image, ax=grid)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=110)
    atomic_write_bytes(path, buffer.getvalue())


def old_tasks(found: dict[str, Any]) -> None:
    """Delays from a run's last task to each of its old ones."""
    print(f"{machine()}\n\n| outside of | from | to | delay: mean [95 %] | median | not seen |\n|" + " --- |" * 6)
    for reference in ("V", BOTH):
        for (source, other), values in delays(found, 1e-3, reference=reference, seeds=20).items():
            missed = sum(v >= MOST for v in values) / len(values)
            name = "U of the old tasks + V" if reference == BOTH else reference
            print(f"| {name} | {source} | {other} | {interval(values, '.1f')} | {median(values):.0f} | {missed:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=Path("runs/task-detection.pt"), help="the table of shares")
    parser.add_argument("--samples", type=int, default=20_000, help="of each stream without a boundary")
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument(
        "--late", type=Path, default=None, help="a run on demo or demo-small: its last task, then its old ones"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.late is not None:
        old_tasks(features(given.cache.with_suffix(".late.pt"), given.late))
        return
    found = features(given.cache)
    print(f"{machine()}\npictures: {found['counts']}\n")
    print("| stream | asked | false alarms per sample, mean [95 %] | of the rate asked |\n| --- | --- | --- | --- |")
    rates: dict[str, list[list[float]]] = {}
    for name, in_order in (("shuffled", False), ("sorted by class", True)):
        for rate in RATES:
            values = false_alarms(found, rate, given.samples, in_order=in_order)
            rates.setdefault(name, []).append(values)
            told = interval(values, ".2e")
            print(f"| {name} | {rate:g} | {told} | {fmean(values) / rate:.2f} |", flush=True)
    print(
        "\n| change | rate | outside of | layers | ranks | delay, samples: mean [95 %] | median | 90 % | slowest pair (median) "
        "| not seen |\n|" + " --- |" * 10
    )
    cases: list[dict[str, Any]] = [{"rate": rate, "gradual": g} for g in (False, True) for rate in RATES]
    cases += [{"rate": 1e-3, "reference": reference} for reference in REFERENCES[:2]]
    cases += [{"rate": 1e-3, "how": "mean of shares"}, *({"rate": 1e-3, "ranks": n} for n in (16, 32, 256))]
    shown: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        pairs = delays(found, **case)
        if case == {"rate": 1e-3, "gradual": False}:
            shown = pairs
        mean, middle, late, missed = quantiles(pairs)
        slowest = max(pairs, key=lambda p: median(pairs[p]))
        print(
            f"| {'gradual' if case.get('gradual') else 'abrupt'} | {case['rate']:g} | {case.get('reference', BOTH)} "
            f"| {case.get('how', 'on one scale')} | {case.get('ranks', RANKS)} | {mean} | {middle:.0f} | {late:.0f} "
            f"| {slowest[0]} → {slowest[1]} ({median(pairs[slowest]):.0f}) | {missed:.3f} |",
            flush=True,
        )
    if given.plot is not None:
        plot(given.plot, rates, shown, 1e-3)


if __name__ == "__main__":
    main()
